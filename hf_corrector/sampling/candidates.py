"""What every sampler returns and every loss takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Candidates:
    """Targets sampled for each query.

    Attributes:
        ids: Rows of the sampled targets, ``(batch, k)`` int64; −1 where masked.
        scores: Their scores under the sampling distribution, ``(batch, k)`` float32.
        log_proposal: Log of the expected number of times each was drawn, ``(batch, k)`` float32.
        mask: Whether the place holds a target at all, ``(batch, k)`` bool.
        uniform: Whether the place was filled by a uniform draw, ``(batch, k)`` bool.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    log_proposal: torch.Tensor
    mask: torch.Tensor
    uniform: torch.Tensor
