"""The dual encoder: queries and targets into one space, and the truncated softmax loss between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils.generic import ModelOutput

from hf_corrector._files import hash_strings
from hf_corrector.errors import ConfigurationError
from hf_corrector.losses import truncated_softmax_loss
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig, check_settings, hidden_size
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.sentence_transformers_format import SentenceTransformerSettings, read_settings
from hf_corrector.models.text_encoding import Role, TextEncodingMixin, Tokens
from hf_corrector.models.towers import (
    TowerSource,
    check_complete,
    check_length,
    hash_architecture,
    hash_modules,
    hash_tokenizer,
    longest_input,
    pool,
    tower_from_config,
)
from hf_corrector.records import EncoderFingerprint

CORRECTOR_FOLDER = "corrector"
TARGET_TOKENIZER_FOLDER = "target_tokenizer"
_LOADING_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only")
_LONGEST_DEFAULT = 512


@dataclass(frozen=True)
class SampledTargets:
    """The targets a batch of queries is contrasted with, beside its positives.

    Attributes:
        tokens: ``input_ids`` and ``attention_mask`` of the sampled targets, ``(m, length)``; None if there are none.
        allowed: Which of the batch's positives and of the sampled targets count for which query,
            ``(batch, batch + m)`` bool.
        log_proposal: Log of the expected number of draws, ``(batch, batch + m)``, or None for no sampling correction.
    """

    tokens: Tokens | None
    allowed: torch.Tensor
    log_proposal: torch.Tensor | None = None


@dataclass
class DualEncoderOutput(ModelOutput):
    """What one training step computes.

    Attributes:
        loss: Mean truncated softmax loss, scalar.
        query_embeddings: ``(batch, dim)``.
        target_embeddings: Positives, then sampled targets, ``(batch + m, dim)``.
    """

    loss: torch.Tensor | None = None
    query_embeddings: torch.Tensor | None = None
    target_embeddings: torch.Tensor | None = None


class DualEncoderModel(TextEncodingMixin, PreTrainedModel):
    """Encode queries and targets into one space, with shared or separate towers.

    Attributes:
        tokenizer: Tokenizer of queries, and of targets unless they have their own.
        target_tokenizer: Tokenizer of targets.
        corrector: The corrector trained along, or None.
    """

    config: DualEncoderConfig
    config_class = DualEncoderConfig
    base_model_prefix = "dual_encoder"
    main_input_name = "queries"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _keep_in_fp32_modules_strict = ["corrector"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(
        self,
        config: DualEncoderConfig,
        encoder: PreTrainedModel | None = None,
        target_encoder: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.encoder = tower_from_config(config.encoder) if encoder is None else encoder
        if config.target_encoder is not None and target_encoder is None:
            target_encoder = tower_from_config(config.target_encoder)
        # Absent rather than an alias when towers are shared: one module under two names cannot be saved.
        self.separate_target_encoder = target_encoder
        self.projection = self._projection(self.encoder)
        self.target_projection = None if target_encoder is None else self._projection(target_encoder)
        self.corrector = None if config.corrector is None else CorrectorModel(config.corrector)
        self.tokenizer = self.target_tokenizer = None
        self.post_init()

    def _projection(self, tower: PreTrainedModel) -> nn.Linear | None:
        if self.config.projection_dim is None:
            return None
        return nn.Linear(hidden_size(tower.config), self.config.projection_dim)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise what a checkpoint does not hold the way its owner does."""
        for owner in (self.encoder, self.separate_target_encoder, self.corrector):
            if owner is not None and module in set(owner.modules()):
                owner._init_weights(module)
                return
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Return the query tower's word embeddings."""
        return self.encoder.get_input_embeddings()

    @property
    def target_vocabulary(self) -> int:
        """Number of input embeddings of the target tower, one for each token."""
        return cast(nn.Embedding, self.target_encoder.get_input_embeddings()).num_embeddings

    @property
    def target_encoder(self) -> PreTrainedModel:
        """The target tower, which is the query tower where they are shared."""
        return self.encoder if self.separate_target_encoder is None else self.separate_target_encoder

    # ------------------------------------------------------------------ loading and saving

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
    ) -> DualEncoderModel:
        """Make a dual encoder from any Hugging Face encoder.

        Where ``name`` is a sentence-transformers model, its pooling, normalisation, prompts, projection and maximum
        length are taken over unless ``settings`` say otherwise.

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
        target_source = source if target_name is None else TowerSource(target_name, None, "", num_hidden_layers)
        separate = separate_towers or target_name is not None
        config, tokenizer = source.load_config(), source.load_tokenizer()
        target_config, target_tokenizer = target_source.load_config(), target_source.load_tokenizer()
        lengths = {
            "query_max_length": longest_input(config, tokenizer),
            "target_max_length": longest_input(target_config, target_tokenizer),
        }
        if found is None:
            lengths = {role: min(length, _LONGEST_DEFAULT) for role, length in lengths.items()}
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
        return model.eval()

    @torch.no_grad()
    def _set_projection(self, found: SentenceTransformerSettings) -> None:
        if found.projection is None:
            return
        weight, bias = found.projection
        for layer in (self.projection, self.target_projection):
            if layer is not None:
                layer.weight.copy_(weight)
                layer.bias.copy_(torch.zeros_like(layer.bias) if bias is None else bias)

    @classmethod
    def from_sentence_transformer(cls, path: str, *, revision: str | None = None, **settings: Any) -> DualEncoderModel:
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
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> DualEncoderModel:
        """Load a saved dual encoder with its tokenizers and, if it has one, its corrector.

        Args:
            name: Folder or Hub id.
            args: Handed to transformers' ``from_pretrained``.
            kwargs: Handed to transformers' ``from_pretrained``; ``dtype`` is float32 if not given.

        Raises:
            ConfigurationError: If the checkpoint lacks weights.
        """
        kwargs = {"dtype": torch.float32, **kwargs, "output_loading_info": True}
        loaded: Any = super().from_pretrained(name, *args, **kwargs)
        model: DualEncoderModel = loaded[0]
        check_complete(name, model, loaded[1])
        loading = {key: kwargs[key] for key in _LOADING_ARGUMENTS if key in kwargs}
        model.tokenizer = AutoTokenizer.from_pretrained(name, **loading)
        model.target_tokenizer = model.tokenizer
        if model.separate_target_encoder is not None:
            model.target_tokenizer = AutoTokenizer.from_pretrained(name, subfolder=TARGET_TOKENIZER_FOLDER, **loading)
        return model

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """Save weights, configuration, tokenizers and, under ``corrector/``, the corrector for use by itself.

        Args:
            save_directory: Folder to write to.
            args: Handed to transformers' ``save_pretrained``.
            kwargs: Handed to transformers' ``save_pretrained``.
        """
        if kwargs.get("push_to_hub"):
            raise ConfigurationError(
                "save_pretrained", expected="no push_to_hub: it would upload without tokenizer and corrector",
                got="push_to_hub=True", cure="Call model.push_to_hub(repo_id), which uploads all of them.",
            )  # fmt: skip
        super().save_pretrained(save_directory, *args, **kwargs)
        if not kwargs.get("is_main_process", True):
            return
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(save_directory)
        if self.separate_target_encoder is not None and self.target_tokenizer is not None:
            self.target_tokenizer.save_pretrained(f"{save_directory}/{TARGET_TOKENIZER_FOLDER}")
        if self.corrector is not None:
            self.corrector.save_pretrained(f"{save_directory}/{CORRECTOR_FOLDER}")

    def fingerprint(self, role: Role, *, compute_dtype: str = "float32") -> EncoderFingerprint:
        """Return everything that changes the vectors of one role; see :class:`EncoderFingerprint`."""
        config, is_query = self.config, role == "query"
        tower = self.encoder if is_query else self.target_encoder
        head = self.projection if is_query or self.target_projection is None else self.target_projection
        return EncoderFingerprint(
            name=str(config.name_or_path),
            weights=hash_strings([hash_modules([tower, head]), hash_architecture(tower.config)]),
            tokenizer=hash_tokenizer(self._tokenizer(role)),
            prompt=config.query_prompt if is_query else config.target_prompt,
            max_length=config.query_max_length if is_query else config.target_max_length,
            pooling=config.pooling,
            normalize=config.normalize,
            role=role,
            compute_dtype=compute_dtype,
            revision=getattr(config.encoder, "_commit_hash", None),
        )

    # ------------------------------------------------------------------ training

    def embed(self, tokens: Tokens, role: Role) -> torch.Tensor:
        """Encode padded tokens, with gradients.

        Args:
            tokens: ``input_ids`` and ``attention_mask``, each ``(batch, length)``.
            role: Which tower and projection to use.

        Returns:
            Embeddings, ``(batch, dim)`` float32 under any autocast.
        """
        tower = self.encoder if role == "query" else self.target_encoder
        head = self.projection if role == "query" or self.target_projection is None else self.target_projection
        states = tower(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
        with torch.autocast(states.device.type, enabled=False):
            pooled = pool(states, tokens["attention_mask"], self.config.pooling)
            pooled = pooled if head is None else head(pooled.to(head.weight.dtype)).float()
            return F.normalize(pooled, dim=-1) if self.config.normalize else pooled

    def forward(
        self,
        queries: Tokens,
        positives: Tokens,
        candidate_fn: Callable[[torch.Tensor], SampledTargets] | None = None,
    ) -> DualEncoderOutput:
        """Encode queries and their targets and compute the truncated softmax loss between them.

        All encoding of a step happens in this one call, so that wrappers which synchronise gradients see one forward.

        Args:
            queries: Tokens of the queries, ``(batch, length)``.
            positives: Tokens of one positive per query, ``(batch, length)``.
            candidate_fn: Given the detached query embeddings ``(batch, dim)``, returns which further targets to
                encode and which columns count for which query; without it the other queries' positives all do.

        Returns:
            Loss and embeddings, see :class:`DualEncoderOutput`.
        """
        query_embeddings = self.embed(queries, "query")
        batch = len(query_embeddings)
        with torch.autocast(query_embeddings.device.type, enabled=False):
            # Which targets are drawn must not depend on the rounding of half-precision scores.
            sampled = None if candidate_fn is None else candidate_fn(query_embeddings.detach().float())
        target_embeddings = self.embed(positives, "target")
        if sampled is not None and sampled.tokens is not None:
            target_embeddings = torch.cat([target_embeddings, self.embed(sampled.tokens, "target")])
        with torch.autocast(query_embeddings.device.type, enabled=False):
            scores = query_embeddings @ target_embeddings.T
            labels = torch.arange(batch, device=scores.device)
            allowed = torch.ones_like(scores, dtype=torch.bool) if sampled is None else sampled.allowed
            losses = truncated_softmax_loss(
                scores, labels, allowed, scale=self.config.scale,
                log_proposal=None if sampled is None else sampled.log_proposal,
            )  # fmt: skip
        return DualEncoderOutput(losses.mean(), query_embeddings, target_embeddings)

    def floating_point_ops(self, inputs: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Estimate the operations of a step on its queries and positives (sampled targets are not known here)."""
        tokens = sum(inputs[name]["input_ids"].numel() for name in ("queries", "positives"))
        return 6 * tokens * self.num_parameters(exclude_embeddings=exclude_embeddings)
