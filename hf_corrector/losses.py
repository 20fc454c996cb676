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
    label_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the truncated softmax loss −log P̃(y*|x) over a subset S(x) of the targets (arXiv 2409.01890).

    With S the whole target set this is the full softmax loss.

    With ``label_weights`` w it is the cross entropy −Σ_y w(y) log P̃(y|x) against several positives: for equal weights
    the form of Khosla et al., "Supervised Contrastive Learning" (arXiv 2004.11362), equation 2, for graded ones the
    top-one cross entropy of Cao et al., "Learning to Rank" (ListNet, ICML 2007). Every positive stays in the
    denominator, so that positives also compete with each other, and the loss is smallest, the entropy of w, where the
    softmax is w itself. One positive of weight 1 gives the plain loss.

    Args:
        scores: Inner products of queries and freshly encoded targets, ``(batch, m)``; computed in float32.
        labels: Column of each query's positive, ``(batch,)`` int64.
        allowed: Which columns belong to S(x) ∪ {y*}, ``(batch, m)`` bool; the label's own column and those of a weight
            above 0 always count.
        scale: Inverse temperature β.
        log_proposal: Log of the expected number of times each column was drawn, ``(batch, m)``; subtracted from the
            logits of all columns but the positives', which makes the loss a sampled estimate of the full softmax.
        label_weights: Distribution of each query's positives over the columns, ``(batch, m)``, at least 0, rows
            summing to 1; None puts all weight on the label.

    Returns:
        One loss per query, ``(batch,)`` float32.
    """
    logits = scale * scores.float()
    own = F.one_hot(labels, scores.shape[1]).bool()
    if label_weights is not None:
        own = own | (label_weights > 0)
    if log_proposal is not None:
        logits = torch.where(own, logits, logits - log_proposal.float())
    logits = logits.masked_fill(~(allowed | own), float("-inf"))
    if label_weights is None:
        return F.cross_entropy(logits, labels, reduction="none")
    # Columns outside S(x) have a log-probability of −inf, which times a weight of 0 would be NaN.
    log_probs = F.log_softmax(logits, dim=1).masked_fill(~own, 0.0)
    return -(label_weights.float() * log_probs).sum(dim=1)


def distillation_loss(
    scores: torch.Tensor, teacher_scores: torch.Tensor, *, scale: float, temperature: float
) -> torch.Tensor:
    """Compute T² · KL(teacher ‖ student) between the softmaxes over the columns a teacher scored.

    The teacher's is softmax(teacher_scores / T), the student's softmax(scale · scores / T). The temperature divides
    both and T² keeps the size of the gradient, as in Hinton et al. (arXiv 1503.02531) and in sentence-transformers'
    ``DistillKLDivLoss``, of which this is the value of one query where ``scale`` is 1. A teacher whose scores lie
    further apart than about 100 T gives one column all of its probability, and says no more than a label.

    Args:
        scores: Inner products of queries and freshly encoded targets, ``(batch, m)``; computed in float32.
        teacher_scores: What the teacher gave them, ``(batch, m)``, NaN where it said nothing; no gradient flows into
            them.
        scale: Inverse temperature β of the student's own softmax.
        temperature: T, above 0, for both.

    Returns:
        One loss per query, ``(batch,)`` float32; 0, with no gradient, where fewer than two columns are scored.
    """
    teacher_scores = teacher_scores.detach().float()
    scored = ~torch.isnan(teacher_scores)
    enough = scored.sum(dim=1, keepdim=True) >= 2
    # Rows with too few scores keep all their columns: a softmax over none is NaN, and so would be its gradient.
    outside = ~scored & enough
    student = (scale / temperature * scores.float()).masked_fill(outside, float("-inf"))
    teacher = torch.nan_to_num(teacher_scores / temperature).masked_fill(outside, float("-inf"))
    teacher_log_probs, student_log_probs = F.log_softmax(teacher, dim=1), F.log_softmax(student, dim=1)
    gap = (teacher_log_probs - student_log_probs).masked_fill(~(scored & enough), 0.0)
    return temperature**2 * (teacher_log_probs.exp() * gap).sum(dim=1)


def corrector_loss(corrected: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared distance ‖h(g'(y)) − g(y)‖² between corrected and fresh embeddings.

    Args:
        corrected: Output of the corrector, ``(n, dim)``.
        fresh: Re-encoded targets, ``(n, dim)``; no gradient flows into them.

    Returns:
        A scalar, float32.
    """
    return (corrected.float() - fresh.detach().float()).pow(2).sum(dim=-1).mean()
