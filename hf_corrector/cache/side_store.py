"""Side features kept beside the vectors of a cache: written once, checksummed, memory-mapped when opened.

For each kind there are two files of the cache's generation: ``side-tokens.g0.safetensors`` with the arrays, and
``side-tokens.g0.json``, sealed, written last, which names the manifest whose rows they belong to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.cache.entries import DATA_START, ShardEntry, require, typed_fields
from hf_corrector.cache.manifest import CacheManifest
from hf_corrector.cache.row_files import runs
from hf_corrector.cache.sealed import FORMAT_VERSION, read_sealed, write_sealed
from hf_corrector.cache.shard_files import TensorSpec, check_blocks, corrupted, map_file, tensor_of, write_file
from hf_corrector.cache.target_cache import TargetCache, locked_as_opened
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.side_features import SIDES, DenseSide, TokenCounts

StoredSide = TokenCounts | DenseSide
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TORCH = {code: dtype for dtype, code in _CODES.items()}
_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class SideRecord:
    """What ``side-*.json`` says.

    Attributes:
        format_version: Version of the layout on disk.
        kind: Kind of side features.
        width: Number of columns.
        vocabulary: How many of them are tokens; 0 for a dense matrix.
        stored: Entries of a sparse matrix, or the code of a dense one's dtype.
        manifest: Checksum of the manifest of the cache.
        details: What the features were made with.
        entry: The file of arrays.
    """

    format_version: int = FORMAT_VERSION
    kind: str
    width: int
    vocabulary: int
    stored: str
    manifest: str
    details: dict[str, Any]
    entry: dict[str, Any]


def save_side(cache: TargetCache, features: StoredSide, *, details: dict[str, Any] | None = None) -> None:
    """Store side features of all targets in the folder of their cache; earlier ones of that kind are replaced.

    Args:
        cache: The cache.
        features: One row for every row of the cache.
        details: What they were made with, JSON values; shown to whoever asks, see :func:`side_details`.

    Raises:
        DataError: If they have another number of rows, or a row is NaN or infinite; names the row.
        CacheMismatchError: If the folder holds another generation of the cache by now.
        CacheError: If someone else is writing into the folder.
        OSError: If the disk refuses.
    """
    if len(features) != len(cache):
        raise DataError(
            f"side features {features.kind!r}", expected=f"one row for each of the {len(cache)} targets",
            got=f"{len(features)} rows", cure="Pass them in the row order of the cache.",
        )  # fmt: skip
    with locked_as_opened(cache):
        if isinstance(features, TokenCounts):
            write_counts(cache.path, cache.manifest, [features], details=details)
        else:
            write_dense(cache.path, cache.manifest, features, details=details)


def save_counts(cache: TargetCache, blocks: Iterable[TokenCounts], *, details: dict[str, Any] | None = None) -> None:
    """Store token counts that come some targets at a time, see :func:`save_side`."""
    with locked_as_opened(cache):
        write_counts(cache.path, cache.manifest, blocks, details=details)


def save_dense(
    cache: TargetCache, blocks: Iterable[DenseSide], *, kind: str, width: int, details: dict[str, Any] | None = None
) -> None:
    """Store a dense matrix that comes some targets at a time as float32, see :func:`save_side`."""
    with locked_as_opened(cache):
        write_blocks(cache.path, cache.manifest, blocks, kind=kind, width=width, details=details)


def open_side(
    cache: TargetCache, kind: str, *, folder: Path | None = None, verify: Literal["sizes", "full"] = "sizes"
) -> StoredSide:
    """Open stored side features, mapped into memory.

    Args:
        cache: The cache.
        kind: ``"tokens"``, ``"word_embeddings"`` or ``"matrix"``.
        folder: Where they are; the folder of the cache by default.
        verify: ``"sizes"`` checks sizes and headers, ``"full"`` every byte as well.

    Raises:
        CacheMismatchError: If there are none, or they belong to other rows; says how to make them.
        CacheCorruptedError: If something is not what was written.
    """
    folder = cache.path if folder is None else folder
    record, entry = _load(cache, kind, folder)
    if verify == "full":
        check_blocks(folder, entry, rows_of_bytes=lambda *_: entry.range_text, advance=lambda _: None)
    if kind != "tokens":
        spec = TensorSpec("side", record.stored, (entry.rows, record.width))
        mapped = map_file(folder, entry, specs=[spec])
        return DenseSide(tensor_of(mapped, _TORCH[record.stored], rows=entry.rows, dim=record.width), kind)
    entries = int(record.stored)
    mapped = map_file(folder, entry, specs=_count_specs(entry.rows, entries))
    offsets = np.frombuffer(mapped, np.int64, entry.rows + 1, DATA_START)
    start = DATA_START + offsets.nbytes
    columns = np.frombuffer(mapped, np.int32, entries, start) if entries else np.zeros(0, np.int32)
    counts = np.frombuffer(mapped, np.uint16, entries, start + 4 * entries) if entries else np.zeros(0, np.uint16)
    if offsets[0] != 0 or offsets[-1] != entries:
        raise corrupted(folder, entry.file, expected=f"offsets from 0 to {entries}", got=f"up to {offsets[-1]}")
    return TokenCounts(offsets, columns, counts, record.width, record.vocabulary)


def side_details(cache: TargetCache, kind: str) -> dict[str, Any]:
    """Return what stored side features were made with; raises as :func:`open_side` does."""
    return _load(cache, kind, cache.path)[0].details


def stored_sides(cache: TargetCache, *, folder: Path | None = None) -> tuple[str, ...]:
    """Return the kinds of side features a cache has in its own folder, or that are kept for it in another one."""
    where = cache.path if folder is None else folder
    return tuple(kind for kind in SIDES if _record_path(where, cache.manifest, kind).exists())


def verify_sides(cache: TargetCache) -> None:
    """Compare all stored side features with their checksums (CacheCorruptedError)."""
    for kind in stored_sides(cache):
        open_side(cache, kind, verify="full")


def write_counts(
    folder: Path, manifest: CacheManifest, blocks: Iterable[TokenCounts], *, details: dict[str, Any] | None = None
) -> None:
    """Write token counts for the rows of a manifest, which need not be saved yet; the caller holds the lock."""
    with ExitStack() as stack:
        # The three arrays follow each other in the file and grow together: two of them wait in unnamed files.
        spools = [stack.enter_context(tempfile.TemporaryFile(dir=folder)) for _ in range(2)]
        ends, sizes = [np.zeros(1, dtype=np.int64)], set()
        for block in blocks:
            begin, end = int(block.offsets[0]), int(block.offsets[-1])
            spools[0].write(np.ascontiguousarray(block.columns[begin:end]).data)
            spools[1].write(np.ascontiguousarray(block.counts[begin:end]).data)
            ends.append(block.offsets[1:] - begin + ends[-1][-1])
            sizes.add((block.width, block.vocabulary))
        offsets = np.concatenate(ends)
        rows, entries = len(offsets) - 1, int(offsets[-1])
        if rows != manifest.rows or len(sizes) != 1:
            raise DataError(
                "token counts", expected=f"{manifest.rows} rows of one vocabulary",
                got=f"{rows} rows of the widths and vocabularies {sorted(sizes)}",
                cure="Count the tokens of every target once, with one tokenizer.",
            )  # fmt: skip
        path = folder / _array_file(manifest, "tokens")
        parts = _chained(offsets, spools)
        entry = write_file(path, _count_specs(rows, entries), parts=parts, rows=rows, row0=0)
    width, vocabulary = sizes.pop()
    stored = {"kind": "tokens", "width": width, "vocabulary": vocabulary, "stored": str(entries)}
    _save_record(folder, manifest, entry, stored=stored, details=details)


def write_dense(
    folder: Path,
    manifest: CacheManifest,
    features: DenseSide,
    *,
    rows: npt.NDArray[np.int64] | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    """Write a dense matrix, or some ``rows`` of it, for the rows of a manifest; the caller holds the lock."""
    given = torch.float32 if features.matrix.dtype not in _CODES else features.matrix.dtype
    path = folder / _array_file(manifest, features.kind)
    wanted = np.arange(len(features)) if rows is None else rows
    specs = [TensorSpec("side", _CODES[given], (len(wanted), features.width))]
    entry = write_file(path, specs, parts=_dense_parts(features, wanted, given), rows=len(wanted), row0=0)
    stored = {"kind": features.kind, "width": features.width, "vocabulary": 0, "stored": _CODES[given]}
    _save_record(folder, manifest, entry, stored=stored, details=details)


def write_blocks(
    folder: Path,
    manifest: CacheManifest,
    blocks: Iterable[DenseSide],
    *,
    kind: str,
    width: int,
    details: dict[str, Any] | None = None,
) -> None:
    """Write a dense matrix that comes some rows at a time, as float32; the caller holds the lock."""
    rows = manifest.rows
    specs = [TensorSpec("side", "F32", (rows, width))]
    parts = _block_parts(blocks, rows=rows, width=width)
    entry = write_file(folder / _array_file(manifest, kind), specs, parts=parts, rows=rows, row0=0)
    stored = {"kind": kind, "width": width, "vocabulary": 0, "stored": "F32"}
    _save_record(folder, manifest, entry, stored=stored, details=details)


def merged_counts(old: TokenCounts, added: TokenCounts, sources: npt.NDArray[np.int64]) -> Iterator[TokenCounts]:
    """Yield the counts of an edited cache, some rows at a time.

    Args:
        old: Counts of the cache before.
        added: Counts of the new rows.
        sources: For each row now, its row before, or -1 for the next new row, ``(rows,)``.
    """
    places, new = sources.copy(), np.flatnonzero(sources < 0)
    places[new] = len(old) + 1 + np.arange(len(new))  # one apart, so that no range holds rows of both
    for start, stop in runs(places):
        taken, shift = (old, 0) if stop <= len(old) else (added, len(old) + 1)
        first, last = start - shift, stop - shift
        begin, end = int(taken.offsets[first]), int(taken.offsets[last])
        offsets = taken.offsets[first : last + 1] - begin
        columns, counts = taken.columns[begin:end], taken.counts[begin:end]
        yield replace(taken, offsets=offsets, columns=columns, counts=counts)


def side_files(manifest: CacheManifest) -> set[str]:
    """Return the names that side features of a cache's generation can have."""
    return {name for kind in SIDES for name in (_array_file(manifest, kind), _record_file(manifest, kind))}


def _array_file(manifest: CacheManifest, kind: str) -> str:
    return f"side-{kind}.g{manifest.generation}.safetensors"


def _record_file(manifest: CacheManifest, kind: str) -> str:
    return f"side-{kind}.g{manifest.generation}.json"


def _record_path(folder: Path, manifest: CacheManifest, kind: str) -> Path:
    return folder / _record_file(manifest, kind)


def _load(cache: TargetCache, kind: str, folder: Path) -> tuple[SideRecord, ShardEntry]:
    if kind not in SIDES:
        raise ConfigurationError("side features", expected=f"one of {SIDES}", got=repr(kind), cure="Choose one.")
    path = _record_path(folder, cache.manifest, kind)
    if not path.exists():
        kept = (
            "If an upgrade could not write into the cache's folder, it kept them in that of its corrector: copy the "
            f"files {_array_file(cache.manifest, kind)} and {path.name} from there."
        )
        ways = {
            "tokens": f"Run 'hf-corrector embed' with the cache's own encoder and data again: it adds them. {kept}",
            "word_embeddings": f"'hf-corrector upgrade --side word_embeddings' on this cache stores them. {kept}",
            "matrix": "Store them with save_side(), or with 'hf-corrector embed --side matrix.npy'.",
        }
        raise CacheMismatchError(
            str(folder), expected=f"side features {kind!r} stored with the cache",
            got=f"only {list(stored_sides(cache))}", cure=ways[kind],
        )  # fmt: skip
    record = SideRecord(**typed_fields(SideRecord, read_sealed(path), where=str(path)))
    if record.manifest != cache.manifest.checksum:
        raise CacheMismatchError(
            str(path), expected=f"side features of the cache with checksum {cache.manifest.checksum}",
            got=f"those of {record.manifest}", cure="Store them again for this cache.",
        )  # fmt: skip
    entry = ShardEntry.from_dict(record.entry, where=str(path))
    good = record.stored.isdecimal() if kind == "tokens" else record.stored in _TORCH
    require(
        good and record.kind == kind and record.width >= 1 and entry.rows == len(cache), str(path),
        expected=f"{kind} of {len(cache)} rows", got=f"{record.kind} of {entry.rows} rows, {record.stored}",
    )  # fmt: skip
    return record, entry


def _save_record(
    folder: Path, manifest: CacheManifest, entry: ShardEntry, *, stored: dict[str, Any], details: dict[str, Any] | None
) -> None:
    record = SideRecord(**stored, manifest=manifest.checksum, details=dict(details or {}), entry=entry.to_dict())
    write_sealed(_record_path(folder, manifest, record.kind), asdict(record))


def _count_specs(rows: int, entries: int) -> list[TensorSpec]:
    return [
        TensorSpec("offsets", "I64", (rows + 1,)), TensorSpec("columns", "I32", (entries,)),
        TensorSpec("counts", "U16", (entries,)),
    ]  # fmt: skip


def _chained(offsets: npt.NDArray[np.int64], spools: Sequence[IO[bytes]]) -> Iterator[memoryview | bytes]:
    yield offsets.data.cast("B")
    for spool in spools:
        spool.seek(0)
        while piece := spool.read(_PIECE_BYTES):
            yield piece


def _block_parts(blocks: Iterable[DenseSide], *, rows: int, width: int) -> Iterator[memoryview]:
    done = 0
    for block in blocks:
        if block.width != width or done + len(block) > rows:
            break
        yield from _dense_parts(block, np.arange(len(block)), torch.float32, first=done)
        done += len(block)
    else:
        if done == rows:
            return
    raise DataError(
        "side features", expected=f"{rows} rows of {width} numbers in all",
        got=f"blocks that do not add up after {done}",
        cure="Pass one row of the same length for every target.",
    )  # fmt: skip


def _dense_parts(
    features: DenseSide, wanted: npt.NDArray[np.int64], dtype: torch.dtype, *, first: int = 0
) -> Iterator[memoryview]:
    step = max(1, _PIECE_BYTES // (8 * features.width))
    for start in range(0, len(wanted), step):
        rows = torch.from_numpy(wanted[start : start + step])
        piece = features.matrix[rows].detach().cpu().to(dtype).contiguous()
        bad = torch.nonzero(~torch.isfinite(piece).all(dim=1))
        if len(bad):
            raise DataError(
                f"side features {features.kind!r}, row {first + int(rows[bad[0, 0]])}", expected="finite numbers",
                got="NaN or infinity", cure="Look at what made the matrix.",
            )  # fmt: skip
        yield piece.view(torch.uint8).numpy().data.cast("B")
