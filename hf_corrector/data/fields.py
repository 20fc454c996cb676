"""Fields of one record as read from JSON or a table, checked, with errors that say where the record stands."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_corrector.errors import DataError


def identifier(record: Any, where: str, keys: Sequence[str] = ("_id", "id")) -> str:
    """Return the first of some fields that is there, as an id; integers count as their digits.

    Raises:
        DataError: If the record is no object, or has no string there.
    """
    if not isinstance(record, dict):
        raise DataError(
            where, expected=f"an object with {keys[0]} and text", got=type(record).__name__,
            cure="Write one JSON object per line.",
        )  # fmt: skip
    value = next((record[key] for key in keys if key in record), None)
    found = as_identifier(value)
    if found is None:
        raise DataError(
            where, expected=f"a string in {keys[0]}", got=f"{value!r} in {sorted(record)}",
            cure=f"Give every record an {keys[0]} of its own.",
        )  # fmt: skip
    return found


def as_identifier(value: Any) -> str | None:
    """Return a string that is not empty as it is, an integer as its digits, and None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def text_field(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return the stripped text of a field; null counts as empty, and a missing title too.

    Raises:
        DataError: If it is missing, no string, or holds half a character.
    """
    value = record.get(key)
    if value is None and (key == "title" or key in record):
        return ""
    if isinstance(value, str):
        return clean_text(value, key, where)
    raise DataError(
        where, expected=f"a string in {key!r}", got=f"{value!r} in {sorted(record)}",
        cure=f"Give every record a {key!r}.",
    )  # fmt: skip


def clean_text(value: Any, key: str, where: str) -> str:
    """Return a text stripped.

    Raises:
        DataError: If it is no string, or holds half a character.
    """
    if not isinstance(value, str):
        raise DataError(where, expected=f"strings in {key!r}", got=repr(value), cure=f"Write texts into {key!r}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            where, expected=f"valid Unicode in {key!r}", got=f"half a character ({error.reason})",
            cure="Write the file again from its source.",
        ) from error  # fmt: skip
    return value.strip()


def list_field(record: Mapping[str, Any], key: str, where: str, *, optional: bool = True) -> list[Any]:
    """Return a field that holds a list; null counts as empty, and so does a missing one where that is allowed.

    Raises:
        DataError: If it is missing but not optional, or no list.
    """
    value = record.get(key)
    if value is None and (optional or key in record):
        return []
    if not isinstance(value, list):
        raise DataError(where, expected=f"a list in {key!r}", got=repr(value), cure=f"Write {key!r} as a list.")
    return value


def answers_field(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the distinct stripped answers of a query; none where the field is missing, null or empty.

    Raises:
        DataError: If it is no list of texts, or one of them is empty.
    """
    value = record.get("answers")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise DataError(
            where, expected="a list of texts in 'answers'", got=repr(value)[:80],
            cure='Write answers as ["first", "second"]; of an object such as SQuAD\'s take the list "text"; or rename '
            "the field.",
        )  # fmt: skip
    answers = tuple(dict.fromkeys(clean_text(answer, "answers", where) for answer in value))
    if "" in answers:
        raise DataError(
            where, expected="text in every one of the 'answers'", got=repr(value)[:80],
            cure="Remove the empty one; an empty list says that no answer is known.",
        )  # fmt: skip
    return answers


def score_of(value: Any, key: str, where: str) -> float | None:
    """Return a teacher's score, or None where the teacher gave none.

    Raises:
        DataError: If it is no finite number.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise DataError(
        where, expected=f"finite numbers in {key!r}", got=repr(value), cure="Leave a score out where there is none."
    )


def metadata_of(record: Mapping[str, Any], known: Iterable[str], extra: Mapping[str, Any] | None = None) -> str:
    """Keep every field but the known ones as one JSON object, with the contents of ``metadata`` at its top level."""
    merged: dict[str, Any] = {}
    inner = record.get("metadata")
    if isinstance(inner, str):
        inner = _object_or_text(inner)
    if isinstance(inner, dict):
        merged.update(inner)
    elif inner is not None:
        merged["metadata"] = inner
    left_out = {*known, "metadata"}
    merged.update({key: value for key, value in record.items() if key not in left_out and value is not None})
    return json.dumps({**merged, **(extra or {})}, ensure_ascii=False, default=str)


def _object_or_text(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
