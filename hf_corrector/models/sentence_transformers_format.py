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
# Written today, and by releases before 6.
_ROUTERS = ("sentence_transformers.base.modules.router.Router", "sentence_transformers.models.Router.Router")
_ENDINGS = ((), ("Dense",), ("Normalize",), ("Dense", "Normalize"))
# The first is written today, the others by releases of long ago.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)
_TOKEN_STATES = {"method": "forward", "method_output_name": "last_hidden_state"}
_IDENTITY_ACTIVATIONS = {"torch.nn.modules.linear.Identity", "torch.nn.Identity"}


Projection = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class SentenceTransformerSettings:
    """What a sentence-transformers model adds to the transformer it holds, or to the two it holds.

    Attributes:
        settings: Fields of DualEncoderConfig.
        encoder_subfolder: Folder of the transformer (that of queries) inside the repository; empty for the root.
        projection: Weight ``(out, in)`` and bias ``(out,)`` of a Dense module, if there is one.
        target_subfolder: Folder of the transformer of targets, where that is another one.
        target_projection: The Dense module of targets, where their transformer is another one.
    """

    settings: dict[str, Any]
    encoder_subfolder: str
    projection: Projection | None
    target_subfolder: str | None = None
    target_projection: Projection | None = None


def read_settings(name: str, revision: str | None = None) -> SentenceTransformerSettings | None:
    """Read the settings of a sentence-transformers model, from a folder or from the Hub.

    Returns:
        The settings, or None if ``name`` holds no ``modules.json`` and so is a plain transformer.

    Raises:
        ConfigurationError: If the model does something this package cannot repeat exactly.
    """
    modules = read_repository_json(name, "modules.json", revision)
    if modules is None:
        return None
    routes = _routes(name, modules, revision)
    found = _read_modules(name, routes["query"], revision)
    if routes["document"] != routes["query"]:
        found = _joined(name, found, _read_modules(name, routes["document"], revision))
    config = read_repository_json(name, "config_sentence_transformers.json", revision) or {}
    if config.get("truncate_dim"):
        raise _unsupported(name, f"vectors cut to {config['truncate_dim']} numbers")
    found.settings.update(role_prompts(config))
    return found


def _routes(name: str, modules: list[dict[str, Any]], revision: str | None) -> dict[str, list[dict[str, Any]]]:
    """Return the modules queries and documents go through; the same where there is no router at the front."""
    first, *others = modules
    if first["type"] not in _ROUTERS:
        return {"query": modules, "document": modules}
    prefix = f"{first['path']}/" if first["path"] else ""
    config = read_repository_json(name, f"{prefix}router_config.json", revision) or {}
    types, structure = config.get("types", {}), config.get("structure", {})
    if set(structure) != {"query", "document"} or config.get("parameters", {}).get("route_mappings"):
        raise _unsupported(name, f"a router of the routes {sorted(structure)}")
    return {
        role: [*({"type": types[one], "path": f"{prefix}{one}"} for one in path), *others]
        for role, path in structure.items()
    }


def _read_modules(name: str, modules: list[dict[str, Any]], revision: str | None) -> SentenceTransformerSettings:
    paths = _paths_by_kind(name, modules)
    settings: dict[str, Any] = _transformer(name, paths["Transformer"], revision)
    settings["pooling"] = _pooling(name, read_repository_json(name, f"{paths['Pooling']}/config.json", revision) or {})
    settings["normalize"] = "Normalize" in paths
    if settings["normalize"]:
        _refuse_token_level(name, read_repository_json(name, f"{paths['Normalize']}/config.json", revision) or {})
    projection = None
    if "Dense" in paths:
        projection = _dense(name, paths["Dense"], revision)
        settings["projection_dim"] = projection[0].shape[0]
    return SentenceTransformerSettings(settings, paths["Transformer"], projection)


def _joined(
    name: str, query: SentenceTransformerSettings, target: SentenceTransformerSettings
) -> SentenceTransformerSettings:
    """Put two routes together, which may differ in their weights and lengths only."""
    for key in ("pooling", "normalize", "projection_dim"):
        if query.settings.get(key) != target.settings.get(key):
            values = f"{query.settings.get(key)!r} and {target.settings.get(key)!r}"
            raise _unsupported(name, f"routes that differ in {key}, {values}")
    settings = {key: value for key, value in query.settings.items() if key != "target_max_length"}
    if "target_max_length" in target.settings:
        settings["target_max_length"] = target.settings["target_max_length"]
    return SentenceTransformerSettings(
        settings, query.encoder_subfolder, query.projection, target.encoder_subfolder, target.projection
    )


def _paths_by_kind(name: str, modules: list[dict[str, Any]]) -> dict[str, str]:
    """Return where each module is, if they are those this package knows in the order it applies them."""
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    foreign = [module["type"] for module in modules if not module["type"].startswith("sentence_transformers.")]
    if foreign or kinds[:2] != ["Transformer", "Pooling"] or tuple(kinds[2:]) not in _ENDINGS:
        raise _unsupported(name, f"the modules {', '.join(foreign or kinds)}")
    return dict(zip(kinds, [module["path"] for module in modules], strict=True))


def read_repository_json(name: str, file: str, revision: str | None) -> Any:
    """Read a JSON file of a model folder or of a Hub repository; None where there is none, or no way to reach it."""
    path = repository_file(name, file, revision)
    return None if path is None else read_json(path)


def repository_file(name: str, file: str, revision: str | None) -> Path | None:
    """Return where a file of a model folder or of a Hub repository lies; None where :func:`read_repository_json` does.

    It is downloaded if need be.
    """
    path = cached_file(
        name, file, revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if path is None else Path(path)


def _unsupported(name: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"sentence-transformers model {name}",
        expected="a Transformer, a Pooling, then perhaps a Dense without activation, then perhaps a Normalize, or a "
        "Router of two such routes, 'query' and 'document'",
        got=what,
        cure="Use DualEncoderModel.from_encoder on its transformer and train a new head.",
    )


def _pooling(name: str, config: dict[str, Any]) -> str:
    modes = config.get("pooling_mode") or [mode for key, mode in _LEGACY_POOLINGS.items() if config.get(key)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise _unsupported(name, f"the pooling {modes}")
    if not config.get("include_prompt", True):
        raise _unsupported(name, "pooling that leaves the prompt's tokens out")
    return _POOLINGS[modes[0]]


def _transformer(name: str, path: str, revision: str | None) -> dict[str, int]:
    """Return the maximum lengths, so far as they are not those of tokenizer and positions."""
    prefix = f"{path}/" if path else ""
    found = (read_repository_json(name, f"{prefix}{file}", revision) for file in _TRANSFORMER_CONFIGS)
    config: dict[str, Any] = next((one for one in found if one), {})
    if config.get("do_lower_case"):
        raise _unsupported(name, "lower-casing outside of the tokenizer")
    text = config.get("modality_config", {"text": _TOKEN_STATES}).get("text")
    if text != _TOKEN_STATES or config.get("query_expansion") or config.get("processing_kwargs"):
        raise _unsupported(name, "a Transformer with more than tokens in and token states out")
    length = config.get("max_seq_length")
    lengths = {
        "query_max_length": config.get("query_length") or length,
        "target_max_length": config.get("document_length") or length,
    }
    return {role: int(value) for role, value in lengths.items() if value is not None}


def _refuse_token_level(name: str, config: dict[str, Any]) -> None:
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, "sentence_embedding"):
            raise _unsupported(name, f"a module that works on {config[key]}")


def _dense(name: str, path: str, revision: str | None) -> Projection:
    config = read_repository_json(name, f"{path}/config.json", revision) or {}
    if config.get("activation_function") not in _IDENTITY_ACTIVATIONS or config.get("use_residual"):
        raise _unsupported(name, f"a Dense module with {config.get('activation_function')}")
    _refuse_token_level(name, config)
    file = cached_file(name, f"{path}/model.safetensors", revision=revision)
    weights = load_file(str(file))
    return weights["linear.weight"].float(), weights["linear.bias"].float() if "linear.bias" in weights else None


def role_prompts(config: dict[str, Any]) -> dict[str, str]:
    """Return the prompts of both roles, as settings of a dual encoder, from those a model has under any names."""
    saved, default = config.get("prompts") or {}, config.get("default_prompt_name")
    prompts = {key: prompt for key, prompt in saved.items() if prompt is not None}
    fallback = prompts.get(default, "") if default else ""
    target = next((prompts[key] for key in ("document", "passage", "corpus") if key in prompts), fallback)
    return {"query_prompt": prompts.get("query", fallback), "target_prompt": target}
