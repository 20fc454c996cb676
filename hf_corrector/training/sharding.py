"""Weights in shards over processes (FSDP2): whether the run's settings can work, and how a model is made ready.

Read against accelerate 1.15 and torch 2.13. What differs from DDP, and why:

* All of a step's encoding is inside the root's forward, as under DDP. Between steps, and for the candidates of a
  reranking step, processes encode different numbers of batches, so weights are gathered before, see
  :mod:`hf_corrector.models.whole_weights`.
* The corrector is in no shard: it is small, every process draws by it, and its own optimiser fits it.
* bfloat16 is autocast's, as under DDP, with weights gathered in float32. accelerate would round the weights themselves
  and all that modules return: the vectors of a step would then not be those of the cache, nor of the saved model.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import accelerate
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, compare_versions
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, StateDictType
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel

if TYPE_CHECKING:
    from hf_corrector.training.cache_arguments import CacheTrainingArguments as Arguments

CONFIG = "examples/accelerate/fsdp2.yaml"
_INSTEAD = "Start with examples/accelerate/ddp.yaml; mini_batch_size or an adapter of PEFT saves memory, too."


def asks_for_shards(args: Arguments) -> bool:
    """Say whether arguments or launcher ask for FSDP of any version."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_sharding(args: Arguments) -> None:
    """Refuse settings of FSDP that cannot work (ConfigurationError)."""
    if not asks_for_shards(args):
        return
    version = int((args.fsdp_plugin_args or {}).get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        _refuse("fsdp_version", "2", str(version), f"Set fsdp_version: 2, as {CONFIG} does.")
    if args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        # accelerate would make DDP of it, or nothing, without a word.
        got = "CPUs" if args.device.type == "cpu" else "one process"
        _refuse("FSDP", "several accelerators, one for each process", got, _INSTEAD)
    if compare_versions("accelerate", "<", "1.15") or compare_versions("torch", "<", "2.7"):
        got = f"accelerate {accelerate.__version__} and torch {torch.__version__}"
        _refuse("FSDP", "accelerate 1.15 and torch 2.7, which can leave a corrector out", got, "Update them.")
    for name, (wrong, expected, got) in _settings(args).items():
        if wrong:
            _refuse(name, f"{expected}, with FSDP", got, f"Start with {CONFIG}, or without FSDP.")


def _settings(args: Arguments) -> dict[str, tuple[bool, str, str]]:
    """Return settings by name: whether it is wrong, what it may be, and what it is."""
    plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    return {
        "fsdp_state_dict_type": (
            plugin.state_dict_type != StateDictType.FULL_STATE_DICT,
            "FULL_STATE_DICT, so that what is saved can be loaded", plugin.state_dict_type.name,
        ),
        "fsdp_cpu_ram_efficient_loading": (
            plugin.cpu_ram_efficient_loading, "false, as every process encodes its part of the first cache", "true"
        ),
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy), "false, as weights are gathered where they are", "true"
        ),
        "fsdp_activation_checkpointing": (
            plugin.activation_checkpointing, "false, and mini_batch_size, which keeps no activations either", "true"
        ),
        "fsdp_auto_wrap_policy": (
            plugin.auto_wrap_policy is size_based_auto_wrap_policy, "TRANSFORMER_BASED_WRAP", "SIZE_BASED_WRAP"
        ),
        "precision": (args.fp16, "bf16=True or float32", "fp16=True"),
        "mixed_precision": (
            args.mixed_precision != precision, f"'no' or {precision!r} for the launcher, as the arguments say",
            repr(args.mixed_precision),
        ),
        "torch_compile": (args.torch_compile, "False", "True"),
        "load_best_model_at_end": (
            args.load_best_model_at_end, "False; trainer.state.best_model_checkpoint names the folder to load", "True"
        ),
    }  # fmt: skip


def refuse_sharding(args: Arguments, what: str) -> None:
    """Refuse FSDP of any version for what does not work with it (ConfigurationError)."""
    if asks_for_shards(args):
        _refuse("FSDP", f"DistributedDataParallel: {what} is not done with weights in shards", "FSDP", _INSTEAD)


def _refuse(name: str, expected: str, got: str, cure: str) -> None:
    raise ConfigurationError(name, expected=expected, got=got, cure=cure)


def prepare_sharding(accelerator: accelerate.Accelerator, model: torch.nn.Module, encoder: DualEncoderModel) -> None:
    """Make a model ready for accelerate to put it in shards; nothing is done where it will not be.

    Args:
        accelerator: The run's.
        model: What is trained.
        encoder: The dual encoder inside of it.
    """
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if plugin is None:
        return
    # transformers leaves it on the CPU, where it would encode the first cache.
    model.to(accelerator.device)
    encoder.prepare_for_shards()
    if encoder.corrector is not None:
        plugin.ignored_modules = [encoder.corrector]
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers_to_shard(encoder)


def layers_to_shard(encoder: DualEncoderModel) -> list[str]:
    """Return the classes of layers that each are gathered by themselves.

    Those transformers names, without the ones around the word embeddings: accelerate 1.15 shards these by themselves
    too, and fails where they lie in shards already.
    """
    table = encoder.get_input_embeddings()
    every = list(encoder.modules())
    around = {type(one).__name__ for one in every if any(child is table for child in one.modules())}
    here = {type(one).__name__ for one in every}
    return sorted(set(encoder._no_split_modules or ()) & here - around)


def step_autocast(args: Arguments, *, sharded: bool) -> AbstractContextManager[Any]:
    """Return the arithmetic of a step's forward where accelerate does not see to it: of a model in shards."""
    if sharded and args.bf16:
        return torch.autocast(args.device.type, dtype=torch.bfloat16)
    return nullcontext()
