"""Re-embedding worst first: residuals that can be foreseen are, and the order is theirs, times given traffic."""

import numpy as np
import pytest
import torch
from planning_helpers import DIM, gaussian
from torch.nn.functional import normalize

from hf_corrector.errors import DataError
from hf_corrector.index.base import TensorVectors
from hf_corrector.planning.probe import Probe, standard_families
from hf_corrector.planning.worst_first import ResidualPredictor, cross_fitted_residuals, worst_first


def uneven(targets: int = 1_500) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the space moves in a way nothing tells, the other half hardly at all."""
    stale = normalize(gaussian(targets, DIM, seed=0), dim=1)
    reach = torch.where(stale[:, :1] > 0, 0.8, 0.05)
    return stale, normalize(stale + reach * normalize(gaussian(targets, DIM, seed=1), dim=1), dim=1)


def test_predicted_order_finds_what_is_corrected_worst() -> None:
    stale, fresh = uneven()
    fit, probe = standard_families(["affine"])["affine"], Probe(stale[:300], fresh[:300])
    predictor = ResidualPredictor.fit(probe.stale, cross_fitted_residuals(probe, fit))
    left = (fit(probe.stale, probe.fresh, None)(stale, None) - fresh).square().sum(dim=1).numpy()[300:]
    order = worst_first(predictor.predict(TensorVectors(stale[300:])))
    assert predictor.explained > 0.4
    chance = 0.25 * left.sum()
    assert left[order[:300]].sum() > 1.5 * chance


def test_residuals_without_a_pattern_are_owned_up_to() -> None:
    stale, residuals = uneven()[0][:300], np.random.default_rng(0).exponential(size=300)
    assert ResidualPredictor.fit(stale, residuals).explained < 0.1


def test_cross_fitted_residuals_are_larger_than_the_fits_own() -> None:
    stale, fresh = uneven()
    fit, probe = standard_families(["affine"])["affine"], Probe(stale[:100], fresh[:100])
    own = (fit(probe.stale, probe.fresh, None)(probe.stale, None) - probe.fresh).square().sum(dim=1).mean()
    assert cross_fitted_residuals(probe, fit).mean() > float(own)


def test_order_is_by_residual_and_by_traffic_where_given_with_ties_by_row() -> None:
    residuals = np.array([1.0, 3.0, 1.0, 2.0])
    assert worst_first(residuals).tolist() == [1, 3, 0, 2]
    assert worst_first(residuals, np.array([10.0, 1.0, 0.0, 1.0])).tolist() == [0, 1, 3, 2]
    assert worst_first(residuals, skipped=np.array([3, 0])).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("residuals", "traffic"),
    [([1.0, np.nan], None), ([1.0, -1.0], None), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [1.0, np.inf])],
)
def test_numbers_that_order_nothing_are_refused(residuals: list[float], traffic: list[float] | None) -> None:
    with pytest.raises(DataError, match="worst first"):
        worst_first(np.array(residuals), None if traffic is None else np.array(traffic))


def test_predictor_needs_pairs_with_residuals() -> None:
    stale = uneven()[0]
    for count, residuals in ((5, np.ones(5)), (20, np.zeros(20)), (20, np.ones(19))):
        with pytest.raises(DataError, match="residual predictor"):
            ResidualPredictor.fit(stale[:count], residuals)
