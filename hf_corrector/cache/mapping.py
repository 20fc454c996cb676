"""The files of a cache as its manifest describes them: their tensors, how they are mapped, whose rows bytes are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hf_corrector.cache.entries import DATA_START, DTYPES, ShardEntry
from hf_corrector.cache.ids import PackedIds
from hf_corrector.cache.manifest import CacheManifest, PlanRecord
from hf_corrector.cache.shard_files import TensorSpec, map_file, tensor_of


def shard_specs(plan: PlanRecord, rows: int) -> list[TensorSpec]:
    """Describe the tensors of a shard."""
    return [TensorSpec("emb", DTYPES[plan.dtype].code, (rows, plan.dim))]


def ids_specs(rows: int, total: int) -> list[TensorSpec]:
    """Describe the tensors of the file of ids; ``total`` is their length in bytes."""
    return [TensorSpec("offsets", "I64", (rows + 1,)), TensorSpec("bytes", "U8", (total,))]


def map_shard(folder: Path, manifest: CacheManifest, entry: ShardEntry) -> torch.Tensor:
    """Map a shard as ``(rows of the shard, dim)``.

    Raises:
        CacheCorruptedError: If it is not what the manifest says.
    """
    mapped = map_file(folder, entry, specs=shard_specs(manifest, entry.rows))
    return tensor_of(mapped, DTYPES[manifest.dtype].torch, rows=entry.rows, dim=manifest.dim)


def map_ids(folder: Path, entry: ShardEntry) -> PackedIds:
    """Map the file of ids.

    Raises:
        CacheCorruptedError: If it is not what the manifest says.
    """
    start = DATA_START + 8 * (entry.rows + 1)
    mapped = map_file(folder, entry, specs=ids_specs(entry.rows, entry.bytes - start))
    offsets = np.frombuffer(mapped, dtype=np.int64, count=entry.rows + 1, offset=DATA_START)
    return PackedIds(offsets, np.frombuffer(mapped, dtype=np.uint8, offset=start))


def row_namer(entry: ShardEntry, row_bytes: int) -> Callable[[int, int], str]:
    """Return what says which rows a range of bytes of a shard holds; see :func:`check_blocks`."""

    def name(start: int, stop: int) -> str:
        first = max(start - DATA_START, 0) // row_bytes
        last = max(stop - DATA_START - 1, 0) // row_bytes
        return f"{entry.file}, rows {entry.row0 + first} to {entry.row0 + last}"

    return name


def file_namer(entry: ShardEntry) -> Callable[[int, int], str]:
    """Return what names a whole file, whatever range of its bytes is asked about."""
    return lambda start, stop: entry.range_text
