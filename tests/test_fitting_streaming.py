"""Statistics of a stream: the batch fit where nothing is forgotten, the recent pairs where something is."""

from __future__ import annotations

import pytest
import torch
from drift_helpers import DIM, TARGETS, linear_drift, unit_rows

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import (
    AffineFit,
    Forgetting,
    Pairs,
    PairStatistics,
    fit_affine,
    fit_low_rank,
    fit_mean_shift,
    fit_procrustes,
)

# Values are below 2, so float32 results of equal computations differ by less than this.
CLOSE = {"rtol": 0.0, "atol": 1.5e-7}


def noisy_drift(seed: int = 0, dim_out: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    stale = unit_rows(seed=seed)
    noise = 0.05 * torch.randn(TARGETS, DIM, generator=torch.Generator().manual_seed(seed + 1))
    return stale, (linear_drift(stale) + noise)[:, :dim_out].contiguous()


def some_weights() -> torch.Tensor:
    return torch.rand(TARGETS, generator=torch.Generator().manual_seed(9)) + 0.5


def streamed(
    stale: torch.Tensor, fresh: torch.Tensor, *, batch: int = 37, forgetting: Forgetting | None = None,
    weights: torch.Tensor | None = None,
) -> PairStatistics:  # fmt: skip
    statistics = PairStatistics(stale.shape[1], fresh.shape[1], forgetting=forgetting)
    for start in range(0, len(stale), batch):
        part = slice(start, start + batch)
        statistics.update(stale[part], fresh[part], weights=None if weights is None else weights[part])
    return statistics


def assert_same(one: AffineFit, other: AffineFit) -> None:
    for name in ("mean", "weight", "bias"):
        torch.testing.assert_close(vars(one)[name], vars(other)[name], **CLOSE)
    assert (one.prior, one.ridge, one.pairs) == (other.prior, other.ridge, other.pairs)


@pytest.mark.parametrize("dim_out", [DIM, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_forgetting_moments_and_solutions_are_those_of_all_pairs_at_once(dim_out: int, weighted: bool) -> None:
    stale, fresh = noisy_drift(dim_out=dim_out)
    weights = some_weights() if weighted else torch.ones(TARGETS)
    system = streamed(stale, fresh, weights=weights).system()
    share = (weights.double() / weights.double().sum())[:, None]
    centred = stale.double() - (stale.double() * share).sum(dim=0)
    moved = fresh.double() - (fresh.double() * share).sum(dim=0)
    covariance, cross = centred.T @ (centred * share), centred.T @ (moved * share)
    torch.testing.assert_close(system.covariance, covariance, rtol=0, atol=1e-14)
    torch.testing.assert_close(system.cross, cross, rtol=0, atol=1e-14)
    prior = system.prior_map("procrustes")
    ridge = 1e-3 * float(covariance.diagonal().mean()) * torch.eye(DIM, dtype=torch.float64)
    expected = prior + torch.linalg.solve(covariance + ridge, cross - covariance @ prior.T).T
    torch.testing.assert_close(system.solve(prior, 1e-3), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("dim_out", [DIM, 5])
def test_without_forgetting_every_closed_form_is_the_batch_fit(dim_out: int) -> None:
    stale, fresh = noisy_drift(dim_out=dim_out)
    weights = some_weights()
    pairs, found = Pairs.collect(stale, fresh, weights=weights), streamed(stale, fresh, weights=weights)
    prior = ("identity",) if dim_out == DIM else ("zero",)
    if dim_out == DIM:
        torch.testing.assert_close(found.mean_shift(), fit_mean_shift(pairs), **CLOSE)
    effective = round(float(weights.double().sum() ** 2 / weights.double().square().sum()))
    assert found.procrustes().pairs == effective
    plain = {"priors": prior, "relative_ridges": (1e-3,)}
    turned = {"priors": ("procrustes",), "relative_ridges": (0.1,)}
    for one, other in (
        (found.procrustes(), fit_procrustes(pairs)),
        (found.affine(**plain), fit_affine(pairs, **plain)),
        (found.affine(**turned), fit_affine(pairs, **turned)),
    ):
        for name in ("mean", "weight", "bias"):
            torch.testing.assert_close(vars(one)[name], vars(other)[name], **CLOSE)


def test_cross_validation_on_moments_is_cross_validation_on_pairs() -> None:
    stale, fresh = noisy_drift()
    weights = some_weights().double()
    ridge, total = 3e-2, 0.0
    for fold in range(5):
        mine = torch.arange(TARGETS) % 5 == fold
        pairs = Pairs.collect(stale[~mine], fresh[~mine], weights=weights[~mine])
        fit = fit_affine(pairs, priors=("procrustes",), relative_ridges=(ridge,))
        predicted = stale[mine] + (stale[mine] - fit.mean) @ fit.weight.T + fit.bias
        total += float(((predicted - fresh[mine]).double().square().sum(dim=1) * weights[mine]).sum())
    found = streamed(stale, fresh, weights=weights).affine(priors=("procrustes",), relative_ridges=(ridge, 1e3))
    assert found.ridge == ridge
    assert found.loo_error == pytest.approx(total / float(weights.sum()), rel=1e-5)


def test_prior_and_ridge_are_chosen_about_as_well_as_by_leaving_one_out() -> None:
    others = unit_rows(2000, seed=77)
    for count in (12, 40, TARGETS):
        errors = torch.zeros(2)
        for seed in range(8):
            stale, fresh = (part[:count] for part in noisy_drift(seed))
            for number, fit in enumerate((streamed(stale, fresh).affine(), fit_affine(Pairs.collect(stale, fresh)))):
                predicted = others + (others - fit.mean) @ fit.weight.T + fit.bias
                errors[number] += (predicted - linear_drift(others)).square().sum(dim=1).mean()
        assert errors[0] < 1.1 * errors[1]


def test_low_rank_takes_the_rank_and_the_map_of_the_batch_fit() -> None:
    stale = unit_rows(seed=3)
    change = torch.outer(torch.linspace(-1, 1, DIM), torch.linspace(1, 2, DIM)) * 0.3
    fresh = stale + stale @ change.T + 0.02 * unit_rows(seed=4)
    found = streamed(stale, fresh)
    fit, rank = found.low_rank(rank=2, relative_ridges=(1e-3,))
    wide, _ = found.low_rank(relative_ridges=(1e-3,))
    expected, _ = fit_low_rank(Pairs.collect(stale, fresh), rank=2)
    assert rank == 2 and torch.linalg.matrix_rank(fit.weight, rtol=1e-4) == 2
    torch.testing.assert_close(fit.weight, expected.weight, rtol=0, atol=0.02)
    assert torch.linalg.matrix_rank(wide.weight, rtol=1e-4) == found.low_rank(relative_ridges=(1e-3,))[1]
    with_choice = fit_low_rank(Pairs.collect(stale, fresh))[1]
    assert found.low_rank()[1] == with_choice


@pytest.mark.parametrize("batch", [1, 7, TARGETS])
def test_a_half_life_in_pairs_makes_batches_invisible_and_is_a_weighted_batch_fit(batch: int) -> None:
    stale, fresh = noisy_drift()
    weights = 0.5 ** (torch.arange(TARGETS - 1, -1, -1, dtype=torch.float64) / 50)
    expected = fit_affine(Pairs.collect(stale, fresh, weights=weights), priors=("identity",), relative_ridges=(1e-2,))
    found = streamed(stale, fresh, batch=batch, forgetting=Forgetting(50.0))
    fit = found.affine(priors=("identity",), relative_ridges=(1e-2,))
    for name in ("mean", "weight", "bias"):
        torch.testing.assert_close(vars(fit)[name], vars(expected)[name], **CLOSE)
    assert found.pairs == pytest.approx(2 * 50 / 0.6931, rel=0.02)


def test_a_half_life_in_batches_weighs_batches() -> None:
    stale, fresh = noisy_drift()
    weights = 0.5 ** (torch.arange(TARGETS // 100 - 1, -1, -1, dtype=torch.float64) / 2).repeat_interleave(100)
    found = streamed(stale, fresh, batch=100, forgetting=Forgetting(2.0, "batches"))
    torch.testing.assert_close(
        found.mean_shift(), fit_mean_shift(Pairs.collect(stale, fresh, weights=weights)), **CLOSE
    )


def test_two_streams_merge_into_the_stream_of_both() -> None:
    stale, fresh = noisy_drift()
    first, second = streamed(stale[:200], fresh[:200]), streamed(stale[200:], fresh[200:])
    first.merge(second)
    assert_same(first.affine(), streamed(stale, fresh).affine())
    assert first.seen == TARGETS
    empty = PairStatistics(DIM, DIM)
    empty.merge(first)
    assert_same(empty.affine(), first.affine())
    with pytest.raises(ConfigurationError, match="same settings"):
        first.merge(PairStatistics(DIM, DIM, forgetting=Forgetting(5.0)))


def test_a_restored_stream_goes_on_bit_for_bit() -> None:
    stale, fresh = noisy_drift()
    whole = streamed(stale, fresh, forgetting=Forgetting(30.0))
    half = streamed(stale[:185], fresh[:185], forgetting=Forgetting(30.0))
    restored = PairStatistics(DIM, DIM, forgetting=Forgetting(30.0))
    restored.load_state(half.state())
    for start in range(185, TARGETS, 37):
        restored.update(stale[start : start + 37], fresh[start : start + 37])
    assert all(
        torch.equal(one, other) for one, other in zip(whole.state().values(), restored.state().values(), strict=True)
    )
    with pytest.raises(ConfigurationError, match="settings of then"):
        PairStatistics(DIM, 5).load_state(half.state())


def test_after_a_jump_discounted_pairs_give_way_to_new_ones() -> None:
    stale, fresh = noisy_drift()
    kept, discounted = (streamed(stale, stale.flip(1).contiguous()) for _ in range(2))
    discounted.discount(20.0)
    assert discounted.pairs == pytest.approx(kept.pairs)
    for statistics in (kept, discounted):
        statistics.update(stale[:200], fresh[:200])
    truth = (fresh - stale)[:200].mean(dim=0)
    assert (discounted.mean_shift() - truth).norm() < 0.2 * (kept.mean_shift() - truth).norm()


def test_repeated_targets_stay_in_one_fold() -> None:
    stale, fresh = noisy_drift()
    rows = torch.arange(40)
    statistics = PairStatistics(DIM, DIM)
    for _ in range(6):
        statistics.update(stale[:40], fresh[:40], target_rows=rows)
    once = fit_affine(Pairs.collect(stale[:40], fresh[:40]))
    # Targets seen six times look no better explained than they are; dealt in turn they would.
    assert statistics.affine().loo_error > 0.7 * once.loo_error


def test_what_is_no_pair_is_refused_and_leaves_everything_as_it_was() -> None:
    statistics = PairStatistics(DIM, DIM)
    with pytest.raises(ConfigurationError, match="at least 2 pairs"):
        statistics.affine()
    stale, fresh = noisy_drift()
    statistics.update(stale, fresh)
    before = statistics.state()
    broken = fresh.clone()
    broken[3, 0] = float("nan")
    with pytest.raises(ConfigurationError, match="pair 3"):
        statistics.update(stale, broken)
    with pytest.raises(ConfigurationError, match="statistics for these encoders"):
        statistics.update(stale, fresh[:, :5])
    assert all(torch.equal(one, other) for one, other in zip(before.values(), statistics.state().values(), strict=True))
    with pytest.raises(ConfigurationError, match="half-life"):
        Forgetting(0.0)
    with pytest.raises(ConfigurationError, match="folds"):
        PairStatistics(DIM, DIM, folds=1)


def test_a_stream_that_starts_with_few_pairs_is_fitted_from_the_second_on() -> None:
    stale, fresh = noisy_drift()
    statistics = PairStatistics(DIM, DIM)
    for row in range(9):
        statistics.update(stale[row : row + 1], fresh[row : row + 1])
        if row:
            assert torch.isfinite(statistics.affine().weight).all()
            assert torch.isfinite(statistics.low_rank()[0].weight).all()
