"""What a cache's files are: their names, sizes and checksums, and the types rows are stored in."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from hf_corrector._files import safe_child
from hf_corrector.cache.sealed import REBUILD
from hf_corrector.errors import CacheCorruptedError, CacheError, ConfigurationError, InputError
from hf_corrector.records import checked_fields

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
        value = typed_fields(cls, value, where=where)
        name, joined, blocks = value["file"], value["block_xxh3"], -(-value["bytes"] // max(value["block_bytes"], 1))
        try:
            safe_child(Path(), name)
        except InputError as error:
            raise CacheError(where, expected=error.expected, got=error.got, cure=error.cure) from error
        require(name.endswith(".safetensors"), where, expected="files named *.safetensors", got=repr(name))
        require(value["rows"] >= 1 and value["row0"] >= 0, where, expected=f"rows in {name}", got=str(value["rows"]))
        require(
            DATA_START <= value["block_bytes"] <= 2**30, where,
            expected=f"blocks of {DATA_START} bytes to 1 GiB", got=f"{value['block_bytes']} bytes",
        )  # fmt: skip
        require(
            value["bytes"] > DATA_START and len(joined) == 16 * blocks, where,
            expected=f"16 hexadecimal digits for each of the {blocks} blocks of {name}", got=f"{len(joined)} digits",
        )  # fmt: skip
        hashes = tuple(joined[start : start + 16] for start in range(0, len(joined), 16))
        return cls(**{**value, "block_xxh3": hashes})

    @property
    def range_text(self) -> str:
        """Name the file and its rows, for error messages."""
        return f"{self.file}, rows {self.row0} to {self.row0 + self.rows - 1}"


def stored_dtype(name: str) -> StoredDtype:
    """Look up a dtype by name.

    Raises:
        ConfigurationError: If vectors cannot be stored in it.
    """
    if name not in DTYPES:
        raise ConfigurationError("dtype", expected=f"one of {list(DTYPES)}", got=repr(name), cure="Choose one of them.")
    return DTYPES[name]


def typed_fields(cls: type[Any], value: Any, *, where: str) -> dict[str, Any]:
    """Return the fields of the dataclass ``cls``, each of the JSON type its annotation stands for.

    Raises:
        CacheCorruptedError: If one is missing, unknown or of another type.
    """
    try:
        found = checked_fields(cls, value, where=where)
    except InputError as error:
        raise CacheCorruptedError(where, expected=error.expected, got=error.got, cure=REBUILD) from error
    kinds = {"int": int, "str": str, "tuple[str, ...]": str, "tuple[ShardEntry, ...]": list}
    for item in fields(cls):
        if item.name not in found:
            continue  # it has a default
        kind = list if item.name == "ancestors" else kinds.get(str(item.type), dict)
        got = type(found[item.name])
        # A bool is an int to isinstance, but "rows": true is no number of rows.
        require(got is kind, where, expected=f"{item.name} to be of type {kind.__name__}", got=got.__name__)
    return dict(found)


def require(condition: bool, where: str, *, expected: str, got: str) -> None:
    """Raise CacheCorruptedError unless a condition holds."""
    if not condition:
        raise CacheCorruptedError(where, expected=expected, got=got, cure=REBUILD)
