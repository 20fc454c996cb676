"""Edits and overlays for child processes that can be killed; imported by them without the tests' own libraries."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_helpers import FILE_EVENTS, build, limit_file_size, make_plan, make_vectors

from hf_corrector.cache import TargetCache
from hf_corrector.cache.edits import CacheEdit, CacheEditor, edit_arrays
from hf_corrector.cache.overlay import Overlay, OverlayWriter, overlay_path
from hf_corrector.cache.row_files import hash_texts
from hf_corrector.cache.side_store import save_side
from hf_corrector.side_features import TokenCounts

STAMP = "0" * 32


def counts(rows: range) -> TokenCounts:
    return TokenCounts.from_lists([[row % 7, row % 7, row % 5] for row in rows], vocabulary=9, bigram_buckets=4)


def start_of_edit(path: Path) -> None:
    cache = build(path, make_plan(text_hashes=hash_texts("abcdefghij")), make_vectors())
    save_side(cache, counts(range(10)))


def edit_all(path: Path, count: int = 6) -> None:
    """Delete rows 2 and 4 to 7, add some in shards of two."""
    sources = np.array([0, 1, 3, 8, 9, *[-1] * count])
    names = [f"row-{row}" for row in range(len(sources))]
    hashes = hash_texts(names)
    edit = CacheEdit(ids=names, sources=sources, texts_hash="new", text_hashes=hashes, shard_rows=2)
    with CacheEditor(TargetCache.open(path), edit) as editor:
        for shard in editor.pending_shards():
            editor.write_shard(shard.index, make_vectors(count, 4)[shard.start : shard.stop])
        editor.finish(counts=counts(range(20, 20 + count)))


def edit_and_die(path: Path, at_event: int) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        named = FILE_EVENTS | {"os.link", "shutil.rmtree", "os.rmdir"}
        if event in named and isinstance(args[0], str | os.PathLike) and os.fspath(args[0]).startswith(str(path)):
            if seen == at_event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    edit_all(path)


def delete_one_by_one(path: Path) -> None:
    for row in range(30):
        edit_arrays(path, delete=[f"target-{row}"])


def append_until_killed(path: Path, acknowledged: Path) -> None:
    """Append records of random size for ever, noting on the side how long the log is after each."""
    cache, draw = TargetCache.open(path), np.random.default_rng(int(time.time() * 1e6))
    with OverlayWriter(cache) as writer, open(acknowledged, "ab", buffering=0) as note:
        step = int(Overlay.open(cache).find(np.arange(len(cache))).steps.max(initial=0))
        while True:
            step += 1
            chosen = draw.permutation(len(cache))[: draw.integers(1, 400)]
            vectors = torch.full((len(chosen), cache.dim), float(step)) + torch.from_numpy(chosen)[:, None]
            length = writer.append(chosen, vectors, stamp=STAMP, step=step)
            note.write(length.to_bytes(8, "little"))


def append_on_a_full_disk(path: Path) -> None:
    cache = TargetCache.open(path)
    with OverlayWriter(cache) as writer:
        writer.append(np.array([1]), torch.ones(1, 4), stamp=STAMP, step=1)
        length = writer.length
        limit_file_size(length + 50)
        try:
            writer.append(np.array([2]), torch.ones(1, 4), stamp=STAMP, step=2)
        except OSError:
            kept = writer.length == length == overlay_path(cache).stat().st_size
            raise SystemExit(3 if kept else 4) from None
