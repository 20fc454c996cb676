"""Exact search at the speed of an approximate scan: bounded products rule targets out, float64 decides among the rest.

Every target is multiplied with every query once, in bfloat16 where that is fast. A target whose score, error bound
included, does not reach the k-th best exact score found so far is done with; all others are scored exactly on the spot.
However wide the bound, the result is :class:`hf_corrector.index.exact.ExactIndex`'s: a wide one costs time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import MAX_ROWS, RowVectors, RunningTopK, SearchResult, TargetVectors
from hf_corrector.index.exact import RowMask, checked_search
from hf_corrector.index.products import Probe, Products, RowBounds, ScoreBlock, bfloat16_is_fast, pair_products

PRECISIONS = ("auto", "float32", "bfloat16")

_BLOCK_SCORES = 2**20  # scores held at a time; in the second level cache for a usual number of queries
_BLOCK_QUERIES = 256
_CHUNK_ROWS = (4096, 65_536)
_EXACT_PAIRS = 1024  # pairs scored exactly at a time
_CONVERTED_FROM = 16  # queries from which converting a float32 chunk to bfloat16 pays


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive rows in hand.

    Attributes:
        first_row: Row number of the first.
        vectors: The rows as they are scanned, ``(rows, dim)``.
    """

    first_row: int
    vectors: torch.Tensor


class Rescore(Protocol):
    """How the exact scores of single pairs are had."""

    def __call__(self, lines: torch.Tensor, rows: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Return scores ``(n,)`` float32 of queries ``lines`` and target ``rows``, all rows inside ``chunk``."""


class ScannedRows:
    """Rows as a scan reads them, with what it has to know of them.

    Args:
        vectors: The targets.
        precision: ``"float32"``, ``"bfloat16"`` or ``"auto"``: bfloat16 where the processor is faster at it and, for
            rows stored otherwise, there are enough queries to pay for converting them. Half precision of the other
            kind is never multiplied.
        keep: Keep a copy of all rows in bfloat16, which scans then read.
        changing: The vectors may change between searches: measure rows anew in every search instead of once. Not
            together with ``keep``.
        device: Where to compute. bfloat16 is for processors only: what GPUs round on the way is not bounded here.

    Raises:
        ConfigurationError: If arguments are out of range or there are 2**32 targets or more.
    """

    def __init__(
        self, vectors: TargetVectors, *, precision: str = "auto", keep: bool = False, changing: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.vectors, self.device, self.keep, self.changing = vectors, torch.device(device), keep, changing
        on_processor = self.device.type == "cpu"
        if precision not in PRECISIONS or (precision == "bfloat16" and not on_processor) or (keep and changing):
            raise ConfigurationError(
                "scan", expected=f"a precision among {PRECISIONS}, bfloat16 on a processor, rows kept or changing",
                got=f"{precision!r} on {self.device}, keep={keep}, changing={changing}", cure="Leave 'auto'.",
            )  # fmt: skip
        if len(vectors) >= MAX_ROWS:
            raise ConfigurationError(
                "scan", expected=f"fewer than {MAX_ROWS} targets", got=str(len(vectors)),
                cure="Search parts of them and merge the results.",
            )  # fmt: skip
        self.precision = precision
        self._bounds: RowBounds | None = None
        self._kept: torch.Tensor | None = None

    def forget(self) -> None:
        """Forget copy and measurements; call it when the vectors have changed."""
        self._bounds, self._kept = None, None

    @property
    def bounds(self) -> RowBounds:
        """What is known of all rows; reads them on first use."""
        if self._bounds is None:
            if self.keep:
                self._kept = torch.empty(len(self.vectors), self.vectors.dim, dtype=torch.bfloat16, device=self.device)
            bounds = RowBounds()
            for start in range(0, len(self.vectors), _CHUNK_ROWS[0]):
                chunk = self._read(start, min(start + _CHUNK_ROWS[0], len(self.vectors)))
                bounds = bounds | measured(chunk, start)
                if self._kept is not None:
                    self._kept[start : start + len(chunk)] = chunk
            self._bounds = bounds
        return self._bounds

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """Yield all rows in order, as stored or from the copy."""
        for start in range(0, len(self.vectors), rows):
            stop = min(start + rows, len(self.vectors))
            yield Chunk(start, self._read(start, stop) if self._kept is None else self._kept[start:stop])

    def half(self, dtype: torch.dtype, queries: int) -> bool:
        """Say whether to multiply rows of this dtype in bfloat16."""
        if self.precision != "auto" or self.device.type != "cpu":
            return self.precision == "bfloat16"
        return bfloat16_is_fast() and (dtype == torch.bfloat16 or queries >= _CONVERTED_FROM)

    def products(self, probe: Probe, half: bool, bounds: RowBounds) -> Products:
        """Return what multiplies rows within ``bounds``."""
        as_stored = RowBounds(bounds.norm) if not (half or self.keep) else bounds
        return Products(probe, half=half, bounds=as_stored, device=self.device)

    def _read(self, start: int, stop: int) -> torch.Tensor:
        chunk = self.vectors.read(start, stop).detach().to(self.device)
        if chunk.shape != (stop - start, self.vectors.dim):
            raise DataError(
                f"targets {start} to {stop - 1}", expected=f"vectors of shape {(stop - start, self.vectors.dim)}",
                got=str(tuple(chunk.shape)), cure="Check what reads the vectors.",
            )  # fmt: skip
        return chunk


def measured(chunk: torch.Tensor, first_row: int) -> RowBounds:
    """Measure rows.

    Raises:
        DataError: If one is not finite; names it.
    """
    bounds = RowBounds.of(chunk)
    if not math.isfinite(bounds.norm + bounds.rounding):
        finite = torch.isfinite(chunk).all(dim=1)
        row = "" if bool(finite.all()) else f" {first_row + int((~finite).nonzero()[0, 0])}"
        raise DataError(f"target{row}", expected="finite numbers", got="NaN or infinity", cure="Encode it again.")
    return bounds


def scan(
    rows: ScannedRows, probe: Probe, k: int, *, mask: RowMask | None = None, rescore: Rescore | None = None,
    refine: bool = False,
) -> SearchResult:  # fmt: skip
    """Find the ``k`` best targets of each query in one pass over the rows, in bounded memory.

    Args:
        rows: The targets.
        probe: What is computed for every pair.
        k: How many to keep.
        mask: Rows hidden from queries.
        rescore: Exact scores of the pairs whose computed score, bound included, does not rule them out. They must
            not be above what the probe stands for (see its ``row_slack`` and ``allowance``). Without it the computed
            scores themselves decide, as they are.
        refine: Compute what the probe says in float64 for the pairs in question, and have only those rescored that
            are still not ruled out. For rescoring that is dear; not with rows that are kept as a copy.

    Returns:
        With ``rescore`` exactly the k best by exact score, ties by row ascending; without, the k best computed scores.
    """
    count = len(probe.vectors)
    best = RunningTopK(count, k, device=rows.device)
    bounds = RowBounds() if rows.changing else rows.bounds
    size = min(max(_BLOCK_SCORES // max(1, min(count, _BLOCK_QUERIES)), _CHUNK_ROWS[0]), _CHUNK_ROWS[1])
    products: list[Products] = []
    for chunk in rows.chunks(size):
        half = rows.half(chunk.vectors.dtype, count)
        if rows.changing or not products:
            bounds = measured(chunk.vectors, chunk.first_row) if rows.changing else bounds
            products = [
                rows.products(probe.part(first, first + _BLOCK_QUERIES), half, bounds)
                for first in range(0, count, _BLOCK_QUERIES)
            ]
        multiplied = chunk.vectors.to(torch.bfloat16 if half else torch.float32)
        for number, one in enumerate(products):
            first = number * _BLOCK_QUERIES
            block = one.of(multiplied, chunk.first_row)
            if mask is not None:
                mask.hide(block.scores, first_query=first, first_row=chunk.first_row)
            _take(best, block, _Judge(one, first, chunk, rescore, probe if refine else None))
    return best.result()


def highest_scores(rows: ScannedRows, probe: Probe, scores: torch.Tensor) -> torch.Tensor:
    """Return the highest that true scores can be where :func:`scan` computed ``scores`` ``(queries,)``; float64."""
    half = rows.half(next(rows.chunks(1)).vectors.dtype, len(probe.vectors)) if len(rows.vectors) else False
    return rows.products(probe, half, rows.bounds).upper(scores)


@dataclass(frozen=True, eq=False)
class _Judge:
    """How pairs of one block are scored: its products, first query and rows, what is exact, what is to be refined."""

    products: Products
    first_query: int
    chunk: Chunk
    rescore: Rescore | None
    refined: Probe | None = None

    def remaining(self, lines: torch.Tensor, columns: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """Return which pairs are not ruled out by the probe's float64 scores, ``(n,)`` bool."""
        if self.refined is None:
            return torch.ones_like(lines, dtype=torch.bool)
        stored = self.chunk.vectors.index_select(0, columns)
        return self.refined.highest(lines + self.first_query, columns + self.chunk.first_row, stored) >= floor[lines]

    def exact(self, lines: torch.Tensor, columns: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.rescore is None:
            return scores
        return self.rescore(lines + self.first_query, columns + self.chunk.first_row, self.chunk)

    def thresholds(self, floor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """Return what computed scores must reach, given the floor and the queries whose floor is this block's own."""
        if self.rescore is not None:
            return self.products.thresholds(floor)
        least = floor.to(self.products.dtype)  # computed scores have this dtype, so nothing is rounded
        return torch.where(own, least, torch.nextafter(least, torch.full_like(least, float("inf"))))


def _take(best: RunningTopK, block: ScoreBlock, judge: _Judge) -> None:
    """Take in what a block holds that may be among the best."""
    first, count = judge.first_query, len(block.scores)
    floor = best.floor()[first : first + count]
    own = floor == float("-inf")
    if bool(own.any()):
        floor = torch.where(own, _first_floor(block, judge, best.k), floor)
    lines, columns, scores = block.hits(judge.thresholds(floor, own))
    for start in range(0, len(lines), _EXACT_PAIRS):
        part = slice(start, start + _EXACT_PAIRS)
        left = judge.remaining(lines[part], columns[part], floor)
        line, column = lines[part][left], columns[part][left]
        exact = judge.exact(line, column, scores[part][left])
        best.update_some(line + first, column + judge.chunk.first_row, exact)


def _first_floor(block: ScoreBlock, judge: _Judge, k: int) -> torch.Tensor:
    """Return a lower bound of the k-th best exact score in a block, so that not all of it has to be scored exactly."""
    queries, rows = block.scores.shape
    if rows < k:
        return torch.full((queries,), float("-inf"), device=block.scores.device)
    values, columns = block.scores.topk(k, dim=1)
    lines = torch.arange(queries, device=columns.device)[:, None].expand_as(columns)
    flat = [one.reshape(-1) for one in (lines, columns, values.float())]
    exact = torch.empty(queries * k, device=columns.device)
    for start in range(0, queries * k, _EXACT_PAIRS):
        part = slice(start, start + _EXACT_PAIRS)
        exact[part] = judge.exact(flat[0][part], flat[1][part], flat[2][part])
    exact = exact.view(queries, k)
    return exact.masked_fill(values == float("-inf"), float("-inf")).amin(dim=1)


class ScanIndex:
    """Exact inner-product search, several times faster than :class:`hf_corrector.index.exact.ExactIndex`.

    Its results are ExactIndex's, to the bit but for scores within 2⁻⁵³ of a float32 rounding boundary: inner products
    that decide are float64, rounded to float32.

    Args:
        vectors: The targets. What it learns of them (and the copy, with ``keep``) stays until :meth:`forget`.
        precision: See :class:`ScannedRows`.
        keep: Keep a bfloat16 copy in memory, two bytes a number, and read that; single rows are then gathered from
            ``vectors``, which decide. For vectors on disk, or stored in float32 and searched often.
        changing: The vectors may change between searches.
        device: Where to compute.

    Raises:
        ConfigurationError: If arguments are out of range or there are 2**32 targets or more.
    """

    def __init__(
        self, vectors: RowVectors, *, precision: str = "auto", keep: bool = False, changing: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.vectors = vectors
        self.rows = ScannedRows(vectors, precision=precision, keep=keep, changing=changing, device=device)

    def forget(self) -> None:
        """Forget what was learnt of the vectors; call it when they have changed."""
        self.rows.forget()

    def search(
        self, queries: torch.Tensor, k: int, *, excluded: Sequence[npt.NDArray[np.int64]] | None = None
    ) -> SearchResult:
        """Find the ``k`` targets of highest inner product for each query.

        Args:
            queries: Query vectors, ``(queries, dim)``.
            k: How many targets to return; rows beyond the number of targets are -1.
            excluded: For each query target rows that must not be returned, for instance its known positives.

        Returns:
            Rows and scores, score descending, ties by row ascending.

        Raises:
            ConfigurationError: If ``k`` is below 1.
            DataError: If shapes do not fit, excluded rows do not exist or a vector is not finite.
        """
        exact = checked_search(queries, k, self.vectors).to(self.rows.device)
        mask = None if excluded is None else RowMask(excluded, queries=len(exact), targets=len(self.vectors))

        def rescore(lines: torch.Tensor, rows: torch.Tensor, chunk: Chunk) -> torch.Tensor:
            if self.rows.keep:  # what is scanned is rounded
                return inner_products(exact, lines, self.vectors.gather(rows).to(exact.device))
            return inner_products(exact, lines, chunk.vectors.index_select(0, rows - chunk.first_row))

        return scan(self.rows, Probe(exact), k, mask=mask, rescore=rescore)


def inner_products(queries: torch.Tensor, lines: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return :func:`hf_corrector.index.products.pair_products` rounded to float32."""
    return pair_products(queries, lines, vectors).float()
