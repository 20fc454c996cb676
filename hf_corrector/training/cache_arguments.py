"""Arguments of every training that reads targets from a cache: transformers' own, and what is new here in groups."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import TrainingArguments

from hf_corrector.models.configuration_corrector import ACTIVATIONS, KINDS, SIDES
from hf_corrector.training import argument_checks
from hf_corrector.training.argument_checks import (
    CACHE_DTYPES,
    CORRECTOR_FITS,
    DRIFT_ACTIONS,
    SCAN_DTYPES,
    SCANS,
    STALENESS,
)

# Where things are, and what takes more or less memory for the same results but for rounding. The reader's learning rate
# is, as the encoder's, read from the checkpoint.
_MAY_CHANGE = ("cache_dir", "token_budget", "mini_batch_size", "generator_mini_batch_size", "generator_learning_rate")
_SETTINGS_OF_TRANSFORMERS = (
    "seed", "data_seed", "gradient_accumulation_steps", "bf16", "fp16", "optim", "train_sampling_strategy",
    "dataloader_drop_last",
)  # fmt: skip


@dataclass
class CacheTrainingArguments(TrainingArguments):
    """Extend transformers' TrainingArguments by what is done about a cache that goes stale.

    What is trained on the targets it yields is the affair of the classes that extend this one.
    """

    # -- transformers' own, with other defaults
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Query-positive pairs per device."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay off: the trainer makes its own columns."}
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "Must stay 'end': with push_to_hub, the saved model and its card are pushed."}
    )

    # -- sampled targets
    uniform_fraction: float = field(
        default=0.25,
        metadata={"help": "Share of the targets of a query drawn uniformly, so that all targets are seen."},
    )

    # -- encoder
    train_targets: bool = field(
        default=True,
        metadata={"help": "False trains queries alone: the target tower is frozen, and all targets are read cached."},
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Encode so many texts at a time and compute them again for the gradient: the memory of a "
            "small batch for the loss of a large one (GradCache)."
        },
    )

    # -- staleness
    staleness: str = field(
        default="corrector",
        metadata={
            "help": "What is done about stale cached targets: 'corrector' moves them, 'refresh' encodes them again on "
            "the schedule of refresh_steps, 'rerank' encodes the rerank_candidates nearest by stale scores in every "
            "step, 'ignore' does nothing.",
            "choices": STALENESS,
        },
    )
    drift_bound: float | None = field(
        default=None,
        metadata={
            "help": "Raise an alarm when the mean squared error of the targets as training sees them (2 - 2 cosine "
            "for unit vectors) is found to be above this; a sequential test on uniformly drawn targets."
        },
    )
    drift_action: str = field(
        default="log",
        metadata={
            "help": "What an alarm does: 'log', 'refit' the corrector at once, or 'refresh' the whole cache.",
            "choices": DRIFT_ACTIONS,
        },
    )
    rerank_candidates: int = field(default=100, metadata={"help": "Targets encoded per query with 'rerank'."})
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

    # -- scan of the targets
    scan: str = field(
        default="auto",
        metadata={
            "help": "How all targets are looked at in each step: 'full', 'amortised' (each corrected anew every "
            "scan_refresh_steps), 'pooled' (scan_pool drawn ones) or 'shortlist' (the nearest by an index, and a pool "
            "for the rest). 'auto' takes the most faithful that scan_budget allows, and says which.",
            "choices": SCANS,
        },
    )
    scan_budget: float = field(
        default=0.1, metadata={"help": "Share of a step's time, that of a reader included, which 'auto' may spend."}
    )
    scan_dtype: str = field(
        default="auto",
        metadata={
            "help": "Arithmetic of the scores; 'auto' is bfloat16 where the hardware has it and there are more "
            "than 50,000 targets.",
            "choices": SCAN_DTYPES,
        },
    )
    scan_refresh_steps: int = field(default=20, metadata={"help": "Of scan='amortised'."})
    scan_pool: int = field(default=8192, metadata={"help": "Targets of scan='pooled' and the tail of 'shortlist'."})
    scan_shortlist: int = field(default=256, metadata={"help": "Nearest targets of scan='shortlist'."})
    scan_memory_gb: float = field(
        default=8.0, metadata={"help": "Corrected targets are kept in memory up to this, per process, in GiB."}
    )

    # -- cache
    cache_dir: str | None = field(default=None, metadata={"help": "Folder of the cache; by default output_dir/cache."})
    cache_dtype: str = field(default="float32", metadata={"help": "Type of cached rows.", "choices": CACHE_DTYPES})
    token_budget: int = field(default=4096, metadata={"help": "Tokens per batch when encoding a corpus."})

    def __post_init__(self) -> None:
        """Check values and combinations (ConfigurationError) before any work is done."""
        argument_checks.check_launcher(self)
        if not torch.accelerator.is_available() or torch.backends.mps.is_available():
            # Without an accelerator this is what happens anyway, but transformers wants it said before it allows bf16;
            # Apple's has no float64, which exact sums of probabilities need.
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()
        self.check()
        if self.corrector_fit is None:
            self.corrector_fit = "gradient" if self.corrector_kind == "residual_mlp" else "closed_form"
        if self.world_size > 1 and self.ddp_broadcast_buffers is None:
            # The buffers are the corrector's, and it is sent to the other processes when it changes.
            self.ddp_broadcast_buffers = False

    def check(self) -> None:
        """Refuse values out of range and combinations that cannot work (ConfigurationError)."""
        argument_checks.check_common(self)

    @property
    def candidates_per_query(self) -> int:
        """Targets chosen for a query."""
        raise NotImplementedError

    @property
    def encodes_targets(self) -> bool:
        """Whether the targets of a step are encoded anew and trained."""
        return self.train_targets

    @property
    def texts_per_query(self) -> int:
        """Texts the encoder encodes for a query in a step, itself included."""
        return 1 + self.candidates_per_query if self.train_targets else 1

    @property
    def uses_corrector(self) -> bool:
        """Whether a corrector is trained along."""
        return self.staleness == "corrector"

    @property
    def samples_from_scores(self) -> bool:
        """Whether targets are chosen by scores over the whole cache."""
        return True

    @property
    def draws_uniformly(self) -> bool:
        """Whether some targets are encoded because chance has chosen them."""
        return self.uniform_fraction > 0

    @property
    def needs_cache(self) -> bool:
        """Whether training reads cached target vectors at all."""
        return self.uses_corrector or self.samples_from_scores or not self.train_targets

    @property
    def warms_up_uniformly(self) -> bool:
        """Whether targets are chosen by chance while the corrector is not used yet."""
        return False

    @property
    def resume_settings(self) -> dict[str, Any]:
        """The arguments that decide what a run computes, by name; a checkpoint cannot be resumed with others.

        Transformers' own may change where it lets them: number of steps, schedule, logging, saving.
        """
        inherited = {one.name for one in fields(TrainingArguments)}
        own = [one.name for one in fields(self) if one.name not in inherited and one.name not in _MAY_CHANGE]
        settings = {name: getattr(self, name) for name in (*own, *_SETTINGS_OF_TRANSFORMERS)}
        if not self.uses_corrector:
            settings |= {name: "none" for name in own if name.startswith("corrector_")}
        # Shared negatives and draws are those of all processes together, whatever their number.
        settings["per_device_train_batch_size * processes"] = self.train_batch_size * self.world_size
        return settings
