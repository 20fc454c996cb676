"""A build may be killed at any instant: what is finished stays, and the result is that of an uninterrupted build."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cache_helpers import (
    build,
    build_and_die,
    child,
    contents,
    folder_in_memory,
    identities,
    limit_file_size,
    make_plan,
    make_vectors,
    run_child,
)

from hf_corrector.cache import CacheManifest, CachePlan, CacheWriter, TargetCache
from hf_corrector.errors import CacheIncompleteError


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as path:
        yield path


def resume_and_compare(path: Path, plan: CachePlan, vectors: torch.Tensor, *, expected: dict[str, object]) -> int:
    """Resume a killed build; return how many finished shards it had."""
    if (path / "manifest.json").exists():
        TargetCache.open(path, verify="full")  # whoever sees a manifest sees a whole cache
    else:
        with pytest.raises(CacheIncompleteError):
            TargetCache.open(path)
    before = identities(path)
    with CacheWriter(path, plan) as writer:
        pending = {f"emb-{shard.index:05d}" for shard in writer.pending_shards()}
        assert not pending & {name[:9] for name in before}
    cache = build(path, plan, vectors)
    after = {name: ((path / name).stat().st_ino, (path / name).stat().st_mtime_ns) for name in before}
    assert after == before
    assert contents(path) == expected
    cache.verify()
    return sum(name.startswith("emb-") for name in before)


def test_a_build_killed_before_any_of_its_file_operations_resumes(folder: Path) -> None:
    plan, vectors = make_plan(), make_vectors()
    build(folder / "whole", plan, vectors)
    expected = contents(folder / "whole")
    finished = set()
    for event in range(300):
        path = folder / f"killed-{event}"
        code = run_child(build_and_die, path, plan, vectors, event)
        if code == 0:
            break
        assert code == -9
        finished.add(resume_and_compare(path, plan, vectors, expected=expected))
    assert code == 0
    assert event > 50
    assert finished == {0, 1, 2, 3}  # the kills fell into every stage


def test_a_build_killed_at_random_moments_resumes(folder: Path) -> None:
    rows, dim = 3000, 128
    plan, vectors = make_plan(rows, dim, shard_rows=125), make_vectors(rows, dim)
    build(folder / "whole", plan, vectors)
    expected = contents(folder / "whole")
    draw = random.Random(0)
    seconds = 0.1
    kept: list[int] = []
    for attempt in range(200):
        if len(kept) == 24:
            break
        path = folder / f"killed-{attempt}"
        process = child(build, path, plan, vectors)
        while not (path / "plan.json").exists() and process.is_alive():
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, seconds))
        process.kill()
        process.join()
        if (path / "plan.json").exists():
            kept.append(resume_and_compare(path, plan, vectors, expected=expected))
        else:  # it was done already: wait less on this machine
            seconds *= 0.8
    assert len(kept) == 24
    assert len(set(kept)) > 5  # the kills are spread over the build


def test_a_build_killed_again_and_again_gets_done(folder: Path) -> None:
    plan, vectors = make_plan(), make_vectors()
    build(folder / "whole", plan, vectors)
    codes = [run_child(build_and_die, folder / "killed", plan, vectors, 25) for _ in range(12)]
    assert codes[0] == -9
    assert codes[-1] == 0
    assert codes == sorted(codes)
    assert contents(folder / "killed") == contents(folder / "whole")


def write_until_the_disk_is_full(path: Path, plan: CachePlan, vectors: torch.Tensor) -> None:
    with CacheWriter(path, plan) as writer:
        writer.write_shard(0, vectors[:500])
        limit_file_size(100_000)
        try:
            writer.write_shard(1, vectors[500:1000])
        except OSError:
            raise SystemExit(3) from None


def replace_manifest_on_a_full_disk(path: Path) -> None:
    manifest = CacheManifest.load(path)
    limit_file_size(100)
    try:
        manifest.save(path)
    except OSError:
        raise SystemExit(3) from None


def test_a_full_disk_loses_nothing_that_was_finished(folder: Path) -> None:
    rows, dim = 1000, 128
    plan, vectors = make_plan(rows, dim, shard_rows=500), make_vectors(rows, dim)
    build(folder / "whole", plan, vectors)
    path = folder / "full"
    assert run_child(write_until_the_disk_is_full, path, plan, vectors) == 3
    assert not list(path.glob("*.tmp"))
    assert resume_and_compare(path, plan, vectors, expected=contents(folder / "whole")) == 1


def test_a_full_disk_leaves_a_finished_cache_readable(folder: Path) -> None:
    cache = build(folder / "cache", make_plan(), make_vectors())
    before = contents(folder / "cache")
    assert run_child(replace_manifest_on_a_full_disk, folder / "cache") == 3
    assert contents(folder / "cache") == before
    cache.verify()
    TargetCache.open(folder / "cache", verify="full")
