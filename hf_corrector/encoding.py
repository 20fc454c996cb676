"""Bridge between encoder, texts and cache: tokenise a corpus once, encode it into a cache, follow its changes.

In a run of several processes all of them call these functions. Texts are dealt to them in the batches one process would
make, so vectors have the same bits however many there are; rank 0 alone writes, and the folder must be seen by all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from hf_corrector._distributed import agree, all_gather_rows, is_main, naming_failures, on_main, rank, world_size
from hf_corrector._files import hash_strings
from hf_corrector.batching import DEFAULT_TOKEN_BUDGET, token_budget_batches
from hf_corrector.cache.edits import CacheEdit, CacheEditor
from hf_corrector.cache.manifest import check_fingerprint
from hf_corrector.cache.row_files import hash_texts
from hf_corrector.cache.side_store import open_side, save_counts, side_details, stored_sides
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import CachePlan
from hf_corrector.data.retrieval import column, texts_hash
from hf_corrector.data.tokens import TokenStore, token_store_key
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.text_encoding import Role
from hf_corrector.records import EncoderFingerprint
from hf_corrector.shared_writing import SharedWriter, seen_by_all
from hf_corrector.side_features import DEFAULT_BIGRAM_BUCKETS, TokenCounts

TOKENS_FOLDER = "tokens"
# Sorting by length within so many texts already leaves little padding, and bounds what a crash costs.
DEFAULT_SHARD_ROWS = 65_536
_COUNTED_ROWS = 8192
_NO_ROWS = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class EncodeOptions:
    """How a corpus is encoded.

    Attributes:
        cache_dtype: Type the rows are stored in: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        compute_dtype: Arithmetic of the encoder: ``"float32"``, or another for autocast.
        token_budget: Tokens of a padded batch, at most.
        shard_rows: Rows of a shard; a build that was killed starts again at the last unfinished shard.
        token_counts: Whether to store the targets' tokens with the cache, for correctors that read them.
        progress: Whether to show progress bars.
    """

    cache_dtype: str = "float32"
    compute_dtype: str = "float32"
    token_budget: int = DEFAULT_TOKEN_BUDGET
    shard_rows: int = DEFAULT_SHARD_ROWS
    token_counts: bool = True
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
        deleted: Rows this call took out of the cache.
    """

    cache: TargetCache
    encoded: int
    deleted: int = 0


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
        ConfigurationError: If another process does not see the folder.
    """
    key, made = _token_key(model.fingerprint(role), texts), list[TokenStore]()

    def make() -> None:
        made.append(
            TokenStore.open_or_build(path, texts, lambda batch: model.tokenize(batch, role), key=key, progress=progress)
        )

    on_main("tokenising texts", make)
    return seen_by_all(path, lambda: made[0] if made else TokenStore.open(path, key=key, verify="sizes"))


def _token_key(made_by: EncoderFingerprint, texts: Sequence[str]) -> str:
    return token_store_key(
        tokenizer=made_by.tokenizer, prompt=made_by.prompt, max_length=made_by.max_length,
        texts_hash=hash_strings(texts),
    )  # fmt: skip


def build_cache(
    model: DualEncoderModel, corpus: Dataset, path: str | Path, *, tokens: TokenStore | None = None,
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
    options, texts, path = EncodeOptions() if options is None else options, column(corpus, "text"), Path(path)
    plan = CachePlan(
        ids=column(corpus, "id"), dim=model.config.embedding_dim, dtype=options.cache_dtype,
        fingerprint=model.fingerprint("target", compute_dtype=options.compute_dtype),
        texts_hash=texts_hash(corpus), shard_rows=options.shard_rows, generation=generation,
        text_hashes=hash_texts(texts),
    )  # fmt: skip
    store = None
    with naming_failures("building a cache"), closing(SharedWriter(path, plan)) as writer:
        total = sum(shard.rows for shard in writer.pending)
        if writer.pending:
            store = _tokens_of(model, texts, given=tokens, plan=plan, path=path, progress=options.progress)
            hidden = not (options.progress and is_main())
            with tqdm(total=total, desc="encode targets", unit="text", disable=hidden) as bar:
                for shard in writer.pending:
                    rows = np.arange(shard.start, shard.stop)
                    writer.write_shard(shard.index, encode_rows(model, store, rows, options=options, bar=bar))
        cache = writer.finish()
    if options.token_counts and on_main("looking for token counts", lambda: "tokens" not in stored_sides(cache)):
        if store is None:
            store = _tokens_of(model, texts, given=tokens, plan=plan, path=path, progress=options.progress)
        _save_counts(cache, model, store)
    return CacheBuild(cache, total)


def _save_counts(cache: TargetCache, model: DualEncoderModel, store: TokenStore) -> None:
    details = count_details(cache.fingerprint)
    on_main("counting tokens", lambda: save_counts(cache, _counts_of(model, store), details=details))
    seen_by_all(cache.path, lambda: open_side(cache, "tokens"))


def update_cache(
    model: DualEncoderModel, corpus: Dataset, path: str | Path, *, options: EncodeOptions | None = None,
    trust_ids: bool = False,
) -> CacheBuild:  # fmt: skip
    """Make a cache follow its corpus: encode what is new or changed, drop what is gone, keep the rest as it is.

    Rows are those of the corpus again afterwards. Correctors fitted before stay right, as all vectors come from the
    same encoder. An update that was killed leaves the cache as it was, and is gone on with by the same call.

    Args:
        model: The encoder that made the cache.
        corpus: Targets with columns ``id`` and ``text``; those that stay have their old order among each other.
        path: Folder of the cache.
        options: How to encode; the stored type stays that of the cache.
        trust_ids: Take a target for unchanged if its id is, where the cache does not know its texts.

    Raises:
        CacheMismatchError: If another encoder made the cache, or its texts are not known and ids are not to be trusted.
        ConfigurationError: If several processes call it.
        DataError: If targets that stay were put into another order; names two of them.
    """
    if world_size() > 1:
        cure = "Update it before the run, in a process without a launcher."
        raise ConfigurationError("update_cache", expected="one process", got=str(world_size()), cure=cure)
    options, cache = EncodeOptions() if options is None else options, TargetCache.open(path)
    made_by = model.fingerprint("target", compute_dtype=options.compute_dtype)
    check_fingerprint(str(path), expected=made_by, got=cache.fingerprint)
    ids, texts = column(corpus, "id"), column(corpus, "text")
    hashes = hash_texts(texts)
    sources = _sources(cache, corpus, ids=ids, hashes=hashes, trust_ids=trust_ids)
    kept = int((sources >= 0).sum())
    if texts_hash(corpus) == cache.texts_hash and kept == len(sources) == len(cache):
        return CacheBuild(cache, 0)
    edit = CacheEdit(
        ids=ids, sources=sources, texts_hash=texts_hash(corpus), text_hashes=hashes, shard_rows=options.shard_rows
    )
    new, encoded, counts = edit.new_rows, 0, None
    with CacheEditor(cache, edit) as editor:
        if len(new):
            added = [texts[row] for row in new.tolist()]
            store = tokenize_texts(
                model, added, "target", editor.work_folder / TOKENS_FOLDER, progress=options.progress
            )
            pending = editor.pending_shards()
            encoded = sum(shard.rows for shard in pending)
            with tqdm(total=encoded, desc="encode targets", unit="text", disable=not options.progress) as bar:
                for shard in pending:
                    rows = np.arange(shard.start, shard.stop)
                    editor.write_shard(shard.index, encode_rows(model, store, rows, options=options, bar=bar))
            if "tokens" in stored_sides(cache):
                counts = _counts_like(cache, model, store)
        updated = editor.finish(counts=counts)
    shutil.rmtree(Path(path) / TOKENS_FOLDER, ignore_errors=True)  # of the corpus as it was; made again when needed
    return CacheBuild(updated, encoded, deleted=len(cache) - kept)


def _sources(
    cache: TargetCache, corpus: Dataset, *, ids: Sequence[str], hashes: np.ndarray, trust_ids: bool
) -> np.ndarray:
    """Return the row each target has in the cache, -1 for new and changed ones, ``(targets,)`` int64."""
    sources = cache.ids.find(ids)
    if cache.text_hashes is not None:
        found = sources >= 0
        changed = cache.text_hashes[sources[found]] != hashes[found]
        sources[np.flatnonzero(found)[changed]] = -1
    elif not trust_ids and not _begins_with(cache, corpus):
        raise CacheMismatchError(
            str(cache.path), expected="a cache that knows the texts of its rows, to see which have changed",
            got="one that knows their ids only",
            cure="Say with --trust_ids that targets with an old id have their old text, or build the cache again.",
        )  # fmt: skip
    kept = sources[sources >= 0]
    wrong = np.flatnonzero(np.diff(kept) < 0)
    if len(wrong):
        first, second = (cache.ids[int(row)] for row in kept[wrong[0] : wrong[0] + 2])
        raise DataError(
            "corpus", expected="old targets in their old order", got=f"{first!r} before {second!r}",
            cure="Leave them in the order of the cache and put new ones anywhere, or build another cache.",
        )  # fmt: skip
    return sources


def _begins_with(cache: TargetCache, corpus: Dataset) -> bool:
    """Say whether the first targets of a corpus are those of the cache, with their texts."""
    return len(corpus) >= len(cache) and texts_hash(corpus.select(range(len(cache)))) == cache.texts_hash


def _counts_of(
    model: DualEncoderModel, store: TokenStore, *, buckets: int = DEFAULT_BIGRAM_BUCKETS
) -> Iterator[TokenCounts]:
    """Count the tokens of some targets at a time, as lists of them take much memory."""
    for start in range(0, len(store), _COUNTED_ROWS):
        rows = np.arange(start, min(start + _COUNTED_ROWS, len(store)))
        yield TokenCounts.from_lists(store.tokens(rows), vocabulary=model.target_vocabulary, bigram_buckets=buckets)


def _counts_like(cache: TargetCache, model: DualEncoderModel, store: TokenStore) -> TokenCounts | None:
    """Count new targets as those of a cache were; None where another tokenizer counted those."""
    stored, details = open_side(cache, "tokens"), side_details(cache, "tokens")
    known = not details or details == count_details(cache.fingerprint)
    if not isinstance(stored, TokenCounts) or not known:
        return None
    return join_counts(list(_counts_of(model, store, buckets=stored.width - stored.vocabulary)))


def join_counts(blocks: Sequence[TokenCounts]) -> TokenCounts:
    """Put counts of one vocabulary under each other."""
    ends = np.cumsum([0, *(block.offsets[-1] for block in blocks)])
    offsets = [block.offsets[1:] + end for block, end in zip(blocks, ends[:-1], strict=True)]
    return replace(
        blocks[0], offsets=np.concatenate([np.zeros(1, dtype=np.int64), *offsets]),
        columns=np.concatenate([block.columns for block in blocks]),
        counts=np.concatenate([block.counts for block in blocks]),
    )  # fmt: skip


def count_details(made_by: EncoderFingerprint) -> dict[str, str | int]:
    """Return what decides the tokens of a text."""
    return {"tokenizer": made_by.tokenizer, "prompt": made_by.prompt, "max_length": made_by.max_length}


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
    """Encode some rows of a token store.

    Args:
        model: The encoder, with the same weights in every process.
        tokens: The tokenised texts.
        rows: Which to encode ``(n,)``, the same in every process.
        role: Whose tower to use.
        options: How to encode.
        bar: Advanced by the number of texts done.

    Returns:
        Embeddings in the order of ``rows``, ``(n, dim)`` float32 on the CPU, all of them in every process.

    Raises:
        InputError: If a text has no tokens.
        DistributedError: If another process has failed or is gone.
    """
    if world_size() == 1:
        return _encode_here(model, tokens, rows, role=role, options=options, bar=bar)
    batches = token_budget_batches(tokens.lengths[rows], options.token_budget)
    # Longest first, and each as large as the budget allows: some of the batches are cut into just these batches again.
    dealt = [np.concatenate([_NO_ROWS, *batches[one :: world_size()]]) for one in range(world_size())]
    own, error, encoded = rows[dealt[rank()]], None, torch.empty(0, model.config.embedding_dim)
    # Gathered where it is in shards before any process can fail by itself.
    model = model.whole()
    try:
        encoded = _encode_here(model, tokens, own, role=role, options=options, bar=bar)
    except Exception as caught:  # told to the others, who would wait for this process, and raised again
        error = caught
    agree("encoding", error)
    embeddings = torch.empty(len(rows), model.config.embedding_dim)
    for places, part in zip(dealt, all_gather_rows(encoded), strict=True):
        embeddings[torch.from_numpy(places)] = part
    if bar is not None:
        bar.update(len(rows) - len(own))
    return embeddings


def _encode_here(
    model: DualEncoderModel, tokens: TokenStore, rows: np.ndarray, *, role: Role, options: EncodeOptions,
    bar: tqdm | None,
) -> torch.Tensor:  # fmt: skip
    return model.encode_tokens(
        tokens.tokens(rows), role, token_budget=options.token_budget, compute_dtype=options.compute_dtype, progress=bar
    )
