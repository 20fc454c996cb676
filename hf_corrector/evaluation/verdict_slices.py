"""Slices of queries, so that a good mean cannot hide a group that loses.

A slice is the queries that share a value of a metadata field. Dates become years, numbers quarters. Slices of too few
queries are pooled, as their intervals would say nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_corrector.errors import DataError
from hf_corrector.metrics import PERCENTILES, FloatArray, Interval, paired_bootstrap

BoolArray = npt.NDArray[np.bool_]

MIN_SLICE_QUERIES = 30
POOLED = "other, pooled"
MISSING = "(none)"
# Numbers with at most so many values are categories, such as a rating or a year.
_FEW_VALUES = 8
_DATE = re.compile(r"(\d{4})-\d{2}(-\d{2})?([T ].*)?")


@dataclass(frozen=True, eq=False)
class QuerySlice:
    """Queries looked at together.

    Attributes:
        name: Field and value, for instance ``"site=coffee"``.
        members: Which queries belong to it, ``(queries,)``.
    """

    name: str
    members: BoolArray = field(repr=False)


@dataclass(frozen=True)
class SliceRow:
    """How one slice fares.

    Attributes:
        name: Field and value.
        queries: Number of clean queries in it.
        means: Mean of the primary metric by condition.
        difference: Corrected minus ``against``, paired, 95 %.
        adjusted: The same, widened so that all slices together are covered with 95 % (Bonferroni).
        against: What it is compared with: ``"old"`` where known, else ``"stale"`` or ``"fresh"``.
        judged: Whether there are enough queries for the interval to mean something.
    """

    name: str
    queries: int
    means: Mapping[str, float]
    difference: Interval
    adjusted: Interval
    against: str
    judged: bool

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "slice": self.name, "queries": self.queries, "means": dict(self.means), "against": self.against,
            "difference": self.difference.to_dict(), "adjusted": self.adjusted.to_dict(), "judged": self.judged,
        }  # fmt: skip


def metadata_values(metadata: Iterable[str], name: str, *, where: str) -> list[Any]:
    """Return one field of JSON metadata, None where a row lacks it.

    Args:
        metadata: One JSON object a row, as strings.
        name: The field.
        where: What to call the rows in errors.

    Raises:
        DataError: If a row's metadata is no JSON object.
    """
    values = []
    for row, text in enumerate(metadata):
        try:
            content = json.loads(text or "{}")
        except ValueError as error:
            raise _no_object(where, row, text) from error
        if not isinstance(content, dict):
            raise _no_object(where, row, text)
        values.append(content.get(name))
    return values


def slice_queries(values: Sequence[Any], *, name: str, min_queries: int = MIN_SLICE_QUERIES) -> list[QuerySlice]:
    """Divide queries by the value of a field.

    Dates (``2024-05-01``) are cut to years, numbers of more than a few values to quarters; of a list every entry
    counts, so that slices may overlap. Slices below ``min_queries`` are pooled into one.

    Args:
        values: The field of each query; None where it is missing.
        name: The field.
        min_queries: Slices of fewer queries are pooled.

    Raises:
        DataError: If no query has the field.
    """
    entries = [list(dict.fromkeys(one)) if isinstance(one, list) else [one] for one in values]
    known = [entry for one in entries for entry in one if entry is not None]
    if not known:
        raise DataError(
            f"slice_by {name!r}", expected="metadata with this field in queries or targets", got="none",
            cure="Name another field, or add it to queries.jsonl or corpus.jsonl under 'metadata'.",
        )  # fmt: skip
    label = _labels(known)
    members: dict[str, list[int]] = {}
    for query, one in enumerate(entries):
        for text in dict.fromkeys(MISSING if entry is None else label(entry) for entry in one or [None]):
            members.setdefault(text, []).append(query)
    large = {text: found for text, found in sorted(members.items()) if len(found) >= min_queries}
    pooled = sorted({query for text, found in members.items() if text not in large for query in found})
    slices = [QuerySlice(f"{name}={text}", _mask(found, len(values))) for text, found in large.items()]
    return [*slices, QuerySlice(f"{name}={POOLED}", _mask(pooled, len(values)))] if pooled else slices


def judge_slices(
    per_query: Mapping[str, FloatArray], slices: Sequence[QuerySlice], *, clean: BoolArray, resamples: int, seed: int,
    min_queries: int = MIN_SLICE_QUERIES,
) -> list[SliceRow]:  # fmt: skip
    """Compare ``corrected`` with the old model, or else the stale index, slice by slice; worst first.

    Args:
        per_query: Values of the primary metric by condition, ``corrected`` among them, ``(queries,)``.
        slices: What to look at.
        clean: Which queries count, ``(queries,)``.
        resamples: Resamples behind each interval.
        seed: Seed of the resampling.
        min_queries: Slices of fewer clean queries are marked as not judged.
    """
    against = next((name for name in ("old", "stale", "fresh") if name in per_query), "corrected")
    rows = []
    for one in slices:
        chosen = one.members & clean
        if not chosen.any():
            continue
        values = {name: column[chosen] for name, column in per_query.items()}
        bootstrap = paired_bootstrap(values, generator=np.random.default_rng(seed), resamples=resamples)
        mine, other = bootstrap.names.index("corrected"), bootstrap.names.index(against)
        drawn = bootstrap.resampled[:, mine] - bootstrap.resampled[:, other]
        difference = bootstrap.difference("corrected", against)
        tail = PERCENTILES[0] / len(slices)
        low, high = np.percentile(drawn, (tail, 100 - tail))
        rows.append(
            SliceRow(
                one.name, int(chosen.sum()), {name: float(x.mean()) for name, x in values.items()}, difference,
                Interval(difference.estimate, float(low), float(high)), against, int(chosen.sum()) >= min_queries,
            )
        )  # fmt: skip
    return sorted(rows, key=lambda row: (not row.judged, row.difference.estimate))


def _labels(known: list[Any]) -> Any:
    """Return the function that names the slice of a value."""
    if all(isinstance(one, str) and _DATE.fullmatch(one) for one in known):
        return lambda value: value[:4]
    is_number = all(isinstance(one, int | float) and not isinstance(one, bool) for one in known)
    if not is_number or len(set(known)) <= _FEW_VALUES:
        return lambda value: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    edges = np.unique(np.quantile(np.asarray(known, dtype=np.float64), (0.25, 0.5, 0.75)))
    ends = [f"{edge:g}" for edge in edges]
    names = [f"up to {ends[0]}", *(f"{low} to {high}" for low, high in pairwise(ends))]
    return lambda value: [*names, f"above {ends[-1]}"][int(np.searchsorted(edges, value))]


def _mask(members: list[int], total: int) -> BoolArray:
    mask = np.zeros(total, dtype=np.bool_)
    mask[members] = True
    return mask


def _no_object(where: str, row: int, text: str) -> DataError:
    return DataError(
        f"{where}, row {row}", expected="metadata that is a JSON object", got=repr(text)[:80], cure="Correct the row."
    )
