"""The overlay of a cache: an append-only log of re-encoded rows beside the immutable shards.

``overlay.g0.log`` begins with a header that binds it to the manifest of its cache; every record after it holds some
rows with their vectors, the stamp of the encoder that made them and the step. :mod:`~hf_corrector.cache.overlay_log`
says how.

A length in bytes names a state of the log: reading less of it is rolling back. A record that was being written when its
process died is a torn tail; it was never acknowledged, so it is ignored by readers and cut by the next writer.
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector._files import atomic_write
from hf_corrector.cache.entries import DTYPES
from hf_corrector.cache.folder_lock import LockHolder
from hf_corrector.cache.overlay_log import (
    FILE_HEAD_BYTES,
    Record,
    check_file_head,
    corrupted,
    file_head,
    read_record,
    record_bytes,
)
from hf_corrector.cache.shard_files import first_bad_row
from hf_corrector.cache.target_cache import TargetCache, locked_as_opened
from hf_corrector.errors import ConfigurationError, DataError


@dataclass(frozen=True, eq=False)
class OverlayEntries:
    """What an overlay knows of some rows, see :meth:`Overlay.find`; the latest record of each row.

    Attributes:
        positions: Where the found rows stand among those asked for, ascending, ``(n,)`` int64.
        stamps: Fingerprint digest of the encoder that made each vector, ``(n,)`` strings.
        steps: Training step each was made at, ``(n,)`` int64.
        places: Where their vectors are, for :meth:`Overlay.vectors`, ``(n,)`` int64.
    """

    positions: npt.NDArray[np.int64]
    stamps: npt.NDArray[np.str_]
    steps: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return how many rows were found."""
        return len(self.positions)

    def select(self, mask: npt.NDArray[np.bool_]) -> OverlayEntries:
        """Return those where ``mask (n,)`` holds."""
        return OverlayEntries(self.positions[mask], self.stamps[mask], self.steps[mask], self.places[mask])


class Overlay:
    """Re-encoded rows of a cache, memory-mapped; made with :meth:`open` or by an :class:`OverlayWriter`.

    In memory there are the rows it has and their places, 16 bytes each, and one small object per record.

    Args:
        cache: The cache it lies beside.
        length: Bytes of the log to see; all that were finished if not given.

    Attributes:
        manifest: Manifest of the cache.
        length: Bytes of the log that are seen; what a checkpoint names beside the generation.
    """

    def __init__(self, cache: TargetCache, *, length: int | None = None) -> None:
        self.manifest, self.path = cache.manifest, overlay_path(cache)
        self.dim, self._kind = cache.dim, DTYPES[cache.manifest.dtype]
        self._records: list[Record] = []
        self._indexed = 0
        self._map: mmap.mmap | None = None
        self._rows = self._places = self._starts = self._steps = np.zeros(0, dtype=np.int64)
        self._stamps: npt.NDArray[np.str_] = np.zeros(0, dtype="U32")
        self.length = 0
        if not self.path.exists():
            if length:
                raise corrupted(self.path, "overlay", expected=f"{length} bytes", got="no such file")
            return
        self._read_on(length)
        self._index()

    @classmethod
    def open(cls, cache: TargetCache, *, length: int | None = None) -> Overlay:
        """Open the overlay of a cache for reading; a cache without one has an empty one.

        Args:
            cache: The cache.
            length: See only so many bytes, as a checkpoint names them: later records are as if never written.

        Raises:
            CacheCorruptedError: If something before the torn tail is not what was written, or the log is shorter than
                ``length`` or has no record that ends there; names file and record.
            CacheMismatchError: If it belongs to another cache.
        """
        return cls(cache, length=length)

    def __len__(self) -> int:
        """Return how many rows it has."""
        self._index()
        return len(self._rows)

    @property
    def stamps(self) -> set[str]:
        """Digests of all encoders that made records, superseded ones included."""
        return {record.stamp for record in self._records}

    def refresh(self) -> None:
        """Read what a writer has appended since."""
        if self.path.exists():
            self._read_on(None)

    def find(self, rows: npt.NDArray[np.int64]) -> OverlayEntries:
        """Look up rows ``(n,)``; those the overlay does not have are left out."""
        self._index()
        if not len(self._rows):
            none = np.zeros(0, dtype=np.int64)
            return OverlayEntries(none, np.zeros(0, dtype="U32"), none, none)
        nearest = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        positions = np.flatnonzero(self._rows[nearest] == rows)
        places = self._places[nearest[positions]]
        records = self._record_of(places)
        return OverlayEntries(positions, self._stamps[records], self._steps[records], places)

    def vectors(self, entries: OverlayEntries) -> torch.Tensor:
        """Return a copy of the vectors of found rows, ``(n, dim)`` float32."""
        out = torch.empty(len(entries), self.dim)
        records = self._record_of(entries.places)
        for number in np.unique(records).tolist():
            mine = np.flatnonzero(records == number)
            record = self._records[number]
            place = entries.places[mine] - record.rows_start
            out[torch.from_numpy(mine)] = self._matrix(record)[torch.from_numpy(place // 8)].float()
        return out

    def _record_of(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._starts, places, side="right") - 1

    def _matrix(self, record: Record) -> torch.Tensor:
        if self._map is None:
            raise corrupted(self.path, "overlay", expected="a mapped file", got="none")
        count = record.rows * self.dim
        flat = torch.frombuffer(self._map, dtype=self._kind.torch, count=count, offset=record.vectors_start)
        return flat.view(record.rows, self.dim)

    def _read_on(self, length: int | None) -> None:
        """Map the file and check the records behind :attr:`length`."""
        if not self.length:
            check_file_head(self.path, self.manifest, self._kind)
            self.length = FILE_HEAD_BYTES
        size = self.path.stat().st_size
        if length is not None and length > size:
            raise corrupted(self.path, "overlay", expected=f"{length} bytes", got=f"{size} bytes (truncated)")
        if size > self.length:
            with open(self.path, "rb") as handle:
                # Private, as torch warns of buffers it could not write to; nothing is ever written through it.
                self._map = mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_COPY)
            view = memoryview(self._map)[: size if length is None else length]
            while self.length < len(view):
                number = len(self._records)
                record = read_record(self.path, view, self.length, number=number, dim=self.dim, kind=self._kind)
                if record is None:
                    break
                self._records.append(record)
                self.length = record.stop
        if length is not None and self.length != length:
            raise corrupted(
                self.path, f"record {len(self._records)}", expected=f"a record that ends at byte {length}",
                got=f"none; the last whole one ends at {self.length}",
            )  # fmt: skip

    def _index(self) -> None:
        """Find the places of the rows of new records; of several places of a row the last one stays."""
        records = self._records[self._indexed :]
        if not records or self._map is None:
            return
        self._indexed = len(self._records)
        # Once for new records, not once for every lookup: a long training run appends many.
        self._starts = np.append(self._starts, [record.start for record in records])
        self._steps = np.append(self._steps, [record.step for record in records])
        self._stamps = np.append(self._stamps, [record.stamp for record in records])
        rows, places = [self._rows], [self._places]
        for record in records:
            rows.append(np.frombuffer(self._map, np.int64, record.rows, record.rows_start))
            # The byte of a row's number tells record and position in it, whatever the size of a vector.
            places.append(record.rows_start + 8 * np.arange(record.rows))
        every, where = np.concatenate(rows)[::-1], np.concatenate(places)[::-1]
        self._rows, last = np.unique(every, return_index=True)
        self._places = where[last]
        if not 0 <= self._rows[0] <= self._rows[-1] < self.manifest.rows:
            got = f"{self._rows[0]} to {self._rows[-1]}"
            raise corrupted(self.path, "rows", expected=f"rows from 0 to {self.manifest.rows - 1}", got=got)


class OverlayWriter(LockHolder):
    """Append re-encoded rows to the overlay of a cache, durably; one writer at a time.

    ::

        with OverlayWriter(cache) as writer:
            length = writer.append(rows, vectors, stamp=fingerprint.digest, step=120)

    Args:
        cache: The cache; its folder is locked until :meth:`close` or the end of the ``with`` block.
        length: Go back to this length first, as a checkpoint names it; by default only a torn tail is cut.

    Raises:
        CacheError: If someone else is writing into the folder.
        CacheMismatchError: If the folder holds another generation of the cache by now.
        CacheCorruptedError: As :meth:`Overlay.open`.

    Attributes:
        overlay: The log as it is, this writer's records included.
    """

    def __init__(self, cache: TargetCache, *, length: int | None = None) -> None:
        with ExitStack() as stack:
            stack.enter_context(locked_as_opened(cache))
            self.overlay = self._started(cache, length)
            self._handle = stack.enter_context(open(self.overlay.path, "r+b", buffering=0))
            os.ftruncate(self._handle.fileno(), self.overlay.length)
            os.fsync(self._handle.fileno())
            self._lock = stack.pop_all()

    @property
    def length(self) -> int:
        """Bytes that are on the disk, for a checkpoint."""
        return self.overlay.length

    def append(self, rows: npt.NDArray[np.int64], vectors: torch.Tensor, *, stamp: str, step: int) -> int:
        """Append one record; when this returns, it survives a power loss.

        Args:
            rows: Rows of the cache ``(n,)``; where one stands twice, the last counts.
            vectors: Their vectors ``(n, dim)``, rounded to the type the cache stores.
            stamp: Fingerprint digest of the encoder that made them, 32 hexadecimal digits.
            step: Training step they were made at.

        Returns:
            The length of the log.

        Raises:
            DataError: If rows, vectors or stamp are none; nothing is written then.
            OSError: If the disk refuses; the log is as it was.
        """
        overlay = self.overlay
        if self._lock is None:
            cure = "Make another writer."
            raise ConfigurationError(str(overlay.path), expected="an open writer", got="a closed one", cure=cure)
        _check_record(overlay, rows, vectors, stamp)
        if not len(rows):
            return overlay.length
        kind = DTYPES[overlay.manifest.dtype]
        stored = vectors.detach().cpu().to(kind.torch)
        bad = first_bad_row(stored, nonzero=overlay.manifest.fingerprint.normalize)
        if bad is not None:
            where = f"{overlay.path.name}, row {rows[bad[0]]}"
            raise DataError(where, expected="a finite vector", got=bad[1], cure="Look at the encoder's output for it.")
        self._write(record_bytes(rows, stored, kind, stamp=stamp, step=step))
        overlay.refresh()
        return overlay.length

    def _write(self, record: bytes) -> None:
        start, view = self.overlay.length, memoryview(record)
        try:
            self._handle.seek(start)
            while view:
                view = view[self._handle.write(view) :]
            os.fsync(self._handle.fileno())
        except OSError:
            os.ftruncate(self._handle.fileno(), start)
            raise

    @staticmethod
    def _started(cache: TargetCache, length: int | None) -> Overlay:
        path = overlay_path(cache)
        if not path.exists():
            head = file_head(cache.manifest, DTYPES[cache.manifest.dtype])
            atomic_write(path, lambda temporary: _write_bytes(temporary, head))
        return Overlay.open(cache, length=length)


def overlay_path(cache: TargetCache) -> Path:
    """Return where the overlay of a cache's generation is."""
    return cache.path / f"overlay.g{cache.manifest.generation}.log"


def _check_record(overlay: Overlay, rows: npt.NDArray[np.int64], vectors: torch.Tensor, stamp: str) -> None:
    good = rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer) and vectors.shape == (len(rows), overlay.dim)
    if not good or not vectors.is_floating_point():
        raise DataError(
            overlay.path.name, expected=f"rows (n,) and vectors (n, {overlay.dim})",
            got=f"{rows.shape} of {rows.dtype} and {tuple(vectors.shape)} of {vectors.dtype}",
            cure="Pass one vector for every row.",
        )  # fmt: skip
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < overlay.manifest.rows:
        got = f"{rows.min()} to {rows.max()}"
        raise DataError(
            overlay.path.name, expected=f"rows from 0 to {overlay.manifest.rows - 1}", got=got, cure="Check them."
        )
    if len(stamp) != 32 or not set(stamp) <= set("0123456789abcdef"):
        cure = "Pass EncoderFingerprint.digest."
        raise DataError(overlay.path.name, expected="32 hexadecimal digits", got=repr(stamp), cure=cure)


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
