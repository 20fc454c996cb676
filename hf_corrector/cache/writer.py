"""Building a cache so that it survives being killed at any instant, by one writer at a time.

Files appear under their final names complete or not at all. A finished file gets a sidecar with its checksums; a later
writer with the same plan keeps files that still agree with their sidecars and makes the others. The manifest is last.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hf_corrector._files import make_directory
from hf_corrector.cache.entries import ShardEntry, ShardRange, stored_dtype
from hf_corrector.cache.folder_lock import LockHolder, locked
from hf_corrector.cache.ids import PackedIds
from hf_corrector.cache.manifest import MANIFEST_FILE, PLAN_FILE, CacheManifest, PlanRecord
from hf_corrector.cache.mapping import ids_specs, shard_specs
from hf_corrector.cache.row_files import row_file, write_rows
from hf_corrector.cache.sealed import FORMAT_VERSION, read_sealed, write_sealed
from hf_corrector.cache.shard_files import digest_file, first_bad_row, write_file
from hf_corrector.cache.target_cache import TargetCache, Vectors
from hf_corrector.errors import (
    CacheError,
    CacheIncompleteError,
    CacheMismatchError,
    ConfigurationError,
    DataError,
)
from hf_corrector.records import EncoderFingerprint

SHARD_BYTES = 512 * 2**20
_CHUNK_BYTES = 4 * 2**20
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachePlan:
    """What a build will make.

    Attributes:
        ids: One for every row, all different.
        dim: Length of a vector.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; vectors are rounded to it.
        fingerprint: The encoder.
        texts_hash: Hash of the texts in row order, see :func:`hf_corrector._files.hash_strings`.
        shard_rows: Rows per file, see :func:`default_shard_rows`; a killed build loses at most one such file.
        generation: Part of every file name.
        text_hashes: Hash of each row's text ``(rows,)``, see :func:`hash_texts`; by them a later edit of the cache
            notices texts that changed under the same id.
    """

    ids: Sequence[str]
    dim: int
    dtype: str
    fingerprint: EncoderFingerprint
    texts_hash: str
    shard_rows: int
    generation: int = 0
    text_hashes: npt.NDArray[np.uint64] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without looking at the ids.

        Raises:
            ConfigurationError: If a value is out of range.
        """
        for name, least in (("dim", 1), ("shard_rows", 1), ("generation", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigurationError(
                    f"CachePlan.{name}", expected=f"an integer of {least} or more", got=repr(value), cure="Correct it."
                )
        stored_dtype(self.dtype)
        if not self.texts_hash:
            cure = "Pass hash_strings(texts), so that no build mixes two corpora."
            raise ConfigurationError("CachePlan.texts_hash", expected="a hash", got=repr(self.texts_hash), cure=cure)
        if len(self.ids) == 0:
            raise ConfigurationError("CachePlan.ids", expected="at least one row", got="none", cure="Add targets.")
        if self.text_hashes is not None and len(self.text_hashes) != len(self.ids):
            got = f"{len(self.text_hashes)} for {len(self.ids)} ids"
            cure = "Pass hash_texts(texts)."
            raise ConfigurationError("CachePlan.text_hashes", expected="one for every row", got=got, cure=cure)


class CacheWriter(LockHolder):
    """Build a cache in a folder, or go on with a build that was interrupted.

    ::

        with CacheWriter(path, plan) as writer:
            for shard in writer.pending_shards():
                writer.write_shard(shard.index, encode(texts[shard.start : shard.stop]))
            cache = writer.finish()

    Args:
        path: Folder; created if need be. Locked until :meth:`close`, :meth:`finish` or the end of the ``with`` block.
        plan: What to build.

    Raises:
        DataError: If ids are empty or not unique; names the rows.
        CacheError: If another writer is at work in the folder.
        CacheMismatchError: If the folder holds a cache, finished or not, of another plan; names both.
        CacheCorruptedError: If the folder's plan or manifest is damaged.
        OSError: If the disk refuses.
    """

    def __init__(self, path: str | Path, plan: CachePlan) -> None:
        self.path, self.plan = Path(path), plan
        self._ids = PackedIds.pack(plan.ids)
        shared = {name: getattr(plan, name) for name in _SHARED_FIELDS}
        self._record = PlanRecord(rows=len(self._ids), ids_hash=self._ids.digest, **shared)
        self._ranges = self._record.ranges()
        self._entries: dict[int, ShardEntry] = {}
        if self.path.exists() and not self.path.is_dir():
            raise ConfigurationError(str(path), expected="a folder", got="a file", cure="Choose another path.")
        make_directory(self.path)
        with ExitStack() as stack:
            stack.enter_context(locked(self.path))
            self._remove_temporary_files()
            finished = self._finished_manifest()
            self._finished = finished is not None
            if finished is None:
                self._go_on()
                self._ids_entry, self._texts_entry = self._write_ids(), self._write_texts()
            # From here on close() gives the lock back; before, any exception does.
            self._lock = stack.pop_all()

    def pending_shards(self) -> list[ShardRange]:
        """Return the shards that remain to be written."""
        return [] if self._finished else [item for item in self._ranges if item.index not in self._entries]

    def write_shard(self, index: int, vectors: Vectors) -> None:
        """Write one shard durably.

        Args:
            index: A shard of :meth:`pending_shards`; any order will do.
            vectors: Its rows ``(stop - start, dim)``, of any float type, on any device.

        Raises:
            ConfigurationError: If that shard is not pending.
            DataError: If the shape is wrong, or a row is NaN, infinite, too large for the dtype, or zero where the
                encoder normalises; names file and row. Nothing is written then.
            OSError: If the disk refuses; earlier shards are safe and the build can be resumed.
        """
        shard = self._pending(index)
        check_matrix(self._record.shard_file(index), vectors, rows=shard.rows)
        self.write_pieces(index, [vectors])

    def write_pieces(self, index: int, pieces: Iterable[Vectors]) -> None:
        """Write one shard durably from vectors that come some rows at a time, none of which are kept.

        Args:
            index: A shard of :meth:`pending_shards`; any order will do.
            pieces: Its rows in order, each piece ``(n, dim)``; asked for while the shard is written.

        Raises:
            ConfigurationError: If that shard is not pending.
            DataError: As :meth:`write_shard`; also if the pieces hold another number of rows. Nothing is written then.
            OSError: If the disk refuses.
        """
        shard = self._pending(index)
        file = self._record.shard_file(index)
        entry = write_file(
            self.path / file, shard_specs(self._record, shard.rows), parts=self._stored_shard(file, pieces, shard),
            rows=shard.rows, row0=shard.start,
        )  # fmt: skip
        self._write_sidecar(entry)
        self._entries[index] = entry

    def _pending(self, index: int) -> ShardRange:
        if self._lock is None or index not in {item.index for item in self.pending_shards()}:
            got = "a closed writer" if self._lock is None else f"shard {index}, which is not"
            cure = "Write the shards that pending_shards() names, once each."
            raise ConfigurationError(str(self.path), expected="a pending shard", got=got, cure=cure)
        return self._ranges[index]

    def finish(self) -> TargetCache:
        """Write the manifest, remove what only the build needed, give the lock back and open the cache.

        Raises:
            CacheIncompleteError: If shards are missing.
        """
        pending = self.pending_shards()
        if pending:
            raise CacheIncompleteError(
                str(self.path), expected=f"{len(self._ranges)} shards",
                got=f"{len(pending)} of them missing, the first is {self._record.shard_file(pending[0].index)}",
                cure="Write every shard that pending_shards() names.",
            )  # fmt: skip
        if self._lock is None:
            return TargetCache.open(self.path, expected=self.plan.fingerprint)
        if not self._finished:
            record = {item.name: getattr(self._record, item.name) for item in fields(PlanRecord)}
            entries = tuple(self._entries[item.index] for item in self._ranges)
            CacheManifest(
                **record, shards=entries, ids=self._ids_entry, texts=self._texts_entry, created=int(time.time())
            ).save(self.path)
            self._finished = True
            self._remove_build_files()
        self.close()
        return TargetCache.open(self.path, expected=self.plan.fingerprint)

    def _finished_manifest(self) -> CacheManifest | None:
        if not (self.path / MANIFEST_FILE).exists():
            return None
        manifest = CacheManifest.load(self.path)
        self._check_plan(manifest)
        self._remove_build_files()
        return manifest

    def _go_on(self) -> None:
        """Begin a build, or collect what an earlier one of the same plan has finished."""
        plan_path = self.path / PLAN_FILE
        if plan_path.exists():
            self._check_plan(PlanRecord.from_dict(read_sealed(plan_path), where=str(plan_path)))
        else:
            write_sealed(plan_path, self._record.to_dict())
        for shard in self._ranges:
            entry = self._kept(self._record.shard_file(shard.index), rows=shard.rows, row0=shard.start)
            if entry is not None:
                self._entries[shard.index] = entry

    def _check_plan(self, theirs: PlanRecord) -> None:
        record = self._record
        if isinstance(theirs, CacheManifest) and theirs.ancestors:
            # Each edit made another generation of the same cache, and cut what it added into shards as it liked.
            record = replace(record, generation=theirs.generation, shard_rows=theirs.shard_rows)
        differing = record.differences(theirs)
        if differing:
            raise CacheMismatchError(
                str(self.path), expected=self._record.describe(),
                got=f"{theirs.describe()}, which differ in (expected / got) {'; '.join(differing)}",
                cure="Choose another folder, or delete this one to build it anew.",
            )  # fmt: skip

    def _write_ids(self) -> ShardEntry:
        """Write the ids before any vector: a disk that is read-only or full shows before the expensive part."""
        rows, file = len(self._ids), self._record.ids_file
        entry = self._kept(file, rows=rows, row0=0)
        if entry is None:
            parts = [self._ids.offsets.data.cast("B"), self._ids.data.data]
            specs = ids_specs(rows, len(self._ids.data))
            entry = write_file(self.path / file, specs, parts=parts, rows=rows, row0=0)
            self._write_sidecar(entry)
        return entry

    def _write_texts(self) -> ShardEntry | None:
        if self.plan.text_hashes is None:
            return None
        file = row_file("texts", self.plan.generation)
        entry = self._kept(file, rows=len(self._ids), row0=0)
        if entry is None:
            entry = write_rows(self.path / file, "texts", self.plan.text_hashes)
            self._write_sidecar(entry)
        return entry

    def _stored_shard(self, file: str, pieces: Iterable[Vectors], shard: ShardRange) -> Iterator[memoryview]:
        row = shard.start
        for vectors in pieces:
            if check_matrix(file, vectors, rows=len(vectors)) != self.plan.dim:
                got = f"vectors of length {vectors.shape[1]}"
                cure = "Encode with the encoder the plan was made for."
                raise DataError(file, expected=f"vectors of length {self.plan.dim}", got=got, cure=cure)
            yield from self._stored_pieces(file, vectors, row)
            row += len(vectors)
        if row != shard.stop:
            cure = "Pass one vector for every id."
            raise DataError(file, expected=f"{shard.rows} rows", got=str(row - shard.start), cure=cure)

    def _stored_pieces(self, file: str, vectors: Vectors, row0: int) -> Iterator[memoryview]:
        """Convert a few rows at a time, so that no second copy of a shard is needed."""
        step = max(1, _CHUNK_BYTES // (4 * self.plan.dim))
        for start in range(0, len(vectors), step):
            given = _as_tensor(vectors[start : start + step])
            self._refuse_bad_row(file, given, row0 + start, given)
            stored = given.to(stored_dtype(self.plan.dtype).torch).contiguous()
            if stored is not given:
                self._refuse_bad_row(file, stored, row0 + start, given)
            yield stored.view(torch.uint8).numpy().data.cast("B")

    def _refuse_bad_row(self, file: str, vectors: torch.Tensor, row0: int, given: torch.Tensor) -> None:
        bad = first_bad_row(vectors, nonzero=self.plan.fingerprint.normalize)
        if bad is None:
            return
        row, problem = row0 + bad[0], bad[1]
        where = f"{file}, row {row} (id {self._ids[row]!r})"
        if vectors is not given:
            got = f"{problem} after rounding; its largest value is {float(given[bad[0]].abs().max()):g}"
            cure = "Choose the dtype 'bfloat16' or 'float32'."
            raise DataError(where, expected=f"a vector that fits into {self.plan.dtype}", got=got, cure=cure)
        unit = " of unit length" if self.plan.fingerprint.normalize else ""
        cure = "Look at the text of this target and at the encoder's output for it."
        raise DataError(where, expected=f"a finite vector{unit}", got=problem, cure=cure)

    def _write_sidecar(self, entry: ShardEntry) -> None:
        content = {"format_version": FORMAT_VERSION, "plan": self._record.digest, "entry": entry.to_dict()}
        write_sealed(_sidecar(self.path / entry.file), content)

    def _kept(self, file: str, *, rows: int, row0: int) -> ShardEntry | None:
        """Return the entry of a file that an earlier build of this very plan finished and that is still intact."""
        sidecar = _sidecar(self.path / file)
        if not sidecar.exists():
            return None
        try:
            content = read_sealed(sidecar)
            found = digest_file(self.path / file, rows=rows, row0=row0)
        except CacheError as error:
            _logger.warning("%s is written again: %s", file, error)
            return None
        if content.get("plan") != self._record.digest or content.get("entry") != found.to_dict():
            _logger.warning("%s is written again: it does not agree with its checksums.", file)
            return None
        return found

    def _remove_temporary_files(self) -> None:
        for pattern in ("emb-*.tmp", "ids.*.tmp", "texts.*.tmp", f"{PLAN_FILE}.*.tmp", f"{MANIFEST_FILE}.*.tmp"):
            for path in self.path.glob(pattern):
                path.unlink()

    def _remove_build_files(self) -> None:
        for index in range(len(self._ranges)):
            _sidecar(self.path / self._record.shard_file(index)).unlink(missing_ok=True)
        for file in (self._record.ids_file, row_file("texts", self.plan.generation)):
            _sidecar(self.path / file).unlink(missing_ok=True)
        (self.path / PLAN_FILE).unlink(missing_ok=True)


_SHARED_FIELDS = tuple(item.name for item in fields(CachePlan) if item.name not in ("ids", "text_hashes"))


def default_shard_rows(dim: int, dtype: str) -> int:
    """Return how many rows make a file of about 512 MiB."""
    return max(1, SHARD_BYTES // (dim * stored_dtype(dtype).bytes))


def check_matrix(where: str, vectors: Vectors, *, rows: int) -> int:
    """Return the length of the vectors ``(rows, dim)``.

    Raises:
        DataError: If it is no such matrix of floats.
    """
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    good = vectors.dtype in floats if isinstance(vectors, torch.Tensor) else vectors.dtype in _NUMPY_FLOATS
    shape = tuple(vectors.shape)
    if not good or len(shape) != 2 or shape[0] != rows or shape[1] == 0:
        raise DataError(
            where, expected=f"floats of shape ({rows}, dim)", got=f"{vectors.dtype} of shape {shape}",
            cure="Pass one vector for every id, as float32 for instance.",
        )  # fmt: skip
    return int(shape[1])


def hash_vectors(vectors: Vectors) -> str:
    """Hash rows ``(n, dim)`` as they are given, 32 hexadecimal digits."""
    state = xxhash.xxh3_128(f"{vectors.dtype} {tuple(vectors.shape)}".encode())
    step = max(1, _CHUNK_BYTES // (4 * vectors.shape[1]))
    for start in range(0, len(vectors), step):
        state.update(_as_tensor(vectors[start : start + step]).contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


_NUMPY_FLOATS = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16))


def _as_tensor(vectors: torch.Tensor | npt.NDArray[Any]) -> torch.Tensor:
    if isinstance(vectors, torch.Tensor):
        return vectors.detach().cpu()
    return torch.from_numpy(np.array(vectors))  # a copy: the array may be read-only or run backwards


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")
