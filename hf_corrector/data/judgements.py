"""What a split says about its queries beyond their positives: given hard negatives and a teacher's scores, as rows."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from hf_corrector.data.retrieval import column, given_columns, unknown_target


class RowLists(Sequence[list[int]]):
    """A list of target rows for every query, held in two flat arrays: 8 bytes per row and 8 per query.

    Attributes:
        rows: The lists one after the other, int64 ``(total,)``.
        offsets: Where each list starts, and the end of the last, int64 ``(queries + 1,)``.
    """

    def __init__(self, rows: npt.NDArray[np.int64], offsets: npt.NDArray[np.int64]) -> None:
        self.rows, self.offsets = rows, offsets

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        """Return the rows of a query, or of several."""
        if isinstance(index, slice):
            return [self[query] for query in range(*index.indices(len(self)))]
        query = range(len(self))[index]
        found: list[int] = self.rows[self.offsets[query] : self.offsets[query + 1]].tolist()
        return found


class RowScores(Sequence[dict[int, float]]):
    """Scores by target row for every query, held in three flat arrays: 16 bytes per score and 8 per query.

    Attributes:
        rows: Target rows, query after query.
        scores: A score for each of them, float64 ``(total,)``.
    """

    def __init__(self, rows: RowLists, scores: npt.NDArray[np.float64]) -> None:
        self.rows, self.scores = rows, scores

    def __len__(self) -> int:
        """Return the number of queries."""
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[int, float]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[int, float]]: ...
    def __getitem__(self, index: int | slice) -> dict[int, float] | list[dict[int, float]]:
        """Return the scores of a query, or of several."""
        if isinstance(index, slice):
            return [self[query] for query in range(*index.indices(len(self)))]
        query = range(len(self))[index]
        start, end = self.rows.offsets[query], self.rows.offsets[query + 1]
        return dict(zip(self.rows[query], self.scores[start:end].tolist(), strict=True))


def given_negatives_as_rows(split: Dataset, targets: Dataset) -> RowLists:
    """Return each query's given hard negatives as target rows, in the order of the split and of its lists.

    Args:
        split: Judged queries; without a column ``negative_ids`` every list is empty.
        targets: The corpus.

    Raises:
        DataError: If a query names a target that is not in the corpus.
    """
    rows, lengths = array("q"), array("q")
    row_of = _row_of(targets) if "negative_ids" in split.column_names else {}
    for number, (_, negatives, _, _) in enumerate(given_columns(split)):
        rows.extend(_rows(negatives, row_of, number, "negative_ids"))
        lengths.append(len(negatives))
    return RowLists(np.array(rows, dtype=np.int64), _offsets(lengths))


def teacher_scores_as_rows(split: Dataset, targets: Dataset) -> RowScores:
    """Return what a teacher gave to each query's positives and given negatives, as ``{target row: score}``.

    Args:
        split: Judged queries; without columns ``positive_scores`` and ``negative_scores`` every dictionary is empty.
        targets: The corpus.

    Raises:
        DataError: If a query names a target that is not in the corpus.
    """
    rows, scores, lengths = array("q"), array("d"), array("q")
    scored = any(name in split.column_names for name in ("positive_scores", "negative_scores"))
    row_of = _row_of(targets) if scored else {}
    for number, (positives, negatives, positive_scores, negative_scores) in enumerate(given_columns(split)):
        before = len(rows)
        for name, ids, values in (
            ("positive_ids", positives, positive_scores), ("negative_ids", negatives, negative_scores),
        ):  # fmt: skip
            if not values:
                continue
            heard = [place for place, score in enumerate(values) if score is not None]
            rows.extend(_rows([ids[place] for place in heard], row_of, number, name))
            scores.extend(values[place] for place in heard)
        lengths.append(len(rows) - before)
    return RowScores(RowLists(np.array(rows, dtype=np.int64), _offsets(lengths)), np.array(scores, dtype=np.float64))


def _row_of(targets: Dataset) -> dict[str, int]:
    return {target_id: row for row, target_id in enumerate(column(targets, "id"))}


def _rows(ids: list[Any], row_of: Mapping[str, int], number: int, name: str) -> list[int]:
    try:
        return [row_of[target_id] for target_id in ids]
    except KeyError as error:
        raise unknown_target(f"split, row {number}", name, error.args[0]) from error


def _offsets(lengths: array[int]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(np.array(lengths, dtype=np.int64))])
