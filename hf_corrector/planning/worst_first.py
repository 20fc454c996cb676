"""What to re-embed first where only a part of the corpus can be: the largest predicted residuals.

What correction leaves wrong of a target is known only where the target was re-encoded. For the others the logarithm of
the squared residual is predicted from the stale vector by kernel ridge regression on the pairs: neighbours of targets
that are corrected badly tend to be corrected badly. The residuals it learns from come from fits without those targets,
as a fit's own are too small.

The residual alone is the order: on three real drifts, re-encoding 30 % by it left a score error about .05 (of stale's)
below that of a random choice, and residual × traffic left none below it (``examples/benchmarks/worst_first.py``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from hf_corrector.errors import DataError
from hf_corrector.index.base import TargetVectors
from hf_corrector.metrics import FloatArray, IntArray
from hf_corrector.planning.probe import Fit, Probe, ProbeSettings, cuts, side_rows

WIDTHS = (0.5, 0.7, 1.0)
RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-4, 5))
MAX_LANDMARKS = 2_048
_CHUNK_ROWS = 8_192
# Of a residual that is exactly 0, which has no logarithm; relative to the largest.
_SMALLEST = 1e-9


@dataclass(frozen=True, eq=False)
class ResidualPredictor:
    """Predict a target's squared residual from its stale vector.

    The kernel of two unit vectors is exp((cosine − 1) / width²). Width and ridge have the least leave-one-out error.

    Attributes:
        landmarks: Unit stale vectors of the pairs, ``(n, dim)`` float64.
        coefficients: ``(n,)`` float64.
        mean: Mean logarithm of the squared residual.
        width: Kernel width.
        ridge: Chosen strength.
        explained: Share of the variance of the logarithms explained on left-out pairs; 0 or below means the order is
            no better than chance.
    """

    landmarks: torch.Tensor
    coefficients: torch.Tensor
    mean: float
    width: float
    ridge: float
    explained: float

    @classmethod
    def fit(cls, stale: torch.Tensor, squared_residuals: FloatArray) -> ResidualPredictor:
        """Learn from pairs.

        Args:
            stale: Stale vectors, ``(n, dim)``; the first :data:`MAX_LANDMARKS` count.
            squared_residuals: Their squared residuals under correctors not fitted on them, ``(n,)``.

        Raises:
            DataError: If shapes disagree, there are fewer than ten pairs, or all residuals are 0.
        """
        residuals = np.asarray(squared_residuals, dtype=np.float64)[:MAX_LANDMARKS]
        landmarks = F.normalize(stale[:MAX_LANDMARKS].double(), dim=1)
        if len(landmarks) != len(residuals) or len(residuals) < 10 or not residuals.max() > 0:
            raise DataError(
                "residual predictor", expected="ten or more pairs with one residual each, not all 0",
                got=f"{len(stale)} vectors and {len(residuals)} residuals", cure="Re-encode more targets.",
            )  # fmt: skip
        logs = torch.from_numpy(np.log(np.maximum(residuals, _SMALLEST * residuals.max())))
        mean = float(logs.mean())
        best: tuple[float, float, float] | None = None
        for width in WIDTHS:
            values, vectors = torch.linalg.eigh(_kernel(landmarks, landmarks, width))
            values, loadings = values.clamp(min=0.0), vectors.T @ (logs - mean)
            for ridge in RIDGES:
                shrunk = values / (values + ridge)
                left = logs - mean - vectors @ (shrunk * loadings)
                error = float((left / (1.0 - vectors.square() @ shrunk).clamp(min=1e-9)).square().mean())
                if best is None or error < best[0]:
                    best = (error, width, ridge)
        error, width, ridge = best if best is not None else (0.0, WIDTHS[0], RIDGES[0])
        system = _kernel(landmarks, landmarks, width) + ridge * torch.eye(len(logs), dtype=torch.float64)
        variance = float(logs.var(unbiased=False))
        explained = 1.0 - error / variance if variance > 0 else 0.0
        return cls(landmarks, torch.linalg.solve(system, logs - mean), mean, width, ridge, explained)

    def predict(self, stale: TargetVectors) -> FloatArray:
        """Return predicted squared residuals of all targets, up to a common factor, ``(targets,)``."""
        pieces = [np.zeros(0)]
        for start in range(0, len(stale), _CHUNK_ROWS):
            rows = F.normalize(stale.read(start, min(start + _CHUNK_ROWS, len(stale))).double(), dim=1)
            logs = self.mean + _kernel(rows, self.landmarks, self.width) @ self.coefficients
            pieces.append(logs.exp().numpy())
        predicted: FloatArray = np.concatenate(pieces)
        return predicted


def cross_fitted_residuals(probe: Probe, fit: Fit, *, folds: int = 5, seed: int = 0) -> FloatArray:
    """Return each pair's squared residual under a corrector fitted without its fold, ``(n,)``."""
    residuals = torch.zeros(len(probe), dtype=torch.float64)
    for fitted, held_out in cuts(len(probe), ProbeSettings(folds=folds, seed=seed)):
        correct = fit(probe.stale[fitted], probe.fresh[fitted], side_rows(probe.side, fitted))
        corrected = correct(probe.stale[held_out], side_rows(probe.side, held_out))
        residuals[held_out] = (corrected.double() - probe.fresh[held_out].double()).square().sum(dim=1)
    found: FloatArray = residuals.numpy()
    return found


def worst_first(
    predicted_residuals: FloatArray, traffic: FloatArray | None = None, *, skipped: IntArray | None = None
) -> IntArray:
    """Order target rows by predicted residual, largest first, ties by row.

    Args:
        predicted_residuals: One non-negative number a target, ``(targets,)``.
        traffic: How often each target is asked for or returned, ``(targets,)``: residuals are multiplied by it. That
            serves what is asked for most, at a price: in our measurements the gain over a random order was gone.
        skipped: Rows to leave out, for instance those re-encoded already.

    Returns:
        Rows, ``(targets less skipped,)`` int64.

    Raises:
        DataError: If shapes disagree or a number is negative or not finite.
    """
    residuals = np.asarray(predicted_residuals, dtype=np.float64)
    weights = np.ones(len(residuals)) if traffic is None else np.asarray(traffic, dtype=np.float64)
    usable = residuals.ndim == 1 and residuals.shape == weights.shape
    if not usable or not (np.isfinite(residuals) & np.isfinite(weights) & (residuals >= 0) & (weights >= 0)).all():
        raise DataError(
            "worst first", expected="one finite non-negative residual, and traffic, for every target",
            got=f"shapes {residuals.shape} and {weights.shape}", cure="Give a target without traffic a 0.",
        )  # fmt: skip
    order = np.argsort(-residuals * weights, kind="stable").astype(np.int64)
    return order if skipped is None else order[~np.isin(order, skipped)]


def _kernel(first: torch.Tensor, second: torch.Tensor, width: float) -> torch.Tensor:
    """Return exp((cosine − 1) / width²) for unit vectors ``(n, dim)`` and ``(m, dim)``, ``(n, m)``."""
    return ((first @ second.T - 1.0) / width**2).exp()
