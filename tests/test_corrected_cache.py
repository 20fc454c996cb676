"""A cache written through a corrector: what the corrector returns, resumable, and never taken for a fresh one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import FINGERPRINT, build, child, flip, folder_in_memory, forge, make_plan, make_vectors
from edit_helpers import counts
from torch.nn.functional import normalize

from hf_corrector.cache import TargetCache
from hf_corrector.cache.edits import edit_arrays
from hf_corrector.cache.row_files import hash_texts
from hf_corrector.corrected_cache import (
    ApplyOptions,
    check_comparable,
    corrected_fingerprint,
    hash_corrector,
    hash_side,
    write_corrected,
)
from hf_corrector.errors import CacheCorruptedError, CacheMismatchError, ConfigurationError, DataError
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.side_features import DenseSide
from hf_corrector.training.checks import check_given_cache

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
NEW = replace(FINGERPRINT, weights="n" * 32, name="new/encoder", normalize=True)
QUIET = ApplyOptions(progress=False, shard_rows=4, chunk_rows=3)


def affine(seed: int = 0, dim: int = 4, **changes: Any) -> CorrectorModel:
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=dim, **changes))
    generator = torch.Generator().manual_seed(seed)
    for buffer in (corrector.mean, corrector.weight, corrector.bias):
        buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return corrector


@pytest.fixture
def cache(tmp_path: Path) -> TargetCache:
    return build(tmp_path / "old", make_plan(text_hashes=hash_texts("abcdefghij")), make_vectors())


def test_rows_are_what_the_corrector_returns(cache: TargetCache, tmp_path: Path) -> None:
    corrected = write_corrected(affine(), cache, tmp_path / "new", encoder=NEW, options=QUIET)
    assert torch.allclose(corrected.read(0, 10), affine()(make_vectors()), atol=1e-6)
    assert list(corrected.ids) == list(cache.ids)
    assert (corrected.texts_hash, corrected.manifest.ids_hash) == (cache.texts_hash, cache.manifest.ids_hash)
    assert corrected.text_hashes is not None and cache.text_hashes is not None
    assert np.array_equal(corrected.text_hashes, cache.text_hashes)
    corrected.verify()


@pytest.mark.parametrize(("cache_dtype", "dtype"), [(None, torch.float16), ("bfloat16", torch.bfloat16)])
def test_rows_are_stored_as_asked_and_may_change_size(tmp_path: Path, cache_dtype: str | None, dtype: Any) -> None:
    cache = build(tmp_path / "old", make_plan(dtype="float16"), make_vectors())
    options = replace(QUIET, cache_dtype=cache_dtype)
    corrected = write_corrected(affine(output_dim=6), cache, tmp_path / "new", encoder=NEW, options=options)
    assert (corrected.dim, corrected.dtype) == (6, dtype)
    expected = affine(output_dim=6)(make_vectors().half().float()).to(dtype)
    assert torch.allclose(corrected.read(0, 10).float(), expected.float(), atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to move to")
def test_the_corrector_is_where_it_was_afterwards(cache: TargetCache, tmp_path: Path) -> None:
    corrector, options = affine(), replace(QUIET, device="cuda")
    write_corrected(corrector, cache, tmp_path / "new", encoder=NEW, options=options)
    assert corrector.weight.device.type == "cpu"
    corrector.bias.fill_(float("nan"))
    with pytest.raises(DataError):
        write_corrected(corrector, cache, tmp_path / "bad", encoder=NEW, options=options)
    assert corrector.weight.device.type == "cpu"


def test_an_edited_cache_is_corrected_as_it_is_now(cache: TargetCache, tmp_path: Path) -> None:
    edited = edit_arrays(cache.path, delete=["target-1", "target-8"], vectors=torch.ones(1, 4), ids=["x"])
    corrected = write_corrected(affine(), edited, tmp_path / "new", encoder=NEW, options=QUIET)
    assert torch.allclose(corrected.read(0, 9), affine()(edited.read(0, 9)), atol=1e-6)
    assert list(corrected.ids) == list(edited.ids)


def test_rows_that_were_encoded_again_are_taken_as_they_are(cache: TargetCache, tmp_path: Path) -> None:
    fresh = normalize(torch.ones(3, 4) + torch.eye(3, 4), dim=1)
    ids = [cache.ids[row] for row in (7, 2, 3)]
    some = TargetCache.from_arrays(tmp_path / "some", fresh, ids, fingerprint=NEW)
    options = replace(QUIET, reembedded=some)
    mixed = write_corrected(affine(), cache, tmp_path / "new", encoder=NEW, options=options)
    plain = write_corrected(affine(), cache, tmp_path / "plain", encoder=NEW, options=QUIET)
    expected = plain.read(0, 10).clone()
    expected[[7, 2, 3]] = fresh
    assert torch.equal(mixed.read(0, 10), expected)
    assert mixed.fingerprint != plain.fingerprint
    other = TargetCache.from_arrays(tmp_path / "other", fresh, ids, fingerprint=replace(NEW, weights="o" * 32))
    with pytest.raises(CacheMismatchError, match="encoder"):
        write_corrected(affine(), cache, tmp_path / "wrong", encoder=NEW, options=replace(QUIET, reembedded=other))


def test_side_features_reach_the_corrector(cache: TargetCache, tmp_path: Path) -> None:
    config = CorrectorConfig(kind="affine", input_dim=4, side="matrix", side_dim=3, normalize_output=False)
    corrector = CorrectorModel(config)
    corrector.side_weight.copy_(make_vectors(3, 4))
    side = DenseSide(make_vectors(10, 3))
    plain = replace(NEW, normalize=False)
    corrected = write_corrected(corrector, cache, tmp_path / "new", encoder=plain, side=side, options=QUIET)
    assert torch.allclose(corrected.read(0, 10), corrector(make_vectors(), side.read(0, 10)), atol=1e-6)
    assert not torch.allclose(corrected.read(0, 10), make_vectors(), atol=1e-2)
    for wrong in (None, DenseSide(make_vectors(9, 3)), counts(range(10))):
        with pytest.raises(ConfigurationError, match="side features of kind 'matrix' for 10 targets"):
            write_corrected(corrector, cache, tmp_path / "x", encoder=plain, side=wrong, options=QUIET)
    with pytest.raises(ConfigurationError, match="kind None"):
        write_corrected(affine(), cache, tmp_path / "x", encoder=NEW, side=side, options=QUIET)


# ------------------------------------------------------------------------------ who made it


def test_it_says_it_was_corrected_and_may_be_compared_with_the_new_encoder_alone(
    cache: TargetCache, tmp_path: Path
) -> None:
    corrected = write_corrected(affine(), cache, tmp_path / "new", encoder=NEW, options=QUIET)
    assert corrected.fingerprint == corrected_fingerprint(affine(), cache, NEW)
    assert corrected.fingerprint.corrected_from is not None
    assert check_comparable(corrected, replace(NEW, compute_dtype="bfloat16"))
    assert not check_comparable(cache, FINGERPRINT)
    for other, encoder in ((corrected, FINGERPRINT), (cache, NEW)):
        with pytest.raises(CacheMismatchError, match="weights"):
            check_comparable(other, encoder)
    with pytest.raises(CacheMismatchError, match="corrected_from"):
        TargetCache.open(corrected.path, expected=NEW)


def test_it_is_no_cache_to_correct_again_or_to_train_with(cache: TargetCache, tmp_path: Path) -> None:
    corrected = write_corrected(affine(), cache, tmp_path / "new", encoder=NEW, options=QUIET)
    with pytest.raises(CacheMismatchError, match="corrected ones"):
        write_corrected(affine(), corrected, tmp_path / "newer", encoder=NEW, options=QUIET)
    with pytest.raises(CacheMismatchError, match="corrected ones"):
        check_given_cache(corrected, None, None)  # type: ignore[arg-type]


def test_every_part_of_the_map_is_part_of_the_fingerprint(cache: TargetCache) -> None:
    same = affine()
    same.config.fit_summary = {"pairs": 3}
    assert hash_corrector(same) == hash_corrector(affine())
    changed = [affine(1), affine(normalize_output=False), affine(output_dim=5), CorrectorModel(CorrectorConfig())]
    assert len({hash_corrector(one) for one in (affine(), *changed)}) == 5
    made = {corrected_fingerprint(one, cache, NEW).digest for one in (affine(), *changed)}
    sides = [DenseSide(make_vectors(10, 3)), DenseSide(2 * make_vectors(10, 3)), counts(range(10)), counts(range(9))]
    assert len({hash_side(side) for side in sides}) == 4
    made |= {corrected_fingerprint(affine(), cache, NEW, side=side).digest for side in sides}
    assert len(made) == 9


@pytest.mark.parametrize(
    ("corrector", "encoder", "message"),
    [
        (affine(dim=5), NEW, "vectors of size 4 that moves them; got one of kind 'affine' for size 5"),
        (CorrectorModel(CorrectorConfig(input_dim=4)), NEW, "unmoved vectors"),
        (affine(), replace(NEW, role="query"), "a target encoder"),
        (affine(), replace(NEW, corrected_from="x"), "a target encoder"),
        (affine(normalize_output=False), NEW, "does not normalise"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    cache: TargetCache, tmp_path: Path, corrector: CorrectorModel, encoder: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        write_corrected(corrector, cache, tmp_path / "new", encoder=encoder, options=QUIET)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["shard_rows", "chunk_rows"])
def test_options_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match=name):
        ApplyOptions(**{name: 0})


# ------------------------------------------------------------------------------ damage and kills


def test_a_bad_row_is_refused_with_its_id_and_no_manifest_is_written(cache: TargetCache, tmp_path: Path) -> None:
    broken = affine(normalize_output=False)
    broken.weight.fill_(float("inf"))
    zero = CorrectorModel(CorrectorConfig(kind="mean_shift", input_dim=4))
    zero.shift.copy_(-make_vectors()[5])
    plain = replace(NEW, normalize=False)
    with pytest.raises(DataError, match=r"row 0 \(id 'target-0'\).*got (NaN|an infinite value)"):
        write_corrected(broken, cache, tmp_path / "a", encoder=plain, options=QUIET)
    with pytest.raises(DataError, match=r"row 5 \(id 'target-5'\).*got a norm of 0"):
        write_corrected(zero, cache, tmp_path / "b", encoder=NEW, options=QUIET)
    assert not list(tmp_path.glob("[ab]/manifest.json")) and not list(tmp_path.glob("[ab]/*.tmp"))


def test_rot_in_the_old_cache_does_not_get_a_checksum_of_its_own(cache: TargetCache, tmp_path: Path) -> None:
    flip(cache.path / "emb-00001-of-00003.g0.safetensors", 8 * 4100)
    with pytest.raises(CacheCorruptedError, match="emb-00001-of-00003"):
        write_corrected(affine(), cache, tmp_path / "new", encoder=NEW, options=QUIET)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_ids_that_are_not_those_of_the_manifest_make_no_cache(cache: TargetCache, tmp_path: Path) -> None:
    file = "ids.g0.safetensors"
    data = (cache.path / file).read_bytes()
    forge(cache.path, file, data.replace(b"target-3", b"target-x"))
    with pytest.raises(CacheCorruptedError, match="ids with hash"):
        write_corrected(affine(), TargetCache.open(cache.path), tmp_path / "new", encoder=NEW, options=QUIET)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_another_corrector_does_not_go_on_with_the_work(cache: TargetCache, tmp_path: Path) -> None:
    write_corrected(affine(), cache, tmp_path / "new", encoder=NEW, options=QUIET)
    with pytest.raises(CacheMismatchError, match="corrected_from"):
        write_corrected(affine(1), cache, tmp_path / "new", encoder=NEW, options=QUIET)
    again = write_corrected(affine(), cache, tmp_path / "new", encoder=NEW, options=QUIET)
    assert len(again) == 10


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as path:
        yield path


def apply_alone(old: Path, new: Path) -> None:
    torch.set_num_threads(1)
    apply(old, new)


def apply(old: Path, new: Path) -> None:
    options = ApplyOptions(progress=False, shard_rows=500, chunk_rows=100)
    write_corrected(affine(dim=64), TargetCache.open(old), new, encoder=NEW, options=options)


def test_killed_again_and_again_it_gets_done_without_redoing_shards(folder: Path) -> None:
    old = build(folder / "old", make_plan(20_000, 64, shard_rows=20_000), make_vectors(20_000, 64))
    finished: dict[str, int] = {}
    kills = 0
    while not (folder / "new" / "manifest.json").exists():
        process = child(apply_alone, old.path, folder / "new")
        seen = len(finished)
        while process.is_alive() and len(list((folder / "new").glob("emb-*.json"))) < seen + 10:
            time.sleep(0.001)
        process.kill()
        process.join()
        shards = {path.with_suffix(".safetensors") for path in (folder / "new").glob("emb-*.json")}
        now = {path.name: path.stat().st_ino for path in shards}
        assert {name: now.get(name, inode) for name, inode in finished.items()} == finished
        if not (folder / "new" / "manifest.json").exists():
            assert len(now) > seen
            finished, kills = now, kills + 1
    assert kills > 0
    apply(old.path, folder / "new")
    corrected = TargetCache.open(folder / "new", verify="full")
    kept = {path.name: path.stat().st_ino for path in (folder / "new").glob("emb-*.safetensors")}
    assert all(kept[name] == inode for name, inode in finished.items())
    expected = normalize(affine(dim=64)(make_vectors(20_000, 64)), dim=1)
    assert torch.allclose(corrected.read(0, 20_000), expected, atol=1e-5)


def test_progress_counts_rows(cache: TargetCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corrected(affine(), cache, tmp_path / "new", encoder=NEW, options=replace(QUIET, progress=True))
    assert "10/10" in capsys.readouterr().err
