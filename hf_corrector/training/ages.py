"""How old, in optimiser steps, the things are that a run sees its targets through."""

from __future__ import annotations

import math

import torch

from hf_corrector.sampling import BLOCK_ROWS
from hf_corrector.scans import ScanPlan
from hf_corrector.training.corrector_trainer import OnlineCorrector

_FITTED = "fitted_step"


class Ages:
    """Remember when the pairs of the last fit were encoded, and when the rows of an amortised scan were corrected.

    Args:
        targets: Number of all targets.
    """

    def __init__(self, targets: int) -> None:
        self._rows = targets
        self._fitted, self._every, self._turns = math.nan, 0, 0

    def note_fit(self, online: OnlineCorrector) -> None:
        """Take note that the corrector was fitted to its window just now."""
        if online.corrector.config.kind != "residual_mlp":
            # A composite fit takes the latest pairs only.
            pairs = online.window.pairs().latest(int(online.corrector.fitted_pairs))
            self._fitted = float(pairs.steps.double().mean())

    def note_scan(self, plan: ScanPlan) -> None:
        """Take note that the next draw corrects all rows anew."""
        self._every, self._turns = plan.refresh_steps if plan.strategy == "amortised" else 0, 0

    def advance(self) -> None:
        """Take note that some blocks of an amortised scan were corrected anew after a step."""
        self._turns += 1

    def renew(self) -> None:
        """Take note that an amortised scan has forgotten its rows."""
        self._turns = 0

    def of_pairs(self, online: OnlineCorrector, steps: int) -> float | None:
        """Return the mean number of steps since the pairs of the last fit were encoded; None before the first.

        Args:
            online: What fits the corrector. A network is fitted in every step, to the window as it is now.
            steps: Optimiser steps done.
        """
        fitted = self._fitted
        if online.corrector.config.kind == "residual_mlp" and len(online.window):
            fitted = float(online.window.pairs().steps.double().mean())
        return None if math.isnan(fitted) else steps - fitted

    def of_snapshot(self) -> float | None:
        """Return the mean number of steps since a row of an amortised scan was corrected; None without such a scan."""
        if not self._every:
            return None
        ages = rows = 0
        for start in range(0, self._rows, BLOCK_ROWS):
            age = (self._turns - start // BLOCK_ROWS) % self._every
            ages += min(age, self._turns) * min(BLOCK_ROWS, self._rows - start)
            rows += min(BLOCK_ROWS, self._rows - start)
        return ages / rows

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint needs, as flat tensors."""
        return {_FITTED: torch.tensor(self._fitted, dtype=torch.float64)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned, found among other tensors."""
        if _FITTED in state:
            self._fitted = float(state[_FITTED])
