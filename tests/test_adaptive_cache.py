"""A cache, a moving encoder and a stream of pairs: what is served, decided, re-encoded and paid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import FINGERPRINT, build, make_plan
from datasets import Dataset
from drift_helpers import DIM, make, unit_rows
from model_helpers import TEXTS
from torch.nn.functional import normalize

from hf_corrector.adaptation import (
    AdaptationPolicy,
    AdaptiveCache,
    AdaptiveSettings,
    Decision,
    Passes,
    StoredTargetEncoder,
    StreamingCorrector,
    StreamingOptions,
)
from hf_corrector.cache.overlay import Overlay
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.encoding import EncodeOptions, build_cache, tokenize_texts
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.exact import ExactIndex
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.records import EncoderFingerprint

ROWS = 600
WORST = AdaptationPolicy(bound=0.1, actions=("refresh_worst", "refresh_all"), refresh_share=0.25)
QUICK = StreamingOptions(solve_batches=1)


class MovingEncoder:
    """An encoder whose vectors are a linear map of where they were, plus what only an encoder knows of a target."""

    def __init__(self, *, own: float = 0.0) -> None:
        self.start = unit_rows(ROWS)
        self.change = 0.5 * torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5))
        # The quarter of the targets that points one way moves in ways of its own.
        self.apart = self.start[:, 0] > self.start[:, 0].quantile(0.75)
        self.own = own * unit_rows(ROWS, seed=6) * self.apart[:, None]
        self.progress, self.encoded = 0.0, 0

    def vectors(self) -> torch.Tensor:
        return normalize(self.start + self.progress * (self.start @ self.change + self.own), dim=1)

    def fingerprint(self) -> EncoderFingerprint:
        return replace(FINGERPRINT, normalize=True, weights=f"{self.progress:032.6f}")

    def encode(self, rows: np.ndarray) -> torch.Tensor:
        self.encoded += len(rows)
        return self.vectors()[torch.from_numpy(rows)]


def cache_of(encoder: MovingEncoder, path: Path) -> TargetCache:
    return build(path, make_plan(ROWS, DIM, fingerprint=encoder.fingerprint(), shard_rows=250), encoder.vectors())


def adaptive_of(
    encoder: MovingEncoder, path: Path, *, policy: AdaptationPolicy = WORST, kind: str = "affine",
    settings: AdaptiveSettings | None = None,
) -> AdaptiveCache:  # fmt: skip
    streaming = StreamingCorrector(make(kind), options=QUICK)
    return AdaptiveCache(cache_of(encoder, path / "cache"), streaming, encoder, policy=policy, settings=settings)


def served_error(adaptive: AdaptiveCache, encoder: MovingEncoder) -> float:
    return float((adaptive.targets.read(0, ROWS) - encoder.vectors()).square().sum(dim=1).mean())


def observe(adaptive: AdaptiveCache, encoder: MovingEncoder, *, batches: int, seed: int = 0) -> list[Decision]:
    """Hand in uniformly drawn targets until something is done."""
    found: list[Decision] = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(batches):
        rows = torch.randint(ROWS, (24,), generator=generator)
        found.append(adaptive.observe(rows, encoder.vectors()[rows]))
        if found[-1].alarm:
            break
    return found


def test_pairs_alone_keep_a_cache_right_whose_drift_can_be_read_off_it(tmp_path: Path) -> None:
    encoder = MovingEncoder()
    adaptive = adaptive_of(encoder, tmp_path, policy=AdaptationPolicy(bound=0.1))
    encoder.progress = 1.0
    adaptive.encoder_moved(step=1)
    before = served_error(adaptive, encoder)
    # The jump itself is noticed, and no more is done about it than to learn from the pairs.
    found = [*observe(adaptive, encoder, batches=20), *observe(adaptive, encoder, batches=20, seed=1)]
    assert [one.action for one in found if one.alarm] == ["refit"]
    assert served_error(adaptive, encoder) < 0.1 * before
    assert adaptive.passes == Passes(given=24 * len(found)) and encoder.encoded == 0


def test_the_worst_targets_are_re_encoded_into_the_overlay_with_the_stamp_of_now(tmp_path: Path) -> None:
    encoder = MovingEncoder(own=2.0)
    adaptive = adaptive_of(encoder, tmp_path, policy=replace(WORST, actions=("refresh_worst",), bound=0.02))
    encoder.progress = 0.5
    adaptive.encoder_moved(step=7)
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))[:300]
    for part in rows.split(100):
        adaptive.observe(part, encoder.vectors()[part], uniform=torch.zeros(100, dtype=torch.bool))
    decision = observe(adaptive, encoder, batches=60)[-1]
    assert (decision.action, decision.passes) == ("refresh_worst", 150)
    assert adaptive.passes.worst == encoder.encoded == adaptive.passes.spent == 150
    overlay = Overlay.open(adaptive.cache)
    found = overlay.find(np.arange(ROWS))
    assert set(found.stamps) == {encoder.fingerprint().digest} and set(found.steps) == {7}
    torch.testing.assert_close(overlay.vectors(found), encoder.vectors()[torch.from_numpy(found.positions)])
    # Chance would have found a quarter.
    assert encoder.apart[torch.from_numpy(found.positions)].float().mean() > 0.7
    corrected = adaptive.streaming.corrector.correct(adaptive.cache.read(0, ROWS))
    without = float((corrected - encoder.vectors()).square().sum(dim=1).mean())
    assert served_error(adaptive, encoder) < 0.5 * without


def test_re_encoded_rows_are_served_only_while_the_encoder_stays_or_they_are_young(tmp_path: Path) -> None:
    for name, max_age in (("never", 0), ("young", 5)):
        encoder = MovingEncoder(own=2.0)
        policy = replace(WORST, actions=("refresh_worst",))
        adaptive = adaptive_of(encoder, tmp_path / name, policy=policy, settings=AdaptiveSettings(max_age=max_age))
        encoder.progress = 0.5
        adaptive.encoder_moved(step=1)
        observe(adaptive, encoder, batches=60)
        corrected = adaptive.streaming.corrector.correct(adaptive.cache.read(0, ROWS))
        encoder.progress = 0.51
        adaptive.encoder_moved(step=4)
        assert torch.equal(adaptive.targets.read(0, ROWS), corrected) == (max_age == 0)
        adaptive.encoder_moved(step=6)
        assert torch.equal(adaptive.targets.read(0, ROWS), corrected)


def test_traffic_decides_between_equally_wrong_targets_and_current_ones_are_left_out(tmp_path: Path) -> None:
    encoder = MovingEncoder()
    traffic = np.zeros(ROWS)
    traffic[100:150] = 5.0
    adaptive = adaptive_of(encoder, tmp_path, settings=AdaptiveSettings(traffic=traffic))
    # Without residuals all are equally wrong.
    assert adaptive.worst_rows(50).tolist() == list(range(100, 150))
    encoder.progress = 0.2
    adaptive.encoder_moved(step=1)
    adaptive._refresh_rows(adaptive.worst_rows(50))
    assert not set(adaptive.worst_rows(ROWS).tolist()) & set(range(100, 150))


def test_a_full_refresh_makes_a_new_cache_and_starts_from_the_identity(tmp_path: Path) -> None:
    encoder = MovingEncoder(own=2.0)
    policy = replace(WORST, actions=("refresh_all",))
    adaptive = adaptive_of(encoder, tmp_path, policy=policy)
    old = adaptive.cache
    encoder.progress = 0.8
    adaptive.encoder_moved(step=3)
    assert observe(adaptive, encoder, batches=60)[-1].action == "refresh_all"
    assert adaptive.passes.refreshed == encoder.encoded == ROWS
    assert adaptive.cache.path.parent == old.path.parent != adaptive.cache.path
    assert adaptive.cache.fingerprint == encoder.fingerprint()
    assert list(adaptive.cache.ids) == list(old.ids) and adaptive.cache.texts_hash == old.texts_hash
    assert served_error(adaptive, encoder) < 1e-12
    assert adaptive.streaming.seen == 0
    assert {one.action for one in observe(adaptive, encoder, batches=10, seed=1)} == {"none"}
    encoder.progress = 3.0
    adaptive.encoder_moved(step=4)
    assert observe(adaptive, encoder, batches=60, seed=2)[-1].action == "refresh_all"
    assert adaptive.cache.path.name.count("@") == 1 and adaptive.cache.manifest.generation == 2


def test_a_refresh_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    class FailsOnce(MovingEncoder):
        def encode(self, rows: np.ndarray) -> torch.Tensor:
            if rows[0] >= 250 and self.encoded <= 250:
                self.encoded += 1
                raise ConnectionError("the encoder is gone")
            return super().encode(rows)

    encoder = FailsOnce(own=2.0)
    policy = replace(WORST, actions=("refresh_all",))
    adaptive = adaptive_of(encoder, tmp_path, policy=policy, settings=AdaptiveSettings(shard_rows=250))
    encoder.progress = 0.8
    adaptive.encoder_moved(step=3)
    with pytest.raises(ConnectionError):
        observe(adaptive, encoder, batches=60)
    observe(adaptive, encoder, batches=60, seed=1)
    assert adaptive.passes.refreshed == 350 and served_error(adaptive, encoder) < 1e-12


def test_a_refit_lets_earlier_pairs_give_way_after_a_jump(tmp_path: Path) -> None:
    errors = {}
    for kept in (1e9, 48.0):
        encoder = MovingEncoder()
        policy = AdaptationPolicy(bound=0.05, actions=("refit",))
        settings = AdaptiveSettings(refit_pairs=kept)
        adaptive = adaptive_of(encoder, tmp_path / str(kept), policy=policy, settings=settings)
        encoder.progress = 1.0
        adaptive.encoder_moved(step=1)
        for seed in range(12):
            observe(adaptive, encoder, batches=4, seed=seed)
        encoder.change = encoder.change.flip(0)
        adaptive.encoder_moved(step=2)
        assert "refit" in {one.action for one in observe(adaptive, encoder, batches=10, seed=20)}
        for seed in range(12):
            observe(adaptive, encoder, batches=2, seed=30 + seed)
        errors[kept] = served_error(adaptive, encoder)
    assert errors[48.0] < 0.5 * errors[1e9]


def test_only_uniform_rows_speak_for_all_others(tmp_path: Path) -> None:
    encoder = MovingEncoder(own=2.0)
    adaptive = adaptive_of(encoder, tmp_path)
    encoder.progress = 0.5
    adaptive.encoder_moved(step=1)
    rows = torch.arange(100)
    for _ in range(30):
        decision = adaptive.observe(rows, encoder.vectors()[rows], uniform=torch.zeros(100, dtype=torch.bool))
    assert not decision.alarm and decision.values == 0 and adaptive.streaming.seen == 3000


def test_a_probe_draws_its_own_rows_and_counts_them(tmp_path: Path) -> None:
    encoder = MovingEncoder()
    adaptive = adaptive_of(encoder, tmp_path, policy=AdaptationPolicy(bound=0.1))
    encoder.progress = 1.0
    adaptive.encoder_moved(step=1)
    assert adaptive.probe(200).values == 200
    assert adaptive.passes.probed == encoder.encoded and 100 < encoder.encoded < 200
    assert served_error(adaptive, encoder) < 0.02
    before = encoder.encoded
    adaptive.probe(200)
    assert adaptive.passes.probed == encoder.encoded > before


def test_the_served_targets_can_be_searched(tmp_path: Path) -> None:
    encoder = MovingEncoder()
    adaptive = adaptive_of(encoder, tmp_path, policy=AdaptationPolicy(bound=0.1))
    encoder.progress = 1.0
    adaptive.encoder_moved(step=1)
    observe(adaptive, encoder, batches=20)
    found = ExactIndex(adaptive.targets).search(encoder.vectors()[:50], 1)
    assert (found.rows[:, 0] == torch.arange(50)).float().mean() > 0.9


def test_what_cannot_be_served_side_by_side_is_refused_at_once(tmp_path: Path) -> None:
    encoder = MovingEncoder()
    with pytest.raises(ConfigurationError, match="refresh_worst"):
        adaptive_of(encoder, tmp_path, kind="identity")
    cache = TargetCache.open(tmp_path / "cache")
    with pytest.raises(ConfigurationError, match="size 5"):
        AdaptiveCache(cache, StreamingCorrector(make("affine", DIM, 5)), encoder, policy=WORST)
    with pytest.raises(ConfigurationError, match="traffic"):
        AdaptiveCache(
            cache, StreamingCorrector(make("affine")), encoder, policy=WORST,
            settings=AdaptiveSettings(traffic=np.ones(3)),
        )  # fmt: skip
    adaptive = AdaptiveCache(cache, StreamingCorrector(make("affine")), encoder, policy=WORST)
    with pytest.raises(DataError, match="one vector of the encoder"):
        adaptive.observe(torch.arange(5), torch.zeros(4, DIM))
    assert adaptive.passes == Passes()


def test_a_model_with_its_tokenised_corpus_is_an_encoder(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    corpus = Dataset.from_dict({"id": [str(row) for row in range(len(TEXTS))], "text": TEXTS})
    options = EncodeOptions(progress=False)
    cache = build_cache(tiny_model, corpus, tmp_path / "cache", options=options).cache
    tokens = tokenize_texts(tiny_model, corpus["text"][:], "target", tmp_path / "tokens", progress=False)
    encoder = StoredTargetEncoder(tiny_model, tokens)
    streaming = StreamingCorrector(make("affine", cache.dim, cache.dim), options=QUICK)
    policy = AdaptationPolicy(bound=0.01, actions=("refresh_all",))
    adaptive = AdaptiveCache(cache, streaming, encoder, policy=policy)
    assert encoder.fingerprint() == cache.fingerprint
    assert not adaptive.probe(8).alarm
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    adaptive.encoder_moved(step=1)
    decisions = [adaptive.probe(8) for _ in range(12)]
    assert "refresh_all" in {one.action for one in decisions}
    everything = encoder.encode(np.arange(len(cache)))
    torch.testing.assert_close(adaptive.targets.read(0, len(cache)), everything, rtol=0, atol=1e-5)
