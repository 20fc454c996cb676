"""The answer: which family, how many pairs, what that recovers, or re-embed now, or keep the old model.

How recovery is forecast, and whose intervals were checked, is said in :mod:`hf_corrector.planning.forecasts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.learning_curves import DRAWS, LEVEL, Forecast
from hf_corrector.metrics import FloatArray
from hf_corrector.planning.forecasts import (
    CHECKED_HORIZON,
    caution,
    is_checked,
    recovery_draws,
    score_draws,
    squared_draws,
)
from hf_corrector.planning.probe import FamilyCurve

# Nothing below this recovery tells how good a fresh index would be.
LEAST_RECOVERY = 0.05

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Goal:
    """What is wanted and what it may cost.

    Attributes:
        targets: Targets of the corpus.
        min_recovery: Share of what fresh vectors would gain over stale ones that correction should recover.
        max_pairs: Encoder passes that may be spent, the probe's included; None for up to ``max_share``.
        max_share: Share of the corpus beyond which encoding pairs is no better than encoding everything.
        seconds_per_pass: Seconds to encode one target, if known.
        price_per_hour: Price of an hour of the machine that encodes, if known.
    """

    targets: int
    min_recovery: float = 0.8
    max_pairs: int | None = None
    max_share: float = 0.5
    seconds_per_pass: float | None = None
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        rates = [rate for rate in (self.seconds_per_pass, self.price_per_hour) if rate is not None]
        pairs = 1 if self.max_pairs is None else self.max_pairs
        if not (0 < self.min_recovery < 1 and 0 < self.max_share <= 1) or min(self.targets, pairs) < 1:
            raise ConfigurationError(
                "plan", expected="a recovery and a share between 0 and 1, and at least 1 target and pair",
                got=f"{self.min_recovery}, {self.max_share}, {self.targets} and {pairs}", cure="Give other numbers.",
            )  # fmt: skip
        if rates and not min(rates) >= 0:
            raise ConfigurationError(
                "plan", expected="rates of at least 0", got=str(rates), cure="Give the rates of your machine."
            )

    def seconds(self, passes: int) -> float | None:
        """Return how long encoding takes, if that is known."""
        return None if self.seconds_per_pass is None else passes * self.seconds_per_pass

    def price(self, passes: int) -> float | None:
        """Return what encoding costs, if that is known."""
        seconds = self.seconds(passes)
        if seconds is None or self.price_per_hour is None:
            return None
        return seconds / _SECONDS_PER_HOUR * self.price_per_hour


@dataclass(frozen=True, eq=False)
class MeasuredQuality:
    """Quality on judged queries that needs no more re-encoding, one value a clean query.

    Attributes:
        family: The family whose corrector, fitted to the whole probe, was judged.
        old: Old queries on the old index, ``(queries,)``, or None.
        stale: New queries on the old index, ``(queries,)``.
        corrected: New queries on the corrected index, ``(queries,)``.
        exponent: What was rehearsed there, see :func:`hf_corrector.planning.rehearsal.rehearsed_exponent`, or None.
    """

    family: str
    old: FloatArray | None
    stale: FloatArray
    corrected: FloatArray
    exponent: float | None = None


@dataclass(frozen=True)
class FamilyForecast:
    """What one family is expected to do.

    Attributes:
        name: The family.
        cosine: Measured mean cosine of corrected and fresh vectors, at the largest size fitted on.
        pairs: Numbers of pairs, ascending.
        recoveries: Recovery at each.
        squared_errors: Squared error at each.
        score_errors: Score error at each, as a share of the stale vectors'.
        pairs_needed: Fewest pairs whose expected recovery is the goal's, or None.
        checked: Whether such intervals were checked, see :func:`hf_corrector.planning.forecasts.is_checked`.
    """

    name: str
    cosine: float
    pairs: tuple[int, ...]
    recoveries: tuple[Forecast, ...]
    squared_errors: tuple[Forecast, ...]
    score_errors: tuple[Forecast, ...]
    pairs_needed: int | None
    checked: bool


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        verdict: ``"correct"``, ``"re-embed"`` or ``"keep the old model"``.
        family: The best family, also where it is not good enough.
        pairs: Pairs to fit it on, the probe's included.
        recovery: What that is expected to recover.
        families: Every family's forecast.
        goal: What was asked for.
        probe: Targets of the probe.
        quality: Mean quality of ``"old"`` and ``"stale"`` as measured, and of ``"corrected"`` (as planned) and
            ``"fresh"`` as forecast; empty without judgements.
        passes: Encoder passes to come, without the probe's.
        seconds: What they take, if known.
        price: What they cost, if known.
    """

    verdict: str
    family: str
    pairs: int
    recovery: Forecast
    families: tuple[FamilyForecast, ...]
    goal: Goal
    probe: int
    quality: Mapping[str, Forecast]
    passes: int
    seconds: float | None
    price: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "quality": {name: asdict(one) for name, one in self.quality.items()}}

    def table(self) -> str:
        """Return an aligned table for a terminal: forecasts with intervals by family and number of pairs."""
        width = max(len("family"), *(len(one.name) for one in self.families))
        lines = [
            f"{'family':<{width}}     pairs   expected recovery    score error left    squared error         needed"
        ]
        for one in self.families:
            needed = "-" if one.pairs_needed is None else f"{one.pairs_needed:,}"
            for place, (pairs, *forecasts) in enumerate(
                zip(one.pairs, one.recoveries, one.score_errors, one.squared_errors, strict=True)
            ):
                name, last = (one.name, needed) if place == 0 else ("", "")
                shown = "   ".join(f"{_written(forecast):<17}" for forecast in forecasts)
                lines.append(f"{name:<{width}} {pairs:9,}   {shown} {last:>8}".rstrip())
        lines += [f"{name + ' quality':<{width}} {_written(one)}" for name, one in self.quality.items()]
        return "\n".join(lines)

    def caution(self) -> str:
        """Say which intervals were checked."""
        return caution([one.name for one in self.families if one.checked], [one.name for one in self.families])

    def sentence(self) -> str:
        """Say in one sentence what to do and why."""
        spread = f"{_written(self.recovery)} of what fresh vectors would gain"
        cost = "".join(
            [
                f", {self.passes:,} more encoder passes",
                "" if self.seconds is None else f" ({self.seconds:,.0f} s",
                "" if self.seconds is None else ")" if self.price is None else f", {self.price:,.2f})",
            ]
        )
        if self.verdict == "correct":
            return f"Correct: {self.family} fitted to {self.pairs:,} pairs should recover {spread}{cost}."
        if self.verdict == "keep the old model":
            return (
                f"Keep the old model: it has {self.quality['old'].estimate:.3f} on judged queries; the new one would "
                f"have {_written(self.quality['corrected'])} after correction and {_written(self.quality['fresh'])} "
                "after re-embedding everything."
            )
        return (
            f"Re-embed now: {self.family} fitted to {self.pairs:,} pairs should recover {spread}, and "
            f"{self.goal.min_recovery:g} is asked for{cost}."
            if self.recovery.estimate < self.goal.min_recovery
            else f"Re-embed now: corrected vectors would be worse than the old model, fresh ones better{cost}."
        )


def plan(
    curves: Mapping[str, FamilyCurve], *, probe: int, goal: Goal, quality: MeasuredQuality | None = None, seed: int = 0
) -> Plan:
    """Decide what to do about a stale index.

    The family that needs the fewest pairs for the goal wins, the better one at the probe's size where several need no
    more than the probe. Where none gets there within the passes allowed, everything should be re-encoded. Where the
    old model's own quality is known and expected to be above that of the new model, both corrected as planned and
    fresh, it should be kept; where it lies between the two, re-embedding is the only gain.

    Args:
        curves: Every family's errors on the probe, see :func:`hf_corrector.planning.probe.probe_learning_curves`.
        probe: Targets of the probe, all of which the final corrector is fitted on too.
        goal: What is wanted.
        quality: What was measured with judgements.
        seed: Seed of draws.

    Raises:
        DataError: If there are no curves, or the quality is of another family.
    """
    if not curves or (quality is not None and quality.family not in curves):
        raise DataError(
            "plan", expected="curves, among them that of the judged family", got=str(list(curves)),
            cure="Measure the probe with that family.",
        )  # fmt: skip
    limit = max(probe, min(int(goal.max_share * goal.targets), CHECKED_HORIZON * probe, goal.max_pairs or goal.targets))
    exponent = None if quality is None else quality.exponent
    recovering = partial(recovery_draws, exponent=exponent, seed=seed)
    families = tuple(_forecast(curve, probe, limit, goal.min_recovery, recovering) for curve in curves.values())
    best = min(families, key=_preference)
    pairs = limit if best.pairs_needed is None else best.pairs_needed
    draws = recovering(curves[best.name], pairs)
    verdict = "re-embed" if best.pairs_needed is None else "correct"
    qualities: dict[str, Forecast] = {}
    if quality is not None:
        qualities, old_wins = _qualities(quality, draws, recovering(curves[quality.family], probe), seed)
        if old_wins["fresh"] and (old_wins["corrected"] or verdict == "re-embed"):
            verdict = "keep the old model"
        elif verdict == "correct" and old_wins["corrected"]:
            verdict = "re-embed"
    passes = {"correct": pairs - probe, "re-embed": goal.targets - probe}.get(verdict, 0)
    return Plan(
        verdict=verdict, family=best.name, pairs=pairs, recovery=Forecast.of_draws(draws), families=families,
        goal=goal, probe=probe, quality=qualities, passes=passes, seconds=goal.seconds(passes),
        price=goal.price(passes),
    )  # fmt: skip


def _forecast(
    curve: FamilyCurve,
    probe: int,
    limit: int,
    min_recovery: float,
    recovering: Callable[[FamilyCurve, int], FloatArray],
) -> FamilyForecast:
    grid = [probe]
    while grid[-1] < limit:
        grid.append(min(2 * grid[-1], limit))
    needed = _fewest(lambda pairs: float(np.median(recovering(curve, pairs))), min_recovery, grid)
    return FamilyForecast(
        name=curve.name, cosine=float(curve.cosines[:, -1].mean()), pairs=tuple(grid),
        recoveries=tuple(Forecast.of_draws(recovering(curve, pairs)) for pairs in grid),
        squared_errors=tuple(Forecast.of_draws(squared_draws(curve, pairs)) for pairs in grid),
        score_errors=tuple(Forecast.of_draws(score_draws(curve, pairs)) for pairs in grid), pairs_needed=needed,
        checked=is_checked(curve),
    )  # fmt: skip


def _fewest(expected: Callable[[int], float], goal: float, grid: list[int]) -> int | None:
    """Return the fewest pairs, from the first to the last of the grid, that reach the goal."""
    low, high = grid[0], grid[-1]
    if expected(high) < goal:
        return None
    while low < high:
        middle = (low + high) // 2
        if expected(middle) >= goal:
            high = middle
        else:
            low = middle + 1
    return low


def _preference(family: FamilyForecast) -> tuple[float, float]:
    """Order by pairs needed; families that need the same, or cannot get there, by what they recover."""
    last = 0 if family.pairs_needed == family.pairs[0] else -1
    needed = float("inf") if family.pairs_needed is None else float(family.pairs_needed)
    return needed, -family.recoveries[last].estimate


def _qualities(
    quality: MeasuredQuality, planned: FloatArray, probed: FloatArray, seed: int
) -> tuple[dict[str, Forecast], dict[str, bool]]:
    """Return the quality of each way to go on, and which of the new model's the old one is expected to beat.

    The corrected index is measured and its recovery forecast, so fresh = stale + (corrected − stale) / recovery.
    """
    table = np.stack(
        [quality.stale, quality.corrected, quality.stale if quality.old is None else quality.old], axis=1
    ).astype(np.float64)
    if len(table) < 2:
        raise DataError(
            "plan", expected="at least 2 judged queries", got=str(len(table)), cure="Leave the judgements out."
        )
    generator = np.random.default_rng(seed + 1)
    drawn = np.stack([table[generator.integers(len(table), size=len(table))].mean(axis=0) for _ in range(DRAWS)])
    stale, corrected, old = drawn.T
    gain = (corrected - stale) / np.maximum(probed, LEAST_RECOVERY)
    after = {"corrected": stale + planned * gain, "fresh": stale + gain}
    found = {"stale": stale, **after} if quality.old is None else {"old": old, "stale": stale, **after}
    wins = {name: quality.old is not None and float(np.median(old - one)) > 0 for name, one in after.items()}
    return {name: Forecast.of_draws(one, level=LEVEL) for name, one in found.items()}, wins


def _written(forecast: Forecast) -> str:
    return f"{forecast.estimate:.2f} [{forecast.low:.2f}, {forecast.high:.2f}]"
