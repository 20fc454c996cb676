"""Metrics against trec_eval's numbers and by hand; intervals against plain formulas and against known truths."""

from __future__ import annotations

import numpy as np
import pytest
import pytrec_eval

from hf_corrector import metrics
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.metrics import Interval, Undefined, paired_bootstrap, quality


def random_runs(
    seed: int, *, queries: int = 60, targets: int = 150, depth: int = 100
) -> tuple[np.ndarray, list[dict[int, float]]]:
    """Rankings of random length, some empty, and graded judgements, some of targets that are never found."""
    generator = np.random.default_rng(seed)
    ranked = np.full((queries, depth), -1, np.int64)
    relevant = []
    for query in range(queries):
        length = int(generator.integers(0, depth + 1))
        ranked[query, :length] = generator.permutation(targets)[:length]
        judged = generator.choice(targets, size=int(generator.integers(1, 30)), replace=False)
        grades = generator.integers(0, 4, size=len(judged))
        grades[0] = 1
        relevant.append({int(row): int(grade) for row, grade in zip(judged, grades, strict=True)})
    return ranked, relevant


def trec_eval(ranked: np.ndarray, relevant: list[dict[int, float]], measure: str) -> np.ndarray:
    """Judge with pytrec_eval; scores fall strictly, so that it keeps the order given."""
    judgements = {f"q{i}": {f"d{row}": int(g) for row, g in judged.items()} for i, judged in enumerate(relevant)}
    runs = {
        f"q{i}": {f"d{row}": float(1000 - place) for place, row in enumerate(line) if row >= 0}
        for i, line in enumerate(ranked)
    }
    results = pytrec_eval.RelevanceEvaluator(judgements, {measure}).evaluate(runs)
    name = measure.replace(".", "_")
    return np.array([results[f"q{i}"][name] for i in range(len(relevant))])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 5, 10, 100])
def test_every_metric_equals_trec_eval_on_random_graded_runs(seed: int, k: int) -> None:
    ranked, relevant = random_runs(seed)
    ours = quality(ranked, relevant, metrics=[f"ndcg@{k}", f"recall@{k}", f"mrr@{k}", f"success@{k}"])
    cut = ranked[:, :k]  # trec_eval has no cut-off for the reciprocal rank
    np.testing.assert_allclose(ours[f"ndcg@{k}"], trec_eval(ranked, relevant, f"ndcg_cut.{k}"), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[f"recall@{k}"], trec_eval(ranked, relevant, f"recall.{k}"), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[f"mrr@{k}"], trec_eval(cut, relevant, "recip_rank"), rtol=0, atol=1e-12)
    np.testing.assert_allclose(ours[f"success@{k}"], trec_eval(ranked, relevant, f"success.{k}"), rtol=0, atol=1e-12)


def test_single_functions_equal_quality() -> None:
    ranked, relevant = random_runs(7)
    together = quality(ranked, relevant, metrics=["success@3", "recall@50", "mrr@10", "ndcg@20"])
    np.testing.assert_array_equal(metrics.success_at_k(ranked, relevant, k=3), together["success@3"])
    np.testing.assert_array_equal(metrics.recall_at_k(ranked, relevant, k=50), together["recall@50"])
    np.testing.assert_array_equal(metrics.mrr_at_k(ranked, relevant, k=10), together["mrr@10"])
    np.testing.assert_array_equal(metrics.ndcg_at_k(ranked, relevant, k=20), together["ndcg@20"])


def test_values_by_hand() -> None:
    ranked = np.array([[4, 9, 2, 7]])
    relevant = [{2: 3.0, 9: 1.0, 5: 2.0}]
    assert metrics.mrr_at_k(ranked, relevant, k=4) == [0.5]
    assert metrics.mrr_at_k(ranked, relevant, k=1) == [0.0]
    assert metrics.recall_at_k(ranked, relevant, k=3) == [2 / 3]
    found = 1 / np.log2(3) + 3 / np.log2(4)
    ideal = 3 / np.log2(2) + 2 / np.log2(3) + 1 / np.log2(4)
    np.testing.assert_allclose(metrics.ndcg_at_k(ranked, relevant, k=4), [found / ideal], rtol=1e-15)


def test_default_metrics_are_the_reported_ones() -> None:
    ranked, relevant = random_runs(1)
    assert list(quality(ranked, relevant)) == ["mrr@10", "recall@10", "recall@100", "ndcg@10", "success@10"]


def test_query_without_results_and_query_without_relevant_targets_count_zero() -> None:
    ranked = np.array([[-1, -1], [0, 1], [0, 1]])
    for values in quality(ranked, [{0: 1.0}, {}, {1: 0.0}], metrics=["mrr@2", "ndcg@2", "recall@2"]).values():
        np.testing.assert_array_equal(values, [0.0, 0.0, 0.0])


def test_padding_between_results_keeps_its_rank() -> None:
    assert metrics.mrr_at_k(np.array([[-1, 3]]), [{3: 1.0}], k=2) == [0.5]


def test_no_queries_give_empty_values() -> None:
    values = quality(np.empty((0, 10), np.int64), [], metrics=["ndcg@10", "mrr@10", "recall@10", "success@10"])
    assert all(len(column) == 0 for column in values.values())


def test_a_target_found_twice_is_refused_since_ndcg_would_exceed_one() -> None:
    with pytest.raises(DataError, match=r"query 1.*every target at most once"):
        metrics.ndcg_at_k(np.array([[1, 2], [3, 3]]), [{1: 1.0}, {3: 1.0}], k=2)


@pytest.mark.parametrize(
    ("ranked", "relevant"),
    [
        (np.array([[1, 2]]), [{-1: 1.0}]),  # would match the padding
        (np.array([[1, 2]]), [{1: float("nan")}]),
        (np.array([[1, 2]]), [{1: 1.0}, {2: 1.0}]),
        (np.array([[1.0, 2.0]]), [{1: 1.0}]),
        (np.array([1, 2]), [{1: 1.0}]),
        (np.array([[1]]), [{1: 1.0}]),  # too shallow for a metric at 2
    ],
)
def test_rankings_and_judgements_that_do_not_fit_are_refused(ranked: np.ndarray, relevant: list) -> None:
    with pytest.raises(DataError):
        metrics.recall_at_k(ranked, relevant, k=2)


@pytest.mark.parametrize("name", ["map@10", "ndcg", "ndcg@0", "ndcg@-1", "ndcg@x", "mrr@10 ", "mrr@²"])
def test_unknown_metric_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError):
        quality(np.array([[1]]), [{1: 1.0}], metrics=[name])


def naive_bootstrap(values: dict[str, np.ndarray], seed: int, resamples: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    count = len(next(iter(values.values())))
    drawn = [generator.integers(count, size=count) for _ in range(resamples)]
    return {name: np.array([column[rows].mean() for rows in drawn]) for name, column in values.items()}


def example(seed: int = 0, queries: int = 200) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    stale = generator.random(queries) * 0.6
    return {
        "stale": stale,
        "corrected": stale + 0.2 * generator.random(queries),
        "fresh": stale + 0.3 * generator.random(queries),
    }


def test_bootstrap_equals_the_plain_loop() -> None:
    values = example()
    boot = paired_bootstrap(values, generator=np.random.default_rng(3), resamples=300)
    naive = naive_bootstrap(values, 3, 300)
    low, high = np.percentile(naive["stale"], [2.5, 97.5])
    assert boot.mean("stale").estimate == pytest.approx(values["stale"].mean(), abs=1e-15)
    assert (boot.mean("stale").low, boot.mean("stale").high) == pytest.approx((low, high), abs=1e-12)
    low, high = np.percentile(naive["corrected"] - naive["stale"], [2.5, 97.5])
    gain = boot.difference("corrected", "stale")
    assert (gain.low, gain.high) == pytest.approx((low, high), abs=1e-12)
    ratios = (naive["corrected"] - naive["stale"]) / (naive["fresh"] - naive["stale"])
    recovery = boot.recovery("corrected")
    assert isinstance(recovery, Interval)
    assert recovery.low == pytest.approx(np.percentile(ratios, 2.5, method="higher"), abs=1e-12)
    assert recovery.high == pytest.approx(np.percentile(ratios, 97.5, method="lower"), abs=1e-12)
    assert recovery.estimate == pytest.approx(
        (values["corrected"] - values["stale"]).mean() / (values["fresh"] - values["stale"]).mean(), abs=1e-12
    )


def test_bootstrap_does_not_depend_on_the_size_of_its_blocks() -> None:
    values = example()
    whole = paired_bootstrap(values, generator=np.random.default_rng(5), resamples=101)
    table = np.stack(list(values.values()), axis=1)
    generator = np.random.default_rng(5)
    blocks = [metrics._resampled_means(table, generator, size) for size in (1, 40, 60)]
    np.testing.assert_allclose(np.concatenate(blocks), whole.resampled, rtol=0, atol=1e-13)


def test_bootstrap_is_decided_by_its_generator() -> None:
    first, second, other = (
        paired_bootstrap(example(), generator=np.random.default_rng(seed), resamples=50).resampled for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_interval_of_a_mean_covers_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        boot = paired_bootstrap({"x": generator.random(80)}, generator=generator, resamples=400)
        covered += boot.mean("x").low <= 0.5 <= boot.mean("x").high
    assert 0.91 <= covered / 400 <= 0.98


def test_pairing_narrows_a_difference() -> None:
    boot = paired_bootstrap(example(), generator=np.random.default_rng(0), resamples=500)
    paired = boot.difference("corrected", "stale")
    alone = boot.mean("corrected")
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)


def test_recovery_of_the_ends_is_zero_and_one() -> None:
    boot = paired_bootstrap(example(), generator=np.random.default_rng(0), resamples=200)
    for name, value in (("stale", 0.0), ("fresh", 1.0)):
        recovery = boot.recovery(name)
        assert isinstance(recovery, Interval)
        assert (recovery.estimate, recovery.low, recovery.high) == pytest.approx((value, value, value), abs=1e-12)


def test_retention_is_the_share_of_fresh() -> None:
    values = example()
    retention = paired_bootstrap(values, generator=np.random.default_rng(0), resamples=500).retention("stale")
    assert isinstance(retention, Interval)
    assert retention.estimate == pytest.approx(values["stale"].mean() / values["fresh"].mean(), abs=1e-12)
    assert retention.low < retention.estimate < retention.high


@pytest.mark.parametrize("shift", [0.0, 0.001, -0.2])
def test_recovery_is_undefined_where_there_is_no_clear_loss(shift: float) -> None:
    generator = np.random.default_rng(0)
    stale = generator.random(50)
    values = {"stale": stale, "corrected": stale + 0.1, "fresh": stale + shift + 0.05 * generator.normal(size=50)}
    recovery = paired_bootstrap(values, generator=generator, resamples=300).recovery("corrected")
    assert isinstance(recovery, Undefined)
    assert "fresh - stale" in recovery.reason and "not clearly above 0" in recovery.reason
    assert recovery.to_dict()["estimate"] is None


def test_ratios_of_equal_columns_are_undefined_and_not_rounding_over_rounding() -> None:
    stale = np.random.default_rng(0).random(333)
    boot = paired_bootstrap({"stale": stale, "x": stale, "fresh": stale + 1e-12}, generator=np.random.default_rng(0))
    assert isinstance(boot.recovery("x"), Undefined)
    zeros = paired_bootstrap({"x": stale, "fresh": 0 * stale}, generator=np.random.default_rng(0), resamples=50)
    assert isinstance(zeros.retention("x"), Undefined)


def test_a_resample_without_a_loss_widens_the_interval_instead_of_vanishing() -> None:
    gap = np.zeros(30)
    gap[:4] = 1.0  # all four are absent from (26/30)**30 = 1.4 % of the resamples, fewer than an end leaves out
    values = {"stale": np.zeros(30), "corrected": gap * [0.5], "fresh": gap}
    recovery = paired_bootstrap(values, generator=np.random.default_rng(0), resamples=2000).recovery("corrected")
    assert isinstance(recovery, Interval)
    assert (recovery.low, recovery.estimate, recovery.high) == pytest.approx((0.5, 0.5, 0.5))
    values["corrected"] = gap * [0.5] + 0.1 * np.random.default_rng(1).normal(size=30)
    recovery = paired_bootstrap(values, generator=np.random.default_rng(0), resamples=2000).recovery("corrected")
    naive = naive_bootstrap(values, 0, 2000)
    lost = naive["fresh"] > 0
    assert 0 < np.mean(~lost) < 0.025
    ratios = naive["corrected"][lost] / naive["fresh"][lost]
    absent = np.full(int(np.sum(~lost)), np.inf)
    assert isinstance(recovery, Interval)
    assert recovery.low == pytest.approx(np.percentile(np.append(ratios, -absent), 2.5, method="higher"))
    assert recovery.high == pytest.approx(np.percentile(np.append(ratios, absent), 97.5, method="lower"))
    assert recovery.low < np.percentile(ratios, 2.5) and np.percentile(ratios, 97.5) < recovery.high


def test_bootstrap_refuses_values_it_cannot_pair() -> None:
    generator = np.random.default_rng(0)
    for values in ({}, {"x": np.empty(0)}, {"x": np.ones(3), "y": np.ones(4)}, {"x": np.array([np.nan])}):
        with pytest.raises(DataError):
            paired_bootstrap(values, generator=generator)
    with pytest.raises(ConfigurationError):
        paired_bootstrap({"x": np.ones(3)}, generator=generator, resamples=0)
    with pytest.raises(ConfigurationError, match="one of"):
        paired_bootstrap({"x": np.ones(3)}, generator=generator, resamples=5).mean("y")
