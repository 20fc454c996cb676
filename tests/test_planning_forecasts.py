"""From curves to forecasts: widened draws, and the law from score error to recovery."""

import dataclasses

import numpy as np
import pytest
import torch
from planning_helpers import DIM, a_probe, drift, gaussian
from torch.nn.functional import normalize

from hf_corrector.index.base import TensorVectors
from hf_corrector.planning.forecasts import (
    UNCHECKED,
    WIDENINGS,
    caution,
    lost_share,
    recovery_draws,
    score_draws,
    squared_draws,
)
from hf_corrector.planning.judged import JudgedQueries
from hf_corrector.planning.probe import FamilyCurve, Probe, probe_learning_curves, standard_families
from hf_corrector.planning.rehearsal import LARGEST, SMALLEST, Disturbed, rehearsed_exponent


@pytest.fixture(scope="module")
def curve() -> FamilyCurve:
    return probe_learning_curves(a_probe(), families=standard_families(["affine"]))["affine"]


def test_lost_share_is_all_of_all_and_none_of_none() -> None:
    exponent = np.array([0.5, 1.0, 3.0])
    assert lost_share(np.ones(3), exponent) == pytest.approx(1.0)
    assert lost_share(np.zeros(3), exponent) == pytest.approx(0.0)
    assert lost_share(np.full(3, 0.5), exponent) == pytest.approx([0.5**0.5, 0.5, 0.125])
    assert lost_share(np.full(3, 2.0), exponent) == pytest.approx([2**0.5, 2.0, 2.0])


def test_draws_are_widened_around_the_same_median_and_never_below_nothing(curve: FamilyCurve) -> None:
    named = {name: dataclasses.replace(curve, name=name) for name in (*WIDENINGS, "low_rank")}
    plain = np.quantile(curve.scores.draws(300), (0.05, 0.5, 0.95))
    for name, one in named.items():
        factor = WIDENINGS.get(name, UNCHECKED)
        assert factor.scores >= 1 and factor.squared >= 1
        low, middle, high = np.quantile(score_draws(one, 300), (0.05, 0.5, 0.95))
        assert middle == pytest.approx(plain[1])
        assert high - middle == pytest.approx(factor.scores * (plain[2] - plain[1]), rel=0.01)
        assert low == pytest.approx(max(middle - factor.scores * (plain[1] - plain[0]), 0.0), rel=0.01, abs=1e-12)
        assert squared_draws(one, 300).min() >= 0
    assert UNCHECKED.scores == max(one.scores for one in WIDENINGS.values())


def test_a_rehearsal_narrows_recovery_and_no_rehearsal_leaves_it_wide(curve: FamilyCurve) -> None:
    def width(exponent: float | None) -> float:
        low, high = np.quantile(recovery_draws(curve, 150, exponent=exponent), (0.05, 0.95))
        return float(high - low)

    assert width(1.0) < width(None)
    assert np.median(recovery_draws(curve, 150, exponent=2.0)) > np.median(recovery_draws(curve, 150, exponent=0.7))


def test_rehearsed_exponent_is_larger_where_relevant_targets_stand_out() -> None:
    stale, fresh = drift(2_000, seed=40)
    rows, index = torch.arange(1_000, 1_200), TensorVectors(fresh)
    probe, relevant = Probe(stale[rows], fresh[rows]), [{row: 1.0} for row in range(400)]
    found = []
    for noise in (0.2, 1.0):
        queries = normalize(fresh[:400] + noise * normalize(gaussian(400, DIM, seed=44), dim=1), dim=1)
        found.append(rehearsed_exponent(probe, JudgedQueries(queries, None, relevant), corrected=index))
    assert None not in found
    assert SMALLEST <= found[1] < found[0] <= LARGEST


def test_nothing_is_rehearsed_where_nothing_can_be_told() -> None:
    stale, fresh = drift(300)
    probe, index = Probe(stale[:100], fresh[:100]), TensorVectors(fresh)
    aimless = JudgedQueries(normalize(gaussian(20, DIM, seed=3), dim=1), None, [{row: 1.0} for row in range(20)])
    assert rehearsed_exponent(probe, aimless, corrected=index) is None
    smaller = Probe(stale[:100, :8], fresh[:100])
    clear = JudgedQueries(fresh[:50], None, [{row: 1.0} for row in range(50)])
    assert rehearsed_exponent(smaller, clear, corrected=index) is None
    assert rehearsed_exponent(probe, clear, corrected=index) is not None


def test_disturbed_vectors_keep_their_length() -> None:
    rows = 3.0 * normalize(gaussian(10, DIM, seed=1), dim=1)
    disturbed = Disturbed(TensorVectors(rows), gaussian(4, DIM, seed=2), torch.arange(10) % 4)
    assert len(disturbed) == 10 and disturbed.dim == DIM
    assert disturbed.read(2, 7).norm(dim=1).numpy() == pytest.approx(3.0, rel=1e-5)
    assert not torch.allclose(disturbed.read(2, 7), rows[2:7])


def test_caution_names_the_families() -> None:
    assert caution(["a", "b", "c"], ["a", "b", "c", "d"]).startswith("The 90 % intervals of a, b and c held")
    assert "Those of d failed that or were not checked" in caution(["a"], ["a", "d"])
    assert caution([], ["d"]).startswith("Those of d failed that or were not checked")
