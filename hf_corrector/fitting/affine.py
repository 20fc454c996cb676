"""Affine maps from stale to fresh embeddings in closed form: mean shift, Procrustes, ridge and reduced rank.

Solved in float64; ridge strength and prior are chosen by exact leave-one-target-out errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting.pairs import Pairs

PRIORS = ("identity", "procrustes", "zero")
# Relative to the mean eigenvalue of the stale vectors' covariance.
RELATIVE_RIDGES = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 5))
MAX_LOO_ROWS = 2048
PRIOR_FOLDS = 5
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


def fit_mean_shift(pairs: Pairs) -> torch.Tensor:
    """Return the weighted mean displacement, ``(dim,)`` float32 (Query Drift Compensation, arXiv 2506.00037)."""
    share = pairs.weights / pairs.weights.sum()
    return ((pairs.fresh - pairs.stale) * share[:, None]).sum(dim=0).float()


def fit_affine(
    pairs: Pairs, *, priors: tuple[str, ...] = PRIORS, relative_ridges: tuple[float, ...] = RELATIVE_RIDGES
) -> AffineFit:
    """Fit an affine map by ridge regression towards a prior, choosing both by leave-one-target-out error.

    The leave-one-out residual of a linear smoother is its residual divided by one minus the leverage (Allen's PRESS),
    so the choice costs no second fit. The Procrustes prior is itself estimated from the pairs and, where these are few,
    fits them far better than it fits others: each target's error takes the rotation estimated without its fold.

    Args:
        pairs: What to fit on.
        priors: Candidates for the map at infinite ridge: ``"identity"`` (skipped where sizes differ),
            ``"procrustes"`` (the best rotation) and ``"zero"`` (the mean of the fresh vectors).
        relative_ridges: Candidates for the strength, relative to the mean eigenvalue of the stale covariance.

    Raises:
        ConfigurationError: If no prior fits the sizes or a name is unknown.
    """
    problem = _RidgeProblem(pairs)
    square = pairs.stale.shape[1] == pairs.fresh.shape[1]
    usable = [prior for prior in priors if prior in PRIORS and (square or prior != "identity")]
    if not usable or len(set(priors) - set(PRIORS)) > 0:
        raise ConfigurationError(
            "corrector fit", expected=f"priors among {PRIORS}, not only 'identity' between different sizes",
            got=str(priors), cure="Name another prior.",
        )  # fmt: skip
    best: tuple[float, str, float] | None = None
    for prior in usable:
        errors = problem.loo_errors(prior, relative_ridges)
        index = min(range(len(errors)), key=lambda one: (errors[one], -relative_ridges[one]))
        if best is None or errors[index] < best[0]:
            best = (errors[index], prior, relative_ridges[index])
    error, prior, ridge = best if best is not None else (0.0, usable[0], 1.0)
    return problem.as_fit(problem.solve(problem.prior_map(prior), ridge), prior=prior, ridge=ridge, error=error)


def fit_procrustes(pairs: Pairs) -> AffineFit:
    """Fit Q(z − mean) + offset with Q orthogonal, or semi-orthogonal between different sizes (Schönemann, 1966)."""
    problem = _RidgeProblem(pairs)
    return problem.as_fit(problem.prior_map("procrustes"), prior="procrustes", ridge=float("inf"), error=float("nan"))


def fit_low_rank(pairs: Pairs, *, rank: int | None = None) -> tuple[AffineFit, int]:
    """Fit an affine map whose difference from its prior has a low rank (reduced-rank regression, Izenman, 1975).

    The displacement that the ridge fit gives the pairs is projected onto its first principal directions.

    Args:
        pairs: What to fit on.
        rank: Rank of the displacement (between different sizes: of the map); if None, the one of :data:`RANKS` with
            the least error on a fifth of the pairs, left out of a fit to the others.

    Returns:
        The fit, in the form of :class:`AffineFit`, and its rank.
    """
    square = pairs.stale.shape[1] == pairs.fresh.shape[1]
    full = fit_affine(pairs, priors=("identity",) if square else ("zero",))
    largest = min(pairs.stale.shape[1], pairs.fresh.shape[1])
    if rank is None:
        rank = _best_rank(pairs, full, [one for one in RANKS if one < largest] + [largest])
    problem = _RidgeProblem(pairs)
    return _reduced(problem, full, min(rank, largest)), min(rank, largest)


def _reduced(problem: _RidgeProblem, full: AffineFit, rank: int) -> AffineFit:
    """Keep the ``rank`` directions in which a ridge fit moves its pairs most."""
    prior = problem.prior_map(full.prior)
    change = problem.solve(prior, full.ridge) - prior
    _, directions = torch.linalg.eigh(change @ problem.covariance @ change.T)
    kept = directions[:, -rank:]
    return problem.as_fit(prior + kept @ (kept.T @ change), prior=full.prior, ridge=full.ridge, error=float("nan"))


def _best_rank(pairs: Pairs, full: AffineFit, ranks: list[int]) -> int:
    held_out = torch.arange(len(pairs)) % 5 == 0
    if len(pairs) < 10:
        return ranks[0]
    problem = _RidgeProblem(pairs.take((~held_out).nonzero()[:, 0]))
    stale, fresh, weights = pairs.stale[held_out], pairs.fresh[held_out], pairs.weights[held_out]
    errors = []
    for rank in ranks:
        found = _reduced(problem, full, rank)
        base = stale if stale.shape[1] == fresh.shape[1] else 0
        predicted = base + (stale - found.mean.double()) @ found.weight.double().T + found.bias.double()
        errors.append(float(((predicted - fresh).square().sum(dim=1) * weights).sum()))
    return ranks[min(range(len(ranks)), key=errors.__getitem__)]


class _RidgeProblem:
    """Weighted, centred least squares with one eigendecomposition shared by all priors and ridges."""

    def __init__(self, pairs: Pairs) -> None:
        share = (pairs.weights / pairs.weights.sum())[:, None]
        self.share = share
        self.stale_mean = (pairs.stale * share).sum(dim=0)
        self.fresh_mean = (pairs.fresh * share).sum(dim=0)
        self.stale = pairs.stale - self.stale_mean
        self.fresh = pairs.fresh - self.fresh_mean
        covariance = self.stale.T @ (self.stale * share)
        values, vectors = torch.linalg.eigh(covariance)
        # A spread below the precision of float32 embeddings is rounding; following it would be fitting noise.
        rounding = torch.finfo(torch.float32).eps ** 2 * float((pairs.stale.square() * share).sum(dim=0).mean())
        self.values, self.vectors = values[values > rounding], vectors[:, values > rounding]
        self.unit = float(self.values.sum()) / len(values) or 1.0
        self.cross = self.stale.T @ (self.fresh * share)
        self.covariance = covariance

    def as_fit(self, full_map: torch.Tensor, *, prior: str, ridge: float, error: float) -> AffineFit:
        """Bring a linear map between the centred vectors, ``(dim_out, dim_in)``, into displacement form."""
        square = full_map.shape[0] == full_map.shape[1]
        weight = full_map - torch.eye(full_map.shape[0], dtype=torch.float64) if square else full_map
        bias = self.fresh_mean - self.stale_mean if square else self.fresh_mean
        return AffineFit(
            mean=self.stale_mean.float(), weight=weight.float(), bias=bias.float(), prior=prior, ridge=ridge,
            loo_error=error, pairs=len(self.stale),
        )  # fmt: skip

    def prior_map(self, prior: str) -> torch.Tensor:
        """Return the linear part of a prior, ``(dim_out, dim_in)``."""
        dim_in, dim_out = self.cross.shape
        match prior:
            case "identity":
                return torch.eye(dim_out, dim_in, dtype=torch.float64)
            case "procrustes":
                return _rotation(self.cross)
            case _:
                return torch.zeros(dim_out, dim_in, dtype=torch.float64)

    def solve(self, prior_map: torch.Tensor, relative_ridge: float) -> torch.Tensor:
        """Return prior + A with A the ridge solution for what the prior leaves over, ``(dim_out, dim_in)``."""
        left_over = self.cross - self.covariance @ prior_map.T
        shrunk = (self.vectors.T @ left_over) / (self.values + relative_ridge * self.unit)[:, None]
        solution: torch.Tensor = prior_map + (self.vectors @ shrunk).T
        return solution

    def loo_errors(self, prior: str, relative_ridges: tuple[float, ...]) -> list[float]:
        """Return the weighted mean squared leave-one-target-out error for each ridge.

        Above :data:`MAX_LOO_ROWS` targets an evenly spaced subset is judged; every one was fitted on.
        """
        picked = torch.linspace(0, len(self.stale) - 1, min(len(self.stale), MAX_LOO_ROWS), dtype=torch.float64)
        picked = picked.round().long()
        if prior != "procrustes":
            folds = [(picked, self.prior_map(prior))]
        else:
            count = min(PRIOR_FOLDS, len(self.stale))
            folds = [(picked[picked % count == fold], self._rotation_without(fold, count)) for fold in range(count)]
        errors = torch.stack([self._squared_errors(rows, prior_map, relative_ridges) for rows, prior_map in folds])
        mean: list[float] = (errors.sum(dim=0) / self.share[picked].sum()).tolist()
        return mean

    def _rotation_without(self, fold: int, count: int) -> torch.Tensor:
        """Return the best rotation for all targets but every ``count``-th from ``fold`` on."""
        stale, fresh, share = self.stale[fold::count], self.fresh[fold::count], self.share[fold::count]
        # All targets together are centred, so what is left has the opposite sum of what is left out.
        stale_sum, fresh_sum = (stale * share).sum(dim=0), (fresh * share).sum(dim=0)
        left = self.cross - stale.T @ (fresh * share) - torch.outer(stale_sum, fresh_sum) / (1.0 - share.sum())
        return _rotation(left)

    def _squared_errors(
        self, rows: torch.Tensor, prior_map: torch.Tensor, relative_ridges: tuple[float, ...]
    ) -> torch.Tensor:
        """Return the weighted sum of some rows' squared leave-one-target-out errors for each ridge, ``(ridges,)``."""
        stale, share = self.stale[rows], self.share[rows, 0]
        residual = self.fresh[rows] - stale @ prior_map.T
        scores = stale @ self.vectors
        single_scores, single_residual = scores.float(), residual.float()
        loadings = self.vectors.T @ (self.cross - self.covariance @ prior_map.T)
        errors = []
        for ridge in relative_ridges:
            damping = 1.0 / (self.values + ridge * self.unit)
            remainder = (1.0 - share * (1.0 + (scores.square() * damping).sum(dim=1))).clamp(min=1e-12)
            solution = damping[:, None] * loadings
            if not len(rows) or remainder.min() > 1e-3:
                # Only ranks candidates, so float32 is enough for this, the largest product of all ...
                left = (single_residual - single_scores @ solution.float()).double()
            else:
                # ... but not where few targets are fitted almost exactly: both sides of the division are tiny then.
                left = residual - scores @ solution
            errors.append((left.square().sum(dim=1) / remainder.square() * share).sum())
        return torch.stack(errors)


def _rotation(cross: torch.Tensor) -> torch.Tensor:
    """Return the (semi-)orthogonal map closest to a cross-covariance ``(dim_in, dim_out)``, ``(dim_out, dim_in)``."""
    left, _, right = torch.linalg.svd(cross.T, full_matrices=False)
    rotation: torch.Tensor = left @ right
    return rotation
