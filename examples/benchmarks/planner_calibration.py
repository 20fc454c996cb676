"""Learn what the planner takes for granted: how wide its intervals are, and how score error turns into lost recovery.

    python examples/benchmarks/planner_calibration.py --drifts runs/drifts/nl2bash-75 runs/drifts/nl2bash-150

Cells are as in ``planner_coverage.py``, on other drifts: synthetic seeds below 1,000, kinds ``linear``, ``smooth``,
``partly`` and ``words``, and encoders fine-tuned on nl2bash. Nothing of what ``planner_coverage.py`` judges by belongs
here. Printed are the constants of ``hf_corrector/planning/forecasts.py``:

* the widening of each family's intervals: the .9 quantile of how far the value lies from the median, in half intervals
  of the learning curve, for real and synthetic drifts and every horizon by themselves, and the largest of these (split
  conformal prediction, Papadopoulos et al. 2002, with the worst group in place of all);
* mean and spread of the logarithm of the exponent p in "a share s of the score error costs a share s^p", with and
  without a rehearsed exponent to start from: the most likely ones, real and synthetic drifts counting the same; then
  the spread is raised by the smallest factor at which .9 of the values of every family lie in intervals whose mean and
  spread were learned without that data set or kind.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import numpy as np
from planner_cells import Cells, Outcome, add_cell_arguments, run_cells, start
from synthetic_encoders import KINDS

from hf_corrector.planning.forecasts import RECOVERY_ERROR, RECOVERY_NOISE, lost_share

LEVELS = tuple(np.linspace(0.005, 0.995, 199).tolist())
QUANTITIES = ("squared", "score")
MEANS, SPREADS = np.linspace(0.0, 1.0, 41), np.geomspace(0.1, 1.5, 40)
FACTORS = np.arange(1.0, 3.05, 0.1)
_NORMAL = np.linspace(-2.5, 2.5, 41)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_cell_arguments(flags, synthetic=3, kinds=KINDS)
    arguments = flags.parse_args()
    start("what the planner takes for granted", arguments)
    cells = Cells(arguments.output_dir)
    run_cells(cells, arguments, describe, first_seed=0)
    rows = [
        {**row, "drift": one["drift"], "world": (one["drift"], key.split("/")[-1] if "synthetic" in key else "")}
        for key, one in cells.found.items() for row in one["rows"]
    ]  # fmt: skip
    widenings = print_widenings(rows)
    judged = [row for row in rows if row["recovery"] is not None]
    print_exponents([row for row in judged if row["exponent"] is not None], widenings, "with a rehearsed exponent")
    print_exponents([{**row, "exponent": None} for row in judged], widenings, "without")


def describe(one: Outcome) -> list[dict[str, Any]]:
    """Return what happened, and what the learning curves alone had said."""
    draws = {"squared": one.curve.squared.draws(one.pairs), "score": one.curve.scores.draws(one.pairs)}
    return [{
        "family": one.family, "horizon": one.horizon, "squared": one.squared, "score": one.score,
        "recovery": one.recovery, "measuring": one.measuring, "exponent": one.exponent,
        **{f"{name}_quantiles": np.quantile(drawn, LEVELS).tolist() for name, drawn in draws.items()},
    }]  # fmt: skip


def print_widenings(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Print every family's widenings; return those of the score error."""
    print("family             forecasts   " + "   ".join(QUANTITIES))
    scores = {}
    for family in sorted({row["family"] for row in rows}):
        members = [row for row in rows if row["family"] == family]
        found = [max(1.0, float(np.ceil(10 * widening(members, one)) / 10)) for one in QUANTITIES]
        scores[family] = found[1]
        print(f"{family:<18} {len(members):9d}   {found[0]:7.1f}   {found[1]:5.1f}")
    return scores


def widening(rows: list[dict[str, Any]], quantity: str) -> float:
    """Return the largest .9 quantile of the distance from the median, in half intervals, of any group."""
    groups: dict[tuple[bool, int], list[float]] = {}
    for row in rows:
        low, middle, high = np.interp((0.05, 0.5, 0.95), LEVELS, row[f"{quantity}_quantiles"])
        value = row[quantity]
        half = max(high - middle if value > middle else middle - low, 1e-12)
        groups.setdefault(("synthetic" in row["drift"], row["horizon"]), []).append(abs(value - middle) / half)
    return max(float(np.quantile(one, 0.9)) for one in groups.values())


def print_exponents(rows: list[dict[str, Any]], widenings: dict[str, float], name: str) -> None:
    """Print mean and spread of log p, and by how much the spread is raised."""
    kinds = sorted({kind_of(row) for row in rows})
    left_out = {kind: most_likely([row for row in rows if kind_of(row) != kind]) for kind in kinds}
    families, inside = sorted(widenings), {}
    for factor in FACTORS:
        held = [(row["family"], kind_of(row), holds(row, left_out[kind_of(row)], factor, widenings)) for row in rows]
        inside = {one: float(np.mean([ok for *parts, ok in held if one in parts])) for one in (*families, *kinds)}
        if min(inside[family] for family in families) >= 0.9:
            break
    mean, spread = most_likely(rows)
    print(f"\n{name}: {len(rows)} recoveries; log p has mean {mean:.2f} and spread {spread:.2f} x {factor:.1f}")
    print("held when left out: " + ", ".join(f"{one} {share:.2f}" for one, share in inside.items()))


def kind_of(row: dict[str, Any]) -> str:
    """Return the data set of a real drift or the kind of a synthetic one."""
    return str(row["drift"]).split("-")[0]


def most_likely(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return mean and spread of log p less the logarithm of the rehearsed exponent."""
    worlds = [row["world"] for row in rows]
    synthetic = np.array(["synthetic" in drift for drift, _ in worlds])
    weights = np.array([1.0 / worlds.count(world) for world in worlds])
    for part in (synthetic, ~synthetic):
        weights[part] /= max(weights[part].sum(), 1e-12)
    share, lost, error = (np.array(one) for one in zip(
        *((row["score"], 1.0 - row["recovery"], row["measuring"]) for row in rows), strict=True
    ))  # fmt: skip
    base = np.array([np.log(row["exponent"] or 1.0) for row in rows])
    density = np.exp(-(_NORMAL**2) / 2)
    found = []
    for mean, spread in itertools.product(MEANS, SPREADS):
        said = lost_share(share[:, None], np.exp(mean + base[:, None] + spread * _NORMAL))
        sd = np.sqrt((RECOVERY_NOISE * said) ** 2 + RECOVERY_ERROR**2 + error[:, None] ** 2)
        likely = (np.exp(-(((lost[:, None] - said) / sd) ** 2) / 2) / sd) @ (density / density.sum())
        found.append((float(weights @ np.log(likely + 1e-9)), mean, spread))
    return max(found)[1:]


def holds(row: dict[str, Any], law: tuple[float, float], factor: float, widenings: dict[str, float]) -> bool:
    """Say whether the 90 % interval holds the measured recovery."""
    generator = np.random.default_rng(0)
    noise, wider = generator.standard_normal((3, 2_000)), widenings[row["family"]]
    share = np.interp(generator.random(2_000), LEVELS, row["score_quantiles"])
    share = np.maximum(np.median(share) + wider * (share - np.median(share)), 0.0)
    exponent = np.exp(law[0] + factor * law[1] * noise[0]) * (row["exponent"] or 1.0)
    lost = lost_share(share, exponent) * (1.0 + RECOVERY_NOISE * noise[1])
    lost += np.hypot(RECOVERY_ERROR, row["measuring"]) * noise[2]
    low, high = np.quantile(lost, (0.05, 0.95))
    return bool(low <= 1.0 - row["recovery"] <= high)


if __name__ == "__main__":
    main()
