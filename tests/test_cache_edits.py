"""Adding and deleting rows: nothing kept is written again, and the folder is the old cache or the new one, always."""

from __future__ import annotations

import logging
import pickle
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import build, child, flip, folder_in_memory, make_plan, make_vectors, run_child
from edit_helpers import counts, delete_one_by_one, edit_all, edit_and_die, start_of_edit
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_corrector.cache import CacheManifest, CacheWriter, TargetCache
from hf_corrector.cache.edits import CacheEdit, CacheEditor, edit_arrays
from hf_corrector.cache.overlay import OverlayWriter
from hf_corrector.cache.row_files import hash_texts
from hf_corrector.cache.side_store import open_side, save_side, side_details, stored_sides
from hf_corrector.errors import CacheCorruptedError, CacheError, CacheMismatchError, ConfigurationError, DataError
from hf_corrector.side_features import DenseSide

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as path:
        yield path


def files(path: Path) -> dict[str, tuple[int, int]]:
    return {item.name: (item.stat().st_ino, item.stat().st_mtime_ns) for item in path.glob("emb-*.safetensors")}


def test_deleted_rows_are_gone_and_no_shard_is_touched(tmp_path: Path) -> None:
    build(tmp_path, make_plan(), make_vectors())
    before = files(tmp_path)
    cache = edit_arrays(tmp_path, delete=["target-1", "target-5", "target-6"])
    kept = [0, 2, 3, 4, 7, 8, 9]
    assert list(cache.ids) == [f"target-{row}" for row in kept]
    assert torch.equal(cache.read(0, 7), make_vectors()[kept])
    assert torch.equal(cache.gather(np.array([6, 0, 1])), make_vectors()[[9, 0, 2]])
    assert cache.rows_of(["target-7"]).tolist() == [4]
    with pytest.raises(DataError, match="'target-5'"):
        cache.rows_of(["target-5"])
    assert files(tmp_path) == before
    assert cache.manifest.generation == 1
    cache.verify()


def test_added_rows_stand_at_the_end_and_need_no_places(tmp_path: Path) -> None:
    build(tmp_path, make_plan(), make_vectors())
    before = files(tmp_path)
    cache = edit_arrays(tmp_path, vectors=make_vectors(3, 4), ids=["a", "b", "c"])
    assert torch.equal(cache.read(0, 13), torch.cat([make_vectors(), make_vectors(3, 4)]))
    assert list(cache.ids)[9:] == ["target-9", "a", "b", "c"]
    assert cache.places is None
    assert {name: files(tmp_path)[name] for name in before} == before
    new = {"emb-00000-of-00001.g1.safetensors", "ids.g1.safetensors", "manifest.json"}
    assert {item.name for item in tmp_path.iterdir()} == before.keys() | new
    cache.verify()


def test_a_row_may_be_replaced_under_its_id(tmp_path: Path) -> None:
    build(tmp_path, make_plan(), make_vectors())
    cache = edit_arrays(tmp_path, delete=["target-3"], vectors=torch.ones(1, 4), ids=["target-3"])
    assert (len(cache), cache.ids[9]) == (10, "target-3")
    assert torch.equal(cache.gather(cache.rows_of(["target-3"])), torch.ones(1, 4))


def test_a_shard_without_any_row_left_is_dropped(tmp_path: Path) -> None:
    build(tmp_path, make_plan(), make_vectors())
    cache = edit_arrays(tmp_path, delete=[f"target-{row}" for row in (1, 4, 5, 6, 7)])
    assert [entry.file[:9] for entry in cache.manifest.shards] == ["emb-00000", "emb-00002"]
    assert torch.equal(cache.read(0, 5), make_vectors()[[0, 2, 3, 8, 9]])
    assert "emb-00001-of-00003.g0.safetensors" not in files(tmp_path)
    cache.verify()


def test_reading_between_deleted_rows_copies_nothing(tmp_path: Path) -> None:
    build(tmp_path, make_plan(shard_rows=10), make_vectors())
    cache = edit_arrays(tmp_path, delete=["target-4"])
    assert cache.read(1, 4).data_ptr() == cache.read(0, 4).data_ptr() + 16
    assert cache.read(5, 8).data_ptr() == cache.read(4, 9).data_ptr() + 16
    assert torch.equal(cache.read(3, 6), make_vectors()[[3, 5, 6]])
    assert cache.read(4, 4).shape == (0, 4)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_chain_of_edits_leaves_the_rows_a_list_would_have(data: st.DataObject) -> None:
    with folder_in_memory(Path("/tmp")) as folder:
        rows, dtype = data.draw(st.integers(1, 9)), data.draw(st.sampled_from(["float32", "bfloat16"]))
        plan = make_plan(rows, 3, shard_rows=data.draw(st.integers(1, 4)), dtype=dtype)
        vectors = make_vectors(rows, 3)
        build(folder / "cache", plan, vectors)
        model = list(zip(plan.ids, vectors, strict=True))
        for number in range(data.draw(st.integers(1, 4))):
            gone = data.draw(st.sets(st.sampled_from([name for name, _ in model]), max_size=len(model)))
            count = data.draw(st.integers(0 if len(gone) < len(model) else 1, 4))
            added = make_vectors(count + 50, 3)[:count] + number
            names = [f"new-{number}-{row}" for row in range(count)]
            cache = edit_arrays(folder / "cache", delete=gone, vectors=added, ids=names)
            model = [pair for pair in model if pair[0] not in gone] + list(zip(names, added, strict=True))
            expected = torch.stack([vector for _, vector in model]).to(cache.dtype)
            assert list(cache.ids) == [name for name, _ in model]
            start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(model))] * 2)))
            assert torch.equal(cache.read(start, stop), expected[start:stop])
            wanted = data.draw(st.lists(st.integers(0, len(model) - 1), max_size=9))
            assert torch.equal(cache.gather(np.array(wanted, dtype=np.int64)), expected[wanted].float())
            cache.check_bytes(start, stop)
            cache.verify()


def test_many_scattered_deletions_are_read_alike(tmp_path: Path) -> None:
    vectors = make_vectors(1000, 8)
    build(tmp_path, make_plan(1000, 8, shard_rows=300, dtype="float16"), vectors)
    cache = edit_arrays(tmp_path, delete=[f"target-{row}" for row in range(0, 1000, 3)])
    kept = [row for row in range(1000) if row % 3]
    assert torch.equal(cache.read(0, len(cache)), vectors[kept].half())
    assert torch.equal(cache.read(10, 20), vectors[kept[10:20]].half())


def test_an_open_cache_goes_on_showing_the_generation_it_opened(tmp_path: Path) -> None:
    old = build(tmp_path, make_plan(), make_vectors())
    pickled = pickle.dumps(old)
    edit_arrays(tmp_path, delete=[f"target-{row}" for row in range(5)])
    edit_arrays(tmp_path, delete=["target-5"], vectors=torch.ones(1, 4), ids=["x"])
    assert torch.equal(old.read(0, 10), make_vectors())
    assert old.rows_of(["target-3"]).tolist() == [3]
    with pytest.raises(CacheMismatchError):
        pickle.loads(pickled)
    with pytest.raises(CacheMismatchError, match="another generation"):
        CacheEditor(old, CacheEdit(ids=["a"], sources=np.array([-1]), texts_hash="h"))


def test_an_edit_remembers_what_it_came_from(tmp_path: Path) -> None:
    first = build(tmp_path, make_plan(), make_vectors()).manifest
    second = edit_arrays(tmp_path, delete=["target-0"]).manifest
    third = edit_arrays(tmp_path, delete=["target-1"]).manifest
    assert (first.ancestors, second.ancestors) == ((), (first.checksum,))
    assert third.lineage == (first.checksum, second.checksum, third.checksum)
    assert CacheManifest.load(tmp_path) == third
    assert (first.format_version, third.format_version) == (1, 2)


def test_a_build_recognises_the_edited_cache_of_the_same_rows(tmp_path: Path) -> None:
    build(tmp_path, make_plan(), make_vectors())
    edit = CacheEdit(ids=["target-0", "new"], sources=np.array([0, -1]), texts_hash="now")
    with CacheEditor(TargetCache.open(tmp_path), edit) as editor:
        editor.write_shard(0, torch.ones(1, 4))
        editor.finish()
    plan = make_plan(ids=["target-0", "new"], texts_hash="now", shard_rows=77)
    with CacheWriter(tmp_path, plan) as writer:
        assert writer.pending_shards() == []
    with pytest.raises(CacheMismatchError, match="ids_hash"):
        CacheWriter(tmp_path, make_plan())


@pytest.mark.parametrize(
    ("ids", "sources", "message"),
    [
        (["a", "b"], [1, 0], "order of the cache"),
        (["a", "b"], [1, 1], "order of the cache"),
        (["a", "b"], [1, 10], "order of the cache"),
        (["a", "a"], [0, 1], "a different id for every row"),
        (["a"], [0, 1], "one source"),
        ([], [], "one or more rows"),
    ],
)
def test_an_edit_that_makes_no_cache_is_refused(
    tmp_path: Path, ids: list[str], sources: list[int], message: str
) -> None:
    cache = build(tmp_path, make_plan(), make_vectors())
    with pytest.raises(DataError, match=message):
        CacheEditor(cache, CacheEdit(ids=ids, sources=np.array(sources, dtype=np.int64), texts_hash="h"))
    assert TargetCache.open(tmp_path).manifest == cache.manifest


def test_there_is_one_editor_at_a_time_and_finish_is_its_last_act(tmp_path: Path) -> None:
    cache = build(tmp_path, make_plan(), make_vectors())
    edit = CacheEdit(ids=["a"], sources=np.array([0]), texts_hash="h")
    with CacheEditor(cache, edit) as editor:
        for other in (lambda: CacheEditor(cache, edit), lambda: OverlayWriter(cache)):
            with pytest.raises(CacheError, match="no other writer"):
                other()
        with pytest.raises(ConfigurationError, match="a pending shard"):
            editor.write_shard(0, torch.ones(1, 4))
        editor.finish()
        with pytest.raises(ConfigurationError, match="a closed one"):
            editor.finish()


def test_vectors_that_the_cache_could_not_hold_are_refused(tmp_path: Path) -> None:
    build(tmp_path, make_plan(), make_vectors())
    for vectors in (torch.ones(1, 5), torch.full((1, 4), float("nan"))):
        with pytest.raises(DataError):
            edit_arrays(tmp_path, vectors=vectors, ids=["x"])
    assert len(edit_arrays(tmp_path, vectors=torch.ones(1, 4), ids=["x"])) == 11


def test_places_that_rotted_are_found(tmp_path: Path) -> None:
    build(tmp_path, make_plan(), make_vectors())
    cache = edit_arrays(tmp_path, delete=["target-0"])
    flip(tmp_path / "places.g1.safetensors", 8 * (4096 + 8 * 3 + 7))
    with pytest.raises(CacheCorruptedError, match=r"places\.g1\.safetensors, rows 0 to 8"):
        cache.verify()
    again = TargetCache.open(tmp_path)
    for access in (lambda: again.read(0, 9), lambda: again.gather(np.array([3]))):
        with pytest.raises(CacheCorruptedError, match="stored rows from 0 to 9"):
            access()
    assert torch.equal(again.read(0, 3), make_vectors()[1:4])


def test_text_hashes_follow_their_rows(tmp_path: Path) -> None:
    texts = [f"text {row}" for row in range(10)]
    cache = build(tmp_path, make_plan(text_hashes=hash_texts(texts)), make_vectors())
    assert cache.text_hashes is not None and cache.text_hashes.tolist() == hash_texts(texts).tolist()
    sources, now = np.array([0, 3, -1, 9]), hash_texts(["text 0", "text 3", "new", "text 9"])
    edit = CacheEdit(ids=["a", "b", "c", "d"], sources=sources, texts_hash="h", text_hashes=now)
    with CacheEditor(cache, edit) as editor:
        editor.write_shard(0, torch.ones(1, 4))
        edited = editor.finish()
    assert edited.text_hashes is not None and edited.text_hashes.tolist() == now.tolist()
    assert edited.read(0, 4)[2].tolist() == [1.0] * 4
    with pytest.raises(ConfigurationError, match="one for every row; got 2 for 10 ids"):
        make_plan(text_hashes=hash_texts(["a", "b"]))


# ------------------------------------------------------------------------------ side features and overlay


def test_side_features_follow_their_rows(tmp_path: Path) -> None:
    cache = build(tmp_path, make_plan(), make_vectors())
    save_side(cache, counts(range(10)), details={"tokenizer": "t"})
    sources = np.array([0, -1, 2, 3, 4, -1, 8])
    names = ["a", "b", "c", "d", "e", "f", "g"]
    with CacheEditor(cache, CacheEdit(ids=names, sources=sources, texts_hash="h")) as editor:
        editor.write_shard(0, make_vectors(2, 4))
        edited = editor.finish(counts=counts(range(50, 52)))
    kept = open_side(edited, "tokens", verify="full")
    expected = torch.cat([counts(range(100)).gather(np.array([row])).to_dense() for row in (0, 50, 2, 3, 4, 51, 8)])
    assert torch.equal(kept.read(0, 7).to_dense(), expected)
    assert side_details(edited, "tokens") == {"tokenizer": "t"}
    assert not list(tmp_path.glob("side-tokens.g0.*"))


def test_side_features_without_the_new_rows_are_removed_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = build(tmp_path, make_plan(), make_vectors())
    save_side(cache, DenseSide(make_vectors(10, 3)))
    cache = edit_arrays(tmp_path, delete=["target-0"])
    assert torch.equal(open_side(cache, "matrix").read(0, 9), make_vectors(10, 3)[1:])
    with caplog.at_level(logging.WARNING):
        cache = edit_arrays(tmp_path, vectors=torch.ones(1, 4), ids=["x"])
    assert stored_sides(cache) == () and "'matrix' lack the new rows" in caplog.text


def test_an_overlay_goes_with_its_generation(tmp_path: Path) -> None:
    cache = build(tmp_path, make_plan(), make_vectors())
    with OverlayWriter(cache) as writer:
        writer.append(np.array([9]), torch.ones(1, 4), stamp="0" * 32, step=1)
    edit_arrays(tmp_path, delete=["target-0"])
    assert not list(tmp_path.glob("overlay.*"))


# ------------------------------------------------------------------------------ kills


def check_old_or_new(path: Path) -> int:
    cache = TargetCache.open(path, verify="full")
    side = open_side(cache, "tokens", verify="full")
    generation = cache.manifest.generation
    if generation == 0:
        assert torch.equal(cache.read(0, 10), make_vectors())
        assert torch.equal(side.read(0, 10).to_dense(), counts(range(10)).read(0, 10).to_dense())
    else:
        assert torch.equal(cache.read(0, 11), torch.cat([make_vectors()[[0, 1, 3, 8, 9]], make_vectors(6, 4)]))
        assert cache.text_hashes is not None and len(cache.text_hashes) == 11
        assert torch.equal(side.read(5, 11).to_dense(), counts(range(20, 26)).read(0, 6).to_dense())
    return generation


def test_an_edit_killed_before_any_of_its_file_operations_leaves_the_old_or_the_new_cache(folder: Path) -> None:
    start_of_edit(folder / "whole")
    edit_all(folder / "whole")
    expected = sorted(item.name for item in (folder / "whole").iterdir())
    generations, codes = [], []
    for event in range(300):
        path = folder / f"killed-{event}"
        start_of_edit(path)
        codes.append(run_child(edit_and_die, path, event))
        generations.append(check_old_or_new(path))
        if codes[-1] == 0:
            break
        if generations[-1] == 0:
            edit_all(path)
        else:  # the next editor sweeps up what the killed one left
            names = list(TargetCache.open(path).ids)
            edit = CacheEdit(ids=names, sources=np.arange(11), texts_hash="same")
            CacheEditor(TargetCache.open(path), edit).close()
        assert check_old_or_new(path) == 1
        assert sorted(item.name for item in path.iterdir()) == expected
    assert set(codes[:-1]) == {-9} and codes[-1] == 0
    assert event > 60
    assert generations == sorted(generations) and set(generations) == {0, 1}


def test_an_edit_killed_at_random_moments_resumes_without_redoing_shards(folder: Path) -> None:
    draw, resumed = random.Random(1), set()
    for attempt in range(40):
        path = folder / str(attempt)
        start_of_edit(path)
        process = child(edit_all, path)
        while not (path / "added.g1").exists() and process.is_alive():
            time.sleep(0.0002)
        time.sleep(draw.uniform(0, 0.015))
        process.kill()
        process.join()
        if check_old_or_new(path) == 0:
            done = {item.name: item.stat().st_ino for item in (path / "added.g1").glob("emb-*.safetensors")}
            edit_all(path)
            assert check_old_or_new(path) == 1
            kept = {item.stat().st_ino for item in path.glob("emb-*.g1.safetensors")}
            resumed.add(sum(inode in kept for inode in done.values()))
    assert len(resumed) > 1


def test_remains_of_another_edit_do_not_get_into_this_one(folder: Path) -> None:
    start_of_edit(folder)
    cache = TargetCache.open(folder)
    other = CacheEdit(ids=["x", "y"], sources=np.array([-1, -1]), texts_hash="other")
    with CacheEditor(cache, other) as editor:
        editor.write_shard(0, torch.zeros(2, 4))
    assert (folder / "added.g1").exists()
    edit_all(folder)
    assert check_old_or_new(folder) == 1


def test_a_file_of_the_old_generation_that_goes_while_opening_is_no_damage(folder: Path) -> None:
    """Open again and again while another process edits: every open sees one whole generation."""
    build(folder, make_plan(40, 4, shard_rows=2), make_vectors(40, 4))
    process, seen = child(delete_one_by_one, folder), set()
    while process.is_alive():
        cache = TargetCache.open(folder)
        first = 40 - len(cache)
        assert torch.equal(cache.read(0, len(cache)), make_vectors(40, 4)[first:])
        seen.add(first)
    process.join()
    assert process.exitcode == 0 and len(seen) > 3


def test_generations_of_a_run_and_of_edits_do_not_collide(tmp_path: Path) -> None:
    build(tmp_path, make_plan(generation=7), make_vectors())
    cache = edit_arrays(tmp_path, delete=["target-0"])
    assert cache.manifest.generation == 8
    assert replace(cache.manifest, generation=9).checksum != cache.manifest.checksum
