"""How much of its loss a ranking keeps when a part of the errors is left: rehearsed on the corrected index.

What share of the gain fresh vectors would bring is lost where a share s of the score error is left depends on how far
relevant targets stand above the others: where they stand far above, small errors change nothing and half the error
costs next to nothing; where they do not, every error costs. Fresh vectors of all targets are not known, but the
corrected index is near them and is judged at no cost. So it is taken for the truth, residuals of probed targets, drawn
at random and made smaller, are added to all its vectors, and what that costs is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from hf_corrector.index.base import TargetVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.metrics import FloatArray, parse_metric, quality
from hf_corrector.planning.judged import JudgedQueries
from hf_corrector.planning.probe import Probe

# Shares of the score error that are rehearsed, beside all of it.
SHARES = (0.25, 0.5)
# Standard errors that all of it must cost, else there is nothing to tell shares of.
CLEAR = 3.0
# Between which exponents are believed.
SMALLEST, LARGEST = 0.3, 4.0


@dataclass(frozen=True, eq=False)
class Disturbed:
    """Vectors with a residual of some probed target added to each.

    Attributes:
        vectors: What is disturbed.
        residuals: Residuals to draw from, ``(n, dim)``.
        drawn: Which residual each target gets, ``(targets,)``.
    """

    vectors: TargetVectors
    residuals: torch.Tensor
    drawn: torch.Tensor

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.vectors.dim

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return disturbed rows ``start`` to ``stop`` of the length they had, ``(stop - start, dim)`` float32."""
        rows = self.vectors.read(start, stop).float()
        moved = F.normalize(rows + self.residuals[self.drawn[start:stop]], dim=1)
        disturbed: torch.Tensor = moved * torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return disturbed


def rehearsed_exponent(
    probe: Probe, queries: JudgedQueries, *, corrected: TargetVectors, shares: Sequence[float] = SHARES, seed: int = 0
) -> float | None:
    """Return p of the law "a share s of the score error costs a share s^p of the gain", as rehearsed.

    Args:
        probe: Stale and fresh vectors of the same size.
        queries: Queries and judgements.
        corrected: All vectors, as a corrector fitted to the probe makes them.
        shares: Shares of the stale vectors' score error to rehearse.
        seed: Seed of the draws.

    Returns:
        The exponent, or None where sizes differ or nothing clear can be measured.
    """
    if probe.stale.shape[1] != probe.fresh.shape[1] or len(queries.relevant) < 2:
        return None
    residuals = probe.stale.float() - probe.fresh.float()
    residuals = residuals - residuals.mean(dim=0)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(residuals), (len(corrected),), generator=generator)
    before, worst = _measured(corrected, queries), _measured(Disturbed(corrected, residuals, drawn), queries)
    costs = before - worst
    if not costs.mean() > CLEAR * costs.std() / len(costs) ** 0.5:
        return None
    logs = np.log(np.asarray(shares, dtype=np.float64))
    lost = np.array([
        (before - _measured(Disturbed(corrected, residuals * share**0.5, drawn), queries)).mean() / costs.mean()
        for share in shares
    ])  # fmt: skip
    # Least squares of log lost = p · log s; what costs nothing measurable counts as the largest exponent.
    found = float(np.log(np.maximum(lost, np.exp(LARGEST * logs))) @ logs / (logs @ logs))
    return min(max(found, SMALLEST), LARGEST)


def _measured(vectors: TargetVectors, queries: JudgedQueries) -> FloatArray:
    _, deepest = parse_metric(queries.metric)
    ranked = ExactIndex(vectors).search(queries.new, deepest).rows.numpy()
    return quality(ranked, queries.relevant, metrics=(queries.metric,))[queries.metric]
