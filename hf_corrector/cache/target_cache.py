"""Reading a cache of target embeddings: memory-mapped, without copies, checked before it is believed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_corrector.cache.ids import PackedIds
from hf_corrector.cache.manifest import DATA_START, DTYPES, CacheManifest, PlanRecord, ShardEntry, check_fingerprint
from hf_corrector.cache.shard_files import TensorSpec, check_blocks, corrupted, first_bad_row, map_file, tensor_of
from hf_corrector.errors import CacheMismatchError, ConfigurationError
from hf_corrector.records import EncoderFingerprint

_CHECKED_BYTES = 16 * 2**20

Vectors = torch.Tensor | npt.NDArray[Any]
Rows = torch.Tensor | npt.NDArray[np.integer[Any]]


class TargetCache:
    """An immutable array of target embeddings ``(rows, dim)`` with an id for every row.

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
        manifest = CacheManifest.load(folder)
        if expected is not None:
            check_fingerprint(str(folder), expected=expected, got=manifest.fingerprint)
        shards = [_map_shard(folder, manifest, entry) for entry in manifest.shards]
        cache = cls(folder, manifest, shards=shards, ids=_map_ids(folder, manifest.ids))
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

        Inside one shard nothing is copied: treat the result as read-only and ``clone()`` it before writing into it. A
        write never reaches the disk, but later reads of this object show it.

        Raises:
            ConfigurationError: If there are no such rows.
        """
        if not 0 <= start <= stop <= len(self):
            raise ConfigurationError(
                "read", expected=f"0 <= start <= stop <= {len(self)}", got=f"start {start}, stop {stop}",
                cure="Ask for rows of the cache.",
            )  # fmt: skip
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
        shard_of = np.searchsorted(self._starts, wanted, side="right") - 1
        out = torch.empty((len(wanted), self.dim), dtype=torch.float32)
        order = np.argsort(shard_of, kind="stable")
        bounds = np.searchsorted(shard_of[order], np.arange(len(self._shards) + 1)).tolist()
        for shard, start in enumerate(self._starts.tolist()):
            places = order[bounds[shard] : bounds[shard + 1]]
            if len(places):
                local = torch.from_numpy(wanted[places] - start)
                out[torch.from_numpy(places)] = self._shards[shard].index_select(0, local).float()
        return out

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
        total = sum(entry.bytes for entry in (*manifest.shards, manifest.ids))
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
            check_blocks(self.path, manifest.ids, rows_of_bytes=lambda *_: manifest.ids.range_text, advance=bar.update)
            for entry in manifest.shards:
                check_blocks(self.path, entry, rows_of_bytes=_row_namer(entry, manifest.row_bytes), advance=bar.update)
                self._check_rows(entry)
        self._check_ids()

    def _check_rows(self, entry: ShardEntry) -> None:
        step = max(1, _CHECKED_BYTES // self.manifest.row_bytes)
        for start in range(entry.row0, entry.row0 + entry.rows, step):
            vectors = self.read(start, min(start + step, entry.row0 + entry.rows))
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


def shard_specs(plan: PlanRecord, rows: int) -> list[TensorSpec]:
    """Describe the tensors of a shard."""
    return [TensorSpec("emb", DTYPES[plan.dtype].code, (rows, plan.dim))]


def ids_specs(rows: int, total: int) -> list[TensorSpec]:
    """Describe the tensors of the file of ids; ``total`` is their length in bytes."""
    return [TensorSpec("offsets", "I64", (rows + 1,)), TensorSpec("bytes", "U8", (total,))]


def _map_shard(folder: Path, manifest: CacheManifest, entry: ShardEntry) -> torch.Tensor:
    mapped = map_file(folder, entry, specs=shard_specs(manifest, entry.rows))
    return tensor_of(mapped, DTYPES[manifest.dtype].torch, rows=entry.rows, dim=manifest.dim)


def _map_ids(folder: Path, entry: ShardEntry) -> PackedIds:
    start = DATA_START + 8 * (entry.rows + 1)
    mapped = map_file(folder, entry, specs=ids_specs(entry.rows, entry.bytes - start))
    offsets = np.frombuffer(mapped, dtype=np.int64, count=entry.rows + 1, offset=DATA_START)
    return PackedIds(offsets, np.frombuffer(mapped, dtype=np.uint8, offset=start))


def _row_namer(entry: ShardEntry, row_bytes: int) -> Callable[[int, int], str]:
    def name(start: int, stop: int) -> str:
        first = max(start - DATA_START, 0) // row_bytes
        last = max(stop - DATA_START - 1, 0) // row_bytes
        return f"{entry.file}, rows {entry.row0 + first} to {entry.row0 + last}"

    return name


def _reopen(path: str, checksum: str) -> TargetCache:
    cache = TargetCache.open(path)
    if cache.manifest.checksum != checksum:
        raise CacheMismatchError(
            path, expected="the cache that was there before", got=f"another one, of {cache.manifest.describe()}",
            cure="Do not replace a cache while other processes use it.",
        )  # fmt: skip
    return cache
