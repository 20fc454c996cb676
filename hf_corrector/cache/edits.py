"""Adding and deleting rows of a finished cache without writing the others again.

An edit makes the next generation of the cache in the same folder: new rows go to new shards, the old shards stay as
they are, and a file of places says which stored row each row is. The manifest is replaced last, in one step, so the
folder holds the old cache or the new one at every instant; what the new one does not name is removed after that, and
whoever has it mapped keeps it. All vectors of a cache come from one encoder, before an edit and after it.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector._files import fsync_directory
from hf_corrector.cache.entries import ShardEntry, ShardRange
from hf_corrector.cache.folder_lock import LockHolder
from hf_corrector.cache.ids import PackedIds
from hf_corrector.cache.manifest import CacheManifest
from hf_corrector.cache.mapping import ids_specs
from hf_corrector.cache.row_files import row_file, write_rows
from hf_corrector.cache.shard_files import write_file
from hf_corrector.cache.side_store import (
    merged_counts,
    open_side,
    side_details,
    side_files,
    stored_sides,
    write_counts,
    write_dense,
)
from hf_corrector.cache.target_cache import TargetCache, Vectors, locked_as_opened
from hf_corrector.cache.writer import CachePlan, CacheWriter, check_matrix, default_shard_rows, hash_vectors
from hf_corrector.errors import CacheCorruptedError, CacheMismatchError, ConfigurationError, DataError
from hf_corrector.side_features import DenseSide, TokenCounts

_OURS = re.compile(
    r"(emb-\d+-of-\d+|ids|texts|places|side-\w+|overlay|added)\.g\d+(\.(safetensors|json|log)(\.\d+\.tmp)?)?"
    r"|manifest\.json\.\d+\.tmp"
)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CacheEdit:
    """What the next generation of a cache holds.

    Attributes:
        ids: Id of every row.
        sources: For each row, its row in the cache as it is, ascending, or -1 where it is new, ``(rows,)`` int64.
        texts_hash: Hash of all texts in row order, see :class:`CachePlan`.
        text_hashes: Hash of each row's text ``(rows,)`` uint64, or None.
        shard_rows: Rows per file of new rows.
    """

    ids: Sequence[str]
    sources: npt.NDArray[np.int64]
    texts_hash: str
    text_hashes: npt.NDArray[np.uint64] | None = None
    shard_rows: int | None = None

    @property
    def new_rows(self) -> npt.NDArray[np.int64]:
        """Rows whose vectors have to be written, ``(n,)``."""
        return np.flatnonzero(self.sources < 0)


class CacheEditor(LockHolder):
    """Make the next generation of a cache, or go on with an edit that was interrupted.

    ::

        with CacheEditor(cache, edit) as editor:
            for shard in editor.pending_shards():
                editor.write_shard(shard.index, encode(edit.new_rows[shard.start : shard.stop]))
            cache = editor.finish()

    Args:
        cache: The cache as it is; its folder is locked until :meth:`close`, :meth:`finish` or the end of the ``with``.
        edit: What to make of it.

    Raises:
        DataError: If ids are not unique, kept rows are not in their old order, or nothing remains.
        CacheError: If another writer is at work in the folder.
        CacheMismatchError: If the folder holds another generation of the cache by now.
    """

    def __init__(self, cache: TargetCache, edit: CacheEdit) -> None:
        self.cache, self.edit = cache, edit
        self._ids = PackedIds.pack(edit.ids)
        _check_sources(cache, edit, self._ids)
        self._generation = cache.manifest.generation + 1
        with ExitStack() as stack:
            stack.enter_context(locked_as_opened(cache))
            remove_unnamed(cache.path, cache.manifest, keep={self._added.name})
            self._writer = self._added_writer()
            if self._writer is not None:
                stack.push(self._writer)
            self._lock = stack.pop_all()

    @property
    def work_folder(self) -> Path:
        """A folder for whatever the edit needs meanwhile; it goes when the edit is done or another one begins."""
        return self._added

    def pending_shards(self) -> list[ShardRange]:
        """Return which of the new rows remain to be written, as ranges of :attr:`CacheEdit.new_rows`."""
        return [] if self._writer is None else self._writer.pending_shards()

    def write_shard(self, index: int, vectors: Vectors) -> None:
        """Write vectors of new rows, see :meth:`CacheWriter.write_shard`."""
        if self._writer is None:
            cure = "Write the shards that pending_shards() names."
            raise ConfigurationError(str(self.cache.path), expected="a pending shard", got=f"shard {index}", cure=cure)
        self._writer.write_shard(index, vectors)

    def finish(self, *, counts: TokenCounts | None = None) -> TargetCache:
        """Make the next generation current, remove what it does not name, give the lock back and open it.

        Side features follow their rows. Token counts are kept if those of the new rows are given, other side features
        if there are no new rows; the rest is removed, as is an overlay, which belongs to the generation before.

        Args:
            counts: Token counts of the new rows.

        Raises:
            CacheIncompleteError: If shards are missing.
        """
        if self._lock is None:
            raise ConfigurationError(
                str(self.cache.path), expected="an open editor", got="a closed one", cure="Make another."
            )
        added: tuple[ShardEntry, ...] = ()
        if self._writer is not None:
            written = self._writer.finish().manifest
            for entry in written.shards:
                _link(self._added / entry.file, self.cache.path / entry.file)
            added = written.shards
        manifest = self._next_manifest(added)
        self._move_sides(manifest, counts)
        manifest.save(self.cache.path)
        remove_unnamed(self.cache.path, manifest)
        self.close()
        return TargetCache.open(self.cache.path)

    @property
    def _added(self) -> Path:
        return self.cache.path / f"added.g{self._generation}"

    def _added_writer(self) -> CacheWriter | None:
        """Return a writer of the new rows as a small cache of their own, which a killed edit is resumed by."""
        new, old = self.edit.new_rows, self.cache.manifest
        if not len(new):
            return None
        default = default_shard_rows(old.dim, old.dtype)
        plan = CachePlan(
            ids=[self._ids[row] for row in new.tolist()], dim=old.dim, dtype=old.dtype, fingerprint=old.fingerprint,
            texts_hash=self.edit.texts_hash, generation=self._generation,
            shard_rows=default if self.edit.shard_rows is None else self.edit.shard_rows,
        )  # fmt: skip
        try:
            return CacheWriter(self._added, plan)
        except (CacheMismatchError, CacheCorruptedError):
            shutil.rmtree(self._added)  # left by another edit that was never finished
            return CacheWriter(self._added, plan)

    def _next_manifest(self, added: tuple[ShardEntry, ...]) -> CacheManifest:
        """Write the files of the next generation that are not shards and return its manifest."""
        old, edit, folder = self.cache.manifest, self.edit, self.cache.path
        kept = edit.sources >= 0
        places = np.empty(len(edit.sources), dtype=np.int64)
        old_places = self.cache.places
        places[kept] = edit.sources[kept] if old_places is None else old_places[edit.sources[kept]]
        places[~kept] = old.stored_rows + np.arange(int((~kept).sum()))
        shards, places = _without_dead_shards(_appended(old.shards, added), places)
        record = replace(
            old, generation=self._generation, rows=len(places), texts_hash=edit.texts_hash, ids_hash=self._ids.digest
        )
        ids_parts = [self._ids.offsets.data.cast("B"), self._ids.data.data]
        specs = ids_specs(len(places), len(self._ids.data))
        hashes = edit.text_hashes
        texts = row_file("texts", self._generation)
        place_file = row_file("places", self._generation)
        # Rows that were only added at the end stand where they are counted.
        moved = not np.array_equal(places, np.arange(sum(entry.rows for entry in shards)))
        return replace(
            record, shards=shards, created=int(time.time()), ancestors=old.lineage,
            ids=write_file(folder / record.ids_file, specs, parts=ids_parts, rows=len(places), row0=0),
            texts=None if hashes is None else write_rows(folder / texts, "texts", hashes),
            places=write_rows(folder / place_file, "places", places) if moved else None,
        )  # fmt: skip

    def _move_sides(self, manifest: CacheManifest, counts: TokenCounts | None) -> None:
        sources, folder, added = self.edit.sources, self.cache.path, len(self.edit.new_rows)
        for kind in stored_sides(self.cache):
            old, details = open_side(self.cache, kind), side_details(self.cache, kind)
            if isinstance(old, TokenCounts) and (counts is not None or not added):
                merged = merged_counts(old, old if counts is None else counts, sources)
                write_counts(folder, manifest, merged, details=details)
            elif isinstance(old, DenseSide) and not added:
                write_dense(folder, manifest, old, rows=sources, details=details)
            else:
                _logger.warning("The side features %r lack the new rows and are removed; store them again.", kind)


def edit_arrays(
    path: str | Path, *, delete: Iterable[str] = (), vectors: Vectors | None = None, ids: Iterable[str] = ()
) -> TargetCache:
    """Delete rows by id and add vectors that exist already; kept rows stay in their order, new ones follow.

    Args:
        path: Folder of the cache.
        delete: Ids to delete; one of them may be added again with another vector.
        vectors: New rows ``(n, dim)``, by the encoder that made the cache.
        ids: Ids of the new rows.

    Raises:
        DataError: If an id to delete is not there, an id would stand there twice, or vectors and ids do not fit.
    """
    cache, packed = TargetCache.open(path), list(ids)
    kept = np.setdiff1d(np.arange(len(cache)), cache.rows_of(delete))
    added = torch.empty(0, cache.dim) if vectors is None else vectors
    check_matrix("vectors", added, rows=len(packed))
    sources = np.concatenate([kept, np.full(len(packed), -1, dtype=np.int64)])
    names = [*(cache.ids[row] for row in kept.tolist()), *packed]
    # The texts are not known here; a hash of all that made the vectors stands for them.
    history = PackedIds.pack([cache.texts_hash, PackedIds.pack(names).digest, f"vectors-{hash_vectors(added)}"]).digest
    edit = CacheEdit(ids=names, sources=sources, texts_hash=f"vectors-{history}")
    with CacheEditor(cache, edit) as editor:
        for shard in editor.pending_shards():
            editor.write_shard(shard.index, added[shard.start : shard.stop])
        return editor.finish()


def remove_unnamed(folder: Path, manifest: CacheManifest, *, keep: Iterable[str] = ()) -> None:
    """Remove files of other generations and of unfinished edits; the caller holds the lock.

    Args:
        folder: Folder of the cache.
        manifest: What is current.
        keep: Further names to leave.
    """
    named = {entry.file for entry in manifest.files} | side_files(manifest) | set(keep)
    named.add(f"overlay.g{manifest.generation}.log")
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _check_sources(cache: TargetCache, edit: CacheEdit, ids: PackedIds) -> None:
    sources, where = edit.sources, str(cache.path)
    hashes = len(ids) if edit.text_hashes is None else len(edit.text_hashes)
    if sources.dtype != np.int64 or sources.shape != (len(ids),) or hashes != len(ids) or not len(ids):
        raise DataError(
            where, expected="one source and one hash of a text for each of one or more rows",
            got=f"{len(ids)} ids, sources {sources.shape} of {sources.dtype}, {hashes} hashes",
            cure="Keep or add at least one row.",
        )  # fmt: skip
    kept = sources[sources >= 0]
    if len(kept) and (bool((np.diff(kept) <= 0).any()) or kept[-1] >= len(cache)):
        wrong = int(np.argmax(np.diff(kept) <= 0)) if bool((np.diff(kept) <= 0).any()) else len(kept) - 1
        raise DataError(
            where, expected="kept rows in the order of the cache, once each",
            got=f"row {kept[wrong]} followed by {kept[wrong + 1 : wrong + 2].tolist()} of {len(cache)}",
            cure="Leave old targets where they are among each other, or build another cache.",
        )  # fmt: skip


def _appended(shards: tuple[ShardEntry, ...], added: tuple[ShardEntry, ...]) -> tuple[ShardEntry, ...]:
    end = sum(entry.rows for entry in shards)
    return (*shards, *(replace(entry, row0=entry.row0 + end) for entry in added))


def _without_dead_shards(
    shards: tuple[ShardEntry, ...], places: npt.NDArray[np.int64]
) -> tuple[tuple[ShardEntry, ...], npt.NDArray[np.int64]]:
    """Drop shards of which no row is left, and number the stored rows through again."""
    starts = np.array([entry.row0 for entry in shards])
    shard_of = np.searchsorted(starts, places, side="right") - 1
    alive = np.bincount(shard_of, minlength=len(shards)) > 0
    rows = np.where(alive, [entry.rows for entry in shards], 0)
    moved = np.concatenate([[0], np.cumsum(rows)[:-1]])
    kept = tuple(replace(entry, row0=int(moved[index])) for index, entry in enumerate(shards) if alive[index])
    return kept, places - (starts - moved)[shard_of]


def _link(source: Path, target: Path) -> None:
    """Give a finished file a second name in the folder of the cache, or copy it where the file system has no links."""
    target.unlink(missing_ok=True)  # left by an edit that was killed just here; no manifest names it
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        with open(target, "rb") as handle:
            os.fsync(handle.fileno())
    fsync_directory(target.parent)
