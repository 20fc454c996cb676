"""How long a corrector holds while training moves the encoder on, and when to refresh the cache.

Read from run records alone. With D(s, t) the mean squared distance between targets encoded at steps s and t of a run,
the law is D(s, t) = rate · (t^power − s^power): distances from the start grow by a power of the steps, and squared
distances add up, as they do for increments that do not point the same way. A corrector that was fitted at s and then
left alone has at t the error it had at s plus D(s, t). Both are approximations. Over four pairs of steps of two
fine-tuning runs the second, given the true D(s, t), came within 11 % of the error. The first is weaker: D(s, t) taken
from distances to the start alone was too small by factors of 1.3, 1.4 and 1.7, and in a fourth case, where the distance
from the start had stopped growing, it was below 0 while targets still moved. So distances after a refresh, where a
record has them, are used as they are, and where none has, the forecast is raised and widened. How often these intervals
hold what happens has not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.learning_curves import LEVEL, Forecast
from hf_corrector.metrics import FloatArray
from hf_corrector.records import RunRecord
from hf_corrector.training.refresh_schedule import RefreshSchedule

DRAWS = 1_000
FEWEST_POINTS = 3
LONGEST_STEPS = 10_000_000
# Log-mean and log-spread of D(s, t) over what distances to the start alone say, see above; and the log-spread where
# distances after a refresh are known, which is a guess.
INCREMENT_SHIFT, INCREMENT_SPREAD = 0.4, 0.2
LAW_SPREAD = 0.1

_POWERS = np.geomspace(0.1, 2.0, 60)


@dataclass(frozen=True, eq=False)
class DriftLaw:
    """Equally likely laws of how targets move with the steps of a run.

    Attributes:
        rates: ``(draws,)``.
        powers: ``(draws,)``.
        points: Measurements behind it.
    """

    rates: FloatArray
    powers: FloatArray
    points: int

    def draws(self, start: float, stop: float) -> FloatArray:
        """Return the mean squared distance between two steps under every drawn law, ``(draws,)``."""
        distances: FloatArray = self.rates * (stop**self.powers - start**self.powers)
        return distances


@dataclass(frozen=True, eq=False)
class HoldingTime:
    """How long a corrector keeps to a floor.

    Attributes:
        steps: Optimiser steps after its fit, up to :data:`LONGEST_STEPS`.
        fitted_error: Mean squared error right after the fit.
        law: How the encoder drifts.
    """

    steps: Forecast
    fitted_error: float
    law: DriftLaw


@dataclass(frozen=True)
class RefreshPlan:
    """Refreshes that keep the cache to a floor at the fewest passes.

    Attributes:
        refresh_steps: The schedule as the trainer's argument of that name takes it.
        steps: Steps at which the cache is made anew.
        passes: Encoder passes of all refreshes.
        cost: Their price, in the unit of ``cost_per_pass``.
    """

    refresh_steps: str
    steps: tuple[int, ...]
    passes: int
    cost: float


def fit_drift_law(records: Sequence[RunRecord], *, seed: int = 0) -> DriftLaw:
    """Fit the law to the cosines of stale and fresh vectors that runs logged.

    The power is the one that fits best in logarithms, drawn anew by resampling runs, and measurements within runs, with
    replacement.

    Args:
        records: Records of training runs of this encoder on this data, of which the learning rate should be that of the
            run to come.
        seed: Seed of the resampling.

    Raises:
        DataError: If they hold fewer than three usable measurements.
    """
    runs = [points for points in (list(_distances(record)) for record in records) if points]
    count = sum(map(len, runs))
    if count < FEWEST_POINTS:
        raise DataError(
            "run records", expected=f"at least {FEWEST_POINTS} logged steps with cosine_stale_fresh", got=str(count),
            cure="Name runs of hf-corrector train with negatives from a cache, logged every few steps.",
        )  # fmt: skip
    generator = np.random.default_rng(seed)
    restarted = any(start > 0 for points in runs for start, _, _ in points)
    mean, spread = (0.0, LAW_SPREAD) if restarted else (INCREMENT_SHIFT, INCREMENT_SPREAD)
    shift = generator.normal(mean, spread, DRAWS)
    rates, powers = np.empty(DRAWS), np.empty(DRAWS)
    for draw in range(DRAWS):
        drawn = [runs[one] for one in generator.integers(len(runs), size=len(runs))]
        sample = np.array(
            [points[one] for points in drawn for one in generator.integers(len(points), size=len(points))]
        )
        rates[draw], powers[draw] = _best_law(sample)
    return DriftLaw(rates * np.exp(shift), powers, count)


def holding_time(
    records: Sequence[RunRecord], *, min_cosine: float, fitted_at: int, fitted_cosine: float | None = None,
    level: float = LEVEL,
) -> HoldingTime:  # fmt: skip
    """Forecast for how many steps a corrector that is fitted no more keeps its mean cosine to the fresh vectors.

    Args:
        records: Records of training runs, see :func:`fit_drift_law`.
        min_cosine: The floor.
        fitted_at: Steps from the making of the cache to the fit.
        fitted_cosine: Mean cosine of corrected and fresh vectors right after the fit; by default the last one logged.
        level: Nominal probability of the interval.

    Raises:
        ConfigurationError: If a number is out of range.
        DataError: If the records hold too little.
    """
    if not -1 <= min_cosine < 1 or fitted_at < 0:
        raise ConfigurationError(
            "holding time", expected="a cosine from -1 to below 1 and a step of at least 0",
            got=f"{min_cosine} and {fitted_at}", cure="Give a floor such as 0.9.",
        )  # fmt: skip
    fitted_error = 2.0 - 2.0 * (_last_corrected(records) if fitted_cosine is None else fitted_cosine)
    law, room = fit_drift_law(records), 2.0 - 2.0 * min_cosine - fitted_error
    if room <= 0:
        return HoldingTime(Forecast(0.0, 0.0, 0.0, level), fitted_error, law)
    ends = (fitted_at**law.powers + room / law.rates) ** (1.0 / law.powers)
    steps = np.minimum(ends - fitted_at, LONGEST_STEPS)
    return HoldingTime(Forecast.of_draws(steps, level=level), fitted_error, law)


def refresh_schedule(
    law: DriftLaw, *, min_cosine: float, max_steps: int, targets: int, cost_per_pass: float = 0.0
) -> RefreshPlan:
    """Space refreshes as far apart as a floor allows, which is what spends the fewest passes.

    The next refresh is due where the median of D(last refresh, step) reaches the squared distance 2 − 2 · cosine of the
    floor. Where drift slows down, the spaces grow.

    Args:
        law: How the encoder drifts, see :func:`fit_drift_law`.
        min_cosine: Floor on the mean cosine of cached and fresh vectors.
        max_steps: Length of the run.
        targets: Number of targets of the corpus, each of which is one pass per refresh.
        cost_per_pass: Price of encoding one target.

    Raises:
        ConfigurationError: If a number is out of range.
    """
    if not -1 <= min_cosine < 1 or max_steps < 1 or targets < 1 or cost_per_pass < 0:
        raise ConfigurationError(
            "refresh schedule", expected="a cosine below 1, at least 1 step and 1 target, and no negative price",
            got=f"{min_cosine}, {max_steps}, {targets} and {cost_per_pass}", cure="Give other numbers.",
        )  # fmt: skip
    floor, steps, last = 2.0 - 2.0 * min_cosine, [], 0
    while (found := _first_beyond(law, last, floor, max_steps)) is not None:
        steps.append(found)
        last = found
    # The trainer refreshes at multiples of a number within phases; a phase of one step names that step.
    text = ",".join(f"{step}-{step + 1}:{step}" for step in steps) or "never"
    RefreshSchedule.parse(text)
    passes = len(steps) * targets
    return RefreshPlan(text, tuple(steps), passes, passes * cost_per_pass)


def _first_beyond(law: DriftLaw, last: int, floor: float, max_steps: int) -> int | None:
    """Return the last step at which the median distance is within the floor, or None if the run ends by then."""
    if float(np.median(law.draws(last, max_steps))) <= floor:
        return None
    low, high = last + 1, max_steps
    while low < high:
        middle = (low + high + 1) // 2
        if float(np.median(law.draws(last, middle))) <= floor:
            low = middle
        else:
            high = middle - 1
    # Made anew after the last step, the cache would serve nobody.
    return low if low < max_steps else None


def _best_law(points: FloatArray) -> tuple[float, float]:
    """Return rate and power with the least squares of logarithms for points ``(n, 3)``: start, stop, distance."""
    start, stop, distance = points.T
    shapes = np.log(stop ** _POWERS[:, None] - start ** _POWERS[:, None])
    level = (np.log(distance) - shapes).mean(axis=1)
    misses = (np.log(distance) - shapes - level[:, None]).var(axis=1)
    best = int(misses.argmin())
    return math.exp(level[best]), float(_POWERS[best])


def _distances(record: RunRecord) -> Iterator[tuple[float, float, float]]:
    """Yield start, stop and mean squared distance of unit vectors for every logged interval without a refresh."""
    schedule = RefreshSchedule.parse(record.arguments.get("refresh_steps") or "never")
    last, before = 0, 0
    for entry in record.history:
        if "cosine_stale_fresh" not in entry or "step" not in entry:
            continue
        step = int(entry["step"])
        refreshed = [one for one in range(before + 1, step + 1) if schedule.due(one)]
        distance = 2.0 - 2.0 * float(entry["cosine_stale_fresh"])
        # A refresh after the last step of an interval leaves its mean to one cache; any other mixes two.
        if refreshed in ([], [step]) and distance > 1e-6 and step > before:
            # What is logged is a mean over the steps since the entry before.
            yield float(last), (before + step + 1) / 2.0, distance
        last, before = refreshed[-1] if refreshed else last, step


def _last_corrected(records: Sequence[RunRecord]) -> float:
    found = [
        float(entry["cosine_corrected_fresh"])
        for record in records
        for entry in record.history
        if "cosine_corrected_fresh" in entry
    ]
    if not found:
        raise DataError(
            "run records", expected="logged steps with cosine_corrected_fresh", got="none",
            cure="Name runs with a corrector, or pass the cosine after the fit.",
        )  # fmt: skip
    return found[-1]
