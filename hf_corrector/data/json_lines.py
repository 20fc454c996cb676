"""Lines of UTF-8 files, plain or gzipped, with or without a byte order mark, and the JSON objects on them."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_corrector._files import parse_json
from hf_corrector.data.assembly import Records
from hf_corrector.errors import DataError, InputError


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines without their ends, any of them; blank ones are skipped but counted.

    Raises:
        DataError: If a ``.gz`` file is damaged.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if content.strip():
                    yield number, content.rstrip(b"\r\n")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}, line {number + 1}", expected="a whole gzip file", got=str(error), cure="Fetch the file again."
        ) from error


def json_records(path: Path) -> Records[Any]:
    """Return the records of a file with one JSON object per line, read as they are asked for."""

    def items() -> Iterator[tuple[int, Any]]:
        for number, line in numbered_lines(path):
            try:
                yield number, parse_json(line, where=f"{path}, line {number}")
            except InputError as error:
                raise DataError(
                    error.where, expected=f"one object in {error.expected}", got=error.got,
                    cure="Write one JSON object per line, in UTF-8.",
                ) from error  # fmt: skip

    return Records(str(path), "line", items())
