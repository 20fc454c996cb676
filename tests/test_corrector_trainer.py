from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from drift_helpers import DIM, QUICK, TARGETS, error, lexical_drift, linear_drift, make, token_counts, unit_rows
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from hf_corrector.fitting import Pairs, fit_affine
from hf_corrector.losses import corrector_loss
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.models.configuration_corrector import KINDS
from hf_corrector.training.corrector_fit import CorrectorFitting
from hf_corrector.training.corrector_trainer import OnlineCorrector, OnlineTargets


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
        online.advance(0.1)
        changed.append(online.update(step))
    return changed


def online_of(kind: str, drift: Drift, fitting: CorrectorFitting = QUICK) -> OnlineCorrector:
    return OnlineCorrector(make(kind), OnlineTargets(TARGETS, drift.gather), fitting=fitting)


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
    loaded = CorrectorModel.from_pretrained(tmp_path / "corrector")
    second = OnlineCorrector(loaded, OnlineTargets(TARGETS, drift.gather), fitting=QUICK)
    second.load_state(state)
    follow(second, drift, range(interrupted, 30))
    second.finish()
    assert torch.equal(second.corrector.correct(drift.stale), whole.corrector.correct(drift.stale))
    assert torch.equal(second.fitted_rows, whole.fitted_rows)


# ---------------------------------------------------------------------- side features and the clock


def lexical_online(kind: str, counts, drift: Drift, *, from_zero: bool = True) -> OnlineCorrector:
    torch.manual_seed(0)
    config = CorrectorConfig(
        kind=kind, input_dim=DIM, hidden_dim=64, side="tokens", side_dim=counts.width, side_vocabulary=counts.vocabulary
    )
    targets = OnlineTargets(TARGETS, drift.gather, side=counts, drift_from_zero=from_zero)
    return OnlineCorrector(CorrectorModel(config), targets, fitting=QUICK)


@pytest.mark.parametrize("kind", ["affine", "kernel", "residual_mlp"])
def test_tokens_are_followed_online(kind: str) -> None:
    counts, drift = token_counts(), Drift()
    end = lexical_drift(drift.stale, counts)
    plain, lexical = online_of(kind, drift), lexical_online(kind, counts, drift)
    for step in range(40):
        now = normalize(drift.stale + (step / 40) * (end - drift.stale), dim=1)
        for online in (plain, lexical):
            online.observe(drift.rows(step), now[drift.rows(step)], step=step)
            online.advance(0.1)
            online.update(step)
    for online in (plain, lexical):
        online.finish()
    now = normalize(drift.stale + (39 / 40) * (end - drift.stale), dim=1)
    with_tokens = corrector_loss(lexical.corrector.correct(drift.stale, counts), now)
    assert with_tokens < 0.7 * error(plain.corrector, drift.stale, now)


def test_clock_brings_earlier_pairs_forward() -> None:
    drift = Drift()
    followed = {}
    for from_zero in (True, False):
        targets = OnlineTargets(TARGETS, drift.gather, drift_from_zero=from_zero)
        online = OnlineCorrector(make("kernel"), targets, fitting=QUICK)
        follow(online, drift, range(20))
        followed[from_zero] = error(online.corrector, drift.stale, drift.fresh(19))
    assert followed[True] < 0.8 * followed[False]


@pytest.mark.parametrize("kind", ["affine", "kernel", "residual_mlp"])
def test_interrupted_fitting_with_tokens_goes_on_as_if_never_interrupted(kind: str, tmp_path: Path) -> None:
    counts, drift = token_counts(), Drift()
    whole, first, second = (lexical_online(kind, counts, drift) for _ in range(3))
    follow(whole, drift, range(24))
    follow(first, drift, range(13))
    second.corrector.load_state_dict(first.corrector.state_dict())
    second.load_state(save_and_load(tmp_path)(first.state()))
    follow(second, drift, range(13, 24))
    assert torch.equal(second.corrector.correct(drift.stale, counts), whole.corrector.correct(drift.stale, counts))


def test_network_beside_tokens_has_been_fitted_to_all_targets_it_ever_saw() -> None:
    counts, drift = token_counts(), Drift()
    online = lexical_online("residual_mlp", counts, drift)
    seen: set[int] = set()
    for step in range(3 * QUICK.window):
        seen |= set(drift.rows(step).tolist())
    follow(online, drift, range(3 * QUICK.window))
    assert set(online.fitted_rows.tolist()) == seen
