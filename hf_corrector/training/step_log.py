"""Means of what is observed in every step, and how a step's time is shared between its phases."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class StepLog:
    """Collect numbers step by step, and give them as one flat dictionary at logging time.

    A run logs with every loss, as means over the steps since the last time:

    ``cosine_stale_fresh``, ``cosine_corrected_fresh``
        of targets that were encoded, to their cached and their corrected vectors.
    ``negatives_per_query``
        targets a query is contrasted with besides its positive, shared ones included.
    ``residual_uniform``
        mean squared distance of uniformly drawn targets to their vectors as training sees them, before the corrector
        has seen them; with a filter of negatives only of targets below its limits.
    ``sampling_tv``
        estimated total variation between what negatives are drawn from and the exact softmax.
    ``drift_error``, ``drift_error_high``, ``drift_evidence``, ``drift_alarms``
        of the drift alarm, where there is one; the last is 1 if it was raised.

    as shares of the time of these steps:

    ``share_encode``, ``share_sampling``, ``share_read``, ``share_corrector``, ``share_refresh``
        encoding queries and targets, forward, with the loss between them; choosing targets, and scoring them anew where
        they are reranked; reading passages, forward, with the loss of the answers; fitting the corrector and looking
        through it; encoding the cache anew, which comes on top of the steps, so that it may exceed 1. What is missing
        to 1 is mostly gradients. An accelerator's work is counted where it is waited for.

    and as they are now:

    ``passes_query``, ``passes_train_target``, ``passes_initial_target``, ``passes_refresh_target``, …
        texts the encoder has encoded so far, by purpose.
    ``pair_age``
        mean number of steps since the pairs were encoded that the corrector was last fitted on.
    ``snapshot_age``
        mean number of steps since the rows of an amortised scan were corrected.

    What does not exist in a run is not logged. Only the main process logs.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}
        self._latest: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._inside: list[float] = []
        self.total_seconds: dict[str, float] = {}

    def observe(self, name: str, value: float, *, count: int = 1) -> None:
        """Add ``count`` observations whose mean is ``value``."""
        total, seen = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value * count, seen + count)

    def show(self, values: Mapping[str, float]) -> None:
        """Set numbers that are logged next as they are, the latest of each name."""
        self._latest.update(values)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside, in seconds of wall clock, without the phases in it; ``step`` is timed whole."""
        start = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            others = self._inside.pop()
            if self._inside:
                self._inside[-1] += spent
            spent -= 0.0 if name == "step" else others
            self._seconds[name] = self._seconds.get(name, 0.0) + spent
            self.total_seconds[name] = self.total_seconds.get(name, 0.0) + spent

    def drain(self) -> dict[str, float]:
        """Return the means, and each phase's share of the phase ``step``, since the last call; then forget them."""
        logged = {name: total / seen for name, (total, seen) in self._sums.items() if seen}
        step = self._seconds.get("step", 0.0)
        if step > 0:
            logged |= {f"share_{name}": spent / step for name, spent in self._seconds.items() if name != "step"}
        logged |= self._latest
        self._sums, self._latest, self._seconds = {}, {}, {}
        return logged

    def state(self) -> dict[str, Any]:
        """Return what was observed and not logged yet, as JSON; times are those of one process and stay with it."""
        # As text, for JSON has no NaN.
        return {name: [str(total), seen] for name, (total, seen) in self._sums.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state` returned."""
        self._sums = {name: (float(total), int(seen)) for name, (total, seen) in state.items()}
