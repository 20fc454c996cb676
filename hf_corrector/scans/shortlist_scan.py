"""Scores of the nearest targets by an index of the stale vectors, and of a few that stand for all others."""

from __future__ import annotations

import math

import numpy as np
import torch

from hf_corrector.affine_view import AffineView
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.index.base import RowVectors
from hf_corrector.index.faiss import FaissIndex, FaissParameters
from hf_corrector.sampling import DrawKeys, ExcludedRows, IntArray, ListedTargets, draw_pool
from hf_corrector.scans.base import CorrectedScan, ListedScan, ScanPlan

_FIT_ROWS = 8192
# A network changes a little in every step; where its shortlist comes from need not follow at once.
_REFIT_CHANGES = 10


class ShortlistScan(ListedScan, CorrectedScan):
    """Draw from a softmax that knows its head exactly and its tail by a weighted sample.

    The stale vectors are indexed once; queries are folded through the affine map nearest to the corrector, see
    :mod:`hf_corrector.affine_view`, and what they find is corrected and scored. A uniform pool of the other targets
    stands for them, each with the weight of ``targets outside the list / pool``. Every process searches the whole index
    for all queries, so that nothing is exchanged.

    Args:
        targets: All targets through the corrector.
        plan: Its sizes.
        index: Of the stale vectors, searched with its own parameters; see :func:`stale_index`.
    """

    def __init__(self, targets: CorrectedTargets, plan: ScanPlan, *, index: FaissIndex) -> None:
        super().__init__(targets)
        self._plan, self._index = plan, index
        self._view: AffineView | None = None
        self._changes = 0

    def invalidate(self) -> None:
        """Let the affine map follow the corrector, at once where it is one and now and then where it is only near."""
        self._changes += 1
        if self._view is None or self._view.exact or self._changes >= _REFIT_CHANGES:
            self._view, self._changes = None, 0

    def advance(self) -> None:
        """Do nothing: the pool is a function of the step."""

    def renew(self) -> None:
        """Fit the affine map anew before the next draw."""
        self._view, self._changes = None, 0

    def _fit_view(self) -> AffineView | None:
        corrector = self._targets.corrector
        if corrector is None:
            return None
        found = AffineView.of(corrector)
        normalize = corrector.config.normalize_output
        return AffineView.fit(self._targets, normalize=normalize, fit_rows=_FIT_ROWS) if found is None else found

    def _listed(self, queries: torch.Tensor, *, excluded: ExcludedRows, keys: DrawKeys) -> ListedTargets:
        """Return what is looked at for each query: the head as it is, the tail with its weight."""
        if self._view is None:
            self._view = self._fit_view()
        asked = queries if self._view is None else self._view.fold(queries)[0].float()
        size = min(self._plan.shortlist, len(self))
        head = self._index.search(asked.cpu(), size, parameters=self._index.description.parameters).rows.numpy()
        pool = draw_pool(len(self), self._plan.pool, seed=keys.seed, step=keys.step)
        tail = np.broadcast_to(pool, (len(head), len(pool)))
        place = np.searchsorted(pool, head).clip(max=len(pool) - 1)
        query, column = np.nonzero(pool[place] == head)
        twice = np.zeros(tail.shape, dtype=bool)
        twice[query, place[query, column]] = True
        tail = np.where(twice, -1, tail)
        ids = np.concatenate([head, tail], axis=1)
        ids = np.where((ids >= 0) & ~excluded.listed(ids), ids, -1)
        outside = np.maximum(len(self) - (head >= 0).sum(axis=1), 1)
        weight = np.log(outside / np.maximum((~twice).sum(axis=1), 1))
        scores = torch.cat(
            [self.score(queries, torch.from_numpy(head.clip(0))), self._pool_scores(queries, pool)], dim=1
        )
        rows = torch.from_numpy(ids).to(scores.device)
        if excluded.ceiling is not None:
            rows = torch.where(scores > excluded.ceiling.to(scores.device)[:, None], torch.full_like(rows, -1), rows)
        heavier = torch.zeros(scores.shape, dtype=torch.float64, device=scores.device)
        heavier[:, head.shape[1] :] = torch.from_numpy(weight).to(scores.device)[:, None]
        return ListedTargets(rows, scores.masked_fill(rows < 0, -torch.inf), heavier)

    def _pool_scores(self, queries: torch.Tensor, pool: IntArray) -> torch.Tensor:
        vectors = self._targets.gather(torch.from_numpy(pool)).to(queries.device)
        return queries.float() @ vectors.T


def stale_index(stale: RowVectors, *, seed: int = 0) -> FaissIndex:
    """Build an index that suits the number of targets: exact where that is quick, clusters searched in part beyond."""
    factory, parameters = "Flat", FaissParameters()
    if len(stale) > 20_000:
        lists = 2 ** round(math.log2(4 * math.sqrt(len(stale))))
        factory, parameters = f"IVF{lists},Flat", FaissParameters(nprobe=max(16, lists // 32))
    return FaissIndex.build(stale, factory, parameters=parameters, seed=seed)
