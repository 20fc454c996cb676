"""Training a dual encoder whose hard negatives come from an up-to-date softmax over a stale cache."""

from __future__ import annotations

from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerCallback
from transformers.utils import logging

from hf_corrector._distributed import is_main
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.collators import PairCollator, PairDataset
from hf_corrector.data.judgements import given_negatives_as_rows, teacher_scores_as_rows
from hf_corrector.data.retrieval import column, positives_as_rows
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.staleness import StalenessReport
from hf_corrector.models.contrast import SampledTargets
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.training import checks
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.cache_trainer import RunTargets
from hf_corrector.training.publishing import PublishingTrainer
from hf_corrector.training.sharding import step_autocast
from hf_corrector.training.target_choice import Choice, Judgements, TargetChooser

logger = logging.get_logger(__name__)


class DualEncoderTrainer(PublishingTrainer):
    """Train a dual encoder, and with ``staleness="corrector"`` the corrector that keeps its cache usable.

    Each step samples targets for every query from the whole cache (through the corrector), re-encodes only those with
    the current encoder, and computes the truncated softmax loss on them (arXiv 2409.01890). The same re-encoded
    targets are the corrector's training pairs, so it costs no further pass of the encoder. Neither cache nor corrector
    is on the gradient path of the encoder.

    The phases :meth:`prepare`, :meth:`train`, :meth:`refresh_cache`, :meth:`evaluate` and :meth:`judge` may be called
    alone.

    Args:
        model: The encoder, with or without adapters of PEFT; gets a corrector where ``args`` ask for one.
        args: Arguments.
        train_dataset: Queries with columns ``query_id``, ``query``, ``positive_ids``; or, without ``targets``, pairs in
            sentence-transformers' columns (anchor, positive, negatives).
        targets: All targets, columns ``id`` and ``text``.
        eval_dataset: Queries to evaluate on, as ``train_dataset``.
        target_cache: A cache made by an older encoder from the same targets. By default the cache is made from
            ``model`` as it is.
        callbacks: Further callbacks.
        optimizers: Optimiser and schedule of the encoder, as in transformers.

    Attributes:
        encoder: The dual encoder inside of ``model``.
        live_cache: The cache in use and the corrector's view of it, once :meth:`prepare` has run; None where training
            needs no cache.
        cost: Encoder forward passes so far, in texts, by purpose.

    Raises:
        ConfigurationError: If the arguments cannot work together.
        DataError: If queries and targets do not fit together.
    """

    args: DualEncoderTrainingArguments
    _lacked_negatives = False

    def __init__(  # noqa: PLR0913 - transformers' own signature
        self,
        model: DualEncoderModel | PeftModel,
        args: DualEncoderTrainingArguments,
        train_dataset: Dataset | None = None,
        targets: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        *,
        target_cache: TargetCache | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        encoder = checks.check_types(model, args)
        train_dataset, targets, eval_dataset = checks.check_data(train_dataset, targets, eval_dataset)
        checks.check_given(train_dataset, args)
        super().__init__(
            model, args, RunTargets(encoder, targets, target_cache),
            train_dataset=train_dataset, eval_dataset=eval_dataset,
            data_collator=cast(Any, PairCollator(encoder.pad_token_id("query"), encoder.pad_token_id("target"))),
            callbacks=callbacks, optimizers=optimizers,
        )  # fmt: skip

    def prepare_queries(self, split: Dataset) -> PairDataset:
        """Tokenise the queries and take up what the data say about them."""
        judgements = Judgements(
            positives_as_rows(split, self.targets), given_negatives_as_rows(split, self.targets),
            teacher_scores_as_rows(split, self.targets),
        )  # fmt: skip
        self._chooser = TargetChooser(self.encoder, self.args, self.tokens, judgements=judgements)
        return PairDataset(
            judgements.positives, self.tokenize_queries(column(split, "query")), self.tokens,
            one_example_per_query=self.args.several_positives,
        )  # fmt: skip

    # ------------------------------------------------------------------ one step

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sample targets for the batch's queries, encode them and return the truncated softmax loss."""
        chosen, args = list[Choice](), self.args

        def candidate_fn(query_embeddings: torch.Tensor) -> SampledTargets:
            with self.step_log.phase("sampling"):
                choice = self._chooser.choose(
                    query_embeddings,
                    inputs,
                    scan=self.source.scan(self.live_cache, self.state.global_step),
                    step=self.state.global_step,
                    cached=self.source.cached(self.live_cache),
                )
            chosen.append(choice)
            return choice.part

        with step_autocast(args, sharded=self.is_fsdp_enabled), self.step_log.phase("encode"):
            outputs = model(
                queries=inputs["queries"], positives=inputs["positives"] if args.train_targets else None,
                candidate_fn=candidate_fn, mini_batch_size=args.mini_batch_size,
                distillation_weight=args.distillation_weight, distillation_temperature=args.distillation_temperature,
            )  # fmt: skip
        choice = chosen[0]
        self._note_negatives(choice)
        self.cost["query_passes"] += len(choice.queries)
        if args.train_targets:
            self.cost["train_target_passes"] += len(choice.contrast.rows)
        if self.live_cache is not None and args.train_targets:
            with self.step_log.phase("corrector"):
                fresh = outputs.target_embeddings.detach().float()
                self.live_cache.learn_from(choice.encoded(args), fresh, step=self.state.global_step, log=self.step_log)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _note_negatives(self, choice: Choice) -> None:
        """Log how many negatives a query has, and say once if a step has none: its loss is 0 whatever the weights."""
        allowed = choice.contrast.allowed
        found = float(allowed.sum()) / len(allowed) - 1  # without its own positive
        self.step_log.observe("negatives_per_query", found, count=len(allowed))
        if not found and not self._lacked_negatives and is_main():
            logger.warning(
                f"No query of step {self.state.global_step} has a negative, so that it trains on nothing: filters and "
                "known positives leave none. Loosen the filters, use share_negatives=True or larger batches."
            )
        self._lacked_negatives |= not found

    # ------------------------------------------------------------------ judgement

    def quality_of(self, split: Dataset) -> dict[str, float]:
        """Search the targets as training sees them (corrected, or as cached) and return the quality.

        Costs one pass per query and none per target, unless training needs no cache: then all targets are encoded.
        """
        return self.run_judge.search_quality(split, self.live_cache)

    def judge(
        self, split: Dataset, *, old_model: DualEncoderModel | None = None, options: JudgeOptions | None = None
    ) -> StalenessReport:
        """Compare stale, corrected and fresh targets, and the old model kept, on one split; re-encodes the corpus.

        Args:
            split: Queries with judgements, not trained on.
            old_model: The encoder training started from, for the condition ``old``.
            options: How to measure.

        Raises:
            CacheMismatchError: If ``old_model`` is not the encoder that made the first cache.
        """
        live = self.need_cache("judge")
        self._report = self.run_judge.measure(split, live, old_model=old_model, options=options)
        return self._report
