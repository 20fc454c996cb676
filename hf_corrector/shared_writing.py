"""Writing of rank 0 that every process of a run takes part in: one cache, one lock, one error for all."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from hf_corrector._distributed import agree, all_gather_object, is_main, on_main, rank, world_size
from hf_corrector.cache.entries import ShardRange
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import CachePlan, CacheWriter
from hf_corrector.errors import CacheError, CacheMismatchError, ConfigurationError

_T = TypeVar("_T")
# Shared file systems may show a new file to other machines late, NFS by up to a minute.
_PATIENCE_SECONDS = 90.0
_LOOK_SECONDS = 0.2


class SharedWriter:
    """The cache writer of rank 0, used by all processes as if it were their own; see :class:`CacheWriter`.

    Every method is called by all of them, and what rank 0 raises is raised by all.

    Args:
        path: Folder of the cache; rank 0 holds its lock until :meth:`close`.
        plan: What to build, the same everywhere.

    Attributes:
        pending: The shards that remain to be written.

    Raises:
        CacheMismatchError: If the folder holds a cache of another plan, or processes have different encoders or texts.
        CacheError: If another writer is at work in the folder.
    """

    def __init__(self, path: Path, plan: CachePlan) -> None:
        _check_same_plan(path, plan)
        self._path, self._plan = path, plan
        self._opened: list[CacheWriter] = []
        self.pending: list[ShardRange] = on_main("opening the folder of a cache", self._open)

    def _open(self) -> list[ShardRange]:
        self._opened.append(CacheWriter(self._path, self._plan))
        return self._opened[0].pending_shards()

    def write_shard(self, index: int, vectors: torch.Tensor) -> None:
        """Write one shard ``(rows, dim)`` durably."""
        on_main(f"writing shard {index}", lambda: self._opened[0].write_shard(index, vectors))

    def finish(self) -> TargetCache:
        """Finish the cache and return it, opened by every process.

        Raises:
            ConfigurationError: If this process does not see it.
            DistributedError: If another one does not.
        """
        finished: list[TargetCache] = []

        def finish() -> str:
            finished.append(self._opened[0].finish())
            return finished[0].manifest.checksum

        checksum = on_main("finishing a cache", finish)
        return seen_by_all(self._path, lambda: finished[0] if finished else self._reopened(checksum))

    def _reopened(self, checksum: str) -> TargetCache:
        cache = TargetCache.open(self._path, expected=self._plan.fingerprint)
        if cache.manifest.checksum != checksum:
            cure = "Choose a folder that all processes share."
            raise CacheMismatchError(str(self._path), expected="the cache rank 0 made", got="another", cure=cure)
        return cache

    def close(self) -> None:
        """Give the lock back."""
        for writer in self._opened:
            writer.close()


def _check_same_plan(path: Path, plan: CachePlan) -> None:
    """Refuse processes that would each put vectors of their own encoder, or of their own texts, into one cache."""
    plans = all_gather_object((plan.fingerprint, plan.texts_hash, plan.dtype, plan.shard_rows))
    differing = [number for number, one in enumerate(plans) if one != plans[0]]
    if differing:
        raise CacheMismatchError(
            str(path), expected="the same encoder, texts and options in all processes",
            got=f"others on rank {differing[0]} than on rank 0",
            cure="Load the same files in every process; while training, keep the models equal as DDP does.",
        )  # fmt: skip


def seen_by_all(path: Path, look: Callable[[], _T], *, patience: float = _PATIENCE_SECONDS) -> _T:
    """Open in every process what rank 0 has written.

    Args:
        path: Where it is, for the message.
        look: Opens it; any :class:`CacheError` means that it is not there.
        patience: Seconds to wait for it to show on other machines.

    Returns:
        What ``look`` returned here.

    Raises:
        ConfigurationError: If this process does not see it.
        DistributedError: If another one does not.
    """
    if world_size() == 1:
        return look()
    found: list[_T] = []
    error: Exception | None = None
    end = time.monotonic() + patience
    while not found and error is None:
        try:
            found.append(look())
        except CacheError as caught:
            if is_main() or time.monotonic() > end:
                error = caught if is_main() else _unseen(path, caught)
            else:
                time.sleep(_LOOK_SECONDS)
    agree("opening what rank 0 wrote", error)
    return found[0]


def _unseen(path: Path, error: CacheError) -> ConfigurationError:
    return ConfigurationError(
        str(path), expected="a folder that all processes share, with what rank 0 wrote",
        got=f"on rank {rank()}, machine {socket.gethostname()}: {error.got}",
        cure="Choose a folder on a file system that all machines share.",
    )  # fmt: skip
