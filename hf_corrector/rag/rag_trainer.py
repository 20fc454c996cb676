"""Training a retriever and a reader together on answers, while the cache of targets goes stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from hf_corrector._distributed import all_gather_rows, on_main
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cards import card_of_reading_run
from hf_corrector.data.retrieval import column, positives_as_rows, with_optional_columns
from hf_corrector.encoding import encode_rows
from hf_corrector.index.base import RowVectors
from hf_corrector.models.hub_files import RETRIEVAL_AUGMENTED_FILES
from hf_corrector.rag.default_reader import cross_attention_names
from hf_corrector.rag.generation import GenerationOptions
from hf_corrector.rag.modeling_rag import MiniBatches, RetrievalAugmentedModel, RetrievalAugmentedOutput
from hf_corrector.rag.objectives import marginal_log_likelihood
from hf_corrector.rag.passage_choice import PassageChoice, PassageChooser, PassageTokens
from hf_corrector.rag.passages import CandidateFn, NearestPassages, RetrievedTargets, closed_book
from hf_corrector.rag.question_data import (
    QuestionCollator,
    QuestionDataset,
    check_questions,
    first_answers,
    tokenize_answers,
    tokenize_passages,
)
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.rag.rag_checks import check_evaluation, check_optimizer, check_targets, check_types
from hf_corrector.rag.reading import reading_ops
from hf_corrector.records import COSTS, RunRecord
from hf_corrector.training.cache_trainer import RunTargets
from hf_corrector.training.live_cache import compute_dtype_of, encode_options_of
from hf_corrector.training.publishing import PublishingTrainer
from hf_corrector.training.run_record import RunContext

READER_COSTS = (*COSTS, "probe_target_passes", "reader_passes")


class RetrievalAugmentedTrainer(PublishingTrainer):
    """Train a retriever and the language model that reads what it finds, from questions and answers alone.

    Each step chooses passages for every question from the whole cache (through the corrector), re-encodes those with
    the current encoder, lets the reader weigh the answer under each, and computes the objective on P(y|x) over them.
    The re-encoded targets are the corrector's training pairs. As targets that are wrongly far away are never read, some
    more, drawn uniformly, are encoded for the corrector alone (``uniform_fraction``; their passes are counted).

    Judgements are not used: the answer is the only supervision, and known positives are candidates like all others.

    With ``objective="generator_only"`` the retriever is frozen and passages come from the cache as it is, or seen
    through the fitted corrector that the model brings for a ``target_cache``.

    Args:
        model: Retriever and reader; its retriever gets a corrector where ``args`` ask for one.
        args: Arguments.
        train_dataset: Questions with columns ``query_id``, ``query`` and ``answers`` (texts; the first is trained on).
        targets: All targets, columns ``id`` and ``text``.
        eval_dataset: Questions to evaluate on, as ``train_dataset``; with ``positive_ids`` their recall is measured.
        target_cache: A cache made by an older encoder from the same targets. By default the cache is made from
            the retriever as it is.
        callbacks: Further callbacks.
        optimizers: Optimiser and schedule, as in transformers. The groups of a given optimiser are left as they are;
            the rate of the first is the clock of the encoder's drift, so the retriever's parameters belong there.

    Attributes:
        rag: The retrieval-augmented model.
        encoder: Its retriever.
        live_cache: The cache in use and the corrector's view of it, once :meth:`prepare` has run; None where nothing is
            read.
        cost: Forward passes so far, by purpose: of the encoder in texts, ``reader_passes`` in prompts.
        judged: What :func:`~hf_corrector.rag.evaluation.judge_trained` found last, as JSON values; empty before.

    Raises:
        ConfigurationError: If the arguments cannot work together.
        DataError: If questions, of evaluation too, and targets do not fit, or an answer is too long for the reader.
    """

    args: RetrievalAugmentedTrainingArguments
    cost_names = READER_COSTS
    published_files = RETRIEVAL_AUGMENTED_FILES
    run_context = RunContext("rag-train")

    def __init__(  # noqa: PLR0913 - transformers' own signature
        self,
        model: RetrievalAugmentedModel,
        args: RetrievalAugmentedTrainingArguments,
        train_dataset: Dataset | None = None,
        targets: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        *,
        target_cache: TargetCache | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        self.rag = check_types(model, args)
        check_optimizer(optimizers[0], args)
        targets = check_targets(targets)
        if train_dataset is not None:
            check_questions(train_dataset, "train_dataset")
        check_evaluation(self.rag, args, eval_dataset, targets)
        self.judged: dict[str, Any] = {}
        self._asked = self._answered = 0.0  # mean tokens of the reader's questions and answers
        self._answers = (
            [] if train_dataset is None else tokenize_answers(self.rag.reader, train_dataset, "train_dataset")
        )
        if not args.objective_of_step.trains_retriever:
            self.rag.freeze_retriever()
        super().__init__(
            model, args, RunTargets(self.rag.retriever, targets, target_cache), train_dataset=train_dataset,
            eval_dataset=eval_dataset, callbacks=callbacks, optimizers=optimizers,
            data_collator=cast(Any, QuestionCollator(self.rag.retriever.pad_token_id("query"))),
        )  # fmt: skip

    # ------------------------------------------------------------------ phases

    def prepare(self) -> None:
        """Tokenise the corpus for encoder and reader, and the questions, and make or open the cache; done once.

        Raises:
            CacheMismatchError: If the cache folder holds vectors of another encoder or other texts.
            CheckpointError: If a run is resumed and its cache is no longer there.
        """
        folder = Path(str(self.args.output_dir)) / "tokens" / "passages"
        if not self._prepared:
            self.passages = tokenize_passages(
                self.rag, column(self.targets, "text"), folder, progress=not self.args.disable_tqdm
            )
        super().prepare()

    def prepare_queries(self, split: Dataset) -> QuestionDataset:
        """Tokenise the questions for encoder and reader."""
        texts = column(split, "query")
        questions = self.rag.reader.questions(texts)
        self._asked, self._answered = (float(np.mean(list(map(len, one)))) for one in (questions, self._answers))
        words = PassageTokens(self.tokens, self.passages, self.encoder.pad_token_id("target"))
        self._chooser = PassageChooser(self.args, words)
        return QuestionDataset(self.tokenize_queries(texts), questions, self._answers)

    def further_ops(self) -> float:
        """Return the reader's operations in a step: of all prompts of a process, forward and backward."""
        args, k, room = self.args, self.args.num_passages, self.rag.config.reader_max_length
        passage = float(np.mean(self.passages.lengths))

        def read(passages: int) -> float:
            return reading_ops(self.rag.generator, min(self._asked + passages * passage, room), self._answered)

        if not args.objective_of_step.reads_jointly:
            return 3 * args.per_device_train_batch_size * k * read(1)
        # With all passages at once; and with all but one, as often as there are passages, without gradient.
        return args.per_device_train_batch_size * (3 * read(k) + k * read(k - 1))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, see :meth:`PublishingTrainer.train`; an earlier judgement is none of what comes of it."""
        self.judged = {}
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def resume_settings(self) -> dict[str, Any]:
        """What a checkpoint must have been written with, the reader and how it is asked included."""
        config = self.rag.config
        reader = {"reader": type(self.rag.generator).__name__, "learn_scale": config.learn_scale}
        asked = {name: getattr(config, name) for name in ("prompt", "reader_max_length", "answer_max_length")}
        return {**super().resume_settings, **reader, **asked}

    def run_record(self) -> RunRecord:
        """Return what is known of the run so far, of its reader and of its judgement too."""
        record = super().run_record()
        return replace(record, arguments={**record.arguments, **self.rag.describe()}, evaluation=self.judged)

    def model_card(self, record: RunRecord) -> str:
        """Return the card of retriever and reader."""
        return card_of_reading_run(record, self.card_facts)

    def check_adapters(self) -> None:
        """Accept the adapters of the parts, which are saved with the whole model."""

    # ------------------------------------------------------------------ one step

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Choose passages for the batch's questions, read them and return the loss of the answers."""
        chosen, step = list[PassageChoice](), self.state.global_step
        # What passages are drawn by must be what they are weighed by.
        self.encoder.config.scale = self.rag.scale_now

        def candidate_fn(queries: torch.Tensor) -> RetrievedTargets:
            live, scan = self.live_cache, self.source.scan(self.live_cache, step)
            if scan is None or live is None:
                return closed_book(queries)
            with self.step_log.phase("sampling"):
                choice = self._chooser.choose(
                    queries, inputs["query_rows"], scan=scan, step=step, scale=self.encoder.config.scale,
                    cached=live.read_fixed,
                )  # fmt: skip
            chosen.append(choice)
            return choice.part

        outputs = model(
            questions=inputs["questions"], reader_questions=inputs["reader_questions"], answers=inputs["answers"],
            candidate_fn=candidate_fn, objective=self.args.objective_of_step,
            mini_batches=MiniBatches(self.args.mini_batch_size, self.args.generator_mini_batch_size),
            timed=self.step_log.phase,
        )  # fmt: skip
        self._observe(outputs)
        questions = sum(len(part) for part in all_gather_rows(inputs["query_rows"]))
        self.cost["query_passes"] += questions
        prompts = chosen[0].prompts if chosen else questions
        self.cost["reader_passes"] += prompts + (questions if self.args.objective_of_step.reads_jointly else 0)
        if chosen and self.args.encodes_targets:
            with self.step_log.phase("corrector"):
                self._learn_from(chosen[0], outputs.target_embeddings.detach().float())
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Estimate the operations of a step on questions and answers; which passages are read is not known here."""
        texts = {name: int(inputs[name]["input_ids"].numel()) for name in ("questions", "reader_questions", "answers")}
        read = (texts["reader_questions"] + texts["answers"]) * max(1, self.args.num_passages)
        return 6 * (
            texts["questions"] * self.encoder.num_parameters(exclude_embeddings=True)
            + read * self.rag.generator.num_parameters(exclude_embeddings=True)
        )  # fmt: skip

    def _learn_from(self, choice: PassageChoice, fresh: torch.Tensor) -> None:
        """Hand the step's re-encoded targets to the corrector and the log."""
        live = self.need_cache("train")
        self.cost["train_target_passes"] += sum(
            len(part) for part in all_gather_rows(torch.from_numpy(choice.own_rows))
        )

        def encode(rows: np.ndarray) -> torch.Tensor:
            self.cost["probe_target_passes"] += len(rows)
            with self.step_log.phase("encode"):
                return encode_rows(self.encoder, self.tokens, rows, options=encode_options_of(self.args))

        targets, vectors = self._chooser.encoded(choice, fresh, encode)
        live.learn_from(targets, vectors, step=self.state.global_step, log=self.step_log)

    def _observe(self, outputs: RetrievalAugmentedOutput) -> None:
        """Log the parts of the loss, and how likely the answers are, over the questions of all processes."""
        for name, value in (("retriever_loss", outputs.retriever_loss), ("reader_loss", outputs.reader_loss)):
            if value is not None:
                self.step_log.observe(name, float(torch.cat(all_gather_rows(value[None])).mean()))
        if outputs.log_likelihoods is not None and outputs.log_prior is not None:
            mask = outputs.log_prior > float("-inf")
            found = marginal_log_likelihood(outputs.log_prior, outputs.log_likelihoods, mask)
            together = torch.cat(all_gather_rows(found))
            self.step_log.observe("answer_log_likelihood", float(together.mean()), count=len(together))
        if self.rag.log_scale is not None:
            self.step_log.show({"scale": self.rag.scale_now})

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make transformers' optimiser, with the reader's own learning rates and no decay of the scale."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not made:
            # Given, or of an earlier call: a schedule that stands already counts its groups.
            return optimizer
        rates = {
            "reader": self.args.generator_learning_rate, "cross_attention": self.args.cross_attention_learning_rate
        }  # fmt: skip
        changes: dict[str, dict[str, float]] = {
            "retriever": {}, **{kind: {} if rate is None else {"lr": rate} for kind, rate in rates.items()},
            "scale": {"weight_decay": 0.0},
        }  # fmt: skip
        # Where it has no rate of its own, it has that of the reader.
        attending = frozenset() if rates["cross_attention"] is None else cross_attention_names(self.rag.generator)
        kinds = {
            id(weight): "cross_attention" if name in attending else "reader"
            for name, weight in self.rag.generator.named_parameters()
        }
        kinds[id(self.rag.log_scale)] = "scale"
        split = [
            {**group, "params": some, **change}
            # The first group's learning rate is the clock of the encoder's drift.
            for kind, change in changes.items() for group in optimizer.param_groups
            if (some := [one for one in group["params"] if kinds.get(id(one), "retriever") == kind])
        ]  # fmt: skip
        optimizer.param_groups[:] = split
        return optimizer

    # ------------------------------------------------------------------ judgement

    def nearest_passages(self, view: RowVectors | None = None, *, k: int | None = None) -> CandidateFn:
        """Return what finds passages for questions, to evaluate or to answer with.

        Args:
            view: Vectors of all targets: ``live_cache.cache`` (stale), ``live_cache.corrected``, or what
                ``run_judge.encode_fresh()`` returns; as training sees them if not given.
            k: Passages per question; ``num_passages`` if not given, and none (closed book) if 0.
        """
        k = self.args.num_passages if k is None else k
        if k == 0:
            return closed_book
        view = self.need_cache("nearest_passages").corrected if view is None else view
        self.prepare()
        return NearestPassages(view, self.passages, k=k, device=self.args.device)

    def quality_of(self, split: Dataset) -> dict[str, float]:
        """Weigh the first answers under the passages that training would find; measure recall where it is judged.

        Returns:
            ``answer_log_likelihood``: mean log Σ_y P(y|x)·P_LM(a|x,y); ``answer_log_likelihood_per_token``; and
            ``gold_recall@k``, the share of questions one of whose positives is read, where the split has positives.
        """
        check_questions(split, "evaluate")
        find, texts = self.nearest_passages(), column(split, "query")
        options = GenerationOptions(
            batch_size=self.args.generator_mini_batch_size or self.args.per_device_eval_batch_size,
            compute_dtype=compute_dtype_of(self.args),
        )  # fmt: skip

        def weigh() -> tuple[dict[str, float], int]:
            found = self.rag.answer_log_likelihoods(texts, first_answers(split), find, options=options)
            tokens = float(found.answer_tokens.sum())
            metrics = {
                "answer_log_likelihood": float(found.marginal.mean()),
                "answer_log_likelihood_per_token": float(found.marginal.sum()) / tokens,
            }
            if "positive_ids" in split.column_names and self.args.num_passages:
                known = positives_as_rows(with_optional_columns(split), self.targets)
                hits = [bool(set(rows) & set(gold)) for rows, gold in zip(found.rows.tolist(), known, strict=True)]
                metrics[f"gold_recall@{self.args.num_passages}"] = sum(hits) / len(hits)
            return metrics, found.prompts

        metrics, prompts = on_main("weighing the evaluation answers", weigh)
        self.cost["query_passes"] += len(texts)
        self.cost["reader_passes"] += prompts
        if self.live_cache is not None:
            # Only a search needs all corrected targets at once, and training has its own way of keeping them.
            self.live_cache.corrected.invalidate()
        return metrics
