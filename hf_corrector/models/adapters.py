"""Dual encoders inside of wrappers and under adapters of PEFT: finding, saving and reloading them."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from hf_corrector.errors import CheckpointError, ConfigurationError
from hf_corrector.models.adapter_files import (
    ADAPTER_NAME,
    PREFIX,
    BaseNote,
    adapted_layers,
    check_folder,
    describe_config,
    hash_base,
)
from hf_corrector.models.adapter_kinds import check_kind
from hf_corrector.models.hub_files import BASE_FILE
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.modeling_dual_encoder import CORRECTOR_FOLDER, DualEncoderModel


def dual_encoder_of(model: nn.Module) -> DualEncoderModel:
    """Return the dual encoder inside of any nesting of PeftModel, DistributedDataParallel and torch.compile.

    Raises:
        ConfigurationError: If there is none.
    """
    inner = model
    while not isinstance(inner, DualEncoderModel):
        wrapper = inner
        if isinstance(wrapper, PeftModel):
            inner = wrapper.get_base_model()
        elif isinstance(wrapper, nn.Module):
            inner = extract_model_from_parallel(wrapper, keep_torch_compile=False)
        if inner is wrapper:
            raise ConfigurationError(
                "model", expected="a DualEncoderModel, by itself or inside of PeftModel, DDP or torch.compile",
                got=type(inner).__name__, cure="Make one with DualEncoderModel.from_encoder(name).",
            )  # fmt: skip
    return inner


def check_adapter(model: PeftModel) -> None:
    """Refuse, before any training, an adapter that could not be loaded again as it was.

    Raises:
        ConfigurationError: If there are several adapters, or one made for a task, inside of the corrector, or of a kind
            that is more than layers and their weights; if weights would be trained that PEFT does not save; or if the
            model under it cannot be made again, because it was not loaded or has changed since.
    """
    encoder, configs = dual_encoder_of(model), model.peft_config
    # The classes PEFT takes for a task have a forward of their own, which does not hand on queries and targets.
    if list(configs) != [ADAPTER_NAME] or type(model) is not PeftModel:
        raise ConfigurationError(
            "adapters", expected=f"one, named {ADAPTER_NAME!r}, that changes layers, without task_type",
            got=", ".join(f"{name} of type {one.peft_type} for {one.task_type}" for name, one in configs.items()),
            cure="Call get_peft_model(model, LoraConfig(...)) without task_type, once on a model without adapters.",
        )  # fmt: skip
    check_kind({"peft_type": configs[ADAPTER_NAME].peft_type}, "adapter")
    inside = [] if encoder.corrector is None else adapted_layers(encoder.corrector)
    if inside:
        raise ConfigurationError(
            "adapter", expected="layers of the towers and projections", got=f"corrector.{inside[0][0]}",
            cure=r'Name target_modules that leave the corrector out, or exclude_modules=r"corrector\..*".',
        )  # fmt: skip
    saved = get_peft_model_state_dict(model, adapter_name=ADAPTER_NAME, save_embedding_layers=False).values()
    kept = {tensor.data_ptr() for tensor in saved}
    own = [(name, one) for name, one in encoder.named_parameters() if not name.startswith("corrector.")]
    lost = [name for name, one in own if one.requires_grad and one.data_ptr() not in kept]
    if lost:
        raise ConfigurationError(
            "trainable weights", expected="only those the adapter saves", got=f"{len(lost)} others, {lost[0]} first",
            cure="Name their modules in the adapter's modules_to_save, or freeze them.",
        )  # fmt: skip
    _check_base(encoder, configs[ADAPTER_NAME])


def _check_base(encoder: DualEncoderModel, config: PeftConfig) -> None:
    origin = encoder.origin
    # Trained biases are the adapter's, and a cast cannot be undone to compare.
    changeable = config.to_dict().get("bias", "none") != "none" or (origin and origin.dtype != encoder.base_dtype)
    weights = hash_base([encoder.encoder, encoder.separate_target_encoder])
    if origin is None or (weights != origin.weights and not changeable):
        raise ConfigurationError(
            "model under the adapter", expected="a model as it was loaded, which can be loaded again",
            got="one that was not loaded" if origin is None else f"weights {weights} instead of {origin.describe()}",
            cure="Save it with model.save_pretrained(folder), load that with DualEncoderModel.from_pretrained(folder) "
            "and put the adapter on it; with init_lora_weights=True, as other ways change the model under it.",
        )  # fmt: skip


def save_adapter_extras(folder: Path, model: PeftModel, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write beside an adapter that PEFT saved what it takes to load it: projections, tokenizers, corrector, the base.

    Args:
        folder: Where PEFT saved the adapter.
        model: What it saved.
        state: Full state of ``model`` where it is spread over processes; read from the model if not given.

    Raises:
        ConfigurationError: If the folder holds a whole model too, which would be read instead of the adapter.
    """
    check_folder(folder, adapted=True)
    encoder = dual_encoder_of(model)
    full = encoder.state_dict() if state is None else {name.removeprefix(PREFIX): one for name, one in state.items()}
    encoder.save_beside_adapter(folder, full)


def load_adapter_extras(folder: Path, model: PeftModel) -> None:
    """Bring the corrector of a saved adapter into a model that loads the adapter's weights by itself.

    Raises:
        CheckpointError: If the adapter was trained on another model or is of another form.
    """
    encoder = dual_encoder_of(model)
    saved, own = PeftConfig.from_pretrained(str(folder)), model.peft_config[ADAPTER_NAME]
    theirs, mine = describe_config(saved), describe_config(own)
    other = [f"{name} {theirs.get(name)} / {mine.get(name)}" for name in mine if theirs.get(name) != mine[name]]
    if other:
        raise CheckpointError(
            str(folder), expected="an adapter of the form of the model's", got=f"saved / now: {', '.join(other)}",
            cure="Make the adapter as it was made for the run that is resumed.",
        )  # fmt: skip
    note = BaseNote.load(str(folder)) if (folder / BASE_FILE).exists() else None
    if note is not None and encoder.origin is not None and note.origin.weights != encoder.origin.weights:
        raise CheckpointError(
            str(folder), expected=f"an adapter on {encoder.origin.describe()}", got=f"one on {note.origin.describe()}",
            cure="Load the model the run was started from.",
        )  # fmt: skip
    if encoder.corrector is not None and (folder / CORRECTOR_FOLDER).is_dir():
        encoder.corrector.load_state_dict(CorrectorModel.from_pretrained(str(folder / CORRECTOR_FOLDER)).state_dict())


def freeze_targets(model: nn.Module) -> None:
    """Keep the target tower and its projection as they are, adapters included, so that only queries are trained.

    Freezing is a state of the object: a loaded model must be frozen again.

    Raises:
        ConfigurationError: If targets go through the query tower.
    """
    encoder = dual_encoder_of(model)
    if encoder.separate_target_encoder is None:
        raise ConfigurationError(
            "training of queries alone", expected="a target tower of its own", got="one tower for both",
            cure="Make the model with DualEncoderModel.from_encoder(name, separate_towers=True).",
        )  # fmt: skip
    encoder.separate_target_encoder.requires_grad_(False)
    if encoder.target_projection is not None:
        encoder.target_projection.requires_grad_(False)
