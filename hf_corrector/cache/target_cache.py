"""Reading a cache of target embeddings: memory-mapped, without copies, checked before it is believed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_corrector._hub import PushOptions
from hf_corrector.cache.entries import DATA_START, DTYPES, ShardEntry
from hf_corrector.cache.folder_lock import locked
from hf_corrector.cache.hub_copies import fetch_cache, push_cache
from hf_corrector.cache.ids import PackedIds
from hf_corrector.cache.manifest import CacheManifest, check_fingerprint
from hf_corrector.cache.mapping import file_namer, map_ids, map_shard, row_namer
from hf_corrector.cache.row_files import map_rows, runs
from hf_corrector.cache.shard_files import check_blocks, corrupted, first_bad_row
from hf_corrector.errors import CacheCorruptedError, CacheMismatchError, ConfigurationError
from hf_corrector.records import EncoderFingerprint

_CHECKED_BYTES = 16 * 2**20
_MOST_RUNS = 64  # beyond it one gathering of rows is faster than joining the ranges between deleted rows

Vectors = torch.Tensor | npt.NDArray[Any]
Rows = torch.Tensor | npt.NDArray[np.integer[Any]]


class TargetCache:
    """An immutable array of target embeddings ``(rows, dim)`` with an id for every row.

    An edit of the folder makes another generation of the cache there; an open cache goes on showing the one it opened.

    Make one with :meth:`open` or :meth:`from_arrays`. It holds one file descriptor per shard. Pickling it sends its
    path: the other process opens the folder again and makes sure that it is the same cache.

    Args:
        path: Folder.
        manifest: Its manifest.
        shards: The mapped shards, each ``(rows of the shard, dim)``.
        ids: The mapped ids.
    """

    def __init__(self, path: Path, manifest: CacheManifest, *, shards: list[torch.Tensor], ids: PackedIds) -> None:
        self.path, self.manifest, self.ids = path, manifest, ids
        self._shards = shards
        self._places = None if manifest.places is None else map_rows(path, manifest.places, "places")
        self._texts = None if manifest.texts is None else map_rows(path, manifest.texts, "texts")
        self._starts = np.array([entry.row0 for entry in manifest.shards], dtype=np.int64)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        expected: EncoderFingerprint | None = None,
        verify: Literal["sizes", "full"] = "sizes",
    ) -> TargetCache:
        """Open a finished cache.

        Args:
            path: Folder; a snapshot folder of the Hub, full of links, is one too.
            expected: The encoder the vectors must come from.
            verify: ``"sizes"`` checks the manifest and every file's size and header, ``"full"`` every byte as well.

        Raises:
            CacheIncompleteError: If there is no finished cache.
            CacheCorruptedError: If something is not what was written; names file and rows.
            CacheMismatchError: If another encoder made the vectors; names both and what differs.
            CacheError: If the cache is of another format version or names files outside its folder.
        """
        if verify not in ("sizes", "full"):
            raise ConfigurationError("verify", expected="'sizes' or 'full'", got=repr(verify), cure="Choose one.")
        folder = Path(path)
        while True:
            manifest = CacheManifest.load(folder)
            if expected is not None:
                check_fingerprint(str(folder), expected=expected, got=manifest.fingerprint)
            try:
                shards = [map_shard(folder, manifest, entry) for entry in manifest.shards]
                cache = cls(folder, manifest, shards=shards, ids=map_ids(folder, manifest.ids))
            except CacheCorruptedError:
                # An edit that ended just now has removed files of the generation before, which the manifest named.
                if CacheManifest.load(folder) == manifest:
                    raise
                continue
            if verify == "full":
                cache.verify()
            return cache

    @classmethod
    def from_arrays(
        cls,
        path: str | Path,
        vectors: Vectors,
        ids: Iterable[str],
        *,
        fingerprint: EncoderFingerprint,
        dtype: str = "float32",
        shard_rows: int | None = None,
    ) -> TargetCache:
        """Write vectors that exist already; for large or interrupted builds see :class:`CacheWriter`.

        The texts are not known here, so a hash of the vectors stands for them in :attr:`texts_hash`. Calling it again
        with the same arguments finishes what an interrupted call began, or opens what it made.

        Args:
            path: Folder; created if need be.
            vectors: Rows ``(n, dim)``.
            ids: One for every row.
            fingerprint: The encoder the vectors come from; see :meth:`EncoderFingerprint.of_precomputed`.
            dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; vectors are rounded to it.
            shard_rows: Rows per file; about 512 MiB by default.

        Raises:
            DataError: If vectors and ids do not fit together or cannot be stored; names the row.
            CacheMismatchError: If the folder holds another cache.
        """
        # The writer returns caches, so it imports this module and not the other way round.
        from hf_corrector.cache.writer import CachePlan, CacheWriter, check_matrix, default_shard_rows, hash_vectors

        packed = PackedIds.pack(ids)
        dim = check_matrix("vectors", vectors, rows=len(packed))
        plan = CachePlan(
            ids=packed, dim=dim, dtype=dtype, fingerprint=fingerprint, texts_hash=f"vectors-{hash_vectors(vectors)}",
            shard_rows=default_shard_rows(dim, dtype) if shard_rows is None else shard_rows,
        )  # fmt: skip
        with CacheWriter(path, plan) as writer:
            for shard in writer.pending_shards():
                writer.write_shard(shard.index, vectors[shard.start : shard.stop])
            return writer.finish()

    @classmethod
    def from_hub(
        cls, repo_id: str, *, revision: str | None = None, expected: EncoderFingerprint | None = None,
        token: str | None = None,
    ) -> TargetCache:  # fmt: skip
        """Open a cache of the Hub: download what its manifest names, and check every byte of it.

        Raises:
            HubError: If there is no such cache, or the Hub cannot be reached.
            CacheError: As :meth:`open` does.
        """
        return cls.open(fetch_cache(repo_id, revision, token), expected=expected, verify="full")

    def push_to_hub(self, repo_id: str, *, options: PushOptions | None = None, **settings: Any) -> str:
        """Push it as a data set repository, in one commit; ``settings`` are fields of :class:`PushOptions`.

        What the Hub already has is not sent again; a push that was cut off is finished by the same call. Side features
        and overlays stay here. The manifest names the encoder as the cache does, one in a folder by its path.

        Returns:
            Address of the commit, or of the pull request (HubError if the Hub cannot be reached or refuses).
        """
        chosen = replace(PushOptions() if options is None else options, **settings)
        return push_cache(self.path, self.manifest, repo_id, chosen)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self.manifest.dim

    @property
    def dtype(self) -> torch.dtype:
        """What the vectors are stored in."""
        return DTYPES[self.manifest.dtype].torch

    @property
    def fingerprint(self) -> EncoderFingerprint:
        """The encoder that made the vectors."""
        return self.manifest.fingerprint

    @property
    def texts_hash(self) -> str:
        """Hash of the texts that were embedded, in row order; ``"vectors-..."`` if only the vectors were known."""
        return self.manifest.texts_hash

    @property
    def text_hashes(self) -> npt.NDArray[np.uint64] | None:
        """Hash of each row's text ``(rows,)``, see :func:`hash_texts`; None if they were not known when it was made."""
        return self._texts

    @property
    def places(self) -> npt.NDArray[np.int64] | None:
        """Which stored row each row is ``(rows,)``; None if no row was ever deleted or added."""
        return self._places

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.manifest.rows

    def __repr__(self) -> str:
        """Show where it is and what it holds."""
        return f"TargetCache({str(self.path)!r}: {self.manifest.describe()})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Send the path, never the vectors."""
        return _reopen, (str(self.path.absolute()), self.manifest.checksum)

    def rows_of(self, ids: Iterable[str]) -> npt.NDArray[np.int64]:
        """Look up the rows of ids ``(n,)``.

        Raises:
            DataError: If an id is not there.
        """
        return self.ids.rows_of(ids)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` (exclusive) as stored, ``(stop - start, dim)``.

        Inside one shard, and between deleted rows, nothing is copied: treat the result as read-only and ``clone()`` it
        before writing into it. A write never reaches the disk, but later reads of this object show it.

        Raises:
            ConfigurationError: If there are no such rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise ConfigurationError(
                "read", expected=f"0 <= start <= stop <= {len(self)}", got=f"start {start}, stop {stop}",
                cure="Ask for rows of the cache.",
            )  # fmt: skip
        if self._places is None or start == stop:
            return self._stored(start, stop)
        places = self._places[start:stop]
        ranges = runs(places)
        if len(ranges) > _MOST_RUNS:
            return self._pick(self._checked_places(places), self.dtype)
        self._checked_places(np.array(ranges).ravel() - np.tile([0, 1], len(ranges)))
        pieces = [self._stored(first, last) for first, last in ranges]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _stored(self, start: int, stop: int) -> torch.Tensor:
        """Return stored rows, deleted ones included."""
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, max(stop - 1, start), side="right")) - 1
        pieces = []
        for entry, shard in zip(self.manifest.shards[first : last + 1], self._shards[first : last + 1], strict=True):
            pieces.append(shard[max(start - entry.row0, 0) : stop - entry.row0])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def gather(self, rows: Rows) -> torch.Tensor:
        """Return a copy of any rows, in the order asked for, as float32 ``(n, dim)``.

        Args:
            rows: Row numbers, integers ``(n,)``; may repeat.

        Raises:
            ConfigurationError: If one is negative or too large; no row is ever counted from the end.
        """
        wanted = self._checked_rows(rows)
        if self._places is not None:
            wanted = self._checked_places(self._places[wanted])
        return self._pick(wanted, torch.float32)

    def _pick(self, wanted: npt.NDArray[np.int64], dtype: torch.dtype) -> torch.Tensor:
        """Return a copy of stored rows ``(n,)``."""
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        out = torch.empty((len(wanted), self.dim), dtype=dtype)
        order = np.argsort(shard_of, kind="stable")
        bounds = np.searchsorted(shard_of[order], np.arange(len(self._shards) + 1)).tolist()
        for shard, start in enumerate(self._starts.tolist()):
            places = order[bounds[shard] : bounds[shard + 1]]
            if len(places):
                found = self._shards[shard].index_select(0, torch.from_numpy(wanted[places] - start))
                first, last = int(places[0]), int(places[-1])
                if last - first + 1 == len(places):  # they ascend: one copy, which also converts
                    out[first : last + 1] = found
                else:
                    out[torch.from_numpy(places)] = found.to(dtype)
        return out

    def check_bytes(self, start: int, stop: int) -> None:
        """Compare the bytes of rows ``start`` to ``stop`` (exclusive) on the disk with their checksums.

        Raises:
            CacheCorruptedError: If they are not what was written; names file and rows.
        """
        places = np.arange(start, stop) if self._places is None else self._places[start:stop]
        width = self.manifest.row_bytes
        for entry in self.manifest.shards:
            inside = places[(places >= entry.row0) & (places < entry.row0 + entry.rows)] - entry.row0
            if len(inside):
                part = DATA_START + int(inside.min()) * width, DATA_START + (int(inside.max()) + 1) * width
                check_blocks(self.path, entry, rows_of_bytes=row_namer(entry, width), advance=lambda _: None, part=part)

    def verify(self, *, progress: bool = False) -> None:
        """Read every byte on the disk and check it, then every row and every id.

        Args:
            progress: Whether to show a progress bar.

        Raises:
            CacheCorruptedError: At the first byte, row or id that is not what was written; names file and rows.
            CacheError: As :meth:`open` does.
        """
        manifest = self.manifest
        if CacheManifest.load(self.path) != manifest:
            raise corrupted(self.path, "manifest.json", expected="what it was when opened", got="another manifest")
        total = sum(entry.bytes for entry in manifest.files)
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
            for entry in manifest.files[len(manifest.shards) :]:
                check_blocks(self.path, entry, rows_of_bytes=file_namer(entry), advance=bar.update)
            for entry in manifest.shards:
                check_blocks(self.path, entry, rows_of_bytes=row_namer(entry, manifest.row_bytes), advance=bar.update)
                self._check_rows(entry)
        self._check_ids()
        if self._places is not None and len(np.unique(self._checked_places(self._places))) < len(self):
            raise corrupted(self.path, "places", expected="another stored row for every row", got="one twice")

    def _check_rows(self, entry: ShardEntry) -> None:
        step = max(1, _CHECKED_BYTES // self.manifest.row_bytes)
        for start in range(entry.row0, entry.row0 + entry.rows, step):
            vectors = self._stored(start, min(start + step, entry.row0 + entry.rows))
            bad = first_bad_row(vectors, nonzero=self.fingerprint.normalize)
            if bad is not None:
                raise corrupted(self.path, f"{entry.file}, row {start + bad[0]}", expected="a vector", got=bad[1])

    def _check_ids(self) -> None:
        where = f"{self.path}: {self.manifest.ids.file}"
        self.ids.check(where)
        if self.ids.digest != self.manifest.ids_hash:
            wanted = f"ids with hash {self.manifest.ids_hash}"
            raise corrupted(self.path, self.manifest.ids.range_text, expected=wanted, got=self.ids.digest)

    def _checked_rows(self, rows: Rows) -> npt.NDArray[np.int64]:
        array = rows.detach().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows)
        cure = "Pass row numbers of the cache, see rows_of()."
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
            got = f"shape {array.shape} of {array.dtype}"
            raise ConfigurationError("rows", expected="integers of shape (n,)", got=got, cure=cure)
        outside = np.flatnonzero((array < 0) | (array >= len(self)))
        if len(outside):
            got = f"{array[outside[0]]} in place {outside[0]}"
            raise ConfigurationError("rows", expected=f"rows from 0 to {len(self) - 1}", got=got, cure=cure)
        return array.astype(np.int64, copy=False)

    def _checked_places(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Refuse places outside of the shards: that file is not read on opening, and may have rotted."""
        outside = np.flatnonzero((places < 0) | (places >= self.manifest.stored_rows))
        if len(outside):
            wanted = f"stored rows from 0 to {self.manifest.stored_rows - 1}"
            raise corrupted(self.path, "places", expected=wanted, got=str(places[outside[0]]))
        return places


def _reopen(path: str, checksum: str) -> TargetCache:
    cache = TargetCache.open(path)
    if cache.manifest.checksum != checksum:
        raise CacheMismatchError(
            path, expected="the cache that was there before", got=f"another one, of {cache.manifest.describe()}",
            cure="Do not replace a cache while other processes use it.",
        )  # fmt: skip
    return cache


@contextmanager
def locked_as_opened(cache: TargetCache) -> Iterator[None]:
    """Hold the lock of a cache's folder.

    Raises:
        CacheError: If someone else is writing into the folder.
        CacheMismatchError: If the folder holds another generation of the cache by now.
    """
    with locked(cache.path):
        if CacheManifest.load(cache.path) != cache.manifest:
            raise CacheMismatchError(
                str(cache.path), expected="the cache that was opened", got="another generation of it",
                cure="Open the cache again.",
            )  # fmt: skip
        yield
