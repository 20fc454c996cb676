"""Files of tensors with a checksum for every block: written by the rules of safetensors, checked more strictly.

The header is padded, by a string in its ``__metadata__``, to exactly 4096 bytes; the data follow without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import warnings
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import xxhash

from hf_corrector._files import atomic_write, parse_json, xxh3
from hf_corrector.cache.entries import BLOCK_BYTES, DATA_START, ShardEntry
from hf_corrector.cache.sealed import REBUILD
from hf_corrector.errors import CacheCorruptedError, InputError

_SIZES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U64": 8, "I32": 4, "U16": 2, "U8": 1}


class TensorSpec(NamedTuple):
    """One tensor of a file: its name, its dtype by the code of safetensors, its shape."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * _SIZES[self.code]


def write_file(
    path: Path, specs: list[TensorSpec], *, parts: Iterable[memoryview | bytes], rows: int, row0: int
) -> ShardEntry:
    """Write tensors durably and return the entry with their checksums.

    The checksums are taken of the bytes in memory, not of the file: what the disk did to them will show.

    Args:
        path: Final name of the file; it appears there complete or not at all.
        specs: The tensors, in the order of their data.
        parts: The data of all tensors, in pieces of any length.
        rows: Rows the file holds.
        row0: Row number of its first row.

    Raises:
        OSError: If the disk refuses.
    """
    header = build_header(specs)
    hashes = _BlockHashes()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as handle:
            for part in chain([header], parts):
                handle.write(part)
                hashes.update(memoryview(part))

    atomic_write(path, write)
    return ShardEntry(
        file=path.name, rows=rows, row0=row0, bytes=hashes.total, header_xxh3=xxh3(header),
        block_bytes=BLOCK_BYTES, block_xxh3=hashes.finish(),
    )  # fmt: skip


def build_header(specs: list[TensorSpec]) -> bytes:
    """Return the first 4096 bytes of a safetensors file: length, JSON, padding."""
    described = {}
    offset = 0
    for spec in specs:
        described[spec.name] = {
            "dtype": spec.code, "shape": list(spec.shape), "data_offsets": [offset, offset + spec.bytes],
        }  # fmt: skip
        offset += spec.bytes

    def dump(pad: str) -> bytes:
        return json.dumps({"__metadata__": {"format": "pt", "pad": pad}, **described}, separators=(",", ":")).encode()

    body = dump(" " * (DATA_START - 8 - len(dump(""))))
    return len(body).to_bytes(8, "little") + body


def digest_file(path: Path, *, rows: int, row0: int) -> ShardEntry:
    """Return the entry that describes a file as it lies on the disk."""
    hashes = _BlockHashes()
    with open_regular(path) as handle:
        header = handle.read(DATA_START)
        hashes.update(memoryview(header))
        while piece := handle.read(BLOCK_BYTES):
            hashes.update(memoryview(piece))
    return ShardEntry(
        file=path.name, rows=rows, row0=row0, bytes=hashes.total, header_xxh3=xxh3(header),
        block_bytes=BLOCK_BYTES, block_xxh3=hashes.finish(),
    )  # fmt: skip


def map_file(folder: Path, entry: ShardEntry, *, specs: list[TensorSpec]) -> mmap.mmap:
    """Check size and header of a file and map it into memory.

    The mapping is private: writing into it changes this process's view and never the file. Where the system does not
    grant that, it is read-only and writing into it ends the process.

    Raises:
        CacheCorruptedError: If the file is missing, or its size or header is not what was written.
    """
    with open_regular(folder / entry.file) as handle:
        _check_size(handle, folder, entry)
        header = handle.read(DATA_START)
        if xxh3(header) != entry.header_xxh3:
            raise corrupted(folder, entry.range_text, expected="its header as written", got="another header")
        _check_header(header, specs, where=str(folder / entry.file))
        try:
            return mmap.mmap(handle.fileno(), entry.bytes, access=mmap.ACCESS_COPY)
        except OSError:
            # A mapping that may be written to counts against the memory limit of strict systems, this one does not.
            return mmap.mmap(handle.fileno(), entry.bytes, access=mmap.ACCESS_READ)


def tensor_of(mapped: mmap.mmap, dtype: torch.dtype, *, rows: int, dim: int) -> torch.Tensor:
    """View the data of a mapped file that holds one tensor ``(rows, dim)``."""
    with warnings.catch_warnings():
        # Said of a read-only mapping; that the result must not be written into is documented where it is handed out.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=dtype, count=rows * dim, offset=DATA_START).view(rows, dim)


def check_blocks(
    folder: Path,
    entry: ShardEntry,
    *,
    rows_of_bytes: Callable[[int, int], str],
    advance: Callable[[int], object],
    part: tuple[int, int] | None = None,
) -> None:
    """Compare a file with its checksums.

    The file is read, not mapped: a bad disk then ends in an exception and not in the death of the process.

    Args:
        folder: Folder of the cache.
        entry: What was written.
        rows_of_bytes: Names the file and rows that a range of its bytes belongs to, for the error.
        advance: Called with the number of bytes done.
        part: Look only at the blocks that hold these bytes, from the first to before the last; by default at all.

    Raises:
        CacheCorruptedError: At the first block that differs.
    """
    begin, end = (0, entry.bytes) if part is None else part
    first, last = begin // entry.block_bytes, -(-end // entry.block_bytes)
    with open_regular(folder / entry.file) as handle:
        _check_size(handle, folder, entry)
        handle.seek(first * entry.block_bytes)
        for index, written in enumerate(entry.block_xxh3[first:last], start=first):
            start = index * entry.block_bytes
            stop = min(start + entry.block_bytes, entry.bytes)
            found = xxh3(handle.read(entry.block_bytes))
            if found != written:
                where = f"{rows_of_bytes(start, stop)} (bytes {start} to {stop - 1})"
                raise corrupted(folder, where, expected=f"a block with checksum {written}", got=found)
            advance(stop - start)


def first_bad_row(vectors: torch.Tensor, *, nonzero: bool) -> tuple[int, str] | None:
    """Find the first row that no encoder can have meant.

    Args:
        vectors: Rows ``(n, dim)``.
        nonzero: Whether a row of norm 0 is bad too, as no vector of unit length can be.

    Returns:
        The row's position and what is wrong with it, or nothing.
    """
    # Norms answer both questions in one pass, ten times faster than looking at every element for itself.
    norms = torch.linalg.vector_norm(vectors.float(), dim=1)
    if bool(torch.isfinite(norms).all()) and not (nonzero and bool((norms == 0).any())):
        return None
    finite = torch.isfinite(vectors).all(dim=1)
    good = finite & (norms > 0) if nonzero else finite
    if bool(good.all()):
        return None
    row = int(torch.argmin(good.to(torch.uint8)))
    if bool(finite[row]):
        return row, "a norm of 0"
    return row, "NaN" if bool(torch.isnan(vectors[row]).any()) else "an infinite value"


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading, through links, as the Hub's snapshots consist of them.

    Raises:
        CacheCorruptedError: If there is none, or it is no regular file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise corrupted(path.parent, path.name, expected="a regular file", got="something else")
        return open(path, "rb")
    except FileNotFoundError:
        # Also between the two calls, where an edit removes the files of an earlier generation.
        raise corrupted(path.parent, path.name, expected="the file", got="no such file") from None


def corrupted(folder: Path, what: str, *, expected: str, got: str) -> CacheCorruptedError:
    """Return the error for a damaged part of a cache."""
    return CacheCorruptedError(f"{folder}: {what}", expected=expected, got=got, cure=REBUILD)


def _check_size(handle: BinaryIO, folder: Path, entry: ShardEntry) -> None:
    size = os.fstat(handle.fileno()).st_size
    if size != entry.bytes:
        word = "truncated" if size < entry.bytes else "extended"
        raise corrupted(folder, entry.range_text, expected=f"{entry.bytes} bytes", got=f"{size} bytes ({word})")


def _check_header(header: bytes, specs: list[TensorSpec], *, where: str) -> None:
    length = int.from_bytes(header[:8], "little")
    if length != DATA_START - 8:
        raise CacheCorruptedError(where, expected=f"a header of {DATA_START - 8} bytes", got=str(length), cure=REBUILD)
    try:
        found = parse_json(header[8:], where=where)
    except InputError as error:
        raise CacheCorruptedError(where, expected=error.expected, got=error.got, cure=REBUILD) from error
    wanted = json.loads(build_header(specs)[8:])
    del wanted["__metadata__"]
    tensors = {name: found[name] for name in found if name != "__metadata__"} if isinstance(found, dict) else found
    # The offsets of the wanted header leave no gap and end at the file's end, so equality covers overlaps and holes.
    if tensors != wanted:
        raise CacheCorruptedError(where, expected=f"the tensors {wanted}", got=str(tensors)[:500], cure=REBUILD)


class _BlockHashes:
    """Hash a stream block by block, whatever pieces it comes in."""

    def __init__(self) -> None:
        self.total = 0
        self._state = xxhash.xxh3_64()
        self._hashes: list[str] = []

    def update(self, piece: memoryview) -> None:
        while len(piece):
            taken = piece[: BLOCK_BYTES - self.total % BLOCK_BYTES]
            self._state.update(taken)
            self.total += len(taken)
            piece = piece[len(taken) :]
            if self.total % BLOCK_BYTES == 0:
                self._hashes.append(self._state.hexdigest())
                self._state.reset()

    def finish(self) -> tuple[str, ...]:
        rest = [self._state.hexdigest()] if self.total % BLOCK_BYTES else []
        return (*self._hashes, *rest)
