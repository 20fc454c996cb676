"""A retriever and a language model that reads what it finds: P(a|x) = Σ_y P(y|x)·P_LM(a|x,y)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.text_encoding import Tokens
from hf_corrector.rag import objectives
from hf_corrector.rag.adapters import put_on
from hf_corrector.rag.configuration_rag import RetrievalAugmentedConfig
from hf_corrector.rag.generation import (
    AnsweredQuestion,
    AnswerLikelihoods,
    GenerationOptions,
    generate_answers,
    likelihoods_of_answers,
)
from hf_corrector.rag.objectives import JointReading, LossParts, Objective
from hf_corrector.rag.passages import CandidateFn, RetrievedTargets
from hf_corrector.rag.reader_inputs import ReaderTokenizer, unpad
from hf_corrector.rag.reading import answer_log_likelihoods
from hf_corrector.rag.storage import StoredRetrievalAugmentedModel, freeze_pooler, generator_class


@dataclass(frozen=True)
class MiniBatches:
    """How much is computed at a time, and again for the gradient, so that memory holds no more; None for all at once.

    Attributes:
        retriever: Texts the retriever encodes at a time.
        generator: Prompts the reader reads at a time.
    """

    retriever: int | None = None
    generator: int | None = None


@dataclass
class RetrievalAugmentedOutput(ModelOutput):
    """What one training step computes.

    Attributes:
        loss: Mean over the queries; scalar.
        retriever_loss: Mean of the retriever's part, where the objective has one; scalar.
        reader_loss: Mean of the reader's part, where the objective has one; scalar.
        log_prior: log P(y|x), ``(batch, k)`` float32, −inf where masked; detached.
        log_likelihoods: log P_LM(a|x,y), ``(batch, k)`` float32, 0 where masked; detached, None where the reader saw
            all passages at once.
        query_embeddings: ``(batch, dim)``, detached.
        target_embeddings: Of the distinct targets, ``(m, dim)``, detached.
    """

    loss: torch.Tensor | None = None
    retriever_loss: torch.Tensor | None = None
    reader_loss: torch.Tensor | None = None
    log_prior: torch.Tensor | None = None
    log_likelihoods: torch.Tensor | None = None
    query_embeddings: torch.Tensor | None = None
    target_embeddings: torch.Tensor | None = None


class RetrievalAugmentedModel(StoredRetrievalAugmentedModel):
    """A dual encoder that finds targets and a language model that reads them, trained together.

    It takes its passages from a function of the query embeddings and knows nothing of caches.

    Attributes:
        retriever: The dual encoder, with its corrector if it has one.
        generator: The reader, a decoder or an encoder-decoder.
        log_scale: Logarithm of the inverse temperature β of P(y|x), where it is learnt; None where it is the
            retriever's ``config.scale``.
        reader_tokenizer: The reader's tokenizer.
    """

    config_class = RetrievalAugmentedConfig
    base_model_prefix = "retrieval_augmented"
    main_input_name = "questions"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["corrector", "log_scale"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: RetrievalAugmentedConfig,
        retriever: DualEncoderModel | None = None,
        generator: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        given = [part for part in (retriever, generator) if part is not None]
        if retriever is None:
            retriever = DualEncoderModel(config.retriever)
            if config.retriever_adapter is not None:
                put_on(retriever, config.retriever_adapter, "retriever")
        if generator is None:
            generator = generator_class(config.generator).from_config(config.generator, trust_remote_code=False)
            if config.generator_adapter is not None:
                put_on(generator, config.generator_adapter, "generator")
        self.retriever, self.generator = retriever, generator
        config.retriever, config.generator = retriever.config, generator.config
        self.log_scale = nn.Parameter(torch.tensor(math.log(retriever.config.scale))) if config.learn_scale else None
        self.reader_tokenizer = None
        self._reader: ReaderTokenizer | None = None
        freeze_pooler(generator)
        self.note_trainable()
        for module in (module for part in given for module in part.modules()):
            # transformers 5 would draw anew what is not marked, an adapter's layers for instance.
            module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave modules of the parts to the parts; nothing else has weights but the scale."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the query tower's word embeddings."""
        return self.retriever.get_input_embeddings()

    @property
    def scale(self) -> torch.Tensor | float:
        """Inverse temperature β of P(y|x)."""
        return self.retriever.config.scale if self.log_scale is None else self.log_scale.float().exp()

    @property
    def scale_now(self) -> float:
        """The same as a plain number."""
        return self.retriever.config.scale if self.log_scale is None else float(self.log_scale.detach().float().exp())

    @property
    def reader(self) -> ReaderTokenizer:
        """The reader's tokenizer, as prompts and answers go through it.

        Raises:
            ConfigurationError: If there is no tokenizer.
        """
        tokenizer: PreTrainedTokenizerBase | None = self.reader_tokenizer
        if tokenizer is None:
            raise ConfigurationError(
                "RetrievalAugmentedModel", expected="the reader's tokenizer", got="none",
                cure="Load the model with from_parts or from_pretrained, or set model.reader_tokenizer.",
            )  # fmt: skip
        if self._reader is None or self._reader.tokenizer is not tokenizer:
            self._reader = ReaderTokenizer(tokenizer, self.config)
        return self._reader

    def check_reader(self) -> None:
        """Refuse a prompt that leaves no room (ConfigurationError)."""
        _ = self.reader

    def freeze_retriever(self) -> None:
        """Keep the retriever and the scale as they are; a state of the object, which a loaded model does not have."""
        self.retriever.requires_grad_(False)
        if self.log_scale is not None:
            self.log_scale.requires_grad_(False)

    def forward(  # noqa: PLR0913 - all of a step, and what times its parts
        self,
        questions: Tokens,
        reader_questions: Tokens,
        answers: Tokens,
        candidate_fn: CandidateFn,
        *,
        objective: Objective | None = None,
        mini_batches: MiniBatches | None = None,
        timed: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> RetrievalAugmentedOutput:
        """Retrieve passages for questions, read them, and compute the loss of the answers.

        All of a step happens in this one call, so that wrappers which synchronise gradients see one forward.

        Args:
            questions: The query tower's tokens of the questions, ``(batch, length)``.
            reader_questions: The reader's tokens of them, without special tokens, ``(batch, length)``.
            answers: The reader's tokens of the answers, their end included, ``(batch, length)``.
            candidate_fn: Given the detached query embeddings ``(batch, dim)``, returns what to read.
            objective: What to minimise; the marginal likelihood if not given.
            mini_batches: How much to compute at a time.
            timed: Returns what is entered while something is done, ``"encode"`` or ``"read"``, to time it.

        Returns:
            Loss and its parts.

        Raises:
            ConfigurationError: If the objective needs more passages than a query has.
        """
        objective = Objective() if objective is None else objective
        sizes = MiniBatches() if mini_batches is None else mini_batches
        with torch.set_grad_enabled(torch.is_grad_enabled() and objective.trains_retriever):
            with timed("encode"):
                queries = self.retriever.embed_in_parts(questions, "query", mini_batch_size=sizes.retriever)
            with torch.autocast(queries.device.type, enabled=False):
                # What is drawn must not depend on the rounding of half-precision scores.
                retrieved = candidate_fn(queries.detach().float())
            with timed("encode"):
                targets = self.target_vectors(retrieved, queries, mini_batch_size=sizes.retriever)
                log_prior = self.log_prior(queries, targets, retrieved)
        read = unpad(reader_questions["input_ids"], reader_questions["attention_mask"])
        wanted = unpad(answers["input_ids"], answers["attention_mask"])
        with timed("read"):
            parts, likelihoods = self._losses(retrieved, log_prior, read, wanted, objective, sizes.generator)
        return RetrievalAugmentedOutput(
            loss=parts.loss.mean(),
            retriever_loss=None if parts.retriever is None else parts.retriever.detach().mean(),
            reader_loss=None if parts.reader is None else parts.reader.detach().mean(),
            log_prior=log_prior.detach(), log_likelihoods=None if likelihoods is None else likelihoods.detach(),
            query_embeddings=queries.detach(), target_embeddings=targets.detach(),
        )  # fmt: skip

    def target_vectors(
        self, retrieved: RetrievedTargets, queries: torch.Tensor, *, mini_batch_size: int | None = None
    ) -> torch.Tensor:  # fmt: skip
        """Return the vectors of the distinct targets, encoded where they are not given, ``(m, dim)``."""
        if retrieved.vectors is not None:
            return retrieved.vectors.detach().to(queries.device).float()
        tokens = {name: one.to(self.device) for name, one in (retrieved.tokens or {}).items()}
        return self.retriever.embed_in_parts(tokens, "target", mini_batch_size=mini_batch_size)

    def log_prior(self, queries: torch.Tensor, targets: torch.Tensor, retrieved: RetrievedTargets) -> torch.Tensor:
        """Return log P(y|x) over each query's passages, ``(batch, k)`` float32, −inf where masked.

        Args:
            queries: Query embeddings, ``(batch, dim)``.
            targets: Vectors of the distinct targets, ``(m, dim)``.
            retrieved: What was found.
        """
        with torch.autocast(queries.device.type, enabled=False):
            chosen = targets.float()[retrieved.places.to(targets.device)]
            scores = torch.einsum("bd,bkd->bk", queries.float(), chosen)
            return objectives.log_softmax_over(scores, retrieved.mask.to(scores.device), self.scale)

    def _losses(
        self, retrieved: RetrievedTargets, log_prior: torch.Tensor, questions: list[list[int]],
        answers: list[list[int]], objective: Objective, mini_batch_size: int | None,
    ) -> tuple[LossParts, torch.Tensor | None]:  # fmt: skip
        mask = retrieved.mask.to(log_prior.device)
        if objective.reads_jointly:
            joint = self._read_jointly(retrieved, questions, answers, mini_batch_size)
            return objectives.leave_one_out(
                log_prior, joint, mask, temperature=objective.temperature, reader_weight=objective.reader_weight
            ), None  # fmt: skip
        likelihoods = self.read_each(retrieved, questions, answers, mini_batch_size=mini_batch_size)
        match objective.name:
            case "emdr2":
                parts = objectives.emdr2(log_prior, likelihoods, mask, reader_weight=objective.reader_weight)
            case "perplexity_distillation":
                parts = objectives.perplexity_distillation(
                    log_prior, likelihoods, mask, temperature=objective.temperature,
                    reader_weight=objective.reader_weight,
                )  # fmt: skip
            case "generator_only":
                parts = objectives.generator_only(log_prior, likelihoods, mask)
            case _:
                parts = objectives.marginal(log_prior, likelihoods, mask)
        return parts, likelihoods

    def read_each(
        self, retrieved: RetrievedTargets, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *,
        mini_batch_size: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return log P_LM(a|x,y) of each query's answer given each of its passages, ``(batch, k)``, 0 where masked.

        Args:
            retrieved: The passages.
            questions: The reader's tokens of the questions.
            answers: The reader's tokens of one answer per question.
            mini_batch_size: Prompts read at a time.
        """
        style, places = self.reader.format, retrieved.mask.cpu().nonzero()
        pairs = [(query, int(retrieved.places[query, column])) for query, column in places.tolist()]
        prompts = [style.prompt(questions[query], [retrieved.passages[place]]) for query, place in pairs]
        found = self.read(prompts, [answers[query] for query, _ in pairs], mini_batch_size=mini_batch_size)
        empty = torch.zeros(retrieved.mask.shape, device=found.device)
        return empty.index_put((places[:, 0].to(found.device), places[:, 1].to(found.device)), found)

    def read(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, mini_batch_size: int | None = None
    ) -> torch.Tensor:  # fmt: skip
        """Return log P_LM(a|prompt) of prompts and answers in tokens, ``(n,)`` float32."""
        batch = self.reader.format.batch(prompts, answers).to(self.device)
        return answer_log_likelihoods(self.generator, batch, mini_batch_size=mini_batch_size)

    def _read_jointly(
        self, retrieved: RetrievedTargets, questions: list[list[int]], answers: list[list[int]],
        mini_batch_size: int | None,
    ) -> JointReading:  # fmt: skip
        style, every = self.reader.format, [retrieved.passages_of(query) for query in range(len(questions))]
        whole = [style.prompt(question, passages) for question, passages in zip(questions, every, strict=True)]
        places = retrieved.mask.cpu().nonzero()
        prompts = [
            style.prompt(questions[query], passages[:number] + passages[number + 1 :])
            for query, passages in enumerate(every) for number in range(len(passages))
        ]  # fmt: skip
        with torch.no_grad():
            without = self.read(
                prompts, [answers[query] for query in places[:, 0].tolist()], mini_batch_size=mini_batch_size
            )
        spread = torch.zeros(retrieved.mask.shape, device=without.device)
        spread[places[:, 0], places[:, 1]] = without
        return JointReading(self.read(whole, answers, mini_batch_size=mini_batch_size), spread)

    @contextmanager
    def evaluating(self, compute_dtype: str = "float32") -> Iterator[None]:
        """Switch to evaluation, without gradients, in some arithmetic; and back."""
        was_training, dtype = self.training, getattr(torch, compute_dtype)
        self.train(False)
        try:
            with torch.no_grad(), torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                yield
        finally:
            self.train(was_training)

    def generate(
        self, questions: Sequence[str], candidate_fn: CandidateFn, *, options: GenerationOptions | None = None
    ) -> list[AnsweredQuestion]:
        """Answer questions, see :func:`~hf_corrector.rag.generation.generate_answers`."""
        return generate_answers(self, questions, candidate_fn, options=options)

    def answer_log_likelihoods(
        self, questions: Sequence[str], answers: Sequence[str], candidate_fn: CandidateFn, *,
        options: GenerationOptions | None = None,
    ) -> AnswerLikelihoods:  # fmt: skip
        """Weigh given answers, see :func:`~hf_corrector.rag.generation.likelihoods_of_answers`."""
        return likelihoods_of_answers(self, questions, answers, candidate_fn, options=options)
