"""Arguments of dual-encoder training: transformers' own, and what is new here in four groups."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.configuration_corrector import ACTIVATIONS, CLOSED_FORM_KINDS, KINDS, SIDES
from hf_corrector.training.refresh_schedule import RefreshSchedule

NEGATIVES = ("softmax", "top_k", "uniform", "in_batch")
STALENESS = ("corrector", "ignore", "refresh")
CORRECTOR_FITS = ("closed_form", "gradient")
WARMUP_NEGATIVES = ("stale", "uniform")
CACHE_DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class DualEncoderTrainingArguments(TrainingArguments):
    """Extend transformers' TrainingArguments by negatives, staleness, corrector and cache.

    Defaults that differ from transformers: 32 pairs a batch, ``remove_unused_columns=False``, and
    ``metric_for_best_model="mrr@10"`` where the best model is loaded at the end.
    """

    # -- transformers' own, with other defaults
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Query-positive pairs per device."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the trainer makes its own columns."}
    )

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
    uniform_fraction: float = field(
        default=0.25, metadata={"help": "Share of the sampled negatives drawn uniformly, so that all targets are seen."}
    )
    sampling_correction: bool = field(
        default=False,
        metadata={"help": "Subtract log expected draws from negatives' logits; needs share_negatives=False."},
    )

    # -- staleness
    staleness: str = field(
        default="corrector",
        metadata={
            "help": "What is done about stale cached targets: 'corrector' moves them, 'refresh' encodes them again on "
            "the schedule of refresh_steps, 'ignore' does nothing.",
            "choices": STALENESS,
        },
    )
    refresh_steps: str = field(
        default="never",
        metadata={
            "help": "Re-encode the cache every so many steps: a number, 'never', or '0-1000:500,1000-9000:1000'."
        },
    )

    # -- corrector
    corrector_kind: str = field(default="affine", metadata={"help": "Family of the corrector.", "choices": KINDS})
    corrector_side: str | None = field(
        default=None,
        metadata={
            "help": "What the corrector reads of a target besides its vector: 'tokens', 'word_embeddings' or, stored "
            "with the cache, 'matrix'.",
            "choices": SIDES,
        },
    )
    corrector_fit: str | None = field(
        default=None,
        metadata={"help": "'closed_form' or 'gradient'; by default what the family allows.", "choices": CORRECTOR_FITS},
    )
    corrector_hidden_dim: int | None = field(default=None, metadata={"help": "Width of a residual_mlp."})
    corrector_activation: str = field(
        default="gelu", metadata={"help": "Activation of a residual_mlp.", "choices": ACTIVATIONS}
    )
    corrector_window: int = field(
        default=100, metadata={"help": "Fit on the targets re-encoded in so many most recent steps."}
    )
    corrector_update_steps: int = field(default=10, metadata={"help": "Steps between closed-form fits."})
    corrector_learning_rate: float = field(default=1e-3, metadata={"help": "AdamW learning rate of a gradient fit."})
    corrector_batch_size: int = field(default=256, metadata={"help": "Pairs per gradient update."})
    corrector_updates: int = field(default=4, metadata={"help": "Gradient updates of the corrector per step."})
    corrector_warmup_steps: int = field(
        default=20, metadata={"help": "First steps in which the corrector is fitted but not yet used."}
    )
    warmup_negatives: str = field(
        default="stale",
        metadata={"help": "Negatives during warm-up: by 'stale' scores or 'uniform'.", "choices": WARMUP_NEGATIVES},
    )

    # -- cache
    cache_dir: str | None = field(default=None, metadata={"help": "Folder of the cache; by default output_dir/cache."})
    cache_dtype: str = field(default="float32", metadata={"help": "Type of cached rows.", "choices": CACHE_DTYPES})
    token_budget: int = field(default=4096, metadata={"help": "Tokens per batch when encoding a corpus."})

    def __post_init__(self) -> None:
        """Check values and combinations (ConfigurationError) before any work is done."""
        if not torch.accelerator.is_available() or torch.backends.mps.is_available():
            # Without an accelerator this is what happens anyway, but transformers wants it said before it allows bf16;
            # Apple's has no float64, which exact sums of probabilities need.
            self.use_cpu, self.dataloader_pin_memory = True, False
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "mrr@10"
        super().__post_init__()
        self._check_choices()
        self._check_ranges()
        self._check_staleness()
        self._check_corrector()
        self._check_upstream()
        if self.corrector_fit is None:
            self.corrector_fit = "gradient" if self.corrector_kind == "residual_mlp" else "closed_form"

    def _check_choices(self) -> None:
        choices = {
            "negatives": NEGATIVES, "staleness": STALENESS, "corrector_kind": KINDS,
            "warmup_negatives": WARMUP_NEGATIVES,
            "corrector_side": (None, *SIDES),
            "corrector_fit": (None, *CORRECTOR_FITS), "corrector_activation": ACTIVATIONS, "cache_dtype": CACHE_DTYPES,
        }  # fmt: skip
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigurationError(
                    name, expected=f"one of {allowed}", got=repr(value), cure="Choose one of them."
                )

    def _check_ranges(self) -> None:
        at_least = {
            "num_negatives": 1, "corrector_window": 1, "corrector_update_steps": 1, "corrector_batch_size": 1,
            "corrector_updates": 1, "corrector_warmup_steps": 0, "token_budget": 1, "per_device_train_batch_size": 1,
            "learning_rate": 0,
        }  # fmt: skip
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ConfigurationError(
                    name, expected=f"at least {low}", got=str(getattr(self, name)), cure="Raise it."
                )
        if self.corrector_hidden_dim is not None and self.corrector_hidden_dim < 1:
            raise ConfigurationError(
                "corrector_hidden_dim", expected="at least 1, or None", got=str(self.corrector_hidden_dim),
                cure="Raise it.",
            )  # fmt: skip
        if not 0 <= self.corrector_learning_rate < float("inf"):
            raise ConfigurationError(
                "corrector_learning_rate", expected="at least 0", got=str(self.corrector_learning_rate),
                cure="Raise it.",
            )  # fmt: skip
        if not 0 <= self.uniform_fraction <= 1:
            raise ConfigurationError(
                "uniform_fraction", expected="0 to 1", got=str(self.uniform_fraction), cure="Give a share."
            )

    def _check_staleness(self) -> None:
        RefreshSchedule.parse(self.refresh_steps)
        if self.staleness == "refresh" and not RefreshSchedule.parse(self.refresh_steps).phases:
            raise ConfigurationError(
                "refresh_steps", expected="a schedule with staleness='refresh'", got=repr(self.refresh_steps),
                cure="Give a number of steps, for instance 100.",
            )  # fmt: skip
        if self.staleness == "ignore" and RefreshSchedule.parse(self.refresh_steps).phases:
            raise ConfigurationError(
                "refresh_steps", expected="'never' with staleness='ignore'", got=repr(self.refresh_steps),
                cure="Use staleness='refresh', or 'corrector' with refreshes.",
            )  # fmt: skip
        if self.staleness == "refresh" and not self.samples_from_scores:
            raise ConfigurationError(
                "staleness", expected="'ignore' or 'corrector' where no negative is chosen by a cached vector",
                got=f"'refresh' with negatives={self.negatives!r}",
                cure="Use staleness='ignore': nothing is read stale.",
            )  # fmt: skip
        if self.sampling_correction and (self.share_negatives or self.negatives not in ("softmax", "uniform")):
            raise ConfigurationError(
                "sampling_correction", expected="share_negatives=False and negatives 'softmax' or 'uniform'",
                got=f"share_negatives={self.share_negatives}, negatives={self.negatives!r}",
                cure="How often shared or top-k negatives are drawn is not defined; switch one of the two off.",
            )  # fmt: skip

    def _check_upstream(self) -> None:
        """Refuse what transformers offers and this trainer cannot honour, before it fails in the middle of a run."""
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise ConfigurationError(
                "train_sampling_strategy", expected="'random' or 'sequential'", got=repr(self.train_sampling_strategy),
                cure="Leave it out: batches are padded to their own longest query and target.",
            )  # fmt: skip
        if self.include_num_input_tokens_seen != "no":
            raise ConfigurationError(
                "include_num_input_tokens_seen", expected="'no'", got=repr(self.include_num_input_tokens_seen),
                cure="Read trainer.cost instead, which counts every encoded query and target.",
            )  # fmt: skip
        if self.push_to_hub:
            raise ConfigurationError(
                "push_to_hub", expected="False: the run's folder also holds the cache and the tokenised corpus",
                got="True", cure="Train, then call trainer.model.push_to_hub(repo_id).",
            )  # fmt: skip
        if self.remove_unused_columns:
            raise ConfigurationError("remove_unused_columns", expected="False", got="True", cure="Leave it out.")

    def _check_corrector(self) -> None:
        closed = self.corrector_kind in CLOSED_FORM_KINDS
        if self.corrector_fit == "closed_form" and self.corrector_kind == "residual_mlp":
            raise ConfigurationError(
                "corrector_fit", expected="'gradient' for a residual_mlp", got="'closed_form'",
                cure="Leave corrector_fit out, or use corrector_kind='affine'.",
            )  # fmt: skip
        if self.corrector_fit == "gradient" and closed:
            raise ConfigurationError(
                "corrector_fit", expected=f"'closed_form' for {self.corrector_kind}", got="'gradient'",
                cure="Leave corrector_fit out, or use corrector_kind='residual_mlp'.",
            )  # fmt: skip

    @property
    def uses_corrector(self) -> bool:
        """Whether a corrector is trained along."""
        return self.staleness == "corrector"

    @property
    def samples_from_scores(self) -> bool:
        """Whether negatives are chosen by scores over the whole cache."""
        return self.negatives in ("softmax", "top_k")

    @property
    def needs_cache(self) -> bool:
        """Whether training reads cached target vectors at all."""
        return self.uses_corrector or self.samples_from_scores
