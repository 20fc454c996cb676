"""Reading a sentence-transformers folder or repository: which settings make the same vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.utils.hub import cached_file

from hf_corrector._files import read_json
from hf_corrector.errors import ConfigurationError

_POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last", "weightedmean": "weighted_mean"}
_LEGACY_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_IDENTITY_ACTIVATIONS = {"torch.nn.modules.linear.Identity", "torch.nn.Identity"}


@dataclass(frozen=True)
class SentenceTransformerSettings:
    """What a sentence-transformers model adds to the transformer it holds.

    Attributes:
        settings: Fields of DualEncoderConfig.
        encoder_subfolder: Folder of the transformer inside the repository; empty for the root.
        projection: Weight ``(out, in)`` and bias ``(out,)`` of a Dense module, if there is one.
    """

    settings: dict[str, Any]
    encoder_subfolder: str
    projection: tuple[torch.Tensor, torch.Tensor | None] | None


def read_settings(name: str, revision: str | None = None) -> SentenceTransformerSettings | None:
    """Read the settings of a sentence-transformers model, from a folder or from the Hub.

    Returns:
        The settings, or None if ``name`` holds no ``modules.json`` and so is a plain transformer.

    Raises:
        ConfigurationError: If the model does something this package cannot repeat exactly.
    """
    modules = _load(name, "modules.json", revision)
    if modules is None:
        return None
    settings: dict[str, Any] = {"normalize": False}
    subfolder, projection = "", None
    for module in modules:
        kind, path = module["type"].rsplit(".", 1)[-1], module["path"]
        match kind:
            case "Transformer":
                subfolder = path
                settings.update(_max_lengths(name, path, revision))
            case "Pooling":
                settings["pooling"] = _pooling(_load(name, f"{path}/config.json", revision) or {})
            case "Normalize":
                settings["normalize"] = True
            case "Dense" if projection is None:
                projection = _dense(name, path, revision)
                settings["projection_dim"] = projection[0].shape[0]
            case _:
                raise _unsupported(name, f"the module {module['type']}")
    settings.update(_prompts(_load(name, "config_sentence_transformers.json", revision) or {}))
    return SentenceTransformerSettings(settings, subfolder, projection)


def _load(name: str, file: str, revision: str | None) -> Any:
    path = cached_file(
        name, file, revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if path is None else read_json(Path(path))


def _unsupported(name: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"sentence-transformers model {name}",
        expected="one Transformer, one Pooling, at most one Dense without activation, and Normalize",
        got=what,
        cure="Use DualEncoderModel.from_encoder on its transformer and train a new head.",
    )


def _pooling(config: dict[str, Any]) -> str:
    modes = config.get("pooling_mode") or [mode for key, mode in _LEGACY_POOLINGS.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise _unsupported("pooling", f"the pooling {modes}")
    if not config.get("include_prompt", True):
        raise _unsupported("pooling", "pooling that leaves the prompt's tokens out")
    return _POOLINGS[modes[0]]


def _max_lengths(name: str, path: str, revision: str | None) -> dict[str, int]:
    prefix = f"{path}/" if path else ""
    config = _load(name, f"{prefix}sentence_bert_config.json", revision) or {}
    if config.get("do_lower_case"):
        raise _unsupported(name, "lower-casing outside of the tokenizer")
    length = config.get("max_seq_length")
    if length is None:
        length = (_load(name, f"{prefix}tokenizer_config.json", revision) or {}).get("model_max_length")
    return {} if length is None else {"query_max_length": int(length), "target_max_length": int(length)}


def _dense(name: str, path: str, revision: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    config = _load(name, f"{path}/config.json", revision) or {}
    if config.get("activation_function") not in _IDENTITY_ACTIVATIONS or config.get("use_residual"):
        raise _unsupported(name, f"a Dense module with {config.get('activation_function')}")
    file = cached_file(name, f"{path}/model.safetensors", revision=revision)
    weights = load_file(str(file))
    return weights["linear.weight"].float(), weights["linear.bias"].float() if "linear.bias" in weights else None


def _prompts(config: dict[str, Any]) -> dict[str, str]:
    prompts, default = config.get("prompts") or {}, config.get("default_prompt_name")
    fallback = prompts.get(default, "") if default else ""
    target = next((prompts[key] for key in ("document", "passage", "corpus") if key in prompts), fallback)
    return {"query_prompt": prompts.get("query", fallback), "target_prompt": target}
