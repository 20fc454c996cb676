"""How near a step's sampler was to the exact softmax, from the targets the step has encoded anyway."""

from __future__ import annotations

import numpy as np
import torch

from hf_corrector.sampling.fidelity import EncodedTargets, estimate_total_variation
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.target_choice import Choice


def sampling_variation(
    choice: Choice, seen: torch.Tensor, fresh: torch.Tensor, *, scale: float, args: DualEncoderTrainingArguments,
    num_targets: int,
) -> torch.Tensor:  # fmt: skip
    """Estimate the total variation between what negatives were drawn from and the exact softmax.

    Args:
        choice: The targets of the step; its sampler must know a normaliser.
        seen: Their vectors as the sampler saw them, ``(columns, dim)``.
        fresh: Their vectors by the current encoder, ``(columns, dim)``.
        scale: Inverse temperature β.
        args: Arguments of the run.
        num_targets: Number of all targets.

    Returns:
        One estimate per query, ``(batch,)``; none where the sampler has no normaliser.
    """
    if choice.sampled is None or choice.sampled.log_normalizer is None:
        return torch.zeros(0, dtype=torch.float64)
    rows, queries = choice.contrast.rows.numpy(), choice.queries.to(fresh.device)
    # A target encoded in two columns, as the positive of two queries, counts once.
    distinct, first = np.unique(rows, return_index=True)
    columns = torch.from_numpy(first).to(fresh.device)
    known = choice.excluded.listed(np.broadcast_to(distinct, (len(queries), len(distinct))))
    hidden, scores = torch.from_numpy(known).to(fresh.device), queries @ seen[columns].T
    ceiling = choice.sampled.excluded.ceiling
    if ceiling is not None:
        # What a filter keeps from being drawn is left out of both distributions.
        hidden = hidden | (scores > ceiling.to(fresh.device)[:, None])
    encoded = EncodedTargets(
        sampled_scores=scores,
        fresh_scores=queries @ fresh[columns].T,
        excluded=hidden,
        certain=choice.contrast.certain[torch.from_numpy(first)].to(fresh.device),
        log_normalizer=choice.sampled.log_normalizer.to(fresh.device),
    )
    by_chance = args.num_negatives * args.uniform_fraction
    return estimate_total_variation(
        encoded, scale=scale, draws=args.num_negatives - by_chance, uniform_draws=by_chance, num_targets=num_targets
    )
