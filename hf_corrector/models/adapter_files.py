"""The folder of an adapter: what it says of the model under it, and what decides its vectors.

PEFT writes the adapter alone. Beside it this package keeps how the model under it is made again and a hash of its
weights, as an adapter on another base computes other vectors without any error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save_file
from torch import nn

from hf_corrector._files import atomic_write, hash_strings, write_json
from hf_corrector.errors import ConfigurationError
from hf_corrector.models.hub_files import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, BASE_FILE
from hf_corrector.models.sentence_transformers_format import read_repository_json
from hf_corrector.models.towers import TowerSource, hash_tensors
from hf_corrector.records import checked_fields

ADAPTER_NAME = "default"
# Of every name PEFT writes.
PREFIX = "base_model.model."
# Layers after pooling: small, and made at random where the encoder had none, so that they travel with the adapter.
_HEADS = re.compile(r"(target_)?projection\.((base_layer|original_module)\.)?(weight|bias)")
_WHOLE_MODELS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
# Fields of an adapter's configuration that say nothing of its vectors once it has weights.
_SILENT_FIELDS = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "init_lora_weights", "lora_dropout", "peft_version",
    "revision", "task_type",
})  # fmt: skip


@dataclass(frozen=True)
class ModelOrigin:
    """How a dual encoder is made again as it was when it was loaded.

    Attributes:
        kind: ``"dual_encoder"``: the one source is a saved dual encoder. ``"encoders"``: the sources are its towers.
        sources: Where it came from; one, or two for two encoders.
        weights: Hash of its towers' weights.
        dtype: What they were loaded in, for instance ``"float32"``.
    """

    kind: str
    sources: tuple[TowerSource, ...]
    weights: str
    dtype: str

    def describe(self) -> str:
        """Return names, revisions and hash, for messages."""
        names = [one.name if one.revision is None else f"{one.name} at {one.revision}" for one in self.sources]
        return f"{' and '.join(names)} with weights {self.weights}"


@dataclass(frozen=True)
class BaseNote:
    """What is noted beside an adapter.

    Attributes:
        origin: The model under it.
        dtype: What that model was brought to before the adapter came.
    """

    origin: ModelOrigin
    dtype: str

    def save(self, folder: Path) -> None:
        """Write into the adapter's folder durably."""
        write_json(folder / BASE_FILE, asdict(self))

    @classmethod
    def load(cls, name: str, revision: str | None = None, *, subfolder: str = "") -> BaseNote:
        """Read from a folder or Hub repository.

        Raises:
            ConfigurationError: If there is none.
            InputError: If it is damaged.
        """
        file = f"{subfolder}/{BASE_FILE}" if subfolder else BASE_FILE
        found = read_repository_json(name, file, revision)
        if found is None:
            raise ConfigurationError(
                name, expected=f"an adapter with {BASE_FILE}, which says what is under it", got="one without",
                cure="Load the model under it and call PeftModel.from_pretrained(model, folder); to write the file, "
                "save with trainer.save_model() or dual_encoder_of(model).save_pretrained(folder).",
            )  # fmt: skip
        where = f"{name}/{file}"
        note = checked_fields(cls, found, where=where)
        origin = checked_fields(ModelOrigin, note["origin"], where=where)
        sources = tuple(TowerSource(**checked_fields(TowerSource, one, where=where)) for one in origin["sources"])
        return cls(ModelOrigin(**{**origin, "sources": sources}), note["dtype"])


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Say whether a folder or Hub repository holds an adapter rather than a whole model."""
    return read_repository_json(name, ADAPTER_CONFIG_FILE, revision) is not None


def base_tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights a module has without adapters, under the names they have without adapters."""
    while isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    own = {**module.state_dict()}
    children = dict(module.named_children())
    yield from ((prefix + name, tensor) for name, tensor in own.items() if name.split(".")[0] not in children)
    for name, child in children.items():
        yield from base_tensors(child, f"{prefix}{name}.")


def hash_base(towers: Sequence[nn.Module | None]) -> str:
    """Hash the weights some towers have without adapters; the same with and without one."""
    return hash_tensors(pair for tower in towers if tower is not None for pair in sorted(base_tensors(tower)))


def adapted_layers(module: nn.Module) -> list[tuple[str, BaseTunerLayer | AuxiliaryTrainingWrapper]]:
    """Return names and layers that adapters replaced."""
    every = module.named_modules()
    return [(name, layer) for name, layer in every if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def adapters_of(model: nn.Module) -> dict[str, PeftConfig]:
    """Return the configurations of a model's adapters by name; PEFT leaves them on the model it adapts."""
    found: dict[str, PeftConfig] = vars(model).get("peft_config", {})
    return found


def describe_config(config: PeftConfig) -> dict[str, str]:
    """Return what an adapter's configuration says of its vectors, as comparable text by field."""
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return {name: json.dumps(plain[name], default=str) for name in sorted(plain) if name not in _SILENT_FIELDS}


def hash_adapters(modules: Sequence[nn.Module | None], configs: dict[str, PeftConfig]) -> str | None:
    """Hash what adapters in some modules do beside their weights (which, how strong, switched off); None without any.

    Args:
        modules: Tower and projection of one role.
        configs: See :func:`adapters_of`.
    """
    lines = []
    for module in modules:
        for name, layer in [] if module is None else adapted_layers(module):
            lines.append(f"{name} {type(layer).__name__} {layer.active_adapters} {layer.disable_adapters}")
            if isinstance(layer, BaseTunerLayer):
                lines.append(f"merged {layer.merged_adapters}")
            if isinstance(layer, LoraLayer):
                lines.append(f"scaling {sorted(layer.scaling.items())}")
    if not lines:
        return None
    return hash_strings([*lines, *(f"{name} {describe_config(configs[name])}" for name in sorted(configs))])


def check_folder(folder: Path, *, adapted: bool) -> None:
    """Refuse a folder that holds the other of adapter and whole model: a reader would take the wrong one.

    Raises:
        ConfigurationError: Naming the file.
    """
    patterns = _WHOLE_MODELS if adapted else (ADAPTER_CONFIG_FILE,)
    found = sorted(file for pattern in patterns for file in folder.glob(pattern))
    if found:
        raise ConfigurationError(
            str(folder), expected=f"no {'whole model' if adapted else 'adapter'} beside the one to be written",
            got=found[0].name, cure="Choose another folder; what is there may be the model under the adapter.",
        )  # fmt: skip


def write_adapter(folder: Path, model: nn.Module) -> None:
    """Write the adapter a model holds, as PEFT would write it from the outside."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False)
    tensors = {PREFIX + name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    _write_tensors(folder, tensors)
    config = adapters_of(model)[ADAPTER_NAME]
    inference, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = inference


def add_heads(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Add projections to the file of an adapter, from which PEFT loads them into the model as it loads biases.

    Args:
        folder: Holds an adapter.
        state: State of the dual encoder, names without PEFT's prefix.
    """
    heads = {PREFIX + name: tensor for name, tensor in state.items() if _HEADS.fullmatch(name)}
    if not heads:
        return
    saved = load_file(folder / ADAPTER_WEIGHTS_FILE)
    added = {name: tensor.detach().cpu().contiguous() for name, tensor in heads.items() if name not in saved}
    _write_tensors(folder, {**saved, **added})


def _write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata={"format": "pt"})

    atomic_write(folder / ADAPTER_WEIGHTS_FILE, write)
