"""Building one tower of a dual encoder and turning its token states into one vector per text."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from hf_corrector._files import hash_strings
from hf_corrector.errors import ConfigurationError
from hf_corrector.models.adapter_kinds import check_kind
from hf_corrector.models.configuration_dual_encoder import DROPOUT_FIELDS
from hf_corrector.models.foreign_configs import check_config
from hf_corrector.models.hub_files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from hf_corrector.models.sentence_transformers_format import read_repository_json, repository_file
from hf_corrector.models.whole_weights import whole_tensor

_NO_LIMIT = 2**31 - 1


def _auto_class(config: PreTrainedConfig) -> type[Any]:
    """Return the auto class that yields token states: of an encoder-decoder only the encoder."""
    # An encoder saved without its decoder says False of itself, yet its class builds both unless told otherwise.
    return AutoModelForTextEncoding if config.is_encoder_decoder or type(config).is_encoder_decoder else AutoModel


@dataclass(frozen=True)
class TowerSource:
    """Where a pretrained tower comes from.

    Attributes:
        name: Folder or Hub id.
        revision: Hub revision.
        subfolder: Folder inside of it; empty for the root.
        num_hidden_layers: Keep only the first so many layers; all if not given.
    """

    name: str
    revision: str | None = None
    subfolder: str = ""
    num_hidden_layers: int | None = None

    def pinned(self) -> TowerSource:
        """Return the same at the commit that was downloaded, so far as the Hub's cache knows it; a folder has none."""
        file = f"{self.subfolder}/config.json" if self.subfolder else "config.json"
        if Path(self.name).exists():
            return replace(self, revision=None)
        found = try_to_load_from_cache(self.name, file, revision=self.revision)
        return replace(self, revision=Path(found).parts[-2 - file.count("/")]) if isinstance(found, str) else self

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration.

        Raises:
            ConfigurationError: If there are fewer layers than asked for.
            InputError: If it leads to code or pickles.
            OSError: If transformers does not find the model.
        """
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            self.name, revision=self.revision, subfolder=self.subfolder, trust_remote_code=False
        )
        check_config(config, f"configuration of {self.name}")
        if self.num_hidden_layers is not None:
            text_config = config.get_text_config()
            if not 1 <= self.num_hidden_layers <= text_config.num_hidden_layers:
                raise ConfigurationError(
                    f"num_hidden_layers of {self.name}", expected=f"1 to {text_config.num_hidden_layers}",
                    got=str(self.num_hidden_layers), cure="Choose a number in that range.",
                )  # fmt: skip
            text_config.num_hidden_layers = self.num_hidden_layers
        return config

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.name, revision=self.revision, subfolder=self.subfolder, trust_remote_code=False
        )
        return tokenizer

    def load_weights(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Load the weights in float32 into a tower of that configuration, with an adapter that lies beside them.

        Raises:
            ConfigurationError: If the checkpoint lacks weights, which transformers would fill with random numbers; or
                of an adapter, see :meth:`check_adapter`.
        """
        # What is looked at is what is loaded, whatever is pushed meanwhile.
        source = self.pinned()
        source.check_adapter()
        # The report of unused weights is expected here (heads, poolers, layers cut off); missing ones are an error.
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            tower, info = _auto_class(config).from_pretrained(
                source.name, config=config, revision=source.revision, subfolder=source.subfolder, dtype=torch.float32,
                output_loading_info=True, use_safetensors=True, trust_remote_code=False, **build_kwargs(config),
            )  # fmt: skip
        finally:
            logging.set_verbosity(verbosity)
        check_complete(self.name, tower, info)
        return tower

    def check_adapter(self) -> None:
        """Refuse an adapter beside the weights that transformers should not put on them, which it does unasked.

        It must be of layers and their weights, in safetensors, and of the weights beside it: in a repository, and where
        the root of a folder has no configuration, transformers (5.23) loads the model that the adapter names instead.

        Raises:
            ConfigurationError: Naming the file, before anything is loaded.
        """
        for folder in dict.fromkeys(("", self.subfolder)):
            prefix = f"{folder}/" if folder else ""
            settings = read_repository_json(self.name, prefix + ADAPTER_CONFIG_FILE, self.revision)
            if settings is None:
                continue
            where = f"{self.name}/{prefix}{ADAPTER_CONFIG_FILE}"
            check_kind(settings, where)
            base = settings.get("base_model_name_or_path")
            if base != self.name and not (Path(self.name) / "config.json").exists():
                raise ConfigurationError(
                    where, expected=f"an adapter of {self.name} itself", got=f"one of {base!r}",
                    cure="Put it on the model it belongs to, call merge_and_unload(), save that and name its folder.",
                )  # fmt: skip
            if repository_file(self.name, prefix + ADAPTER_WEIGHTS_FILE, self.revision) is None:
                raise ConfigurationError(
                    where, expected=f"the adapter's weights beside it, in {ADAPTER_WEIGHTS_FILE}", got="no such file",
                    cure="Save the adapter as safetensors, which PEFT does by itself, or take it away; pickled weights "
                    "are never loaded.",
                )  # fmt: skip


def longest_input(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a tower can read, as tokenizer and positions say; 2³¹ − 1 where neither does."""
    # Name and presence of this field differ between architectures; XLNet writes −1 for no limit.
    positions = getattr(config, "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), positions if positions and positions > 0 else _NO_LIMIT, _NO_LIMIT)


def check_length(name: str, config: PreTrainedConfig, length: int) -> None:
    """Refuse texts longer than a tower has positions for, which would fail in the middle of encoding.

    Raises:
        ConfigurationError: Naming both numbers.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions and 0 < positions < length:
        raise ConfigurationError(
            f"maximum length for {name}", expected=f"at most its {positions} positions", got=str(length),
            cure="Lower query_max_length and target_max_length.",
        )  # fmt: skip


def build_kwargs(config: PreTrainedConfig) -> dict[str, Any]:
    """Leave out a BERT-like pooler: its weights change no vector and would never see a gradient."""
    mapping = _auto_class(config)._model_mapping
    if type(config) not in mapping:
        raise ConfigurationError(
            f"encoder of type {config.model_type}", expected="an architecture that yields token states by itself",
            got=type(config).__name__, cure="Use an encoder, a decoder-only model or T5's encoder.",
        )  # fmt: skip
    model_class = mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    has_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def tower_from_config(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a tower with random weights."""
    return _auto_class(config).from_config(config, trust_remote_code=False, **build_kwargs(config))


def check_complete(name: str, model: PreTrainedModel, loading_info: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights, which transformers fills with random numbers and a warning.

    Raises:
        ConfigurationError: Naming some of them.
    """
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ConfigurationError(
            f"encoder {name}", expected=f"weights for all of {type(model).__name__}", got=f"none for {missing[:3]}",
            cure="Use a complete checkpoint of that architecture.",
        )  # fmt: skip


def pool(states: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Reduce token states to one vector per text, in float32.

    Args:
        states: ``(batch, length, dim)``.
        attention_mask: 1 for real tokens, ``(batch, length)``.
        pooling: One of :data:`~hf_corrector.models.configuration_dual_encoder.POOLINGS`.

    Returns:
        ``(batch, dim)`` float32.
    """
    states = states.float()
    mask = attention_mask.to(states.dtype)
    match pooling:
        case "cls":
            first = attention_mask.int().argmax(dim=1)
            return states[torch.arange(len(states), device=states.device), first]
        case "last":
            positions = torch.arange(attention_mask.shape[1], device=states.device)
            last = (attention_mask * positions).argmax(dim=1)
            return states[torch.arange(len(states), device=states.device), last]
        case "weighted_mean":
            mask = mask * mask.cumsum(dim=1)
    return torch.einsum("bld,bl->bd", states, mask) / mask.sum(dim=1, keepdim=True).clamp(min=1e-9)


def hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash tensors in the order given, names, dtypes and shapes included, to 32 hexadecimal digits.

    Where they are in shards over processes every process must call it.
    """
    state = xxhash.xxh3_128()
    for name, tensor in named:
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        data = whole_tensor(tensor).cpu().contiguous()
        state.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def hash_modules(modules: list[torch.nn.Module | None]) -> str:
    """Hash all weights of some modules, see :func:`hash_tensors`."""
    return hash_tensors(pair for one in modules if one is not None for pair in sorted(one.state_dict().items()))


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what decides a tokenizer's output, leaving out settings that calls change (truncation, padding)."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content.pop("truncation", None)
        content.pop("padding", None)
        return hash_strings([tokenizer.truncation_side, json.dumps(content, sort_keys=True)])
    vocabulary = [f"{token} {number}" for token, number in sorted(tokenizer.get_vocab().items())]
    return hash_strings([tokenizer.truncation_side, type(tokenizer).__name__, *vocabulary])


def hash_architecture(config: PreTrainedConfig) -> str:
    """Hash what a tower's configuration says of its computation: equal weights under another one are other vectors."""
    content = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", *DROPOUT_FIELDS):
        content.pop(name, None)
    return hash_strings([json.dumps(content, sort_keys=True, default=str)])
