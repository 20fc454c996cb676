"""Configuration of a dual encoder: everything that changes a vector is a field of it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.configuration_corrector import CorrectorConfig

POOLINGS = ("cls", "mean", "last", "weighted_mean")
DROPOUT_FIELDS = (
    "dropout", "attention_dropout", "hidden_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "dropout_rate", "embd_pdrop", "resid_pdrop", "attn_pdrop", "embedding_dropout", "mlp_dropout", "activation_dropout",
)  # fmt: skip


@strict
class DualEncoderConfig(PreTrainedConfig):
    """Describe a query encoder f, a target encoder g and, while one is trained, the corrector h.

    Args:
        encoder: Configuration of the query tower, which is the target tower too unless that one is given.
        target_encoder: Configuration of a separate target tower.
        corrector: Configuration of the corrector that travels with the encoder.
        pooling: How token states become one vector: ``"cls"`` (first token), ``"mean"``, ``"last"`` (last real token)
            or ``"weighted_mean"`` (weights 1, 2, 3, … by position).
        projection_dim: Size of a linear layer after pooling; none if not given.
        normalize: Whether vectors have unit length.
        query_prompt: Text put before every query.
        target_prompt: Text put before every target.
        query_max_length: Queries are cut to this many tokens.
        target_max_length: Targets are cut to this many tokens.
        scale: Inverse temperature β of the softmax over targets.
        encoder_dropout: Dropout inside the towers. 0 by default: the cache is made without dropout, and with it the
            corrector would be taught noise as if it were drift.
    """

    model_type = "target-dual-encoder"
    sub_configs_defaults = {  # noqa: RUF012 - transformers declares it so
        "encoder": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
        "target_encoder": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
        "corrector": SubConfigSpec(config_class=CorrectorConfig, optional=True),
    }

    encoder: Any = None
    target_encoder: Any = None
    corrector: Any = None
    pooling: str = "mean"
    projection_dim: int | None = None
    normalize: bool = True
    query_prompt: str = ""
    target_prompt: str = ""
    query_max_length: int = 256
    target_max_length: int = 256
    scale: float = 20.0
    encoder_dropout: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        """Set the towers' dropout and refuse values out of range (ConfigurationError)."""
        super().__post_init__(**kwargs)
        if self.pooling not in POOLINGS:
            raise ConfigurationError(
                "DualEncoderConfig.pooling", expected=f"one of {POOLINGS}", got=repr(self.pooling),
                cure="Use the pooling the encoder was trained with.",
            )  # fmt: skip
        ranges = {
            "query_max_length": (self.query_max_length >= 1, "at least 1"),
            "target_max_length": (self.target_max_length >= 1, "at least 1"),
            "projection_dim": (self.projection_dim is None or self.projection_dim >= 1, "at least 1, or None"),
            "scale": (0 < self.scale < float("inf"), "more than 0"),
            "encoder_dropout": (0 <= self.encoder_dropout < 1, "at least 0 and less than 1"),
        }
        for name, (good, expected) in ranges.items():
            if not good:
                raise ConfigurationError(
                    f"DualEncoderConfig.{name}", expected=expected, got=str(getattr(self, name)),
                    cure="Give a number in that range.",
                )  # fmt: skip
        for tower in (self.encoder, self.target_encoder):
            if isinstance(tower, PreTrainedConfig):
                set_dropout(tower, self.encoder_dropout)

    @property
    def embedding_dim(self) -> int:
        """Size of a query or target vector."""
        if self.projection_dim is not None:
            return self.projection_dim
        return hidden_size(self.encoder)


def hidden_size(config: PreTrainedConfig) -> int:
    """Return the width of a tower's token states."""
    return int(config.get_text_config().hidden_size)


def set_dropout(config: PreTrainedConfig, dropout: float) -> None:
    """Set every dropout field a tower's configuration has; the names differ between architectures."""
    known = {item.name for item in fields(config)}
    for name in DROPOUT_FIELDS:
        if name in known:
            setattr(config, name, dropout)


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse names that are no fields of :class:`DualEncoderConfig`, which transformers would store silently.

    Raises:
        ConfigurationError: Naming the unknown ones.
    """
    own = {item.name for item in fields(DualEncoderConfig)} - {item.name for item in fields(PreTrainedConfig)}
    allowed = own - {"encoder", "target_encoder", "corrector"}
    unknown = sorted(set(settings) - allowed)
    if unknown:
        raise ConfigurationError(
            "dual encoder settings", expected=f"names among {sorted(allowed)}", got=str(unknown),
            cure="Correct the spelling.",
        )  # fmt: skip
