"""What trainers share whose targets come from a cache that goes stale: its life, its corrector, its checkpoints."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_utils import speed_metrics
from transformers.utils import logging

from hf_corrector._distributed import is_main
from hf_corrector._files import read_json, write_json
from hf_corrector._progress import working
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.retrieval import column
from hf_corrector.data.tokens import TokenStore
from hf_corrector.encoding import build_cache, tokenize_texts
from hf_corrector.errors import ConfigurationError
from hf_corrector.evaluation.staleness import StalenessReport
from hf_corrector.models.adapters import freeze_targets
from hf_corrector.models.modeling_dual_encoder import CORRECTOR_FOLDER, DualEncoderModel
from hf_corrector.records import COSTS, RunRecord
from hf_corrector.training import checks
from hf_corrector.training.cache_arguments import CacheTrainingArguments
from hf_corrector.training.callbacks import StalenessCallback
from hf_corrector.training.checkpointing import CheckpointingTrainer
from hf_corrector.training.judging import RunJudge
from hf_corrector.training.live_cache import STATE_FILE, LiveCache, encode_options_of
from hf_corrector.training.refresh_schedule import RefreshSchedule
from hf_corrector.training.run_record import RunContext, RunState, record_of
from hf_corrector.training.same_run import check_held_out, check_settings, note_of_rows
from hf_corrector.training.sharding import prepare_sharding
from hf_corrector.training.target_source import TargetSource

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class RunTargets:
    """The targets of a run and what encodes them.

    Attributes:
        encoder: The dual encoder inside of the model that is trained.
        targets: All targets, columns ``id`` and ``text``.
        given_cache: A cache made by an older encoder from the same targets, or None to make one.
    """

    encoder: DualEncoderModel
    targets: Dataset
    given_cache: TargetCache | None


class CacheTrainer(CheckpointingTrainer):
    """A Trainer whose targets come from a cache that goes stale while it trains.

    Subclasses say what queries are (:meth:`prepare_queries`), what a step does (``compute_loss``) and how quality is
    measured (:meth:`quality_of`).

    Args:
        model: What is trained.
        args: Arguments.
        run: Encoder, targets and cache.
        for_trainer: Handed whole to transformers' Trainer.

    Attributes:
        encoder: The dual encoder inside of ``model``.
        live_cache: The cache in use and the corrector's view of it, once :meth:`prepare` has run; None where training
            needs no cache.
        cost: Encoder forward passes so far, in texts, by purpose.
        source: What targets are drawn from, once :meth:`prepare` has run.
        run_context: What the record is to say that the trainer does not know, for instance the name of the data.
    """

    args: CacheTrainingArguments
    cost_names: tuple[str, ...] = COSTS
    run_context = RunContext()
    _report: StalenessReport | None = None

    def __init__(
        self, model: torch.nn.Module, args: CacheTrainingArguments, run: RunTargets, **for_trainer: Any
    ) -> None:
        self.encoder, self.targets, self._given_cache = run.encoder, run.targets, run.given_cache
        if run.given_cache is not None:
            checks.check_given_cache(run.given_cache, run.targets, run.encoder)
        checks.attach_corrector(run.encoder, args, run.given_cache)
        if not args.train_targets:
            freeze_targets(run.encoder)
        super().__init__(model=model, args=args, **for_trainer)
        prepare_sharding(self.accelerator, model, run.encoder)
        self.add_callback(StalenessCallback(self))
        self.live_cache: LiveCache | None = None
        self._held_out: torch.Tensor | None = None
        self.cost = dict.fromkeys(self.cost_names, 0)
        self._schedule = RefreshSchedule.parse(args.refresh_steps)
        self._resumed_from: Path | None = None
        self._resumed_with_cache = False
        self._examples: torch.utils.data.Dataset[Any] | None = None
        self._prepared = False

    # ------------------------------------------------------------------ phases

    def prepare(self) -> None:
        """Tokenise the corpus and the queries, and make or open the cache; done once, also by :meth:`train`.

        Raises:
            CacheMismatchError: If the cache folder holds vectors of another encoder or other texts.
            CheckpointError: If a run is resumed and its cache is no longer there.
        """
        if self._prepared:
            return
        out, progress = Path(str(self.args.output_dir)), not self.args.disable_tqdm
        out.mkdir(parents=True, exist_ok=True)
        self.tokens = tokenize_texts(
            self.encoder, column(self.targets, "text"), "target", out / "tokens" / "targets", progress=progress
        )
        if self._resumed_from is not None and self._resumed_with_cache:
            self.live_cache = LiveCache.reopen(self._resumed_from, self.encoder, self.args, held_out=self._held_out)
        elif self.args.needs_cache or self._given_cache is not None:
            self.build_cache()
        self._examples = None if self.train_dataset is None else self.prepare_queries(self.train_dataset)
        self.source = TargetSource(self.encoder, self.args, self.tokens, self.cost, self.further_ops())
        self._prepared = True

    def prepare_queries(self, split: Dataset) -> torch.utils.data.Dataset[Any]:
        """Return the training examples of some queries; called by :meth:`prepare` once the targets are there."""
        raise NotImplementedError

    def further_ops(self) -> float:
        """Return the operations of one process in a step beside the encoder's, which the choice of a scan weighs."""
        return 0.0

    def tokenize_queries(self, texts: list[str]) -> TokenStore:
        """Tokenise the training queries into the run's folder."""
        folder = Path(str(self.args.output_dir)) / "tokens" / "queries"
        return tokenize_texts(self.encoder, texts, "query", folder, progress=not self.args.disable_tqdm)

    def hold_out(self, *splits: Dataset) -> None:
        """Keep the positives of these queries out of the corrector's pairs, so that all of them can judge it.

        The encoder may still meet these targets as negatives; only the corrector never sees where they went. Without
        it, a judgement leaves out the queries whose positives happened to be fitted on.

        Raises:
            ConfigurationError: If the corrector may have been fitted already.
        """
        if self._prepared:
            raise ConfigurationError(
                "hold_out", expected="a call before prepare() and train()", got="one after", cure="Call it earlier."
            )
        self._held_out = checks.rows_to_hold_out(splits, self.targets)

    def build_cache(self) -> TargetCache:
        """Make the cache from the model as it is, or take the one that was given."""
        if self._given_cache is not None:
            made_by = self.encoder.fingerprint("target").weights
            self.live_cache = LiveCache(
                self._given_cache, self.encoder, self.args, held_out=self._held_out,
                from_start=self._given_cache.fingerprint.weights == made_by,
            )  # fmt: skip
            return self._given_cache
        default = Path(str(self.args.output_dir)) / "cache"
        built = build_cache(
            self.encoder, self.targets, Path(self.args.cache_dir or default), tokens=self.tokens,
            options=encode_options_of(self.args),
        )  # fmt: skip
        self.cost["initial_target_passes"] += built.encoded
        self.live_cache = LiveCache(built.cache, self.encoder, self.args, held_out=self._held_out)
        # These vectors are the model's own, so whatever corrector it came with has nothing to correct.
        self.live_cache.reset_corrector()
        return built.cache

    def refresh_cache(self) -> TargetCache:
        """Encode all targets anew with the current weights; the corrector starts again at the identity."""
        live = self.need_cache("refresh_cache")
        with self.step_log.phase("refresh"):
            self.cost["refresh_target_passes"] += live.refresh(self.targets, self.tokens)
        return live.cache

    def need_cache(self, who: str) -> LiveCache:
        """Return the cache in use (ConfigurationError where training has none)."""
        self.prepare()
        if self.live_cache is None:
            raise ConfigurationError(
                who, expected="a cache", got="none: training needs none with these arguments",
                cure="Call build_cache() before train().",
            )  # fmt: skip
        return self.live_cache

    # ------------------------------------------------------------------ steps

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Any]:
        """Return batches of what :meth:`prepare_queries` has made of the training queries."""
        if self.train_dataset is None:
            raise ConfigurationError("train", expected="a train_dataset", got="None", cure="Pass one to the trainer.")
        self.prepare()
        loader: torch.utils.data.DataLoader[Any] = self._get_dataloader(
            dataset=cast(Any, self._examples), description="Training", batch_size=self._train_batch_size,
            sampler_fn=cast(Any, self._get_train_sampler), is_training=True,
        )  # fmt: skip
        return loader

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Do one forward and backward pass and let the corrector follow."""
        with self.step_log.phase("step"):
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
            if self.live_cache is not None and self.accelerator.sync_gradients:
                with self.step_log.phase("corrector"):
                    self.live_cache.update_corrector(self.state.global_step, self._get_learning_rate())
        return loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Estimate the operations of a step; transformers' own expects a single tensor of tokens."""
        return self.encoder.floating_point_ops(inputs)

    def start_following(self) -> None:
        """Forget pairs of an earlier call of :meth:`train`, whose steps were counted from zero too."""
        if self.args.corrector_warmup_steps >= self.state.max_steps and self.args.uses_corrector:
            logger.warning("corrector_warmup_steps is not below max_steps: the corrector is fitted but never used.")
        if self.live_cache is not None and self.live_cache.online is not None and self.state.global_step == 0:
            self.live_cache.online.window.clear()

    def _load_best_model(self) -> None:
        """Restore with the best weights the cache and the corrector's pairs that belong to them."""
        super()._load_best_model()
        if self.live_cache is not None:
            folder = Path(str(self.state.best_model_checkpoint))
            self.live_cache = LiveCache.reopen(folder, self.encoder, self.args, held_out=self._held_out)

    def after_step(self, step: int) -> None:
        """Refresh the cache if the schedule or an alarm says so; called after every optimiser step."""
        live = self.live_cache
        if live is None or step >= self.state.max_steps:
            return
        asked = "none" if live.watch is None else live.watch.asked()
        if self._schedule.due(step) or asked == "refresh":
            self.refresh_cache()
        elif asked == "refit":
            live.refit()

    def finish_corrector(self) -> None:
        """Fit the corrector to the last window once more; called when training ends."""
        if self.live_cache is not None:
            with working("fit the corrector", shown=is_main() and not self.args.disable_tqdm):
                self.live_cache.finish_corrector()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means observed since the last time."""
        super().log({**logs, **self.step_log.drain()} if "loss" in logs else logs, start_time)

    # ------------------------------------------------------------------ judgement

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: what transformers means by it has no sense here.

        Raises:
            ConfigurationError: Always, naming what to call instead.
        """
        raise ConfigurationError(
            "predict", expected="evaluate(split) for metrics, or the model's own methods for vectors and answers",
            got="predict()", cure="Call trainer.evaluate(split); trainer.encoder has encode_query and encode_target.",
        )  # fmt: skip

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the quality on one split or several, and log it; see :meth:`quality_of`.

        Args:
            eval_dataset: Queries, or the name of one of the trainer's own splits; its own if not given.
            ignore_keys: Not used; part of transformers' signature.
            metric_key_prefix: Put before the names of the metrics.

        Returns:
            ``{"eval_mrr@10": …, "eval_recall@10": …, …}``.
        """
        split = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(split, str):
            own = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
            if split not in own:
                raise ConfigurationError(
                    "evaluate", expected=f"a split, or the name of one of the trainer's: {sorted(own)}",
                    got=repr(split), cure="Pass the split itself, or give the trainer eval_dataset={name: split}.",
                )  # fmt: skip
            split = own[split]
        if isinstance(split, dict):
            metrics: dict[str, float] = {}
            for name, one in split.items():
                metrics |= self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if split is None:
            raise ConfigurationError(
                "evaluate", expected="an eval_dataset", got="None", cure="Pass one to the trainer or to evaluate()."
            )
        self.prepare()
        started = time.time()
        found = self.quality_of(split)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, started, num_samples=len(column(split, "query")))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def quality_of(self, split: Dataset) -> dict[str, float]:
        """Return mean metrics of a split by name."""
        raise NotImplementedError

    @property
    def scan_said(self) -> str:
        """How training looked at all targets and why; empty where it looked at none."""
        return self.source.said if self._prepared else ""

    @property
    def fitted_rows(self) -> np.ndarray:
        """Rows of the targets the corrector was fitted on, ``(n,)`` int64; none without a corrector."""
        return np.zeros(0, dtype=np.int64) if self.live_cache is None else self.live_cache.fitted_rows

    @property
    def run_judge(self) -> RunJudge:
        """What measures this run."""
        return RunJudge(self.encoder, self.args, self.targets, self.tokens, self.cost)

    def run_record(self) -> RunRecord:
        """Return what is known of the run so far, as ``run.json`` and the model card show it."""
        state = RunState(
            self.args, self.live_cache, self.encoder.corrector, self._report, self.cost,
            self.step_log.total_seconds, self.state.log_history, self.scan_said,
        )  # fmt: skip
        return record_of(state, self.run_context)

    # ------------------------------------------------------------------ checkpoints

    @property
    def resume_settings(self) -> dict[str, Any]:
        """What a checkpoint must have been written with for this run to go on from it, by name."""
        fixed = self.encoder.corrector is not None and not self.args.uses_corrector
        return {**self.args.resume_settings, "fixed_corrector": fixed}

    def check_extra_state(self, folder: Path) -> None:
        """Refuse a checkpoint of other arguments, or with other targets held out (CheckpointError)."""
        state = read_json(folder / STATE_FILE)
        check_settings(folder, written=state["settings"], now=self.resume_settings)
        held_out = note_of_rows(self._held_out)
        if self.args.uses_corrector:
            check_held_out(folder, written=state.get("held_out", held_out), now=held_out)

    def save_extra_state(self, folder: Path) -> None:
        """Write costs, caches and the corrector's pairs into a checkpoint."""
        known = {"cost": self.cost, "settings": self.resume_settings, "held_out": note_of_rows(self._held_out)}
        if self.live_cache is not None:
            self.live_cache.save(folder, known)
        elif is_main():
            write_json(folder / STATE_FILE, {**known, "caches": []})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, tokenizers and corrector, with the encoders it leads between and the targets it was fitted on."""
        live = None if self.live_cache is None or self.live_cache.online is None else self.live_cache
        # By every process, as weights in shards are gathered for it.
        fresh = None if live is None else self.encoder.fingerprint("target")
        if live is not None and fresh is not None:
            live.note_encoders(fresh)
        super().save_model(output_dir, _internal_call)
        if live is not None and fresh is not None and self.args.should_save:
            live.note_fitted(Path(output_dir or str(self.args.output_dir)) / CORRECTOR_FOLDER, fresh)

    def load_extra_state(self, folder: Path) -> None:
        """Read costs; caches and pairs are restored by :meth:`prepare`."""
        state = read_json(folder / STATE_FILE)
        self.cost = {**dict.fromkeys(self.cost_names, 0), **state["cost"]}
        self._resumed_from, self._resumed_with_cache, self._prepared = folder, bool(state["caches"]), False
