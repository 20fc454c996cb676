"""What a batch of queries is contrasted with, and the loss of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.utils.generic import ModelOutput

from hf_corrector.errors import ConfigurationError
from hf_corrector.losses import distillation_loss, truncated_softmax_loss
from hf_corrector.models.text_encoding import Tokens


@dataclass(frozen=True)
class SampledTargets:
    """The targets a batch of queries is contrasted with: the columns of its scores.

    Without ``vectors`` and ``gather`` the columns are the batch's positives, then the targets of ``tokens``.

    Attributes:
        tokens: ``input_ids`` and ``attention_mask`` of further targets that this process encodes, ``(m, length)``; None
            if there are none.
        allowed: Which columns count for which query, ``(batch, columns)`` bool.
        log_proposal: Log of the expected number of draws, ``(batch, columns)``, or None for no sampling correction.
        labels: Column of each query's own positive, ``(batch,)`` int64; None where it is the query's own number.
        label_weights: Distribution over the columns that each query is to have, for several or graded positives,
            ``(batch, columns)`` float32 whose rows sum to 1; None for all of it on the label.
        teacher_scores: Scores a teacher gave, ``(batch, columns)`` float32, NaN where it said nothing.
        vectors: All columns as they are, ``(columns, dim)``: no target is encoded, and none gets a gradient.
        gather: From the target embeddings of this process, ``(n, dim)``, to all columns ``(columns, dim)``, those of
            other processes included; must let gradients through.
    """

    tokens: Tokens | None
    allowed: torch.Tensor
    log_proposal: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    label_weights: torch.Tensor | None = None
    teacher_scores: torch.Tensor | None = None
    vectors: torch.Tensor | None = None
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        """Refuse targets to encode beside vectors that are to be taken as they are (ConfigurationError)."""
        if self.vectors is not None and (self.tokens is not None or self.gather is not None):
            raise ConfigurationError(
                "SampledTargets", expected="either vectors, or tokens and gather", got="both",
                cure="Leave out tokens and gather where all columns are given as vectors.",
            )  # fmt: skip


@dataclass
class DualEncoderOutput(ModelOutput):
    """What one training step computes.

    Attributes:
        loss: Mean truncated softmax loss, plus the weighted distillation loss where one was asked for; scalar.
        query_embeddings: ``(batch, dim)``.
        target_embeddings: All columns, see :class:`SampledTargets`; ``(columns, dim)``.
    """

    loss: torch.Tensor | None = None
    query_embeddings: torch.Tensor | None = None
    target_embeddings: torch.Tensor | None = None


@dataclass(frozen=True)
class Distillation:
    """How much a teacher's scores count.

    Attributes:
        weight: Factor of the distillation loss, which is added to the softmax loss.
        temperature: The teacher's and the model's logits are divided by it.
    """

    weight: float = 0.0
    temperature: float = 1.0


def contrastive_loss(
    queries: torch.Tensor,
    targets: torch.Tensor,
    *,
    sampled: SampledTargets | None,
    scale: float,
    distillation: Distillation,
) -> torch.Tensor:
    """Compute the mean loss of a batch, in float32 under any autocast.

    Args:
        queries: Query embeddings, ``(batch, dim)``.
        targets: All columns, ``(columns, dim)``.
        sampled: Which of them count and how; without it each query is contrasted with all positives of the batch.
        scale: Inverse temperature β of the softmax.
        distillation: How much the teacher's scores count, where there are any.

    Returns:
        A scalar.
    """
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.float() @ targets.float().T
        if sampled is None:
            sampled = SampledTargets(None, torch.ones_like(scores, dtype=torch.bool))
        labels = torch.arange(len(queries), device=scores.device) if sampled.labels is None else sampled.labels
        losses = truncated_softmax_loss(
            scores, labels, sampled.allowed, scale=scale, log_proposal=sampled.log_proposal,
            label_weights=sampled.label_weights,
        )  # fmt: skip
        if distillation.weight and sampled.teacher_scores is not None:
            losses = losses + distillation.weight * distillation_loss(
                scores, sampled.teacher_scores, scale=scale, temperature=distillation.temperature
            )
        return losses.mean()
