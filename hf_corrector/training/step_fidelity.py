"""How near a step's sampler was to the exact softmax, from the targets the step has encoded anyway."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_corrector.candidate_sampling import Sampled
from hf_corrector.sampling import ExcludedRows
from hf_corrector.sampling.fidelity import EncodedTargets, estimate_total_variation


@dataclass(frozen=True)
class StepTargets:
    """The targets a step has encoded, on all processes, and how they came to be among them.

    Attributes:
        rows: Target rows, ``(columns,)`` int64 on the CPU; a target may have several columns.
        uniform: Which were drawn uniformly by some query, ``(columns,)`` bool on the CPU.
        certain: Which would be there whatever was drawn, ``(columns,)`` bool on the CPU.
        queries: Embeddings of the queries, ``(queries, dim)`` float32, detached.
        excluded: Targets out of the question for each of them.
        sampled: What the sampler knows; None where no score was looked at.
        draws: Draws per query from the softmax.
        uniform_draws: Uniform draws per query.
    """

    rows: torch.Tensor
    uniform: torch.Tensor
    certain: torch.Tensor
    queries: torch.Tensor
    excluded: ExcludedRows
    sampled: Sampled | None
    draws: float
    uniform_draws: float


def sampling_variation(
    step: StepTargets, seen: torch.Tensor, fresh: torch.Tensor, *, scale: float, num_targets: int
) -> torch.Tensor:
    """Estimate the total variation between what targets were drawn from and the exact softmax.

    Args:
        step: The targets of the step; its sampler must know a normaliser.
        seen: Their vectors as the sampler saw them, ``(columns, dim)``.
        fresh: Their vectors by the current encoder, ``(columns, dim)``.
        scale: Inverse temperature β.
        num_targets: Number of all targets.

    Returns:
        One estimate per query, ``(batch,)``; none where the sampler has no normaliser.
    """
    if step.sampled is None or step.sampled.log_normalizer is None:
        return torch.zeros(0, dtype=torch.float64)
    rows, queries = step.rows.numpy(), step.queries.to(fresh.device)
    # A target encoded in two columns, as the positive of two queries, counts once.
    distinct, first = np.unique(rows, return_index=True)
    columns = torch.from_numpy(first).to(fresh.device)
    known = step.excluded.listed(np.broadcast_to(distinct, (len(queries), len(distinct))))
    hidden, scores = torch.from_numpy(known).to(fresh.device), queries @ seen[columns].T
    ceiling = step.sampled.excluded.ceiling
    if ceiling is not None:
        # What a filter keeps from being drawn is left out of both distributions.
        hidden = hidden | (scores > ceiling.to(fresh.device)[:, None])
    encoded = EncodedTargets(
        sampled_scores=scores,
        fresh_scores=queries @ fresh[columns].T,
        excluded=hidden,
        certain=step.certain[torch.from_numpy(first)].to(fresh.device),
        log_normalizer=step.sampled.log_normalizer.to(fresh.device),
    )
    return estimate_total_variation(
        encoded, scale=scale, draws=step.draws, uniform_draws=step.uniform_draws, num_targets=num_targets
    )
