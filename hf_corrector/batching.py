"""Which texts to encode together: batches of similar length under a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

DEFAULT_TOKEN_BUDGET = 4096


def token_budget_batches(
    lengths: npt.ArrayLike, token_budget: int = DEFAULT_TOKEN_BUDGET
) -> list[npt.NDArray[np.int64]]:
    """Group texts of similar length so that no padded batch exceeds a budget.

    Args:
        lengths: Tokens per text, ``(n,)``.
        token_budget: Largest ``rows × longest row`` of a batch, in tokens; a longer text forms a batch by itself.

    Returns:
        Positions of the texts, batch by batch, longest first, so that a lack of memory shows at once.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(int(sizes[order[start]]), 1)
        count = max(token_budget // longest, 1)
        batches.append(order[start : start + count])
        start += count
    return batches


def pad_tokens(token_lists: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad token lists on the right to the longest.

    Args:
        token_lists: Token ids; an empty list becomes padding under a mask of zeros.
        pad_token_id: What to pad with.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``(len(token_lists), longest)``, at least one column wide.
    """
    lengths = np.array([len(tokens) for tokens in token_lists], dtype=np.int64)
    width = max(int(lengths.max(initial=0)), 1)
    mask = np.arange(width) < lengths[:, None]
    ids = np.full((len(token_lists), width), pad_token_id, dtype=np.int64)
    for row, tokens in enumerate(token_lists):
        ids[row, : len(tokens)] = tokens
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
