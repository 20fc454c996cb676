"""From texts to vectors outside of training: tokenise, batch by length, encode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_corrector.batching import DEFAULT_TOKEN_BUDGET, pad_tokens, token_budget_batches
from hf_corrector.errors import ConfigurationError, InputError
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig

Role = Literal["query", "target"]
Tokens = dict[str, torch.Tensor]


class TextEncodingMixin:
    """The part of a dual encoder that texts go through; the model itself embeds padded tokens.

    Attributes:
        tokenizer: Tokenizer of queries, and of targets unless they have their own.
        target_tokenizer: Tokenizer of targets.
    """

    config: DualEncoderConfig
    tokenizer: PreTrainedTokenizerBase | None
    target_tokenizer: PreTrainedTokenizerBase | None
    device: Any
    whole: Any

    def _tokenizer(self, role: Role) -> PreTrainedTokenizerBase:
        tokenizer = self.tokenizer if role == "query" else self.target_tokenizer
        if tokenizer is None:
            raise ConfigurationError(
                "DualEncoderModel", expected=f"a tokenizer for {role} texts", got="none",
                cure="Load the model with from_encoder or from_pretrained, or set model.tokenizer.",
            )  # fmt: skip
        return tokenizer

    def tokenize(self, texts: Sequence[str], role: Role) -> list[list[int]]:
        """Turn texts into token ids: prompt in front, special tokens around, cut to the role's maximum length.

        Raises:
            InputError: If one text is given, whose letters would be taken for texts.
        """
        if isinstance(texts, str):
            raise InputError("tokenize", expected="a list of texts", got=repr(texts[:40]), cure="Put it into a list.")
        is_query = role == "query"
        prompt = self.config.query_prompt if is_query else self.config.target_prompt
        length = self.config.query_max_length if is_query else self.config.target_max_length
        encoded = self._tokenizer(role)(
            [prompt + text for text in texts], truncation=True, max_length=length, padding=False,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def pad_token_id(self, role: Role) -> int:
        """Return the id short texts are padded with (any would do: padding is masked)."""
        token = self._tokenizer(role).pad_token_id
        return 0 if token is None else int(token)

    # Not inference_mode: its tensors could not be used in training, as targets of a corrector for instance.
    @torch.no_grad()
    def encode_tokens(
        self,
        token_lists: Sequence[Sequence[int]],
        role: Role,
        *,
        token_budget: int = DEFAULT_TOKEN_BUDGET,
        compute_dtype: str = "float32",
        progress: tqdm | None = None,
    ) -> torch.Tensor:
        """Encode tokenised texts in evaluation mode, in batches of similar length.

        A model in shards over processes (FSDP2) is gathered for it once, so all of them must call this or another
        ``encode_…``, with whatever texts.

        Args:
            token_lists: Token ids per text.
            role: Which tower and prompt the tokens were made for.
            token_budget: Tokens of a padded batch, at most.
            compute_dtype: ``"float32"``, or ``"bfloat16"`` / ``"float16"`` for autocast.
            progress: A bar that is advanced by the number of texts done.

        Returns:
            Embeddings in the order given, ``(n, dim)`` float32 on the CPU.

        Raises:
            InputError: If a text has no tokens.
        """
        whole = self.whole()
        lengths = np.asarray([len(tokens) for tokens in token_lists], dtype=np.int64)
        if len(lengths) and lengths.min() == 0:
            raise InputError(
                f"text {int(lengths.argmin())}", expected="at least one token", got="none",
                cure="Use a tokenizer that adds special tokens, or leave empty texts out.",
            )  # fmt: skip
        was_training, dtype = whole.training, getattr(torch, compute_dtype)
        whole.train(False)
        try:
            embeddings = torch.empty(len(token_lists), self.config.embedding_dim)
            for batch in token_budget_batches(lengths, token_budget):
                padded = pad_tokens([token_lists[one] for one in batch], self.pad_token_id(role))
                tokens = {name: tensor.to(self.device) for name, tensor in padded.items()}
                with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
                    embeddings[torch.from_numpy(batch)] = whole.embed(tokens, role).cpu()
                if progress is not None:
                    progress.update(len(batch))
        finally:
            whole.train(was_training)
        return embeddings

    def encode_query(
        self, texts: str | Sequence[str], *, compute_dtype: str = "float32", show_progress_bar: bool = False
    ) -> torch.Tensor:
        """Encode queries; returns ``(n, dim)`` float32 on the CPU, or ``(dim,)`` for a single string."""
        return self._encode_texts(texts, "query", compute_dtype, show_progress_bar)

    def encode_target(
        self, texts: str | Sequence[str], *, compute_dtype: str = "float32", show_progress_bar: bool = False
    ) -> torch.Tensor:
        """Encode targets; returns ``(n, dim)`` float32 on the CPU, or ``(dim,)`` for a single string."""
        return self._encode_texts(texts, "target", compute_dtype, show_progress_bar)

    def _encode_texts(
        self, texts: str | Sequence[str], role: Role, compute_dtype: str, show_progress_bar: bool
    ) -> torch.Tensor:
        many = [texts] if isinstance(texts, str) else list(texts)
        with tqdm(total=len(many), desc=f"encode {role} texts", disable=not show_progress_bar, unit="text") as bar:
            tokens = self.tokenize(many, role) if many else []
            embeddings = self.encode_tokens(tokens, role, compute_dtype=compute_dtype, progress=bar)
        return embeddings[0] if isinstance(texts, str) else embeddings
