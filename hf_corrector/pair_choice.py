"""Which targets to re-encode as fitting pairs: at random, spread over the stale vectors, or where queries go.

Rows that judge the fit are held out by construction: no method can return one of :attr:`Limits.held_out`. Nor a copy of
one: a target with (nearly) the same stale vector as a held-out one usually has the same text, and fitting on a copy is
fitting on the original. Targets that are only similar stay, as they do when a corrector is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from hf_corrector.errors import ConfigurationError, DataError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

METHODS = ("random", "diverse", "traffic")
# Lloyd's algorithm on so many rows per centroid, so often: what follows changes few of the chosen rows.
POINTS_PER_CENTROID = 32
LLOYD_STEPS = 10
SEED_ROUNDS = 5
# A tenth of the traffic is shared by all rows, so that one nobody has asked for yet can be chosen too.
UNIFORM_SHARE = 0.1
_SCORES_AT_ONCE = 2**24


class StaleVectors(Protocol):
    """Vectors of all targets as cached; any source of rows."""

    def __len__(self) -> int: ...

    def gather(self, rows: torch.Tensor | IntArray) -> torch.Tensor:
        """Return any rows, ``(n, dim)``."""


@dataclass(frozen=True)
class Limits:
    """What every method keeps to.

    Attributes:
        held_out: Rows that are never chosen: the targets that are to judge the fit.
        duplicate_cosine: A row whose stale vector has at least this cosine with a held-out one counts as its copy and
            is not chosen either; None to allow copies.
        seed: Seed of all draws.
    """

    held_out: Sequence[int] | IntArray = ()
    duplicate_cosine: float | None = 0.999
    seed: int = 0


@dataclass(frozen=True, eq=False)
class PairChoice:
    """Chosen rows.

    Attributes:
        rows: Target rows, ascending, ``(n,)`` int64.
        weights: What each pair should weigh in a fit, mean 1, ``(n,)``; None where all weigh the same.
        method: How they were chosen.
        copies: How many rows were passed over as copies of held-out ones.
    """

    rows: IntArray
    weights: FloatArray | None = field(repr=False)
    method: str
    copies: int = 0


def choose_pairs(
    vectors: StaleVectors, num_pairs: int, *, method: str = "random", traffic: FloatArray | None = None,
    limits: Limits | None = None,
) -> PairChoice:  # fmt: skip
    """Choose targets to re-encode as fitting pairs.

    * ``random``: every row alike.
    * ``diverse``: the row nearest to each centroid of k-means over the stale vectors, so that sparse regions are seen
      too; doubles are replaced by random rows. Pairs weigh the same: evening out the regions is the point.
    * ``traffic``: without replacement, proportionally to ``traffic``. Pairs weigh traffic divided by the probability
      of having been chosen, which makes the fitted error an unbiased estimate of the error per *search*, not per
      target: among few pairs all weigh about the same, a row that was certain to be chosen weighs its traffic.

    Args:
        vectors: Stale vectors of all targets.
        num_pairs: How many.
        method: One of :data:`METHODS`.
        traffic: How often each row is asked for, ``(rows,)``; see :func:`traffic_of_searches`. For ``traffic`` only.
        limits: Rows to hold out, and the seed.

    Raises:
        ConfigurationError: If the method is unknown, or traffic is given to another one or missing.
        DataError: If fewer rows are available than asked for, or traffic does not fit the rows.
    """
    limits = Limits() if limits is None else limits
    if method not in METHODS or (method == "traffic") != (traffic is not None):
        raise ConfigurationError(
            "pair choice", expected=f"a method among {METHODS}, and traffic for 'traffic' only",
            got=f"{method!r} {'without' if traffic is None else 'with'} traffic", cure="Change one of the two.",
        )  # fmt: skip
    free = np.ones(len(vectors), dtype=np.bool_)
    free[_checked_held_out(limits.held_out, len(vectors))] = False
    _check_enough(num_pairs, int(free.sum()), total=len(vectors))
    order = _ORDERS[method](vectors, free, num_pairs, _Draw(limits.seed, traffic))
    rows, copies = _without_copies(vectors, order, num_pairs, limits)
    rows = np.sort(rows)
    weights = None
    if traffic is not None:
        weights = _fit_weights(_smoothed(traffic, free), rows, num_pairs)
    return PairChoice(rows, weights, method, copies)


def traffic_of_searches(
    found: IntArray, total: int, *, counts: Sequence[float] | FloatArray | None = None
) -> FloatArray:
    """Count how often each row is among the results of logged queries.

    Args:
        found: Rows found for each query, padded with -1, ``(queries, k)``.
        total: Number of rows.
        counts: How often each query was asked, ``(queries,)``; once if not given.

    Returns:
        Searches that returned the row, ``(total,)``.

    Raises:
        DataError: If counts or rows do not fit.
    """
    asked = np.ones(len(found)) if counts is None else np.asarray(counts, dtype=np.float64)
    if (
        asked.shape != (len(found),)
        or not np.isfinite(asked).all()
        or (asked < 0).any()
        or found.max(initial=-1) >= total
    ):
        raise DataError(
            "query log", expected=f"a count of at least 0 for each of {len(found)} queries, rows below {total}",
            got=f"counts of shape {asked.shape}, rows up to {found.max(initial=-1)}",
            cure="Search the old index again.",
        )  # fmt: skip
    hit = found >= 0
    weights = np.broadcast_to(asked[:, None], found.shape)[hit]
    return np.bincount(found[hit], weights=weights, minlength=total).astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Draw:
    """Where a method's randomness and weights come from."""

    seed: int
    traffic: FloatArray | None

    @property
    def numpy(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)


def _random_order(vectors: StaleVectors, free: npt.NDArray[np.bool_], num_pairs: int, draw: _Draw) -> IntArray:
    return draw.numpy.permutation(np.flatnonzero(free))


def _diverse_order(vectors: StaleVectors, free: npt.NDArray[np.bool_], num_pairs: int, draw: _Draw) -> IntArray:
    """Return the rows nearest to the centroids, then all others at random."""
    shuffled = draw.numpy.permutation(np.flatnonzero(free))
    looked_at = shuffled[: num_pairs * POINTS_PER_CENTROID]
    points = vectors.gather(torch.from_numpy(looked_at)).float()
    centroids = _first_centroids(points, num_pairs, draw.numpy)
    for _ in range(LLOYD_STEPS):
        owner = _nearest(points, centroids)
        sizes = torch.bincount(owner, minlength=num_pairs)
        sums = torch.zeros_like(centroids).index_add_(0, owner, points)
        # A centroid that lost all its points stays where it is.
        centroids = torch.where((sizes > 0)[:, None], sums / sizes.clamp(min=1)[:, None], centroids)
    nearest = np.unique(looked_at[_nearest(centroids, points).numpy()])
    return np.concatenate([nearest, shuffled[~np.isin(shuffled, nearest)]])


def _first_centroids(points: torch.Tensor, count: int, generator: np.random.Generator) -> torch.Tensor:
    """Return points far from each other, ``(count, dim)``: in rounds, by squared distance to those before.

    Random ones would all lie in dense regions, where Lloyd's algorithm leaves them (k-means||, Bahmani et al., 2012).
    """
    chosen = np.arange(-(-count // SEED_ROUNDS))  # the points come in random order
    while len(chosen) < count:
        distances = _squared_distances(points, points[torch.from_numpy(chosen)]).numpy().astype(np.float64)
        distances[chosen] = 0.0
        # Where all other points are copies of chosen ones, any will do.
        odds = distances if np.count_nonzero(distances) >= count - len(chosen) else distances + 1e-9
        odds[chosen] = 0.0
        more = min(-(-count // SEED_ROUNDS), count - len(chosen))
        chosen = np.concatenate([chosen, generator.choice(len(points), more, replace=False, p=odds / odds.sum())])
    return points[torch.from_numpy(chosen)].clone()


def _squared_distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of each point to its nearest centre, ``(points,)``."""
    return (points - centres[_nearest(points, centres)]).square().sum(dim=1)


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Return for each point the nearest centre, ``(points,)`` int64."""
    half_norms = centres.square().sum(dim=1) / 2
    step = max(1, _SCORES_AT_ONCE // len(centres))
    return torch.cat([(part @ centres.T - half_norms).argmax(dim=1) for part in torch.split(points, step)])


def _traffic_order(vectors: StaleVectors, free: npt.NDArray[np.bool_], num_pairs: int, draw: _Draw) -> IntArray:
    """Return the rows in the order of arrival times of rate traffic (Efraimidis and Spirakis, 2006)."""
    if draw.traffic is None:
        return np.zeros(0, dtype=np.int64)
    rates = _smoothed(draw.traffic, free)
    rows = np.flatnonzero(free)
    return rows[np.argsort(draw.numpy.exponential(size=len(rows)) / rates[rows], kind="stable")]


_ORDERS = {"random": _random_order, "diverse": _diverse_order, "traffic": _traffic_order}


def _smoothed(traffic: FloatArray, free: npt.NDArray[np.bool_]) -> FloatArray:
    """Return the share of the traffic of each row that may be chosen, 0 for the others, ``(rows,)``."""
    traffic = np.asarray(traffic, dtype=np.float64)
    if traffic.shape != free.shape or not np.isfinite(traffic).all() or (traffic < 0).any():
        raise DataError(
            "traffic", expected=f"a finite number of at least 0 for each of {len(free)} rows",
            got=f"shape {traffic.shape}", cure="Use traffic_of_searches(), or one number per row of the cache.",
        )  # fmt: skip
    allowed = np.where(free, traffic, 0.0)
    if allowed.sum() == 0:
        raise DataError(
            "traffic", expected="a row that is asked for and not held out", got="none",
            cure="Give a log of other queries than the judged ones, or choose pairs at random.",
        )  # fmt: skip
    rates: FloatArray = (1 - UNIFORM_SHARE) * allowed / allowed.sum() + UNIFORM_SHARE * free / free.sum()
    return rates


def _fit_weights(rates: FloatArray, rows: IntArray, num_pairs: int) -> FloatArray:
    """Return traffic over the probability of having been chosen, mean 1, ``(n,)``.

    Among arrivals at the given rates the first ``n`` are those before some time t; so a row's probability is close to
    1 − exp(−t rate), with t such that n rows are expected.
    """
    low, high = 0.0, 1.0
    while -np.expm1(-high * rates).sum() < num_pairs and high < 1e18:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-middle * rates).sum() < num_pairs else (low, middle)
    weights: FloatArray = rates[rows] / -np.expm1(-high * rates[rows])
    weights /= weights.mean()
    return weights


def _without_copies(
    vectors: StaleVectors, order: IntArray, num_pairs: int, limits: Limits
) -> tuple[IntArray, int]:  # fmt: skip
    """Return the first rows in the given order that are no copies of held-out ones, and how many were passed over."""
    held_out = np.asarray(limits.held_out, dtype=np.int64)
    if limits.duplicate_cosine is None or not len(held_out):
        return order[:num_pairs], 0
    judged = F.normalize(vectors.gather(torch.from_numpy(np.unique(held_out))).float(), dim=1)
    kept: list[IntArray] = []
    taken = copies = place = 0
    while taken < num_pairs and place < len(order):
        block = order[place : place + max(num_pairs - taken, 256)]
        place += len(block)
        mine = F.normalize(vectors.gather(torch.from_numpy(block)).float(), dim=1)
        step = max(1, _SCORES_AT_ONCE // len(judged))
        closest = torch.cat([(part @ judged.T).amax(dim=1) for part in torch.split(mine, step)]).numpy()
        usable = block[closest < limits.duplicate_cosine][: num_pairs - taken]
        copies += int((closest >= limits.duplicate_cosine).sum())
        kept.append(usable)
        taken += len(usable)
    if taken < num_pairs:
        _check_enough(num_pairs, taken, total=len(vectors), copies=copies)
    return np.concatenate(kept), copies


def _checked_held_out(held_out: Sequence[int] | IntArray, total: int) -> IntArray:
    rows = np.asarray(held_out, dtype=np.int64)
    if len(rows) and not 0 <= rows.min() <= rows.max() < total:
        raise DataError(
            "held-out rows", expected=f"rows from 0 to {total - 1}", got=f"{rows.min()} to {rows.max()}",
            cure="Pass rows of this cache.",
        )  # fmt: skip
    return rows


def _check_enough(num_pairs: int, available: int, *, total: int, copies: int = 0) -> None:
    if num_pairs < 2:
        raise ConfigurationError("num_pairs", expected="at least 2", got=str(num_pairs), cure="Re-encode more targets.")
    if available < num_pairs:
        held = "" if not copies else f", {copies} of them copies of those"
        raise DataError(
            "num_pairs", expected=f"at most {available} pairs: of {total} targets the others judge the fit{held}",
            got=str(num_pairs), cure="Ask for fewer pairs, or judge on fewer queries.",
        )  # fmt: skip
