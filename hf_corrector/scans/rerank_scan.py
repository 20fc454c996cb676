"""The remedy without a corrector: over-retrieve by stale scores, encode what was found, draw from the true scores."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_corrector.sampling import DrawKeys, ExcludedRows, ListedTargets
from hf_corrector.scans.base import ListedScan, TargetScan

Encode = Callable[[torch.Tensor], torch.Tensor]


class RerankScan(ListedScan):
    """Draw from the softmax over the nearest targets by stale scores, scored by the current encoder.

    What the stale scores do not find is out of sight, however near it has come. A target is encoded once until
    :meth:`advance` is called.

    Args:
        stale: A scan of the cached vectors as they are.
        encode: Encodes target rows ``(n,)`` with the current weights, ``(n, dim)`` float32; called with the same rows
            in every process.
        candidates: How many targets are encoded for each query.
    """

    def __init__(self, stale: TargetScan, encode: Encode, *, candidates: int) -> None:
        self._stale, self._encode, self._candidates = stale, encode, candidates
        self._rows, self._vectors = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)

    @property
    def device(self) -> torch.device:
        """Where queries are expected."""
        return self._stale.device

    def __len__(self) -> int:
        return len(self._stale)

    def score(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the fresh scores of chosen targets, ``(batch, n)``; those not encoded yet are."""
        vectors, places = self._encoded(rows.cpu())
        return (queries.float() @ vectors.T).gather(1, places.to(queries.device))

    def invalidate(self) -> None:
        """Do nothing: there is no corrector."""

    def advance(self) -> None:
        """Forget what was encoded."""
        self._rows, self._vectors = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0)

    def renew(self) -> None:
        """Forget what was encoded."""
        self.advance()

    def _listed(self, queries: torch.Tensor, *, excluded: ExcludedRows, keys: DrawKeys) -> ListedTargets:
        known = ExcludedRows(excluded.per_query)
        found = self._stale.top(queries, self._candidates, excluded=known, keys=keys).ids.cpu()
        scores = torch.zeros(found.shape, device=queries.device)
        if (found >= 0).any():
            # A place without a target takes one that is encoded anyway, and is masked below.
            scores = self.score(queries, torch.where(found >= 0, found, found.max()))
        ids = found.to(scores.device)
        if excluded.ceiling is not None:
            ids = torch.where(scores > excluded.ceiling.to(scores.device)[:, None], torch.full_like(ids, -1), ids)
        return ListedTargets(ids, scores.masked_fill(ids < 0, -torch.inf))

    def _encoded(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the vectors of all targets encoded in this step, and where among them some rows are."""
        new = torch.unique(rows)
        new = new[~torch.isin(new, self._rows)]
        if len(new):
            fresh = self._encode(new).to(self.device)
            self._vectors = torch.cat([self._vectors.to(fresh), fresh]) if len(self._rows) else fresh
            self._rows = torch.cat([self._rows, new])
        order = torch.argsort(self._rows)
        return self._vectors, order[torch.searchsorted(self._rows[order], rows)]
