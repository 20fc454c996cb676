"""Which adapters of PEFT are loaded at all: those that are layers and their weights."""

from __future__ import annotations

from typing import Any

from hf_corrector.errors import ConfigurationError

# Kinds of adapters that consist of layers and their weights, as of PEFT 0.21. Others fetch what their configuration
# names, from anywhere and in any format: a model (SHADOW), other adapters (XLORA), a tokenizer or weights to start from
# (prompts).
_KINDS = frozenset({
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA",
    "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "OSF", "PEANUT", "POLY", "PSOFT",
    "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA",
    "WAVEFT",
})  # fmt: skip


def check_kind(settings: Any, where: str) -> None:
    """Refuse, before PEFT sees them, settings of an adapter that is more than layers and their weights.

    Args:
        settings: An adapter's configuration as JSON values, whoever wrote it.
        where: What to call it in errors.

    Raises:
        ConfigurationError: If PEFT would fetch a model, a tokenizer or another adapter for it, or import a module.
    """
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigurationError(
            where, expected="an adapter of layers and their weights (LoRA and its kin)", got=f"one of type {kind!r}",
            cure="Train another kind, or merge it into the model if it came from somebody you trust.",
        )  # fmt: skip
    # With it PEFT imports the module that megatron_core names.
    if settings.get("megatron_config"):
        raise ConfigurationError(
            where, expected="no megatron_config, by which PEFT imports a module", got="one",
            cure="Do not load this adapter; get it again from where it came.",
        )  # fmt: skip
