"""partial_fit for every kind: it follows a drift, remembers what it should, and survives being saved."""

from __future__ import annotations

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

from hf_corrector.adaptation import StreamingCorrector, StreamingOptions
from hf_corrector.adaptation.recent_pairs import RecentPairs
from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import Forgetting, Pairs
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.models.configuration_corrector import KINDS
from hf_corrector.side_features import TokenCounts
from hf_corrector.training.corrector_fit import fit_corrector

BATCH = 40


def token_corrector(counts: TokenCounts, kind: str = "affine") -> CorrectorModel:
    config = CorrectorConfig(
        kind=kind, input_dim=DIM, hidden_dim=32, side="tokens", side_dim=counts.width, side_vocabulary=counts.vocabulary
    )
    return CorrectorModel(config)


def follow(
    streaming: StreamingCorrector, stale: torch.Tensor, fresh: torch.Tensor, *, counts: TokenCounts | None = None,
    rounds: int = 1,
) -> None:  # fmt: skip
    for start in list(range(0, len(stale), BATCH)) * rounds:
        stop = min(start + BATCH, len(stale))
        side = None if counts is None else counts.read(start, stop)
        streaming.partial_fit(stale[start:stop], fresh[start:stop], side=side)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_every_kind_follows_a_stream(kind: str) -> None:
    stale, others = unit_rows(1200), unit_rows(300, seed=8)
    drift = bent_drift if kind in ("kernel", "residual_mlp") else linear_drift
    corrector = make(kind)
    before = error(corrector, others, drift(others))
    streaming = StreamingCorrector(corrector, options=StreamingOptions(fitting=QUICK))
    follow(streaming, stale, drift(stale), rounds=8 if kind == "residual_mlp" else 1)
    # A rotation and a shift cannot express all of it.
    left = {"mean_shift": 0.8, "procrustes": 0.8, "residual_mlp": 0.7, "kernel": 0.6}.get(kind, 0.15)
    assert error(corrector, others, drift(others)) < left * before
    assert streaming.seen >= 1200 and int(corrector.fitted_pairs) > 0


@pytest.mark.parametrize("kind", ["affine", "low_rank", "procrustes", "residual_mlp", "kernel"])
def test_sizes_may_differ(kind: str) -> None:
    stale = unit_rows(600)
    fresh = normalize(linear_drift(stale)[:, :5], dim=1)
    corrector = make(kind, DIM, 5)
    before = error(corrector, stale, fresh)
    follow(StreamingCorrector(corrector, options=StreamingOptions(fitting=QUICK)), stale, fresh)
    # From here to there no rotation leads, and reduced rank keeps to five of eight directions.
    assert error(corrector, stale, fresh) < (0.9 if kind == "procrustes" else 0.4) * before


@pytest.mark.parametrize(("kind", "apart"), [("mean_shift", 1e-6), ("procrustes", 1e-6), ("affine", 0.01)])
def test_a_stream_without_forgetting_ends_where_the_batch_fit_does(kind: str, apart: float) -> None:
    stale = unit_rows()
    fresh = linear_drift(stale)
    streamed, batch = make(kind), make(kind)
    streaming = StreamingCorrector(streamed)
    follow(streaming, stale, fresh)
    streaming.refit()
    fit_corrector(batch, stale, fresh)
    # Affine: five folds and leaving one out choose neighbouring ridges; with the same ridge the maps are the same.
    assert (streamed.correct(stale) - batch.correct(stale)).abs().max() < apart
    assert error(streamed, stale, fresh) == pytest.approx(error(batch, stale, fresh), rel=0.1)


def test_a_half_life_follows_a_drift_that_jumps() -> None:
    stale = unit_rows(2000)
    first, second = linear_drift(stale), normalize(stale.flip(1) + 0.2, dim=1)
    errors = {}
    for half_life in (None, 150.0):
        corrector = make("affine")
        streaming = StreamingCorrector(corrector, options=StreamingOptions(half_life=half_life, solve_batches=5))
        follow(streaming, stale[:1200], first[:1200])
        follow(streaming, stale[1200:], second[1200:])
        errors[half_life] = error(corrector, stale, second)
    assert errors[150.0] < 0.1 * errors[None]


@pytest.mark.parametrize("kind", ["affine", "residual_mlp"])
def test_side_features_are_read_from_the_pairs_kept(kind: str) -> None:
    stale, counts = unit_rows(), token_counts()
    fresh = lexical_drift(stale, counts)
    blind, reading = make("affine"), token_corrector(counts, kind)
    follow(StreamingCorrector(blind), stale, fresh)
    streaming = StreamingCorrector(reading, options=StreamingOptions(fitting=QUICK, solve_batches=2))
    follow(streaming, stale, fresh, counts=counts)
    side = counts.read(0, len(counts))
    left = float((reading.correct(stale, side) - fresh).square().sum(dim=1).mean())
    assert left < 0.5 * error(blind, stale, fresh)


def test_fits_are_made_when_due() -> None:
    stale = unit_rows()
    fresh = linear_drift(stale)
    streaming = StreamingCorrector(make("affine"), options=StreamingOptions(solve_batches=4))
    changed = [
        streaming.partial_fit(stale[start : start + 10], fresh[start : start + 10]) for start in range(0, 120, 10)
    ]
    assert changed == [True, False, False, True, False, False, False, True, False, False, False, True]
    assert streaming.refit()
    assert not StreamingCorrector(make("affine")).refit()


def test_a_single_pair_waits_for_a_second() -> None:
    stale = unit_rows()
    streaming = StreamingCorrector(make("affine"))
    assert not streaming.partial_fit(stale[:1], stale[:1].flip(1))
    assert streaming.partial_fit(stale[1:2], stale[1:2].flip(1))


def test_the_identity_stays_the_identity() -> None:
    stale = unit_rows()
    streaming = StreamingCorrector(make("identity"))
    assert not streaming.partial_fit(stale, linear_drift(stale)) and not streaming.refit()
    assert torch.equal(streaming.corrector(stale), stale)


def test_two_streams_merge_into_the_fit_of_both() -> None:
    stale = unit_rows()
    fresh = linear_drift(stale)
    one, other, both = (StreamingCorrector(make("affine")) for _ in range(3))
    follow(one, stale[:200], fresh[:200])
    follow(other, stale[200:], fresh[200:])
    follow(both, stale, fresh)
    one.merge(other)
    both.refit()
    torch.testing.assert_close(one.corrector.weight, both.corrector.weight, rtol=0, atol=1e-6)
    with pytest.raises(ConfigurationError, match="both streams"):
        one.merge(StreamingCorrector(make("kernel")))


@pytest.mark.parametrize("kind", ["mean_shift", "low_rank", "affine", "kernel", "residual_mlp", "tokens"])
def test_a_saved_stream_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    stale, counts = unit_rows(), token_counts()
    fresh, beside = lexical_drift(stale, counts), counts if kind == "tokens" else None
    corrector = token_corrector(counts) if kind == "tokens" else make(kind)
    options = StreamingOptions(half_life=200.0, solve_batches=2, max_pairs=150, fitting=QUICK)
    streaming = StreamingCorrector(corrector, options=options)
    follow(streaming, stale[:200], fresh[:200], counts=beside)
    streaming.save(tmp_path / "stream")
    loaded = StreamingCorrector.load(tmp_path / "stream", options=options)
    side = None if beside is None else counts.read(200, 280)
    for one in (streaming, loaded):
        for start in (200, 240):
            part = None if side is None else counts.read(start, start + BATCH)
            one.partial_fit(stale[start : start + BATCH], fresh[start : start + BATCH], side=part)
    expected, found = streaming.corrector.state_dict(), loaded.corrector.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("kind", ["affine", "kernel", "residual_mlp"])
def test_forgetting_everything_is_starting_anew(kind: str) -> None:
    stale = unit_rows()
    options = StreamingOptions(fitting=QUICK, solve_batches=3)
    used, fresh_start = (StreamingCorrector(make(kind), options=options) for _ in range(2))
    follow(used, stale, stale.flip(1).contiguous())
    used.forget()
    if kind != "residual_mlp":  # whose hidden layer starts at random
        torch.testing.assert_close(used.corrector(stale), stale, rtol=0, atol=1e-6)
        for one in (used, fresh_start):
            follow(one, stale, linear_drift(stale))
        assert torch.equal(used.corrector(stale), fresh_start.corrector(stale))
    assert used.seen in (0, TARGETS)


def test_a_network_is_refitted_on_what_it_remembers() -> None:
    stale = unit_rows()
    corrector = make("residual_mlp")
    streaming = StreamingCorrector(corrector, options=StreamingOptions(fitting=QUICK))
    follow(streaming, stale, bent_drift(stale))
    before = error(corrector, stale, bent_drift(stale))
    assert streaming.refit()
    assert error(corrector, stale, bent_drift(stale)) < 0.8 * before


def test_wrong_pairs_are_refused_before_anything_is_taken_in() -> None:
    streaming, stale = StreamingCorrector(make("affine")), unit_rows()
    with pytest.raises(ConfigurationError, match="sizes 8 and 8"):
        streaming.partial_fit(stale, stale[:, :5])
    with pytest.raises(ConfigurationError, match="side features"):
        streaming.partial_fit(stale, stale, side=stale)
    with pytest.raises(ConfigurationError, match="positive weight"):
        streaming.partial_fit(stale, stale, weights=torch.zeros(TARGETS))
    assert streaming.seen == 0
    with pytest.raises(ConfigurationError, match="solve_batches"):
        StreamingOptions(solve_batches=0)


def pairs_of(values: torch.Tensor) -> Pairs:
    """Make pairs whose stale vectors name them."""
    rows = values.double()[:, None]
    return Pairs(rows, rows, torch.ones(len(rows), dtype=torch.float64))


def test_with_a_half_life_the_latest_pairs_are_kept_with_falling_weights() -> None:
    recent = RecentPairs(30, forgetting=Forgetting(10.0))
    for start in range(0, 100, 7):
        recent.add(pairs_of(torch.arange(start, start + 7)))
    kept = recent.pairs()
    assert kept.stale[:, 0].tolist() == list(range(75, 105))
    torch.testing.assert_close(kept.weights, 0.5 ** (torch.arange(29, -1, -1, dtype=torch.float64) / 10))


def test_without_one_a_uniform_sample_of_all_pairs_is_kept() -> None:
    counts = torch.zeros(100)
    for seed in range(200):
        recent = RecentPairs(20, forgetting=Forgetting(), seed=seed)
        for start in range(0, 100, 10):
            recent.add(pairs_of(torch.arange(start, start + 10)))
        kept = recent.pairs().stale[:, 0].long()
        assert len(kept.unique()) == 20
        counts[kept] += 1
    # Each is kept 40 times on average, with a spread of 5.7; by tens 400 and 17.
    assert counts.min() > 15 and counts.max() < 65
    assert (counts.view(10, 10).sum(dim=1) - 400).abs().max() < 70


def test_discounted_samples_make_room_for_new_pairs() -> None:
    recent = RecentPairs(50, forgetting=Forgetting())
    recent.add(pairs_of(torch.arange(1000)))
    recent.discount(50.0)
    recent.add(pairs_of(torch.arange(1000, 1100)))
    assert (recent.pairs().stale[:, 0] >= 1000).sum() > 20


def test_of_a_target_that_comes_again_only_the_latest_pair_is_kept() -> None:
    recent = RecentPairs(50, forgetting=Forgetting())
    recent.add(pairs_of(torch.arange(4)), target_rows=torch.tensor([5, 6, 5, 7]))
    recent.add(pairs_of(torch.tensor([9.0])), target_rows=torch.tensor([6]))
    assert recent.pairs().stale[:, 0].tolist() == [2.0, 3.0, 9.0]
