"""How near the distribution negatives are drawn from is to the exact softmax, judged by the targets of one step.

A step encodes some targets anew, and how likely each was to be among them is known. Weighted by the inverse of that
(Horvitz and Thompson 1952), they stand for all targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EncodedTargets:
    """The targets a step encoded, and what is known of how they came to be among them.

    Attributes:
        sampled_scores: Their scores as the sampler saw them, ``(batch, m)``.
        fresh_scores: Their scores by the current encoder, ``(batch, m)``.
        excluded: Which were out of the question for which query, ``(batch, m)`` bool.
        certain: Which would have been encoded whatever was drawn, ``(m,)`` bool: the positives of the batch.
        log_normalizer: Of the sampler's softmax, ``(batch,)``.
    """

    sampled_scores: torch.Tensor
    fresh_scores: torch.Tensor
    excluded: torch.Tensor
    certain: torch.Tensor
    log_normalizer: torch.Tensor


def estimate_total_variation(
    encoded: EncodedTargets, *, scale: float, draws: float, uniform_draws: float, num_targets: int
) -> torch.Tensor:
    """Estimate the total variation between the sampler's softmax and the exact one, known positives left out.

    It is an estimate from some hundred targets: biased upwards by noise where few were drawn, and blind to targets
    that neither chance nor the sampler showed. Means over many steps are what to read.

    Args:
        encoded: The targets of a step.
        scale: Inverse temperature β.
        draws: Draws per query from the softmax.
        uniform_draws: Uniform draws per query.
        num_targets: Number of all targets.

    Returns:
        One estimate per query in [0, 1], ``(batch,)`` float64.
    """
    hidden = encoded.excluded
    log_sampled = scale * encoded.sampled_scores.double() - encoded.log_normalizer.double()[:, None]
    sampled = torch.exp(log_sampled).clamp(max=1.0).masked_fill(hidden, 0.0)
    # The chance that no query of the batch drew a target; draws without replacement are a little more spread.
    missed = (draws * torch.log1p(-sampled.clamp(max=1 - 1e-12))).sum(dim=0)
    missed = missed + len(sampled) * uniform_draws * torch.log1p(torch.tensor(-1.0 / max(num_targets, 2)).double())
    chance = torch.where(encoded.certain, torch.ones_like(missed), -torch.expm1(missed)).clamp(min=1e-12)
    weights = (1.0 / chance).clamp(max=float(num_targets))
    fresh = (scale * encoded.fresh_scores.double()).masked_fill(hidden, -torch.inf)
    first = weights * sampled
    second = torch.softmax(fresh + torch.log(weights), dim=1)
    return 0.5 * (first / first.sum(dim=1, keepdim=True).clamp(min=1e-300) - second).abs().sum(dim=1)
