"""The plan: which family, how many pairs, and when the answer is another one."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from planning_helpers import DIM, a_probe, drift, gaussian
from torch.nn.functional import normalize

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import TensorVectors
from hf_corrector.planning.forecasts import recovery_draws
from hf_corrector.planning.judged import CorrectedBy, JudgedQueries, measure_quality
from hf_corrector.planning.plan import Goal, MeasuredQuality, Plan, plan
from hf_corrector.planning.probe import FamilyCurve, Probe, probe_learning_curves, standard_families


@pytest.fixture(scope="module")
def curves() -> dict[str, FamilyCurve]:
    return probe_learning_curves(a_probe(), families=standard_families(["mean_shift", "affine"]))


@pytest.fixture(scope="module")
def hopeless() -> dict[str, FamilyCurve]:
    return probe_learning_curves(a_probe(noise=5.0), families=standard_families(["mean_shift", "affine"]))


def made(curves: dict[str, FamilyCurve], goal: Goal, **quality: float) -> Plan:
    if not quality:
        return plan(curves, probe=150, goal=goal)
    noise = 0.1 * np.random.default_rng(0).standard_normal(400)
    noise -= noise.mean()
    return plan(curves, probe=150, goal=goal, quality=MeasuredQuality(
        "affine", *(quality[name] + noise if name in quality else None for name in ("old", "stale", "corrected")),
    ))  # fmt: skip


def test_an_easy_drift_is_corrected_with_the_better_family(curves: dict[str, FamilyCurve]) -> None:
    answer = made(curves, Goal(targets=100_000, min_recovery=0.6, seconds_per_pass=0.01, price_per_hour=3.6))
    assert (answer.verdict, answer.family, answer.pairs, answer.passes) == ("correct", "affine", 150, 0)
    assert answer.recovery.low < answer.recovery.estimate < answer.recovery.high <= 1.05
    assert answer.sentence().startswith("Correct: affine fitted to 150 pairs should recover")
    assert json.loads(json.dumps(answer.to_dict()))["families"][1]["pairs_needed"] == 150


def test_more_is_asked_for_more_pairs(curves: dict[str, FamilyCurve]) -> None:
    at_probe, at_most = (float(np.median(recovery_draws(curves["affine"], pairs))) for pairs in (150, 1_200))
    goal = Goal(targets=100_000, min_recovery=(at_probe + at_most) / 2, seconds_per_pass=0.5, price_per_hour=2.0)
    answer = made(curves, goal)
    assert answer.verdict == "correct" and 150 < answer.pairs < 1_200
    assert answer.recovery.estimate == pytest.approx(goal.min_recovery, abs=0.01)
    assert answer.passes == answer.pairs - 150 and answer.seconds == answer.passes * 0.5
    assert answer.price == pytest.approx(answer.seconds / 3600 * 2.0)
    capped = made(curves, dataclasses.replace(goal, max_pairs=150))
    assert capped.verdict == "re-embed" and capped.passes == 100_000 - 150


def test_an_unlearnable_drift_is_re_embedded(hopeless: dict[str, FamilyCurve]) -> None:
    answer = made(hopeless, Goal(targets=10_000))
    assert answer.verdict == "re-embed" and answer.recovery.estimate < 0.5
    assert answer.sentence().startswith("Re-embed now") and "0.8 is asked for" in answer.sentence()
    assert all(one.pairs_needed is None for one in answer.families)


def test_the_old_model_is_kept_where_it_is_better(curves: dict[str, FamilyCurve]) -> None:
    goal = Goal(targets=100_000, min_recovery=0.6)
    kept = made(curves, goal, old=0.7, stale=0.3, corrected=0.45)
    assert kept.verdict == "keep the old model" and kept.passes == 0
    assert kept.sentence().startswith("Keep the old model: it has 0.700")
    assert kept.quality["fresh"].estimate > kept.quality["corrected"].estimate > kept.quality["stale"].estimate
    worse = made(curves, goal, old=0.35, stale=0.3, corrected=0.45)
    assert worse.verdict == "correct"
    fresh = worse.quality["fresh"].estimate
    between = made(curves, goal, old=(fresh + worse.quality["corrected"].estimate) / 2, stale=0.3, corrected=0.45)
    assert between.verdict == "re-embed" and "worse than the old model" in between.sentence()
    unknown = made(curves, goal, stale=0.3, corrected=0.45)
    assert unknown.verdict == "correct" and "old" not in unknown.quality


def test_a_rehearsed_exponent_moves_what_is_expected(curves: dict[str, FamilyCurve]) -> None:
    """The farther relevant targets stand above the others, the less an error costs."""
    scores = np.zeros(400), np.full(400, 0.3), np.full(400, 0.4)
    answers = [
        plan(curves, probe=150, goal=Goal(targets=1_000), quality=MeasuredQuality("affine", *scores, exponent=exponent))
        for exponent in (0.5, 1.0, 2.0)
    ]
    assert np.all(np.diff([one.recovery.estimate for one in answers]) > 0)
    # Where more was recovered already, less is left for fresh vectors to gain.
    assert np.all(np.diff([one.quality["fresh"].estimate for one in answers]) < 0)


def test_the_plan_says_which_intervals_were_checked(curves: dict[str, FamilyCurve]) -> None:
    answer = made(curves, Goal(targets=1_000))
    assert all(one.checked for one in answer.families)
    assert "mean_shift and affine held" in answer.caution() and "not checked" not in answer.caution()
    for name in ("low_rank", "procrustes"):
        mixed = made({**curves, name: dataclasses.replace(curves["affine"], name=name)}, Goal(targets=1_000))
        assert f"Those of {name} failed that or were not checked" in mixed.caution()
    for untold in ({"same_size": False}, {"probe": 60}):
        other = made({"affine": dataclasses.replace(curves["affine"], **untold)}, Goal(targets=1_000))
        assert not other.families[0].checked and "held" not in other.caution()


def test_table_has_a_line_for_every_family_and_size(curves: dict[str, FamilyCurve]) -> None:
    answer = made(curves, Goal(targets=1_000))
    assert [one.pairs for one in answer.families] == [(150, 300, 500)] * 2
    assert len(answer.table().splitlines()) == 1 + 2 * 3


def test_forecast_recovery_holds_the_measured_one() -> None:
    stale, fresh = drift(2_000, seed=40)
    queries = normalize(fresh[:300] + 0.5 * normalize(gaussian(300, DIM, seed=44), dim=1), dim=1)
    family, rows = standard_families(["affine"]), torch.arange(1_000, 1_200)
    curves = probe_learning_curves(Probe(stale[rows], fresh[rows], queries), families=family)
    correct = family["affine"](stale[rows], fresh[rows], None)
    relevant = [{row: 1.0} for row in range(300)]
    found = measure_quality(
        "affine", JudgedQueries(queries, queries, relevant), stale=TensorVectors(stale),
        corrected=CorrectedBy(TensorVectors(stale), correct, DIM),
    )  # fmt: skip
    best = measure_quality(
        "affine", JudgedQueries(queries, None, relevant), stale=TensorVectors(stale), corrected=TensorVectors(fresh)
    )
    assert best.old is None and found.old is not None and np.array_equal(found.old, found.stale)
    recovery = (found.corrected - found.stale).mean() / (best.corrected - found.stale).mean()
    low, high = np.quantile(recovery_draws(curves["affine"], 200), (0.025, 0.975))
    assert low <= recovery <= high


def test_what_cannot_be_planned_is_refused(curves: dict[str, FamilyCurve]) -> None:
    for wrong in ({"min_recovery": 1.0}, {"max_pairs": 0}, {"seconds_per_pass": -1.0}, {"max_share": 0.0}):
        with pytest.raises(ConfigurationError, match="plan"):
            Goal(**{"targets": 100, **wrong})
    with pytest.raises(DataError, match="curves"):
        plan({}, probe=100, goal=Goal(targets=100))
    with pytest.raises(DataError, match="judged"):
        measure_quality(
            "affine", JudgedQueries(torch.zeros(0, 4), None, []), stale=TensorVectors(torch.ones(2, 4)),
            corrected=TensorVectors(torch.ones(2, 4)),
        )  # fmt: skip
