"""Damaged and forged files: everything that is not what a writer wrote is found, and named."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cache_helpers import (
    FINGERPRINT,
    build,
    flip,
    folder_in_memory,
    forge,
    make_plan,
    make_vectors,
)

from hf_corrector.cache import CacheManifest, TargetCache
from hf_corrector.cache.shard_files import TensorSpec, build_header
from hf_corrector.errors import CacheCorruptedError

SHARD = "emb-00001-of-00003.g0.safetensors"
IDS = "ids.g0.safetensors"


@pytest.fixture
def cache(tmp_path: Path) -> TargetCache:
    return build(tmp_path / "cache", make_plan(), make_vectors())


@pytest.mark.parametrize("file", [SHARD, IDS])
@pytest.mark.parametrize(
    ("change", "word"), [(-1, "truncated"), (-4096, "truncated"), (1, "extended"), (9999, "extended")]
)
def test_a_file_of_the_wrong_length_is_refused_on_opening(
    cache: TargetCache, file: str, change: int, word: str
) -> None:
    size = (cache.path / file).stat().st_size
    os.truncate(cache.path / file, max(size + change, 0))
    rows = "rows 4 to 7" if file == SHARD else "rows 0 to 9"
    message = rf"{file}, {rows}: expected {size} bytes; got {max(size + change, 0)} bytes \({word}\)\. Restore the file"
    with pytest.raises(CacheCorruptedError, match=message):
        TargetCache.open(cache.path)


@pytest.mark.parametrize("place", [0, 3, 8, 100, 4095])
def test_a_flipped_bit_in_a_header_is_found_on_opening(cache: TargetCache, place: int) -> None:
    flip(cache.path / SHARD, 8 * place)
    with pytest.raises(CacheCorruptedError, match=f"{SHARD}, rows 4 to 7: expected its header as written"):
        TargetCache.open(cache.path)


def test_verification_names_file_block_and_rows(tmp_path: Path) -> None:
    cache = build(tmp_path, make_plan(2000, 128, shard_rows=1000), make_vectors(2000, 128))
    flip(tmp_path / "emb-00001-of-00002.g0.safetensors", 8 * (4096 + 512 * 700))
    message = (
        r"emb-00001-of-00002.g0.safetensors, rows 1504 to 1999 \(bytes 262144 to 516095\): "
        r"expected a block with checksum [0-9a-f]{16}; got [0-9a-f]{16}"
    )
    for check in (cache.verify, lambda: TargetCache.open(tmp_path, verify="full")):
        with pytest.raises(CacheCorruptedError, match=message):
            check()
    TargetCache.open(tmp_path)  # the quick check reads no rows, as documented


def test_damage_after_opening_is_found_by_verification(cache: TargetCache) -> None:
    with open(cache.path / SHARD, "ab") as handle:
        handle.write(b"x")
    with pytest.raises(CacheCorruptedError, match="extended"):
        cache.verify()
    os.truncate(cache.path / SHARD, 4096 + 63)
    with pytest.raises(CacheCorruptedError, match=f"{SHARD}, rows 4 to 7: .*truncated"):
        cache.verify()


def test_a_cache_replaced_after_opening_is_found_by_verification(cache: TargetCache) -> None:
    shutil.rmtree(cache.path)
    build(cache.path, make_plan(), make_vectors() * 2)
    with pytest.raises(CacheCorruptedError, match=r"manifest.json: expected what it was when opened; got another"):
        cache.verify()


@pytest.fixture
def large_cache(tmp_path: Path) -> Iterator[TargetCache]:
    with folder_in_memory(tmp_path) as folder:
        yield build(folder / "cache", make_plan(1200, 128, shard_rows=600), make_vectors(1200, 128))


def damage(data: bytes, draw: random.Random) -> bytes:
    """Flip a bit, cut the end off, add to it, or empty a page."""
    place = draw.randrange(len(data))
    kind = draw.choice(["flip", "flip", "flip", "truncate", "extend", "zero"])
    if kind == "truncate":
        return data[:place]
    if kind == "extend":
        return data + draw.randbytes(draw.choice([1, 100, 300_000]))
    if kind == "zero":
        return data[:place] + bytes(len(data[place : place + 4096])) + data[place + 4096 :]
    return data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]


def test_three_hundred_random_damages_are_all_found(large_cache: TargetCache) -> None:
    draw = random.Random(1)
    files = sorted(large_cache.path.iterdir())
    assert len(files) == 4
    silent, trials = [], 0
    while trials < 300:
        file = draw.choice(files)
        data = file.read_bytes()
        damaged = damage(data, draw)
        if damaged == data:
            continue
        trials += 1
        file.write_bytes(damaged)
        try:
            TargetCache.open(large_cache.path, verify="full")
            silent.append((file.name, len(damaged) - len(data)))
        except CacheCorruptedError as error:
            assert file.name in str(error)
        file.write_bytes(data)
    assert silent == []
    TargetCache.open(large_cache.path, verify="full")


def header_of(text: str) -> bytes:
    return (4088).to_bytes(8, "little") + text.encode().ljust(4088)


GOOD = '"emb":{"dtype":"F32","shape":[4,4],"data_offsets":[0,64]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (header_of("{" + GOOD + "," + GOOD + "}"), "without duplicate keys"),
        (header_of("{" + GOOD.replace("F32", "I32") + "}"), "I32"),
        (header_of("{" + GOOD.replace("[4,4]", "[2,8]") + "}"), r"\[2, 8\]"),
        (header_of("{" + GOOD.replace("[0,64]", "[4,68]") + "}"), r"\[4, 68\]"),
        (header_of("{" + GOOD.replace("[0,64]", "[-64,0]") + "}"), r"\[-64, 0\]"),
        (header_of("{" + GOOD + "," + GOOD.replace("emb", "more") + "}"), "more"),
        (header_of("{" + GOOD[:-1] + ',"extra":1}}'), "extra"),
        (header_of("{}"), r"got \{\}"),
        (header_of("[]"), r"got \[\]"),
        (header_of("{"), "JSON"),
        (header_of("[" * 4000), "JSON"),
        ((2**63).to_bytes(8, "little") + b" " * 4088, "a header of 4088 bytes; got 9223372036854775808"),
        ((101 * 2**20).to_bytes(8, "little") + b" " * 4088, "a header of 4088 bytes"),
    ],
)
def test_a_hostile_header_is_refused_even_with_correct_checksums(
    cache: TargetCache, header: bytes, message: str
) -> None:
    forge(cache.path, SHARD, header + (cache.path / SHARD).read_bytes()[4096:])
    with pytest.raises(CacheCorruptedError, match=f"{SHARD}.*{message}"):
        TargetCache.open(cache.path)


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("inf"), "an infinite value")])
def test_rows_no_writer_would_have_written_are_found_by_verification(
    cache: TargetCache, value: float, name: str
) -> None:
    vectors = make_vectors()[4:8].numpy().copy()
    vectors[2, 3] = value
    forge(cache.path, SHARD, (cache.path / SHARD).read_bytes()[:4096] + vectors.tobytes())
    with pytest.raises(CacheCorruptedError, match=f"{SHARD}, row 6: expected a vector; got {name}"):
        TargetCache.open(cache.path, verify="full")


def test_a_zero_row_is_found_by_verification_where_the_encoder_normalises(tmp_path: Path) -> None:
    plan = make_plan(fingerprint=replace(FINGERPRINT, normalize=True))
    build(tmp_path, plan, make_vectors())
    forge(tmp_path, SHARD, (tmp_path / SHARD).read_bytes()[:4096] + bytes(64))
    with pytest.raises(CacheCorruptedError, match=f"{SHARD}, row 4: expected a vector; got a norm of 0"):
        TargetCache.open(tmp_path, verify="full")


def ids_file(offsets: list[int], data: bytes) -> bytes:
    specs = [TensorSpec("offsets", "I64", (len(offsets),)), TensorSpec("bytes", "U8", (len(data),))]
    return build_header(specs) + np.array(offsets, dtype=np.int64).tobytes() + data


@pytest.mark.parametrize(
    ("offsets", "data", "message"),
    [
        ([0, 1, 2, 3], b"aba", "rows 0 and 2: expected different ids; got 'a' in both"),
        ([0, 1, 1, 3], b"abc", "row 1: expected ids that are not empty"),
        ([0, 2, 1, 3], b"abc", "row 1"),
        ([1, 1, 2, 3], b"abc", "row 0"),
        ([0, 1, 2, 2], b"abc", "row 2"),
        ([-(2**60), 1, 2, 3], b"abc", "row 0"),
        ([0, 1, 2, 2**60], b"abc", "row 0"),
        ([0, 1, 2, 3], b"a\xffc", "row 1: expected UTF-8"),
        ([0, 1, 2, 3], b"xyz", "ids with hash"),
    ],
)
def test_ids_no_writer_would_have_written_are_found_by_verification(
    tmp_path: Path, offsets: list[int], data: bytes, message: str
) -> None:
    build(tmp_path, make_plan(3), make_vectors(3, 4))
    manifest = CacheManifest.load(tmp_path)
    forged = ids_file(offsets, data)
    (tmp_path / IDS).write_bytes(forged)
    replace(manifest, ids=replace(manifest.ids, bytes=len(forged))).save(tmp_path)
    forge(tmp_path, IDS, forged)
    with pytest.raises(CacheCorruptedError, match=message):
        TargetCache.open(tmp_path, verify="full")
