"""How strong each block of a composite fit is: coordinate search on exact leave-one-target-out errors."""

from __future__ import annotations

import torch

from hf_corrector.fitting.blocks import Block
from hf_corrector.fitting.pairs import Pairs

# Strengths are ratios of variances and do not depend on the number of pairs, so a part of many is enough to choose.
CHOICE_ROWS = 768
STEPS = (10.0**0.5, 10.0**0.25)
SMALLEST, LARGEST = 1e-4, 1e4
STARTS = {"constant": 1.0, "linear": 1.0, "radial": 8.0, "tokens": 1.0, "bigrams": 1.0, "side": 1.0}
# An improvement below this share of the error is noise; without it the search would wander along a flat valley.
WORTH = 2e-3


def noise_of(pairs: Pairs) -> torch.Tensor:
    """Return the noise variance of each pair, ``(n,)`` float64: 1 on average, less for heavier pairs."""
    return pairs.weights.mean() / pairs.weights


def time_kernel(clock: torch.Tensor) -> torch.Tensor:
    """Return how displacements at two times go together, ``(n, n)``: min(s, t), that of a random walk.

    At clock 0 nothing has moved yet, and the increments of the drift are taken as independent.
    """
    return torch.minimum(clock[:, None], clock[None])


def choose_strengths(
    blocks: list[Block], residual: torch.Tensor, pairs: Pairs, *, start: dict[str, float] | None, fixed: bool
) -> tuple[float, dict[str, float]]:
    """Find the strengths of least leave-one-target-out error.

    Args:
        blocks: Features of all pairs.
        residual: What they are to explain, ``(n, dim_out)``.
        pairs: The pairs, for weights and clock.
        start: Where to begin; the usual strengths if None.
        fixed: Take ``start`` as it is and only measure its error.

    Returns:
        The mean squared leave-one-out error of the choice, and the strength of each block.
    """
    rows = torch.linspace(0, len(pairs) - 1, min(len(pairs), CHOICE_ROWS), dtype=torch.float64).round().long()
    search = _Search(blocks, residual, pairs, rows)
    known = STARTS if start is None else {**STARTS, **start}
    strengths = {one.name: known[one.name] for one in blocks}
    best = search.error(strengths)
    for step in () if fixed else STEPS:
        improved = True
        while improved:
            improved = False
            for name in strengths:
                for factor in (step, 1 / step):
                    tried = min(max(strengths[name] * factor, SMALLEST), LARGEST)
                    error = search.error({**strengths, name: tried})
                    if error < best * (1 - WORTH):
                        strengths, best, improved = {**strengths, name: tried}, error, True
                        break
    return best, strengths


class _Search:
    """Leave-one-out errors of one subset of pairs for any strengths; each combination is computed once."""

    def __init__(self, blocks: list[Block], residual: torch.Tensor, pairs: Pairs, rows: torch.Tensor) -> None:
        self._grams = {one.name: one.take(rows).gram() for one in blocks}
        self._residual, self._noise = residual[rows], noise_of(pairs)[rows]
        self._importance = pairs.weights[rows]
        if pairs.clock is not None:
            clock = pairs.clock[rows]
            walk = time_kernel(clock)
            self._grams = {name: gram * walk for name, gram in self._grams.items()}
            # What is asked for is the displacement of now; errors far back say less about it.
            self._importance = self._importance * clock.square()
        self._known: dict[tuple[float, ...], float] = {}

    def error(self, strengths: dict[str, float]) -> float:
        key = tuple(round(value, 9) for value in strengths.values())
        if key not in self._known:
            self._known[key] = self._error(strengths)
        return self._known[key]

    def _error(self, strengths: dict[str, float]) -> float:
        kernel = torch.diag(self._noise)
        for name, gram in self._grams.items():
            kernel.add_(gram, alpha=strengths[name])
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
        # Residual of leaving one out: [K⁻¹ r]ᵢ / [K⁻¹]ᵢᵢ (Rasmussen and Williams, 2006, eq. 5.12).
        left = (inverse @ self._residual) / inverse.diagonal()[:, None]
        errors = left.square().sum(dim=1)
        return float((errors * self._importance).sum() / self._importance.sum())
