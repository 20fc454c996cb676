"""Loading and saving dual encoders: from encoders, whole, and as an adapter on what it was trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_corrector._files import read_json
from hf_corrector.cards import card_of_dual_encoder
from hf_corrector.errors import ConfigurationError
from hf_corrector.models.adapter_files import (
    BaseNote,
    ModelOrigin,
    adapted_layers,
    adapters_of,
    add_heads,
    base_tensors,
    check_folder,
    hash_base,
    write_adapter,
)
from hf_corrector.models.adapter_kinds import check_kind
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig, check_settings
from hf_corrector.models.hub_files import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    CORRECTOR_FOLDER,
    DUAL_ENCODER_FILES,
    SAFELY,
    TARGET_TOKENIZER_FOLDER,
    CheckedModel,
    checked,
)
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.pushed_model import PushedModel
from hf_corrector.models.sentence_transformers_format import SentenceTransformerSettings, read_settings
from hf_corrector.models.towers import TowerSource, check_complete, check_length, longest_input
from hf_corrector.models.whole_weights import refuse_shards

_LONGEST_DEFAULT = 512


class StoredDualEncoder(PushedModel):
    """The part of a dual encoder that reads and writes folders; its modules are made by the model itself.

    Attributes:
        tokenizer: Tokenizer of queries, and of targets unless they have their own.
        target_tokenizer: Tokenizer of targets.
        origin: What it was loaded from, by which a model under an adapter is made again; None if it was not.
    """

    saved_files = DUAL_ENCODER_FILES

    config: DualEncoderConfig
    tokenizer: PreTrainedTokenizerBase | None
    target_tokenizer: PreTrainedTokenizerBase | None
    encoder: PreTrainedModel
    separate_target_encoder: PreTrainedModel | None
    projection: nn.Linear | None
    target_projection: nn.Linear | None
    corrector: CorrectorModel | None
    origin: ModelOrigin | None

    @classmethod
    def from_encoder(
        cls,
        name: str,
        target_name: str | None = None,
        *,
        revision: str | None = None,
        separate_towers: bool = False,
        num_hidden_layers: int | None = None,
        **settings: Any,
    ) -> Self:
        """Make a dual encoder from any Hugging Face encoder.

        Where ``name`` is a sentence-transformers model, its pooling, normalisation, prompts, projection and maximum
        length are taken over unless ``settings`` say otherwise; where it routes queries and documents through
        transformers of their own, both become towers.

        Args:
            name: Folder or Hub id of the query encoder, and of the target encoder unless ``target_name`` is given.
            target_name: Folder or Hub id of a separate target encoder.
            revision: Hub revision of ``name``.
            separate_towers: Give targets their own copy of the weights even where ``target_name`` is not given.
            num_hidden_layers: Keep only the first so many layers.
            settings: Fields of :class:`DualEncoderConfig`, handed to it whole.

        Raises:
            ConfigurationError: If a setting is unknown or the model cannot be repeated exactly.
            OSError: If transformers does not find the model.
        """
        check_settings(settings)
        found = read_settings(name, revision)
        source = TowerSource(name, revision, "" if found is None else found.encoder_subfolder, num_hidden_layers)
        target_source = _target_source(source, target_name, found)
        separate = separate_towers or target_source is not source
        config, tokenizer = source.load_config(), source.load_tokenizer()
        target_config, target_tokenizer = target_source.load_config(), target_source.load_tokenizer()
        longest = longest_input(config, tokenizer), longest_input(target_config, target_tokenizer)
        if found is None:
            longest = min(longest[0], _LONGEST_DEFAULT), min(longest[1], _LONGEST_DEFAULT)
        lengths = dict(zip(("query_max_length", "target_max_length"), longest, strict=True))
        merged = {**lengths, **({} if found is None else found.settings), **settings}
        full = DualEncoderConfig(encoder=config, target_encoder=target_config if separate else None, **merged)
        full.name_or_path = name
        check_length(name, full.encoder, full.query_max_length)
        check_length(target_source.name, full.target_encoder or full.encoder, full.target_max_length)
        target_encoder = target_source.load_weights(full.target_encoder) if separate else None
        model = cls(full, source.load_weights(full.encoder), target_encoder)
        model.tokenizer, model.target_tokenizer = tokenizer, target_tokenizer if separate else tokenizer
        if found is not None and "projection_dim" not in settings:
            model._set_projection(found)
        return model._loaded_from("encoders", (source,) if target_source is source else (source, target_source))

    @torch.no_grad()
    def _set_projection(self, found: SentenceTransformerSettings) -> None:
        of_targets = found.projection if found.target_projection is None else found.target_projection
        for layer, given in ((self.projection, found.projection), (self.target_projection, of_targets)):
            if layer is not None and given is not None:
                weight, bias = given
                layer.weight.copy_(weight)
                layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)

    @classmethod
    def from_sentence_transformer(cls, path: str, *, revision: str | None = None, **settings: Any) -> Self:
        """Make a dual encoder that computes the same vectors as a sentence-transformers model.

        Args:
            path: Folder or Hub id of the sentence-transformers model.
            revision: Hub revision.
            settings: Fields of :class:`DualEncoderConfig` to change, handed to it whole.

        Raises:
            ConfigurationError: If it is no sentence-transformers model, or one that cannot be repeated exactly.
        """
        if read_settings(path, revision) is None:
            raise ConfigurationError(
                str(path), expected="a sentence-transformers model", got="no modules.json",
                cure="Use DualEncoderModel.from_encoder for a plain transformer.",
            )  # fmt: skip
        return cls.from_encoder(path, revision=revision, **settings)

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Self:
        """Load a saved dual encoder with its tokenizers and, if it has one, its corrector.

        Of an adapter, the model under it is loaded from where it came and the adapter put on it, not merged. Only
        safetensors, JSON and the files of tokenizers are opened, and no code that comes with them is run.

        Args:
            name: Folder or Hub id of a dual encoder or of an adapter of one.
            args: Handed to transformers' ``from_pretrained``.
            kwargs: Handed to transformers' ``from_pretrained``; ``dtype`` is float32 if not given.

        Raises:
            InputError: If a file cannot be trusted; names it.
            HubError: If there is no such folder or repository.
            ConfigurationError: If the checkpoint lacks weights, or the model under an adapter is not the one it was
                trained on.
        """
        found = checked(str(name), DUAL_ENCODER_FILES, kwargs, subfolder=kwargs.get("subfolder", ""))
        if (found.place / ADAPTER_CONFIG_FILE).is_file():
            on_base = cls.load_adapter_on_base(name, subfolder=found.subfolder, **found.loading)
            adapted = cast(Self, on_base.get_base_model())
            return adapted.to(kwargs["dtype"]) if "dtype" in kwargs else adapted
        found.check_config(DualEncoderConfig)
        kwargs = {"dtype": torch.float32, **kwargs, **found.loading, **SAFELY}
        loaded: Any = super().from_pretrained(name, *args, **kwargs)
        model: Self = loaded[0]
        check_complete(name, model, loaded[1])
        model._load_tokenizers(name, found)
        source = TowerSource(str(name), found.loading.get("revision"), found.subfolder)
        return model._loaded_from("dual_encoder", (source,))

    @classmethod
    def load_adapter_on_base(
        cls, name: str, *, subfolder: str = "", is_trainable: bool = False, **loading: Any
    ) -> PeftModel:
        """Make the model under an adapter again and put the adapter on it, with tokenizers and corrector.

        Args:
            name: Folder or Hub id of the adapter.
            subfolder: Folder inside of it.
            is_trainable: Whether the adapter is to be trained further.
            loading: ``revision``, ``cache_dir``, ``token`` and ``local_files_only``, handed to each loader whole.

        Raises:
            ConfigurationError: If it is not said what is under it, or that has other weights now, or if it is an
                adapter that is more than layers and their weights.
            InputError: If a file cannot be trusted; names it.
        """
        found = checked(str(name), DUAL_ENCODER_FILES, loading, subfolder=subfolder)
        if not (found.place / ADAPTER_WEIGHTS_FILE).is_file():
            raise ConfigurationError(
                str(name), expected=f"the weights of an adapter in {ADAPTER_WEIGHTS_FILE}", got="no such file",
                cure="Save the adapter as safetensors, which PEFT does by itself; pickled weights are never loaded.",
            )  # fmt: skip
        loading = found.loading
        check_kind(read_json(found.place / ADAPTER_CONFIG_FILE), f"{name}/{found.part(ADAPTER_CONFIG_FILE)}")
        note = BaseNote.load(name, loading.get("revision"), subfolder=found.subfolder)
        found.check_config(DualEncoderConfig)
        config = DualEncoderConfig.from_pretrained(name, subfolder=found.subfolder, **loading)
        corrector_config, config.corrector = config.corrector, None
        model = cls._made_again(note.origin, config)
        if model.origin is None or model.origin.weights != note.origin.weights:
            raise ConfigurationError(
                f"model under the adapter {name}", expected=note.origin.describe(),
                got="nothing" if model.origin is None else model.origin.describe(),
                cure="Put back the model the adapter was trained on; on another one it computes other vectors.",
            )  # fmt: skip
        model.config = config
        model.corrector = None
        model._load_tokenizers(name, found)
        adapted = PeftModel.from_pretrained(
            model.to(getattr(torch, note.dtype)), name, is_trainable=is_trainable, subfolder=found.subfolder, **loading
        )
        if corrector_config is not None:
            model.corrector = CorrectorModel.from_pretrained(name, subfolder=found.part(CORRECTOR_FOLDER), **loading)
            config.corrector = model.corrector.config
        return adapted.train(is_trainable)

    @classmethod
    def _made_again(cls, origin: ModelOrigin, config: DualEncoderConfig) -> Self:
        """Load what was loaded before; ``config`` says what towers are made into."""
        first = origin.sources[0]
        if origin.kind == "dual_encoder":
            where = {"revision": first.revision, "subfolder": first.subfolder}
            return cls.from_pretrained(first.name, dtype=getattr(torch, origin.dtype), **where)
        target = None if config.target_encoder is None else origin.sources[-1].load_weights(config.target_encoder)
        model = cls(config, first.load_weights(config.encoder), target)
        return model._loaded_from(origin.kind, origin.sources)

    def _loaded_from(self, kind: str, sources: tuple[TowerSource, ...]) -> Self:
        weights = hash_base([self.encoder, self.separate_target_encoder])
        self.origin = ModelOrigin(kind, tuple(one.pinned() for one in sources), weights, self.base_dtype)
        return self.eval()

    @property
    def base_dtype(self) -> str:
        """Name of the type of the query tower's weights, without adapters."""
        found = (tensor.dtype for _, tensor in base_tensors(self.encoder) if tensor.is_floating_point())
        return str(next(found)).removeprefix("torch.")

    def _load_tokenizers(self, name: str, found: CheckedModel) -> None:
        loading = {**found.loading, "trust_remote_code": False}
        self.tokenizer = AutoTokenizer.from_pretrained(name, subfolder=found.subfolder, **loading)
        self.target_tokenizer = self.tokenizer
        if self.separate_target_encoder is not None:
            of_targets = found.part(TARGET_TOKENIZER_FOLDER)
            self.target_tokenizer = AutoTokenizer.from_pretrained(name, subfolder=of_targets, **loading)

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration, tokenizers and, under ``corrector/``, the corrector for use by itself.

        A model with an adapter is saved as the adapter and a note of what is under it.

        Args:
            save_directory: Folder to write to.
            args: Handed to transformers' ``save_pretrained``.
            kwargs: Handed to transformers' ``save_pretrained``.

        Raises:
            ConfigurationError: If the folder holds an adapter and this is a whole model, or the other way round; or if
                the adapter came with the encoder; or if the weights are in shards over processes, and their whole state
                is not given.
        """
        if kwargs.get("push_to_hub"):
            raise ConfigurationError(
                "save_pretrained", expected="no push_to_hub: it would upload without tokenizer and corrector",
                got="push_to_hub=True", cure="Call model.push_to_hub(repo_id), which uploads all of them.",
            )  # fmt: skip
        if kwargs.get("state_dict") is None:
            refuse_shards(self, "save_pretrained")
        folder, is_main = Path(save_directory), kwargs.get("is_main_process", True)
        if adapted_layers(self):
            if not adapters_of(self):
                raise ConfigurationError(
                    "save_pretrained", expected="an adapter on the whole dual encoder", got="one inside of a tower",
                    cure="Put it on the encoder with PeftModel.from_pretrained, call merge_and_unload(), save that "
                    "with its tokenizer, and make the dual encoder from that folder.",
                )  # fmt: skip
            if is_main:
                check_folder(folder, adapted=True)
                write_adapter(folder, self)
                self.save_beside_adapter(folder, self.state_dict())
            return
        check_folder(folder, adapted=False)
        super().save_pretrained(save_directory, *args, **kwargs)
        if is_main:
            self._save_companions(folder)

    def own_card(self) -> str:
        """Return the card of the model where nothing is known of its training."""
        return card_of_dual_encoder({} if self.corrector is None else self.corrector.describe())

    def save_beside_adapter(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write what PEFT does not: projections, configuration, tokenizers, corrector, and what is under the adapter.

        Args:
            folder: Holds the adapter.
            state: State of this model.
        """
        add_heads(folder, state)
        self.config.save_pretrained(folder)
        self._save_companions(folder)
        if self.origin is not None:
            BaseNote(self.origin, self.base_dtype).save(folder)

    def _save_companions(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        if self.separate_target_encoder is not None and self.target_tokenizer is not None:
            self.target_tokenizer.save_pretrained(folder / TARGET_TOKENIZER_FOLDER)
        if self.corrector is not None:
            self.corrector.save_pretrained(folder / CORRECTOR_FOLDER)


def _target_source(
    source: TowerSource, target_name: str | None, found: SentenceTransformerSettings | None
) -> TowerSource:
    """Return where the target tower comes from: another model, another route of the same, or as the query tower."""
    if target_name is not None:
        return TowerSource(target_name, None, "", source.num_hidden_layers)
    if found is not None and found.target_subfolder is not None:
        return replace(source, subfolder=found.target_subfolder)
    return source
