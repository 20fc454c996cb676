"""Scores of all targets, block by block, of which every process looks at its own share."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import torch

from hf_corrector._distributed import rank, world_size
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.index.base import RunningTopK, SearchResult, merge_results
from hf_corrector.sampling import (
    BLOCK_ROWS,
    DrawKeys,
    ExcludedRows,
    ScoredTargets,
    SoftmaxDraws,
    draw_softmax,
    share_of_blocks,
    top_scores,
)
from hf_corrector.scans.base import SCAN_DTYPES, CorrectedScan, ScanPlan, exchange_columns, just_below


class BlockScan(CorrectedScan):
    """Draw from the softmax over all targets, from corrected rows kept in memory where they fit.

    A block of targets is always corrected and scored as a whole and by one process, so that draws do not depend on how
    many processes there are.

    Args:
        targets: All targets as they are seen now; read through this scan's own snapshot, not theirs.
        plan: ``"full"`` or ``"amortised"``.
        scratch: File that takes an amortised snapshot too large for ``plan.snapshot_bytes``; it has no name once it is
            open, so that nothing is left of it. Without one the snapshot is kept in memory all the same.

    Attributes:
        kept: Whether corrected rows are kept between steps.
    """

    def __init__(self, targets: CorrectedTargets, plan: ScanPlan, *, scratch: Path | None = None) -> None:
        super().__init__(targets)
        self._plan, self._scratch = plan, scratch
        self._dtype, self._blocks = SCAN_DTYPES[plan.dtype], share_of_blocks(len(targets), rank(), world_size())
        self._first = min(self._blocks[0] * BLOCK_ROWS, len(targets))
        self._stop = min(self._blocks[1] * BLOCK_ROWS, len(targets))
        self._fits = (self._stop - self._first) * targets.dim * self._dtype.itemsize <= plan.snapshot_bytes
        # Rows that are read as they lie in the cache need no copy in memory.
        plain = targets.corrector is None and targets.device.type == "cpu"
        self._as_stored = plain and targets.stale.read(0, min(1, len(targets))).dtype == self._dtype
        self.kept = not self._as_stored and (self._fits or plan.strategy == "amortised")
        self._snapshot: torch.Tensor | None = None
        self._steps = 0

    def draw(
        self, queries: torch.Tensor, k: int, *, scale: float, excluded: ExcludedRows, keys: DrawKeys
    ) -> SoftmaxDraws:
        """Draw k distinct targets per query, see :class:`hf_corrector.scans.TargetScan`."""
        return draw_softmax(self._scored(queries), k, scale=scale, excluded=excluded, keys=keys)

    def top(self, queries: torch.Tensor, k: int, *, excluded: ExcludedRows, keys: DrawKeys) -> SoftmaxDraws:
        """Return the k highest scores of each query, equal ones by row."""
        scored, best = self._scored(queries), RunningTopK(len(queries), k, device=self.device)
        for block in scored.blocks:
            start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(self))
            scores = scored.score_block(start, stop).to(torch.float32, copy=True)
            excluded.strike(scores, start)
            best.update(scores, first_query=0, first_row=start)
        own = best.result()
        parts = zip(exchange_columns(own.rows), exchange_columns(own.scores), strict=True)
        found = merge_results([SearchResult(rows, scores) for rows, scores in parts], k)
        unknown = torch.full((len(queries),), torch.nan, dtype=torch.float64)
        return SoftmaxDraws(found.rows, found.scores, unknown)

    def skip_highest(
        self, queries: torch.Tensor, count: int, *, excluded: ExcludedRows, keys: DrawKeys
    ) -> torch.Tensor:  # fmt: skip
        """Return a ceiling above which the ``count`` highest scores of each query lie, ``(batch,)``."""
        return just_below(top_scores(self._scored(queries), count, excluded=excluded)[:, -1])

    def kept_rows(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Return targets as they were last corrected, ``(n, dim)``; None where this process does not keep them all."""
        if self._snapshot is None or len(self._snapshot) < len(self):
            return None
        return self._snapshot[rows.to(self._snapshot.device)]

    def invalidate(self) -> None:
        """Forget rows of an earlier corrector, unless they are corrected anew one by one."""
        if self._plan.strategy == "full":
            self._snapshot = None

    def advance(self) -> None:
        """Correct anew the blocks whose turn it is."""
        self._steps += 1
        if self._plan.strategy != "amortised" or self._snapshot is None:
            return
        every = self._plan.refresh_steps
        for block in range(*self._blocks):
            if block % every == self._steps % every:
                self._correct(block)

    def renew(self) -> None:
        """Correct all rows anew before the next draw."""
        self._steps, self._snapshot = 0, None

    def _scored(self, queries: torch.Tensor) -> ScoredTargets:
        queries = queries.detach().to(self.device, self._dtype)
        return ScoredTargets(
            lambda start, stop: queries @ self._rows(start, stop).T, len(self), self._blocks, exchange_columns
        )

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        if stop <= start:
            return torch.zeros(0, self._targets.dim, dtype=self._dtype, device=self.device)
        if self._as_stored:
            return self._targets.stale.read(start, stop)
        if not self.kept:
            return self._targets.read(start, stop).to(self._dtype)
        if self._snapshot is None:
            self._snapshot = self._empty_snapshot()
            for block in range(*self._blocks):
                self._correct(block)
        # One too large for memory is not where queries are, either.
        return self._snapshot[start - self._first : stop - self._first].to(self.device)

    def _correct(self, block: int) -> None:
        start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, self._stop)
        if self._snapshot is not None:
            self._snapshot[start - self._first : stop - self._first] = self._targets.read(start, stop)

    def _empty_snapshot(self) -> torch.Tensor:
        shape = (self._stop - self._first, self._targets.dim)
        if self._fits or self._scratch is None:
            return torch.empty(shape, dtype=self._dtype, device=self.device)
        file = self._scratch.with_name(f"{self._scratch.name}-{rank()}")
        mapped = torch.from_file(str(file), shared=True, size=shape[0] * shape[1], dtype=self._dtype)
        with suppress(OSError):  # where open files keep their names, it stays until the next run writes over it
            file.unlink()
        return mapped.reshape(shape)
