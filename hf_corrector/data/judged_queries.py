"""Collect queries, their positives and their given negatives from lines of training data, where queries may repeat."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from datasets import Dataset, Features

from hf_corrector.data.retrieval import ANSWER_FEATURES, GIVEN_FEATURES, QUERY_FEATURES, dataset_from_rows
from hf_corrector.errors import DataError

Integers = npt.NDArray[np.int64]


class Query(NamedTuple):
    """A query as one line gives it; metadata is a JSON object as a string."""

    id: str
    text: str
    metadata: str = "{}"
    answers: tuple[str, ...] = ()


class Judged(NamedTuple):
    """A target a line names for its query: an answer or a given negative, and what a teacher gave the pair."""

    target_row: int
    is_positive: bool
    score: float | None = None


@dataclass(frozen=True)
class _Lists:
    """One list of target rows and scores (NaN for none) for every query, in flat arrays."""

    rows: Integers
    scores: npt.NDArray[np.float64] | None
    offsets: Integers

    def length(self, query: int) -> int:
        return int(self.offsets[query + 1] - self.offsets[query])

    def rows_of(self, query: int) -> list[int]:
        found: list[int] = self.rows[self.offsets[query] : self.offsets[query + 1]].tolist()
        return found

    def scores_of(self, query: int) -> list[float | None]:
        """Return the scores of a query, None for those that are missing; nothing where all are."""
        if self.scores is None:
            return []
        values = self.scores[self.offsets[query] : self.offsets[query + 1]].tolist()
        scores = [None if math.isnan(value) else value for value in values]
        return scores if any(score is not None for score in scores) else []

    @property
    def has_scores(self) -> bool:
        return self.scores is not None and not bool(np.isnan(self.scores).all())


class JudgedQueries:
    """Judgements line by line, where lines with the same query id are about one query.

    They are held in flat arrays, 9 bytes each and 8 more where a teacher scored; queries are held once.
    """

    def __init__(self) -> None:
        self._row_of: dict[str, int] = {}
        self._queries: list[Query] = []
        self._query_rows, self._target_rows = array("i"), array("i")
        self._positive = array("b")
        self._scores: array[float] | None = None

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self._queries)

    def add(self, query: Query, judged: Iterable[Judged], *, where: str) -> None:
        """Add what one line says about its query.

        Raises:
            DataError: If the query came with another text before.
        """
        row = self._row_of.setdefault(query.id, len(self._queries))
        if row == len(self._queries):
            self._queries.append(query)
        elif (before := self._queries[row]).text != query.text:
            raise DataError(
                where, expected=f"one text for the query {query.id!r}",
                got=f"{query.text[:80]!r} after {before.text[:80]!r}", cure="Give each query an id of its own.",
            )  # fmt: skip
        elif query.answers != before.answers:
            answers = tuple(dict.fromkeys((*before.answers, *query.answers)))
            self._queries[row] = before._replace(answers=answers)
        for target_row, is_positive, score in judged:
            if score is not None and self._scores is None:
                self._scores = array("d", [float("nan")]) * len(self._query_rows)
            if self._scores is not None:
                self._scores.append(float("nan") if score is None else score)
            self._query_rows.append(row)
            self._target_rows.append(target_row)
            self._positive.append(is_positive)

    def finish(self) -> JudgedSplit:
        """Bring the judgements of each query together; one that answers it somewhere is no negative of it elsewhere."""
        queries, targets, positive, scores, contradicted = self._distinct()
        lists = []
        for wanted in (positive, ~positive):
            counts = np.bincount(queries[wanted], minlength=len(self))
            offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
            lists.append(_Lists(targets[wanted], None if scores is None else scores[wanted], offsets))
        without = int((np.diff(lists[0].offsets) == 0).sum())
        notes = [f"queries dropped for want of a positive target: {without}"] if without else []
        if contradicted:
            notes.append(f"given negatives dropped because they answer the same query: {contradicted}")
        return JudgedSplit(self._queries, lists[0], lists[1], tuple(notes))

    def _distinct(self) -> tuple[Integers, Integers, npt.NDArray[np.bool_], npt.NDArray[np.float64] | None, int]:
        """Return each pair of query and target once, in the order of queries and of first mention."""
        queries, targets = np.array(self._query_rows, dtype=np.int64), np.array(self._target_rows, dtype=np.int64)
        positive = np.array(self._positive, dtype=np.bool_)
        span = int(targets.max(initial=0)) + 1
        _, first, pair = np.unique(queries * span + targets, return_index=True, return_inverse=True)
        is_positive, is_negative = np.zeros(len(first), dtype=np.bool_), np.zeros(len(first), dtype=np.bool_)
        is_positive[pair[positive]] = True
        is_negative[pair[~positive]] = True
        order = np.lexsort((first, queries[first]))
        scores = None
        if self._scores is not None:
            given = np.array(self._scores, dtype=np.float64)
            heard = ~np.isnan(given)
            scores = np.full(len(first), np.nan)
            # Of several scores for one pair the first is kept: assignment in reverse lets it be written last.
            scores[pair[heard][::-1]] = given[heard][::-1]
            scores = scores[order]
        chosen = first[order]
        return queries[chosen], targets[chosen], is_positive[order], scores, int((is_positive & is_negative).sum())


@dataclass(frozen=True)
class JudgedSplit:
    """Queries and the targets of each, ready to be written as a split.

    Attributes:
        queries: Every query, also those without a positive.
        positives: Their positives.
        negatives: Their given negatives.
        notes: What was left out.
    """

    queries: Sequence[Query]
    positives: _Lists
    negatives: _Lists
    notes: tuple[str, ...]

    @property
    def features(self) -> Features:
        """The columns of the split: the usual ones, and of the optional ones those that have something to say."""
        present = {
            "negative_ids": len(self.negatives.rows) > 0,
            "positive_scores": self.positives.has_scores,
            "negative_scores": self.negatives.has_scores,
            "answers": any(query.answers for query in self.queries),
        }
        optional = {**GIVEN_FEATURES, **ANSWER_FEATURES}
        return Features({**QUERY_FEATURES, **{name: optional[name] for name, there in present.items() if there}})

    def dataset(self, target_ids: Sequence[str], wanted: Callable[[str], bool] | None = None) -> Dataset:
        """Write the queries that have a positive as a split.

        Args:
            target_ids: The id of each target row.
            wanted: Says by the text of a query whether to take it; None takes all.
        """
        features = self.features
        return dataset_from_rows(self._rows(target_ids, features, wanted), features)

    def _rows(
        self, target_ids: Sequence[str], features: Features, wanted: Callable[[str], bool] | None
    ) -> Iterator[dict[str, Any]]:
        for row, query in enumerate(self.queries):
            if self.positives.length(row) == 0 or (wanted is not None and not wanted(query.text)):
                continue
            values = {
                "query_id": query.id,
                "query": query.text,
                "positive_ids": [target_ids[target] for target in self.positives.rows_of(row)],
                "positive_grades": [1.0] * self.positives.length(row),
                "metadata": query.metadata,
            }
            if "negative_ids" in features:
                values["negative_ids"] = [target_ids[target] for target in self.negatives.rows_of(row)]
            if "positive_scores" in features:
                values["positive_scores"] = self.positives.scores_of(row)
            if "negative_scores" in features:
                values["negative_scores"] = self.negatives.scores_of(row)
            if "answers" in features:
                values["answers"] = list(query.answers)
            yield values
