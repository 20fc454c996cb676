"""Judging conditions against plain computations, and fidelity against dense formulas."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.evaluation.drift import FidelityOptions, mean_cosine, sampler_fidelity
from hf_corrector.evaluation.evaluator import Condition, Judgement, JudgeOptions, clean_queries, judge
from hf_corrector.index.base import TensorVectors
from hf_corrector.metrics import DEFAULT_METRICS, Interval, Undefined, paired_bootstrap, quality

TARGETS, DIM, QUERIES = 400, 16, 240
FAST = JudgeOptions(resamples=400)


def noise(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed))


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=1)


FRESH = unit(noise(TARGETS, 0))
POSITIVE = torch.randint(0, TARGETS, (QUERIES,), generator=torch.Generator().manual_seed(1))
ASKED = unit(FRESH[POSITIVE] + 0.25 * noise(QUERIES, 2))
RELEVANT = [{int(row): 1.0} for row in POSITIVE]
CLEAN = np.arange(QUERIES) % 4 > 0


def away(amount: float) -> TensorVectors:
    """Targets that have drifted from the fresh ones by ``amount``."""
    return TensorVectors(unit(FRESH + amount * noise(TARGETS, 3)))


def example(*, stale: float = 0.5, corrected: float = 0.2, old: float = 0.35) -> dict[str, Condition]:
    return {
        "stale": (ASKED, away(stale)),
        "corrected": (ASKED, away(corrected)),
        "fresh": (ASKED, TensorVectors(FRESH)),
        "old": (unit(ASKED + old * noise(QUERIES, 4)), TensorVectors(FRESH)),
    }


def judged(conditions: dict[str, Condition]) -> Judgement:
    return judge(conditions, RELEVANT, clean=CLEAN, options=FAST)


def test_means_and_intervals_equal_the_plain_computation() -> None:
    conditions = example()
    judgement = judge(conditions, RELEVANT, clean=CLEAN, options=JudgeOptions(resamples=300, seed=9))
    values = {}
    for name, (queries, vectors) in conditions.items():
        scores = queries.double() @ vectors.read(0, TARGETS).double().T
        ranked = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :100]
        values[name] = quality(ranked, RELEVANT)
        for metric in DEFAULT_METRICS:
            assert judgement.means[name][metric].estimate == pytest.approx(values[name][metric][CLEAN].mean())
            assert judgement.all_queries[name][metric] == pytest.approx(values[name][metric].mean())
            np.testing.assert_allclose(judgement.per_query[name][metric], values[name][metric])
    clean = {f"{metric} {name}": values[name][metric][CLEAN] for metric in DEFAULT_METRICS for name in conditions}
    boot = paired_bootstrap(clean, generator=np.random.default_rng(9), resamples=300)
    for metric in ("mrr@10", "ndcg@10"):
        ends = {"stale": f"{metric} stale", "fresh": f"{metric} fresh"}
        recovery, mine = boot.recovery(f"{metric} corrected", **ends), judgement.recovery["corrected"][metric]
        assert isinstance(recovery, Interval) and isinstance(mine, Interval)
        assert mine.to_dict() == pytest.approx(recovery.to_dict())
        retention = boot.retention(f"{metric} old", full=ends["fresh"])
        assert judgement.retention["old"][metric].to_dict() == pytest.approx(retention.to_dict())
        gap = boot.difference(ends["fresh"], ends["stale"])
        assert judgement.differences["fresh-stale"][metric].to_dict() == pytest.approx(gap.to_dict())


def test_dictionary_has_every_number_and_is_strict_json() -> None:
    record = judged(example()).to_dict()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    for name in ("stale", "corrected", "fresh", "old"):
        assert list(record[name]) == list(DEFAULT_METRICS)
        assert list(record["all_queries"][name]) == list(DEFAULT_METRICS)
        for metric, interval in record["intervals"][name].items():
            assert interval["low"] <= record[name][metric] == interval["estimate"] <= interval["high"]
    assert record["queries"] == QUERIES and record["clean_queries"] == int(CLEAN.sum())
    assert list(record["recovery"]) == list(DEFAULT_METRICS)
    assert set(record["recovery"]["mrr@10"]) == {"estimate", "low", "high"}
    assert record["comparisons"]["recovery"]["corrected"] == record["recovery"]
    assert record["stale"]["mrr@10"] < record["corrected"]["mrr@10"] < record["fresh"]["mrr@10"]


def test_only_clean_queries_count() -> None:
    """Corrupting the other queries changes the means of all queries and nothing else."""
    before = judged(example())
    spoiled = {
        name: (torch.where(torch.from_numpy(CLEAN)[:, None], queries, -queries), vectors)
        for name, (queries, vectors) in example().items()
    }
    after = judged(spoiled)
    first, second = before.to_dict(), after.to_dict()
    assert first.pop("all_queries") != second.pop("all_queries")
    assert first == second


def test_order_of_targets_does_not_matter() -> None:
    order = torch.randperm(TARGETS, generator=torch.Generator().manual_seed(5))
    place = torch.argsort(order)
    shuffled = {
        name: (queries, TensorVectors(vectors.read(0, TARGETS)[order]))
        for name, (queries, vectors) in example().items()
    }
    relevant = [{int(place[row]): grade for row, grade in known.items()} for known in RELEVANT]
    assert judge(shuffled, relevant, clean=CLEAN, options=FAST).to_dict() == judged(example()).to_dict()


def test_further_conditions_are_compared_like_the_corrected_one() -> None:
    conditions = {**example(), "mean_shift": (ASKED, away(0.2))}
    judgement = judged(conditions)
    same, corrected = judgement.recovery["mean_shift"]["mrr@10"], judgement.recovery["corrected"]["mrr@10"]
    assert same.to_dict() == pytest.approx(corrected.to_dict())
    assert "recovery, mean_shift" in judgement.table()


def test_without_clean_queries_nothing_is_claimed() -> None:
    judgement = judge(example(), RELEVANT, clean=np.zeros(QUERIES, bool), options=FAST)
    record = judgement.to_dict()
    json.dumps(record, allow_nan=False)
    assert record["clean_queries"] == 0 and record["recovery"] == {} and record["intervals"] == {}
    assert record["stale"] == dict.fromkeys(DEFAULT_METRICS)
    assert record["all_queries"]["stale"]["mrr@10"] > 0
    assert "nothing honest can be said" in judgement.sentence()
    assert "flattered" in judgement.table()


@pytest.mark.parametrize("names", [("stale",), ("fresh", "old"), ("stale", "corrected"), ("stale", "fresh")])
def test_conditions_may_be_missing(names: tuple[str, ...]) -> None:
    judgement = judged({name: example()[name] for name in names})
    record = judgement.to_dict()
    json.dumps(record, allow_nan=False)
    assert [name for name in ("stale", "corrected", "fresh", "old") if name in record] == list(names)
    assert record["recovery"] == {}
    assert judgement.sentence().endswith(".") and judgement.table()


def test_table_is_aligned_and_complete() -> None:
    lines = judged(example()).table().splitlines()
    assert lines[0].startswith("180 clean of 240 queries")
    assert lines[1].split() == ["MRR@10", "recall@10", "recall@100", "nDCG@10", "success@10"]
    labels = [line[:20].split("  ")[0].strip() for line in lines[2:] if not line.startswith(" ")]
    assert labels[:5] == ["stale", "corrected", "fresh", "old", "recovery, corrected"]
    ends = {len(line) for line in lines[1:11]}
    assert len(ends) == 1
    assert max(ends) <= 130


def test_sentence_tells_loss_recovery_and_old_model() -> None:
    sentence = judged(example()).sentence()
    assert sentence.startswith("The stale index loses 0.")
    assert "of MRR@10 on 180 clean queries" in sentence
    assert "% [" in sentence and "of the loss without re-encoding the corpus" in sentence
    assert "keeping the old model would be worse than correction" in sentence


def test_sentence_says_when_there_is_nothing_to_recover() -> None:
    judgement = judged(example(stale=0.0, corrected=0.0))
    assert "Nothing to recover that 180 clean queries could show" in judgement.sentence()
    assert isinstance(judgement.recovery["corrected"]["mrr@10"], Undefined)
    assert judgement.to_dict()["recovery"]["mrr@10"]["estimate"] is None
    assert "no recovery of MRR@10: fresh - stale is 0.0000" in judgement.table()


def test_sentence_says_when_fresh_is_worse() -> None:
    conditions = {"stale": (ASKED, TensorVectors(FRESH)), "fresh": (ASKED, away(0.6))}
    assert "the fresh index is worse than the stale one" in judged(conditions).sentence()


def test_sentence_says_when_correction_hurts() -> None:
    assert "correction made it worse, by 0." in judged(example(stale=0.3, corrected=0.8)).sentence()


def test_sentence_says_when_correction_may_be_nothing() -> None:
    conditions = example()
    conditions["corrected"] = conditions["stale"]
    assert "correction changed it by 0.000 [0.000, 0.000], which may be nothing" in judged(conditions).sentence()


def test_sentence_says_when_keeping_the_old_model_is_better() -> None:
    exact = {"old": (ASKED, TensorVectors(FRESH))}
    against_fresh = {**example(), "fresh": (ASKED, away(0.1)), "corrected": (ASKED, away(0.3)), **exact}
    assert "keeping the old model is better than correction" in judged({**example(), **exact}).sentence()
    against_fresh["fresh"] = (ASKED, away(0.35))
    assert "keeping the old model is better even than re-encoding everything" in judged(against_fresh).sentence()


def test_clean_queries_have_no_positive_among_the_fitted() -> None:
    relevant = [{1: 1.0, 2: 1.0}, {3: 1.0}, {2: 0.0, 4: 1.0}, {5: 2.0}]
    expected = [False, True, True, False]
    for fitted in (np.array([2, 5, 9]), [2, 5, 9], {2, 5, 9}, range(2, 6, 3)):
        assert clean_queries(relevant, fitted).tolist() == expected
    assert clean_queries(relevant, []).tolist() == [True] * 4
    assert clean_queries(relevant, np.empty(0, np.int64)).dtype == np.bool_
    assert clean_queries([], [1]).shape == (0,)


def test_judge_refuses_what_does_not_fit() -> None:
    conditions = example()
    with pytest.raises(DataError, match="clean"):
        judge(conditions, RELEVANT, clean=CLEAN[:-1])
    with pytest.raises(DataError, match="clean"):
        judge(conditions, RELEVANT, clean=CLEAN.astype(int))
    with pytest.raises(DataError, match="same targets"):
        judge({**conditions, "old": (ASKED[:-1], away(0.1))}, RELEVANT, clean=CLEAN)
    with pytest.raises(DataError, match="same targets"):
        judge({**conditions, "old": (ASKED, TensorVectors(FRESH[:-1]))}, RELEVANT, clean=CLEAN)
    with pytest.raises(DataError, match="judgements of query 0"):
        judge(conditions, [{}, *RELEVANT[1:]], clean=CLEAN)
    with pytest.raises(DataError, match="judgements of query 0"):
        judge(conditions, [{TARGETS: 1.0}, *RELEVANT[1:]], clean=CLEAN)
    with pytest.raises(ConfigurationError, match="none called"):
        judge({"queries": conditions["stale"]}, RELEVANT, clean=CLEAN)
    with pytest.raises(ConfigurationError, match="primary"):
        judge(conditions, RELEVANT, clean=CLEAN, options=JudgeOptions(primary="ndcg@5"))


def test_conditions_may_have_different_sizes_of_vectors() -> None:
    wide = torch.cat([FRESH, torch.zeros(TARGETS, 3)], dim=1)
    asked = torch.cat([ASKED, torch.ones(QUERIES, 3)], dim=1)
    judgement = judged({**example(), "old": (asked, TensorVectors(wide))})
    assert judgement.means["old"]["mrr@10"].estimate == pytest.approx(judgement.means["fresh"]["mrr@10"].estimate)


def dense_fidelity(approx: torch.Tensor, *, scale: float, relevant: list, hard_k: int) -> tuple[float, float]:
    """Total variation and overlap from whole matrices."""
    tv, recall = [], []
    for query, known in zip(ASKED.double(), relevant, strict=True):
        left = np.array([row for row in range(TARGETS) if known.get(row, 0) <= 0])
        mine = scale * (approx.double()[left] @ query)
        theirs = scale * (FRESH.double()[left] @ query)
        tv.append(float((mine.softmax(0) - theirs.softmax(0)).abs().sum()) / 2)
        k = min(hard_k, len(left))
        best = {int(row) for row in mine.topk(k).indices}, {int(row) for row in theirs.topk(k).indices}
        recall.append(len(best[0] & best[1]) / k)
    return float(np.mean(tv)), float(np.mean(recall))


@pytest.mark.parametrize("budget_bytes", [20_000, 10**8])
@pytest.mark.parametrize(("scale", "hard_k"), [(20.0, 50), (1.0, 7), (5000.0, 390)])
def test_fidelity_equals_the_dense_formula(budget_bytes: int, scale: float, hard_k: int) -> None:
    generator = np.random.default_rng(0)
    relevant = [
        {**known, **{int(row): float(row % 2) for row in generator.integers(0, TARGETS, size=20)}} for known in RELEVANT
    ]
    drifted = away(0.3)
    options = FidelityOptions(hard_k=hard_k, budget_bytes=budget_bytes)
    found = sampler_fidelity(
        ASKED, drifted, exact=TensorVectors(FRESH), scale=scale, relevant=relevant, options=options
    )
    tv, recall = dense_fidelity(drifted.tensor, scale=scale, relevant=relevant, hard_k=hard_k)
    assert found.tv == pytest.approx(tv, abs=1e-10)
    assert found.hard_negative_recall == pytest.approx(recall, abs=1e-12)
    assert (found.queries, found.hard_k) == (QUERIES, hard_k)


def test_fidelity_of_exact_vectors_is_perfect_and_gets_worse_with_drift() -> None:
    exact = TensorVectors(FRESH)
    perfect = sampler_fidelity(ASKED, exact, exact=exact, scale=20.0, relevant=RELEVANT)
    assert perfect.to_dict() == {"tv": 0.0, "hard_negative_recall": 1.0, "queries": QUERIES, "hard_k": 50}
    near, far = (sampler_fidelity(ASKED, away(x), exact=exact, scale=20.0, relevant=RELEVANT) for x in (0.1, 0.5))
    assert 0 < near.tv < far.tv < 1
    assert 1 > near.hard_negative_recall > far.hard_negative_recall > 0


def test_known_positives_do_not_count() -> None:
    moved = FRESH.clone()
    moved[POSITIVE[0]] = -moved[POSITIVE[0]]
    found = sampler_fidelity(
        ASKED[:1], TensorVectors(moved), exact=TensorVectors(FRESH), scale=20.0, relevant=RELEVANT[:1]
    )
    assert (found.tv, found.hard_negative_recall) == (0.0, 1.0)


def test_fidelity_refuses_what_does_not_fit() -> None:
    exact = TensorVectors(FRESH)
    everything = [dict.fromkeys(range(TARGETS), 1.0)]
    with pytest.raises(DataError, match=r"no positive.*query 0"):
        sampler_fidelity(ASKED[:1], exact, exact=exact, scale=1.0, relevant=everything)
    with pytest.raises(DataError, match="no queries"):
        sampler_fidelity(ASKED[:0], exact, exact=exact, scale=1.0, relevant=[])
    with pytest.raises(DataError, match="excluded rows"):
        sampler_fidelity(ASKED, exact, exact=exact, scale=1.0, relevant=RELEVANT[:-1])
    with pytest.raises(DataError, match="approximate vectors"):
        sampler_fidelity(ASKED, TensorVectors(FRESH[1:]), exact=exact, scale=1.0, relevant=RELEVANT)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigurationError):
            sampler_fidelity(ASKED, exact, exact=exact, scale=scale, relevant=RELEVANT)


def test_mean_cosine_equals_the_dense_formula() -> None:
    first, second = noise(70_000, 7), 3 * noise(70_000, 8)
    dense = torch.nn.functional.cosine_similarity(first.double(), second.double()).mean()
    assert mean_cosine(TensorVectors(first), TensorVectors(second)) == pytest.approx(float(dense), abs=1e-12)
    assert mean_cosine(TensorVectors(first), TensorVectors(2 * first)) == pytest.approx(1.0, abs=1e-12)


def test_mean_cosine_refuses_vectors_without_a_direction() -> None:
    zeros = FRESH.clone()
    zeros[5] = 0
    with pytest.raises(DataError, match="target 5"):
        mean_cosine(TensorVectors(zeros), TensorVectors(FRESH))
    with pytest.raises(DataError, match="at least one target"):
        mean_cosine(TensorVectors(FRESH[:0]), TensorVectors(FRESH[:0]))
