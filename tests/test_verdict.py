"""Decisions from made-up evidence: each rule decides where it should, and the sentence says why."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.evaluation.verdict import EXIT_CODES, REASONS, Evidence, Thresholds, Verdict, decide
from hf_corrector.evaluation.verdict_checklist import Watched, checklist, queries_to_detect
from hf_corrector.evaluation.verdict_slices import QuerySlice, judge_slices, metadata_values, slice_queries

QUERIES = 600
RULES = Thresholds()


def values(mean: float, seed: int = 0, shared: float = 0.1) -> np.ndarray:
    """Make qualities around a mean, alike between conditions as the same queries are."""
    common = np.random.default_rng(99).normal(0, shared, QUERIES)
    return np.clip(mean + common + np.random.default_rng(seed).normal(0, 0.05, QUERIES), 0, 1)


def evidence(**means: float) -> Evidence:
    per_query = {name: values(mean, seed) for seed, (name, mean) in enumerate(means.items())}
    return Evidence("mrr@10", per_query, np.ones(QUERIES, dtype=bool), passes=(100, 5000), resamples=400)


def decided(found: Evidence, reembed: dict[float, float] | None = None, rules: Thresholds = RULES) -> Verdict:
    if reembed is None:
        return decide(found, rules)
    return decide(found, rules, reembed=lambda share: values(reembed[share], seed=50))


def test_go_where_correction_beats_the_old_model_and_recovers_enough() -> None:
    verdict = decided(evidence(old=0.4, stale=0.45, corrected=0.58, fresh=0.6))
    assert verdict.decision == "go" and verdict.exit_code == 0
    assert all(check.passed for check in verdict.checks)
    for words in ("Go: correct the index", "600 clean queries", "MRR@10", "above the old model", "recovered", "5,000"):
        assert words in verdict.sentence
    assert verdict.sentence.count(". ") == 0 and verdict.sentence.endswith(".")


def test_old_model_is_kept_where_it_beats_a_full_reembedding() -> None:
    verdict = decided(evidence(old=0.6, stale=0.2, corrected=0.48, fresh=0.5))
    assert verdict.decision == "no-go" and verdict.exit_code == 3
    assert "keeping the old model is better" in verdict.sentence and "even than re-embedding" in verdict.sentence


def test_old_model_is_kept_where_the_new_one_is_not_shown_to_be_better() -> None:
    verdict = decided(evidence(old=0.6, stale=0.2, corrected=0.55, fresh=0.6))
    assert verdict.decision == "no-go" and "keeping the old model is better than correction" in verdict.sentence


def test_nothing_lost_is_nothing_to_correct() -> None:
    found = evidence(old=0.4, stale=0.5, corrected=0.5, fresh=0.5)
    found.per_query["fresh"][:] = found.per_query["stale"]
    verdict = decided(found)
    assert verdict.decision == "no-go" and "nothing to correct" in verdict.sentence


def test_smallest_share_that_passes_is_to_be_reembedded_first() -> None:
    found = evidence(old=0.3, stale=0.2, corrected=0.35, fresh=0.6)
    verdict = decided(found, {0.05: 0.37, 0.1: 0.39, 0.2: 0.48, 0.3: 0.55, 0.5: 0.58})
    assert verdict.decision == "re-embed first" and verdict.exit_code == 4
    assert verdict.reembed_share == 0.2
    assert "Re-embed these 20 % first" in verdict.sentence and "1,100 encoder passes" in verdict.sentence


def test_everything_is_to_be_reembedded_where_no_share_is_enough() -> None:
    found = evidence(old=0.3, stale=0.2, corrected=0.35, fresh=0.6)
    verdict = decided(found, dict.fromkeys(RULES.reembed_shares, 0.36))
    assert verdict.decision == "no-go" and "re-embed everything" in verdict.sentence
    assert decided(found).decision == "no-go"


def test_the_lower_bound_counts_and_not_the_estimate() -> None:
    few = evidence(old=0.4, stale=0.4, corrected=0.51, fresh=0.6)
    assert decided(few).decision == "go"
    noisy = dict(few.per_query)
    noisy["corrected"] = np.random.default_rng(1).permutation(np.repeat([0.0, 1.0], QUERIES // 2))
    verdict = decided(Evidence("mrr@10", noisy, few.clean, resamples=400))
    assert noisy["corrected"].mean() >= 0.5 and verdict.decision == "no-go"


def test_a_harmed_slice_vetoes_however_good_the_mean_is() -> None:
    found = evidence(old=0.4, stale=0.45, corrected=0.6, fresh=0.62)
    members = np.arange(QUERIES) < 60
    found.per_query["corrected"][members] -= 0.4
    sliced = Evidence(
        "mrr@10", found.per_query, found.clean, resamples=400,
        slices=(QuerySlice("site=good", ~members), QuerySlice("site=bad", members)),
    )  # fmt: skip
    assert decide(found, RULES).decision == "go"
    verdict = decide(sliced, RULES, reembed=lambda share: values(0.6, 2))
    assert verdict.decision == "re-embed first" and "harms site=bad" in verdict.sentence
    assert verdict.worst_slice is not None and verdict.worst_slice.name == "site=bad"
    assert decide(sliced, RULES).decision == "no-go"


def test_without_old_model_the_sentence_says_so() -> None:
    verdict = decided(evidence(stale=0.3, corrected=0.58, fresh=0.6))
    assert verdict.decision == "go" and "old model kept could not be judged" in verdict.sentence


def test_without_a_possible_stale_index_recovery_starts_at_the_old_model() -> None:
    verdict = decided(evidence(old=0.3, corrected=0.55, fresh=0.6))
    assert verdict.decision == "go" and "from the old model to a fresh index" in verdict.sentence
    assert decided(evidence(corrected=0.58, fresh=0.6)).decision == "go"
    assert decided(evidence(corrected=0.4, fresh=0.6)).decision == "no-go"


def test_too_few_queries_decide_nothing() -> None:
    found = evidence(old=0.4, stale=0.45, corrected=0.58, fresh=0.6)
    clean = np.arange(QUERIES) < 10
    verdict = decide(Evidence("mrr@10", found.per_query, clean), RULES)
    assert verdict.decision == "no-go" and "10 clean queries are too few" in verdict.sentence
    none = decide(Evidence("mrr@10", found.per_query, clean & False), Thresholds(min_queries=0))
    assert none.decision == "no-go"


def test_non_inferiority_may_be_allowed_on_purpose() -> None:
    found = evidence(old=0.58, stale=0.3, corrected=0.575, fresh=0.585)
    assert decided(found).decision == "no-go"
    verdict = decided(found, rules=Thresholds(non_inferiority=0.05))
    assert verdict.decision == "go"
    assert re.search(r", 0\.\d{3} \[.*\] below the old model kept", verdict.sentence), verdict.sentence


def test_record_is_strict_json_with_a_reason_for_each_threshold() -> None:
    found = evidence(old=0.4, stale=0.45, corrected=0.58, fresh=0.6)
    record = json.loads(json.dumps(decided(found).to_dict(), allow_nan=False))
    assert record["decision"] == "go" and record["exit_code"] == EXIT_CODES["go"]
    assert set(record["thresholds"]) == set(REASONS) and all(one["reason"] for one in record["thresholds"].values())
    with pytest.raises(ConfigurationError, match="thresholds"):
        Thresholds(min_recovery=2)


def test_slices_are_categories_years_quarters_and_lists() -> None:
    def names(found: list[object], minimum: int = 1) -> dict[str, int]:
        return {one.name: int(one.members.sum()) for one in slice_queries(found, name="f", min_queries=minimum)}

    assert names(["a", "b", "a", None]) == {"f=(none)": 1, "f=a": 2, "f=b": 1}
    assert names(["2020-01-05", "2021-03-01T10:00", "2020-12"]) == {"f=2020": 2, "f=2021": 1}
    assert names([True, False, True]) == {"f=true": 2, "f=false": 1}
    assert names([["x", "y", "x"], ["y"], []]) == {"f=(none)": 1, "f=x": 1, "f=y": 2}
    quarters = names([float(one) for one in range(100)])
    assert len(quarters) == 4 and set(quarters.values()) == {25}
    assert names(["a"] * 40 + ["b"] * 3 + ["c"] * 4, 30) == {"f=a": 40, "f=other, pooled": 7}
    with pytest.raises(DataError, match="slice_by 'f'"):
        slice_queries([None, []], name="f")


def test_metadata_is_read_and_refused_with_its_row() -> None:
    assert metadata_values(['{"site": "x"}', "{}", ""], "site", where="test") == ["x", None, None]
    for wrong in ("[1]", "{"):
        with pytest.raises(DataError, match="test, row 1"):
            metadata_values(["{}", wrong], "site", where="test")


def test_slices_are_worst_first_and_the_adjusted_interval_is_wider() -> None:
    found = evidence(old=0.5, corrected=0.52, fresh=0.6)
    slices = slice_queries(["small"] * 10 + ["a", "b"] * 295, name="s")
    found.per_query["corrected"][10::2] -= 0.1
    rows = judge_slices(found.per_query, slices, clean=found.clean, resamples=2000, seed=0)
    assert [row.name for row in rows] == ["s=a", "s=b", "s=other, pooled"]
    assert rows[0].against == "old" and not rows[2].judged
    assert rows[0].adjusted.low < rows[0].difference.low < rows[0].difference.high < rows[0].adjusted.high


def test_checklist_carries_the_numbers_of_the_run() -> None:
    found = evidence(old=0.4, stale=0.45, corrected=0.58, fresh=0.6)
    slices = tuple(slice_queries(["a", "b"] * 300, name="site"))
    sliced = Evidence("mrr@10", found.per_query, found.clean, slices, resamples=400)
    verdict = decide(sliced, RULES)
    watched = Watched(np.random.default_rng(0).normal(0.9, 0.05, 2000), overlap=0.83)
    text = checklist(verdict, sliced, watched)
    for words in (
        "Shadow",
        "Canary",
        "Switch",
        "83 %",
        f"{watched.cosines.mean():.3f}",
        verdict.worst_slice.name,
        "by chance",
    ):
        assert words in text
    needed = queries_to_detect(sliced)
    assert needed is not None and f"{needed:,} queries" in text
    low = watched.probe_interval().low
    assert 0.88 < low < 0.9 and f"below {low:.3f}" in text
    part = decided(evidence(old=0.3, stale=0.2, corrected=0.35, fresh=0.6), dict.fromkeys(RULES.reembed_shares, 0.55))
    text = checklist(part, sliced, watched)
    assert "5 % of targets listed in reembed_first.jsonl" in text and "hf-corrector apply --reembed" in text
    lost = decided(evidence(old=0.6, stale=0.2, corrected=0.4, fresh=0.5))
    assert "Nothing to adopt" in checklist(lost, found, watched)
    assert queries_to_detect(evidence(old=0.6, corrected=0.4, fresh=0.5)) is None
