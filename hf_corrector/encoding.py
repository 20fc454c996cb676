"""Bridge between encoder, texts and cache: tokenise a corpus once, encode it into a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from hf_corrector._files import hash_strings
from hf_corrector.batching import DEFAULT_TOKEN_BUDGET
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import CachePlan, CacheWriter
from hf_corrector.data.retrieval import column, texts_hash
from hf_corrector.data.tokens import TokenStore, token_store_key
from hf_corrector.errors import CacheMismatchError, ConfigurationError
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.text_encoding import Role
from hf_corrector.records import EncoderFingerprint

TOKENS_FOLDER = "tokens"
# Sorting by length within so many texts already leaves little padding, and bounds what a crash costs.
DEFAULT_SHARD_ROWS = 65_536


@dataclass(frozen=True)
class EncodeOptions:
    """How a corpus is encoded.

    Attributes:
        cache_dtype: Type the rows are stored in: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        compute_dtype: Arithmetic of the encoder: ``"float32"``, or another for autocast.
        token_budget: Tokens of a padded batch, at most.
        shard_rows: Rows of a shard; a build that was killed starts again at the last unfinished shard.
        progress: Whether to show progress bars.
    """

    cache_dtype: str = "float32"
    compute_dtype: str = "float32"
    token_budget: int = DEFAULT_TOKEN_BUDGET
    shard_rows: int = DEFAULT_SHARD_ROWS
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        for name in ("token_budget", "shard_rows"):
            if getattr(self, name) < 1:
                raise ConfigurationError(
                    name, expected="at least 1", got=str(getattr(self, name)), cure="Leave it out, or raise it."
                )


@dataclass(frozen=True)
class CacheBuild:
    """A finished cache and what it took.

    Attributes:
        cache: The cache, open.
        encoded: Targets encoded by this call; fewer than the cache holds where a killed build was taken up again.
    """

    cache: TargetCache
    encoded: int


def tokenize_texts(
    model: DualEncoderModel, texts: Sequence[str], role: Role, path: Path, *, progress: bool = True
) -> TokenStore:
    """Tokenise texts into a memory-mapped store, or open the one that is there.

    Args:
        model: Whose tokenizer, prompt and maximum length to use.
        texts: What to tokenise.
        role: Whether they are queries or targets.
        path: Folder of the store.
        progress: Whether to show a progress bar.

    Raises:
        CacheMismatchError: If ``path`` holds the tokens of another tokenizer, prompt, length or of other texts.
    """
    key = _token_key(model.fingerprint(role), texts)
    return TokenStore.open_or_build(path, texts, lambda batch: model.tokenize(batch, role), key=key, progress=progress)


def _token_key(made_by: EncoderFingerprint, texts: Sequence[str]) -> str:
    return token_store_key(
        tokenizer=made_by.tokenizer, prompt=made_by.prompt, max_length=made_by.max_length,
        texts_hash=hash_strings(texts),
    )  # fmt: skip


def build_cache(
    model: DualEncoderModel, corpus: Dataset, path: Path, *, tokens: TokenStore | None = None,
    options: EncodeOptions | None = None, generation: int = 0,
) -> CacheBuild:  # fmt: skip
    """Encode a corpus into a cache, or finish a build that was interrupted.

    Args:
        model: The encoder; its fingerprint is stored with the vectors.
        corpus: Targets with columns ``id`` and ``text``.
        path: Folder of the cache.
        tokens: The tokenised corpus; made under ``path`` if not given.
        options: How to encode.
        generation: Number of the cache within a run that refreshes it.

    Raises:
        CacheMismatchError: If ``path`` holds a cache, or part of one, of another encoder or other texts, or ``tokens``
            are not those of this encoder and these texts.
    """
    options = EncodeOptions() if options is None else options
    plan = CachePlan(
        ids=column(corpus, "id"), dim=model.config.embedding_dim, dtype=options.cache_dtype,
        fingerprint=model.fingerprint("target", compute_dtype=options.compute_dtype),
        texts_hash=texts_hash(corpus), shard_rows=options.shard_rows, generation=generation,
    )  # fmt: skip
    with CacheWriter(path, plan) as writer:
        pending, total = writer.pending_shards(), 0
        if pending:
            store = _tokens_of(
                model, column(corpus, "text"), given=tokens, plan=plan, path=path, progress=options.progress
            )
            total = sum(shard.stop - shard.start for shard in pending)
            with tqdm(total=total, desc="encode targets", unit="text", disable=not options.progress) as bar:
                for shard in pending:
                    rows = np.arange(shard.start, shard.stop)
                    writer.write_shard(shard.index, encode_rows(model, store, rows, options=options, bar=bar))
        return CacheBuild(writer.finish(), total)


def _tokens_of(
    model: DualEncoderModel, texts: Sequence[str], *, given: TokenStore | None, plan: CachePlan, path: Path,
    progress: bool,
) -> TokenStore:  # fmt: skip
    """Return the tokens to encode, made after the cache itself was found to fit, whose error says more."""
    if given is None:
        return tokenize_texts(model, texts, "target", path / TOKENS_FOLDER, progress=progress)
    key = _token_key(plan.fingerprint, texts)
    if given.key != key:
        raise CacheMismatchError(
            str(given.path), expected=f"tokens of {plan.fingerprint.name} with the key {key}",
            got=f"the key {given.key}", cure="Tokenise these texts with this model, see tokenize_texts().",
        )  # fmt: skip
    return given


def encode_rows(
    model: DualEncoderModel,
    tokens: TokenStore,
    rows: np.ndarray,
    *,
    role: Role = "target",
    options: EncodeOptions,
    bar: tqdm | None = None,
) -> torch.Tensor:
    """Encode some rows of a token store, ``(n, dim)`` float32 on the CPU."""
    return model.encode_tokens(
        tokens.tokens(rows), role, token_budget=options.token_budget, compute_dtype=options.compute_dtype, progress=bar
    )
