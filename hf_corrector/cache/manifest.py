"""What a cache folder contains and who made it: ``manifest.json``, the file that is written last.

A finished folder of generation 0 holds exactly::

    manifest.json                              this module's :class:`CacheManifest`
    emb-00000-of-00002.g0.safetensors          one tensor ``emb`` (rows, dim) each
    emb-00001-of-00002.g0.safetensors
    ids.g0.safetensors                         ``offsets`` (rows + 1,) and ``bytes``: the string ids

While it is being built there are also ``plan.json``, ``LOCK`` and one sidecar ``*.json`` per finished file. All these
JSON files are sealed, see :mod:`hf_corrector.cache.sealed`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from hf_corrector._files import safe_child, xxh3
from hf_corrector.cache.sealed import FORMAT_VERSION, REBUILD, read_sealed, seal, write_sealed
from hf_corrector.errors import (
    CacheCorruptedError,
    CacheError,
    CacheIncompleteError,
    CacheMismatchError,
    ConfigurationError,
    InputError,
)
from hf_corrector.records import EncoderFingerprint, checked_fields
from hf_corrector.version import __version__

MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"
DATA_START = 4096  # bytes; one page, so that rows are aligned for any dtype and for direct I/O
BLOCK_BYTES = 256 * 1024


class StoredDtype(NamedTuple):
    """How a row element is stored: the code safetensors uses for it, its torch dtype and its size in bytes."""

    code: str
    torch: torch.dtype
    bytes: int


DTYPES = {
    "float32": StoredDtype("F32", torch.float32, 4),
    "bfloat16": StoredDtype("BF16", torch.bfloat16, 2),
    "float16": StoredDtype("F16", torch.float16, 2),
}


@dataclass(frozen=True)
class ShardRange:
    """Rows ``start`` to ``stop`` (exclusive) make up shard ``index``."""

    index: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many they are."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One checksummed file of a cache.

    Attributes:
        file: Plain file name.
        rows: Rows it holds.
        row0: Row number of its first row in the cache.
        bytes: Size of the whole file.
        header_xxh3: Hash of the bytes before the data.
        block_bytes: Length of one checksummed block.
        block_xxh3: Hash of each block of the whole file, header included; the last block may be shorter.
    """

    file: str
    rows: int
    row0: int
    bytes: int
    header_xxh3: str
    block_bytes: int
    block_xxh3: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; the block hashes are joined, as a list of 10^5 lines would bury the rest of the file."""
        return {**self.__dict__, "block_xxh3": "".join(self.block_xxh3)}

    @classmethod
    def from_dict(cls, value: Any, *, where: str) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            CacheCorruptedError: If the values cannot describe a file.
        """
        value = _typed_fields(cls, value, where=where)
        name, joined, blocks = value["file"], value["block_xxh3"], -(-value["bytes"] // max(value["block_bytes"], 1))
        try:
            safe_child(Path(), name)
        except InputError as error:
            raise CacheError(where, expected=error.expected, got=error.got, cure=error.cure) from error
        _require(name.endswith(".safetensors"), where, expected="files named *.safetensors", got=repr(name))
        _require(value["rows"] >= 1 and value["row0"] >= 0, where, expected=f"rows in {name}", got=str(value["rows"]))
        _require(
            DATA_START <= value["block_bytes"] <= 2**30, where,
            expected=f"blocks of {DATA_START} bytes to 1 GiB", got=f"{value['block_bytes']} bytes",
        )  # fmt: skip
        _require(
            value["bytes"] > DATA_START and len(joined) == 16 * blocks, where,
            expected=f"16 hexadecimal digits for each of the {blocks} blocks of {name}", got=f"{len(joined)} digits",
        )  # fmt: skip
        hashes = tuple(joined[start : start + 16] for start in range(0, len(joined), 16))
        return cls(**{**value, "block_xxh3": hashes})

    @property
    def range_text(self) -> str:
        """Name the file and its rows, for error messages."""
        return f"{self.file}, rows {self.row0} to {self.row0 + self.rows - 1}"


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """What a build makes, as ``plan.json`` remembers it: two builds may share a folder only if these agree.

    Attributes:
        format_version: Version of the layout on disk.
        generation: Part of every file name, so that a later generation can be built beside this one.
        rows: Number of targets.
        dim: Length of a vector.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        fingerprint: The encoder.
        texts_hash: Hash of the texts that were embedded, in row order; ``"vectors-..."`` where only vectors were given.
        ids_hash: Hash of the ids, in row order.
        shard_rows: Rows per shard; the last one may have fewer.
    """

    format_version: int = FORMAT_VERSION
    generation: int
    rows: int
    dim: int
    dtype: str
    fingerprint: EncoderFingerprint
    texts_hash: str
    ids_hash: str
    shard_rows: int

    @property
    def row_bytes(self) -> int:
        """Size of one stored row."""
        return self.dim * DTYPES[self.dtype].bytes

    @property
    def digest(self) -> str:
        """Hash of everything that :meth:`differences` compares."""
        compared = {item.name: getattr(self, item.name) for item in fields(PlanRecord)}
        return xxh3(json.dumps({**compared, "fingerprint": self.fingerprint.digest}, sort_keys=True).encode())

    def ranges(self) -> list[ShardRange]:
        """Cut the rows into shards."""
        starts = range(0, self.rows, self.shard_rows)
        return [ShardRange(index, start, min(start + self.shard_rows, self.rows)) for index, start in enumerate(starts)]

    def shard_file(self, index: int) -> str:
        """Name shard ``index``."""
        return f"emb-{index:05d}-of-{-(-self.rows // self.shard_rows):05d}.g{self.generation}.safetensors"

    @property
    def ids_file(self) -> str:
        """Name the file of ids."""
        return f"ids.g{self.generation}.safetensors"

    def differences(self, other: PlanRecord) -> list[str]:
        """Name what differs, as ``"dim: 64 / 128"``; the encoder's name is not compared, see its fingerprint."""
        names = [item.name for item in fields(PlanRecord) if item.name != "fingerprint"]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        plain = [f"{name}: {mine!r} / {theirs!r}" for name, mine, theirs in pairs if mine != theirs]
        return [*self.fingerprint.differences(other.fingerprint), *plain]

    def describe(self) -> str:
        """Say in a few words what is built."""
        return f"{self.rows} rows of {self.dim} {self.dtype} values by {describe_encoder(self.fingerprint)}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any, *, where: str) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            CacheCorruptedError: If the values cannot describe a cache.
        """
        value = _typed_fields(cls, value, where=where)
        for name in ("rows", "dim", "shard_rows"):
            _require(value[name] >= 1, where, expected=f"{name} of 1 or more", got=str(value[name]))
        _require(value["generation"] >= 0, where, expected="a generation of 0 or more", got=str(value["generation"]))
        _require(value["dtype"] in DTYPES, where, expected=f"a dtype out of {sorted(DTYPES)}", got=repr(value["dtype"]))
        return cls(**{**value, "fingerprint": _fingerprint(value["fingerprint"], where)})


_PLAN_KEYS = frozenset(item.name for item in fields(PlanRecord))


@dataclass(frozen=True, kw_only=True)
class CacheManifest(PlanRecord):
    """Everything there is to know of a finished cache without reading its vectors.

    Attributes:
        shards: The files of vectors, in row order.
        ids: The file of ids.
        created: Unix time at which the build was finished, in seconds.
        writer_version: Version of this package that wrote it.
    """

    shards: tuple[ShardEntry, ...]
    ids: ShardEntry
    created: int
    writer_version: str = __version__

    @property
    def checksum(self) -> str:
        """Hash of the whole manifest, checksums of all files included."""
        return xxh3(seal(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        files = {"shards": [entry.to_dict() for entry in self.shards], "ids": self.ids.to_dict()}
        return {**plain, "fingerprint": asdict(self.fingerprint), **files}

    @classmethod
    def from_dict(cls, value: Any, *, where: str = MANIFEST_FILE) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            CacheCorruptedError: If the values contradict each other.
            CacheError: If a file name could lead out of the folder.
        """
        value = _typed_fields(cls, value, where=where)
        shards = tuple(ShardEntry.from_dict(item, where=where) for item in value["shards"])
        ids = ShardEntry.from_dict(value["ids"], where=where)
        plan = PlanRecord.from_dict({key: value[key] for key in _PLAN_KEYS & value.keys()}, where=where)
        _check_tiling(plan, shards, ids, where)
        return cls(**{**value, "shards": shards, "ids": ids, "fingerprint": plan.fingerprint})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read and check ``manifest.json`` of ``folder``.

        Raises:
            CacheIncompleteError: If there is none.
            CacheCorruptedError: If it is not what was written.
            CacheError: If it was written in another format, or names files outside the folder.
        """
        path = folder / MANIFEST_FILE
        if not path.exists():
            raise _no_manifest(folder)
        return cls.from_dict(read_sealed(path), where=str(path))

    def save(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder`` durably."""
        write_sealed(folder / MANIFEST_FILE, self.to_dict())


def stored_dtype(name: str) -> StoredDtype:
    """Look up a dtype by name.

    Raises:
        ConfigurationError: If vectors cannot be stored in it.
    """
    if name not in DTYPES:
        raise ConfigurationError("dtype", expected=f"one of {list(DTYPES)}", got=repr(name), cure="Choose one of them.")
    return DTYPES[name]


def describe_encoder(fingerprint: EncoderFingerprint) -> str:
    """Name an encoder for people."""
    revision = f" at revision {fingerprint.revision}" if fingerprint.revision else ""
    return f"the {fingerprint.role} encoder {fingerprint.name!r}{revision}"


def check_fingerprint(where: str, *, expected: EncoderFingerprint, got: EncoderFingerprint) -> None:
    """Make sure that two encoders write equal vectors.

    Raises:
        CacheMismatchError: If they do not, naming both and the fields that differ.
    """
    differing = expected.differences(got)
    if differing:
        raise CacheMismatchError(
            where, expected=f"vectors of {describe_encoder(expected)}",
            got=f"vectors of {describe_encoder(got)}, which differ in (expected / got) {'; '.join(differing)}",
            cure="Open the cache with the encoder that made it, or build another cache.",
        )  # fmt: skip


def _check_tiling(plan: PlanRecord, shards: tuple[ShardEntry, ...], ids: ShardEntry, where: str) -> None:
    names = [entry.file for entry in (*shards, ids)]
    _require(len(set(names)) == len(names), where, expected="every file named once", got=f"{sorted(names)}")
    ends = [0, *(entry.row0 + entry.rows for entry in shards)]
    starts = [*(entry.row0 for entry in shards), plan.rows]
    _require(ends == starts, where, expected=f"shards that tile {plan.rows} rows", got=f"starts {starts[:-1]}")
    for entry in shards:
        size = DATA_START + entry.rows * plan.row_bytes
        _require(entry.bytes == size, where, expected=f"{size} bytes in {entry.file}", got=f"{entry.bytes} bytes")
    least = DATA_START + 8 * (plan.rows + 1) + plan.rows
    _require(
        ids.rows == plan.rows and ids.row0 == 0 and ids.bytes >= least, where,
        expected=f"{plan.rows} ids in {least} bytes or more", got=f"{ids.rows} ids in {ids.bytes} bytes",
    )  # fmt: skip
    _require(
        len({entry.block_bytes for entry in (*shards, ids)}) == 1, where,
        expected="one block length", got="several",
    )  # fmt: skip


def _no_manifest(folder: Path) -> CacheIncompleteError:
    if not folder.is_dir():
        got, cure = "no such folder", "Check the path, or build the cache first."
    elif (folder / PLAN_FILE).exists():
        sidecars = sum(1 for _ in folder.glob("emb-*.json"))
        got, cure = f"an unfinished build ({sidecars} shards done)", "Run the same build again: it goes on from there."
    else:
        got, cure = "a folder without one", "Check the path, or build the cache first."
    return CacheIncompleteError(str(folder), expected=f"a finished cache, with {MANIFEST_FILE}", got=got, cure=cure)


def _fingerprint(value: Any, where: str) -> EncoderFingerprint:
    try:
        found = EncoderFingerprint.from_dict(value)
    except InputError as error:
        raise CacheCorruptedError(where, expected=error.expected, got=error.got, cure=REBUILD) from error
    _require(isinstance(found.normalize, bool), where, expected="true or false", got=repr(found.normalize))
    return found


def _typed_fields(cls: type[Any], value: Any, *, where: str) -> dict[str, Any]:
    """Return the fields of the dataclass ``cls``, each of the JSON type its annotation stands for."""
    try:
        found = checked_fields(cls, value, where=where)
    except InputError as error:
        raise CacheCorruptedError(where, expected=error.expected, got=error.got, cure=REBUILD) from error
    kinds = {"int": int, "str": str, "tuple[str, ...]": str, "tuple[ShardEntry, ...]": list}
    for item in fields(cls):
        kind = kinds.get(str(item.type), dict)
        got = type(found.get(item.name, item.default))
        # A bool is an int to isinstance, but "rows": true is no number of rows.
        _require(got is kind, where, expected=f"{item.name} to be of type {kind.__name__}", got=got.__name__)
    return dict(found)


def _require(condition: bool, where: str, *, expected: str, got: str) -> None:
    if not condition:
        raise CacheCorruptedError(where, expected=expected, got=got, cure=REBUILD)
