"""Adapters of PEFT inside of a retrieval-augmented model: taken off their wrapper, saved and made again with it."""

from __future__ import annotations

from enum import Enum
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.adapter_files import ADAPTER_NAME, adapted_layers
from hf_corrector.models.adapter_kinds import check_kind


def without_wrapper(part: Any, name: str) -> tuple[Any, dict[str, Any] | None]:
    """Return a model whose layers an adapter may have replaced, and the adapter's settings; None without one.

    Args:
        part: A model or a PeftModel.
        name: What to call it in errors.

    Raises:
        ConfigurationError: If there are several adapters, or one that does not live in the model's layers.
    """
    if not isinstance(part, PeftModel):
        if isinstance(part, nn.Module) and adapted_layers(part):
            raise ConfigurationError(
                name, expected="a model without adapter, or the PeftModel around it", got="a model taken out of one",
                cure="Pass what get_peft_model or PeftModel.from_pretrained returned.",
            )  # fmt: skip
        return part, None
    configs = part.peft_config
    if list(configs) != [ADAPTER_NAME]:
        raise ConfigurationError(
            f"adapters of the {name}", expected=f"one, named {ADAPTER_NAME!r}",
            got=", ".join(f"{key} of type {one.peft_type}" for key, one in configs.items()),
            cure="Use one adapter, or merge_and_unload() what is there.",
        )  # fmt: skip
    settings = _settings(configs[ADAPTER_NAME])
    check_kind(settings, f"adapter of the {name}")
    return part.get_base_model(), settings


def _settings(config: PeftConfig) -> dict[str, Any]:
    """Return what makes the adapter's layers again, as JSON values."""
    plain = {
        name: sorted(value) if isinstance(value, set) else value.value if isinstance(value, Enum) else value
        for name, value in config.to_dict().items()
    }
    # Ways to start an adapter may look at the weights under it; the weights that are loaded into it need none.
    return {**plain, "init_lora_weights": True} if "init_lora_weights" in plain else plain


def put_on(part: PreTrainedModel, settings: Any, name: str) -> None:
    """Replace a model's layers as an adapter with these settings does; everything else stops asking for gradients.

    Args:
        part: A model, changed in place.
        settings: What :func:`without_wrapper` returned, as it stands in a configuration, whoever wrote that.
        name: What to call the model in errors.

    Raises:
        ConfigurationError: If it is an adapter that is more than layers and their weights.
    """
    check_kind(settings, f"adapter of the {name}")
    get_peft_model(part, PeftConfig.from_peft_type(**settings))


def trainable_names(part: nn.Module) -> frozenset[str]:
    """Return the names of the weights that ask for gradients."""
    return frozenset(name for name, one in part.named_parameters() if one.requires_grad)
