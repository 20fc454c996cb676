"""Building a cache: what is refused, what is kept, who may write."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import (
    FINGERPRINT,
    build,
    flip,
    identities,
    make_plan,
    make_vectors,
)

from hf_corrector.cache import CacheWriter, ShardRange, TargetCache, default_shard_rows
from hf_corrector.errors import (
    CacheCorruptedError,
    CacheIncompleteError,
    CacheMismatchError,
    ConfigurationError,
    DataError,
)

NORMALIZED = replace(FINGERPRINT, normalize=True)


def write_some(path: Path, plan: Any, *shards: int) -> None:
    vectors = make_vectors(len(plan.ids), plan.dim)
    with CacheWriter(path, plan) as writer:
        for index in shards:
            writer.write_shard(index, vectors[index * 4 : index * 4 + 4])


def test_a_build_leaves_shards_ids_and_manifest_and_nothing_else(tmp_path: Path) -> None:
    with CacheWriter(tmp_path / "new" / "cache", make_plan()) as writer:
        assert writer.pending_shards() == [ShardRange(0, 0, 4), ShardRange(1, 4, 8), ShardRange(2, 8, 10)]
        vectors = make_vectors()
        for index in (2, 0, 1):
            writer.write_shard(index, vectors[index * 4 : index * 4 + 4])
        cache = writer.finish()
    assert sorted(item.name for item in cache.path.iterdir()) == [
        "emb-00000-of-00003.g0.safetensors",
        "emb-00001-of-00003.g0.safetensors",
        "emb-00002-of-00003.g0.safetensors",
        "ids.g0.safetensors",
        "manifest.json",
    ]
    assert torch.equal(cache.read(0, 10), vectors)


def test_the_generation_is_in_the_manifest_and_in_every_name(tmp_path: Path) -> None:
    cache = build(tmp_path, make_plan(generation=7), make_vectors())
    assert cache.manifest.generation == 7
    assert {item.name.split(".")[1] for item in tmp_path.glob("*.safetensors")} == {"g7"}


def test_finishing_too_early_names_what_is_missing(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, make_plan()) as writer:
        writer.write_shard(0, make_vectors()[:4])
        with pytest.raises(
            CacheIncompleteError, match=r"3 shards; got 2 of them missing, the first is emb-00001-of-00003"
        ):
            writer.finish()
    with pytest.raises(CacheIncompleteError, match=r"an unfinished build \(1 shards done\). Run the same build again"):
        TargetCache.open(tmp_path)


@pytest.mark.parametrize(
    "vectors",
    [
        make_vectors().double(),
        make_vectors().requires_grad_(),
        make_vectors().numpy(),
        np.asfortranarray(make_vectors().numpy()),
        make_vectors().numpy()[::-1],
        np.array(make_vectors().numpy(), dtype=np.float64),
        make_vectors().t().contiguous().t(),
    ],
)
def test_vectors_of_any_float_kind_and_layout_are_taken(tmp_path: Path, vectors: Any) -> None:
    cache = build(tmp_path, make_plan(), vectors)
    wanted = torch.from_numpy(vectors.copy()) if isinstance(vectors, np.ndarray) else vectors.detach()
    assert torch.equal(cache.read(0, 10), wanted.float())


def test_a_read_only_memory_map_is_taken_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    np.save(tmp_path / "v.npy", make_vectors().numpy())
    cache = build(tmp_path / "cache", make_plan(), np.load(tmp_path / "v.npy", mmap_mode="r"))
    assert torch.equal(cache.read(0, 10), make_vectors())
    assert not [str(warning.message) for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_that_is_not_finite_is_named_and_nothing_is_written(tmp_path: Path, bad: float, kind: Any) -> None:
    vectors = make_vectors().to(kind)
    vectors[6, 3] = bad
    what = "NaN" if bad != bad else "an infinite value"
    with CacheWriter(tmp_path, make_plan()) as writer:
        with pytest.raises(
            DataError, match=rf"emb-00001-of-00003.g0.safetensors, row 6 \(id 'target-6'\): expected a finite .*{what}"
        ):
            writer.write_shard(1, vectors[4:8])
        assert not list(tmp_path.glob("emb-*"))
        writer.write_shard(1, make_vectors()[4:8])


def test_a_bad_row_is_found_behind_the_first_piece_of_a_large_shard(tmp_path: Path) -> None:
    vectors = torch.ones(30_000, 64)
    vectors[29_999, 63] = float("nan")
    with pytest.raises(DataError, match=r"row 29999 \(id 'target-29999'\)"):
        build(tmp_path, make_plan(30_000, 64, shard_rows=30_000), vectors)
    assert not list(tmp_path.glob("emb-*"))


@pytest.mark.parametrize(
    ("dtype", "value", "kind"),
    [("float16", 65520.0, torch.float32), ("bfloat16", 3.4e38, torch.float32), ("float32", 1e39, torch.float64)],
)
def test_a_value_too_large_for_the_dtype_is_refused(tmp_path: Path, dtype: str, value: float, kind: Any) -> None:
    vectors = make_vectors().to(kind)
    vectors[2, 1] = -value
    with pytest.raises(
        DataError, match=rf"row 2 \(id 'target-2'\): expected a vector that fits into {dtype}; got an inf"
    ):
        build(tmp_path, make_plan(dtype=dtype), vectors)


def test_the_largest_float16_is_no_overflow(tmp_path: Path) -> None:
    vectors = torch.full((10, 4), 65519.0)
    assert build(tmp_path, make_plan(dtype="float16"), vectors).read(0, 10).max() == 65504


@pytest.mark.parametrize(("dtype", "value"), [("float32", 0.0), ("float16", 1e-9)])
def test_a_row_of_norm_zero_is_refused_where_the_encoder_normalises(tmp_path: Path, dtype: str, value: float) -> None:
    vectors = make_vectors()
    vectors[9] = value
    with pytest.raises(DataError, match=r"emb-00002-of-00003.g0.safetensors, row 9 .*a norm of 0"):
        build(tmp_path / "unit", make_plan(dtype=dtype, fingerprint=NORMALIZED), vectors)
    build(tmp_path / "free", make_plan(dtype=dtype), vectors)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (make_vectors(4, 5), "vectors of length 4; got vectors of length 5"),
        (make_vectors(3, 4), r"floats of shape \(4, dim\); got torch.float32 of shape \(3, 4\)"),
        (make_vectors(4, 4).flatten(), r"got torch.float32 of shape \(16,\)"),
        (torch.ones(4, 4, dtype=torch.int64), "got torch.int64"),
        (np.ones((4, 4), dtype=np.int32), "got int32"),
        (np.ones((4, 4), dtype=">f4"), "got >f4"),
        (np.ones((4, 4), dtype=object), "got object"),
    ],
)
def test_vectors_of_the_wrong_shape_or_kind_are_refused(tmp_path: Path, vectors: Any, message: str) -> None:
    with CacheWriter(tmp_path, make_plan()) as writer:
        with pytest.raises(DataError, match=f"emb-00000-of-00003.*{message}"):
            writer.write_shard(0, vectors)
        assert len(writer.pending_shards()) == 3


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", "b", "c", "b"], "a different id for every row; got 'b' in row 1 and in row 3"),
        (["a", "", "c"], "ids, row 1: expected a string that is not empty; got an empty string"),
        (["a", "b", 3], "ids, row 2: .* got 3 of type int"),
        (["a", None], "ids, row 1: .* got None of type NoneType"),
        (["a", "\ud800"], "ids, row 1: expected valid Unicode"),
    ],
)
def test_ids_that_are_no_ids_are_refused_with_their_rows(tmp_path: Path, ids: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CacheWriter(tmp_path, make_plan(ids=ids))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dim", 0),
        ("dim", True),
        ("shard_rows", 0),
        ("generation", -1),
        ("dtype", "int8"),
        ("texts_hash", ""),
        ("ids", []),
    ],
)
def test_a_plan_out_of_range_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=field):
        make_plan(**{field: value})


def test_one_string_is_no_list_of_ids(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="Put it into a list"):
        CacheWriter(tmp_path, make_plan(ids="abc"))


def test_a_shard_is_written_once_and_only_if_it_exists(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, make_plan()) as writer:
        writer.write_shard(0, make_vectors()[:4])
        for index in (0, 3, -1):
            with pytest.raises(ConfigurationError, match=f"a pending shard; got shard {index}"):
                writer.write_shard(index, make_vectors()[:4])
    with pytest.raises(ConfigurationError, match="a closed writer"):
        writer.write_shard(1, make_vectors()[4:8])


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(ConfigurationError, match="expected a folder; got a file"):
        CacheWriter(tmp_path / "cache", make_plan())
    assert (tmp_path / "cache").read_text() == "mine"


def test_finished_shards_are_not_made_again(tmp_path: Path) -> None:
    write_some(tmp_path, make_plan(), 0, 2)
    before = identities(tmp_path)
    assert len(before) == 3
    with CacheWriter(tmp_path, make_plan()) as writer:
        assert writer.pending_shards() == [ShardRange(1, 4, 8)]
        assert identities(tmp_path) == before
        writer.write_shard(1, make_vectors()[4:8])
        assert torch.equal(writer.finish().read(0, 10), make_vectors())


def test_a_shard_that_rotted_before_the_resumption_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_some(tmp_path, make_plan(), 0, 1)
    flip(tmp_path / "emb-00001-of-00003.g0.safetensors", 8 * 4100)
    with caplog.at_level(logging.WARNING), CacheWriter(tmp_path, make_plan()) as writer:
        assert [shard.index for shard in writer.pending_shards()] == [1, 2]
    assert "emb-00001-of-00003.g0.safetensors is written again" in caplog.text


@pytest.mark.parametrize("place", [0, 20, 100, 300])
def test_a_sidecar_that_rotted_costs_its_shard(tmp_path: Path, place: int) -> None:
    write_some(tmp_path, make_plan(), 0)
    flip(tmp_path / "emb-00000-of-00003.g0.json", 8 * place)
    with CacheWriter(tmp_path, make_plan()) as writer:
        assert len(writer.pending_shards()) == 3


def test_a_shard_without_its_file_is_made_again(tmp_path: Path) -> None:
    write_some(tmp_path, make_plan(), 0)
    (tmp_path / "emb-00000-of-00003.g0.safetensors").unlink()
    with CacheWriter(tmp_path, make_plan()) as writer:
        assert len(writer.pending_shards()) == 3


def test_ids_that_rotted_before_the_resumption_are_written_again(tmp_path: Path) -> None:
    write_some(tmp_path, make_plan(), 0)
    flip(tmp_path / "ids.g0.safetensors", 8 * 4200)
    cache = build(tmp_path, make_plan(), make_vectors())
    cache.verify()
    assert list(cache.ids) == make_plan().ids


def test_shards_of_another_plan_are_not_adopted_when_plan_json_is_gone(tmp_path: Path) -> None:
    write_some(tmp_path, make_plan(), 0, 1)
    (tmp_path / "plan.json").unlink()
    with CacheWriter(tmp_path, make_plan(texts_hash="other")) as writer:
        assert len(writer.pending_shards()) == 3


DIFFERENT_PLANS = [
    ({"dim": 5}, "dim: 5 / 4"),
    ({"texts_hash": "other"}, f"texts_hash: 'other' / '{'h' * 32}'"),
    ({"shard_rows": 5}, "shard_rows: 5 / 4"),
    ({"dtype": "bfloat16"}, "dtype: 'bfloat16' / 'float32'"),
    ({"generation": 1}, "generation: 1 / 0"),
    ({"ids": [f"other-{row}" for row in range(10)]}, "ids_hash: "),
    ({"ids": ["one"]}, "rows: 1 / 10"),
    ({"fingerprint": replace(FINGERPRINT, name="other/encoder", weights="v")}, f"weights: 'v' / '{'w' * 32}'"),
]


@pytest.mark.parametrize(("changes", "message"), DIFFERENT_PLANS)
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_of_another_plan_is_refused_naming_both(
    tmp_path: Path, changes: dict[str, Any], message: str, finished: bool
) -> None:
    if finished:
        build(tmp_path, make_plan(), make_vectors())
    else:
        write_some(tmp_path, make_plan(), 0)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    plan = make_plan(**changes)
    with pytest.raises(CacheMismatchError) as caught:
        CacheWriter(tmp_path, plan)
    assert message in str(caught.value)
    assert f"expected {len(plan.ids)} rows of {plan.dim} {plan.dtype} values by the target encoder" in str(caught.value)
    assert f"{plan.fingerprint.name!r} at revision abc; got 10 rows of 4 float32 values" in str(caught.value)
    assert "by the target encoder 'some/encoder'" in str(caught.value)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before
    build(tmp_path, make_plan(), make_vectors())  # the refused writer has given the lock back


def test_an_encoder_under_another_name_goes_on_with_the_build(tmp_path: Path) -> None:
    write_some(tmp_path, make_plan(), 0)
    with CacheWriter(tmp_path, make_plan(fingerprint=replace(FINGERPRINT, name="a/copy", revision=None))) as writer:
        assert len(writer.pending_shards()) == 2


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    write_some(tmp_path, make_plan(), 0)
    flip(tmp_path / "plan.json", 8 * 30)
    with pytest.raises(CacheCorruptedError, match=r"plan.json.*delete the folder and build the cache again"):
        CacheWriter(tmp_path, make_plan())


def test_a_finished_cache_has_nothing_pending_and_is_left_as_it_is(tmp_path: Path) -> None:
    build(tmp_path, make_plan(), make_vectors())
    before = {item.name: (item.stat().st_ino, item.stat().st_mtime_ns) for item in tmp_path.iterdir()}
    with CacheWriter(tmp_path, make_plan()) as writer:
        assert writer.pending_shards() == []
        with pytest.raises(ConfigurationError, match="a pending shard"):
            writer.write_shard(0, make_vectors()[:4])
        assert torch.equal(writer.finish().read(0, 10), make_vectors())
        assert torch.equal(writer.finish().read(0, 10), make_vectors())
    assert {item.name: (item.stat().st_ino, item.stat().st_mtime_ns) for item in tmp_path.iterdir()} == before


def test_remains_of_a_killed_writer_are_removed_and_other_files_are_not(tmp_path: Path) -> None:
    write_some(tmp_path, make_plan(), 0)
    ours = ["emb-00001-of-00003.g0.safetensors.99.tmp", "ids.g0.json.1.tmp", "plan.json.1.tmp", "manifest.json.7.tmp"]
    for name in [*ours, "notes.tmp", "README.md"]:
        (tmp_path / name).write_text("x")
    build(tmp_path, make_plan(), make_vectors())
    assert {item.name for item in tmp_path.iterdir() if item.suffix != ".safetensors"} == {
        "manifest.json", "notes.tmp", "README.md",
    }  # fmt: skip


def test_an_exception_in_the_encoder_gives_the_lock_back_and_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), CacheWriter(tmp_path, make_plan()) as writer:
        writer.write_shard(0, make_vectors()[:4])
        raise RuntimeError("out of memory")
    with CacheWriter(tmp_path, make_plan()) as writer:
        assert [shard.index for shard in writer.pending_shards()] == [1, 2]


def test_default_shards_are_about_half_a_gibibyte() -> None:
    assert default_shard_rows(1024, "float32") * 1024 * 4 == 512 * 2**20
    assert default_shard_rows(2**30, "float16") == 1
