import math

import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch.nn.functional import normalize

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import (
    PRIORS,
    RELATIVE_RIDGES,
    AffineFit,
    Pairs,
    fit_affine,
    fit_mean_shift,
)
from hf_corrector.fitting.affine import MAX_LOO_ROWS


def drifted(
    count: int, dim: int, *, drift: float = 0.3, noise: float = 0.1, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make unit vectors of uneven spread and what a changed encoder might put in their place."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(dim, dim, generator=generator) * torch.linspace(2, 0.05, dim)
    change = torch.eye(dim) + drift * torch.randn(dim, dim, generator=generator) / dim**0.5
    stale = normalize(torch.randn(count, dim, generator=generator) @ spread, dim=1)
    fresh = normalize(stale @ change.T + noise * torch.randn(count, dim, generator=generator) / dim**0.5, dim=1)
    return stale, fresh


def rotated(count: int, dim: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    stale, fresh = drifted(count, dim, drift=0.0, noise=0.2, seed=seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(seed + 1)))[0]
    return stale, fresh @ rotation.T


def full_map(fit: AffineFit) -> torch.Tensor:
    square = fit.weight.shape[0] == fit.weight.shape[1]
    return fit.weight.double() + (torch.eye(len(fit.weight), dtype=torch.float64) if square else 0)


def apply(fit: AffineFit, stale: torch.Tensor) -> torch.Tensor:
    offset = fit.mean + fit.bias if fit.weight.shape[0] == fit.weight.shape[1] else fit.bias
    return (stale - fit.mean) @ full_map(fit).float().T + offset


def error(found: torch.Tensor, fresh: torch.Tensor) -> float:
    return float((found - fresh).double().square().sum(dim=1).mean())


def penalty(pairs: Pairs, relative_ridge: float) -> float:
    """Return the absolute ridge strength: relative to the mean eigenvalue of the weighted covariance."""
    share = (pairs.weights / pairs.weights.sum())[:, None]
    centred = pairs.stale - (pairs.stale * share).sum(dim=0)
    return relative_ridge * float((centred.square() * share).sum()) / pairs.stale.shape[1]


def optimum(pairs: Pairs, prior: torch.Tensor, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimise the weighted ridge objective by autograd; returns map and offset."""
    share = (pairs.weights / pairs.weights.sum())[:, None]
    weight, offset = prior.clone().requires_grad_(True), pairs.fresh.mean(dim=0).clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight, offset], lr=1.0, max_iter=3000, tolerance_grad=1e-13, tolerance_change=0.0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        residual = pairs.stale @ weight.T + offset - pairs.fresh
        loss = (residual.square() * share).sum() + strength * (weight - prior).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), offset.detach()


def weighted_pairs(count: int = 40, dim_in: int = 5, dim_out: int = 5) -> Pairs:
    generator = torch.Generator().manual_seed(3)
    stale = torch.randn(count, dim_in, generator=generator) + 1
    fresh = stale @ torch.randn(dim_in, dim_out, generator=generator) + torch.randn(count, dim_out, generator=generator)
    return Pairs.collect(stale, fresh, weights=torch.rand(count, generator=generator) + 0.1)


# ---------------------------------------------------------------------- pairs


def test_pairs_of_one_target_are_merged_into_their_weighted_mean() -> None:
    stale, fresh = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[0.0], [8.0], [1.0]])
    pairs = Pairs.collect(stale, fresh, target_rows=torch.tensor([7, 3, 7]), weights=torch.tensor([1.0, 2.0, 3.0]))
    assert pairs.stale.tolist() == [[2.0], [4.0]]
    assert pairs.fresh.tolist() == [[8.0], [0.75]]
    assert pairs.weights.tolist() == [2.0, 4.0]
    assert pairs.stale.dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pair_that_is_not_finite_is_named(bad: float) -> None:
    stale, fresh = torch.ones(4, 2), torch.ones(4, 2)
    fresh[2, 1] = bad
    with pytest.raises(ConfigurationError, match="pair 2"):
        Pairs.collect(stale, fresh)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan])
def test_pair_without_a_positive_weight_is_named(weight: float) -> None:
    with pytest.raises(ConfigurationError, match="pair 1"):
        Pairs.collect(torch.ones(3, 2), torch.ones(3, 2), weights=torch.tensor([1.0, weight, 1.0]))


@pytest.mark.parametrize(
    ("stale", "fresh", "rows"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), None),
        (torch.ones(3), torch.ones(3, 2), None),
        (torch.ones(3, 2), torch.ones(3, 2), torch.arange(2)),
        (torch.ones(1, 2), torch.ones(1, 2), None),
        (torch.ones(3, 2), torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_pairs_that_do_not_fit_together_are_refused(
    stale: torch.Tensor, fresh: torch.Tensor, rows: torch.Tensor | None
) -> None:
    with pytest.raises(ConfigurationError, match="corrector fit"):
        Pairs.collect(stale, fresh, target_rows=rows)


# ---------------------------------------------------------------------- the solution


def test_mean_shift_is_the_weighted_mean_displacement() -> None:
    stale, fresh = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert fit_mean_shift(Pairs.collect(stale, fresh, weights=torch.tensor([3.0, 1.0]))).tolist() == [0.75, 1.0]


@pytest.mark.parametrize(
    ("prior", "ridge", "dim_out"),
    [
        ("identity", 0.01, 5), ("zero", 1.0, 5), ("zero", 0.01, 3), ("zero", 0.01, 8), ("procrustes", 0.1, 5),
        ("procrustes", 0.1, 3), ("procrustes", 0.1, 8),
    ],
)  # fmt: skip
def test_closed_form_is_the_optimum_that_autograd_finds(prior: str, ridge: float, dim_out: int) -> None:
    pairs = weighted_pairs(dim_out=dim_out)
    fit = fit_affine(pairs, priors=(prior,), relative_ridges=(ridge,))
    prior_map = {"identity": torch.eye(5), "zero": torch.zeros(dim_out, 5)}.get(prior)
    if prior_map is None:
        prior_map = full_map(fit_affine(pairs, priors=(prior,), relative_ridges=(1e12,)))
    weight, offset = optimum(pairs, prior_map.double(), penalty(pairs, ridge))
    assert torch.allclose(full_map(fit), weight, atol=1e-5)
    assert torch.allclose(apply(fit, pairs.stale.float()).double(), pairs.stale @ weight.T + offset, atol=1e-5)


def test_procrustes_prior_is_the_best_rotation() -> None:
    pairs = weighted_pairs()
    fit = fit_affine(pairs, priors=("procrustes",), relative_ridges=(1e12,))
    root = (pairs.weights / pairs.weights.sum()).sqrt()[:, None]
    stale = (pairs.stale - fit.mean) * root
    fresh = (pairs.fresh - (fit.mean + fit.bias)) * root
    rotation = torch.from_numpy(orthogonal_procrustes(stale.numpy(), fresh.numpy())[0]).T
    assert torch.allclose(full_map(fit), rotation, atol=1e-5)


# ---------------------------------------------------------------------- leave one target out


@pytest.mark.parametrize("prior", ["identity", "zero"])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
def test_leave_one_out_error_is_that_of_really_leaving_each_target_out(prior: str, ridge: float) -> None:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(12, (25,), generator=generator)
    stale, fresh = torch.randn(25, 4, generator=generator), torch.randn(25, 4, generator=generator)
    weights = torch.rand(25, generator=generator) + 0.2
    pairs = Pairs.collect(stale, fresh, target_rows=rows, weights=weights)
    fit = fit_affine(pairs, priors=(prior,), relative_ridges=(ridge,))

    prior_map = torch.eye(4, dtype=torch.float64) if prior == "identity" else torch.zeros(4, 4, dtype=torch.float64)
    share, strength, total = pairs.weights / pairs.weights.sum(), penalty(pairs, ridge), 0.0
    for left_out in range(len(pairs.stale)):
        kept = torch.arange(len(pairs.stale)) != left_out
        s = share[kept, None]
        stale_mean, fresh_mean = (pairs.stale[kept] * s).sum(0) / s.sum(), (pairs.fresh[kept] * s).sum(0) / s.sum()
        x, y = pairs.stale[kept] - stale_mean, pairs.fresh[kept] - fresh_mean
        system = x.T @ (x * s) + strength * torch.eye(4, dtype=torch.float64)
        weight = torch.linalg.solve(system, x.T @ (y * s) + strength * prior_map.T).T
        residual = pairs.fresh[left_out] - fresh_mean - weight @ (pairs.stale[left_out] - stale_mean)
        total += float(share[left_out] * residual.square().sum())
    assert fit.loo_error == pytest.approx(total, rel=1e-5)
    assert fit.pairs == len(set(rows.tolist()))


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("count", [20, 60, 400])
def test_leave_one_out_error_foretells_the_error_on_other_targets(prior: str, count: int) -> None:
    foretold, found = 0.0, 0.0
    for seed in range(6):
        stale, fresh = drifted(count + 500, 48, seed=seed)
        fit = fit_affine(Pairs.collect(stale[:count], fresh[:count]), priors=(prior,))
        foretold += fit.loo_error
        found += error(apply(fit, stale[count:]), fresh[count:])
    assert foretold == pytest.approx(found, rel=0.25)


def test_error_judged_on_part_of_many_targets_is_close_to_that_on_all() -> None:
    stale, fresh = drifted(3 * MAX_LOO_ROWS, 6)
    fit = fit_affine(Pairs.collect(stale, fresh))
    assert fit.loo_error == pytest.approx(error(apply(fit, stale), fresh), rel=0.05)


# ---------------------------------------------------------------------- the choice


def test_small_drift_is_fitted_from_the_identity_a_rotation_from_procrustes_and_no_relation_from_zero() -> None:
    assert fit_affine(Pairs.collect(*drifted(30, 48))).prior == "identity"
    assert fit_affine(Pairs.collect(*rotated(120, 48))).prior == "procrustes"
    stale, _ = drifted(60, 48)
    assert fit_affine(Pairs.collect(stale, drifted(60, 48, seed=9)[1])).prior == "zero"


@pytest.mark.parametrize("count", [2, 5, 12, 30, 60, 200])
@pytest.mark.parametrize("drift", [0.05, 0.3])
def test_fit_to_few_pairs_costs_other_targets_no_more_than_an_estimated_mean_does(count: int, drift: float) -> None:
    stale, fresh = drifted(count + 1000, 48, drift=drift)
    fit = fit_affine(Pairs.collect(stale[:count], fresh[:count]))
    assert error(apply(fit, stale[count:]), fresh[count:]) <= error(stale[count:], fresh[count:]) * (1 + 2 / count)


@pytest.mark.parametrize("count", [2, 10, 40, 300])
def test_without_drift_the_fit_is_the_identity(count: int) -> None:
    stale, _ = drifted(count + 200, 48)
    fit = fit_affine(Pairs.collect(stale[:count], stale[:count]))
    assert torch.allclose(apply(fit, stale[count:]), stale[count:], atol=1e-5)


def test_noise_without_drift_is_not_followed() -> None:
    stale, fresh = drifted(1100, 48, drift=0.0, noise=0.3)
    fit = fit_affine(Pairs.collect(stale[:100], fresh[:100]))
    assert error(apply(fit, stale[100:]), fresh[100:]) <= error(stale[100:], fresh[100:]) * 1.03


def test_more_pairs_are_fitted_more_closely() -> None:
    stale, fresh = drifted(3000, 48)
    errors = []
    for count in (20, 100, 1000):
        fit = fit_affine(Pairs.collect(stale[:count], fresh[:count]))
        errors.append(error(apply(fit, stale[1000:]), fresh[1000:]))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.3 * error(stale[1000:], fresh[1000:])


def test_spaces_of_different_size_are_mapped() -> None:
    generator = torch.Generator().manual_seed(5)
    stale = torch.randn(300, 12, generator=generator)
    target = torch.randn(7, 12, generator=generator)
    fresh = stale @ target.T + 3
    fit = fit_affine(Pairs.collect(stale[:200], fresh[:200]))
    assert fit.weight.shape == (7, 12)
    assert fit.prior in ("procrustes", "zero")
    assert torch.allclose(apply(fit, stale[200:]), fresh[200:], atol=1e-3)


@pytest.mark.parametrize("priors", [("identity",), ("nonsense",), ("zero", "nonsense"), ()])
def test_priors_that_do_not_exist_or_do_not_fit_are_refused(priors: tuple[str, ...]) -> None:
    with pytest.raises(ConfigurationError, match="priors"):
        fit_affine(weighted_pairs(dim_out=3), priors=priors)


# ---------------------------------------------------------------------- awkward numbers


def finite(fit: AffineFit) -> bool:
    numbers = torch.cat([fit.mean, fit.weight.flatten(), fit.bias, torch.tensor([fit.loo_error])])
    return bool(torch.isfinite(numbers).all())


def test_directions_never_seen_stay_where_they_were() -> None:
    stale, fresh = drifted(6, 48)
    fit = fit_affine(Pairs.collect(stale, fresh), priors=("identity",))
    unseen = torch.linalg.svd(stale - fit.mean)[2][-20:]
    assert torch.allclose(unseen @ fit.weight.T, torch.zeros(20, 48), atol=1e-4)


def test_collinear_vectors_are_fitted() -> None:
    generator = torch.Generator().manual_seed(6)
    stale = torch.randn(40, 1, generator=generator) * torch.ones(1, 10)
    fresh = 2 * stale + 1
    fit = fit_affine(Pairs.collect(stale, fresh))
    assert finite(fit)
    assert torch.allclose(apply(fit, stale), fresh, atol=1e-3)


@pytest.mark.parametrize("value", [0.0, 0.1, 3e4])
def test_stale_vectors_that_are_all_equal_give_the_mean_shift(value: float) -> None:
    generator = torch.Generator().manual_seed(7)
    stale = torch.full((30, 6), value) * torch.tensor([1.0, 0.3, 0.7, -1.1, 0.9, 0.123])
    fresh = stale + torch.randn(30, 6, generator=generator)
    fit = fit_affine(Pairs.collect(stale, fresh), priors=("identity", "zero"))
    assert finite(fit)
    assert fit.weight.abs().max() <= 1.0
    assert torch.allclose(apply(fit, stale[:1])[0], fresh.double().mean(dim=0).float(), rtol=1e-5, atol=1e-5)


def test_equal_fresh_vectors_are_fitted() -> None:
    stale, _ = drifted(100, 8)
    fit = fit_affine(Pairs.collect(stale, torch.ones(100, 8)))
    assert torch.allclose(apply(fit, stale), torch.ones(100, 8), atol=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e10, 1e25])
def test_units_do_not_matter(scale: float) -> None:
    stale, fresh = drifted(200, 16)
    plain = fit_affine(Pairs.collect(stale, fresh))
    scaled = fit_affine(Pairs.collect(stale.double() * scale, fresh.double() * scale))
    assert (scaled.prior, scaled.ridge) == (plain.prior, plain.ridge)
    assert torch.allclose(scaled.weight, plain.weight, rtol=1e-4, atol=1e-6)
    assert scaled.loo_error == pytest.approx(plain.loo_error * scale**2, rel=1e-3)


def test_weights_count_like_repetitions() -> None:
    stale, fresh = drifted(30, 6)
    repeats = torch.randint(1, 4, (30,), generator=torch.Generator().manual_seed(8))
    weighted = fit_affine(Pairs.collect(stale, fresh, weights=repeats.float()))
    rows = torch.arange(30).repeat_interleave(repeats)
    repeated = fit_affine(Pairs.collect(stale[rows], fresh[rows], target_rows=rows))
    assert torch.allclose(weighted.weight, repeated.weight, atol=1e-6)
    assert (weighted.prior, weighted.ridge) == (repeated.prior, repeated.ridge)


def test_equal_errors_are_decided_for_the_stronger_ridge() -> None:
    stale = torch.ones(10, 3)
    assert fit_affine(Pairs.collect(stale, stale)).ridge == max(RELATIVE_RIDGES)


def test_fitting_needs_no_random_numbers() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    fit_affine(weighted_pairs())
    assert torch.equal(torch.get_rng_state(), before)
