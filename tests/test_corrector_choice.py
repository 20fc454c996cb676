import numpy as np
import pytest
import torch
from drift_helpers import DIM, QUICK, bent_drift, lexical_drift, linear_drift, make, token_counts, unit_rows

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import Pairs
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.training.corrector_choice import (
    ChoiceOptions,
    Fitted,
    choose_corrector,
    held_out_losses,
    out_of_fold,
    refit,
)
from hf_corrector.training.corrector_fit import fit_to_pairs

COUNT = 300


def fitted(kind: str, pairs: Pairs) -> Fitted:
    return Fitted(fit_to_pairs(make(kind), pairs, fitting=QUICK), pairs)


def test_kind_that_can_follow_the_drift_is_chosen() -> None:
    stale = unit_rows(COUNT)
    pairs = Pairs.collect(stale, linear_drift(stale))
    chosen = choose_corrector({kind: fitted(kind, pairs) for kind in ("mean_shift", "procrustes", "affine")})
    assert chosen.name == "affine"
    assert chosen.rows[0].name == "affine"
    assert chosen.rows[0].behind.estimate == 0
    assert all(row.behind.low > 0 for row in chosen.rows[1:])
    assert "affine leaves the least squared distance" in chosen.sentence


def test_side_features_are_chosen_where_they_tell_more() -> None:
    counts, stale = token_counts(COUNT), unit_rows(COUNT)
    fresh = lexical_drift(stale, counts)
    config = CorrectorConfig(
        kind="affine", input_dim=DIM, side="tokens", side_dim=counts.width, side_vocabulary=counts.vocabulary
    )
    beside = Pairs.collect(stale, fresh, side=counts.read(0, COUNT))
    tokens = Fitted(fit_to_pairs(CorrectorModel(config), beside), beside)
    candidates = {"affine": fitted("affine", Pairs.collect(stale, fresh)), "affine + tokens": tokens}
    queries = unit_rows(40, seed=5)
    chosen = choose_corrector(candidates, ChoiceOptions(queries=queries))
    assert chosen.name == "affine + tokens"
    assert "total variation" in chosen.sentence


def test_pair_is_corrected_by_a_fit_that_has_not_seen_it() -> None:
    stale = unit_rows(40)
    fresh = linear_drift(stale)
    candidate = fitted("affine", Pairs.collect(stale, fresh))
    predicted = out_of_fold(candidate, seed=0)
    moved = fresh.clone()
    moved[7] = -moved[7]
    other = Fitted(candidate.model, Pairs.collect(stale, moved))
    again = out_of_fold(other, seed=0)
    fold = torch.randperm(40, generator=torch.Generator().manual_seed(0)) % 4
    same = fold == fold[7]
    torch.testing.assert_close(again[same], predicted[same], atol=0.05, rtol=0)  # the ridge is chosen on all but them
    assert not torch.allclose(again[~same], predicted[~same], atol=0.05)


def test_loss_with_queries_is_the_total_variation_over_the_pairs() -> None:
    stale = unit_rows(COUNT)
    pairs = Pairs.collect(stale, linear_drift(stale))
    candidate, queries = fitted("mean_shift", pairs), unit_rows(30, seed=5)
    losses = held_out_losses(candidate, ChoiceOptions(queries=queries, scale=10.0))
    predicted = out_of_fold(candidate, seed=0).double()
    exact = torch.softmax(10 * queries.double() @ pairs.fresh.T, dim=1)
    seen = torch.softmax(10 * queries.double() @ predicted.T, dim=1)
    np.testing.assert_allclose(losses, 0.5 * (exact - seen).abs().sum(dim=1).numpy())


def test_networks_are_left_out_above_so_many_pairs_and_named() -> None:
    stale = unit_rows(COUNT)
    pairs = Pairs.collect(stale, bent_drift(stale))
    candidates = {kind: fitted(kind, pairs) for kind in ("mean_shift", "residual_mlp")}
    chosen = choose_corrector(candidates, ChoiceOptions(network_pairs=100))
    assert chosen.name == "mean_shift"
    assert chosen.rows[-1].loss is None
    assert "not compared: residual_mlp" in chosen.sentence
    alone = choose_corrector({"residual_mlp": candidates["residual_mlp"]}, ChoiceOptions(network_pairs=100))
    assert alone.name == "residual_mlp"


def test_choice_depends_on_its_seed_alone() -> None:
    stale = unit_rows(COUNT)
    pairs = Pairs.collect(stale, bent_drift(stale))
    candidates = {kind: fitted(kind, pairs) for kind in ("affine", "kernel", "residual_mlp")}
    first, second = choose_corrector(candidates), choose_corrector(candidates)
    assert first == second


def test_refit_leaves_the_first_corrector_alone() -> None:
    stale = unit_rows(COUNT)
    pairs = Pairs.collect(stale, linear_drift(stale))
    model = fitted("low_rank", pairs).model
    before = model.correct(stale)
    other = refit(model, pairs.take(torch.arange(50)), seed=0)
    assert torch.equal(model.correct(stale), before)
    assert len(other.down) == len(model.down)


def test_candidates_of_different_pairs_are_refused() -> None:
    stale = unit_rows(COUNT)
    pairs = Pairs.collect(stale, linear_drift(stale))
    other = Pairs.collect(stale[:50], linear_drift(stale)[:50])
    for candidates in ({}, {"a": fitted("affine", pairs), "b": fitted("affine", other)}):
        with pytest.raises(ConfigurationError, match="same pairs"):
            choose_corrector(candidates)
