"""Writing a dual encoder as a sentence-transformers model of that package's own modules, which loads without this one.

The modules are made by sentence-transformers itself, so that what it saves is what it reads.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_corrector._extras import need_sentence_transformers
from hf_corrector.errors import ConfigurationError
from hf_corrector.models.adapter_files import adapted_layers
from hf_corrector.models.configuration_dual_encoder import hidden_size
from hf_corrector.models.text_encoding import Role
from hf_corrector.models.towers import build_kwargs

if TYPE_CHECKING:
    from hf_corrector.models.modeling_dual_encoder import DualEncoderModel

POOLING_MODES = {"cls": "cls", "mean": "mean", "last": "lasttoken", "weighted_mean": "weightedmean"}


def save_dual_encoder(model: DualEncoderModel, path: str | Path) -> Path:
    """Write a dual encoder as :meth:`DualEncoderModel.save_as_sentence_transformer` does.

    Args:
        model: The dual encoder.
        path: A new or empty folder.

    Returns:
        The folder.

    Raises:
        ConfigurationError: If the folder holds something, or the model carries an adapter.
        MissingDependencyError: If sentence-transformers is not installed.
    """
    check_new_folder(path)
    modules = stock_modules(model, "target")
    if model.separate_target_encoder is not None:
        modules = routed(stock_modules(model, "query"), modules)
    return save_modules(modules, path, prompts=prompts_of(model), normalized=model.config.normalize)


def stock_modules(model: DualEncoderModel, role: Role) -> list[nn.Module]:
    """Return sentence-transformers' modules that make the vectors of one role, float32 and on the CPU.

    Where towers are shared, the modules of both roles are the same, lengths of each role included.

    Raises:
        ConfigurationError: If the model carries an adapter, or its tokenizer cannot pad.
        MissingDependencyError: If sentence-transformers is not installed.
    """
    need_sentence_transformers("save_as_sentence_transformer")
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    if adapted_layers(model):
        raise ConfigurationError(
            "save_as_sentence_transformer", expected="a model without adapter", got="one that carries an adapter",
            cure="Merge it first: model = peft_model.merge_and_unload().",
        )  # fmt: skip
    width = hidden_size(model.encoder.config if role == "query" else model.target_encoder.config)
    modules: list[nn.Module] = [_transformer(model, role), Pooling(width, POOLING_MODES[model.config.pooling])]
    head = model.projection if role == "query" or model.target_projection is None else model.target_projection
    if head is not None:
        weight, bias = (tensor.detach().float().cpu().clone() for tensor in (head.weight, head.bias))
        modules.append(dense(weight, bias, nn.Identity()))
    return [*modules, Normalize()] if model.config.normalize else modules


def dense(weight: torch.Tensor, bias: torch.Tensor, activation: nn.Module) -> nn.Module:
    """Return a Dense module of weights ``(out, in)`` and ``(out,)``."""
    from sentence_transformers.sentence_transformer.modules import Dense

    size_out, size_in = weight.shape
    return Dense(size_in, size_out, activation_function=activation, init_weight=weight, init_bias=bias)


def _transformer(model: DualEncoderModel, role: Role) -> nn.Module:
    from sentence_transformers.sentence_transformer.modules import Transformer

    config, tower = model.config, model.encoder if role == "query" else model.target_encoder
    lengths = {"query_length": config.query_max_length, "document_length": config.target_max_length}
    longest = max(lengths.values())
    if model.separate_target_encoder is not None:
        longest = config.query_max_length if role == "query" else config.target_max_length
    own = {} if set(lengths.values()) == {longest} or model.separate_target_encoder is not None else lengths
    with tempfile.TemporaryDirectory() as folder:
        tower.save_pretrained(folder)
        _padding(copy.deepcopy(model._tokenizer(role))).save_pretrained(folder)
        arguments = build_kwargs(tower.config)
        module = Transformer(folder, max_seq_length=longest, model_kwargs=dict(arguments), **own)
    if arguments:
        # Written along, or whoever loads it is told of a pooler whose weights are missing. Under the name that all
        # releases read, though this one does not write it.
        module.model_args, module.config_keys = arguments, [*module.config_keys, "model_args"]
    return module.float()


def _padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give a tokenizer something to pad with, which is masked and so may be any token."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ConfigurationError(
            "save_as_sentence_transformer", expected="a tokenizer with a token to pad with", got="none",
            cure="Set model.tokenizer.pad_token.",
        )  # fmt: skip
    return tokenizer


def routed(query_modules: list[nn.Module], target_modules: list[nn.Module]) -> list[nn.Module]:
    """Return the one module that sends queries and targets through modules of their own."""
    from sentence_transformers.sentence_transformer.modules import Router

    return [Router.for_query_document(query_modules, target_modules)]  # type: ignore[arg-type]


def prompts_of(model: DualEncoderModel) -> dict[str, str]:
    """Return the prompts under the names ``encode_query`` and ``encode_document`` look for."""
    return {"query": model.config.query_prompt, "document": model.config.target_prompt}


def save_modules(modules: list[nn.Module], path: str | Path, *, prompts: dict[str, str], normalized: bool) -> Path:
    """Write modules as a sentence-transformers model.

    Args:
        modules: Applied one after the other.
        path: A new or empty folder.
        prompts: Prompts by name.
        normalized: Whether vectors have unit length; where not, they are compared by their dot product.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        modules=modules, prompts=prompts, device="cpu", similarity_fn_name="cosine" if normalized else "dot"
    )
    model.save_pretrained(str(path), create_model_card=False)
    return Path(path)


def check_new_folder(path: str | Path) -> None:
    """Refuse a folder that holds something, files of which would be mixed with the new ones (ConfigurationError)."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(
            str(path), expected="a new or empty folder", got="one that holds files" if folder.is_dir() else "a file",
            cure="Name another folder, or empty that one.",
        )  # fmt: skip
