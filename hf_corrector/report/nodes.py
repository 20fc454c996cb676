"""Checked reading of JSON values: what is missing is told from what is damaged, and damage is named by its place."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_corrector.errors import InputError

_CURE = "Restore run.json, or render it with the version of hf_corrector that wrote it."


@dataclass(frozen=True)
class Level:
    """A number, with its 95 % interval where one was recorded."""

    estimate: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Node:
    """A JSON value and where it stands; reading it as something it is not raises InputError.

    Attributes:
        value: The value; None where there is none.
        where: File and keys, for errors.
    """

    value: Any
    where: str

    @property
    def missing(self) -> bool:
        """Whether there is nothing here, or something empty."""
        return self.value is None or self.value in ({}, [], "")

    def get(self, key: str) -> Node:
        """Return a member of an object; a missing one is a node without value."""
        return Node(self._object().get(key), f"{self.where}, {key}")

    def members(self) -> Iterator[tuple[str, Node]]:
        """Yield names and members of an object; none where there is nothing."""
        for key, value in self._object().items():
            yield clean_text(key), Node(value, f"{self.where}, {clean_text(key)[:80]}")

    def entries(self) -> Iterator[Node]:
        """Yield the entries of a list; none where there is nothing."""
        if self.value is not None and not isinstance(self.value, list):
            raise self._refused("a list")
        for number, value in enumerate(self.value or []):
            yield Node(value, f"{self.where}, entry {number}")

    def text(self) -> str:
        """Return a string that every browser and every file can hold."""
        if not isinstance(self.value, str):
            raise self._refused("a string")
        return clean_text(self.value)

    def number(self) -> float:
        """Return a number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise self._refused("a number")
        try:
            return float(self.value)
        except OverflowError:
            raise self._refused("a number below 1e308") from None

    def count(self) -> int:
        """Return a whole number."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            raise self._refused("a whole number")
        return self.value

    def flag(self) -> bool:
        """Return true or false."""
        if not isinstance(self.value, bool):
            raise self._refused("true or false")
        return self.value

    def level(self) -> Level:
        """Return a number, or an object of an estimate and its interval."""
        if not isinstance(self.value, dict):
            return Level(self.number())
        low, high = self.get("low"), self.get("high")
        ends = [None if one.missing else one.number() for one in (low, high)]
        return Level(self.get("estimate").number(), *ends)

    def _object(self) -> dict[str, Any]:
        if self.value is None:
            return {}
        if not isinstance(self.value, dict):
            raise self._refused("an object")
        return self.value

    def _refused(self, expected: str) -> InputError:
        found = "nothing" if self.value is None else repr(self.value)[:80]
        return InputError(self.where, expected=expected, got=clean_text(found), cure=_CURE)


def clean_text(text: str) -> str:
    """Replace what neither HTML nor UTF-8 can hold: control characters and halves of surrogate pairs."""
    return "".join(
        one if one in "\t\n" or unicodedata.category(one) not in ("Cc", "Cs") else "\ufffd" for one in text
    )  # fmt: skip
