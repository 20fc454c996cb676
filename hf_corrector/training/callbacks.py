"""What happens between the steps of a run."""

from __future__ import annotations

from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class _FollowsDrift(Protocol):
    def start_following(self) -> None: ...
    def after_step(self, step: int) -> None: ...
    def finish_corrector(self) -> None: ...


class StalenessCallback(TrainerCallback):
    """Let a trainer refresh its cache when that is due, and finish its corrector when training ends."""

    def __init__(self, trainer: _FollowsDrift) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by transformers before the first step."""
        self._trainer.start_following()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by transformers after every optimiser step."""
        self._trainer.after_step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by transformers once."""
        self._trainer.finish_corrector()
