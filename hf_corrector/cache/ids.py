"""The string ids of all targets as two flat arrays: no Python object per row until one is asked for."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import xxhash

from hf_corrector._files import xxh3
from hf_corrector.errors import CacheCorruptedError, ConfigurationError, DataError

_ITERATION_ROWS = 8192


class PackedIds(Sequence[str]):
    """Ids in row order, UTF-8, one after the other.

    Args:
        offsets: Where each id starts in ``data``, and where the last one ends, int64 ``(n + 1,)``.
        data: The bytes of all ids, uint8 ``(total,)``; may be mapped from a file.
        hash_bytes: Hash the lookup is built on; equal hashes of different ids cost time and nothing else.
    """

    def __init__(
        self,
        offsets: npt.NDArray[np.int64],
        data: npt.NDArray[np.uint8],
        *,
        hash_bytes: Callable[[memoryview], int] = xxhash.xxh3_64_intdigest,
    ) -> None:
        self.offsets, self.data = offsets, data
        self._view = data.data
        self._hash_bytes = hash_bytes
        self._lookup: tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]] | None = None

    @classmethod
    def pack(cls, ids: Iterable[str]) -> PackedIds:
        """Pack strings.

        Raises:
            DataError: If one is empty, no string or no valid Unicode, or two are equal; names the rows.
        """
        if isinstance(ids, PackedIds):
            return ids
        _refuse_string(ids)
        data, ends = bytearray(), array("q", [0])
        for row, name in enumerate(ids):
            data += _encoded(name, row)
            ends.append(len(data))
        packed = cls(np.frombuffer(ends, dtype=np.int64), np.frombuffer(data, dtype=np.uint8))
        twice = packed.first_duplicate()
        packed._lookup = None  # 16 bytes per row that a long build has no use for
        if twice is not None:
            raise DataError(
                "ids", expected="a different id for every row",
                got=f"{packed[twice[0]]!r} in row {twice[0]} and in row {twice[1]}",
                cure="Remove one of the two targets, or rename it.",
            )  # fmt: skip
        return packed

    def __len__(self) -> int:
        """Return the number of ids."""
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one id, or a list of them for a slice; a row that does not exist raises IndexError."""
        rows = range(len(self))[index]
        if isinstance(rows, range):
            return [_decoded(self._bytes(row), row) for row in rows]
        return _decoded(self._bytes(rows), rows)

    def __iter__(self) -> Iterator[str]:
        """Walk through all ids."""
        for row, piece in enumerate(self._pieces()):
            yield _decoded(piece, row)

    def __repr__(self) -> str:
        """Show the first few."""
        shown = ", ".join(repr(name) for name in self[:3])
        return f"PackedIds({len(self)} ids: {shown}{', ...' if len(self) > 3 else ''})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the bytes themselves: whoever wants to reopen a file pickles the cache instead."""
        return PackedIds, (np.array(self.offsets), np.array(self.data))

    @property
    def digest(self) -> str:
        """Hash of all ids and their order, 32 hexadecimal digits."""
        return xxh3(self.offsets.data.cast("B")) + xxh3(self._view)

    def rows_of(self, ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """Look up the rows of ids ``(n,)``; the first call hashes all ids of the cache, 16 bytes each.

        Raises:
            DataError: If an id is not there.
        """
        names = ids if isinstance(ids, Sequence) else list(ids)
        found = self.find(names)
        missing = np.flatnonzero(found < 0)
        if len(missing):
            raise DataError(
                "ids", expected=f"ids among the {len(self)} of the cache", got=repr(names[int(missing[0])]),
                cure="Check that the queries' judgements and the cache belong to the same corpus.",
            )  # fmt: skip
        return found

    def find(self, ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """Look up the rows of ids ``(n,)``, -1 for those that are not there; see :meth:`rows_of`."""
        _refuse_string(ids)
        encoded = [_encoded(name, place) for place, name in enumerate(ids)]
        hashes, rows = self._hashed()
        wanted = np.fromiter((self._hash_bytes(memoryview(name)) for name in encoded), dtype=np.uint64)
        first = np.searchsorted(hashes, wanted).tolist()
        found = (self._match(name, place, hashes, rows) for name, place in zip(encoded, first, strict=True))
        return np.fromiter(found, dtype=np.int64, count=len(encoded))

    def first_duplicate(self) -> tuple[int, int] | None:
        """Return the rows of the first id that stands there twice."""
        hashes, rows = self._hashed()
        equal = np.flatnonzero(hashes[1:] == hashes[:-1])
        seen: dict[bytes, int] = {}
        for row in np.unique(np.concatenate([rows[equal], rows[equal + 1]])).tolist():
            earlier = seen.setdefault(self._bytes(row), row)
            if earlier != row:
                return earlier, row
        return None

    def check(self, where: str) -> None:
        """Make sure that the arrays are what :meth:`pack` makes.

        Raises:
            CacheCorruptedError: If they are not; names ``where`` and the row.
        """
        cure = "Build the cache again."
        lengths = np.diff(self.offsets)
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.data) or bool((lengths <= 0).any()):
            row = int(np.argmin(lengths > 0))
            raise CacheCorruptedError(f"{where}, row {row}", expected="ids that are not empty", got="none", cure=cure)
        for _ in self:
            pass  # decoding each is the check
        twice = self.first_duplicate()
        if twice is not None:
            got = f"{self[twice[0]]!r} in both"
            where = f"{where}, rows {twice[0]} and {twice[1]}"
            raise CacheCorruptedError(where, expected="different ids", got=got, cure=cure)

    def _bytes(self, row: int) -> bytes:
        return bytes(self._view[self.offsets[row] : self.offsets[row + 1]])

    def _pieces(self) -> Iterator[memoryview]:
        for first in range(0, len(self), _ITERATION_ROWS):
            bounds = self.offsets[first : first + _ITERATION_ROWS + 1].tolist()
            for start, stop in pairwise(bounds):
                yield self._view[start:stop]

    def _hashed(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """Return all hashes, sorted, and the row of each; equal hashes stand in row order."""
        if self._lookup is None:
            found = (self._hash_bytes(piece) for piece in self._pieces())
            hashes = np.fromiter(found, dtype=np.uint64, count=len(self))
            rows = np.argsort(hashes, kind="stable")
            self._lookup = hashes[rows], rows
        return self._lookup

    def _match(self, name: bytes, place: int, hashes: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]) -> int:
        if place == len(hashes):
            return -1
        wanted = hashes[place]
        while place < len(hashes) and hashes[place] == wanted:
            row = int(rows[place])
            if self._bytes(row) == name:
                return row
            place += 1
        return -1


def _decoded(piece: bytes | memoryview, row: int) -> str:
    try:
        return str(piece, "utf-8")
    except UnicodeDecodeError as error:
        raise CacheCorruptedError(
            f"ids, row {row}", expected="UTF-8", got=str(error), cure="Build the cache again."
        ) from error


def _refuse_string(ids: Iterable[str]) -> None:
    # A string is a sequence of strings too, and "17" would be taken for the ids "1" and "7".
    if isinstance(ids, str):
        raise ConfigurationError("ids", expected="a sequence of strings", got=repr(ids), cure="Put it into a list.")


def _encoded(name: object, row: int) -> bytes:
    if not isinstance(name, str) or not name:
        got = "an empty string" if name == "" else f"{name!r} of type {type(name).__name__}"
        cure = "Give every target an id, for instance str(row)."
        raise DataError(f"ids, row {row}", expected="a string that is not empty", got=got, cure=cure)
    try:
        return name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"ids, row {row}", expected="valid Unicode", got=repr(name), cure="Remove the lone surrogates."
        ) from error
