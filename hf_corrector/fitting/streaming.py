"""Closed-form fits to a stream of pairs that are not kept: sufficient statistics with exponential forgetting.

Weighted means and centred second moments are all that mean shift, Procrustes, ridge and reduced rank need. They add up
(Chan, Golub and LeVeque, 1983), so two streams merge exactly, and multiplying them by a factor below one forgets. Pairs
are dealt to a few folds with statistics of their own: a map solved from the others is judged on a fold by its moments
alone, for a whole path of ridges at the price of one solve, so strength, prior and rank are cross-validated although
no pair is there any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting.pairs import check_pairs
from hf_corrector.fitting.ridge import (
    PRIORS,
    RELATIVE_RIDGES,
    AffineFit,
    RidgeSystem,
    ranks_below,
    usable_priors,
)

FOLDS = 5
UNITS = ("pairs", "batches")


@dataclass(frozen=True)
class Forgetting:
    """How fast earlier pairs lose their weight.

    Attributes:
        half_life: After so many further pairs or batches a pair counts half; None for never.
        unit: ``"pairs"`` (how the stream is cut into batches then makes no difference) or ``"batches"``.
    """

    half_life: float | None = None
    unit: str = "pairs"

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        if self.unit not in UNITS or (self.half_life is not None and not 0 < self.half_life < float("inf")):
            raise ConfigurationError(
                "forgetting", expected=f"a positive half-life, or None, in one of {UNITS}",
                got=f"{self.half_life} {self.unit}", cure="Give None to forget nothing.",
            )  # fmt: skip

    def carry(self, pairs: int) -> float:
        """Return what is left of earlier weights after a batch of so many pairs."""
        if self.half_life is None:
            return 1.0
        return float(0.5 ** ((pairs if self.unit == "pairs" else 1) / self.half_life))

    def within(self, pairs: int) -> torch.Tensor:
        """Return the weights of the pairs of a batch at its end, ``(pairs,)`` float64; 1 for the last."""
        if self.half_life is None or self.unit == "batches":
            return torch.ones(pairs, dtype=torch.float64)
        ages = torch.arange(pairs - 1, -1, -1, dtype=torch.float64)
        return torch.exp2(-ages / self.half_life)


@dataclass(frozen=True, eq=False)
class Moments:
    """Weighted sums over pairs, centred, which is what keeps their digits.

    Attributes:
        weight: Sum of weights.
        squares: Sum of squared weights.
        stale_mean: ``(dim_in,)`` float64.
        fresh_mean: ``(dim_out,)`` float64.
        stale_scatter: Sum of outer products of centred stale vectors, ``(dim_in, dim_in)`` float64.
        cross_scatter: The same of centred stale and fresh vectors, ``(dim_in, dim_out)`` float64.
        fresh_scatter: Sum of squared lengths of centred fresh vectors.
    """

    weight: float
    squares: float
    stale_mean: torch.Tensor
    fresh_mean: torch.Tensor
    stale_scatter: torch.Tensor
    cross_scatter: torch.Tensor
    fresh_scatter: float

    @classmethod
    def empty(cls, dim_in: int, dim_out: int) -> Moments:
        """Return those of no pairs."""
        return cls.of(torch.zeros(0, dim_in), torch.zeros(0, dim_out), torch.zeros(0))

    @classmethod
    def of(cls, stale: torch.Tensor, fresh: torch.Tensor, weights: torch.Tensor) -> Moments:
        """Sum over pairs ``(n, dim_in)`` and ``(n, dim_out)`` with weights ``(n,)``."""
        stale, fresh, weights = stale.double(), fresh.double(), weights.double()
        total = float(weights.sum())
        share = weights[:, None] / (total or 1.0)
        stale_mean, fresh_mean = (stale * share).sum(dim=0), (fresh * share).sum(dim=0)
        stale, fresh = stale - stale_mean, fresh - fresh_mean
        heavy = stale * weights[:, None]
        return cls(
            total, float(weights.square().sum()), stale_mean, fresh_mean, heavy.T @ stale, heavy.T @ fresh,
            float((fresh.square() * weights[:, None]).sum()),
        )  # fmt: skip

    def scaled(self, factor: float) -> Moments:
        """Return them with all weights multiplied by a factor."""
        return Moments(
            self.weight * factor, self.squares * factor**2, self.stale_mean, self.fresh_mean,
            self.stale_scatter * factor, self.cross_scatter * factor, self.fresh_scatter * factor,
        )  # fmt: skip

    def __add__(self, other: Moments) -> Moments:
        """Return those of both together."""
        if other.weight == 0 or self.weight == 0:
            return self if other.weight == 0 else other
        total = self.weight + other.weight
        stale, fresh = other.stale_mean - self.stale_mean, other.fresh_mean - self.fresh_mean
        between, share = self.weight * other.weight / total, other.weight / total
        return Moments(
            total, self.squares + other.squares, self.stale_mean + share * stale, self.fresh_mean + share * fresh,
            self.stale_scatter + other.stale_scatter + between * torch.outer(stale, stale),
            self.cross_scatter + other.cross_scatter + between * torch.outer(stale, fresh),
            self.fresh_scatter + other.fresh_scatter + between * float(fresh.square().sum()),
        )  # fmt: skip

    @property
    def pairs(self) -> float:
        """Effective number of pairs, (Σ w)² / Σ w²; the number itself where all weigh the same."""
        return self.weight**2 / self.squares if self.squares > 0 else 0.0

    def system(self) -> RidgeSystem:
        """Return the least-squares problem they pose."""
        return RidgeSystem(
            self.stale_mean, self.fresh_mean, covariance=self.stale_scatter / self.weight,
            cross=self.cross_scatter / self.weight, pairs=round(self.pairs),
        )  # fmt: skip

    def errors_of(
        self, system: RidgeSystem, prior_map: torch.Tensor, relative_ridges: tuple[float, ...]
    ) -> torch.Tensor:
        """Return the weighted sum of squared errors here of ridge solutions found elsewhere, ``(ridges,)``.

        With A = V D L the solution beside the prior P, in directions V with damping D and loadings L, the error is a
        quadratic form in the diagonal of D, which costs no further product of matrices for each ridge.
        """
        left = self.cross_scatter - self.stale_scatter @ prior_map.T
        prior_error = self.fresh_scatter - float((prior_map.T * (self.cross_scatter + left)).sum())
        loadings, vectors = system.loadings(prior_map), system.vectors
        linear = (loadings * (vectors.T @ left)).sum(dim=1)
        quadratic = (vectors.T @ self.stale_scatter @ vectors) * (loadings @ loadings.T)
        stale_shift, fresh_shift = self.stale_mean - system.stale_mean, self.fresh_mean - system.fresh_mean
        offset, along = fresh_shift - prior_map @ stale_shift, vectors.T @ stale_shift
        errors = []
        for ridge in relative_ridges:
            damping = system.damping(ridge)
            shift = offset - loadings.T @ (damping * along)
            centred = prior_error - 2.0 * damping @ linear + damping @ quadratic @ damping
            errors.append(centred + self.weight * shift.square().sum())
        return torch.stack(errors)


class PairStatistics:
    """What closed forms need to know of all pairs seen so far, ``folds · dim_in · (dim_in + dim_out)`` numbers.

    Args:
        dim_in: Size of a stale vector.
        dim_out: Size of a fresh vector.
        forgetting: How fast earlier pairs lose their weight.
        folds: Parts of the stream that judge each other.

    Attributes:
        seen: Pairs taken in so far.
    """

    def __init__(self, dim_in: int, dim_out: int, *, forgetting: Forgetting | None = None, folds: int = FOLDS) -> None:
        if min(dim_in, dim_out) < 1 or folds < 2:
            raise ConfigurationError(
                "pair statistics", expected="sizes of at least 1 and at least 2 folds",
                got=f"{dim_in}, {dim_out} and {folds}", cure="Give the encoders' embedding sizes.",
            )  # fmt: skip
        self.dim_in, self.dim_out = dim_in, dim_out
        self.forgetting = Forgetting() if forgetting is None else forgetting
        self.seen = 0
        self._folds = [Moments.empty(dim_in, dim_out) for _ in range(folds)]

    @property
    def pairs(self) -> float:
        """Effective number of pairs, see :attr:`Moments.pairs`."""
        return self._together().pairs

    def update(
        self,
        stale: torch.Tensor,
        fresh: torch.Tensor,
        *,
        weights: torch.Tensor | None = None,
        target_rows: torch.Tensor | None = None,
    ) -> None:
        """Take in a batch of pairs, in the order they came.

        Args:
            stale: Stale vectors, ``(n, dim_in)``.
            fresh: Fresh vectors of the same targets, ``(n, dim_out)``.
            weights: Weight of each pair, ``(n,)``; 1 if not given.
            target_rows: Which target each pair is of, ``(n,)`` int64. All pairs of a target then go to one fold, so
                that no map is judged on a target it was fitted on; by default pairs are dealt in turn.

        Raises:
            ConfigurationError: If shapes disagree or a number is not finite; nothing is taken in then.
        """
        weights = torch.ones(len(stale)) if weights is None else weights
        check_pairs(stale, fresh, weights)
        rows = torch.arange(self.seen, self.seen + len(stale)) if target_rows is None else target_rows.cpu()
        if stale.shape[1] != self.dim_in or fresh.shape[1] != self.dim_out or rows.shape != (len(stale),):
            raise ConfigurationError(
                "pair statistics", expected=f"vectors of sizes {self.dim_in} and {self.dim_out} and a row for each",
                got=f"{tuple(stale.shape)}, {tuple(fresh.shape)} and {tuple(rows.shape)}",
                cure="Make statistics for these encoders.",
            )  # fmt: skip
        stale, fresh = stale.detach().double().cpu(), fresh.detach().double().cpu()
        weights = weights.detach().double().cpu() * self.forgetting.within(len(stale))
        carry = self.forgetting.carry(len(stale))
        for number, fold in enumerate(self._folds):
            mine = (rows % len(self._folds) == number).nonzero()[:, 0]
            self._folds[number] = fold.scaled(carry) + Moments.of(stale[mine], fresh[mine], weights[mine])
        self.seen += len(stale)

    def merge(self, other: PairStatistics) -> None:
        """Take in another stream, in place; each pair keeps the weight it has by now in its own stream.

        Raises:
            ConfigurationError: If sizes, folds or forgetting differ.
        """
        mine = (self.dim_in, self.dim_out, len(self._folds), self.forgetting)
        theirs = (other.dim_in, other.dim_out, len(other._folds), other.forgetting)
        if mine != theirs:
            raise ConfigurationError(
                "pair statistics to merge", expected=f"sizes, folds and forgetting {mine}", got=f"{theirs}",
                cure="Make both with the same settings.",
            )  # fmt: skip
        self._folds = [one + another for one, another in zip(self._folds, other._folds, strict=True)]
        self.seen += other.seen

    def discount(self, weight: float) -> None:
        """Let all pairs together count, from now on, as so many new ones at most."""
        total = sum(fold.weight for fold in self._folds)
        if total > weight:
            self._folds = [fold.scaled(weight / total) for fold in self._folds]

    def clear(self) -> None:
        """Forget all pairs, as when their stale halves no longer exist."""
        self.seen = 0
        self._folds = [Moments.empty(self.dim_in, self.dim_out) for _ in self._folds]

    def system(self) -> RidgeSystem:
        """Return the least-squares problem of all pairs (ConfigurationError before the second)."""
        together = self._together()
        if together.weight == 0 or self.seen < 2:
            raise ConfigurationError(
                "corrector fit", expected="at least 2 pairs", got=str(self.seen), cure="Give more pairs."
            )
        return together.system()

    def mean_shift(self) -> torch.Tensor:
        """Return the mean displacement, ``(dim,)`` float32, as :func:`fit_mean_shift` has it."""
        found = self.system()
        return (found.fresh_mean - found.stale_mean).float()

    def procrustes(self) -> AffineFit:
        """Return what :func:`fit_procrustes` has."""
        found = self.system()
        return found.as_fit(found.prior_map("procrustes"), prior="procrustes", ridge=float("inf"), error=float("nan"))

    def affine(
        self, *, priors: tuple[str, ...] = PRIORS, relative_ridges: tuple[float, ...] = RELATIVE_RIDGES
    ) -> AffineFit:
        """Fit as :func:`fit_affine` does, prior and ridge chosen by the error on folds left out.

        Args:
            priors: Candidates for the map at infinite ridge.
            relative_ridges: Candidates for the strength.

        Returns:
            The fit; its error is NaN where there was nothing to choose, else the cross-validated one.

        Raises:
            ConfigurationError: If no prior fits the sizes, a name is unknown, or there are fewer than two pairs.
        """
        usable = usable_priors(priors, square=self.dim_in == self.dim_out)
        found, best = self.system(), (float("nan"), usable[0], relative_ridges[0])
        if len(usable) * len(relative_ridges) > 1:
            errors = self._errors(usable, relative_ridges)
            # Of equal errors the stronger ridge, as in the batch fit.
            best = min(errors, key=lambda one: (one[0], -one[2]))
        error, prior, ridge = best
        return found.as_fit(found.solve(found.prior_map(prior), ridge), prior=prior, ridge=ridge, error=error)

    def low_rank(
        self, *, rank: int | None = None, relative_ridges: tuple[float, ...] = RELATIVE_RIDGES
    ) -> tuple[AffineFit, int]:
        """Fit as :func:`fit_low_rank` does; without a rank, take the one of least error on the first fold.

        Returns:
            The fit and its rank.
        """
        full = self.affine(
            priors=("identity",) if self.dim_in == self.dim_out else ("zero",), relative_ridges=relative_ridges
        )
        largest = min(self.dim_in, self.dim_out)
        rank = self._best_rank(full, ranks_below(largest)) if rank is None else min(rank, largest)
        return self.system().reduced(full, rank), rank

    def moved_scatter(self, fit: AffineFit) -> torch.Tensor:
        """Return second moments of the displacement a fit gives the pairs, ``(dim_out, dim_out)`` float64."""
        weight = fit.weight.double()
        return weight @ self._together().stale_scatter @ weight.T

    def state(self) -> dict[str, torch.Tensor]:
        """Return everything as tensors, to be saved; scalars first, then one entry per fold."""
        folds = self._folds
        scalars = [[one.weight, one.squares, one.fresh_scatter] for one in folds]
        return {
            "statistics_seen": torch.tensor(self.seen),
            "statistics_scalars": torch.tensor(scalars, dtype=torch.float64),
            "statistics_stale_mean": torch.stack([one.stale_mean for one in folds]),
            "statistics_fresh_mean": torch.stack([one.fresh_mean for one in folds]),
            "statistics_stale_scatter": torch.stack([one.stale_scatter for one in folds]),
            "statistics_cross_scatter": torch.stack([one.cross_scatter for one in folds]),
        }

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned (ConfigurationError if it is that of other sizes or folds)."""
        wanted = (len(self._folds), self.dim_in, self.dim_out)
        if state["statistics_cross_scatter"].shape != wanted:
            raise ConfigurationError(
                "state of pair statistics", expected=f"folds and sizes {wanted}",
                got=str(tuple(state["statistics_cross_scatter"].shape)), cure="Make them with the settings of then.",
            )  # fmt: skip
        self.seen = int(state["statistics_seen"])
        self._folds = [
            Moments(
                weight, squares, state["statistics_stale_mean"][number], state["statistics_fresh_mean"][number],
                state["statistics_stale_scatter"][number], state["statistics_cross_scatter"][number], fresh_scatter,
            )
            for number, (weight, squares, fresh_scatter) in enumerate(state["statistics_scalars"].tolist())
        ]  # fmt: skip

    def _together(self, *, without: int | None = None) -> Moments:
        kept = [fold for number, fold in enumerate(self._folds) if number != without]
        return reduce(Moments.__add__, kept)

    def _errors(self, priors: list[str], ridges: tuple[float, ...]) -> list[tuple[float, str, float]]:
        """Return the mean squared error on left-out folds of every prior and ridge."""
        total = {prior: torch.zeros(len(ridges), dtype=torch.float64) for prior in priors}
        judged = 0.0
        for number, fold in enumerate(self._folds):
            others = self._together(without=number)
            if fold.weight == 0 or others.weight == 0:
                continue
            system = others.system()
            for prior in priors:
                total[prior] += fold.errors_of(system, system.prior_map(prior), ridges)
            judged += fold.weight
        # A tiny negative number is the rounding of a perfect fit.
        means = {prior: (errors / (judged or 1.0)).clamp(min=0.0).tolist() for prior, errors in total.items()}
        return [(error, prior, ridge) for prior in priors for error, ridge in zip(means[prior], ridges, strict=True)]

    def _best_rank(self, full: AffineFit, ranks: list[int]) -> int:
        held_out, others = self._folds[0], self._together(without=0)
        if self.seen < 2 * len(self._folds) or held_out.weight == 0 or others.weight == 0:
            return ranks[0]
        system, errors = others.system(), []
        for rank in ranks:
            weight = system.reduced(full, rank).weight.double()
            if self.dim_in == self.dim_out:
                weight = weight + torch.eye(self.dim_in, dtype=torch.float64)
            # At infinite ridge nothing is added to the map that is judged.
            errors.append(float(held_out.errors_of(system, weight, (float("inf"),))[0]))
        return ranks[min(range(len(ranks)), key=errors.__getitem__)]
