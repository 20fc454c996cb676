"""JSON that notices when a single bit of it changes.

A sealed file ends in a checksum of its own content, and only the exact bytes that were written pass.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_corrector._files import atomic_write, parse_json, read_bounded, xxh3
from hf_corrector.errors import CacheCorruptedError, CacheError, InputError

FORMAT_VERSION = 1
# Version 2 names more files (hashes of texts, edited rows) or what a cache was edited from; else the two are the same.
EXTENDED_VERSION = 2
REBUILD = "Restore the file from its source, or delete the folder and build the cache again."


def seal(content: dict[str, Any]) -> bytes:
    """Return ``content`` as JSON bytes that end in a checksum of it; ASCII only, so any string survives."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    sealed = {**content, "checksum": xxh3(canonical.encode())}
    return (json.dumps(sealed, indent=2, allow_nan=False) + "\n").encode()


def unseal(data: bytes, *, where: str) -> dict[str, Any]:
    """Return the content that :func:`seal` was given.

    Raises:
        CacheCorruptedError: If a single byte differs from what :func:`seal` returned.
        CacheError: If the content is intact but of another format version.
    """
    try:
        content = parse_json(data, where=where)
        # Sealing again compares every byte: a checksum of parsed values would let a lost line end or 1e5 for 1E5 pass.
        got = content.pop("checksum", "no checksum") if isinstance(content, dict) else "no JSON object"
        intact = isinstance(content, dict) and seal(content) == data
    except (ValueError, RecursionError) as error:
        raise CacheCorruptedError(where, expected="sealed JSON", got=str(error), cure=REBUILD) from error
    if not intact:
        raise CacheCorruptedError(where, expected="content that agrees with its checksum", got=str(got), cure=REBUILD)
    version = content.get("format_version")
    if version not in (FORMAT_VERSION, EXTENDED_VERSION) or isinstance(version, bool):
        raise CacheError(
            where, expected=f"format_version {FORMAT_VERSION} or {EXTENDED_VERSION}", got=f"format_version {version!r}",
            cure="Open it with the version of hf_corrector that wrote it, or build the cache again.",
        )  # fmt: skip
    return dict(content)


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write sealed JSON durably."""
    data = seal(content)
    atomic_write(path, lambda temporary: _write_bytes(temporary, data))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read sealed JSON; see :func:`unseal` for what it raises."""
    try:
        data = read_bounded(path)
    except InputError as error:
        raise CacheCorruptedError(error.where, expected=error.expected, got=error.got, cure=REBUILD) from error
    return unseal(data, where=str(path))


def _write_bytes(path: Path, data: bytes) -> None:
    path.write_bytes(data)
