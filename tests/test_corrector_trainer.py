from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import Pairs, fit_affine, fit_mean_shift
from hf_corrector.losses import corrector_loss
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.models.configuration_corrector import KINDS
from hf_corrector.training.corrector_trainer import (
    CorrectorFitting,
    OnlineCorrector,
    fit_corrector,
    gradient_update,
    solve_closed_form,
)

DIM = 8
TARGETS = 400
QUICK = CorrectorFitting(max_epochs=30, batch_size=64, updates=2, finishing_updates=20, update_steps=5, window=20)


def make(kind: str, dim_in: int = DIM, dim_out: int = DIM, *, seed: int = 0) -> CorrectorModel:
    torch.manual_seed(seed)
    return CorrectorModel(CorrectorConfig(kind=kind, input_dim=dim_in, output_dim=dim_out, hidden_dim=64))


def unit_rows(count: int = TARGETS, dim: int = DIM, *, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def linear_drift(stale: torch.Tensor) -> torch.Tensor:
    change = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5)) * 0.4
    return normalize(stale @ (torch.eye(DIM) + change).T + 0.3, dim=1)


def bent_drift(stale: torch.Tensor) -> torch.Tensor:
    """Move each vector in a direction that no linear map of it gives."""
    change = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(6))
    return normalize(stale + 0.7 * torch.sign(stale[:, :1]) * torch.tanh(3 * stale @ change.T).abs(), dim=1)


def error(corrector: CorrectorModel, stale: torch.Tensor, fresh: torch.Tensor) -> float:
    return float(corrector_loss(corrector.correct(stale), fresh))


# ---------------------------------------------------------------------- fitting once


def test_mean_shift_and_affine_hold_the_closed_form() -> None:
    stale, fresh = unit_rows(), linear_drift(unit_rows())
    pairs = Pairs.collect(stale, fresh)
    shifted, affine = fit_corrector(make("mean_shift"), stale, fresh), fit_corrector(make("affine"), stale, fresh)
    assert torch.equal(shifted.shift, fit_mean_shift(pairs))
    fit = fit_affine(pairs)
    assert torch.equal(affine.weight, fit.weight)
    assert torch.equal(affine.mean, fit.mean)
    assert torch.equal(affine.bias, fit.bias)
    assert affine.fitted_pairs == shifted.fitted_pairs == TARGETS


@pytest.mark.parametrize("kind", ["mean_shift", "affine", "residual_mlp"])
def test_fit_reduces_the_error_on_other_targets(kind: str) -> None:
    stale, fresh = unit_rows(), linear_drift(unit_rows())
    corrector = make(kind)
    before = error(corrector, stale[300:], fresh[300:])
    assert fit_corrector(corrector, stale[:300], fresh[:300], fitting=QUICK) is corrector
    assert error(corrector, stale[300:], fresh[300:]) < (0.95 if kind == "mean_shift" else 0.3) * before


def test_network_follows_a_bent_map_more_closely_than_an_affine_one() -> None:
    stale = unit_rows(2000)
    fresh = bent_drift(stale)
    errors = {}
    for kind in ("identity", "affine", "residual_mlp"):
        corrector = fit_corrector(make(kind), stale[:1600], fresh[:1600], fitting=CorrectorFitting(max_epochs=40))
        errors[kind] = error(corrector, stale[1600:], fresh[1600:])
    assert errors["residual_mlp"] < 0.8 * errors["affine"]
    assert errors["affine"] < errors["identity"]


def test_network_keeps_the_state_that_was_best_on_held_out_targets() -> None:
    stale, fresh = unit_rows(40), unit_rows(40, seed=9)
    corrector = make("residual_mlp")
    before = error(corrector, stale, fresh)
    fit_corrector(corrector, stale, fresh, fitting=CorrectorFitting(max_epochs=60, batch_size=8, learning_rate=1e-2))
    assert corrector.config.fit_summary["held_out_error"] <= 1.3 * before


@pytest.mark.parametrize("kind", ["affine", "residual_mlp"])
@pytest.mark.parametrize("dim_out", [5, 12])
def test_spaces_of_different_size_are_fitted(kind: str, dim_out: int) -> None:
    stale = unit_rows()
    fresh = normalize(stale @ torch.randn(DIM, dim_out, generator=torch.Generator().manual_seed(3)), dim=1)
    corrector = make(kind, DIM, dim_out)
    before = error(corrector, stale[300:], fresh[300:])
    fit_corrector(corrector, stale[:300], fresh[:300], fitting=QUICK)
    assert error(corrector, stale[300:], fresh[300:]) < 0.1 * before


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_fit_found_is_kept_in_the_configuration_and_saved(kind: str, tmp_path: Path) -> None:
    stale, fresh = unit_rows(60), linear_drift(unit_rows(60))
    corrector = fit_corrector(make(kind), stale, fresh, fitting=QUICK)
    corrector.save_pretrained(tmp_path)
    loaded = CorrectorModel.from_pretrained(tmp_path)
    assert loaded.config.fit_summary == corrector.config.fit_summary
    assert torch.equal(loaded.correct(stale), corrector.correct(stale))
    if kind == "identity":
        assert corrector.config.fit_summary is None
    else:
        assert corrector.config.fit_summary["pairs"] == 60


@pytest.mark.parametrize("kind", ["mean_shift", "affine", "residual_mlp"])
def test_pairs_of_one_target_count_as_one(kind: str) -> None:
    rows = torch.randint(50, (200,), generator=torch.Generator().manual_seed(1))
    stale = unit_rows(50)[rows]
    corrector = fit_corrector(make(kind), stale, linear_drift(stale), target_rows=rows, fitting=QUICK)
    assert corrector.fitted_pairs == len(rows.unique())


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_leaves_global_random_numbers_gradients_and_flags_alone(kind: str) -> None:
    stale, fresh = unit_rows(60), linear_drift(unit_rows(60))
    corrector = make(kind).requires_grad_(False)
    before = torch.get_rng_state()
    fit_corrector(corrector, stale, fresh, fitting=QUICK)
    assert torch.equal(torch.get_rng_state(), before)
    assert [(one.grad, one.requires_grad) for one in corrector.parameters()] == [(None, False)] * len(
        list(corrector.parameters())
    )


def test_gradient_fit_depends_on_its_seed_alone() -> None:
    stale, fresh = unit_rows(60), linear_drift(unit_rows(60))

    def fitted(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 77)
        return fit_corrector(
            make("residual_mlp"), stale, fresh, fitting=CorrectorFitting(max_epochs=5, seed=seed)
        ).output.weight

    assert torch.equal(fitted(0), fitted(0))
    assert not torch.equal(fitted(0), fitted(1))


@pytest.mark.parametrize("kind", ["affine", "residual_mlp"])
def test_fit_works_where_gradients_are_off(kind: str) -> None:
    stale, fresh = unit_rows(60), linear_drift(unit_rows(60))
    expected = fit_corrector(make(kind), stale, fresh, fitting=QUICK).correct(stale)
    with torch.no_grad():
        assert torch.equal(fit_corrector(make(kind), stale, fresh, fitting=QUICK).correct(stale), expected)


@pytest.mark.parametrize("kind", ["mean_shift", "affine", "residual_mlp"])
def test_two_targets_are_enough_and_one_is_not(kind: str) -> None:
    stale = unit_rows(2)
    assert torch.isfinite(fit_corrector(make(kind), stale, linear_drift(stale), fitting=QUICK).correct(stale)).all()
    with pytest.raises(ConfigurationError, match="at least 2"):
        fit_corrector(make(kind), stale[:1], stale[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_another_size_are_refused(kind: str) -> None:
    with pytest.raises(ConfigurationError, match="corrector fit"):
        fit_corrector(make(kind), unit_rows(10, 5), unit_rows(10), fitting=QUICK)
    with pytest.raises(ConfigurationError, match="corrector fit"):
        fit_corrector(make(kind), unit_rows(10), unit_rows(10, 1), fitting=QUICK)
    with pytest.raises(ConfigurationError, match="corrector fit"):
        fit_corrector(make(kind), unit_rows(10), unit_rows(9), fitting=QUICK)


def test_network_has_no_closed_form() -> None:
    with pytest.raises(ConfigurationError, match="closed form"):
        solve_closed_form(make("residual_mlp"), Pairs.collect(unit_rows(9), unit_rows(9)))


def test_gradient_update_returns_the_loss_and_descends() -> None:
    stale, fresh = unit_rows(100), linear_drift(unit_rows(100))
    corrector = make("residual_mlp").requires_grad_(False)
    optimizer = torch.optim.AdamW(corrector.parameters(), lr=1e-3)
    before = float(corrector_loss(corrector(stale), fresh))
    losses = [gradient_update(corrector, optimizer, stale, fresh) for _ in range(20)]
    assert losses[0] == pytest.approx(before)
    assert losses[-1] < losses[0]
    assert all(one.grad is None and not one.requires_grad for one in corrector.parameters())


# ---------------------------------------------------------------------- following the drift


class Drift:
    """A corpus whose fresh vectors move further away at every step."""

    def __init__(self) -> None:
        self.stale = unit_rows()
        self.gathered: list[list[int]] = []

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.gathered.append(rows.tolist())
        return self.stale[rows]

    def fresh(self, step: int) -> torch.Tensor:
        end = linear_drift(self.stale)
        return normalize(self.stale + min(step / 40, 1.0) * (end - self.stale), dim=1)

    def rows(self, step: int) -> torch.Tensor:
        return torch.randint(TARGETS, (24,), generator=torch.Generator().manual_seed(step))


def follow(online: OnlineCorrector, drift: Drift, steps: range) -> list[bool]:
    changed = []
    for step in steps:
        rows = drift.rows(step)
        online.observe(rows, drift.fresh(step)[rows], step=step)
        changed.append(online.update(step))
    return changed


def online_of(kind: str, drift: Drift, fitting: CorrectorFitting = QUICK) -> OnlineCorrector:
    return OnlineCorrector(make(kind), drift.gather, num_targets=TARGETS, fitting=fitting)


@pytest.mark.parametrize("kind", ["affine", "residual_mlp"])
def test_online_corrector_follows_the_drift(kind: str) -> None:
    drift = Drift()
    online = online_of(kind, drift, CorrectorFitting(window=20, update_steps=5, updates=8, batch_size=128))
    follow(online, drift, range(60))
    online.finish()
    stale_error = float(corrector_loss(drift.stale, drift.fresh(60)))
    assert error(online.corrector, drift.stale, drift.fresh(60)) < 0.4 * stale_error


@pytest.mark.parametrize("kind", ["mean_shift", "affine"])
def test_closed_form_is_solved_every_so_many_steps(kind: str) -> None:
    drift = Drift()
    assert follow(online_of(kind, drift), drift, range(11)) == [step in (4, 9) for step in range(11)]


def test_network_descends_every_step() -> None:
    drift = Drift()
    assert all(follow(online_of("residual_mlp", drift), drift, range(4)))


def test_network_learns_from_other_pairs_of_the_window_at_every_step() -> None:
    drift = Drift()
    online = online_of("residual_mlp", drift)
    online.observe(torch.arange(TARGETS), drift.stale, step=0)
    for step in range(3):
        online.update(step)
    assert len({tuple(rows) for rows in drift.gathered}) == 3 * QUICK.updates


def test_identity_is_never_changed_and_costs_nothing() -> None:
    drift = Drift()
    online = online_of("identity", drift)
    assert not any(follow(online, drift, range(10)))
    assert not online.finish()
    assert drift.gathered == []
    assert len(online.fitted_rows) == 0


@pytest.mark.parametrize("kind", ["affine", "residual_mlp"])
def test_nothing_is_fitted_to_an_empty_window(kind: str) -> None:
    online = online_of(kind, Drift())
    untrained = {name: value.clone() for name, value in online.corrector.state_dict().items()}
    for step in range(5):
        online.update(step)
    online.finish()
    assert all(torch.equal(value, untrained[name]) for name, value in online.corrector.state_dict().items())


def test_closed_form_is_fitted_to_the_window_alone() -> None:
    drift = Drift()
    online = online_of("affine", drift)
    follow(online, drift, range(40))
    rows = torch.cat([drift.rows(step) for step in range(20, 40)]).unique()
    assert torch.equal(online.fitted_rows, rows)
    assert online.corrector.fitted_pairs == len(rows)


def test_network_has_been_fitted_to_all_targets_it_ever_saw() -> None:
    drift = Drift()
    online = online_of("residual_mlp", drift)
    follow(online, drift, range(40))
    rows = torch.cat([drift.rows(step) for step in range(40)]).unique()
    assert torch.equal(online.fitted_rows, rows)


def test_finish_chooses_among_all_priors_and_ridges() -> None:
    drift = Drift()
    online = online_of("affine", drift)
    follow(online, drift, range(30))
    assert online.finish()
    found = online.window.pairs()
    fit = fit_affine(Pairs.collect(drift.stale[found.rows], found.fresh))
    assert torch.equal(online.corrector.weight, fit.weight)
    assert online.corrector.config.fit_summary["prior"] == fit.prior


def test_training_that_goes_on_after_a_finish_learns_at_the_full_rate() -> None:
    drift = Drift()
    finished, rested = online_of("residual_mlp", drift), online_of("residual_mlp", drift)
    for online in (finished, rested):
        follow(online, drift, range(5))
    finished.finish()
    rested.corrector.load_state_dict(finished.corrector.state_dict())
    rested.load_state({name: value.clone() for name, value in finished.state().items()})
    assert follow(finished, drift, range(5, 8)) == follow(rested, drift, range(5, 8))
    assert torch.equal(finished.corrector.output.weight, rested.corrector.output.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_online_fitting_leaves_global_random_numbers_gradients_and_flags_alone(kind: str) -> None:
    drift = Drift()
    online = online_of(kind, drift)
    before = torch.get_rng_state()
    follow(online, drift, range(10))
    online.finish()
    assert torch.equal(torch.get_rng_state(), before)
    for parameter in online.corrector.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_observed_vectors_carry_no_gradient_into_the_encoder() -> None:
    drift = Drift()
    online = online_of("residual_mlp", drift)
    encoder = torch.nn.Linear(DIM, DIM)
    online.observe(torch.arange(10), encoder(drift.stale[:10]), step=0)
    online.update(0)
    assert encoder.weight.grad is None


def save_and_load(tmp_path: Path) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def through_a_file(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "state.safetensors")
        return load_file(tmp_path / "state.safetensors")

    return through_a_file


@pytest.mark.parametrize("interrupted", [0, 1, 7, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_fitting_goes_on_as_if_never_interrupted(kind: str, interrupted: int, tmp_path: Path) -> None:
    drift = Drift()
    whole = online_of(kind, drift)
    follow(whole, drift, range(30))
    whole.finish()

    first = online_of(kind, drift)
    follow(first, drift, range(interrupted))
    first.corrector.save_pretrained(tmp_path / "corrector")
    state = save_and_load(tmp_path)(first.state())
    second = OnlineCorrector(
        CorrectorModel.from_pretrained(tmp_path / "corrector"), drift.gather, num_targets=TARGETS, fitting=QUICK
    )
    second.load_state(state)
    follow(second, drift, range(interrupted, 30))
    second.finish()
    assert torch.equal(second.corrector.correct(drift.stale), whole.corrector.correct(drift.stale))
    assert torch.equal(second.fitted_rows, whole.fitted_rows)
