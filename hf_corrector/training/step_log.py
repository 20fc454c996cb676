"""Means of what is observed in every step, and how a step's time is shared between its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepLog:
    """Collect numbers step by step and give their means at logging time."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._seconds: dict[str, float] = {}
        self.total_seconds: dict[str, float] = {}

    def observe(self, name: str, value: float, *, count: int = 1) -> None:
        """Add ``count`` observations whose mean is ``value``."""
        total, seen = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value * count, seen + count)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside, in seconds of wall clock."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
            self.total_seconds[name] = self.total_seconds.get(name, 0.0) + spent

    def drain(self) -> dict[str, float]:
        """Return the means, and each phase's share of the phase ``step``, since the last call; then forget them."""
        means = {name: total / seen for name, (total, seen) in self._sums.items() if seen}
        step = self._seconds.get("step", 0.0)
        if step > 0:
            means.update({f"share_{name}": spent / step for name, spent in self._seconds.items() if name != "step"})
        self._sums, self._seconds = {}, {}
        return means
