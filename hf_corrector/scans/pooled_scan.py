"""Scores of a few targets drawn anew in every step, which stand for all."""

from __future__ import annotations

import numpy as np
import torch

from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.sampling import (
    BLOCK_ROWS,
    DrawKeys,
    ExcludedRows,
    IntArray,
    ListedTargets,
    ScoredTargets,
    SoftmaxDraws,
    draw_pool,
    draw_softmax,
    skipped_counts,
    top_listed,
    top_scores,
)
from hf_corrector.scans.base import SCAN_DTYPES, CorrectedScan, ScanPlan, just_below


class PooledScan(CorrectedScan):
    """Draw from the softmax over a fresh uniform pool of the targets.

    Only a share ``pool / targets`` of the hard negatives is ever in sight of a step. Every process corrects the pool by
    itself, so that nothing is exchanged.

    Args:
        targets: All targets through the corrector.
        plan: Its pool and arithmetic.
    """

    def __init__(self, targets: CorrectedTargets, plan: ScanPlan) -> None:
        super().__init__(targets)
        self._plan, self._dtype = plan, SCAN_DTYPES[plan.dtype]

    def draw(
        self, queries: torch.Tensor, k: int, *, scale: float, excluded: ExcludedRows, keys: DrawKeys
    ) -> SoftmaxDraws:
        """Draw k distinct targets per query; the normaliser is that of the pool, scaled up to all targets."""
        pool, scored = self._pool(queries, keys)
        draws = draw_softmax(scored, k, scale=scale, excluded=excluded.within(pool), keys=keys)
        # Expected draws of a target are k P(y|x) whether or not it had to be in the pool first.
        whole = draws.log_normalizer + float(np.log(len(self) / len(pool)))
        return SoftmaxDraws(_rows_of(pool, draws.ids), draws.scores, whole)

    def top(self, queries: torch.Tensor, k: int, *, excluded: ExcludedRows, keys: DrawKeys) -> SoftmaxDraws:
        """Return the k highest scores of each query within the pool, equal ones by row."""
        pool, scored = self._pool(queries, keys)
        parts = [
            scored.score_block(at, min(at + BLOCK_ROWS, len(pool))).float() for at in range(0, len(pool), BLOCK_ROWS)
        ]
        scores = torch.cat(parts, dim=1)
        excluded.within(pool).strike(scores, 0)
        ids = torch.from_numpy(pool).to(scores.device).expand(len(scores), -1)
        return top_listed(ListedTargets(torch.where(scores > -torch.inf, ids, -1), scores), k)

    def skip_highest(
        self, queries: torch.Tensor, count: int, *, excluded: ExcludedRows, keys: DrawKeys
    ) -> torch.Tensor:  # fmt: skip
        """Return a ceiling above which, on average, the pool's share of the ``count`` highest scores lies."""
        pool, scored = self._pool(queries, keys)
        there = torch.from_numpy(skipped_counts(count, len(pool) / len(self), keys)).to(self.device)
        highest = top_scores(scored, max(1, int(there.max())), excluded=excluded.within(pool))
        ceiling = just_below(highest.gather(1, (there - 1).clamp(min=0)[:, None])[:, 0])
        return ceiling.masked_fill(there == 0, torch.inf)

    def invalidate(self) -> None:
        """Do nothing: rows are corrected when they are looked at."""

    def advance(self) -> None:
        """Do nothing: the pool is a function of the step."""

    def renew(self) -> None:
        """Do nothing: nothing is kept."""

    def _pool(self, queries: torch.Tensor, keys: DrawKeys) -> tuple[IntArray, ScoredTargets]:
        pool = draw_pool(len(self), self._plan.pool, seed=keys.seed, step=keys.step)
        vectors = self._targets.gather(torch.from_numpy(pool)).to(self.device, self._dtype)
        asked = queries.detach().to(self.device, self._dtype)
        return pool, ScoredTargets(lambda start, stop: asked @ vectors[start:stop].T, len(pool))


def _rows_of(pool: IntArray, places: torch.Tensor) -> torch.Tensor:
    rows = torch.from_numpy(pool).to(places.device)
    return torch.where(places >= 0, rows[places.clamp(min=0)], places)
