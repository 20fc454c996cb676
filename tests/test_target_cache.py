"""Reading a cache: bit for bit what was written, or an error that names file and rows."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import (
    FINGERPRINT,
    build,
    folder_in_memory,
    make_plan,
    make_vectors,
    run_child,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from hf_corrector.cache import PackedIds, TargetCache
from hf_corrector.errors import CacheCorruptedError, CacheError, CacheMismatchError, ConfigurationError, DataError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD = "emb-00001-of-00003.g0.safetensors"
IDS = "ids.g0.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> TargetCache:
    return build(tmp_path / "cache", make_plan(), make_vectors())


@pytest.mark.parametrize("dtype", DTYPES)
def test_vectors_come_back_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    vectors = make_vectors(1000, 48)
    build(tmp_path, make_plan(1000, 48, dtype=dtype, shard_rows=300), vectors)
    cache = TargetCache.open(tmp_path, expected=FINGERPRINT, verify="full")
    stored = vectors.to(DTYPES[dtype])
    assert (len(cache), cache.dim, cache.dtype) == (1000, 48, DTYPES[dtype])
    assert torch.equal(cache.read(0, 1000).view(torch.uint8), stored.view(torch.uint8))
    rows = np.random.default_rng(0).integers(0, 1000, 500)
    assert torch.equal(cache.gather(rows), stored[torch.from_numpy(rows)].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_programs_read_the_files_and_data_start_at_byte_4096(tmp_path: Path, dtype: str) -> None:
    vectors = make_vectors(10, 3)
    build(tmp_path, make_plan(10, 3, dtype=dtype), vectors)
    with safe_open(tmp_path / SHARD, framework="pt") as file:
        assert list(file.keys()) == ["emb"]
        assert torch.equal(file.get_tensor("emb"), vectors[4:8].to(DTYPES[dtype]))
    raw = (tmp_path / SHARD).read_bytes()
    assert int.from_bytes(raw[:8], "little") == 4088
    assert raw[4096:] == vectors[4:8].to(DTYPES[dtype]).view(torch.uint8).numpy().tobytes()
    with safe_open(tmp_path / IDS, framework="np") as file:
        offsets, data = file.get_tensor("offsets"), file.get_tensor("bytes")
    assert data[offsets[7] : offsets[8]].tobytes() == b"target-7"


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_small_cache_survives_a_round_trip(data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=9, unique=True))
    dim, dtype = data.draw(st.integers(1, 5)), data.draw(st.sampled_from(sorted(DTYPES)))
    width = {"float32": 32, "bfloat16": 16, "float16": 16}[dtype]
    finite = st.floats(width=width, allow_nan=False, allow_infinity=False, min_value=-60000, max_value=60000)
    vectors = data.draw(hnp.arrays(f"float{width}", (len(ids), dim), elements=finite))
    shard_rows = data.draw(st.integers(1, len(ids) + 1))
    with folder_in_memory(Path(tempfile.gettempdir())) as folder:
        options: dict[str, Any] = {"fingerprint": FINGERPRINT, "dtype": dtype, "shard_rows": shard_rows}
        TargetCache.from_arrays(folder / "cache", vectors, ids, **options)
        cache = TargetCache.open(folder / "cache", verify="full")
        stored = torch.from_numpy(vectors).to(DTYPES[dtype])
        assert list(cache.ids) == ids
        assert [cache.ids[row] for row in range(len(ids))] == ids
        assert cache.rows_of(ids[::-1]).tolist() == list(range(len(ids)))[::-1]
        start, stop = sorted(data.draw(st.tuples(st.integers(0, len(ids)), st.integers(0, len(ids)))))
        assert torch.equal(cache.read(start, stop).view(torch.uint8), stored[start:stop].view(torch.uint8))
        rows = data.draw(st.lists(st.integers(0, len(ids) - 1), max_size=12))
        assert torch.equal(cache.gather(np.array(rows, dtype=np.int64)), stored[rows].float())


def test_reading_inside_a_shard_copies_nothing(cache: TargetCache) -> None:
    assert cache.read(5, 8).data_ptr() == cache.read(4, 8).data_ptr() + 16
    assert cache.read(4, 8).data_ptr() % 4096 == 0
    across = cache.read(3, 9)
    assert torch.equal(across, make_vectors()[3:9])
    assert cache.read(4, 4).shape == cache.read(10, 10).shape == cache.read(0, 0).shape == (0, 4)


def test_writing_into_a_read_tensor_never_reaches_the_disk(cache: TargetCache) -> None:
    cache.read(4, 8).zero_()
    cache.gather(np.array([4])).zero_()
    assert torch.equal(TargetCache.open(cache.path, verify="full").read(0, 10), make_vectors())


def read_with_little_memory(path: Path) -> None:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + 16 * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    cache = TargetCache.open(path)
    raise SystemExit(3 if float(cache.read(0, len(cache)).sum()) == len(cache) * cache.dim else 4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs the Linux accounting of memory")
def test_a_cache_larger_than_the_memory_limit_can_be_read(tmp_path: Path) -> None:
    ids = [str(row) for row in range(32_768)]
    TargetCache.from_arrays(tmp_path, torch.ones(32_768, 512), ids, fingerprint=FINGERPRINT)
    assert run_child(read_with_little_memory, tmp_path) == 3


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 11), (11, 11)])
def test_reading_rows_that_do_not_exist_is_refused(cache: TargetCache, start: int, stop: int) -> None:
    with pytest.raises(ConfigurationError, match=f"0 <= start <= stop <= 10; got start {start}, stop {stop}"):
        cache.read(start, stop)


def test_gathering_takes_numpy_and_torch_any_order_and_repetition(cache: TargetCache) -> None:
    for rows in ([9, 0, 4, 4, 3, 8], [0, 2, 3, 4, 7, 9], [3, 9, 2, 8]):
        for wanted in (np.array(rows), torch.tensor(rows), np.array(rows, dtype=np.int32), torch.tensor(rows).int()):
            assert torch.equal(cache.gather(wanted), make_vectors()[rows])
    empty = cache.gather(torch.empty(0, dtype=torch.int64))
    assert (empty.shape, empty.dtype) == ((0, 4), torch.float32)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([1, -1], "rows from 0 to 9; got -1 in place 1"),
        ([10], "got 10 in place 0"),
        ([2**63], "in place 0"),
        ([[1, 2]], r"shape \(n,\); got shape \(1, 2\)"),
        ([1.0], "got shape .* of float64"),
        ([True], "of bool"),
    ],
)
def test_gathering_rows_that_do_not_exist_is_refused(cache: TargetCache, rows: list[Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        cache.gather(np.array(rows))


def test_ids_behave_like_a_sequence_without_being_unpacked(tmp_path: Path) -> None:
    names = ["ä", "日本語", "x" * 1000, "a\n", " ", "🙂", "b"]
    cache = TargetCache.from_arrays(tmp_path, make_vectors(7, 4), names, fingerprint=FINGERPRINT)
    assert (len(cache.ids), cache.ids[0], cache.ids[-1], cache.ids[1:3]) == (7, "ä", "b", ["日本語", "x" * 1000])
    assert list(cache.ids) == names
    assert "🙂" in cache.ids
    assert pickle.loads(pickle.dumps(cache.ids))[5] == "🙂"
    with pytest.raises(IndexError):
        cache.ids[7]
    assert repr(cache.ids).startswith("PackedIds(7 ids: 'ä', '日本語'")


def test_rows_are_found_by_id(cache: TargetCache) -> None:
    found = cache.rows_of(["target-7", "target-0", "target-7"])
    assert (found.tolist(), found.dtype) == ([7, 0, 7], np.int64)
    assert cache.rows_of([]).tolist() == []
    with pytest.raises(DataError, match="ids among the 10 of the cache; got 'target-77'"):
        cache.rows_of(["target-1", "target-77"])
    with pytest.raises(ConfigurationError, match="Put it into a list"):
        cache.rows_of("target-1")


@pytest.mark.parametrize("hash_bytes", [lambda _: 7, lambda piece: len(piece), lambda piece: 2**64 - 1 - piece[-1]])
def test_ids_whose_hashes_collide_are_told_apart(hash_bytes: Callable[[memoryview], int]) -> None:
    names = [f"{row % 7}-{row}" for row in range(200)]
    packed = PackedIds.pack(names)
    colliding = PackedIds(packed.offsets, packed.data, hash_bytes=hash_bytes)
    assert colliding.first_duplicate() is None
    assert colliding.rows_of(names[::-1]).tolist() == list(range(200))[::-1]
    with pytest.raises(DataError, match="'missing'"):
        colliding.rows_of(["missing"])


def test_arrays_are_written_once_and_recognised(tmp_path: Path) -> None:
    ids, vectors = make_plan().ids, make_vectors()
    first = TargetCache.from_arrays(tmp_path, vectors, ids, fingerprint=FINGERPRINT, shard_rows=3)
    again = TargetCache.from_arrays(tmp_path, vectors, iter(ids), fingerprint=FINGERPRINT, shard_rows=3)
    assert again.manifest == first.manifest
    assert first.texts_hash.startswith("vectors-")
    with pytest.raises(CacheMismatchError, match="texts_hash: 'vectors-"):
        TargetCache.from_arrays(tmp_path, vectors * 2, ids, fingerprint=FINGERPRINT, shard_rows=3)


def test_arrays_that_do_not_fit_their_ids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"vectors: expected floats of shape \(3, dim\); got torch.float32 of shape \(10, 4"
    ):
        TargetCache.from_arrays(tmp_path, make_vectors(), ["a", "b", "c"], fingerprint=FINGERPRINT)
    with pytest.raises(
        ConfigurationError, match=r"dtype: expected one of \['float32', 'bfloat16', 'float16'\]; got 'f8'"
    ):
        TargetCache.from_arrays(tmp_path, make_vectors(), make_plan().ids, fingerprint=FINGERPRINT, dtype="f8")
    with pytest.raises(ConfigurationError, match="shard_rows"):
        TargetCache.from_arrays(tmp_path, make_vectors(), make_plan().ids, fingerprint=FINGERPRINT, shard_rows=0)


def test_the_texts_hash_is_that_of_the_plan(cache: TargetCache) -> None:
    assert cache.texts_hash == cache.manifest.texts_hash == "h" * 32
    assert cache.fingerprint == FINGERPRINT
    assert "10 rows of 4 float32 values by the target encoder 'some/encoder'" in repr(cache)


def test_an_unknown_level_of_verification_is_refused(cache: TargetCache) -> None:
    with pytest.raises(ConfigurationError, match="'sizes' or 'full'; got 'none'"):
        TargetCache.open(cache.path, verify="none")  # type: ignore[arg-type]


def read_in_a_child(cache: TargetCache) -> None:
    raise SystemExit(3 if torch.equal(cache.read(0, 10), make_vectors()) else 4)


def test_a_pickled_cache_is_its_path(cache: TargetCache, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(pickle.dumps(cache)) < 1000
    assert run_child(read_in_a_child, cache) == 3
    monkeypatch.chdir(cache.path.parent)
    pickled = pickle.dumps(TargetCache.open("cache"))
    monkeypatch.chdir("/")
    assert torch.equal(pickle.loads(pickled).read(0, 10), make_vectors())


def test_a_pickled_cache_does_not_turn_into_another_one(cache: TargetCache) -> None:
    pickled = pickle.dumps(cache)
    shutil.rmtree(cache.path)
    with pytest.raises(CacheError):
        pickle.loads(pickled)
    build(cache.path, make_plan(), make_vectors() * 2)
    with pytest.raises(CacheMismatchError, match="Do not replace a cache"):
        pickle.loads(pickled)


def test_an_open_cache_outlives_its_files(cache: TargetCache) -> None:
    shutil.rmtree(cache.path)
    assert torch.equal(cache.read(0, 10), make_vectors())
    assert cache.rows_of(["target-3"]).tolist() == [3]
    with pytest.raises(CacheError):
        cache.verify()


def test_verification_shows_its_progress_only_when_asked(
    cache: TargetCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.verify()
    assert capsys.readouterr().err == ""
    cache.verify(progress=True)
    assert "verify: 100%" in capsys.readouterr().err


def snapshot_of(cache: TargetCache, folder: Path) -> Path:
    """Arrange a cache as the Hub's local store does: blobs by hash, links by name."""
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, item in enumerate(sorted(cache.path.iterdir())):
        shutil.copy(item, blobs / str(number))
        (snapshot / item.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_a_snapshot_full_of_links_is_opened(cache: TargetCache, tmp_path: Path) -> None:
    snapshot = snapshot_of(cache, tmp_path)
    assert torch.equal(TargetCache.open(snapshot, verify="full").read(0, 10), make_vectors())
    (snapshot / SHARD).resolve().unlink()
    with pytest.raises(CacheCorruptedError, match=rf"{SHARD}: expected the file; got no such file"):
        TargetCache.open(snapshot)


def test_a_pipe_in_place_of_a_shard_does_not_block(cache: TargetCache) -> None:
    (cache.path / SHARD).unlink()
    os.mkfifo(cache.path / SHARD)
    with pytest.raises(CacheCorruptedError, match=f"{SHARD}: expected a regular file"):
        TargetCache.open(cache.path)


def test_opening_many_rows_creates_no_object_per_row(tmp_path: Path) -> None:
    rows = 200_000
    ids = (str(row) for row in range(rows))
    TargetCache.from_arrays(tmp_path, torch.ones(rows, 1), ids, fingerprint=FINGERPRINT)
    tracemalloc.start()
    cache = TargetCache.open(tmp_path)
    assert (cache.ids[123_456], cache.ids[-1]) == ("123456", "199999")
    assert cache.gather(np.arange(100)).sum() == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
