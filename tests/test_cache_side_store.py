"""Side features beside a cache: what was stored comes back mapped, for the rows it was stored for, or an error."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import build, make_plan, make_vectors
from edit_helpers import counts

from hf_corrector.cache import TargetCache
from hf_corrector.cache.folder_lock import locked
from hf_corrector.cache.side_store import (
    merged_counts,
    open_side,
    save_counts,
    save_dense,
    save_side,
    side_details,
    stored_sides,
    verify_sides,
)
from hf_corrector.errors import (
    CacheCorruptedError,
    CacheError,
    CacheMismatchError,
    ConfigurationError,
    DataError,
)
from hf_corrector.side_features import DenseSide, TokenCounts

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture
def cache(tmp_path: Path) -> TargetCache:
    return build(tmp_path / "cache", make_plan(), make_vectors())


def same(one: TokenCounts, other: TokenCounts) -> bool:
    arrays = zip((one.offsets, one.columns, one.counts), (other.offsets, other.columns, other.counts), strict=True)
    return all(np.array_equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in arrays) and (
        one.width, one.vocabulary
    ) == (other.width, other.vocabulary)  # fmt: skip


def test_token_counts_come_back_mapped(cache: TargetCache) -> None:
    save_side(cache, counts(range(10)), details={"tokenizer": "abc", "max_length": 7})
    found = open_side(cache, "tokens", verify="full")
    assert isinstance(found, TokenCounts) and same(found, counts(range(10)))
    assert not found.columns.flags.owndata and not found.offsets.flags.owndata
    assert torch.equal(found.gather(np.array([3, 1])).to_dense(), counts(range(10)).gather(np.array([3, 1])).to_dense())
    assert side_details(cache, "tokens") == {"tokenizer": "abc", "max_length": 7}
    assert stored_sides(cache) == ("tokens",)


def test_token_counts_may_come_in_blocks(cache: TargetCache) -> None:
    save_counts(cache, (counts(range(start, min(start + 3, 10))) for start in range(0, 10, 3)))
    found = open_side(cache, "tokens")
    assert isinstance(found, TokenCounts) and same(found, counts(range(10)))


def test_a_matrix_may_come_in_blocks(cache: TargetCache) -> None:
    matrix = make_vectors(10, 3)
    save_dense(cache, (DenseSide(part) for part in matrix.split(4)), kind="matrix", width=3)
    assert torch.equal(open_side(cache, "matrix", verify="full").read(0, 10), matrix)
    for wrong in (matrix[:9], make_vectors(11, 3), make_vectors(10, 4)):
        with pytest.raises(DataError, match="10 rows of 3 numbers"):
            save_dense(cache, (DenseSide(part) for part in wrong.split(4)), kind="matrix", width=3)
    matrix[7, 1] = float("nan")
    with pytest.raises(DataError, match="row 7"):
        save_dense(cache, (DenseSide(part) for part in matrix.split(4)), kind="matrix", width=3)
    assert len(open_side(cache, "matrix", verify="full")) == 10


def test_targets_without_any_token_are_rows_too(cache: TargetCache) -> None:
    empty = TokenCounts.from_lists([[]] * 10, vocabulary=5)
    save_side(cache, empty)
    found = open_side(cache, "tokens", verify="full")
    assert isinstance(found, TokenCounts) and same(found, empty)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["matrix", "word_embeddings"])
def test_a_matrix_comes_back_mapped(cache: TargetCache, dtype: torch.dtype, kind: str) -> None:
    matrix = make_vectors(10, 3).to(dtype)
    save_side(cache, DenseSide(matrix, kind))
    found = open_side(cache, kind, verify="full")
    assert isinstance(found, DenseSide) and (found.kind, found.width) == (kind, 3)
    assert found.matrix.dtype == (torch.float32 if dtype == torch.float64 else dtype)
    assert torch.equal(found.read(2, 9), matrix[2:9].float())
    assert stored_sides(cache) == (kind,)


def test_kinds_stand_beside_each_other_and_the_last_of_a_kind_counts(cache: TargetCache) -> None:
    save_side(cache, counts(range(10)))
    for scale in (1.0, 2.0):
        save_side(cache, DenseSide(scale * make_vectors(10, 3)))
    assert stored_sides(cache) == ("tokens", "matrix")
    assert torch.equal(open_side(cache, "matrix").read(0, 10), 2.0 * make_vectors(10, 3))
    verify_sides(cache)


@pytest.mark.parametrize(("kind", "cure"), [("tokens", "hf-corrector embed"), ("matrix", "--side matrix.npy")])
def test_missing_side_features_are_named_with_the_way_to_get_them(cache: TargetCache, kind: str, cure: str) -> None:
    with pytest.raises(CacheMismatchError, match=rf"'{kind}' stored with the cache; got only \[\].*{cure}"):
        open_side(cache, kind)
    with pytest.raises(ConfigurationError, match="'colours'"):
        open_side(cache, "colours")


def test_side_features_of_another_cache_are_refused(cache: TargetCache, tmp_path: Path) -> None:
    other = build(tmp_path / "other", make_plan(), make_vectors() * 2)
    save_side(other, counts(range(10)))
    for path in other.path.glob("side-*"):
        (cache.path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CacheMismatchError, match="Store them again"):
        open_side(cache, "tokens")


def test_rows_that_do_not_fit_are_refused_and_nothing_is_left(cache: TargetCache) -> None:
    with pytest.raises(DataError, match="each of the 10 targets; got 9 rows"):
        save_side(cache, counts(range(9)))
    for blocks in ([counts(range(9))], [], [counts(range(5)), TokenCounts.from_lists([[1]] * 5, vocabulary=3)]):
        with pytest.raises(DataError, match="10 rows of one vocabulary"):
            save_counts(cache, blocks)
    matrix = make_vectors(10, 3)
    matrix[7, 1] = float("inf")
    with pytest.raises(DataError, match="'matrix', row 7: expected finite numbers"):
        save_side(cache, DenseSide(matrix))
    assert not list(cache.path.glob("side-*"))


def test_nothing_is_stored_while_another_writer_is_at_work(cache: TargetCache) -> None:
    with locked(cache.path), pytest.raises(CacheError, match="no other writer"):
        save_side(cache, counts(range(10)))


def test_random_damage_is_found_by_verification(cache: TargetCache) -> None:
    save_side(cache, counts(range(10)))
    save_side(cache, DenseSide(make_vectors(10, 3)))
    draw, files = random.Random(0), sorted(cache.path.glob("side-*"))
    assert len(files) == 4
    for _ in range(150):
        file = draw.choice(files)
        data = file.read_bytes()
        place = draw.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        file.write_bytes(draw.choice([flipped, flipped, data[:place], data + b"x"]))
        with pytest.raises(CacheError) as caught:
            verify_sides(cache)
        assert file.name in str(caught.value)
        file.write_bytes(data)
    verify_sides(cache)


def test_damage_that_opening_can_see_is_seen_on_opening(cache: TargetCache) -> None:
    save_side(cache, counts(range(10)))
    path = cache.path / "side-tokens.g0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CacheCorruptedError, match="truncated"):
        open_side(cache, "tokens")


def test_merging_takes_old_rows_and_new_ones_in_their_order() -> None:
    old, added = counts(range(6)), counts(range(90, 93))
    sources = np.array([-1, 0, 1, 4, -1, 5, -1])
    merged = list(merged_counts(old, added, sources))
    assert [len(block) for block in merged] == [1, 2, 1, 1, 1, 1]
    found = torch.cat([block.read(0, len(block)).to_dense() for block in merged])
    every = counts(range(100))
    assert torch.equal(found, every.gather(np.array([90, 0, 1, 4, 91, 5, 92])).to_dense())
    assert [len(block) for block in merged_counts(old, old, np.arange(6))] == [6]
