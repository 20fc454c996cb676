"""Small builds shared by the tests of the cache, and child processes that can be killed while they build."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch
from forking import forking_context

from hf_corrector.cache import CacheManifest, CachePlan, CacheWriter, TargetCache
from hf_corrector.cache.shard_files import digest_file
from hf_corrector.records import EncoderFingerprint

FINGERPRINT = EncoderFingerprint(
    name="some/encoder", weights="w" * 32, tokenizer="t" * 32, prompt="passage: ", max_length=128, pooling="mean",
    normalize=False, role="target", compute_dtype="float32", revision="abc",
)  # fmt: skip
FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.truncate"}


@contextmanager
def folder_in_memory(fallback: Path) -> Iterator[Path]:
    """Yield a folder where flushing costs nothing: a kill ends a process, not the power supply."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield fallback
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def make_plan(rows: int = 10, dim: int = 4, **changes: Any) -> CachePlan:
    plan = CachePlan(
        ids=[f"target-{row}" for row in range(rows)], dim=dim, dtype="float32", fingerprint=FINGERPRINT,
        texts_hash="h" * 32, shard_rows=4,
    )  # fmt: skip
    return replace(plan, **changes)


def make_vectors(rows: int = 10, dim: int = 4) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows * 1000 + dim))


def build(path: Path, plan: CachePlan, vectors: torch.Tensor) -> TargetCache:
    with CacheWriter(path, plan) as writer:
        for shard in writer.pending_shards():
            writer.write_shard(shard.index, vectors[shard.start : shard.stop])
        return writer.finish()


def contents(path: Path) -> dict[str, Any]:
    """Return all files of a finished cache; the manifest without the time at which it was written."""
    files: dict[str, Any] = {item.name: item.read_bytes() for item in path.iterdir()}
    manifest = json.loads(files["manifest.json"])
    del manifest["created"], manifest["checksum"]
    return {**files, "manifest.json": manifest}


def identities(path: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of every file that a sidecar declares finished."""
    shards = [item.with_suffix(".safetensors") for item in (*path.glob("emb-*.json"), *path.glob("ids.*.json"))]
    return {item.name: (item.stat().st_ino, item.stat().st_mtime_ns) for item in shards}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(data)


def forge(folder: Path, file: str, data: bytes) -> None:
    """Replace a file and make the manifest agree with it, as a broken or hostile writer would."""
    (folder / file).write_bytes(data)
    manifest = CacheManifest.load(folder)

    def renewed(entry: Any) -> Any:
        return digest_file(folder / file, rows=entry.rows, row0=entry.row0) if entry.file == file else entry

    changed = replace(manifest, shards=tuple(renewed(entry) for entry in manifest.shards), ids=renewed(manifest.ids))
    changed.save(folder)


def child(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """Start ``target`` in a process that has this package imported already, and no threads."""
    process = forking_context().Process(target=target, args=args)
    process.start()
    return process


def run_child(target: Callable[..., None], *args: Any) -> int:
    process = child(target, *args)
    process.join(30)
    code = process.exitcode
    process.kill()
    return -1000 if code is None else code


def build_and_die(path: Path, plan: CachePlan, vectors: torch.Tensor, at_event: int) -> None:
    """Build, and kill this process before its ``at_event``-th operation on a file of the folder."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in FILE_EVENTS and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(str(path)):
            if seen == at_event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    build(path, plan, vectors)


def limit_file_size(size: int) -> None:
    """Make every write beyond ``size`` bytes of a file fail, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
