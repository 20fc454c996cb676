"""The dual encoder: queries and targets into one space, and the truncated softmax loss between them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_corrector._files import hash_strings
from hf_corrector.errors import ConfigurationError
from hf_corrector.models.adapter_files import adapters_of, hash_adapters
from hf_corrector.models.chunked_embedding import embed_in_chunks
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig, hidden_size
from hf_corrector.models.contrast import Distillation, DualEncoderOutput, SampledTargets, contrastive_loss
from hf_corrector.models.hub_files import CORRECTOR_FOLDER, TARGET_TOKENIZER_FOLDER
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.sentence_transformers_export import save_dual_encoder
from hf_corrector.models.storage import StoredDualEncoder
from hf_corrector.models.text_encoding import Role, TextEncodingMixin, Tokens
from hf_corrector.models.towers import hash_architecture, hash_modules, hash_tokenizer, pool, tower_from_config
from hf_corrector.models.whole_weights import WeightlessCopy, refuse_shards, with_whole_weights
from hf_corrector.records import EncoderFingerprint

__all__ = ["CORRECTOR_FOLDER", "TARGET_TOKENIZER_FOLDER", "DualEncoderModel", "DualEncoderOutput", "SampledTargets"]


class DualEncoderModel(TextEncodingMixin, StoredDualEncoder):
    """Encode queries and targets into one space, with shared or separate towers.

    Attributes:
        tokenizer: Tokenizer of queries, and of targets unless they have their own.
        target_tokenizer: Tokenizer of targets.
        corrector: The corrector trained along, or None.
        origin: What it was loaded from, by which a model under an adapter is made again; None if it was not.
        weightless: The model without its weights, once it is about to be put in shards over processes (FSDP2).
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
        self.origin = None
        self.weightless: WeightlessCopy | None = None
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

    def prepare_for_shards(self) -> None:
        """Remember the model's form, so that it can encode between the steps of a run that puts it in shards."""
        shared = (self.config, self.tokenizer, self.target_tokenizer, self.corrector, self.origin)
        self.weightless = None
        self.weightless = WeightlessCopy.of(self, shared)

    def whole(self) -> Self:
        """Return the model itself, or a copy with whole weights where it is in shards: all processes must call this."""
        return with_whole_weights(self, self.weightless)

    def fingerprint(self, role: Role, *, compute_dtype: str = "float32") -> EncoderFingerprint:
        """Return everything that changes the vectors of one role; see :class:`EncoderFingerprint`.

        Of a model in shards it must be asked for by all processes.
        """
        config, is_query = self.config, role == "query"
        tower = self.encoder if is_query else self.target_encoder
        head = self.projection if is_query or self.target_projection is None else self.target_projection
        adapters = hash_adapters([tower, head], adapters_of(self))
        return EncoderFingerprint(
            name=str(config.name_or_path),
            weights=hash_strings(
                [
                    hash_modules([tower, head]),
                    hash_architecture(tower.config),
                    *([] if adapters is None else [adapters]),
                ]
            ),
            tokenizer=hash_tokenizer(self._tokenizer(role)),
            prompt=config.query_prompt if is_query else config.target_prompt,
            max_length=config.query_max_length if is_query else config.target_max_length,
            pooling=config.pooling,
            normalize=config.normalize,
            role=role,
            compute_dtype=compute_dtype,
            revision=None if self.origin is None else self.origin.sources[0].revision,
        )

    def save_as_sentence_transformer(self, path: str | Path) -> Path:
        """Write a sentence-transformers model that makes the same vectors and loads without this package.

        ``SentenceTransformer(path).encode_query`` and ``.encode_document`` are then what :meth:`encode_query` and
        :meth:`encode_target` are here: prompts, lengths, pooling, projection and normalisation go along, and separate
        towers become a ``Router``. The corrector does not, as fresh vectors need none.

        Args:
            path: A new or empty folder.

        Returns:
            The folder.

        Raises:
            ConfigurationError: If the folder holds something, or the model carries an adapter or is in shards.
            MissingDependencyError: If sentence-transformers is not installed.
        """
        refuse_shards(self, "save_as_sentence_transformer")
        return save_dual_encoder(self, path)

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
        positives: Tokens | None = None,
        candidate_fn: Callable[[torch.Tensor], SampledTargets] | None = None,
        *,
        mini_batch_size: int | None = None,
        distillation_weight: float = 0.0,
        distillation_temperature: float = 1.0,
    ) -> DualEncoderOutput:
        """Encode queries and their targets and compute the truncated softmax loss between them.

        All encoding of a step happens in this one call, so that wrappers which synchronise gradients see one forward.

        Args:
            queries: Tokens of the queries, ``(batch, length)``.
            positives: Tokens of one positive per query, ``(batch, length)``; not read where ``candidate_fn`` returns
                all columns as vectors.
            candidate_fn: Given the detached query embeddings ``(batch, dim)``, returns which further targets to
                encode and which columns count for which query; without it the other queries' positives all do.
            mini_batch_size: Encode so many texts at a time and keep no activations, see :func:`embed_in_chunks`; all
                at once if not given.
            distillation_weight: Factor of the distillation loss, where ``candidate_fn`` returns a teacher's scores.
            distillation_temperature: What the teacher's and the model's logits are divided by for it.

        Returns:
            Loss and embeddings, see :class:`DualEncoderOutput`.

        Raises:
            ConfigurationError: If there are neither positives nor vectors, or ``mini_batch_size`` is less than 1.
        """
        query_embeddings = self.embed_in_parts(queries, "query", mini_batch_size=mini_batch_size)
        with torch.autocast(query_embeddings.device.type, enabled=False):
            # Which targets are drawn must not depend on the rounding of half-precision scores.
            sampled = None if candidate_fn is None else candidate_fn(query_embeddings.detach().float())
        target_embeddings = self._columns(positives, sampled, mini_batch_size)
        loss = contrastive_loss(
            query_embeddings, target_embeddings, sampled=sampled, scale=self.config.scale,
            distillation=Distillation(distillation_weight, distillation_temperature),
        )  # fmt: skip
        return DualEncoderOutput(loss, query_embeddings, target_embeddings)

    def embed_in_parts(self, tokens: Tokens, role: Role, *, mini_batch_size: int | None) -> torch.Tensor:
        """Encode padded tokens so many at a time, see :func:`embed_in_chunks`; all at once if None."""
        if mini_batch_size is None:
            return self.embed(tokens, role)
        return embed_in_chunks(lambda chunk: self.embed(chunk, role), tokens, mini_batch_size)

    def _columns(
        self, positives: Tokens | None, sampled: SampledTargets | None, mini_batch_size: int | None
    ) -> torch.Tensor:
        """Return the embeddings of all columns, ``(columns, dim)`` float32."""
        if sampled is not None and sampled.vectors is not None:
            return sampled.vectors.detach().float()
        if positives is None:
            raise ConfigurationError(
                "DualEncoderModel.forward", expected="positives, or all columns as vectors", got="neither",
                cure="Pass the tokens of one positive per query.",
            )  # fmt: skip
        embeddings = self.embed_in_parts(positives, "target", mini_batch_size=mini_batch_size)
        if sampled is not None and sampled.tokens is not None:
            further = self.embed_in_parts(sampled.tokens, "target", mini_batch_size=mini_batch_size)
            embeddings = torch.cat([embeddings, further])
        return embeddings if sampled is None or sampled.gather is None else sampled.gather(embeddings)

    def floating_point_ops(self, inputs: dict[str, Any], exclude_embeddings: bool = True) -> int:
        """Estimate the operations of a step on its queries and positives (sampled targets are not known here)."""
        texts = [inputs[name] for name in ("queries", "positives") if inputs.get(name) is not None]
        tokens = sum(one["input_ids"].numel() for one in texts)
        return 6 * tokens * self.num_parameters(exclude_embeddings=exclude_embeddings)
