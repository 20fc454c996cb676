"""A probe's errors: measured on rows left out, in the metric of the queries, by every family."""

import numpy as np
import pytest
import torch
from planning_helpers import DIM, a_probe, drift, gaussian
from torch.nn.functional import normalize

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.planning.probe import (
    Probe,
    ProbeSettings,
    cuts,
    probe_learning_curves,
    query_moment,
    residual_errors,
    side_rows,
    stale_baseline,
    standard_families,
)


def test_every_row_judges_once_and_none_judges_its_own_fit() -> None:
    judged = []
    for fitted, held_out in cuts(53, ProbeSettings(folds=5)):
        assert not set(fitted.tolist()) & set(held_out.tolist())
        assert len(fitted) + len(held_out) == 53
        judged += held_out.tolist()
    assert sorted(judged) == list(range(53))


def test_sizes_are_halvings_of_what_the_folds_leave() -> None:
    assert ProbeSettings().sizes_for(500) == (12, 25, 50, 100, 200, 400)
    assert ProbeSettings(sizes=(20, 60)).sizes_for(100) == (20, 60)
    for fitted, _ in cuts(103, ProbeSettings()):
        assert len(fitted) >= ProbeSettings().sizes_for(103)[-1]
    with pytest.raises(ConfigurationError, match="sizes from 2 to 80"):
        ProbeSettings(sizes=(90,)).sizes_for(100)
    with pytest.raises(ConfigurationError, match="folds"):
        ProbeSettings(folds=1)


def test_score_error_is_the_variance_of_wrong_scores_and_sees_no_constant() -> None:
    stale, fresh = drift(40)
    queries = gaussian(30, DIM, seed=9)
    moment = query_moment(queries)
    wrong = (queries @ (stale - fresh).T).double().var(dim=1, correction=1).mean()
    assert residual_errors(stale, fresh, moment).scores.mean() == pytest.approx(float(wrong), rel=1e-5)
    shifted = residual_errors(fresh + gaussian(1, DIM, seed=4), fresh, moment)
    assert shifted.scores.mean() == pytest.approx(0.0, abs=1e-10)
    assert shifted.squared.mean() > 1


def test_affine_learns_a_linear_drift_and_a_mean_shift_does_not() -> None:
    curves = probe_learning_curves(a_probe(), families=standard_families(["mean_shift", "affine", "identity"]))
    means = {name: curve.score_ratios.mean(axis=0) for name, curve in curves.items()}
    assert (np.diff(means["affine"]) < 0.02).all()
    assert means["affine"][-1] < 0.35 < 0.8 < means["mean_shift"][-1]
    assert means["identity"] == pytest.approx(1.0)
    assert curves["affine"].cosines[:, -1].mean() > curves["affine"].cosines[:, 0].mean()


def test_forecast_holds_what_more_pairs_give() -> None:
    stale, fresh = drift(3_000, seed=20)
    queries = normalize(gaussian(80, DIM, seed=23), dim=1)
    curves = probe_learning_curves(Probe(stale[:150], fresh[:150], queries), families=standard_families(["affine"]))
    correct, moment = standard_families(["affine"])["affine"](stale[:600], fresh[:600], None), query_moment(queries)
    left = residual_errors(correct(stale[1_000:], None), fresh[1_000:], moment)
    before = residual_errors(stale[1_000:], fresh[1_000:], moment)
    squared, scores = curves["affine"].squared.forecast(600), curves["affine"].scores.forecast(600)
    assert squared.low <= left.squared.mean() <= squared.high
    assert scores.low <= left.scores.mean() / before.scores.mean() <= scores.high


def test_side_features_reach_the_fit_dense_and_sparse() -> None:
    stale, _ = drift(120)
    side = (gaussian(120, 6, seed=7) > 0).float()
    fresh = normalize(stale + side @ gaussian(6, DIM, seed=8), dim=1)
    families = {**standard_families(["affine"]), **standard_families(["affine"], side="matrix")}
    curves = probe_learning_curves(Probe(stale, fresh, side=side), families=families)
    assert list(curves) == ["affine", "affine + matrix"]
    best = {name: curve.score_ratios[:, -1].mean() for name, curve in curves.items()}
    assert best["affine + matrix"] < 0.5 * best["affine"]
    rows = torch.tensor([5, 0, 5])
    assert torch.equal(side_rows(side.to_sparse_csr(), rows).to_dense(), side[rows])
    assert side_rows(None, rows) is None


def test_between_sizes_the_baseline_ranks_nothing() -> None:
    stale, fresh = drift(100)
    probe = Probe(stale[:, :8], fresh)
    baseline = stale_baseline(probe, torch.arange(50), torch.arange(50, 100))
    assert baseline.shape == (50, DIM) and torch.equal(baseline[0], baseline[-1])
    curves = probe_learning_curves(probe, families=standard_families(["affine"]))
    assert 0 < curves["affine"].score_ratios[:, -1].mean() < 1


def test_probes_nothing_can_be_said_of_are_refused() -> None:
    stale, fresh = drift(60)
    with pytest.raises(DataError, match="at least 40"):
        Probe(stale[:20], fresh[:20])
    with pytest.raises(DataError, match="stale"):
        Probe(stale, fresh[:50])
    with pytest.raises(DataError, match="queries"):
        Probe(stale, fresh, gaussian(5, DIM + 1, seed=0))
    with pytest.raises(DataError, match="Nothing has drifted"):
        probe_learning_curves(Probe(stale, stale), families=standard_families(["affine"]))
