"""Ridge regression from moments alone, which know of pairs all a fit needs, at hand or long gone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_corrector.errors import ConfigurationError

PRIORS = ("identity", "procrustes", "zero")
# Relative to the mean eigenvalue of the stale vectors' covariance.
RELATIVE_RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 5))
RANKS = (4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class AffineFit:
    """An affine corrector in displacement form.

    Where sizes agree it maps z to ``z + weight (z − mean) + bias``, otherwise to ``weight (z − mean) + bias``.

    Attributes:
        mean: ``(dim_in,)`` float32.
        weight: ``(dim_out, dim_in)`` float32.
        bias: ``(dim_out,)`` float32.
        prior: What the ridge shrinks towards.
        ridge: Chosen strength, relative to the mean eigenvalue of the stale covariance.
        loo_error: Mean squared leave-one-target-out error of the choice.
        pairs: Number of distinct targets fitted on.
    """

    mean: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    prior: str
    ridge: float
    loo_error: float
    pairs: int


def usable_priors(priors: tuple[str, ...], *, square: bool) -> list[str]:
    """Return the priors that fit the sizes.

    Args:
        priors: Names among :data:`PRIORS`.
        square: Whether stale and fresh vectors have the same size.

    Raises:
        ConfigurationError: If none is left or a name is unknown.
    """
    usable = [prior for prior in priors if prior in PRIORS and (square or prior != "identity")]
    if not usable or len(set(priors) - set(PRIORS)) > 0:
        raise ConfigurationError(
            "corrector fit", expected=f"priors among {PRIORS}, not only 'identity' between different sizes",
            got=str(priors), cure="Name another prior.",
        )  # fmt: skip
    return usable


def ranks_below(largest: int) -> list[int]:
    """Return the ranks to try for a map whose sizes are at least ``largest``."""
    return [one for one in RANKS if one < largest] + [largest]


class RidgeSystem:
    """Weighted, centred least squares with one eigendecomposition shared by all priors and ridges.

    Args:
        stale_mean: ``(dim_in,)`` float64.
        fresh_mean: ``(dim_out,)`` float64.
        covariance: Of the stale vectors, ``(dim_in, dim_in)`` float64.
        cross: Cross-covariance of stale and fresh vectors, ``(dim_in, dim_out)`` float64.
        pairs: Number of targets behind them.
    """

    def __init__(
        self,
        stale_mean: torch.Tensor,
        fresh_mean: torch.Tensor,
        *,
        covariance: torch.Tensor,
        cross: torch.Tensor,
        pairs: int,
    ) -> None:
        self.stale_mean, self.fresh_mean = stale_mean, fresh_mean
        self.covariance, self.cross, self.pairs = covariance, cross, pairs
        values, vectors = torch.linalg.eigh(covariance)
        # A spread below the precision of float32 embeddings is rounding; following it would be fitting noise.
        square = float(covariance.diagonal().mean() + stale_mean.square().mean())
        rounding = torch.finfo(torch.float32).eps ** 2 * square
        self.values, self.vectors = values[values > rounding], vectors[:, values > rounding]
        self.unit = float(self.values.sum()) / len(values) or 1.0

    def as_fit(self, full_map: torch.Tensor, *, prior: str, ridge: float, error: float) -> AffineFit:
        """Bring a linear map between the centred vectors, ``(dim_out, dim_in)``, into displacement form."""
        square = full_map.shape[0] == full_map.shape[1]
        weight = full_map - torch.eye(full_map.shape[0], dtype=torch.float64) if square else full_map
        bias = self.fresh_mean - self.stale_mean if square else self.fresh_mean
        return AffineFit(
            mean=self.stale_mean.float(), weight=weight.float(), bias=bias.float(), prior=prior, ridge=ridge,
            loo_error=error, pairs=self.pairs,
        )  # fmt: skip

    def prior_map(self, prior: str) -> torch.Tensor:
        """Return the linear part of a prior, ``(dim_out, dim_in)``."""
        dim_in, dim_out = self.cross.shape
        match prior:
            case "identity":
                return torch.eye(dim_out, dim_in, dtype=torch.float64)
            case "procrustes":
                return rotation(self.cross)
            case _:
                return torch.zeros(dim_out, dim_in, dtype=torch.float64)

    def loadings(self, prior_map: torch.Tensor) -> torch.Tensor:
        """Return what a prior leaves over, along the directions of spread, ``(directions, dim_out)``."""
        left_over: torch.Tensor = self.vectors.T @ (self.cross - self.covariance @ prior_map.T)
        return left_over

    def damping(self, relative_ridge: float) -> torch.Tensor:
        """Return 1 / (spread + ridge) of each direction, ``(directions,)``."""
        damping: torch.Tensor = 1.0 / (self.values + relative_ridge * self.unit)
        return damping

    def solve(self, prior_map: torch.Tensor, relative_ridge: float) -> torch.Tensor:
        """Return prior + A with A the ridge solution for what the prior leaves over, ``(dim_out, dim_in)``."""
        shrunk = self.loadings(prior_map) / (self.values + relative_ridge * self.unit)[:, None]
        solution: torch.Tensor = prior_map + (self.vectors @ shrunk).T
        return solution

    def reduced(self, full: AffineFit, rank: int) -> AffineFit:
        """Keep the ``rank`` directions in which a ridge fit moves the pairs most."""
        prior = self.prior_map(full.prior)
        change = self.solve(prior, full.ridge) - prior
        _, directions = torch.linalg.eigh(change @ self.covariance @ change.T)
        kept = directions[:, -rank:]
        return self.as_fit(prior + kept @ (kept.T @ change), prior=full.prior, ridge=full.ridge, error=float("nan"))


def rotation(cross: torch.Tensor) -> torch.Tensor:
    """Return the (semi-)orthogonal map closest to a cross-covariance ``(dim_in, dim_out)``, ``(dim_out, dim_in)``."""
    left, _, right = torch.linalg.svd(cross.T, full_matrices=False)
    closest: torch.Tensor = left @ right
    return closest
