"""What happens between the steps of a run."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_corrector.training.live_cache import LiveCache
from hf_corrector.training.step_log import StepLog


class _FollowsDrift(Protocol):
    live_cache: LiveCache | None
    cost: dict[str, int]

    @property
    def step_log(self) -> StepLog: ...
    def start_following(self) -> None: ...
    def take_up_log(self) -> None: ...
    def after_step(self, step: int) -> None: ...
    def finish_corrector(self) -> None: ...


class StalenessCallback(TrainerCallback):
    """Let a trainer refresh its cache when that is due, tell its log, and finish its corrector when training ends."""

    def __init__(self, trainer: _FollowsDrift) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by transformers before the first step."""
        self._trainer.start_following()
        self._trainer.take_up_log()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by transformers after every optimiser step, before it logs and saves."""
        self._trainer.after_step(state.global_step)
        self._show(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by transformers after every epoch, before it logs and saves."""
        self._show(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by transformers once."""
        self._trainer.finish_corrector()

    def _show(self, state: TrainerState, control: TrainerControl) -> None:
        """Have the log show passes and ages where it is about to be written."""
        if not control.should_log:
            return
        live, cost = self._trainer.live_cache, self._trainer.cost
        self._trainer.step_log.show({f"passes_{name.removesuffix('_passes')}": one for name, one in cost.items()})
        if live is not None:
            self._trainer.step_log.show(live.ages(state.global_step))
