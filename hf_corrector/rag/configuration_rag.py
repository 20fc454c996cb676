"""Configuration of a retriever and the language model that reads what it finds."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig

DECODER_PROMPT = "{passage}\n\nQuestion: {question}\nAnswer:"
SEQ2SEQ_PROMPT = "question: {question} context: {passage}"


@strict
class RetrievalAugmentedConfig(PreTrainedConfig):
    """Describe a retriever, a reader and how the reader is prompted.

    Args:
        retriever: Configuration of the dual encoder.
        generator: Configuration of the reader, an encoder-decoder or a decoder.
        prompt: What the reader is given, with one ``{question}`` and one ``{passage}``.
        passage_separator: Text between several passages in one prompt.
        answer_prefix: Text before the answer, which the reader writes too; a space where decoders need one.
        reader_max_length: Tokens of a prompt, of a decoder together with the answer.
        answer_max_length: Tokens of an answer, its end included.
        learn_scale: Whether the inverse temperature β is a weight, which starts at the retriever's ``scale``.
        answer_end_token_id: The token that ends an answer.
        decoder_start_token_id: The token an encoder-decoder's answers start from.
        retriever_adapter: Settings of the retriever's adapter of PEFT.
        generator_adapter: Settings of the reader's adapter of PEFT.
    """

    model_type = "retrieval-augmented"
    sub_configs_defaults = {  # noqa: RUF012 - transformers declares it so
        "retriever": SubConfigSpec(config_class=DualEncoderConfig),
        "generator": SubConfigSpec(config_class=AutoConfig, model_type="gpt2"),
    }

    retriever: Any = None
    generator: Any = None
    prompt: str = DECODER_PROMPT
    passage_separator: str = "\n\n"
    answer_prefix: str = ""
    reader_max_length: int = 512
    answer_max_length: int = 32
    learn_scale: bool = False
    answer_end_token_id: int | None = None
    decoder_start_token_id: int | None = None
    retriever_adapter: Any = None
    generator_adapter: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Refuse prompts and lengths that cannot work (ConfigurationError)."""
        super().__post_init__(**kwargs)
        if self.prompt.count("{question}") != 1 or self.prompt.count("{passage}") != 1:
            raise ConfigurationError(
                "RetrievalAugmentedConfig.prompt", expected="one {question} and one {passage}", got=repr(self.prompt),
                cure="Write both once.",
            )  # fmt: skip
        if not 2 <= self.answer_max_length < self.reader_max_length:
            raise ConfigurationError(
                "RetrievalAugmentedConfig.answer_max_length",
                expected=f"2 to {self.reader_max_length - 1}, below reader_max_length", got=str(self.answer_max_length),
                cure="An answer has a token and an end, and must leave room for the prompt.",
            )  # fmt: skip

    def describe_reader(self) -> dict[str, Any]:
        """Return what a run's record and a model card say of the reader, as JSON values."""
        named = self.generator.encoder if self.generator.model_type == "encoder-decoder" else self.generator
        # Of a folder the last part alone, as "models/reader" would be taken for a repository of the Hub.
        name = str(named.name_or_path)
        return {
            "reader_name": Path(name).name if Path(name).is_dir() else name,
            "reader_type": self.generator.model_type, "reader_prompt": self.prompt,
            "reader_max_length": self.reader_max_length, "answer_max_length": self.answer_max_length,
        }  # fmt: skip


def check_rag_settings(settings: dict[str, Any]) -> None:
    """Refuse names that are no settings of :class:`RetrievalAugmentedConfig`, which transformers would store silently.

    Raises:
        ConfigurationError: Naming the unknown ones.
    """
    own = {item.name for item in fields(RetrievalAugmentedConfig)} - {item.name for item in fields(PreTrainedConfig)}
    allowed = own - {"retriever", "generator", "retriever_adapter", "generator_adapter"}
    unknown = sorted(set(settings) - allowed)
    if unknown:
        raise ConfigurationError(
            "retrieval-augmented settings", expected=f"names among {sorted(allowed)}", got=str(unknown),
            cure="Correct the spelling.",
        )  # fmt: skip
