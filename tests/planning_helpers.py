"""Small drifts of known nature for the planner's tests."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from hf_corrector.planning.probe import Probe

DIM = 12


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drift(targets: int = 600, *, noise: float = 0.3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear drift plus what cannot be known of it, ``(targets, DIM)`` twice."""
    stale = normalize(gaussian(targets, DIM, seed=seed), dim=1)
    moved = stale + 0.8 * stale @ gaussian(DIM, DIM, seed=seed + 1) / DIM**0.5
    return stale, normalize(moved + noise * gaussian(targets, DIM, seed=seed + 2) / DIM**0.5, dim=1)


def a_probe(size: int = 150, *, noise: float = 0.3, seed: int = 0) -> Probe:
    stale, fresh = drift(noise=noise, seed=seed)
    return Probe(stale[:size], fresh[:size], normalize(gaussian(80, DIM, seed=seed + 3), dim=1))
