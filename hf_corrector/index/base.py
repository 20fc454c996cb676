"""What an index reads and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hf_corrector.errors import DataError

MAX_ROWS = 2**32

_EMPTY = torch.iinfo(torch.int64).min  # packed minus infinity: no target
_LOW_BITS = MAX_ROWS - 1
_MAGNITUDE = torch.iinfo(torch.int32).max


class TargetVectors(Protocol):
    """Vectors of all targets, read a range of rows at a time; a cache, corrected vectors or a tensor in memory."""

    def __len__(self) -> int:
        """Return the number of targets."""

    @property
    def dim(self) -> int:
        """Size of a vector."""

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` (exclusive) as ``(stop - start, dim)``, of any floating dtype."""


class RowVectors(TargetVectors, Protocol):
    """Target vectors of which single rows can be had cheaply as well."""

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return any rows ``(n,)`` int64 in the order asked for, ``(n, dim)``."""


@dataclass(frozen=True, eq=False)
class TensorVectors:
    """Target vectors that are in memory already.

    Attributes:
        tensor: The vectors, ``(targets, dim)``, floating point.
    """

    tensor: torch.Tensor

    def __post_init__(self) -> None:
        """Refuse anything but a matrix of floating point numbers."""
        if self.tensor.ndim != 2 or not self.tensor.is_floating_point():
            raise DataError(
                "target vectors", expected="floating point numbers of shape (targets, dim)",
                got=f"{self.tensor.dtype} of shape {tuple(self.tensor.shape)}", cure="Pass one vector per target.",
            )  # fmt: skip

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.tensor)

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return int(self.tensor.shape[1])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` without a copy."""
        return self.tensor[start:stop]

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a copy of any rows ``(n,)`` int64, in the order asked for."""
        return self.tensor.index_select(0, rows.to(self.tensor.device))


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The best targets of each query: score descending, ties by row ascending.

    Attributes:
        rows: Target rows, ``(queries, k)`` int64 on the CPU, -1 where there are fewer than k targets.
        scores: Inner products, ``(queries, k)`` float32 on the CPU, minus infinity beside -1.
    """

    rows: torch.Tensor
    scores: torch.Tensor

    def shifted(self, offset: int) -> SearchResult:
        """Return the result with ``offset`` added to every row, for a search of rows ``offset`` onwards."""
        return SearchResult(torch.where(self.rows >= 0, self.rows + offset, -1), self.scores)


class RunningTopK:
    """Best ``k`` of all scores seen so far, exactly, in whatever blocks they come.

    A score and its row are packed into one integer that orders as (score descending, row ascending) does. No two are
    equal, so ``torch.topk``, which picks among equal values as it likes, has nothing left to choose, at the k-th place
    neither.

    Args:
        queries: Number of queries.
        k: How many to keep.
        device: Where scores come from.
    """

    def __init__(self, queries: int, k: int, *, device: torch.device | str = "cpu") -> None:
        self.k = k
        self._keys = torch.full((queries, k), _EMPTY, dtype=torch.int64, device=device)

    def update(self, scores: torch.Tensor, *, first_query: int, first_row: int) -> None:
        """Take in a block of scores.

        Args:
            scores: Scores of consecutive queries and consecutive rows, ``(queries, rows)`` float32; minus infinity
                keeps a row out.
            first_query: Query of the first line.
            first_row: Row of the first column.
        """
        rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
        keys = pack(scores, rows)
        kept = self._keys[first_query : first_query + len(keys)]
        best = keys.topk(min(self.k, keys.shape[1]), dim=1, sorted=False).values
        kept.copy_(torch.cat([kept, best], dim=1).topk(self.k, dim=1).values)

    def update_some(self, lines: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor) -> None:
        """Take in the scores of single query-target pairs, none of which came before.

        Args:
            lines: Queries, ascending, ``(n,)`` int64.
            rows: Target rows, ``(n,)`` int64.
            scores: Their scores, ``(n,)`` float32.
        """
        if not len(lines):
            return
        changed, counts = torch.unique_consecutive(lines, return_counts=True)
        line = torch.repeat_interleave(torch.arange(len(changed), device=lines.device), counts)
        place = torch.arange(len(lines), device=lines.device) - (counts.cumsum(0) - counts)[line]
        keys = self._keys.new_full((len(changed), int(counts.max())), _EMPTY)
        keys[line, place] = pack(scores, rows)
        self._keys[changed] = torch.cat([self._keys[changed], keys], dim=1).topk(self.k, dim=1).values

    def floor(self) -> torch.Tensor:
        """Return the score that a target must beat for each query, ``(queries,)``: the k-th best so far.

        Rows have to come in ascending order for that: an equal score of a later row loses. Minus infinity where fewer
        than k were seen.
        """
        return unpack(self._keys[:, -1])[1]

    def result(self) -> SearchResult:
        """Return the best so far."""
        rows, scores = unpack(self._keys.cpu())
        return SearchResult(rows, scores)


def pack(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Pack scores and rows into integers that sort by score, equal scores by falling row.

    The bits of a float32 order as integers do once the magnitude bits of negative numbers are flipped.

    Args:
        scores: Scores, ``(..., rows)`` float32.
        rows: Target rows below 2**32, broadcastable to ``scores``, int64.

    Returns:
        Keys, int64; minus infinity gives the smallest int64 whatever its row.
    """
    bits = (scores + 0.0).view(torch.int32)  # the sum turns -0.0 into 0.0, which is equal but has other bits
    bits = bits ^ ((bits >> 31) & _MAGNITUDE)
    keys = (bits.to(torch.int64) << 32) | (_LOW_BITS - rows)
    return keys.masked_fill_(scores == float("-inf"), _EMPTY)


def unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows and scores packed by :func:`pack`; row -1 for what was minus infinity."""
    bits = (keys >> 32).to(torch.int32)
    scores = (bits ^ ((bits >> 31) & _MAGNITUDE)).view(torch.float32)
    rows = _LOW_BITS - (keys & _LOW_BITS)
    empty = keys == _EMPTY
    return rows.masked_fill(empty, -1), scores.masked_fill(empty, float("-inf"))


def merge_results(results: Sequence[SearchResult], k: int) -> SearchResult:
    """Merge searches of disjoint parts of the targets into the search of all of them.

    Args:
        results: At least one result, all for the same queries, rows counted over the whole (see
            :meth:`SearchResult.shifted`) and each of at least ``k`` columns.
        k: How many to keep.

    Returns:
        Exactly what one search of all parts returns.

    Raises:
        DataError: If there is no result, or one has fewer than ``k`` columns or other queries.
    """
    if not results or any(part.rows.shape[1] < k or len(part.rows) != len(results[0].rows) for part in results):
        raise DataError(
            "search results to merge", expected=f"results of the same queries with at least {k} columns each",
            got=f"shapes {[tuple(part.rows.shape) for part in results]}", cure=f"Search every part with k={k}.",
        )  # fmt: skip
    keys = torch.cat([pack(part.scores, part.rows.clamp(min=0)) for part in results], dim=1)
    rows, scores = unpack(keys.topk(k, dim=1).values)
    return SearchResult(rows, scores)
