"""Answering questions: passages are found, read, and every answer is weighed under all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig

from hf_corrector.batching import pad_tokens
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.rag.objectives import marginal_log_likelihood
from hf_corrector.rag.passages import CandidateFn, RetrievedTargets
from hf_corrector.rag.reader_inputs import ReaderFormat, by_length

if TYPE_CHECKING:
    from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel

METHODS = ("thorough", "fast")
QUERIES_AT_ONCE = 64  # whose passages are held in memory together


@dataclass(frozen=True)
class GenerationOptions:
    """How answers are found.

    Attributes:
        method: ``"thorough"`` lets the reader answer from each passage alone and weighs every answer under all
            passages, Σ_y P(y|x)·P_LM(a|x,y); ``"fast"`` lets it answer once, from all passages in one prompt.
        num_beams: Beams of the search for an answer; 1 is greedy.
        batch_size: Prompts read at a time.
        compute_dtype: ``"float32"``, or ``"bfloat16"`` / ``"float16"`` for autocast.

    Raises:
        ConfigurationError: If a value is out of its range.
    """

    method: str = "thorough"
    num_beams: int = 1
    batch_size: int = 16
    compute_dtype: str = "float32"

    def __post_init__(self) -> None:
        """Check the values."""
        dtypes = ("float32", "bfloat16", "float16")
        if self.method not in METHODS or min(self.num_beams, self.batch_size) < 1 or self.compute_dtype not in dtypes:
            raise ConfigurationError(
                "generation", expected=f"a method among {METHODS}, sizes of at least 1, a compute_dtype among {dtypes}",
                got=str(self), cure="Correct the argument.",
            )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """An answer and how likely it is.

    Attributes:
        text: The answer.
        log_prob: log Σ_y P(y|x)·P_LM(a|x,y) over the passages read; with ``"fast"`` log P_LM(a|x,S).
        passage_log_probs: log P(y|x,a) of each passage, how likely the answer came from it; with ``"fast"``, where
            that is not known, log P(y|x).
    """

    text: str
    log_prob: float
    passage_log_probs: tuple[float, ...]


@dataclass(frozen=True)
class AnsweredQuestion:
    """What was found for a question.

    Attributes:
        answers: Distinct answers, most likely first; at least one.
        rows: Target rows of the passages read, in the order they were found.
        log_prior: log P(y|x) of each.
        prompts: Prompts the reader was given for it, to write from and to weigh answers under; each counts once,
            whatever was written.
    """

    answers: tuple[Answer, ...]
    rows: tuple[int, ...]
    log_prior: tuple[float, ...]
    prompts: int

    @property
    def best(self) -> Answer:
        """The most likely answer."""
        return self.answers[0]

    @property
    def passage_row(self) -> int:
        """Row of the passage the best answer most likely came from."""
        probabilities = self.best.passage_log_probs
        return self.rows[max(range(len(self.rows)), key=lambda one: probabilities[one])]


@dataclass(frozen=True)
class AnswerLikelihoods:
    """How likely given answers are.

    Attributes:
        marginal: log Σ_y P(y|x)·P_LM(a|x,y), ``(n,)`` float32 on the CPU.
        per_passage: log P_LM(a|x,y), ``(n, k)``, 0 where masked.
        log_prior: log P(y|x), ``(n, k)``, −inf where masked.
        rows: Target rows read, ``(n, k)`` int64, −1 where masked.
        answer_tokens: Tokens of each answer, its end included, ``(n,)`` int64.
    """

    marginal: torch.Tensor
    per_passage: torch.Tensor
    log_prior: torch.Tensor
    rows: torch.Tensor
    answer_tokens: torch.Tensor

    @property
    def prompts(self) -> int:
        """Prompts the reader was given: one for every passage of every question."""
        return int(self.log_prior.isfinite().sum())


@dataclass(frozen=True)
class _Found:
    """Passages of some questions, and how likely each is."""

    questions: list[list[int]]
    retrieved: RetrievedTargets
    log_prior: torch.Tensor

    def prompt(self, style: ReaderFormat, query: int, place: int) -> list[int]:
        """Return the prompt of a question and one passage."""
        return style.prompt(self.questions[query], [self.retrieved.passages[place]])

    def passages(self, query: int) -> list[tuple[int, int, float]]:
        """Return column, place and log P(y|x) of a question's passages, in the order they were found."""
        columns = self.retrieved.mask[query].nonzero()[:, 0].tolist()
        return [(one, int(self.retrieved.places[query, one]), float(self.log_prior[query, one])) for one in columns]


@dataclass(frozen=True)
class _Written:
    """What the reader wrote: a text, and its tokens up to the end."""

    text: str
    tokens: list[int]


def likelihoods_of_answers(
    model: RetrievalAugmentedModel, questions: Sequence[str], answers: Sequence[str], candidate_fn: CandidateFn, *,
    options: GenerationOptions | None = None,
) -> AnswerLikelihoods:  # fmt: skip
    """Return how likely one given answer per question is, without gradient, in evaluation mode.

    Args:
        model: Retriever and reader.
        questions: Texts.
        answers: One text per question.
        candidate_fn: Finds passages for query embeddings, for instance a
            :class:`~hf_corrector.rag.passages.NearestPassages`; all questions get equally many places.
        options: Batch size and arithmetic.

    Raises:
        DataError: If there are not as many answers as questions, an answer is empty or too long, or a question gets no
            passage.
    """
    options = GenerationOptions() if options is None else options
    if len(questions) != len(answers) or not len(questions):
        raise DataError(
            "answers", expected="one for each of at least one question", got=f"{len(answers)} for {len(questions)}",
            cure="Give as many answers as questions.",
        )  # fmt: skip
    _check_list("questions", questions)
    _check_list("answers", answers)
    wanted = model.reader.answers(answers)
    found = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]()
    with model.evaluating(options.compute_dtype):
        for start in range(0, len(questions), QUERIES_AT_ONCE):
            part = _retrieve(model, questions[start : start + QUERIES_AT_ONCE], candidate_fn, options)
            own, mask = wanted[start : start + QUERIES_AT_ONCE], part.retrieved.mask.cpu()
            each = model.read_each(part.retrieved, part.questions, own, mini_batch_size=options.batch_size).cpu()
            rows = part.retrieved.candidates.ids.cpu()
            found.append((marginal_log_likelihood(part.log_prior, each, mask), each, part.log_prior, rows))
    marginal, each, prior, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
    return AnswerLikelihoods(marginal, each, prior, rows, torch.tensor([len(one) for one in wanted]))


def _check_list(name: str, texts: Sequence[str]) -> None:
    """Refuse one text, whose letters would be taken for texts."""
    if isinstance(texts, str):
        raise DataError(name, expected="a list of texts", got=f"one text, {texts[:40]!r}", cure="Put it into a list.")


def generate_answers(
    model: RetrievalAugmentedModel, questions: Sequence[str], candidate_fn: CandidateFn, *,
    options: GenerationOptions | None = None,
) -> list[AnsweredQuestion]:  # fmt: skip
    """Answer questions, each with the passages read and how likely each is.

    Args:
        model: Retriever and reader.
        questions: Texts.
        candidate_fn: Finds passages for query embeddings, see :func:`likelihoods_of_answers`.
        options: How answers are found.

    Raises:
        DataError: If a question gets no passage, or one text is given instead of several.
    """
    _check_list("questions", questions)
    options = GenerationOptions() if options is None else options
    answered = list[AnsweredQuestion]()
    with model.evaluating(options.compute_dtype):
        for start in range(0, len(questions), QUERIES_AT_ONCE):
            found = _retrieve(model, questions[start : start + QUERIES_AT_ONCE], candidate_fn, options)
            answer = _thorough if options.method == "thorough" else _fast
            answered += answer(model, found, options)
    return answered


def _retrieve(
    model: RetrievalAugmentedModel, texts: Sequence[str], candidate_fn: CandidateFn, options: GenerationOptions
) -> _Found:  # fmt: skip
    retriever, dtype = model.retriever, options.compute_dtype
    tokens = retriever.tokenize(texts, "query")
    queries = retriever.encode_tokens(tokens, "query", compute_dtype=dtype).to(model.device)
    with torch.autocast(model.device.type, enabled=False):
        retrieved = candidate_fn(queries)
    prior = model.log_prior(queries, model.target_vectors(retrieved, queries), retrieved).cpu()
    return _Found(model.reader.questions(texts), retrieved, prior)


def _thorough(model: RetrievalAugmentedModel, found: _Found, options: GenerationOptions) -> list[AnsweredQuestion]:
    every = [found.passages(query) for query in range(len(found.questions))]
    prompts = [
        [found.prompt(model.reader.format, query, place) for _, place, _ in passages]
        for query, passages in enumerate(every)
    ]
    written = iter(_write(model, [prompt for own in prompts for prompt in own], options))
    # Several passages may give the same answer: it is weighed once, in the words of the first.
    answers = [{one.text: one for one in reversed([next(written) for _ in passages])} for passages in every]
    asked = [(query, one) for query, own in enumerate(answers) for one in reversed(own.values())]
    pairs = [(prompt, one.tokens) for query, one in asked for prompt in prompts[query]]
    scores = iter(_read(model, pairs, options))
    weighed: list[list[Answer]] = [[] for _ in every]
    for query, one in asked:
        joint = torch.tensor([prior + next(scores) for _, _, prior in every[query]], dtype=torch.float64)
        posterior = tuple(torch.log_softmax(joint, dim=0).tolist())
        weighed[query].append(Answer(one.text, float(torch.logsumexp(joint, dim=0)), posterior))
    return [_answered(found, query, own, len(prompts[query]) * (1 + len(own))) for query, own in enumerate(weighed)]


def _fast(model: RetrievalAugmentedModel, found: _Found, options: GenerationOptions) -> list[AnsweredQuestion]:
    style = model.reader.format
    prompts = [
        style.prompt(question, found.retrieved.passages_of(query)) for query, question in enumerate(found.questions)
    ]
    written = _write(model, prompts, options)
    scores = _read(model, [(prompt, one.tokens) for prompt, one in zip(prompts, written, strict=True)], options)
    return [
        _answered(found, query, [Answer(one.text, score, tuple(prior for _, _, prior in found.passages(query)))], 2)
        for query, (one, score) in enumerate(zip(written, scores, strict=True))
    ]


def _read(
    model: RetrievalAugmentedModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], options: GenerationOptions
) -> list[float]:  # fmt: skip
    prompts, answers = [prompt for prompt, _ in pairs], [answer for _, answer in pairs]
    found: list[float] = model.read(prompts, answers, mini_batch_size=options.batch_size).cpu().tolist()
    return found


def _answered(found: _Found, query: int, answers: list[Answer], prompts: int) -> AnsweredQuestion:
    ids, passages = found.retrieved.candidates.ids, found.passages(query)
    ordered = tuple(sorted(answers, key=lambda one: one.log_prob, reverse=True))
    rows = tuple(int(ids[query, column]) for column, _, _ in passages)
    return AnsweredQuestion(ordered, rows, tuple(prior for _, _, prior in passages), prompts)


def _write(
    model: RetrievalAugmentedModel, prompts: Sequence[Sequence[int]], options: GenerationOptions
) -> list[_Written]:  # fmt: skip
    """Return the answer the reader gives to each prompt."""
    style, found = model.reader.format, [_Written("", [])] * len(prompts)
    config = GenerationConfig(
        max_new_tokens=style.answer_room, do_sample=False, num_beams=options.num_beams, eos_token_id=style.end,
        pad_token_id=style.pad, decoder_start_token_id=style.start,
        # One answer a prompt, as a tensor, whatever the reader's own configuration says.
        num_return_sequences=1, return_dict_in_generate=False,
    )  # fmt: skip
    for rows in by_length(torch.tensor([len(one) for one in prompts]), options.batch_size):
        batch = _padded([prompts[row] for row in rows.tolist()], style)
        tokens = {name: one.to(model.device) for name, one in batch.items()}
        written = cast(Any, model.generator).generate(**tokens, generation_config=config)
        # A decoder repeats its prompt, an encoder-decoder the token it starts from.
        skipped = 1 if style.start is not None else batch["input_ids"].shape[1]
        kept = [_up_to_end(row, style.end) for row in written[:, skipped:].cpu().tolist()]
        for row, text, own in zip(rows.tolist(), model.reader.decode(kept), kept, strict=True):
            found[row] = _Written(text, own)
    return found


def _padded(prompts: Sequence[Sequence[int]], style: ReaderFormat) -> dict[str, torch.Tensor]:
    """Pad prompts, those of a decoder on the left, so that all answers begin in one column."""
    if style.start is not None:
        return pad_tokens(prompts, style.pad)
    turned = pad_tokens([list(reversed(one)) for one in prompts], style.pad)
    return {name: one.flip(1) for name, one in turned.items()}


def _up_to_end(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens
