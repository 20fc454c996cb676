"""How well a retriever and its reader answer when targets are stale, corrected or fresh: likelihood, answers, passages.

The same questions are asked under every condition, and every interval comes from the same resamples of them. Questions
one of whose positives the corrector was fitted on flatter it and are left out, as in :mod:`hf_corrector.evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset

from hf_corrector._distributed import on_main
from hf_corrector.answers import check_language, contains_answer, exact_match, f1
from hf_corrector.data.retrieval import column, positives_as_rows, with_optional_columns
from hf_corrector.data.tokens import TokenStore
from hf_corrector.errors import ConfigurationError
from hf_corrector.evaluation.evaluator import BoolArray, clean_queries
from hf_corrector.index.base import RowVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.metrics import RESAMPLES, FloatArray, Interval, Relevant, Undefined, paired_bootstrap
from hf_corrector.rag.generation import GenerationOptions
from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel
from hf_corrector.rag.passages import CandidateFn, NearestPassages, closed_book
from hf_corrector.rag.question_data import check_questions, first_answers, tokenize_answers
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.rag.rag_trainer import RetrievalAugmentedTrainer
from hf_corrector.training.live_cache import compute_dtype_of

METRICS = (
    "answer_log_likelihood", "answer_log_likelihood_per_token", "exact_match", "f1", "gold_recall@10", "attribution",
)  # fmt: skip
GOLD_DEPTH = 10
Statistics: TypeAlias = Mapping[str, Mapping[str, Interval | Undefined]]


@dataclass(frozen=True)
class ReadingOptions:
    """How :func:`judge_reading` measures.

    Attributes:
        num_passages: Passages read per question.
        language: How answers are compared, see :mod:`hf_corrector.answers`.
        generation: How answers are found.
        resamples: Resamples of questions behind each interval.
        seed: Seed of the resampling.
        device: Where targets are searched.

    Raises:
        ConfigurationError: If a value is out of its range.
    """

    num_passages: int = 8
    language: str = "en"
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    resamples: int = RESAMPLES
    seed: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        """Check the values."""
        check_language(self.language)
        if self.num_passages < 1 or self.resamples < 1:
            raise ConfigurationError(
                "ReadingOptions", expected="num_passages and resamples of at least 1",
                got=f"{self.num_passages} and {self.resamples}", cure="Raise them; a view of None is closed book.",
            )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ReadingJudgement:
    """What was measured.

    Attributes:
        questions: Number of questions.
        clean_questions: Number of those none of whose positives took part in fitting; all but ``all_questions`` and
            ``per_question`` is of them only.
        means: ``means[condition][metric]``; empty if no question is clean, as are the next two.
        differences: ``differences["corrected-stale"][metric]``, paired.
        recovery: ``recovery["corrected"][metric]``, the share of fresh minus stale that is won back.
        all_questions: ``all_questions[condition][metric]``, plain means over all questions.
        per_question: ``per_question[condition][metric]``, ``(questions,)``.
        query_passes: Questions the encoder encoded for this, each as often as it was.
        reader_passes: Prompts the reader was given for this, to weigh and to write answers.
    """

    questions: int
    clean_questions: int
    means: Mapping[str, Mapping[str, Interval]]
    differences: Mapping[str, Mapping[str, Interval]]
    recovery: Statistics
    all_questions: Mapping[str, Mapping[str, float]]
    per_question: Mapping[str, Mapping[str, FloatArray]] = field(repr=False)
    query_passes: int = 0
    reader_passes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: one entry per condition, counts, intervals; ``None`` where nothing can be said."""
        estimates = {
            name: {m: self.means[name][m].estimate if self.means else None for m in METRICS}
            for name in self.all_questions
        }
        return {
            **estimates, "clean_questions": self.clean_questions, "questions": self.questions,
            "intervals": _plain(self.means), "differences": _plain(self.differences),
            "recovery": _plain(self.recovery), "all_questions": {n: dict(v) for n, v in self.all_questions.items()},
        }  # fmt: skip

    def table(self) -> str:
        """Return an aligned table for a terminal: means, below each its 95 % interval, then paired differences."""
        head = f"{self.clean_questions:,} clean of {self.questions:,} questions; mean and 95 % interval"
        blocks: Sequence[Mapping[str, Mapping[str, Interval]]] = (self.means, self.differences)
        rows = [["", "log P(a|x)", "per token", *METRICS[2:]]]
        for name, values in ((name, values) for block in blocks for name, values in block.items()):
            rows.append([name, *(f"{values[metric].estimate:.3f}" for metric in METRICS)])
            rows.append(["", *(f"[{values[metric].low:.3f}, {values[metric].high:.3f}]" for metric in METRICS)])
        if not self.means:
            head = f"all {self.questions:,} questions look for targets the corrector was fitted on, which flatters it"
            rows += [[name, *(f"{values[m]:.3f}" for m in METRICS)] for name, values in self.all_questions.items()]
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        return "\n".join([head, *lines])


@dataclass(frozen=True)
class _Asked:
    """Questions of a split and what is known of them."""

    texts: list[str]
    answers: list[list[str]]
    first: list[str]
    gold: Relevant
    vectors: torch.Tensor


def judge_reading(  # noqa: PLR0913 - what is compared, on what, and how
    model: RetrievalAugmentedModel,
    split: Dataset,
    targets: Dataset,
    conditions: Mapping[str, RowVectors | None],
    *,
    passages: TokenStore | Sequence[Sequence[int]] | None = None,
    fitted_rows: np.ndarray | None = None,
    options: ReadingOptions | None = None,
) -> ReadingJudgement:
    """Ask the same questions under every condition.

    ======================================  ==========================================================================
    metric                                  of a question
    ======================================  ==========================================================================
    ``answer_log_likelihood``               log Σ_y P(y|x)·P_LM(a|x,y) of its first answer, as in training
    ``answer_log_likelihood_per_token``     the same over the mean number of tokens of all those answers
    ``exact_match``, ``f1``                 of the most likely generated answer, with the best of the right ones
    ``gold_recall@10``                      whether one of its positives is among the ten nearest targets
    ``attribution``                         whether the passage that answer most likely came from holds that answer
    ======================================  ==========================================================================

    Args:
        model: Retriever and reader.
        split: Questions with ``query_id``, ``query``, ``answers`` and ``positive_ids``.
        targets: All targets, columns ``id`` and ``text``.
        conditions: By name the vectors of all targets, for instance ``stale``, ``corrected`` and ``fresh``; None for
            closed book, where nothing is retrieved.
        passages: The reader's tokens of the targets, by row; tokenised here if not given.
        fitted_rows: Target rows whose fresh vectors the corrector was fitted on; none if not given.
        options: How to measure.

    Raises:
        DataError: If questions and targets do not fit together, or an answer is too long for the reader.
        ConfigurationError: If there is no condition or one is of other targets.
    """
    options = ReadingOptions() if options is None else options
    _check(split, targets, conditions)
    gold = positives_as_rows(with_optional_columns(split), targets)
    texts, known = column(split, "query"), column(split, "answers")
    asked = _Asked(texts, known, first_answers(split), gold, model.retriever.encode_query(texts))
    tokenize_answers(model.reader, split, "questions")  # one too long shows now, and not after the first condition
    words, read = column(targets, "text"), passages
    if read is None:
        read = model.reader.passages(words)
    measured = {
        name: _measure(model, asked, _finder(view, read, options), view, words, options)
        for name, view in conditions.items()
    }
    clean = clean_queries(gold, np.zeros(0, dtype=np.int64) if fitted_rows is None else fitted_rows)
    judgement = compare_reading({name: values for name, (values, _) in measured.items()}, clean=clean, options=options)
    return replace(
        judgement, query_passes=len(texts) * (1 + 2 * len(conditions)),
        reader_passes=sum(prompts for _, prompts in measured.values()),
    )  # fmt: skip


def compare_reading(
    per_question: Mapping[str, Mapping[str, FloatArray]], *, clean: BoolArray, options: ReadingOptions
) -> ReadingJudgement:
    """Compare conditions whose values are known already, all from the same resamples of the clean questions.

    Args:
        per_question: ``per_question[condition][metric]`` for all of :data:`METRICS`, ``(questions,)``.
        clean: Which questions count, ``(questions,)``.
        options: Resamples and seed.
    """
    names = list(per_question)
    means: dict[str, dict[str, Interval]] = {}
    differences: dict[str, dict[str, Interval]] = {}
    recovery: dict[str, dict[str, Interval | Undefined]] = {}
    pairs = [(one, "stale") for one in names if one != "stale" and "stale" in names]
    pairs += [("corrected", "fresh")] if {"corrected", "fresh"} <= set(names) else []
    for metric in METRICS if clean.any() else ():
        values = {name: per_question[name][metric][clean] for name in names}
        # The seed is that of every metric, and so are the questions drawn.
        drawn = paired_bootstrap(values, generator=np.random.default_rng(options.seed), resamples=options.resamples)
        for name in names:
            means.setdefault(name, {})[metric] = drawn.mean(name)
        for first, second in pairs:
            differences.setdefault(f"{first}-{second}", {})[metric] = drawn.difference(first, second)
        if {"stale", "corrected", "fresh"} <= set(names):
            recovery.setdefault("corrected", {})[metric] = drawn.recovery("corrected")
    plain = {name: {metric: float(one.mean()) for metric, one in row.items()} for name, row in per_question.items()}
    return ReadingJudgement(len(clean), int(clean.sum()), means, differences, recovery, plain, per_question)


def reading_options(args: RetrievalAugmentedTrainingArguments, *, language: str = "en") -> ReadingOptions:
    """Return how to measure as a run has trained: its number of passages, arithmetic, device and seed.

    Args:
        args: Of the run.
        language: How answers are compared.

    Raises:
        ConfigurationError: If the language is unknown.
    """
    size = args.generator_mini_batch_size or args.per_device_eval_batch_size
    return ReadingOptions(
        num_passages=max(1, args.num_passages), language=language, seed=args.seed, device=args.device,
        generation=GenerationOptions(batch_size=size, compute_dtype=compute_dtype_of(args)),
    )  # fmt: skip


def judge_trained(
    trainer: RetrievalAugmentedTrainer, split: Dataset, *, options: ReadingOptions | None = None
) -> ReadingJudgement:
    """Judge what a trainer has trained on the targets as cached, as corrected, and encoded anew.

    Every process calls it; encoding is shared out, the rest is the main one's. The passes go into ``trainer.cost``, and
    what was found into the trainer's record and model card.

    Args:
        trainer: After training, with a cache; see :meth:`RetrievalAugmentedTrainer.build_cache` where it has none.
        split: Questions to judge on.
        options: How to measure; by default :func:`reading_options` of the trainer's arguments.

    Raises:
        ConfigurationError: If there is no cache.
        DataError: If questions and targets do not fit together.
    """
    live, options = trainer.need_cache("judge_trained"), reading_options(trainer.args) if options is None else options
    fresh = trainer.run_judge.encode_fresh()
    conditions: dict[str, RowVectors | None] = {"stale": live.cache, "corrected": live.corrected, "fresh": fresh}

    def judge() -> ReadingJudgement:
        return judge_reading(
            trainer.rag, split, trainer.targets, conditions, passages=trainer.passages,
            fitted_rows=trainer.fitted_rows, options=options,
        )  # fmt: skip

    judgement = on_main("judging the answers", judge)
    trainer.cost["query_passes"] += judgement.query_passes
    trainer.cost["reader_passes"] += judgement.reader_passes
    trainer.judged = judgement.to_dict()
    live.corrected.invalidate()
    return judgement


def _check(split: Dataset, targets: Dataset, conditions: Mapping[str, RowVectors | None]) -> None:
    check_questions(split, "questions")
    if "positive_ids" not in split.column_names:
        raise ConfigurationError(
            "questions", expected="a column positive_ids, the targets that hold the answer",
            got=str(split.column_names), cure="Add it; without judgements use model.answer_log_likelihoods.",
        )  # fmt: skip
    sizes = {name: len(view) for name, view in conditions.items() if view is not None}
    if not conditions or any(size != len(targets) for size in sizes.values()):
        raise ConfigurationError(
            "conditions", expected=f"at least one, of {len(targets)} vectors each", got=str(sizes),
            cure="Pass for instance stale, corrected and fresh vectors of these targets.",
        )  # fmt: skip


def _finder(
    view: RowVectors | None, passages: TokenStore | Sequence[Sequence[int]], options: ReadingOptions
) -> CandidateFn:
    if view is None:
        return closed_book
    return NearestPassages(view, passages, k=options.num_passages, device=options.device)


def _measure(
    model: RetrievalAugmentedModel, asked: _Asked, find: CandidateFn, view: RowVectors | None, texts: Sequence[str],
    options: ReadingOptions,
) -> tuple[dict[str, FloatArray], int]:  # fmt: skip
    """Return every metric of every question, ``(questions,)``, and the prompts the reader was given."""
    weighed = model.answer_log_likelihoods(asked.texts, asked.first, find, options=options.generation)
    answered = model.generate(asked.texts, find, options=options.generation)
    likelihoods = weighed.marginal.double().numpy()
    written = [one.best.text for one in answered]
    pairs = list(zip(written, asked.answers, strict=True))
    read = [texts[one.passage_row] if one.passage_row >= 0 else "" for one in answered]
    values = {
        "answer_log_likelihood": likelihoods,
        "answer_log_likelihood_per_token": likelihoods / float(weighed.answer_tokens.double().mean()),
        "exact_match": np.array([exact_match(one, known, language=options.language) for one, known in pairs]),
        "f1": np.array([f1(one, known, language=options.language) for one, known in pairs]),
        "gold_recall@10": _gold_recall(asked, view, options),
        "attribution": np.array([
            float(contains_answer(passage, [one], language=options.language))
            for passage, one in zip(read, written, strict=True)
        ]),
    }  # fmt: skip
    return values, weighed.prompts + sum(one.prompts for one in answered)


def _gold_recall(asked: _Asked, view: RowVectors | None, options: ReadingOptions) -> FloatArray:
    if view is None:
        return np.zeros(len(asked.texts))
    rows = ExactIndex(view, device=options.device).search(asked.vectors, min(GOLD_DEPTH, len(view))).rows.tolist()
    return np.array([float(bool(set(own) & set(gold))) for own, gold in zip(rows, asked.gold, strict=True)])


def _plain(statistics: Statistics) -> dict[str, dict[str, Any]]:
    return {name: {metric: one.to_dict() for metric, one in row.items()} for name, row in statistics.items()}
