"""Arguments of dual-encoder training: transformers' own, and what is new here in groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_corrector.sampling import NegativeFilter
from hf_corrector.training import argument_checks
from hf_corrector.training.argument_checks import NEGATIVES, WARMUP_NEGATIVES
from hf_corrector.training.cache_arguments import CacheTrainingArguments


@dataclass
class DualEncoderTrainingArguments(CacheTrainingArguments):
    """Extend transformers' TrainingArguments by staleness, corrector and cache, and by negatives.

    Defaults that differ from transformers: 32 pairs a batch, ``remove_unused_columns=False``, ``hub_strategy="end"``,
    and ``metric_for_best_model="mrr@10"`` where the best model is loaded at the end.
    """

    # -- negatives
    negatives: str = field(
        default="softmax",
        metadata={
            "help": "Where negatives come from: 'softmax' draws them from P(y|x) over the whole cache, 'top_k' takes "
            "its highest, 'uniform' any target, 'in_batch' only the other pairs.",
            "choices": NEGATIVES,
        },
    )
    num_negatives: int = field(default=1, metadata={"help": "Sampled negatives per query."})
    share_negatives: bool = field(
        default=True,
        metadata={"help": "Contrast each query with all targets encoded in its batch, not only with its own."},
    )
    sampling_correction: bool = field(
        default=False,
        metadata={"help": "Subtract log expected draws from negatives' logits; needs share_negatives=False."},
    )

    absolute_margin: float | None = field(
        default=None, metadata={"help": "Negatives score this much less than the lowest-scoring known positive."}
    )
    relative_margin: float | None = field(
        default=None, metadata={"help": "The margin as a share of that positive's score."}
    )
    max_score: float | None = field(default=None, metadata={"help": "Negatives score at most this."})
    range_min: int = field(
        default=0, metadata={"help": "Pass over so many of the highest-scoring targets that the other limits leave."}
    )

    # -- what the data give
    given_negatives: int = field(
        default=0, metadata={"help": "Train on so many of each query's own negatives (column negative_ids)."}
    )
    several_positives: bool = field(
        default=False,
        metadata={"help": "One example per query with all its positives, weighted by grade, not one per positive."},
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Factor of the KL to the teacher's scores the data hold, which is added."}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Of teacher and student alike."})

    # -- warm-up of the corrector
    warmup_negatives: str = field(
        default="stale",
        metadata={"help": "Negatives during warm-up: by 'stale' scores or 'uniform'.", "choices": WARMUP_NEGATIVES},
    )

    def __post_init__(self) -> None:
        """Check values and combinations (ConfigurationError) before any work is done."""
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "mrr@10"
        super().__post_init__()

    def check(self) -> None:
        """Refuse values out of range and combinations that cannot work (ConfigurationError)."""
        argument_checks.check(self)

    @property
    def negative_filter(self) -> NegativeFilter:
        """Which targets are too good to be negatives."""
        return NegativeFilter(self.absolute_margin, self.relative_margin, self.max_score, self.range_min)

    @property
    def candidates_per_query(self) -> int:
        """Sampled negatives of a query."""
        return self.num_negatives

    @property
    def texts_per_query(self) -> int:
        """Texts the encoder encodes for a query in a step: itself, its positive and its negatives."""
        return 2 + self.num_negatives if self.train_targets else 1

    @property
    def samples_from_scores(self) -> bool:
        """Whether negatives are chosen by scores over the whole cache."""
        return self.negatives in ("softmax", "top_k")

    @property
    def draws_uniformly(self) -> bool:
        """Whether some targets are encoded because chance has chosen them."""
        return self.negatives == "uniform" or (self.samples_from_scores and self.uniform_fraction > 0)

    @property
    def warms_up_uniformly(self) -> bool:
        """Whether negatives are chosen by chance while the corrector is not used yet."""
        return self.warmup_negatives == "uniform"
