"""Fast inner products of stored rows with queries, and a bound on how far each may be off.

Multiplying in bfloat16 is several times faster than in float32 on processors that have it, and rounds to about three
digits. That is enough to rule out nearly all targets, provided that the error is bounded and not guessed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

BLOCK_ROWS = 64

_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # largest relative error of one rounding
_PAIRS = 512  # small enough for memory that is at hand already; fresh pages cost more than the products
_ROWS_FIRST = 32  # from so many queries on, rows first is the faster layout to take maxima of in bfloat16


@dataclass(frozen=True)
class RowBounds:
    """What is known of all stored rows together.

    Attributes:
        norm: Their largest norm.
        rounding: The largest norm of what rounding a row to bfloat16, where it is, takes from it.
    """

    norm: float = 0.0
    rounding: float = 0.0

    @classmethod
    def of(cls, rows: torch.Tensor) -> RowBounds:
        """Measure rows ``(n, dim)``; not finite if one of them is not."""
        if not len(rows):
            return cls()
        exact = rows.float()
        norm = exact.norm(dim=1).max().item()
        rounding = 0.0
        if rows.dtype != torch.bfloat16:
            rounding = (exact - exact.bfloat16().float()).norm(dim=1).max().item()
        return cls(norm * (1 + 1e-4), rounding * (1 + 1e-4))  # norms are rounded themselves

    def __or__(self, other: RowBounds) -> RowBounds:
        """Return what holds for the rows of both."""
        return RowBounds(max(self.norm, other.norm), max(self.rounding, other.rounding))


@dataclass(frozen=True, eq=False)
class Probe:
    """What a scan computes for query q and row y: ``(⟨q, y⟩ + offset_q) · scale_y + reach_q · slack_y``.

    Attributes:
        vectors: What rows are multiplied with, ``(queries, dim)`` float64.
        offsets: ``(queries,)`` float64, or None for zeros.
        row_scale: Positive, ``(targets,)`` float32, or None for ones.
        row_slack: How far each row may be from what it stands for, ``(targets,)`` float32 and not negative, or None
            for zeros. Scores are upper bounds then.
        reach: What a row's slack is multiplied with, ``(queries,)`` float64; given if ``row_slack`` is.
        allowance: Error of the formula itself, on top of that of its computation, ``(queries,)`` float64, or None.
    """

    vectors: torch.Tensor
    offsets: torch.Tensor | None = None
    row_scale: torch.Tensor | None = None
    row_slack: torch.Tensor | None = None
    reach: torch.Tensor | None = None
    allowance: torch.Tensor | None = None

    def highest(self, lines: torch.Tensor, rows: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        """Return the highest that the scores of single pairs can be, from float64 products, ``(n,)`` float64.

        Args:
            lines: Queries, ``(n,)`` int64.
            rows: Target rows, ``(n,)`` int64.
            stored: Those rows, ``(n, dim)``.
        """
        scores = pair_products(self.vectors, lines, stored)
        if self.offsets is not None:
            scores += self.offsets[lines]
        if self.row_scale is not None:
            scores *= self.row_scale[rows.cpu()].to(scores)
        if self.row_slack is not None and self.reach is not None:
            scores += self.reach[lines] * self.row_slack[rows.cpu()].to(scores)
        if self.allowance is not None:
            scores += self.allowance[lines]
        return scores + (scores.abs() + 1e-30) * 2.0**-22  # what it stands for is rounded to float32

    def part(self, first: int, stop: int) -> Probe:
        """Return the probe of queries ``first`` to ``stop``."""

        def cut(one: torch.Tensor | None) -> torch.Tensor | None:
            return None if one is None else one[first:stop]

        return Probe(
            self.vectors[first:stop], cut(self.offsets), self.row_scale, self.row_slack, cut(self.reach),
            cut(self.allowance),
        )  # fmt: skip


class Products:
    """Scores of one block of queries in one precision.

    The error of a computed score s is at most ``margin + relative · |s|``: products of rounded factors differ by
    ``‖q − q̂‖‖ŷ‖ + ‖q‖‖y − ŷ‖`` (Cauchy-Schwarz), float32 accumulation in any order by ``g‖q̂‖‖ŷ‖`` with
    ``g = dim · 2⁻²⁴ / (1 − dim · 2⁻²⁴)`` (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), and every later
    rounding by one unit relative to its result.

    Args:
        probe: What to compute.
        half: Multiply in bfloat16 instead of float32.
        bounds: What is known of the rows; without rounding if they are multiplied as they are stored.
        device: Where.
    """

    def __init__(self, probe: Probe, *, half: bool, bounds: RowBounds, device: torch.device) -> None:
        self.dtype = torch.bfloat16 if half else torch.float32
        self.scale, self.slack = probe.row_scale, probe.row_slack
        self.vectors = probe.vectors.to(device=device, dtype=self.dtype)
        self.offsets = None if probe.offsets is None else probe.offsets.to(device=device, dtype=self.dtype)
        # Rounded up, as what is computed with slack has to stay an upper bound.
        self.reach = None if probe.reach is None else (probe.reach.to(device) * (1 + 2.0**-6)).to(self.dtype)
        self._device = device
        self.margin, self.relative = self._error(probe, bounds)

    def _error(self, probe: Probe, bounds: RowBounds) -> tuple[torch.Tensor, float]:
        unit, dim = _UNIT[self.dtype], probe.vectors.shape[1]
        query_norm = probe.vectors.norm(dim=1)
        query_rounding = (probe.vectors - self.vectors.to(probe.vectors)).norm(dim=1)
        row_norm = bounds.norm + bounds.rounding
        # Two more than the sum needs, for rows stored in float64.
        accumulation = (dim + 4) * 2.0**-24 / (1 - (dim + 4) * 2.0**-24)
        if not _float32_is_whole():
            accumulation += 3 * _UNIT[torch.bfloat16]
        margin = query_rounding * row_norm + query_norm * bounds.rounding
        margin = margin + accumulation * (query_norm + query_rounding) * row_norm + 1e-30
        roundings = 1
        if probe.offsets is not None:
            margin, roundings = margin + 2 * unit * probe.offsets.abs(), roundings + 1
        if probe.row_scale is not None:
            largest = float(probe.row_scale.max()) if len(probe.row_scale) else 1.0
            margin, roundings = margin * largest, roundings + 2
        if probe.row_slack is not None:
            # The sum with the slack may be small where both terms are large; the first was rounded before it.
            largest = float(probe.row_slack.max()) if len(probe.row_slack) else 0.0
            reach = torch.zeros_like(query_norm) if probe.reach is None else probe.reach
            margin, roundings = margin + 5 * unit * reach * largest, roundings + 1
        if probe.allowance is not None:
            margin = margin + probe.allowance
        # What is returned is rounded to float32 once more, by whoever computes it exactly.
        return margin.to(self._device) * (1 + 1e-3), roundings * unit / (1 - roundings * unit) + 2.0**-23

    def of(self, chunk: torch.Tensor, first_row: int) -> ScoreBlock:
        """Return the scores of consecutive rows.

        Args:
            chunk: Rows in the products' dtype, ``(rows, dim)``.
            first_row: Row number of the first.
        """
        rows_first = self.dtype == torch.bfloat16 and len(self.vectors) >= _ROWS_FIRST
        with torch.autocast(chunk.device.type, enabled=False):
            scores = F.linear(chunk, self.vectors, self.offsets) if rows_first else self._queries_first(chunk)
        by_query = scores.T if rows_first else scores
        stop = first_row + len(chunk)
        if self.scale is not None:
            by_query *= self.scale[first_row:stop].to(self._device, self.dtype)
        if self.slack is not None and self.reach is not None:
            slack = (self.slack[first_row:stop].to(self._device) * (1 + 2.0**-6)).to(self.dtype)
            by_query.addcmul_(self.reach[:, None], slack[None, :])
        return ScoreBlock(by_query, rows_first)

    def _queries_first(self, chunk: torch.Tensor) -> torch.Tensor:
        if self.offsets is None:
            return self.vectors @ chunk.T
        return torch.addmm(self.offsets[:, None], self.vectors, chunk.T)

    def thresholds(self, floor: torch.Tensor) -> torch.Tensor:
        """Return what a computed score must reach so that the true one can reach ``floor``, ``(queries,)``."""
        least = floor.double() - self.margin
        least = least / torch.where(least >= 0, 1 + self.relative, 1 - self.relative)
        return (least - least.abs() * 2 * _UNIT[self.dtype]).to(self.dtype)  # rounded down

    def upper(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the highest that true scores can be, given computed ones ``(queries,)``; float64."""
        return scores.double() + self.relative * scores.double().abs() + self.margin.cpu()


@dataclass(frozen=True, eq=False)
class ScoreBlock:
    """Scores of consecutive queries and consecutive rows.

    Attributes:
        scores: ``(queries, rows)``, possibly a transposed view.
        rows_first: Whether memory runs over queries first.
    """

    scores: torch.Tensor
    rows_first: bool

    def hits(self, thresholds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Find all scores that reach a query's threshold.

        Blocks of rows are looked at through their maximum first: that is one cheap pass over the scores, and all but a
        few blocks end there.

        Args:
            thresholds: ``(queries,)`` in the scores' dtype.

        Returns:
            Query, column and score of each, ``(n,)``, ordered by query and column. Minus infinity is never among them.
        """
        line, block = (self._maxima() >= thresholds[:, None]).nonzero(as_tuple=True)
        columns = block[:, None] * BLOCK_ROWS + torch.arange(BLOCK_ROWS, device=block.device)
        inside = columns < self.scores.shape[1]
        lines = line[:, None].expand_as(columns)
        values = self.scores[lines, columns.clamp(max=max(self.scores.shape[1] - 1, 0))]
        found = inside & (values >= thresholds[line][:, None]) & (values > float("-inf"))
        return lines[found], columns[found], values[found].float()

    def _maxima(self) -> torch.Tensor:
        """Return the largest score of each block of rows, ``(queries, blocks)``."""
        queries, rows = self.scores.shape
        whole = rows // BLOCK_ROWS * BLOCK_ROWS
        if self.rows_first:
            maxima = self.scores.T[:whole].view(-1, BLOCK_ROWS, queries).amax(dim=1).T if whole and queries else None
        else:
            maxima = self.scores[:, :whole].reshape(queries, -1, BLOCK_ROWS).amax(dim=2) if whole and queries else None
        if whole == rows:
            return self.scores.new_empty(queries, 0) if maxima is None else maxima
        tail = self.scores[:, whole:].amax(dim=1, keepdim=True)
        return tail if maxima is None else torch.cat([maxima, tail], dim=1)


def pair_products(queries: torch.Tensor, lines: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the inner products of queries ``lines`` with one vector each, ``(n,)`` float64.

    Args:
        queries: ``(queries, dim)`` float64.
        lines: ``(n,)`` int64.
        vectors: ``(n, dim)``.
    """
    products = queries.new_empty(len(lines))
    for start in range(0, len(lines), _PAIRS):
        part = slice(start, start + _PAIRS)
        chosen = queries.index_select(0, lines[part])
        torch.sum(chosen.mul_(vectors[part]), dim=1, out=products[part])
    return products


def _float32_is_whole() -> bool:
    """Say whether float32 products are that; torch can be told to make bfloat16 or TF32 products of them."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for one backend alone, which this question does not cover
        return False


@cache
def bfloat16_is_fast() -> bool:
    """Measure, once, whether this processor multiplies bfloat16 clearly faster than float32."""
    rows, queries = torch.ones(2048, 384), torch.ones(64, 384)
    return 1.4 * _seconds(rows.bfloat16(), queries.bfloat16()) < _seconds(rows, queries)


def _seconds(rows: torch.Tensor, queries: torch.Tensor) -> float:
    spent = []
    for _ in range(7):
        started = time.perf_counter()
        F.linear(rows, queries)
        spent.append(time.perf_counter() - started)
    return min(spent)
