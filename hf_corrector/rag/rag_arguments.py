"""Arguments of retrieval-augmented training: transformers' own, those of the cache, and what is new here."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_corrector.rag.objectives import OBJECTIVES, Objective
from hf_corrector.training.argument_checks import INFINITE, check_choices, check_common, check_ranges, refuse
from hf_corrector.training.cache_arguments import CacheTrainingArguments
from hf_corrector.training.sharding import refuse_sharding

PASSAGES = ("top_k", "softmax")


@dataclass
class RetrievalAugmentedTrainingArguments(CacheTrainingArguments):
    """Extend the arguments of training from a cache by what is read and what is minimised.

    Defaults that differ from transformers: 8 questions a batch, ``remove_unused_columns=False``,
    ``hub_strategy="end"``, and ``metric_for_best_model="answer_log_likelihood"`` where the best model is loaded at the
    end.
    """

    # -- transformers' own, with another default
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Questions per device."})

    # -- objective
    objective: str = field(
        default="marginal",
        metadata={
            "help": "What is minimised: 'marginal' likelihood of the answer over the passages (RAG-sequence), 'emdr2', "
            "'perplexity_distillation' and 'leave_one_out', in which the reader teaches the retriever, or "
            "'generator_only', in which the retriever stays as it is.",
            "choices": OBJECTIVES,
        },
    )
    objective_temperature: float = field(
        default=1.0, metadata={"help": "Of what the reader teaches, in perplexity_distillation and leave_one_out."}
    )
    reader_weight: float = field(
        default=1.0, metadata={"help": "Factor of the reader's own loss, where the objective has one."}
    )

    # -- passages
    passages: str = field(
        default="top_k",
        metadata={
            "help": "Which targets are read: the 'top_k' most likely, as answers are found later, or draws from the "
            "'softmax' over all, which also tries what the retriever thinks little of.",
            "choices": PASSAGES,
        },
    )
    num_passages: int = field(
        default=8, metadata={"help": "Targets read per question; 0 reads none (closed book, generator_only)."}
    )
    uniform_fraction: float = field(
        default=0.25,
        metadata={
            "help": "For every question so many targets, as a share of num_passages, are drawn uniformly and encoded "
            "for the corrector alone: targets that are wrongly far away are never read and would never be repaired."
        },
    )

    # -- reader
    generator_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the reader; learning_rate if not given."}
    )
    cross_attention_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of a reader's attention to what its encoder has read, where that task is new to it "
            "(the default reader, and others made of two models); as for the rest of the reader if not given. Refused "
            "for readers without such layers, T5, BART and all decoders for instance."
        },
    )
    generator_mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Read so many prompts at a time and compute them again for the gradient: num_passages times the "
            "batch size would rarely fit otherwise."
        },
    )

    def __post_init__(self) -> None:
        """Check values and combinations (ConfigurationError) before any work is done."""
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "answer_log_likelihood"
        super().__post_init__()

    def check(self) -> None:
        """Refuse values out of range and combinations that cannot work (ConfigurationError)."""
        check_choices({"objective": (self.objective, OBJECTIVES), "passages": (self.passages, PASSAGES)})
        check_ranges({
            "num_passages": (self.num_passages, 0, INFINITE),
            "objective_temperature": (self.objective_temperature, 1e-6, INFINITE),
            "reader_weight": (self.reader_weight, 0, INFINITE),
            "generator_learning_rate": (self.generator_learning_rate, 0, INFINITE),
            "cross_attention_learning_rate": (self.cross_attention_learning_rate, 0, INFINITE),
            "generator_mini_batch_size": (self.generator_mini_batch_size, 1, INFINITE),
        })  # fmt: skip
        frozen = not self.objective_of_step.trains_retriever
        if frozen and self.staleness != "ignore":
            refuse(
                "staleness", expected="'ignore' with objective='generator_only': a retriever that stays as it is makes "
                "no cache stale", got=repr(self.staleness), cure="Use staleness='ignore'.",
            )  # fmt: skip
        least = {"leave_one_out": 2, "generator_only": 0}.get(self.objective, 1)
        if self.num_passages < least:
            refuse(
                "num_passages", expected=f"at least {least} with objective={self.objective!r}", got=self.num_passages,
                cure="Raise it, or use objective='generator_only' to train a reader without passages.",
            )  # fmt: skip
        refuse_sharding(self, "training of a reader")
        check_common(self)

    @property
    def objective_of_step(self) -> Objective:
        """What a step minimises."""
        return Objective(self.objective, self.objective_temperature, self.reader_weight)

    @property
    def candidates_per_query(self) -> int:
        """Passages of a question."""
        return self.num_passages

    @property
    def encodes_targets(self) -> bool:
        """Whether the targets read are encoded anew and trained."""
        return self.train_targets and self.objective != "generator_only"

    @property
    def texts_per_query(self) -> int:
        """Texts the encoder encodes for a question in a step, itself included."""
        return 1 + self.num_passages if self.encodes_targets else 1

    @property
    def samples_from_scores(self) -> bool:
        """Whether passages are chosen by scores over the whole cache."""
        return self.num_passages > 0

    @property
    def draws_uniformly(self) -> bool:
        """Whether some targets are encoded because chance has chosen them."""
        return self.encodes_targets and self.uniform_fraction > 0

    @property
    def needs_cache(self) -> bool:
        """Whether training reads cached target vectors at all."""
        return self.num_passages > 0
