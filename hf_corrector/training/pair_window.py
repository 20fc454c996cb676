"""The free training pairs of the corrector: targets that were re-encoded in recent steps anyway."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class WindowPairs:
    """The latest re-encoding of each target in the window.

    Attributes:
        rows: Target rows, ascending and distinct, ``(n,)`` int64.
        fresh: Their embeddings when last re-encoded, ``(n, dim)`` float32.
        steps: The step of that, ``(n,)`` int64.
        progress: How far the encoder had been trained then, ``(n,)`` float64.
    """

    rows: torch.Tensor
    fresh: torch.Tensor
    steps: torch.Tensor
    progress: torch.Tensor

    def latest(self, count: int) -> WindowPairs:
        """Return the ``count`` pairs re-encoded last, in row order; of those of one step the first rows."""
        if len(self.rows) <= count:
            return self
        kept = torch.argsort(self.steps, descending=True, stable=True)[:count].sort().values
        return WindowPairs(self.rows[kept], self.fresh[kept], self.steps[kept], self.progress[kept])


class PairWindow:
    """Keep the re-encoded targets of the last so many steps, on the CPU.

    Args:
        steps: Length of the window in optimiser steps.
        dim: Size of an embedding.
    """

    def __init__(self, steps: int, dim: int) -> None:
        self.steps, self.dim = steps, dim
        self._entries: deque[tuple[int, torch.Tensor, torch.Tensor, float]] = deque()

    def add(self, rows: torch.Tensor, fresh: torch.Tensor, *, step: int, progress: float = 0.0) -> None:
        """Take in targets re-encoded at ``step`` and drop those older than the window.

        Args:
            rows: Target rows, ``(n,)`` int64.
            fresh: Their embeddings, ``(n, dim)``.
            step: Optimiser steps done so far; never less than in the call before.
            progress: How far the encoder has been trained, in any unit.
        """
        self._entries.append((step, rows.detach().cpu(), fresh.detach().float().cpu(), progress))
        while self._entries and self._entries[0][0] <= step - self.steps:
            self._entries.popleft()

    def pairs(self) -> WindowPairs:
        """Return the pairs, of each target only the latest."""
        if not self._entries:
            empty = torch.zeros(0, dtype=torch.int64)
            return WindowPairs(empty, torch.zeros(0, self.dim), empty, torch.zeros(0, dtype=torch.float64))
        rows = torch.cat([entry[1] for entry in self._entries])
        steps = torch.cat([torch.full((len(entry[1]),), entry[0], dtype=torch.int64) for entry in self._entries])
        fresh = torch.cat([entry[2] for entry in self._entries])
        progress = torch.cat([torch.full((len(one[1]),), one[3], dtype=torch.float64) for one in self._entries])
        # Stable sort by row keeps the order of arrival within a row, so the last of each run is the latest.
        order = torch.argsort(rows, stable=True)
        ordered = rows[order]
        last = torch.ones(len(ordered), dtype=torch.bool)
        last[:-1] = ordered[1:] != ordered[:-1]
        keep = order[last]
        return WindowPairs(rows[keep], fresh[keep], steps[keep], progress[keep])

    def clear(self) -> None:
        """Forget all pairs; their stale halves no longer exist once the cache was refreshed."""
        self._entries.clear()

    def __len__(self) -> int:
        return sum(len(entry[1]) for entry in self._entries)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the content as tensors, for a checkpoint."""
        rows = [entry[1] for entry in self._entries]
        return {
            "window_rows": torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64),
            "window_fresh": torch.cat([entry[2] for entry in self._entries]) if rows else torch.zeros(0, self.dim),
            "window_steps": torch.tensor([entry[0] for entry in self._entries], dtype=torch.int64),
            "window_progress": torch.tensor([entry[3] for entry in self._entries], dtype=torch.float64),
            "window_counts": torch.tensor([len(one) for one in rows], dtype=torch.int64),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        counts = state["window_counts"].tolist()
        rows, fresh = state["window_rows"].split(counts), state["window_fresh"].split(counts)
        steps, progress = state["window_steps"].tolist(), state["window_progress"].tolist()
        self._entries = deque(zip(steps, rows, fresh, progress, strict=True))
