"""Durable writes, strict reads and content hashes.

A file written here is complete or absent after a crash: it is written beside its final name, flushed to the disk,
renamed, and the folder's entry is flushed too (safetensors and pyarrow rename or not, but do not flush).
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import xxhash

from hf_corrector.errors import InputError

MAX_JSON_BYTES = 100 * 2**20


def fsync_directory(path: Path) -> None:
    """Flush a folder's entries, so that a rename inside it survives a power loss."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a folder and its missing parents durably; an existing folder is left alone.

    Raises:
        OSError: If the disk refuses, or a file stands in the way.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_directory(folder.parent)


def atomic_write(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it there durably.

    Args:
        path: Final name; an existing file is replaced in one step.
        write: Called with the temporary path; must have written the whole file when it returns.

    Raises:
        OSError: If the disk refuses; the old file is then untouched and the temporary one removed.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON, durably; NaN and infinity are refused by :mod:`json` (ValueError)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, durably."""
    atomic_write(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON, refusing duplicate keys, NaN and files above 100 MiB.

    Raises:
        InputError: If the file is no such JSON.
        FileNotFoundError: If there is no file.
    """
    return parse_json(read_bounded(path), where=str(path))


def read_bounded(path: Path) -> bytes:
    """Return the bytes of a file that is to hold JSON.

    Raises:
        InputError: If they are more than 100 MiB, or no regular file.
        FileNotFoundError: If there is no file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON_BYTES:
        got = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "no regular file"
        raise InputError(str(path), expected=f"at most {MAX_JSON_BYTES} bytes of JSON", got=got, cure="Check the file.")
    return path.read_bytes()


def parse_json(data: bytes, *, where: str) -> Any:
    """Parse JSON bytes as strictly as :func:`read_json`; ``where`` names them in the error."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(
            where, expected="JSON without duplicate keys", got=str(error), cure="Restore the file from its source."
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"duplicate keys {twice}")
    return keys


def _no_constant(name: str) -> Any:
    raise ValueError(f"the constant {name}")


def safe_child(folder: Path, name: str) -> Path:
    """Return ``folder / name`` for a plain file name.

    Raises:
        InputError: If ``name`` could lead out of the folder.
    """
    if not name or name in {".", ".."} or any(char in name for char in "/\\\0:"):
        raise InputError(
            str(folder), expected="plain file names in its manifest", got=repr(name), cure="Do not open this folder."
        )
    return folder / name


def xxh3(data: bytes | memoryview) -> str:
    """Return the 64-bit xxh3 hash as 16 hexadecimal digits; guards against bit rot, not against forgery."""
    return xxhash.xxh3_64_hexdigest(data)


def hash_strings(strings: Iterable[str]) -> str:
    """Hash a sequence of strings, order and boundaries included, to 32 hexadecimal digits (128-bit xxh3)."""
    state = xxhash.xxh3_128()
    for string in strings:
        data = string.encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()
