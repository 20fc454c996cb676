"""Which targets may not be drawn for a query: known positives, and what scores like one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.sampling.keys import IntArray


class ExcludedRows:
    """Targets that are never drawn, ready to be struck out of blocks of scores.

    Args:
        rows: For each query its known positives.
        ceiling: Targets that score higher than this are not drawn either, ``(batch,)``, or None.

    Attributes:
        per_query: The known positives of each query, ascending and distinct.
        ceiling: See above.
    """

    def __init__(self, rows: Sequence[npt.ArrayLike], ceiling: torch.Tensor | None = None) -> None:
        arrays: list[IntArray] = [np.unique(np.asarray(one, dtype=np.int64)) for one in rows]
        queries = np.repeat(np.arange(len(arrays)), [len(one) for one in arrays])
        targets = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        order = np.argsort(targets, kind="stable")
        self.per_query, self.ceiling = arrays, ceiling
        self._targets, self._queries = targets[order], queries[order]

    def strike(self, scores: torch.Tensor, start: int) -> None:
        """Set the scores of excluded targets to −inf, in place.

        Args:
            scores: Scores of the targets from row ``start`` on, ``(batch, n)``.
            start: Row of the first column.
        """
        low, high = np.searchsorted(self._targets, [start, start + scores.shape[1]])
        if high > low:
            queries = torch.from_numpy(self._queries[low:high])
            columns = torch.from_numpy(self._targets[low:high] - start)
            scores[queries.to(scores.device), columns.to(scores.device)] = float("-inf")
        if self.ceiling is not None:
            scores.masked_fill_(scores > self.ceiling.to(scores.device)[:, None], float("-inf"))

    def below(self, ceiling: torch.Tensor | None) -> ExcludedRows:
        """Return the same with another ceiling, ``(batch,)``."""
        return ExcludedRows(self.per_query, ceiling)

    def within(self, pool: IntArray) -> ExcludedRows:
        """Return the same for a part of the targets, whose rows count from 0.

        Args:
            pool: The rows of that part, ascending.
        """
        return ExcludedRows([np.flatnonzero(np.isin(pool, one)) for one in self.per_query], self.ceiling)

    def listed(self, ids: IntArray) -> npt.NDArray[np.bool_]:
        """Say which of some targets listed for each query, ``(batch, n)``, are its known positives."""
        found = [np.isin(row, known) for row, known in zip(ids, self.per_query, strict=True)]
        return np.stack(found) if found else np.zeros(ids.shape, dtype=bool)


@dataclass(frozen=True)
class NegativeFilter:
    """Which targets are too good to be negatives.

    Names and meanings are those of sentence-transformers' ``mine_hard_negatives`` (6.2): where a query has several
    positives its lowest-scoring one counts, and ``range_min`` counts among what the other limits leave.

    Attributes:
        absolute_margin: Negatives score at least this much less than the positive.
        relative_margin: Negatives score at least this share of the positive's score (of its magnitude, where it is
            negative) less than the positive.
        max_score: Negatives score at most this.
        range_min: The so many highest-scoring targets of each query are passed over; known positives do not count.

    Raises:
        ConfigurationError: If a value is out of its range.
    """

    absolute_margin: float | None = None
    relative_margin: float | None = None
    max_score: float | None = None
    range_min: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.range_min < 0 or (self.relative_margin is not None and not 0 <= self.relative_margin <= 1):
            raise ConfigurationError(
                "negative filter", expected="range_min >= 0 and relative_margin between 0 and 1",
                got=f"range_min={self.range_min}, relative_margin={self.relative_margin}", cure="Correct the argument.",
            )  # fmt: skip

    @property
    def reads_positives(self) -> bool:
        """Whether it compares with the positive's score."""
        return self.absolute_margin is not None or self.relative_margin is not None

    @property
    def by_score(self) -> bool:
        """Whether it has a ceiling that does not depend on other targets."""
        return self.reads_positives or self.max_score is not None

    def ceiling(self, positive_scores: torch.Tensor) -> torch.Tensor | None:
        """Return the highest score a negative may have, ``(batch,)``, or None without a limit.

        Args:
            positive_scores: Score of each query's positive, ``(batch,)``.
        """
        limits = []
        if self.absolute_margin is not None:
            limits.append(positive_scores - self.absolute_margin)
        if self.relative_margin is not None:
            limits.append(positive_scores - positive_scores.abs() * self.relative_margin)
        if self.max_score is not None:
            limits.append(torch.full_like(positive_scores, self.max_score))
        return torch.stack(limits).amin(dim=0) if limits else None
