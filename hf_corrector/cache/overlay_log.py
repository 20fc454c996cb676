"""The bytes of an overlay: a header that binds the log to its cache, then records with checksums.

::

    header   magic, format version, dim, checksum of the manifest, dtype, checksum of the header    56 bytes
    record   head: magic, format version, dim, rows, dtype, step, stamp, checksum of the head       88 bytes
             data: rows int64, vectors; padded to 8 bytes
             tail: checksum of head and data                                                         8 bytes

A record that was being written when its process died is a torn tail: the file ends before it does, or the file system
lengthened the file and zeros stand where its last bytes were to go. Anything else that is not as written is damage.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hf_corrector.cache.entries import StoredDtype
from hf_corrector.cache.manifest import CacheManifest
from hf_corrector.errors import CacheCorruptedError, CacheError, CacheMismatchError

OVERLAY_VERSION = 1
_FILE_MAGIC, _RECORD_MAGIC = b"HFCOVLAY", b"HFCORECD"
_FILE_HEAD = struct.Struct("<8sII16s8s8x")
_RECORD_HEAD = struct.Struct("<8sIIQ8sq32s8x")
_SUM = struct.Struct("<Q")
FILE_HEAD_BYTES, RECORD_HEAD_BYTES = _FILE_HEAD.size + _SUM.size, _RECORD_HEAD.size + _SUM.size
CURE = "Open it with the length a checkpoint names, or delete it: the rows of the cache itself are intact."


@dataclass(frozen=True)
class Record:
    """One intact record.

    Attributes:
        start: Byte it begins at.
        rows: Rows it holds.
        step: Step they were made at.
        stamp: Digest of the encoder that made them.
        stop: Byte behind it.
    """

    start: int
    rows: int
    step: int
    stamp: str
    stop: int

    @property
    def rows_start(self) -> int:
        """Byte its row numbers begin at."""
        return self.start + RECORD_HEAD_BYTES

    @property
    def vectors_start(self) -> int:
        """Byte its vectors begin at."""
        return self.rows_start + 8 * self.rows


def file_head(manifest: CacheManifest, kind: StoredDtype) -> bytes:
    """Return the header of a log."""
    code = kind.code.encode().ljust(8, b"\0")
    return _summed(_FILE_HEAD.pack(_FILE_MAGIC, OVERLAY_VERSION, manifest.dim, manifest.checksum.encode(), code))


def check_file_head(path: Path, manifest: CacheManifest, kind: StoredDtype) -> None:
    """Make sure that a log belongs to a cache.

    Raises:
        CacheCorruptedError: If its header is not what was written.
        CacheError: If it is of another version.
        CacheMismatchError: If it belongs to another cache.
    """
    with open(path, "rb") as handle:
        head = handle.read(FILE_HEAD_BYTES)
    if len(head) < FILE_HEAD_BYTES or not _intact(head):
        raise corrupted(path, "header", expected="its header as written", got="another")
    magic, version, dim, checksum, code = _FILE_HEAD.unpack(head[: -_SUM.size])
    if magic != _FILE_MAGIC or version != OVERLAY_VERSION:
        raise CacheError(
            str(path), expected=f"an overlay of version {OVERLAY_VERSION}", got=f"version {version}",
            cure="Open it with the version of hf_corrector that wrote it.",
        )  # fmt: skip
    wanted = (manifest.checksum, manifest.dim, kind.code)
    got = (_text(checksum), dim, _text(code))
    if got != wanted:
        raise CacheMismatchError(
            str(path), expected=f"the overlay of the cache {wanted}", got=f"that of {got}",
            cure="Delete it: it belongs to another cache.",
        )  # fmt: skip


def record_bytes(
    rows: npt.NDArray[np.int64], stored: torch.Tensor, kind: StoredDtype, *, stamp: str, step: int
) -> bytes:
    """Return a record of rows ``(n,)`` and vectors ``(n, dim)`` that have the stored dtype already."""
    dim = stored.shape[1]
    code = kind.code.encode().ljust(8, b"\0")
    head = _summed(_RECORD_HEAD.pack(_RECORD_MAGIC, OVERLAY_VERSION, dim, len(rows), code, step, stamp.encode()))
    data = rows.astype("<i8").tobytes() + stored.contiguous().view(torch.uint8).numpy().tobytes()
    return _summed(head + data.ljust(_data_bytes(len(rows), dim * kind.bytes), b"\0"))


def read_record(path: Path, view: memoryview, start: int, *, number: int, dim: int, kind: StoredDtype) -> Record | None:
    """Check the record that begins at a byte.

    Args:
        path: The log, for errors.
        view: All bytes of it that count.
        start: Where the record begins.
        number: Which record it is, for errors.
        dim: Length of a vector.
        kind: What vectors are stored in.

    Returns:
        The record, or None for a torn tail.

    Raises:
        CacheCorruptedError: If it is not what was written; names file and record.
    """
    name = f"record {number} (byte {start})"
    head = bytes(view[start : start + RECORD_HEAD_BYTES])
    if len(head) < RECORD_HEAD_BYTES or not any(view[start:]):
        return None
    if not _intact(head):
        raise corrupted(path, name, expected="its head as written", got="another")
    magic, version, its_dim, rows, code, step, stamp = _RECORD_HEAD.unpack(head[: -_SUM.size])
    if (magic, version, its_dim, _text(code)) != (_RECORD_MAGIC, OVERLAY_VERSION, dim, kind.code) or not rows:
        raise corrupted(path, name, expected=f"rows of {dim} {kind.code} values", got=f"{its_dim} {_text(code)}")
    stop = start + RECORD_HEAD_BYTES + _data_bytes(rows, dim * kind.bytes) + _SUM.size
    if stop > len(view) or (stop == len(view) and not any(view[stop - _SUM.size :])):
        return None
    if not _intact(view[start:stop]):
        raise corrupted(path, name, expected="the bytes that were written", got="others")
    return Record(start, rows, step, _text(stamp), stop)


def corrupted(path: Path, what: str, *, expected: str, got: str) -> CacheCorruptedError:
    """Return the error for a damaged log."""
    return CacheCorruptedError(f"{path}, {what}", expected=expected, got=got, cure=CURE)


def _summed(data: bytes) -> bytes:
    return data + _SUM.pack(xxhash.xxh3_64_intdigest(data))


def _intact(data: bytes | memoryview) -> bool:
    written: int = _SUM.unpack(data[-_SUM.size :])[0]
    return written == xxhash.xxh3_64_intdigest(data[: -_SUM.size])


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


def _data_bytes(rows: int, row_bytes: int) -> int:
    return -(-rows * (8 + row_bytes) // 8) * 8
