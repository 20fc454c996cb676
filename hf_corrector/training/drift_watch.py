"""An alarm in a run: whether the targets, as training sees them, are further off than the user puts up with."""

from __future__ import annotations

import torch

from hf_corrector._distributed import broadcast_object, is_main
from hf_corrector.drift_detection import AdaptationPolicy, DriftDetector
from hf_corrector.training.step_log import StepLog

PREFIX = "drift_watch."


class DriftWatch:
    """Watch the squared errors of uniformly drawn targets, which every step encodes anyway.

    Args:
        bound: Largest mean squared error to put up with.
        action: What an alarm asks for: ``"log"``, ``"refit"`` or ``"refresh"``.
        targets: Number of all targets.
    """

    def __init__(self, bound: float, action: str, *, targets: int) -> None:
        # What is done is the run's own affair; the detector only has to find out when.
        self._detector = DriftDetector(AdaptationPolicy(bound, actions=("refit",)), targets=targets)
        self._action, self._asked, self._started_anew = action, "none", False

    def observe(self, squared_errors: torch.Tensor, log: StepLog) -> None:
        """Take in the errors of a step, ``(n,)``, before the corrector has seen these targets."""
        if not is_main() or not len(squared_errors):
            return
        decision = self._detector.observe(squared_errors.detach().cpu())
        log.observe("drift_error", decision.error)
        log.observe("drift_error_high", decision.high)
        log.observe("drift_evidence", decision.evidence)
        if decision.alarm:
            # The detector has started anew by itself.
            self._asked, self._started_anew = self._action, self._action == "refresh"
            log.observe("drift_alarms", 1.0)

    def asked(self) -> str:
        """Return what has to be done now, the same in every process, and forget it."""
        asked, self._asked = broadcast_object(self._asked), "none"
        return asked

    def reset(self) -> None:
        """Start anew, as after a refresh; one that an alarm asked for is no further start."""
        if not self._started_anew:
            self._detector.reset()
        self._started_anew = False

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint needs, as flat tensors."""
        return {PREFIX + name: tensor for name, tensor in self._detector.state().items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned, found among other tensors."""
        own = {name.removeprefix(PREFIX): one for name, one in state.items() if name.startswith(PREFIX)}
        if own:
            self._detector.load_state(own)
