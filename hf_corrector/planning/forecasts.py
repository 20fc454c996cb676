"""From a family's curves to forecasts, and which of their 90 % intervals were checked.

Learning curves alone are too sure of themselves for families whose error falls in steps or steeply, so their draws are
widened around the median by a factor of the family's own.

Recovery of a ranking metric is forecast from the score error, which needs no judgements. With s the corrected score
error as a share of the stale one, the share of the gain that stays lost is about s^p: all of it for s = 1, none for
s = 0, and between them the less the farther relevant targets stand above the others. p lay between 0.4 and 5 over the
drifts it was learned from, which is why recovery cannot be told closely: nominal 90 % intervals that took p for about
1 held 72 % of the recoveries of affine correctors. Where there are judgements, p is first rehearsed on the corrected
index (:mod:`hf_corrector.planning.rehearsal`); without, only its usual range is known. A corrected score error above
the stale one costs no more than in proportion, as a ranking can only get so bad.

All constants were learned by ``examples/benchmarks/planner_calibration.py`` on drifts of one data set (nl2bash) and on
synthetic ones with seeds below 1,000. ``examples/benchmarks/planner_coverage.py`` judges the intervals on others. Those
of Procrustes held there on synthetic drifts and failed on real ones, so they count as leads, like those of families
that were not judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_corrector.learning_curves import DRAWS
from hf_corrector.metrics import FloatArray
from hf_corrector.planning.probe import FamilyCurve

# Intervals were checked for probes between these, and up to so many times the probe.
CHECKED_PROBES = (100, 400)
CHECKED_HORIZON = 8
# Mean and spread of log p less the logarithm of a rehearsed exponent, and of log p where nothing was rehearsed.
REHEARSED_EXPONENT = (0.53, 0.65)
USUAL_EXPONENT = (0.43, 0.69)
# Relative and absolute standard deviation of the lost share around s^p.
RECOVERY_NOISE, RECOVERY_ERROR = 0.03, 0.02


@dataclass(frozen=True)
class Widening:
    """How much wider forecasts of a family have to be than its learning curves say.

    Attributes:
        squared: Factor on the distance from the median, for the squared error.
        scores: The same for the score error.
    """

    squared: float
    scores: float


# By family; those that read side features are named as standard_families names them.
WIDENINGS = {
    "mean_shift": Widening(1.0, 1.0),
    "procrustes": Widening(1.6, 1.2),
    "affine": Widening(1.0, 1.0),
    "kernel": Widening(2.5, 2.2),
    "affine + tokens": Widening(4.7, 2.6),
}
# Of families nothing was learned of: the widest of the others.
UNCHECKED = Widening(
    max(one.squared for one in WIDENINGS.values()), max(one.scores for one in WIDENINGS.values())
)  # fmt: skip


# Families whose intervals held, on real drifts too. Judging took nothing back into the constants above.
HELD = ("mean_shift", "affine", "kernel", "affine + tokens")


def squared_draws(curve: FamilyCurve, pairs: int) -> FloatArray:
    """Return equally likely squared errors of a family fitted to ``pairs`` pairs, ``(draws,)``."""
    return _widened(curve.squared.draws(pairs), WIDENINGS.get(curve.name, UNCHECKED).squared)


def score_draws(curve: FamilyCurve, pairs: int) -> FloatArray:
    """Return equally likely score errors, as shares of the stale vectors', ``(draws,)``."""
    return _widened(curve.scores.draws(pairs), WIDENINGS.get(curve.name, UNCHECKED).scores)


def recovery_draws(curve: FamilyCurve, pairs: int, *, exponent: float | None = None, seed: int = 0) -> FloatArray:
    """Return equally likely recoveries of a ranking metric for a family fitted to ``pairs`` pairs, ``(draws,)``.

    Args:
        curve: The family's curves.
        pairs: Number of pairs.
        exponent: The rehearsed exponent, if there is one.
        seed: Seed of the draws.
    """
    noise = np.random.default_rng(seed).standard_normal((3, DRAWS))
    mean, spread = USUAL_EXPONENT if exponent is None else REHEARSED_EXPONENT
    powers = np.exp(mean + spread * noise[0]) * (1.0 if exponent is None else exponent)
    lost = lost_share(score_draws(curve, pairs), powers) * (1.0 + RECOVERY_NOISE * noise[1])
    recoveries: FloatArray = 1.0 - lost - RECOVERY_ERROR * noise[2]
    return recoveries


def lost_share(share: FloatArray, exponent: FloatArray) -> FloatArray:
    """Return what share of the gain is lost where a share of the score error is left, s^p, or s^min(p, 1) above 1."""
    lost: FloatArray = share ** np.where(share > 1.0, np.minimum(exponent, 1.0), exponent)
    return lost


def is_checked(curve: FamilyCurve) -> bool:
    """Say whether intervals of such a forecast were checked, and held, on drifts they were not learned from."""
    fewest, most = CHECKED_PROBES
    # A larger probe only makes them narrower for a reason.
    return curve.same_size and curve.name in HELD and fewest <= curve.probe <= 2 * most


def caution(checked: Sequence[str], families: Sequence[str]) -> str:
    """Say which families' intervals held and how far to trust a forecast of recovery."""
    others = [name for name in families if name not in checked]
    said = (
        f"The 90 % intervals of {_listed(checked)} held on drifts they were not learned from. "
        if checked else ""
    )  # fmt: skip
    said += f"Those of {_listed(others)} failed that or were not checked: read them as leads. " if others else ""
    return said + "Recovery is the hardest to tell beforehand: let 'hf-corrector upgrade' decide."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def _widened(draws: FloatArray, factor: float) -> FloatArray:
    middle = np.median(draws)
    wider: FloatArray = np.maximum(middle + factor * (draws - middle), 0.0)
    return wider
