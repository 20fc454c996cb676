"""The overlay: what was acknowledged is read back or missed loudly, whatever happens to process and disk."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import FINGERPRINT, build, child, flip, folder_in_memory, make_plan, make_vectors, run_child
from edit_helpers import append_on_a_full_disk, append_until_killed

from hf_corrector.cache.overlay import Overlay, OverlayWriter, overlay_path
from hf_corrector.cache.overlay_log import FILE_HEAD_BYTES, RECORD_HEAD_BYTES
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.errors import (
    CacheCorruptedError,
    CacheError,
    CacheMismatchError,
    ConfigurationError,
    DataError,
)

OLD, NEW = "0" * 32, "f" * 32


@pytest.fixture
def cache(tmp_path: Path) -> TargetCache:
    return build(tmp_path / "cache", make_plan(), make_vectors())


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def write_two(cache: TargetCache) -> list[int]:
    """Write rows 3 and 5, then 5 and 0; return the lengths after each record."""
    with OverlayWriter(cache) as writer:
        first = writer.append(rows(3, 5), torch.full((2, 4), 1.0), stamp=OLD, step=10)
        return [first, writer.append(rows(5, 0), torch.full((2, 4), 2.0), stamp=NEW, step=20)]


def test_a_cache_without_an_overlay_has_an_empty_one(cache: TargetCache) -> None:
    overlay = Overlay.open(cache)
    assert (len(overlay), overlay.length, overlay.stamps) == (0, 0, set())
    assert len(overlay.find(rows(0, 1))) == 0
    assert overlay.vectors(overlay.find(rows(0, 1))).shape == (0, 4)


def test_the_latest_record_of_a_row_wins_and_says_who_made_it_when(cache: TargetCache) -> None:
    lengths = write_two(cache)
    overlay = Overlay.open(cache)
    found = overlay.find(rows(9, 5, 3, 5, 0))
    assert (len(overlay), overlay.length, overlay.stamps) == (3, lengths[1], {OLD, NEW})
    assert found.positions.tolist() == [1, 2, 3, 4]
    assert found.stamps.tolist() == [NEW, OLD, NEW, NEW]
    assert found.steps.tolist() == [20, 10, 20, 20]
    assert overlay.vectors(found)[:, 0].tolist() == [2, 1, 2, 2]
    assert overlay.vectors(found.select(found.stamps == OLD)).tolist() == [[1.0] * 4]


def test_a_row_twice_in_one_record_has_its_last_vector(cache: TargetCache) -> None:
    with OverlayWriter(cache) as writer:
        writer.append(rows(4, 4), torch.tensor([[1.0] * 4, [2.0] * 4]), stamp=OLD, step=0)
        assert writer.overlay.vectors(writer.overlay.find(rows(4))).tolist() == [[2.0] * 4]


def test_a_smaller_length_is_the_overlay_as_it_was(cache: TargetCache) -> None:
    first, second = write_two(cache)
    earlier = Overlay.open(cache, length=first)
    assert earlier.find(rows(0, 5)).steps.tolist() == [10]
    assert overlay_path(cache).stat().st_size == second  # a reader cuts nothing
    assert len(Overlay.open(cache, length=FILE_HEAD_BYTES)) == 0
    with OverlayWriter(cache, length=first) as writer:
        assert writer.length == overlay_path(cache).stat().st_size == first
        writer.append(rows(7), torch.full((1, 4), 3.0), stamp=NEW, step=30)
    assert Overlay.open(cache).find(np.arange(10)).positions.tolist() == [3, 5, 7]


@pytest.mark.parametrize("beyond", [-1, 1, 5])
def test_a_length_between_records_or_behind_the_end_is_refused(cache: TargetCache, beyond: int) -> None:
    first, second = write_two(cache)
    for length in (first + beyond, second + beyond):
        with pytest.raises(CacheCorruptedError, match=r"overlay\.g0\.log, (record|overlay)"):
            Overlay.open(cache, length=length)
    overlay_path(cache).unlink()
    with pytest.raises(CacheCorruptedError, match="no such file"):
        Overlay.open(cache, length=first)


def test_a_reader_sees_what_is_appended_after_a_refresh(cache: TargetCache) -> None:
    reader = Overlay.open(cache)
    with OverlayWriter(cache) as writer:
        writer.append(rows(1), torch.ones(1, 4), stamp=OLD, step=1)
        reader.refresh()
        assert len(reader) == 1
        writer.append(rows(2), torch.ones(1, 4), stamp=OLD, step=2)
        assert len(reader) == 1
        reader.refresh()
        assert (len(reader), reader.length) == (2, writer.length)
        writer.append(rows(1), torch.full((1, 4), 3.0), stamp=NEW, step=7)
        reader.refresh()
        found = reader.find(rows(2, 1))
        assert (found.stamps.tolist(), found.steps.tolist()) == ([OLD, NEW], [2, 7])
        assert reader.vectors(found)[:, 0].tolist() == [1, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_vectors_come_back_as_the_cache_would_store_them(tmp_path: Path, dtype: str, dim: int) -> None:
    cache = build(tmp_path, make_plan(10, dim, dtype=dtype), make_vectors(10, dim))
    vectors, wanted = make_vectors(7, dim), np.random.default_rng(0).permutation(10)[:7]
    with OverlayWriter(cache) as writer:
        for part in (slice(0, 3), slice(3, 4), slice(4, 7)):
            writer.append(wanted[part], vectors[part], stamp=OLD, step=0)
    overlay = Overlay.open(cache)
    assert torch.equal(overlay.vectors(overlay.find(wanted)), vectors.to(cache.dtype).float())


def test_every_flipped_bit_is_noticed(cache: TargetCache) -> None:
    _, second = write_two(cache)
    path = overlay_path(cache)
    assert path.stat().st_size == second
    for bit in range(8 * second):
        flip(path, bit)
        with pytest.raises(CacheError, match=r"overlay\.g0\.log"):
            Overlay.open(cache)
        flip(path, bit)
    Overlay.open(cache)


def test_damage_names_the_record_and_the_way_out(cache: TargetCache) -> None:
    first, _ = write_two(cache)
    flip(overlay_path(cache), 8 * (first + RECORD_HEAD_BYTES + 20))
    for access in (Overlay.open, OverlayWriter):
        with pytest.raises(CacheCorruptedError, match=rf"record 1 \(byte {first}\): .*length a checkpoint names"):
            access(cache)
    assert len(Overlay.open(cache, length=first)) == 2


def test_every_truncation_leaves_whole_records_and_is_cut_by_the_next_writer(cache: TargetCache) -> None:
    first, second = write_two(cache)
    path = overlay_path(cache)
    data = path.read_bytes()
    for size in range(FILE_HEAD_BYTES, second):
        path.write_bytes(data[:size])
        expected = first if size >= first else FILE_HEAD_BYTES
        assert Overlay.open(cache).length == expected
        assert path.stat().st_size == size
    with OverlayWriter(cache) as writer:
        assert writer.length == path.stat().st_size == first
    for size in range(FILE_HEAD_BYTES):
        path.write_bytes(data[:size])
        with pytest.raises(CacheCorruptedError, match="header"):
            Overlay.open(cache)


@pytest.mark.parametrize("kept", [0, 40, RECORD_HEAD_BYTES, RECORD_HEAD_BYTES + 10])
def test_a_tail_that_the_file_system_left_zero_is_torn(cache: TargetCache, kept: int) -> None:
    first, second = write_two(cache)
    path = overlay_path(cache)
    data = path.read_bytes()
    path.write_bytes(data[: first + kept] + bytes(second - first - kept))
    if 0 < kept < RECORD_HEAD_BYTES:
        with pytest.raises(CacheCorruptedError, match="record 1"):  # half a head is nothing a crash leaves
            Overlay.open(cache)
    else:
        assert Overlay.open(cache).length == first


def test_an_overlay_of_another_cache_is_refused(cache: TargetCache, tmp_path: Path) -> None:
    write_two(cache)
    other = build(tmp_path / "other", make_plan(), make_vectors() * 2)
    overlay_path(other).write_bytes(overlay_path(cache).read_bytes())
    for access in (Overlay.open, OverlayWriter):
        with pytest.raises(CacheMismatchError, match="belongs to another cache"):
            access(other)


def test_there_is_one_writer_at_a_time(cache: TargetCache) -> None:
    with OverlayWriter(cache), pytest.raises(CacheError, match="no other writer"):
        OverlayWriter(cache)
    with OverlayWriter(cache) as writer:
        pass
    with pytest.raises(ConfigurationError, match="a closed one"):
        writer.append(rows(1), torch.ones(1, 4), stamp=OLD, step=0)
    assert not (cache.path / "LOCK").exists()


@pytest.mark.parametrize(
    ("wanted", "vectors", "stamp", "message"),
    [
        (rows(1), torch.ones(1, 5), OLD, r"vectors \(n, 4\)"),
        (rows(1, 2), torch.ones(1, 4), OLD, r"vectors \(n, 4\)"),
        (np.array([1.0]), torch.ones(1, 4), OLD, "float64"),
        (rows(1), torch.ones(1, 4, dtype=torch.int64), OLD, "int64"),
        (rows(10), torch.ones(1, 4), OLD, "rows from 0 to 9; got 10"),
        (rows(-1), torch.ones(1, 4), OLD, "rows from 0 to 9; got -1"),
        (rows(1), torch.full((1, 4), float("nan")), OLD, "row 1: expected a finite vector; got NaN"),
        (rows(1), torch.ones(1, 4), "abc", "32 hexadecimal digits"),
        (rows(1), torch.ones(1, 4), "ü" * 32, "32 hexadecimal digits"),
    ],
)
def test_what_is_no_record_is_refused_and_nothing_written(
    cache: TargetCache, wanted: np.ndarray, vectors: torch.Tensor, stamp: str, message: str
) -> None:
    with OverlayWriter(cache) as writer:
        with pytest.raises(DataError, match=message):
            writer.append(wanted, vectors, stamp=stamp, step=0)
        assert writer.append(rows(), torch.ones(0, 4), stamp=OLD, step=0) == FILE_HEAD_BYTES
    assert overlay_path(cache).stat().st_size == FILE_HEAD_BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as path:
        yield path


def test_a_writer_killed_at_random_moments_loses_no_acknowledged_record(folder: Path) -> None:
    cache = build(folder / "cache", make_plan(500, 64, shard_rows=500), make_vectors(500, 64))
    draw, note, lengths = random.Random(0), folder / "acknowledged", set()
    for _ in range(20):
        process = child(append_until_killed, cache.path, note)
        size = note.stat().st_size if note.exists() else 0
        while not note.exists() or note.stat().st_size == size:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        raw = note.read_bytes()
        acknowledged = int.from_bytes(raw[len(raw) // 8 * 8 - 8 : len(raw) // 8 * 8], "little")
        overlay = Overlay.open(cache)
        assert overlay.length >= acknowledged
        found = overlay.find(np.arange(500))
        expected = torch.from_numpy(found.steps + found.positions).float()[:, None].expand(-1, 64)
        assert torch.equal(overlay.vectors(found), expected)  # row, step and vector belong together
        lengths.add(overlay.length)
    assert len(lengths) == 20


def test_a_full_disk_leaves_the_log_as_it_was(cache: TargetCache) -> None:
    assert run_child(append_on_a_full_disk, cache.path) == 3
    assert Overlay.open(cache).find(np.arange(10)).positions.tolist() == [1]


def test_the_encoder_of_the_cache_may_be_the_one_of_the_overlay(cache: TargetCache) -> None:
    with OverlayWriter(cache) as writer:
        writer.append(rows(1), torch.ones(1, 4), stamp=FINGERPRINT.digest, step=0)
    assert Overlay.open(cache).stamps == {FINGERPRINT.digest}
