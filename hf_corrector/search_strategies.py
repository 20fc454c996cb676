"""Bridge between corrector and index: the ways to search stale rows as if every one had been corrected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.affine_view import AffineView
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.index.base import RowVectors, SearchResult, TensorVectors, pack, unpack
from hf_corrector.index.exact import RowMask
from hf_corrector.index.products import Probe
from hf_corrector.index.scan import Chunk, ScanIndex, ScannedRows, highest_scores, inner_products, scan
from hf_corrector.models.modeling_corrector import CorrectorModel

if TYPE_CHECKING:
    from hf_corrector.index.faiss import FaissIndex, FaissParameters

_RESCORED_PAIRS = 8192
_LEAST_SHORTLIST = 40
# Candidates the scan finds where the map is only near to the corrector, relative to those that are judged in any case.
_LONGER = 8
# Spreads. The first ones are where the map is rather too high than too low, so that two or three leave out too many.
_LIKELY = 4.0

Excluded = Sequence[npt.NDArray[np.int64]] | None


@dataclass(frozen=True, eq=False)
class CorrectedResult(SearchResult):
    """The best targets of each query by corrected score: score descending, ties by row ascending.

    Attributes:
        exact: For which queries it is proved that correcting every target gives the same, ``(queries,)`` bool.
    """

    exact: torch.Tensor


class Strategy(Protocol):
    """One way to search, made ready for one state of the corrector."""

    def search(self, queries: torch.Tensor, k: int, excluded: Excluded) -> CorrectedResult:
        """Search for checked queries, ``(queries, dim)`` float64."""


@dataclass(frozen=True, eq=False)
class _Judge:
    """Scores of pairs by the corrector itself."""

    rows: CorrectedTargets
    queries: torch.Tensor

    def of_pairs(self, lines: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the scores of queries ``lines`` and target ``rows``, ``(n,)`` float32."""
        return inner_products(self.queries, lines, self.rows.gather(rows).to(self.queries.device))

    def in_chunk(self, lines: torch.Tensor, rows: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Do the same during a scan."""
        return self.of_pairs(lines, rows)

    def best_of(self, shortlist: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and scores of the ``k`` best of each query's shortlist ``(queries, m)``, padded if need be."""
        return _best(shortlist, self.scores_of(shortlist), k)

    def best_of_likely(self, found: SearchResult, k: int, *, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the same for the ``first`` of a long shortlist and those of the others that may be among the best.

        How far the shortlist's own scores are off for the first ones of a query says how far they may be off for the
        others: one is judged if its score, moved by the mean of these errors and :data:`_LIKELY` times their spread,
        reaches the k-th best of the first ones.
        """
        head, rest = found.rows[:, :first], found.rows[:, first:]
        scores = self.scores_of(head)
        errors = (scores - found.scores[:, :first].cpu()).masked_fill(head.cpu() < 0, torch.nan)
        mean = errors.nanmean(dim=1, keepdim=True)
        spread = (errors - mean).square().nanmean(dim=1, keepdim=True).sqrt()
        bar = scores.topk(min(k, scores.shape[1]), dim=1).values[:, -1:]
        likely = found.scores[:, first:].cpu() + mean + _LIKELY * spread >= bar
        others = rest.masked_fill(~likely.to(rest.device), -1)
        return _best(torch.cat([head, others], dim=1), torch.cat([scores, self.scores_of(others)], dim=1), k)

    def scores_of(self, shortlist: torch.Tensor) -> torch.Tensor:
        """Return the scores of each query's shortlist, ``(queries, m)`` on the CPU; -inf where it names no row."""
        scores = torch.full(shortlist.shape, float("-inf"))
        step = max(1, _RESCORED_PAIRS // max(1, shortlist.shape[1]))
        for first in range(0, len(shortlist), step):
            part = shortlist[first : first + step]
            lines, places = (part >= 0).nonzero(as_tuple=True)
            if not len(lines):
                continue
            scores[lines + first, places] = self.of_pairs(lines + first, part[lines, places]).cpu()
        return scores


def _best(rows: torch.Tensor, scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    keys = pack(scores, rows.clamp(min=0))
    if keys.shape[1] < k:
        keys = torch.nn.functional.pad(keys, (0, k - keys.shape[1]), value=torch.iinfo(torch.int64).min)
    return unpack(keys.topk(k, dim=1).values)


class ExactStrategy:
    """Scan corrected rows, from a snapshot or corrected on the way."""

    def __init__(self, rows: CorrectedTargets, *, snapshot: str, device: str) -> None:
        source: RowVectors = TensorVectors(rows.snapshot()) if snapshot == "float32" else rows
        self.index = ScanIndex(source, keep=snapshot == "bfloat16", changing=snapshot == "none", device=device)

    def search(self, queries: torch.Tensor, k: int, excluded: Excluded) -> CorrectedResult:
        """Search all corrected rows."""
        return _proved(self.index.search(queries, k, excluded=excluded))


class FoldedStrategy:
    """Scan stale rows by the folded query; pairs that may be among the best are scored by the corrector."""

    def __init__(self, rows: CorrectedTargets, view: AffineView, *, device: str) -> None:
        self.rows, self.view = rows, view
        self.scanned = ScannedRows(rows.stale, device=device)
        self.inverse_norms = view.inverse_norms(rows.stale)

    def search(self, queries: torch.Tensor, k: int, excluded: Excluded) -> CorrectedResult:
        """Search all stale rows."""
        folded, offsets = self.view.fold(queries)
        scale = 1.0 if self.inverse_norms is None or not len(self.rows) else float(self.inverse_norms.max())
        allowance = self.view.allowance(queries, row_norm=self.scanned.bounds.norm, largest_scale=scale)
        probe = Probe(folded, offsets, self.inverse_norms, allowance=allowance)
        mask, judge = _mask(excluded, queries, self.rows), _Judge(self.rows, queries)
        return _proved(scan(self.scanned, probe, k, mask=mask, rescore=judge.in_chunk, refine=True))


class TwoStageStrategy:
    """Shortlist by the folded query of an affine map, judged by the corrector; optionally with a certificate."""

    def __init__(
        self, rows: CorrectedTargets, view: AffineView, *, shortlist: int | None, certify: bool, device: str
    ) -> None:
        self.rows, self.view, self.shortlist = rows, view, shortlist
        self.scanned = ScannedRows(rows.stale, device=device)
        self.inverse_norms = view.inverse_norms(rows.stale)
        self.slack = view.slack(rows, self.inverse_norms) if certify else None

    def search(self, queries: torch.Tensor, k: int, excluded: Excluded) -> CorrectedResult:
        """Search all stale rows, then judge the shortlist."""
        folded, offsets = self.view.fold(queries)
        mask, judge = _mask(excluded, queries, self.rows), _Judge(self.rows, queries)
        if self.slack is None:
            size = shortlist_size(self.shortlist, k)
            longer = size if self.shortlist is not None or self.view.exact else _LONGER * size
            found = scan(self.scanned, Probe(folded, offsets, self.inverse_norms), longer, mask=mask)
            exact = torch.full((len(queries),), len(self.rows) <= size)
            return CorrectedResult(*judge.best_of_likely(found, k, first=size), exact=exact)
        probe = Probe(folded, offsets, self.inverse_norms, self.slack, reach=queries.norm(dim=1))
        if self.shortlist is None:
            return _proved(scan(self.scanned, probe, k, mask=mask, rescore=judge.in_chunk, refine=True))
        found = scan(self.scanned, probe, max(self.shortlist, k) + 1, mask=mask)
        rows, scores = judge.best_of(found.rows[:, :-1], k)
        # Whatever is not on the shortlist scores at most as high as the best that is left out may.
        left_out = found.scores[:, -1]
        highest = highest_scores(self.scanned, probe, left_out)
        return CorrectedResult(rows, scores, exact=(left_out == float("-inf")) | (scores[:, -1].double() > highest))


class FaissStrategy:
    """Shortlist by a faiss index of the stale vectors, judged by the corrector."""

    def __init__(
        self, rows: CorrectedTargets, view: AffineView, index: FaissIndex, *, shortlist: int | None,
        parameters: FaissParameters | None,
    ) -> None:  # fmt: skip
        self.rows, self.view, self.index = rows, view, index
        self.shortlist, self.parameters = shortlist, parameters

    def search(self, queries: torch.Tensor, k: int, excluded: Excluded) -> CorrectedResult:
        """Search the index, then judge the shortlist."""
        folded, _ = self.view.fold(queries)  # the offset moves all scores of a query alike
        size = shortlist_size(self.shortlist, k)
        found = self.index.search(folded, size, excluded=excluded, parameters=self.parameters)
        best = _Judge(self.rows, queries).best_of(found.rows, k)
        return CorrectedResult(*best, exact=torch.zeros(len(queries), dtype=torch.bool))


class QueriesBackward:
    """Move the queries into the space of the stale vectors and search these as they are."""

    def __init__(
        self, vectors: RowVectors, corrector: CorrectorModel, index: FaissIndex | None, *, device: str
    ) -> None:
        self.corrector = corrector
        self.index: ScanIndex | FaissIndex = ScanIndex(vectors, device=device) if index is None else index
        self.proved = index is None

    def search(self, queries: torch.Tensor, k: int, excluded: Excluded) -> CorrectedResult:
        """Correct the queries, then search."""
        found = self.index.search(self.corrector.correct(queries.float()), k, excluded=excluded)
        return CorrectedResult(found.rows, found.scores, exact=torch.full((len(queries),), self.proved))


def shortlist_size(shortlist: int | None, k: int) -> int:
    """Return how many candidates are judged per query."""
    return max(4 * k, _LEAST_SHORTLIST) if shortlist is None else max(shortlist, k)


def _proved(found: SearchResult) -> CorrectedResult:
    return CorrectedResult(found.rows, found.scores, exact=torch.ones(len(found.rows), dtype=torch.bool))


def _mask(excluded: Excluded, queries: torch.Tensor, rows: CorrectedTargets) -> RowMask | None:
    return None if excluded is None else RowMask(excluded, queries=len(queries), targets=len(rows))
