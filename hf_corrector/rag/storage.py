"""Composing, loading and saving retrieval-augmented models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Self

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    EncoderDecoderModel,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_corrector.cards import card_of_retrieval_augmented
from hf_corrector.errors import ConfigurationError
from hf_corrector.models.adapter_files import is_adapter
from hf_corrector.models.foreign_configs import check_config
from hf_corrector.models.hub_files import (
    CORRECTOR_FOLDER,
    GENERATION_FILE,
    QUERY_TOKENIZER_FOLDER,
    READER_TOKENIZER_FOLDER,
    RETRIEVAL_AUGMENTED_FILES,
    SAFELY,
    TARGET_TOKENIZER_FOLDER,
    checked,
)
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.pushed_model import PushedModel
from hf_corrector.models.towers import check_complete, longest_input
from hf_corrector.rag.adapters import trainable_names, without_wrapper
from hf_corrector.rag.configuration_rag import (
    DECODER_PROMPT,
    SEQ2SEQ_PROMPT,
    RetrievalAugmentedConfig,
    check_rag_settings,
)
from hf_corrector.rag.reader_inputs import resolved

_LONGEST_DEFAULT = 512


def generator_class(config: PreTrainedConfig) -> type[Any]:
    """Return the auto class of a reader."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def load_reader(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a reader in float32, and its tokenizer; no pickle is opened and no code that comes with them is run.

    Args:
        name: Folder or Hub id of a decoder or an encoder-decoder.

    Raises:
        ConfigurationError: If there is an adapter with it, which transformers would put on it, even out of a pickle.
        InputError: If its configuration leads to code or pickles.
        OSError: If transformers does not find it, or its weights are no safetensors.
    """
    if is_adapter(name):
        raise ConfigurationError(
            name, expected="a whole model alone", got="one with an adapter",
            cure="Put it on with PeftModel.from_pretrained(reader, name), and call from_parts with what that returns.",
        )  # fmt: skip
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    check_config(config, f"configuration of {name}")
    reader: PreTrainedModel = generator_class(config).from_pretrained(
        name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return reader, tokenizer


def freeze_pooler(reader: PreTrainedModel) -> None:
    """Keep the pooler of a reader made of two models as it is: no reader uses one, so it would never see a gradient."""
    if isinstance(reader, EncoderDecoderModel):
        # Not every architecture has one.
        pooler: torch.nn.Module | None = getattr(reader.encoder, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)


class StoredRetrievalAugmentedModel(PushedModel):
    """The part of a retrieval-augmented model that reads and writes folders; its modules are made by the model itself.

    Attributes:
        reader_tokenizer: The reader's tokenizer.
    """

    saved_files = RETRIEVAL_AUGMENTED_FILES

    config: RetrievalAugmentedConfig
    retriever: DualEncoderModel
    generator: PreTrainedModel
    scale_now: float
    reader_tokenizer: PreTrainedTokenizerBase | None
    _trainable: dict[str, frozenset[str]]

    @classmethod
    def from_parts(
        cls,
        retriever: DualEncoderModel | PeftModel,
        generator: PreTrainedModel | PeftModel,
        reader_tokenizer: PreTrainedTokenizerBase,
        **settings: Any,
    ) -> Self:
        """Compose a retriever and a reader, each with or without an adapter of PEFT.

        Args:
            retriever: A dual encoder with its tokenizers.
            generator: A decoder (``AutoModelForCausalLM``) or an encoder-decoder (``AutoModelForSeq2SeqLM``).
            reader_tokenizer: The generator's tokenizer; it needs no padding token.
            settings: Fields of :class:`RetrievalAugmentedConfig`, handed to it whole. By default the prompt is one for
                the kind of generator, and ``reader_max_length`` what it can read, up to 512 tokens.

        Raises:
            ConfigurationError: If a setting is unknown, or the parts cannot be saved and loaded again as they are.
        """
        check_rag_settings(settings)
        inner, retriever_adapter = without_wrapper(retriever, "retriever")
        reader, generator_adapter = without_wrapper(generator, "generator")
        if not isinstance(inner, DualEncoderModel):
            raise ConfigurationError(
                "retriever", expected="a DualEncoderModel", got=type(inner).__name__,
                cure="Make one with DualEncoderModel.from_encoder(name).",
            )  # fmt: skip
        _check_generator(reader)
        defaults = {
            "prompt": SEQ2SEQ_PROMPT if reader.config.is_encoder_decoder else DECODER_PROMPT,
            "answer_prefix": "" if reader.config.is_encoder_decoder else " ",
            "reader_max_length": min(_LONGEST_DEFAULT, _longest(reader.config, reader_tokenizer)),
        }
        # Copies: transformers 5 resets how attention is computed in every configuration it puts into another.
        config = RetrievalAugmentedConfig(
            retriever=copy.deepcopy(inner.config), generator=copy.deepcopy(reader.config),
            retriever_adapter=retriever_adapter, generator_adapter=generator_adapter, **{**defaults, **settings},
        )  # fmt: skip
        model = cls(resolved(config, reader_tokenizer), inner, reader)
        model.reader_tokenizer = reader_tokenizer
        _check_lengths(model.config, reader.config)
        model.check_reader()
        return model.eval()

    @classmethod
    def from_names(cls, retriever: str, generator: str, **settings: Any) -> Self:
        """Compose a saved dual encoder, or any encoder, and a reader by their names.

        Args:
            retriever: Folder or Hub id of a dual encoder or of an encoder.
            generator: Folder or Hub id of the reader, which has its tokenizer with it.
            settings: As for :meth:`from_parts`.

        Raises:
            ConfigurationError: If a setting is unknown or the parts cannot be used.
            OSError: If transformers does not find a model.
        """
        check_rag_settings(settings)
        config = AutoConfig.from_pretrained(retriever, trust_remote_code=False)
        saved = config.model_type == DualEncoderModel.config_class.model_type
        found = DualEncoderModel.from_pretrained(retriever) if saved else DualEncoderModel.from_encoder(retriever)
        return cls.from_parts(found, *load_reader(generator), **settings)

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Self:
        """Load a saved model with all its tokenizers, adapters and corrector.

        Only safetensors, JSON and the files of tokenizers are opened, and no code that comes with them is run.

        Args:
            name: Folder or Hub id.
            args: Handed to transformers' ``from_pretrained``.
            kwargs: Handed to transformers' ``from_pretrained``; ``dtype`` is float32 if not given.

        Raises:
            InputError: If a file cannot be trusted; names it.
            HubError: If there is no such folder or repository.
            ConfigurationError: If the checkpoint lacks weights.
        """
        found = checked(str(name), RETRIEVAL_AUGMENTED_FILES, kwargs, subfolder=kwargs.get("subfolder", ""))
        found.refuse_adapter()
        found.check_config(RetrievalAugmentedConfig)
        kwargs = {"dtype": torch.float32, **kwargs, **found.loading, **SAFELY}
        loaded: Any = super().from_pretrained(name, *args, **kwargs)
        model: Self = loaded[0]
        check_complete(name, model, loaded[1])
        model.restore_trainable()
        if (found.place / GENERATION_FILE).is_file():
            model.generator.generation_config = GenerationConfig.from_pretrained(found.place)

        def tokenizer(folder: str) -> PreTrainedTokenizerBase:
            tokens: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name, subfolder=found.part(folder), trust_remote_code=False, **found.loading
            )
            return tokens

        retriever = model.retriever
        retriever.tokenizer = retriever.target_tokenizer = tokenizer(QUERY_TOKENIZER_FOLDER)
        if retriever.separate_target_encoder is not None:
            retriever.target_tokenizer = tokenizer(TARGET_TOKENIZER_FOLDER)
        model.reader_tokenizer = tokenizer(READER_TOKENIZER_FOLDER)
        return model

    def check_reader(self) -> None:
        """Refuse a prompt that leaves no room (ConfigurationError)."""
        raise NotImplementedError

    def restore_trainable(self) -> None:
        """Let those weights ask for gradients that did when the parts were composed; loading forgets it."""
        freeze_pooler(self.generator)
        for part, names in self._trainable.items():
            for name, weight in self.get_submodule(part).named_parameters():
                weight.requires_grad_(name in names)

    def note_trainable(self) -> None:
        """Remember which weights ask for gradients, where an adapter has decided it."""
        adapted = {"retriever": self.config.retriever_adapter, "generator": self.config.generator_adapter}
        self._trainable = {
            name: trainable_names(self.get_submodule(name)) for name, one in adapted.items() if one is not None
        }

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save all weights, the configuration, the tokenizers, how the reader writes, and the corrector by itself.

        Args:
            save_directory: Folder to write to.
            args: Handed to transformers' ``save_pretrained``.
            kwargs: Handed to transformers' ``save_pretrained``.

        Raises:
            ConfigurationError: If ``push_to_hub`` is asked for.
        """
        if kwargs.get("push_to_hub"):
            raise ConfigurationError(
                "save_pretrained", expected="no push_to_hub: it would upload without tokenizers and corrector",
                got="push_to_hub=True", cure="Call model.push_to_hub(repo_id), which uploads all of them.",
            )  # fmt: skip
        self.retriever.config.scale = self.scale_now
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        folder, retriever = Path(save_directory), self.retriever
        tokenizers = {
            QUERY_TOKENIZER_FOLDER: retriever.tokenizer, READER_TOKENIZER_FOLDER: self.reader_tokenizer,
            TARGET_TOKENIZER_FOLDER: retriever.target_tokenizer if retriever.separate_target_encoder else None,
        }  # fmt: skip
        for name, tokenizer in tokenizers.items():
            if tokenizer is not None:
                tokenizer.save_pretrained(folder / name)
        # Its penalties and constraints decide on answers too. Not by its own way of saving, which refuses settings that
        # many a reader of the Hub has.
        self.generator.generation_config.to_json_file(folder / GENERATION_FILE)
        if retriever.corrector is not None:
            retriever.corrector.save_pretrained(folder / CORRECTOR_FOLDER)

    def own_card(self) -> str:
        """Return the card of the model where nothing is known of its training."""
        corrector = {} if self.retriever.corrector is None else self.retriever.corrector.describe()
        return card_of_retrieval_augmented(self.describe(), corrector)

    def describe(self) -> dict[str, Any]:
        """Return what a run's record and a model card say of the reader, as JSON values."""
        return {**self.config.describe_reader(), "reader_numbers": self.generator.num_parameters()}


def _check_generator(reader: Any) -> None:
    """Refuse a reader that its configuration would not make again (ConfigurationError)."""
    mapping = {}
    if isinstance(reader, PreTrainedModel):
        mapping = generator_class(reader.config)._model_mapping
    if not mapping or type(reader.config) not in mapping or not isinstance(reader, mapping[type(reader.config)]):
        raise ConfigurationError(
            "generator", expected="a model of AutoModelForSeq2SeqLM or AutoModelForCausalLM", got=type(reader).__name__,
            cure="Load it with one of these classes.",
        )  # fmt: skip


def _longest(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many tokens a reader can read; of an encoder-decoder made of two models the encoder decides."""
    return longest_input(config.encoder if config.model_type == "encoder-decoder" else config, tokenizer)


def _positions(config: PreTrainedConfig) -> int | None:
    # Name and presence of this field differ between architectures.
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if found and found > 0 else None


def _check_lengths(config: RetrievalAugmentedConfig, reader: PreTrainedConfig) -> None:
    """Refuse prompts and answers longer than the reader has positions for (ConfigurationError)."""
    two = reader.model_type == "encoder-decoder"
    limits = {
        "reader_max_length": (config.reader_max_length, _positions(reader.encoder if two else reader)),
        "answer_max_length": (config.answer_max_length, _positions(reader.decoder if two else reader)),
    }
    for name, (value, most) in limits.items():
        if most is not None and value > most:
            raise ConfigurationError(
                name, expected=f"at most the reader's {most} positions", got=str(value), cure="Lower it."
            )
