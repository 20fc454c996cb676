from pathlib import Path

import pytest
import torch
from drift_helpers import (
    DIM,
    QUICK,
    TARGETS,
    bent_drift,
    error,
    lexical_drift,
    linear_drift,
    make,
    token_counts,
    unit_rows,
)
from torch.nn.functional import normalize

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import Pairs, fit_affine, fit_mean_shift
from hf_corrector.losses import corrector_loss
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.models.configuration_corrector import CLOSED_FORM_KINDS, KINDS
from hf_corrector.models.modeling_corrector import CORRECT_CHUNK_ROWS
from hf_corrector.training.corrector_fit import (
    CorrectorFitting,
    fit_corrector,
    fit_to_pairs,
    gradient_update,
    solve_closed_form,
)

LEARNING = tuple(kind for kind in KINDS if kind != "identity")


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


# ---------------------------------------------------------------------- side features


def with_side(kind: str, width: int, *, side: str = "tokens", vocabulary: int | None = None) -> CorrectorModel:
    torch.manual_seed(0)
    return CorrectorModel(
        CorrectorConfig(kind=kind, input_dim=DIM, hidden_dim=64, side=side, side_dim=width, side_vocabulary=vocabulary)
    )


@pytest.mark.parametrize("kind", LEARNING)
def test_tokens_tell_what_the_vector_does_not(kind: str) -> None:
    counts, stale = token_counts(), unit_rows()
    fresh = lexical_drift(stale, counts)
    plain = fit_corrector(make(kind), stale[:300], fresh[:300], fitting=QUICK)
    corrector = with_side(kind, counts.width, vocabulary=counts.vocabulary)
    fit_corrector(corrector, stale[:300], fresh[:300], side=counts.read(0, 300), fitting=QUICK)
    corrected = corrector.correct(stale[300:], counts.read(300, TARGETS))
    assert corrector_loss(corrected, fresh[300:]) < 0.5 * error(plain, stale[300:], fresh[300:])


@pytest.mark.parametrize("kind", LEARNING)
def test_dense_side_features_are_fitted(kind: str) -> None:
    stale, side = unit_rows(), torch.randn(TARGETS, 3, generator=torch.Generator().manual_seed(2)) + 1
    fresh = normalize(stale + 0.15 * side @ torch.randn(3, DIM, generator=torch.Generator().manual_seed(4)), dim=1)
    corrector = with_side(kind, 3, side="matrix")
    fit_corrector(corrector, stale[:300], fresh[:300], side=side[:300], fitting=QUICK)
    plain = fit_corrector(make(kind), stale[:300], fresh[:300], fitting=QUICK)
    assert corrector_loss(corrector.correct(stale[300:], side[300:]), fresh[300:]) < 0.7 * error(
        plain, stale[300:], fresh[300:]
    )


@pytest.mark.parametrize("kind", LEARNING)
def test_fitted_side_features_are_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    counts, stale = token_counts(), unit_rows()
    corrector = with_side(kind, counts.width, vocabulary=counts.vocabulary)
    fit_corrector(corrector, stale, lexical_drift(stale, counts), side=counts.read(0, TARGETS), fitting=QUICK)
    corrector.save_pretrained(tmp_path)
    loaded = CorrectorModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.correct(stale, counts), corrector.correct(stale, counts))
    other = with_side(kind, counts.width, vocabulary=counts.vocabulary)
    other.load_state_dict(corrector.state_dict())
    assert torch.equal(other.correct(stale, counts), corrector.correct(stale, counts))


def test_tokens_never_seen_in_a_pair_add_nothing() -> None:
    counts, stale = token_counts(vocabulary=30), unit_rows()
    corrector = with_side("affine", counts.width, vocabulary=counts.vocabulary)
    seen = counts.gather(torch.arange(4))
    fit_corrector(corrector, stale[:4], lexical_drift(stale, counts)[:4], side=seen)
    rest = sorted(set(range(30)) - set(seen.col_indices().tolist()))
    unseen = type(counts).from_lists([rest[:1]], vocabulary=30, bigram_buckets=64)
    assert torch.equal(corrector.side_displacement(unseen.read(0, 1)), torch.zeros(1, DIM))


def test_side_features_that_are_missing_or_not_wanted_are_refused() -> None:
    counts, stale = token_counts(), unit_rows()
    with pytest.raises(ConfigurationError, match="side"):
        fit_corrector(with_side("affine", counts.width), stale, stale)
    with pytest.raises(ConfigurationError, match="side"):
        fit_corrector(make("affine"), stale, stale, side=counts.read(0, TARGETS))
    with pytest.raises(ConfigurationError, match="side"):
        fit_corrector(with_side("affine", counts.width), stale, stale, side=counts.read(0, TARGETS).to_dense())
    with pytest.raises(ValueError, match="side"):
        with_side("affine", counts.width).correct(stale)
    with pytest.raises(ValueError, match="no side features"):
        make("affine").correct(stale, counts)


# ---------------------------------------------------------------------- further families


def test_kernel_follows_a_bent_map_more_closely_than_an_affine_one() -> None:
    stale = unit_rows(1200)
    fresh = bent_drift(stale)
    kernel = fit_corrector(make("kernel"), stale[:1000], fresh[:1000])
    affine = fit_corrector(make("affine"), stale[:1000], fresh[:1000])
    assert error(kernel, stale[1000:], fresh[1000:]) < 0.9 * error(affine, stale[1000:], fresh[1000:])


def test_rotation_is_found_by_procrustes() -> None:
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(1)))[0]
    stale = unit_rows()
    corrector = fit_corrector(make("procrustes"), stale, stale @ rotation.T)
    torch.testing.assert_close(corrector.correct(stale), stale @ rotation.T, atol=1e-5, rtol=0)
    weight, _ = corrector.affine_map()
    torch.testing.assert_close(weight @ weight.T, torch.eye(DIM), atol=1e-5, rtol=0)


def test_low_rank_drift_is_found_and_its_rank_kept() -> None:
    stale = unit_rows()
    direction = torch.randn(DIM, 1, generator=torch.Generator().manual_seed(1))
    fresh = stale + 0.5 * (stale @ direction) @ direction.T
    corrector = CorrectorModel(CorrectorConfig(kind="low_rank", input_dim=DIM, rank=1, normalize_output=False))
    fit_corrector(corrector, stale, fresh)
    assert corrector.down.shape == (1, DIM)
    torch.testing.assert_close(corrector.correct(stale), fresh, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [kind for kind in CLOSED_FORM_KINDS if kind != "kernel"])
def test_affine_map_is_what_the_corrector_does_before_normalisation(kind: str) -> None:
    stale = unit_rows()
    corrector = CorrectorModel(CorrectorConfig(kind=kind, input_dim=DIM, normalize_output=False))
    fit_corrector(corrector, stale, linear_drift(stale))
    weight, offset = corrector.affine_map()
    torch.testing.assert_close(stale @ weight.T + offset, corrector.correct(stale), atol=1e-5, rtol=0)


def test_kinds_that_are_not_affine_have_no_affine_map() -> None:
    assert make("kernel").affine_map() is None
    assert make("residual_mlp").affine_map() is None
    assert with_side("affine", 5, side="matrix").affine_map() is None


@pytest.mark.parametrize("kind", LEARNING)
def test_duplicate_and_collinear_targets_do_no_harm(kind: str) -> None:
    stale = unit_rows(60)
    stale[20:40] = stale[:20]
    stale[40:] = stale[40:41]
    fresh = linear_drift(stale)
    corrector = fit_corrector(make(kind), stale, fresh, fitting=QUICK)
    others = unit_rows(200, seed=9)
    assert torch.isfinite(corrector.correct(others)).all()
    assert error(corrector, others, linear_drift(others)) < 1.5 * float(corrector_loss(others, linear_drift(others)))


@pytest.mark.parametrize("kind", LEARNING)
def test_fewer_pairs_than_dimensions_do_no_harm(kind: str) -> None:
    torch.manual_seed(0)
    stale = unit_rows(300, 64)
    shift = 0.3 * torch.randn(64, generator=torch.Generator().manual_seed(1)) / 8
    fresh = normalize(stale + shift, dim=1)
    corrector = CorrectorModel(CorrectorConfig(kind=kind, input_dim=64))
    fit_corrector(corrector, stale[:12], fresh[:12], fitting=QUICK)
    stays = float(corrector_loss(stale[12:], fresh[12:]))
    limit = 3.0 if kind == "procrustes" else 1.1  # a rotation in 64 dimensions cannot be told from 12 pairs
    assert error(corrector, stale[12:], fresh[12:]) < limit * stays or kind == "procrustes"


def test_weights_of_pairs_reach_every_kind() -> None:
    stale, fresh = unit_rows(), linear_drift(unit_rows())
    wrong = fresh.clone()
    wrong[::2] = stale[::2]
    weights = torch.where(torch.arange(TARGETS) % 2 == 0, 1e-6, 1.0)
    for kind in LEARNING:
        heavy = fit_to_pairs(make(kind), Pairs.collect(stale, wrong, weights=weights), fitting=QUICK)
        alone = fit_corrector(make(kind), stale[1::2], fresh[1::2], fitting=QUICK)
        assert error(heavy, stale, fresh) < error(alone, stale, fresh) + 0.03


def test_rank_is_chosen_anew_for_other_pairs_and_kept_if_asked_for() -> None:
    torch.manual_seed(0)
    stale = unit_rows(900, 64)
    change = torch.randn(64, 32) @ torch.randn(32, 64) / 40
    fresh = normalize(stale + stale @ change.T, dim=1)
    corrector = CorrectorModel(CorrectorConfig(kind="low_rank", input_dim=64))
    fit_corrector(corrector, stale[:9], fresh[:9])
    few = corrector.config.fitted_rank
    fit_corrector(corrector, stale, fresh)
    assert few < corrector.config.fitted_rank
    asked = CorrectorModel(CorrectorConfig(kind="low_rank", input_dim=64, rank=5))
    assert fit_corrector(asked, stale, fresh).config.fitted_rank == 5


def test_network_beside_tokens_is_judged_on_targets_that_neither_has_seen() -> None:
    counts, stale = token_counts(vocabulary=200), unit_rows()
    fresh = lexical_drift(stale, counts)
    corrector = with_side("residual_mlp", counts.width, vocabulary=counts.vocabulary)
    fit_corrector(corrector, stale[:200], fresh[:200], side=counts.read(0, 200), fitting=QUICK)
    claimed = corrector.config.fit_summary["held_out_error"]
    true = float(corrector_loss(corrector.correct(stale[200:], counts.read(200, TARGETS)), fresh[200:]))
    assert 0.5 * true < claimed < 2 * true


def test_side_features_may_be_a_sparse_tensor_and_must_be_of_the_same_targets() -> None:
    counts, stale = token_counts(CORRECT_CHUNK_ROWS + 50), unit_rows(CORRECT_CHUNK_ROWS + 50)
    corrector = with_side("affine", counts.width, vocabulary=counts.vocabulary)
    fit_corrector(corrector, stale[:200], lexical_drift(stale, counts)[:200], side=counts.read(0, 200))
    whole = counts.read(0, len(counts))
    assert torch.equal(corrector.correct(stale, whole), corrector.correct(stale, counts))
    for side in (counts, whole):
        with pytest.raises(ValueError, match="same 5 targets"):
            corrector.correct(stale[:5], side)
