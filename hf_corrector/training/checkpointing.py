"""The private parts of transformers' Trainer this package overrides, and why; read against transformers 5.23.

``Trainer._save_checkpoint``
    writes straight into ``checkpoint-N`` and deletes older checkpoints before anyone can know that the new one is whole
    (transformers issue 35525). Here the extra state and a marker are written first, and only then are old ones deleted.
``Trainer._load_from_checkpoint``
    is where weights are restored, before data loaders exist; the extra state is read there too. Where it finds a whole
    model it loads that and forgets an adapter beside it, and it takes adapters of any form: both are refused here.
``Trainer._save``
    lets PEFT save an adapter, which by itself cannot be loaded as a dual encoder; the rest is added here.
``Trainer._save_optimizer_and_scheduler``
    writes the model a second time where it is in shards (FSDP), though ``_save_checkpoint`` has gathered and saved it.
    With FSDP ``_load_from_checkpoint`` comes after the data loaders too, and is called before the sharding here.
``Trainer._load_best_model``
    restores an adapter alone; here the corrector that belongs to it too.
``Trainer._run_epoch``
    does one more step where a run is resumed from its last checkpoint in the middle of an epoch.
``Trainer._tr_loss`` and ``_globalstep_last_logged``
    are lost with a process: the first loss a resumed run logs would be the mean over fewer steps than it should be.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from peft import PeftModel
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_corrector._distributed import all_gather_object, barrier, is_main, naming_failures, on_main, rank, world_size
from hf_corrector._files import fsync_directory, read_json, write_json
from hf_corrector.errors import CheckpointError, ConfigurationError
from hf_corrector.models.adapter_files import adapted_layers, check_folder
from hf_corrector.models.adapters import check_adapter, load_adapter_extras, save_adapter_extras
from hf_corrector.models.whole_weights import in_shards
from hf_corrector.training.checkpoint_files import (
    COMPLETE_MARKER,
    check_complete,
    flush_folder,
    mark_complete,
    newest_complete_checkpoint,
    remove_old_checkpoints,
)
from hf_corrector.training.step_log import StepLog

UNLOGGED_FILE = "unlogged.json"


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints carry extra state and are known to be complete."""

    _adapter_checked = False
    _unlogged: dict[str, Any] | None = None

    @cached_property
    def step_log(self) -> StepLog:
        """What is observed step by step, until it is logged."""
        return StepLog()

    def save_extra_state(self, folder: Path) -> None:
        """Write what a subclass needs beside the model into a checkpoint folder; called in every process."""

    def check_extra_state(self, folder: Path) -> None:
        """Refuse a checkpoint of another run (CheckpointError), by what :meth:`save_extra_state` wrote."""

    def load_extra_state(self, folder: Path) -> None:
        """Read what :meth:`save_extra_state` wrote."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, from the start or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint folder, or True for the newest complete one in ``output_dir``.
            args: Handed to transformers' ``train``.
            kwargs: Handed to transformers' ``train``.

        Raises:
            CheckpointError: If there is no complete checkpoint, or none that this run can go on from exactly.
            ConfigurationError: If the model is an adapter that could not be loaded again, or ``output_dir`` holds whole
                models where adapters are to be written, or the other way round.
        """
        folder = self.check_start(resume_from_checkpoint)
        self._unlogged = None
        if folder is not None and self.is_fsdp_enabled:
            self._load_before_sharding(folder)
        with naming_failures(lambda: f"training after step {self.state.global_step}"):
            return super().train(folder, *args, **kwargs)

    def check_start(self, resume_from_checkpoint: str | bool | None = None) -> str | None:
        """Find out before any work whether :meth:`train` could start, as it does itself.

        Args:
            resume_from_checkpoint: As for :meth:`train`.

        Returns:
            The folder of the checkpoint to go on from, or None.

        Raises:
            CheckpointError: As :meth:`train`.
            ConfigurationError: As :meth:`train`.
        """
        self._check_adapter()
        if not resume_from_checkpoint:
            return None
        folder = Path(str(resume_from_checkpoint))
        if str(resume_from_checkpoint).lower() == "true":
            newest = newest_complete_checkpoint(Path(str(self.args.output_dir)))
            if newest is None:
                raise CheckpointError(
                    str(self.args.output_dir), expected="a complete checkpoint", got="none",
                    cure="Train without resume_from_checkpoint.",
                )  # fmt: skip
            folder = newest
        self._check_checkpoint(folder)
        return str(folder)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def _check_checkpoint(self, folder: Path) -> None:
        """Refuse a checkpoint that this run cannot go on from exactly, before anything is read of it."""
        check_complete(folder, sharded=self.is_fsdp_enabled, processes=world_size())
        adapted = isinstance(self.model, PeftModel)
        try:
            check_folder(folder, adapted=adapted)
        except ConfigurationError as error:
            raise CheckpointError(
                str(folder), expected=f"a checkpoint of {'an adapter' if adapted else 'a whole model'}",
                got=error.got, cure="Resume with a model made as for the run that is resumed.",
            ) from error  # fmt: skip
        self.check_extra_state(folder)

    def _check_adapter(self) -> None:
        """Find out before the work what would make the checkpoints useless."""
        output_dir, adapted = Path(str(self.args.output_dir)), isinstance(self.model, PeftModel)
        for folder in (output_dir, *output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
            check_folder(folder, adapted=adapted)
        self.check_adapters()

    def check_adapters(self) -> None:
        """Refuse adapters that could not be loaded again (ConfigurationError); called before training."""
        adapted = isinstance(self.model, PeftModel)
        if not adapted and self.model is not None and adapted_layers(self.model):
            raise ConfigurationError(
                "model", expected="a whole model, or a PeftModel", got="a model whose adapter is loaded, not trained",
                cure="Load it with DualEncoderModel.load_adapter_on_base(folder, is_trainable=True).",
            )  # fmt: skip
        if isinstance(self.model, PeftModel) and not self._adapter_checked:
            check_adapter(self.model)
            self._adapter_checked = True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if isinstance(self.model, PeftModel) and self.args.should_save:
            save_adapter_extras(Path(output_dir or str(self.args.output_dir)), self.model, state_dict)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if isinstance(self.model, PeftModel):
            load_adapter_extras(Path(str(self.state.best_model_checkpoint)), self.model)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        # A folder of an earlier run at this step stops being complete before its first file is replaced.
        on_main("starting a checkpoint", lambda: (folder / COMPLETE_MARKER).unlink(missing_ok=True))
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.save_extra_state(folder)
        self._save_unlogged(folder)
        # Other processes write their random states by themselves.
        barrier()
        if not self.args.should_save:
            return
        flush_folder(folder)
        mark_complete(folder, step=self.state.global_step, only_model=self.args.save_only_model)
        # Its own name must have reached the disk before an older one loses its.
        fsync_directory(folder.parent)
        remove_old_checkpoints(folder.parent, folder, limit=limit, best=self.state.best_model_checkpoint)

    def _save_unlogged(self, folder: Path) -> None:
        losses = all_gather_object(str(float(self._tr_loss)))  # text, for JSON has no NaN
        if is_main():
            state = {"last_logged": self._globalstep_last_logged, "losses": losses, "observed": self.step_log.state()}
            write_json(folder / UNLOGGED_FILE, state)

    def take_up_log(self) -> None:
        """Go on with what the run that is resumed had seen and not logged; called before the first step."""
        if self._unlogged is None:
            return
        self._tr_loss += float(self._unlogged["losses"][rank()])
        self._globalstep_last_logged = int(self._unlogged["last_logged"])
        self.step_log.load_state(self._unlogged["observed"])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(
            self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir
        )
        if self.args.should_save and self.lr_scheduler is not None:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_before_sharding(self, folder: str) -> None:
        if self.model is not None and in_shards(self.model):
            raise ConfigurationError(
                "resume_from_checkpoint", expected="a trainer that has not trained yet, with FSDP",
                got="one whose model is in shards", cure="Make model and trainer anew.",
            )  # fmt: skip
        self.is_fsdp_enabled = False
        try:
            self._load_from_checkpoint(folder)
        finally:
            self.is_fsdp_enabled = True

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            return  # was read before the weights were dealt out
        folder = Path(resume_from_checkpoint)
        if isinstance(self.model, PeftModel):
            load_adapter_extras(folder, self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.load_extra_state(folder)
        # Checkpoints of earlier versions have none, and one of another number of processes none for each.
        unlogged = read_json(folder / UNLOGGED_FILE) if (folder / UNLOGGED_FILE).exists() else None
        self._unlogged = unlogged if unlogged is not None and len(unlogged["losses"]) == world_size() else None
