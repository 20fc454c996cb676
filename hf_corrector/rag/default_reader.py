"""A reader without downloads: an encoder-decoder whose two halves start from one encoder, by default the demo's MiniLM.

What the encoder knows is there from the start, in both halves. What it has not starts from what is nearest: attention
of the decoder to what the encoder read from the layer's attention to itself, which finds like by like already, and the
layer before the vocabulary, where the encoder brings none, from the identity.
``examples/benchmarks/reader_start.py`` compares this with drawing them anew.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    EncoderDecoderModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from hf_corrector._extras import demo_encoder
from hf_corrector.errors import ConfigurationError
from hf_corrector.models.towers import TowerSource
from hf_corrector.rag.storage import freeze_pooler

# Tokenizers of BERT take punctuation off its words and forget on which sides there was a space. In answers these stand
# between letters or digits: names of code, compounds, elisions, numbers.
_JOINED = (
    (r" ?_ ?", "_"), (r"(?<=\w) - (?=\w)", "-"), (r"(?<=\w) ' (?=\w)", "'"),
    (r"(?<=\d), (?=\d{3}(?!\d))", ","), (r"(?<=\d)\. (?=\d)", "."),
)  # fmt: skip


def default_reader(
    name: str | None = None, *, num_hidden_layers: int | None = None, seed: int = 0
) -> tuple[EncoderDecoderModel, PreTrainedTokenizerBase]:
    """Build a reader and its tokenizer from an encoder, to be trained.

    Args:
        name: Folder or Hub id of an encoder that can also be a decoder, as BERT and RoBERTa; None takes the demo's
            MiniLM.
        num_hidden_layers: Keep only the first so many layers, in both halves.
        seed: Of weights that the encoder has not and nothing is near to: in BERT and RoBERTa an unused pooler at most.

    Returns:
        The reader, in evaluation mode, and its tokenizer.

    Raises:
        MissingDependencyError: If the demo's encoder is asked for and not installed.
        ConfigurationError: If the encoder cannot be a decoder, has too few layers, or its tokenizer lacks tokens; or
            of an adapter beside it, see :meth:`TowerSource.check_adapter`.
        OSError: If transformers does not find the encoder.
    """
    source = TowerSource(str(demo_encoder()) if name is None else name, num_hidden_layers=num_hidden_layers)
    config = source.load_config()
    source = source.pinned()
    source.check_adapter()
    _check_can_decode(source.name, config)
    tokenizer = _reader_tokenizer(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = _composed(source, config)
    special = {
        "decoder_start_token_id": tokenizer.bos_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    for key, value in special.items():
        # transformers shifts labels by the first of the two and generates by the second.
        setattr(reader.config, key, value)
        setattr(reader.generation_config, key, value)
    return reader, tokenizer


def cross_attention_names(reader: torch.nn.Module) -> frozenset[str]:
    """Return the names of the decoder's weights that attend to the encoder, whose task is new to them.

    They bear a learning rate several times that of the rest, ``cross_attention_learning_rate``. Readers whose attention
    was trained with them (T5, BART) name it otherwise.
    """
    return frozenset(name for name, _ in reader.named_parameters() if ".crossattention." in name)


def _check_can_decode(name: str, config: PreTrainedConfig) -> None:
    """Refuse encoders without a decoder of the same weights that can attend to another model (ConfigurationError)."""
    found = cast(Any, AutoModelForCausalLM)._model_mapping.get(type(config), None)
    attends = found is not None and "encoder_hidden_states" in inspect.signature(found.forward).parameters
    if config.is_encoder_decoder or not attends:
        raise ConfigurationError(
            name, expected="an encoder that can be a decoder with cross-attention, such as BERT or RoBERTa",
            got=f"the architecture {config.model_type!r}",
            cure="Name such an encoder, or load a reader of its own with AutoModelForSeq2SeqLM or "
            "AutoModelForCausalLM.",
        )  # fmt: skip


def _composed(source: TowerSource, config: PreTrainedConfig) -> EncoderDecoderModel:
    decoder_config = source.load_config()
    decoder_config.is_decoder = decoder_config.add_cross_attention = True
    where: dict[str, Any] = {
        "revision": source.revision or "main", "dtype": torch.float32, "use_safetensors": True,
        "trust_remote_code": False,
    }  # fmt: skip
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # of weights that are missing or left over, which is as it should be here
    try:
        encoder = AutoModel.from_pretrained(source.name, config=config, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.name, config=decoder_config, output_loading_info=True, **where
        )
        decoder, found = loaded
    finally:
        logging.set_verbosity(verbosity)
    _start_from_what_is_near(decoder, set(found["missing_keys"]))
    # Reading back makes a pooler, so there must be one.
    reader = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    freeze_pooler(reader)
    return reader


@torch.no_grad()
def _start_from_what_is_near(decoder: PreTrainedModel, missing: set[str]) -> None:
    """Replace what was drawn because the encoder has it not, in place; ``missing`` are the names of such weights."""
    for name, module in decoder.named_modules():
        if name.endswith(".crossattention") and any(weight.startswith(f"{name}.") for weight in missing):
            itself = decoder.get_submodule(name.removesuffix("crossattention") + "attention")
            module.load_state_dict(itself.state_dict())
        elif f"{name}.weight" in missing and name.endswith(("transform.dense", "lm_head.dense")):
            torch.nn.init.eye_(cast(torch.nn.Linear, module).weight)


def _reader_tokenizer(source: TowerSource) -> PreTrainedTokenizerBase:
    """Return the encoder's tokenizer with a start and an end, which writes texts as they are usually written."""
    found = source.load_tokenizer()
    start, end = found.bos_token or found.cls_token, found.eos_token or found.sep_token
    if start is None or end is None or found.pad_token is None or not found.is_fast:
        raise ConfigurationError(
            source.name, expected="a fast tokenizer with tokens for start (or cls), end (or sep) and padding",
            got=f"start {start!r}, end {end!r}, padding {found.pad_token!r}, fast {found.is_fast}",
            cure="Name another encoder, or add the tokens to its tokenizer.",
        )  # fmt: skip
    backend = Tokenizer.from_str(cast(Any, found).backend_tokenizer.to_str())
    if isinstance(backend.decoder, decoders.WordPiece):
        joined = [decoders.Replace(Regex(pattern), text) for pattern, text in _JOINED]
        backend.decoder = decoders.Sequence([backend.decoder, decoders.Fuse(), *joined])
    # A class of the encoder's own would put its own decoder back when it is loaded.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, pad_token=found.pad_token, cls_token=found.cls_token,
        sep_token=found.sep_token, unk_token=found.unk_token, mask_token=found.mask_token,
        model_max_length=found.model_max_length,
    )  # fmt: skip
