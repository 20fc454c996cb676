"""Bridge between cache and corrector: write the corrected vectors of a whole cache into another one, shard by shard."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from tqdm.auto import tqdm

from hf_corrector._files import hash_strings
from hf_corrector.cache.entries import ShardRange
from hf_corrector.cache.manifest import check_fingerprint, describe_encoder
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import CachePlan, CacheWriter
from hf_corrector.errors import CacheCorruptedError, CacheMismatchError, ConfigurationError
from hf_corrector.models.configuration_corrector import CorrectorConfig
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.towers import hash_modules
from hf_corrector.records import EncoderFingerprint
from hf_corrector.side_features import SideFeatures

# Large enough that a product of matrices runs at full speed, small enough that what follows it hits the same caches.
DEFAULT_CHUNK_ROWS = 2048
DEFAULT_SHARD_ROWS = 65_536
_NO_PART_OF_THE_MAP = ("model_type", "fit_summary", "stale_encoder", "fresh_encoder", "direction")
_AHEAD = 2
Item = TypeVar("Item")


@dataclass(frozen=True)
class ApplyOptions:
    """How a corrected cache is written.

    Attributes:
        cache_dtype: Type the rows are stored in; by default that of the cache they come from.
        device: Where to correct; the corrector is moved there, and back in the end.
        shard_rows: Rows of a shard; a run that was killed starts again at the last unfinished shard.
        chunk_rows: Rows corrected at a time.
        verify: Whether to compare what is read with its checksums, so that no damage gets a checksum of its own.
        reembedded: Vectors of some of the targets by the new encoder itself; they are taken instead of corrected ones.
        progress: Whether to show a progress bar.
    """

    cache_dtype: str | None = None
    device: str = "cpu"
    shard_rows: int = DEFAULT_SHARD_ROWS
    chunk_rows: int = DEFAULT_CHUNK_ROWS
    verify: bool = True
    reembedded: TargetCache | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        for name in ("shard_rows", "chunk_rows"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    name, expected="at least 1", got=str(getattr(self, name)), cure="Leave it out, or raise it."
                )


def write_corrected(
    corrector: CorrectorModel,
    cache: TargetCache,
    path: str | Path,
    *,
    encoder: EncoderFingerprint,
    side: SideFeatures | None = None,
    options: ApplyOptions | None = None,
) -> TargetCache:
    """Correct all vectors of a cache into another cache, or finish that where an earlier call was killed.

    The new cache says that its vectors are corrected ones: whoever needs vectors of the encoder itself refuses it, and
    whoever compares queries with targets takes it, see :func:`check_comparable`.

    Args:
        corrector: Leads from the cache's vectors to ``encoder``.
        cache: The older vectors; only read.
        path: Folder of the new cache.
        encoder: Target encoder the corrector leads to.
        side: Side features of the targets, for a corrector that reads some.
        options: How to write.

    Raises:
        ConfigurationError: If corrector, cache, side features and encoder do not fit together.
        CacheMismatchError: If ``path`` holds another cache, or part of one.
        CacheCorruptedError: If a byte of the older cache is not what was written; names file and rows.
        DataError: If a corrected row is NaN, infinite or, where the encoder normalises, zero; names the row.
    """
    options = ApplyOptions() if options is None else options
    check_applicable(corrector, cache, encoder, side=side)
    plan = CachePlan(
        ids=cache.ids, dim=int(corrector.config.output_dim or 0), texts_hash=cache.texts_hash,
        dtype=cache.manifest.dtype if options.cache_dtype is None else options.cache_dtype,
        fingerprint=_made_of(options.reembedded, corrected_fingerprint(corrector, cache, encoder, side=side)),
        shard_rows=options.shard_rows,
        text_hashes=cache.text_hashes,
    )  # fmt: skip
    fresh = _FreshRows.of(options.reembedded, cache, encoder)
    with CacheWriter(path, plan) as writer, _moved(corrector, options.device):
        pending = writer.pending_shards()
        with tqdm(
            total=len(cache), initial=len(cache) - sum(shard.rows for shard in pending), desc="correct targets",
            unit="row", disable=not options.progress,
        ) as bar:  # fmt: skip
            for shard in pending:
                chunks = map(fresh.put_into, _corrected_chunks(corrector, cache, side, shard=shard, options=options))
                writer.write_pieces(shard.index, _counted(_ahead(chunks), bar))
        _check_conserved(cache, writer.path)
        return writer.finish()


class _FreshRows:
    """Rows that need no correction.

    Args:
        rows: Row of each fresh vector in the older cache, ascending, ``(m,)``.
        source: The vectors, or None.
        places: Place of each in ``source``, ``(m,)``.
    """

    def __init__(self, rows: npt.NDArray[np.int64], source: TargetCache | None, places: npt.NDArray[np.int64]) -> None:
        self.rows, self.source, self.places = rows, source, places

    @classmethod
    def of(cls, source: TargetCache | None, cache: TargetCache, encoder: EncoderFingerprint) -> _FreshRows:
        """Find the rows of re-encoded targets (CacheMismatchError if another encoder made them)."""
        if source is None:
            none = np.zeros(0, dtype=np.int64)
            return cls(none, None, none)
        expected = replace(encoder, compute_dtype=source.fingerprint.compute_dtype)
        check_fingerprint(str(source.path), expected=expected, got=source.fingerprint)
        rows = cache.rows_of(source.ids)
        order = np.argsort(rows)
        return cls(rows[order], source, order)

    def put_into(self, chunk: tuple[int, torch.Tensor]) -> torch.Tensor:
        """Overwrite those of the corrected rows from a first row on, ``(n, dim)``, that are there fresh."""
        start, corrected = chunk
        begin, end = np.searchsorted(self.rows, [start, start + len(corrected)])
        if self.source is not None and end > begin:
            corrected[torch.from_numpy(self.rows[begin:end] - start)] = self.source.gather(self.places[begin:end])
        return corrected


def _made_of(reembedded: TargetCache | None, made_by: EncoderFingerprint) -> EncoderFingerprint:
    """Return who made vectors of which some were encoded: two such caches are the same only if these rows are."""
    if reembedded is None:
        return made_by
    return replace(made_by, corrected_from=hash_strings([str(made_by.corrected_from), reembedded.manifest.checksum]))


@contextmanager
def _moved(corrector: CorrectorModel, device: str) -> Iterator[None]:
    """Compute elsewhere for a while: whoever lent the corrector finds it where it was."""
    module: torch.nn.Module = corrector
    before = corrector.fitted_pairs.device
    module.to(device)
    try:
        yield
    finally:
        module.to(before)


def check_applicable(
    corrector: CorrectorModel, cache: TargetCache, encoder: EncoderFingerprint, *, side: SideFeatures | None
) -> None:
    """Refuse what cannot make vectors of that encoder out of that cache.

    Raises:
        ConfigurationError: If sizes, side features, role or normalisation do not fit, or nothing would be corrected.
        CacheMismatchError: If the cache holds corrected vectors already, or the corrector says that it leads between
            other encoders; names both.
    """
    config, where = corrector.config, "corrected cache"
    if config.input_dim != cache.dim or config.kind == "identity":
        raise ConfigurationError(
            where, expected=f"a corrector of vectors of size {cache.dim} that moves them",
            got=f"one of kind {config.kind!r} for size {config.input_dim}",
            cure="Use the corrector that was fitted to this cache; unmoved vectors are not those of another encoder.",
        )  # fmt: skip
    if encoder.role != "target" or encoder.corrected_from is not None:
        raise ConfigurationError(
            where, expected="the fingerprint of a target encoder", got=describe_encoder(encoder),
            cure="Pass model.fingerprint('target').",
        )  # fmt: skip
    if encoder.normalize and not config.normalize_output:
        raise ConfigurationError(
            where, expected=f"vectors of unit length, as {describe_encoder(encoder)} makes them",
            got="a corrector that does not normalise", cure="Fit one with normalize_output=True.",
        )  # fmt: skip
    _check_side(corrector, side, rows=len(cache))
    if cache.fingerprint.corrected_from is not None:
        raise CacheMismatchError(
            str(cache.path), expected="vectors an encoder made", got="corrected ones",
            cure="Correct the cache they came from, whose errors do not add up.",
        )  # fmt: skip
    if config.stale_encoder is not None:
        corrector.check_encoders(f"corrector for {cache.path}", stale=cache.fingerprint, fresh=encoder)


def corrected_fingerprint(
    corrector: CorrectorModel, cache: TargetCache, encoder: EncoderFingerprint, *, side: SideFeatures | None = None
) -> EncoderFingerprint:
    """Return who made the corrected vectors of a cache: the new encoder's fingerprint with ``corrected_from`` set."""
    made_of = [cache.fingerprint.digest, hash_corrector(corrector)]
    return replace(encoder, corrected_from=hash_strings(made_of if side is None else [*made_of, hash_side(side)]))


def hash_corrector(corrector: CorrectorModel) -> str:
    """Hash weights and configuration of a corrector, 32 hexadecimal digits; equal ones move vectors equally."""
    names = [name for name in CorrectorConfig.__annotations__ if name not in _NO_PART_OF_THE_MAP]
    settings = [f"{name}={getattr(corrector.config, name)!r}" for name in sorted(names)]
    return hash_strings([hash_modules([corrector]), *settings])


def hash_side(side: SideFeatures) -> str:
    """Hash side features, 32 hexadecimal digits; reads all of them."""
    state = xxhash.xxh3_128(f"{side.kind} {side.width} {len(side)}".encode())
    for start in range(0, len(side), DEFAULT_CHUNK_ROWS):
        rows = side.read(start, min(start + DEFAULT_CHUNK_ROWS, len(side)))
        sparse = rows.layout == torch.sparse_csr
        parts = (rows.crow_indices(), rows.col_indices(), rows.values()) if sparse else (rows,)
        for part in parts:
            state.update(part.contiguous().view(torch.uint8).numpy().data)
    return state.hexdigest()


def check_comparable(cache: TargetCache, encoder: EncoderFingerprint) -> bool:
    """Make sure that queries of an encoder may be compared with the vectors of a cache, whatever arithmetic was used.

    Args:
        cache: The cache.
        encoder: The encoder's fingerprint for targets.

    Returns:
        Whether the vectors are corrected ones rather than the encoder's own.

    Raises:
        CacheMismatchError: If the vectors neither are the encoder's nor were corrected towards it; names both.
    """
    theirs = cache.fingerprint
    check_fingerprint(
        str(cache.path), got=theirs,
        expected=replace(encoder, compute_dtype=theirs.compute_dtype, corrected_from=theirs.corrected_from),
    )  # fmt: skip
    return theirs.corrected_from is not None


def _check_conserved(cache: TargetCache, path: Path) -> None:
    """Before a new cache becomes one: its rows are as many, and their ids those written beside the old vectors."""
    if cache.ids.digest != cache.manifest.ids_hash or len(cache.ids) != len(cache):
        raise CacheCorruptedError(
            f"{cache.path}: {cache.manifest.ids.file}", expected=f"ids with hash {cache.manifest.ids_hash}",
            got=cache.ids.digest, cure=f"Restore the file from its source, and delete {path}.",
        )  # fmt: skip


def _check_side(corrector: CorrectorModel, side: SideFeatures | None, *, rows: int) -> None:
    wanted = side_kind(corrector)
    found = None if side is None else side.kind
    if wanted != found or (side is not None and len(side) != rows):
        raise ConfigurationError(
            "corrected cache", expected=f"side features of kind {wanted!r} for {rows} targets",
            got=f"{found!r}" if side is None else f"{found!r} for {len(side)}",
            cure="Pass what the corrector was fitted with, see open_side().",
        )  # fmt: skip


def side_kind(corrector: CorrectorModel) -> str | None:
    """Return which side features a corrector reads, or None."""
    return corrector.config.side


def _corrected_chunks(
    corrector: CorrectorModel, cache: TargetCache, side: SideFeatures | None, *, shard: ShardRange,
    options: ApplyOptions,
) -> Iterator[tuple[int, torch.Tensor]]:  # fmt: skip
    device = torch.device(options.device)
    for start in range(shard.start, shard.stop, options.chunk_rows):
        stop = min(start + options.chunk_rows, shard.stop)
        if options.verify:
            cache.check_bytes(start, stop)
        stale = cache.read(start, stop).to(device, torch.float32)
        read = None if side is None else side.read(start, stop).to(device)
        yield start, _correct(corrector, stale, read).cpu()


@torch.no_grad()
def _correct(corrector: CorrectorModel, stale: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
    corrected: torch.Tensor = corrector(stale) if side is None else corrector(stale, side)
    return corrected


def _counted(pieces: Iterable[torch.Tensor], bar: tqdm) -> Iterator[torch.Tensor]:
    for piece in pieces:
        yield piece
        bar.update(len(piece))


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield items that a thread works out while the earlier ones are being written."""
    waiting: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(entry: tuple[Item | None, BaseException | None]) -> None:
        while not stopped.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stopped.is_set():
                    return
            put((None, None))
        except BaseException as error:  # raised again by the thread that waits
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stopped.set()
        thread.join()
