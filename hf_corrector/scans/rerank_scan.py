"""The remedy without a corrector: over-retrieve by stale scores, encode what was found, draw from the true scores."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_corrector.sampling import (
    DrawKeys,
    ExcludedRows,
    ListedTargets,
    SoftmaxDraws,
    draw_listed,
    top_listed,
)
from hf_corrector.scans.base import TargetScan, just_below

Encode = Callable[[torch.Tensor], torch.Tensor]


class RerankScan:
    """Draw from the softmax over the nearest targets by stale scores, scored by the current encoder.

    What the stale scores do not find is out of sight, however near it has come.

    Args:
        stale: A scan of the cached vectors as they are.
        encode: Encodes target rows ``(n,)`` with the current weights, ``(n, dim)`` float32; called with the same rows
            in every process.
        candidates: How many targets are encoded for each query.
    """

    def __init__(self, stale: TargetScan, encode: Encode, *, candidates: int) -> None:
        self._stale, self._encode, self._candidates = stale, encode, candidates

    @property
    def device(self) -> torch.device:
        """Where queries are expected."""
        return self._stale.device

    def __len__(self) -> int:
        return len(self._stale)

    def draw(
        self, queries: torch.Tensor, k: int, *, scale: float, excluded: ExcludedRows, keys: DrawKeys
    ) -> SoftmaxDraws:
        """Draw k distinct targets per query, see :class:`hf_corrector.scans.TargetScan`."""
        return draw_listed(self._listed(queries, excluded=excluded, keys=keys), k, scale=scale, keys=keys)

    def top(self, queries: torch.Tensor, k: int, *, excluded: ExcludedRows, keys: DrawKeys) -> SoftmaxDraws:
        """Return the k highest scores of each query among those encoded."""
        return top_listed(self._listed(queries, excluded=excluded, keys=keys), k)

    def score(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the stale scores of chosen targets, ``(batch, n)``."""
        return self._stale.score(queries, rows)

    def skip_highest(
        self, queries: torch.Tensor, count: int, *, excluded: ExcludedRows, keys: DrawKeys
    ) -> torch.Tensor:  # fmt: skip
        """Return a ceiling above which the ``count`` highest scores among those encoded lie, ``(batch,)``."""
        scores = self._listed(queries, excluded=excluded, keys=keys).scores
        return just_below(scores.topk(min(count, scores.shape[1]), dim=1).values[:, -1])

    def invalidate(self) -> None:
        """Do nothing: there is no corrector."""

    def advance(self) -> None:
        """Do nothing: what was encoded is forgotten."""

    def renew(self) -> None:
        """Do nothing."""

    def _listed(self, queries: torch.Tensor, *, excluded: ExcludedRows, keys: DrawKeys) -> ListedTargets:
        known = ExcludedRows(excluded.per_query)
        found = self._stale.top(queries, self._candidates, excluded=known, keys=keys).ids.cpu()
        rows = torch.unique(found[found >= 0])
        vectors = self._encode(rows).to(self.device)
        places = torch.searchsorted(rows, found.clamp(min=0)).clamp(max=max(len(rows) - 1, 0))
        scores = (queries.float() @ vectors.T).gather(1, places.to(queries.device))
        ids = found.to(scores.device)
        if excluded.ceiling is not None:
            ids = torch.where(scores > excluded.ceiling.to(scores.device)[:, None], torch.full_like(ids, -1), ids)
        return ListedTargets(ids, scores.masked_fill(ids < 0, -torch.inf))
