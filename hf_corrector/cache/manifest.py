"""What a cache folder contains and who made it: ``manifest.json``, the file that is written last.

A finished folder of generation 0 holds exactly::

    manifest.json                              this module's :class:`CacheManifest`
    emb-00000-of-00002.g0.safetensors          one tensor ``emb`` (rows, dim) each
    emb-00001-of-00002.g0.safetensors
    ids.g0.safetensors                         ``offsets`` (rows + 1,) and ``bytes``: the string ids

While it is being built there are also ``plan.json``, ``LOCK`` and one sidecar ``*.json`` per finished file. All these
JSON files are sealed, see :mod:`hf_corrector.cache.sealed`. There may be ``texts.g0.safetensors``, a hash of each row's
text, and in an edited cache ``places.g1.safetensors``, which says where in the shards each row stands.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from hf_corrector._files import xxh3
from hf_corrector.cache.entries import DATA_START, DTYPES, ShardEntry, ShardRange, require, typed_fields
from hf_corrector.cache.sealed import EXTENDED_VERSION, FORMAT_VERSION, REBUILD, read_sealed, seal, write_sealed
from hf_corrector.errors import CacheCorruptedError, CacheIncompleteError, CacheMismatchError, InputError
from hf_corrector.records import EncoderFingerprint
from hf_corrector.version import __version__

MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"


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
        names = [item.name for item in fields(PlanRecord) if item.name not in ("fingerprint", "format_version")]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        plain = [f"{name}: {mine!r} / {theirs!r}" for name, mine, theirs in pairs if mine != theirs]
        return [*self.fingerprint.differences(other.fingerprint), *plain]

    def describe(self) -> str:
        """Say in a few words what is built."""
        return f"{self.rows} rows of {self.dim} {self.dtype} values by {describe_encoder(self.fingerprint)}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "fingerprint": self.fingerprint.to_dict()}

    @classmethod
    def from_dict(cls, value: Any, *, where: str) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            CacheCorruptedError: If the values cannot describe a cache.
        """
        value = typed_fields(cls, value, where=where)
        for name in ("rows", "dim", "shard_rows"):
            require(value[name] >= 1, where, expected=f"{name} of 1 or more", got=str(value[name]))
        require(value["generation"] >= 0, where, expected="a generation of 0 or more", got=str(value["generation"]))
        require(value["dtype"] in DTYPES, where, expected=f"a dtype out of {sorted(DTYPES)}", got=repr(value["dtype"]))
        return cls(**{**value, "fingerprint": _fingerprint(value["fingerprint"], where)})


_PLAN_KEYS = frozenset(item.name for item in fields(PlanRecord))


@dataclass(frozen=True, kw_only=True)
class CacheManifest(PlanRecord):
    """Everything there is to know of a finished cache without reading its vectors.

    Attributes:
        shards: The files of vectors; what they store is numbered through, in their order.
        ids: The file of ids.
        created: Unix time at which the build was finished, in seconds.
        writer_version: Version of this package that wrote it.
        texts: The file with a hash of each row's text, if texts were known.
        places: The file that says which stored row each row is, in a cache that was edited; else they are the same.
        ancestors: Checksums of the manifests this one was edited from, the oldest first.
    """

    shards: tuple[ShardEntry, ...]
    ids: ShardEntry
    created: int
    writer_version: str = __version__
    texts: ShardEntry | None = None
    places: ShardEntry | None = None
    ancestors: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Take the format version that older readers need to see."""
        extended = bool(self.texts or self.places or self.ancestors)
        object.__setattr__(self, "format_version", EXTENDED_VERSION if extended else FORMAT_VERSION)

    @property
    def checksum(self) -> str:
        """Hash of the whole manifest, checksums of all files included."""
        return xxh3(seal(self.to_dict()))

    @property
    def lineage(self) -> tuple[str, ...]:
        """Checksums of this cache and of those it was edited from: all hold vectors of one encoder."""
        return (*self.ancestors, self.checksum)

    @property
    def files(self) -> tuple[ShardEntry, ...]:
        """All files it names."""
        return (*self.shards, *(entry for entry in (self.ids, self.texts, self.places) if entry is not None))

    @property
    def stored_rows(self) -> int:
        """How many rows the shards hold, deleted ones included."""
        return sum(entry.rows for entry in self.shards)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; what a cache does not have is left out."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        files = {"shards": [entry.to_dict() for entry in self.shards], "ids": self.ids.to_dict()}
        optional = {name: plain.pop(name) for name in ("texts", "places")}
        files |= {name: entry.to_dict() for name, entry in optional.items() if entry is not None}
        ancestors = plain.pop("ancestors")
        if ancestors:
            plain["ancestors"] = list(ancestors)
        return {**plain, "fingerprint": self.fingerprint.to_dict(), **files}

    @classmethod
    def from_dict(cls, value: Any, *, where: str = MANIFEST_FILE) -> Self:
        """Rebuild from :meth:`to_dict`.

        Raises:
            CacheCorruptedError: If the values contradict each other.
            CacheError: If a file name could lead out of the folder.
        """
        value = typed_fields(cls, value, where=where)
        shards = tuple(ShardEntry.from_dict(item, where=where) for item in value["shards"])
        named = ("ids", *(name for name in ("texts", "places") if name in value))
        files = {name: ShardEntry.from_dict(value[name], where=where) for name in named}
        plan = PlanRecord.from_dict({key: value[key] for key in _PLAN_KEYS & value.keys()}, where=where)
        ancestors = tuple(value.get("ancestors", ()))
        require(all(isinstance(one, str) for one in ancestors), where, expected="checksums", got=str(ancestors))
        _check_tiling(plan, shards, files, where)
        rest = {"shards": shards, "ancestors": ancestors, "fingerprint": plan.fingerprint}
        return cls(**{**value, **files, **rest})

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


def _check_tiling(plan: PlanRecord, shards: tuple[ShardEntry, ...], files: dict[str, ShardEntry], where: str) -> None:
    entries = (*shards, *files.values())
    names = [entry.file for entry in entries]
    require(len(set(names)) == len(names), where, expected="every file named once", got=f"{sorted(names)}")
    stored = sum(entry.rows for entry in shards) if "places" in files else plan.rows
    ends = [0, *(entry.row0 + entry.rows for entry in shards)]
    starts = [*(entry.row0 for entry in shards), stored]
    require(ends == starts, where, expected=f"shards that tile {stored} rows", got=f"starts {starts[:-1]}")
    for entry in shards:
        size = DATA_START + entry.rows * plan.row_bytes
        require(entry.bytes == size, where, expected=f"{size} bytes in {entry.file}", got=f"{entry.bytes} bytes")
    ids, least = files["ids"], DATA_START + 8 * (plan.rows + 1) + plan.rows
    require(
        ids.rows == plan.rows and ids.row0 == 0 and ids.bytes >= least, where,
        expected=f"{plan.rows} ids in {least} bytes or more", got=f"{ids.rows} ids in {ids.bytes} bytes",
    )  # fmt: skip
    for name in files.keys() - {"ids"}:
        entry, size = files[name], DATA_START + 8 * plan.rows
        require(
            entry.rows == plan.rows and entry.row0 == 0 and entry.bytes == size, where,
            expected=f"{plan.rows} {name} in {size} bytes", got=f"{entry.rows} in {entry.bytes} bytes",
        )  # fmt: skip
    lengths = {entry.block_bytes for entry in entries}
    require(len(lengths) == 1, where, expected="one block length", got="several")


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
    require(isinstance(found.normalize, bool), where, expected="true or false", got=repr(found.normalize))
    return found
