"""Learning curves: how an error falls with the number of pairs, and what that says about numbers not tried.

The law is error(n) = floor + scale · (n + onset)^(−exponent): with no onset the usual form of learning curves (Cortes
et al., *Learning Curves: Asymptotic Values and Rate of Convergence*, NIPS 1993); with one, a curve that falls slowly
until there are about as many pairs as directions to learn and to its power from there. A handful of sizes cannot fix
four parameters, so no single curve is fitted: floors, exponents and onsets are spread over a grid, each weighted by how
well it explains the measured errors and by how usual it is, and a forecast is what all of them say together. To that
spread a forecast adds what the law leaves out: the rows the errors were measured on, and a law that holds only nearly,
the less the further out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.metrics import FloatArray

LEVEL = 0.9
DRAWS = 4_000
# Relative, per size: how far a measured curve strays from the law even without noise.
MISFIT = 0.01
# Relative, per factor e of extrapolation.
EXTRAPOLATION = 0.02
# Before any measurement: exponents are taken to be log-normal around this one.
USUAL_EXPONENT, EXPONENT_SPREAD = 0.6, 0.5
# Of Student's t, in place of the normal distribution, so that one odd size does not decide.
DEGREES_OF_FREEDOM = 4.0

_FLOORS = np.linspace(0.0, 1.0, 41)
_EXPONENTS = np.geomspace(0.1, 2.0, 24)
# Relative to the largest size.
_ONSETS = np.array([0.0, 0.125, 0.25, 0.5, 1.0, 2.0])


@dataclass(frozen=True)
class Forecast:
    """What a number not measured is expected to be.

    Attributes:
        estimate: The median.
        low: Lower end of the interval.
        high: Upper end.
        level: Nominal probability that the number lies between them.
    """

    estimate: float
    low: float
    high: float
    level: float = LEVEL

    @classmethod
    def of_draws(cls, draws: FloatArray, *, level: float = LEVEL) -> Forecast:
        """Summarise draws ``(draws,)`` by median and central interval."""
        low, middle, high = np.quantile(draws, ((1 - level) / 2, 0.5, (1 + level) / 2))
        return cls(float(middle), float(low), float(high), level)

    def to_dict(self) -> dict[str, float]:
        """Return all fields for JSON."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high, "level": self.level}


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """Curves that explain the measured errors, as equally likely draws.

    Attributes:
        sizes: Numbers of pairs measured, ascending, ``(sizes,)``.
        means: Mean error at each, ``(sizes,)``.
        floors: Error that no number of pairs removes, ``(draws,)``.
        reducible: Error above the floor at the largest size, ``(draws,)``.
        exponents: How fast that falls, ``(draws,)``.
        onsets: Number of pairs from which it does, ``(draws,)``.
        shared_noise: Relative error of all measurements together, ``(draws,)``.
        law_noise: Relative error of the law per factor e beyond the largest size, ``(draws,)``.
    """

    sizes: FloatArray
    means: FloatArray
    floors: FloatArray
    reducible: FloatArray
    exponents: FloatArray
    onsets: FloatArray
    shared_noise: FloatArray
    law_noise: FloatArray

    def draws(self, pairs: float) -> FloatArray:
        """Return the errors at a number of pairs under every drawn curve, ``(draws,)``, none below 0."""
        growth = (pairs + self.onsets) / (self.sizes[-1] + self.onsets)
        errors = self.floors + self.reducible * growth**-self.exponents
        beyond = abs(math.log(pairs / self.sizes[-1]))
        noisy: FloatArray = errors * (1.0 + self.shared_noise + beyond * self.law_noise)
        return np.maximum(noisy, 0.0)

    def forecast(self, pairs: float, *, level: float = LEVEL) -> Forecast:
        """Forecast the error at a number of pairs.

        Raises:
            ConfigurationError: If ``pairs`` or ``level`` is out of range.
        """
        if not pairs >= 1 or not 0 < level < 1:
            raise ConfigurationError(
                "learning curve", expected="at least 1 pair and a level between 0 and 1",
                got=f"{pairs} and {level}", cure="Ask for another number.",
            )  # fmt: skip
        return Forecast.of_draws(self.draws(pairs), level=level)

    def law(self) -> tuple[float, float, float, float]:
        """Return floor, scale, exponent and onset of floor + scale · (n + onset)^(−exponent), medians of the draws."""
        exponent, onset = float(np.median(self.exponents)), float(np.median(self.onsets))
        scale = float(np.median(self.reducible)) * (float(self.sizes[-1]) + onset) ** exponent
        return float(np.median(self.floors)), scale, exponent, onset


def fit_learning_curve(
    sizes: Sequence[int],
    errors_per_resample: FloatArray,
    *,
    population: int | None = None,
    relative_sd: float = 0.0,
    seed: int = 0,
) -> LearningCurve:
    """Fit the law to errors measured at several sizes.

    Resamples of one probe overlap, so their scatter tells too little of how the error would differ from probe to probe.
    With a share w = size / population of the probe in each, drawn without replacement, the scatter shows (1 − w) of the
    variance of one fit, and the mean of R resamples still has (w + (1 − w) / R) of it.

    Args:
        sizes: Numbers of pairs, ascending, at least two.
        errors_per_resample: Error of each fit, ``(resamples, sizes)``; a resample's fits are nested and judged on the
            same rows.
        population: Pairs the resamples were drawn from; without it resamples count as independent.
        relative_sd: Relative standard error that all measurements share, as they were made on the same rows.
        seed: Seed of the draws.

    Raises:
        DataError: If shapes disagree, sizes do not ascend or an error is not a positive finite number.
    """
    errors, counts = np.asarray(errors_per_resample, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    _check(counts, errors, population)
    means = errors.mean(axis=0)
    variances = _variances(counts, errors, population) + MISFIT**2
    grid = np.meshgrid(_FLOORS * means[-1], _EXPONENTS, _ONSETS * counts[-1], indexing="ij")
    floors, exponents, onsets = (axis.ravel() for axis in grid)
    shapes = ((counts + onsets[:, None]) / (counts[-1] + onsets[:, None])) ** -exponents[:, None]
    precision = 1.0 / (variances * means**2)
    spread = 1.0 / (shapes**2 @ precision)
    # An error cannot rise with the number of pairs.
    reducible = np.maximum(((means - floors[:, None]) * shapes) @ precision * spread, 0.0)
    misses = (means - floors[:, None] - reducible[:, None] * shapes) ** 2 * precision
    log_weight = -(DEGREES_OF_FREEDOM + 1) / 2 * np.log1p(misses / DEGREES_OF_FREEDOM).sum(axis=1)
    log_weight += 0.5 * np.log(spread) - (np.log(exponents / USUAL_EXPONENT) / EXPONENT_SPREAD) ** 2 / 2
    weight = np.exp(log_weight - log_weight.max())
    generator = np.random.default_rng(seed)
    drawn = generator.choice(len(weight), size=DRAWS, p=weight / weight.sum())
    noise = generator.standard_normal((3, DRAWS))
    shared = math.sqrt(relative_sd**2 + MISFIT**2 + float(_one_fit(counts, errors, population)[-1]))
    return LearningCurve(
        sizes=counts, means=means, floors=floors[drawn],
        reducible=np.maximum(reducible[drawn] + np.sqrt(spread[drawn]) * noise[0], 0.0), exponents=exponents[drawn],
        onsets=onsets[drawn], shared_noise=shared * noise[1], law_noise=EXTRAPOLATION * noise[2],
    )  # fmt: skip


def pairs_for(curve: LearningCurve, error: float, *, largest: int) -> int | None:
    """Return the fewest pairs whose median error is no larger than ``error``, or None beyond ``largest`` pairs."""
    if curve.forecast(largest).estimate > error:
        return None
    low, high = 1, largest
    while low < high:
        middle = (low + high) // 2
        if curve.forecast(middle).estimate <= error:
            high = middle
        else:
            low = middle + 1
    return low


def interval_score(forecast: Forecast, value: float) -> float:
    """Return width plus 2 / (1 − level) times what the interval misses the value by; lower is better.

    Gneiting and Raftery, *Strictly Proper Scoring Rules, Prediction, and Estimation*, JASA 2007, equation 43.
    """
    missed = max(forecast.low - value, 0.0) + max(value - forecast.high, 0.0)
    return forecast.high - forecast.low + 2.0 / (1.0 - forecast.level) * missed


def _one_fit(sizes: FloatArray, errors: FloatArray, population: int | None) -> FloatArray:
    """Return the relative variance of one fit's error at each size, from the scatter of resamples, ``(sizes,)``."""
    if len(errors) < 2:
        return np.zeros(len(sizes))
    # What makes one resample harder at all sizes is its held-out rows, which `relative_sd` speaks for.
    relative = errors / errors.mean(axis=0)
    relative = relative / relative.mean(axis=1, keepdims=True)
    share = np.zeros(len(sizes)) if population is None else np.minimum(sizes / population, 0.95)
    # One fit varies less the more pairs it has; where resamples hardly differ, the correction magnifies other noise.
    variance: FloatArray = np.minimum.accumulate(relative.var(axis=0, ddof=1) / (1.0 - share))
    return variance


def _variances(sizes: FloatArray, errors: FloatArray, population: int | None) -> FloatArray:
    """Return the relative variance of the mean error at each size, ``(sizes,)``."""
    share = np.zeros(len(sizes)) if population is None else np.minimum(sizes / population, 0.95)
    variance: FloatArray = _one_fit(sizes, errors, population) * (share + (1.0 - share) / len(errors))
    return variance


def _check(sizes: FloatArray, errors: FloatArray, population: int | None) -> None:
    usable = errors.ndim == 2 and len(errors) > 0 and errors.shape[1:] == sizes.shape and len(sizes) >= 2
    if not usable or not (np.diff(sizes) > 0).all() or sizes[0] < 1:
        raise DataError(
            "learning curve", expected="two or more ascending sizes and errors of shape (resamples, sizes)",
            got=f"sizes {sizes.tolist()} and errors of shape {errors.shape}", cure="Measure at more sizes.",
        )  # fmt: skip
    if not np.isfinite(errors).all() or (errors <= 0).any():
        raise DataError(
            "learning curve", expected="positive finite errors", got=f"{errors.min()} to {errors.max()}",
            cure="Measure errors that are not exactly 0, such as squared distances on held-out rows.",
        )  # fmt: skip
    if population is not None and population < sizes[-1]:
        raise DataError(
            "learning curve", expected=f"a population of at least {sizes[-1]:.0f} pairs", got=str(population),
            cure="Pass the number of pairs the resamples were drawn from.",
        )  # fmt: skip
