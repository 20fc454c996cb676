"""One number for every row: the hash of its text, and the place of its vector in the shards."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from hf_corrector.cache.entries import DATA_START, ShardEntry
from hf_corrector.cache.shard_files import TensorSpec, map_file, write_file

_CODES = {"texts": ("U64", np.uint64), "places": ("I64", np.int64)}


def hash_texts(texts: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Hash every text for itself, ``(n,)``: what tells a changed text under the same id."""
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass")) for text in texts), dtype=np.uint64
    )


def row_file(name: str, generation: int) -> str:
    """Name the file of ``"texts"`` or ``"places"``."""
    return f"{name}.g{generation}.safetensors"


def write_rows(path: Path, name: str, numbers: npt.NDArray[Any]) -> ShardEntry:
    """Write ``"texts"`` or ``"places"`` ``(n,)`` durably."""
    code, dtype = _CODES[name]
    data = np.ascontiguousarray(numbers, dtype=dtype)
    specs = [TensorSpec(name, code, (len(data),))]
    return write_file(path, specs, parts=[data.data.cast("B")], rows=len(data), row0=0)


def map_rows(folder: Path, entry: ShardEntry, name: str) -> npt.NDArray[Any]:
    """Map ``"texts"`` or ``"places"`` into memory, ``(n,)``.

    Raises:
        CacheCorruptedError: If the file is missing, or its size or header is not what was written.
    """
    code, dtype = _CODES[name]
    mapped = map_file(folder, entry, specs=[TensorSpec(name, code, (entry.rows,))])
    return np.frombuffer(mapped, dtype=dtype, count=entry.rows, offset=DATA_START)


def runs(places: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Cut places ``(n,)`` into the fewest ranges ``(start, stop)`` of neighbours, in their order."""
    if not len(places):
        return []
    cuts = np.flatnonzero(np.diff(places) != 1) + 1
    firsts, lasts = places[np.concatenate([[0], cuts])], places[np.concatenate([cuts - 1, [len(places) - 1]])]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))
