"""Affine maps from stale to fresh embeddings in closed form: mean shift, Procrustes, ridge and reduced rank.

Solved in float64; ridge strength and prior are chosen by exact leave-one-target-out errors.
"""

from __future__ import annotations

import torch

from hf_corrector.fitting.pairs import Pairs
from hf_corrector.fitting.ridge import (
    PRIORS,
    RELATIVE_RIDGES,
    AffineFit,
    RidgeSystem,
    ranks_below,
    rotation,
    usable_priors,
)

MAX_LOO_ROWS = 2048
PRIOR_FOLDS = 5


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
    usable = usable_priors(priors, square=pairs.stale.shape[1] == pairs.fresh.shape[1])
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
        rank: Rank of the displacement (between different sizes: of the map); if None, the one of :data:`.ridge.RANKS`
            with the least error on a fifth of the pairs, left out of a fit to the others.

    Returns:
        The fit, in the form of :class:`AffineFit`, and its rank.
    """
    square = pairs.stale.shape[1] == pairs.fresh.shape[1]
    full = fit_affine(pairs, priors=("identity",) if square else ("zero",))
    largest = min(pairs.stale.shape[1], pairs.fresh.shape[1])
    if rank is None:
        rank = _best_rank(pairs, full, ranks_below(largest))
    return _RidgeProblem(pairs).reduced(full, min(rank, largest)), min(rank, largest)


def _best_rank(pairs: Pairs, full: AffineFit, ranks: list[int]) -> int:
    held_out = torch.arange(len(pairs)) % 5 == 0
    if len(pairs) < 10:
        return ranks[0]
    problem = _RidgeProblem(pairs.take((~held_out).nonzero()[:, 0]))
    stale, fresh, weights = pairs.stale[held_out], pairs.fresh[held_out], pairs.weights[held_out]
    errors = []
    for rank in ranks:
        found = problem.reduced(full, rank)
        base = stale if stale.shape[1] == fresh.shape[1] else 0
        predicted = base + (stale - found.mean.double()) @ found.weight.double().T + found.bias.double()
        errors.append(float(((predicted - fresh).square().sum(dim=1) * weights).sum()))
    return ranks[min(range(len(ranks)), key=errors.__getitem__)]


class _RidgeProblem(RidgeSystem):
    """The system of pairs that are all at hand, with the errors of leaving single ones out."""

    def __init__(self, pairs: Pairs) -> None:
        share = (pairs.weights / pairs.weights.sum())[:, None]
        stale_mean, fresh_mean = (pairs.stale * share).sum(dim=0), (pairs.fresh * share).sum(dim=0)
        self.share = share
        self.stale = pairs.stale - stale_mean
        self.fresh = pairs.fresh - fresh_mean
        super().__init__(
            stale_mean, fresh_mean, covariance=self.stale.T @ (self.stale * share),
            cross=self.stale.T @ (self.fresh * share), pairs=len(pairs),
        )  # fmt: skip

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
        return rotation(left)

    def _squared_errors(
        self, rows: torch.Tensor, prior_map: torch.Tensor, relative_ridges: tuple[float, ...]
    ) -> torch.Tensor:
        """Return the weighted sum of some rows' squared leave-one-target-out errors for each ridge, ``(ridges,)``."""
        stale, share = self.stale[rows], self.share[rows, 0]
        residual = self.fresh[rows] - stale @ prior_map.T
        scores = stale @ self.vectors
        single_scores, single_residual = scores.float(), residual.float()
        loadings = self.loadings(prior_map)
        errors = []
        for ridge in relative_ridges:
            damping = self.damping(ridge)
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
