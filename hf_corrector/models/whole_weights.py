"""Whole weights of a model whose parameters lie in shards over processes (torch's ``fully_shard``, FSDP2).

A model in shards gathers each layer when that layer computes, all processes together. Between the steps of a run they
encode different numbers of batches, so there the weights are gathered once, into a copy that computes by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_corrector._distributed import naming_failures
from hf_corrector.errors import ConfigurationError

_Module = TypeVar("_Module", bound=nn.Module)


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without gradient, gathered from all processes where it is in shards: all of them must call it."""
    return cast(DTensor, tensor.detach()).full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def in_shards(module: nn.Module) -> bool:
    """Say whether weights of a module are spread over processes."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def refuse_shards(module: nn.Module, what: str) -> None:
    """Refuse to write a module of which this process holds a part only (ConfigurationError)."""
    if in_shards(module):
        raise ConfigurationError(
            what, expected="whole weights", got="weights in shards over processes (FSDP)",
            cure="Call trainer.save_model(folder) in every process, and load that folder.",
        )  # fmt: skip


@dataclass(frozen=True)
class WeightlessCopy:
    """A model without its weights, taken before they were dealt out: torch copies no module that is in shards.

    Attributes:
        module: The copy, its parameters on the device ``meta``.
        shared: What it and copies of it have in common with the model, instead of copies.
    """

    module: nn.Module
    shared: tuple[Any, ...]

    @classmethod
    def of(cls, module: nn.Module, shared: Iterable[Any]) -> WeightlessCopy:
        """Take one of a module that is not in shards yet; what is in ``shared`` is not copied."""
        kept = tuple(one for one in shared if one is not None)
        empty = {id(one): nn.Parameter(torch.empty_like(one, device="meta"), False) for one in module.parameters()}
        return cls(copy.deepcopy(module, {**empty, **_themselves(kept)}), kept)

    def filled(self, model: nn.Module) -> nn.Module:
        """Return a copy with the weights the model in shards has now; every process must call it."""
        held = {
            **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))
        }  # fmt: skip
        memo = _themselves(self.shared)
        own = {id(one) for part in self.shared if isinstance(part, nn.Module) for one in part.parameters()}
        with naming_failures("gathering the weights"):
            for name, weight in self.module.named_parameters():
                if id(weight) not in own:
                    memo[id(weight)] = nn.Parameter(whole_tensor(held[name]), False)
        memo.update((id(buffer), held[name]) for name, buffer in self.module.named_buffers())
        return copy.deepcopy(self.module, memo)


def _themselves(kept: Iterable[Any]) -> dict[int, Any]:
    return {id(one): one for one in kept}


def with_whole_weights(model: _Module, weightless: WeightlessCopy | None) -> _Module:
    """Return the model itself, or one like it with whole weights where it is in shards: all processes must call this.

    Args:
        model: The model.
        weightless: Its copy from before it was sharded.

    Returns:
        A model to encode with, in the type of the weights the optimiser keeps; for as long as it is held, every process
        holds the whole weights.

    Raises:
        ConfigurationError: If it is in shards and nothing is known of how it was before.
        DistributedError: If another process is gone.
    """
    if not in_shards(model):
        return model
    if weightless is None:
        raise ConfigurationError(
            type(model).__name__, expected="whole weights, or shards that a trainer of this package made",
            got="weights in shards of other origin", cure="Save the whole state and load it with from_pretrained.",
        )  # fmt: skip
    return cast(_Module, weightless.filled(model))
