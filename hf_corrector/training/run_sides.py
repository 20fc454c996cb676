"""The side features a run's corrector reads, stored once whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch

from hf_corrector._distributed import on_main
from hf_corrector.cache.side_store import open_side, save_dense, save_side, side_details, stored_sides
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.whole_weights import whole_tensor
from hf_corrector.shared_writing import seen_by_all
from hf_corrector.side_features import DenseSide, SideFeatures, TokenCounts, mean_word_embeddings

_MEAN_ROWS = 65_536


def side_of(cache: TargetCache, model: DualEncoderModel, kind: str | None) -> SideFeatures | None:
    """Open the side features a run's corrector reads; word embeddings are stored when they are first asked for.

    Raises:
        CacheError: If the cache holds none of that kind.
    """
    if kind is None:
        return None
    embeddings = cast(torch.nn.Embedding, model.target_encoder.get_input_embeddings()).weight
    # By every process, as weights in shards are gathered for it.
    table = whole_tensor(embeddings) if kind == "word_embeddings" else embeddings

    def store() -> None:
        if kind == "word_embeddings" and kind not in stored_sides(cache):
            counts = cast(TokenCounts, open_side(cache, "tokens"))
            save_dense(cache, _mean_blocks(counts, table), kind=kind, width=table.shape[1])

    on_main("storing side features", store)
    return seen_by_all(cache.path, lambda: open_side(cache, kind))


def carry_side(before: TargetCache, after: TargetCache, kind: str) -> None:
    """Store in a refreshed cache the side features of the one before it, whose rows are the same targets."""

    def store() -> None:
        save_side(after, open_side(before, kind), details=side_details(before, kind))

    on_main("storing side features", store)


def _mean_blocks(counts: TokenCounts, table: torch.Tensor) -> Iterator[DenseSide]:
    for start in range(0, len(counts), _MEAN_ROWS):
        block = replace(counts, offsets=counts.offsets[start : start + _MEAN_ROWS + 1])
        yield mean_word_embeddings(block, table)
