"""Losses as functions of tensors."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def truncated_softmax_loss(
    scores: torch.Tensor,
    labels: torch.Tensor,
    allowed: torch.Tensor,
    *,
    scale: float,
    log_proposal: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the truncated softmax loss −log P̃(y*|x) over a subset S(x) of the targets (arXiv 2409.01890).

    With S the whole target set this is the full softmax loss.

    Args:
        scores: Inner products of queries and freshly encoded targets, ``(batch, m)``; computed in float32.
        labels: Column of each query's positive, ``(batch,)`` int64.
        allowed: Which columns belong to S(x) ∪ {y*}, ``(batch, m)`` bool; the label's own column always counts.
        scale: Inverse temperature β.
        log_proposal: Log of the expected number of times each column was drawn, ``(batch, m)``; subtracted from the
            logits of all columns but the label's, which makes the loss a sampled estimate of the full softmax.

    Returns:
        One loss per query, ``(batch,)`` float32.
    """
    logits = scale * scores.float()
    own = F.one_hot(labels, scores.shape[1]).bool()
    if log_proposal is not None:
        logits = torch.where(own, logits, logits - log_proposal.float())
    logits = logits.masked_fill(~(allowed | own), float("-inf"))
    return F.cross_entropy(logits, labels, reduction="none")


def corrector_loss(corrected: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared distance ‖h(g'(y)) − g(y)‖² between corrected and fresh embeddings.

    Args:
        corrected: Output of the corrector, ``(n, dim)``.
        fresh: Re-encoded targets, ``(n, dim)``; no gradient flows into them.

    Returns:
        A scalar, float32.
    """
    return (corrected.float() - fresh.detach().float()).pow(2).sum(dim=-1).mean()
