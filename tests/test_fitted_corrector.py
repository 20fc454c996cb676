"""A fitted corrector applies to the cache it was fitted to, and survives being saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from upgrade_helpers import cache_of, make_data, new_encoder, old_encoder

from hf_corrector.cache.side_store import save_side, stored_sides
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_cache import ApplyOptions
from hf_corrector.errors import CacheMismatchError, ConfigurationError, InputError
from hf_corrector.index_upgrade.corpus_sides import CorpusSide, SideRows
from hf_corrector.index_upgrade.fits import FitPairs, PairSide, fit_one
from hf_corrector.index_upgrade.fitted_corrector import FittedCorrector
from hf_corrector.records import FittedTargets
from hf_corrector.side_features import TokenCounts

QUIET = ApplyOptions(progress=False)


def fitted(cache: TargetCache, new: torch.nn.Module, *, side: CorpusSide | None = None) -> FittedCorrector:
    data = make_data()
    stale, fresh = cache.read(0, 100).float(), new.encode_target(data.corpus["text"][:100])
    sides = {} if side is None else {side.kind: PairSide(side.read(0, 100), side.vocabulary)}
    pairs = FitPairs(rows=torch.arange(100).numpy(), source=stale, goal=fresh, weights=None, sides=sides)
    model = fit_one(pairs, "affine", None if side is None else side.kind, seed=0).model
    leads_to = new.fingerprint("target")
    note = FittedTargets(cache.manifest.checksum, leads_to.digest, tuple(range(100)))
    return FittedCorrector(model, note, leads_to, side=side)


def test_saved_and_loaded_corrector_writes_the_same_cache(tiny_encoder: str, tmp_path: Path) -> None:
    cache, new = cache_of(old_encoder(tiny_encoder), make_data(), tmp_path / "old"), new_encoder(tiny_encoder)
    corrector = fitted(cache, new)
    first = corrector.apply(cache, tmp_path / "first", options=QUIET)
    corrector.save(tmp_path / "corrector")
    loaded = FittedCorrector.load(tmp_path / "corrector")
    assert loaded.leads_to == corrector.leads_to and loaded.fitted == corrector.fitted
    second = loaded.apply(cache.path, str(tmp_path / "second"), options=QUIET)
    assert torch.equal(first.read(0, len(first)), second.read(0, len(second)))
    fresh = new.encode_target(make_data().corpus["text"][:])
    assert torch.nn.functional.cosine_similarity(first.read(0, len(first)), fresh).mean() > 0.99


def test_side_features_are_read_off_the_corpus(tiny_encoder: str, tmp_path: Path) -> None:
    cache, new = cache_of(old_encoder(tiny_encoder), make_data(), tmp_path / "old"), new_encoder(tiny_encoder)
    for kind in ("tokens", "word_embeddings"):
        side = CorpusSide(make_data().corpus, new, kind)
        corrector = fitted(cache, new, side=side)
        written = corrector.apply(cache, tmp_path / kind, options=QUIET)
        expected = corrector.model.correct(cache.read(0, len(cache)).float(), side)
        torch.testing.assert_close(written.read(0, len(written)), expected, atol=1e-6, rtol=0)
        corrector.save(tmp_path / f"{kind}-corrector")
        loaded = FittedCorrector.load(tmp_path / f"{kind}-corrector")
        if kind not in stored_sides(cache):
            with pytest.raises(CacheMismatchError, match="upgrade --side word_embeddings"):
                loaded.apply(cache, tmp_path / "none", options=QUIET)
        again = loaded.with_side(side).apply(cache, tmp_path / f"{kind}-again", options=QUIET)
        assert torch.equal(again.read(0, len(again)), written.read(0, len(written)))


def test_stored_side_features_are_found_by_a_loaded_corrector(tiny_encoder: str, tmp_path: Path) -> None:
    data, new = make_data(), new_encoder(tiny_encoder)
    cache = cache_of(old_encoder(tiny_encoder), data, tmp_path / "old")
    side = CorpusSide(data.corpus, new)
    counts = TokenCounts.from_lists(new.tokenize(data.corpus["text"][:], "target"), vocabulary=side.vocabulary)
    save_side(cache, counts)
    corrector = fitted(cache, new, side=side)
    corrector.save(tmp_path / "corrector")
    found = FittedCorrector.load(tmp_path / "corrector").apply(cache, tmp_path / "new", options=QUIET)
    expected = corrector.model.correct(cache.read(0, len(cache)).float(), side)
    torch.testing.assert_close(found.read(0, len(found)), expected, atol=1e-6, rtol=0)


def test_rows_of_side_features_are_counted_from_zero(tiny_encoder: str) -> None:
    new = new_encoder(tiny_encoder)
    side = CorpusSide(make_data().corpus, new)
    rows = SideRows(side, torch.tensor([5, 3, 9]).numpy())
    assert (rows.kind, rows.width, len(rows)) == (side.kind, side.width, 3)
    whole = side.read(0, 10).to_dense()
    assert torch.equal(rows.read(1, 3).to_dense(), whole[[3, 9]])
    assert torch.equal(rows.gather(torch.tensor([2, 0])).to_dense(), whole[[9, 5]])


def test_another_cache_and_the_wrong_direction_are_refused(tiny_encoder: str, tmp_path: Path) -> None:
    data, new = make_data(), new_encoder(tiny_encoder)
    cache = cache_of(old_encoder(tiny_encoder), data, tmp_path / "old")
    other = cache_of(old_encoder(tiny_encoder, seed=1), data, tmp_path / "other")
    corrector = fitted(cache, new)
    with pytest.raises(CacheMismatchError, match="the cache the corrector was fitted to"):
        corrector.apply(other, tmp_path / "none")
    with pytest.raises(ConfigurationError, match="Use apply"):
        corrector.map_queries(torch.zeros(1, 32))
    backward = replace(corrector, direction="queries")
    with pytest.raises(ConfigurationError, match="map_queries"):
        backward.apply(cache, tmp_path / "none")
    assert backward.map_queries(torch.ones(2, 32)).shape == (2, 32)
    assert not (tmp_path / "none").exists()


def test_folder_of_something_else_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"upgrade\.json"):
        FittedCorrector.load(tmp_path)
    cache = cache_of(old_encoder(tiny_encoder), make_data(), tmp_path / "old")
    folder = fitted(cache, new_encoder(tiny_encoder)).save(tmp_path / "corrector")
    (folder / "upgrade.json").write_text("[]")
    with pytest.raises(InputError, match="direction and leads_to"):
        FittedCorrector.load(folder)
