"""Corrector error against staleness, capacity and number of pairs, on encoders whose drift is known.

    python examples/benchmarks/synthetic_drift.py --output_dir runs/synthetic

The kinds of drift are those of ``synthetic_encoders.py``; ``--staleness`` is how far training moves a vector.

For every kind, staleness, family and number of pairs the score error on other targets is printed as a share of that of
the stale vectors, mean and 95 % interval over paired resamples, beside what the planner's law, fitted to a probe of
``--probe`` pairs, says of that number. Seeds below 1,000 are those the planner's constants were learned with, so how
often the law holds what was measured is for ``planner_coverage.py`` to say. With matplotlib installed and
``--output_dir`` given, the same is drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import numpy as np
import torch
from planner_cells import corrected_by, errors_left, probe_of, start, synthetic_case
from synthetic_encoders import KINDS

from hf_corrector.learning_curves import Forecast
from hf_corrector.planning.forecasts import score_draws
from hf_corrector.planning.probe import ProbeSettings, probe_learning_curves, standard_families


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output_dir", help="folder for the drawing; without it only numbers are printed")
    flags.add_argument("--staleness", type=float, nargs="+", default=[0.2, 0.5, 1.0])
    flags.add_argument("--families", nargs="+", default=["mean_shift", "affine"])
    flags.add_argument("--pairs", type=int, nargs="+", default=[25, 50, 100, 200, 400, 800, 1600, 3200])
    flags.add_argument("--probe", type=int, default=200, help="pairs the law is fitted to")
    flags.add_argument("--resamples", type=int, default=10, help="drifts and draws of pairs behind each number")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    start("synthetic drift: score error left by correction, as a share of the stale vectors'", arguments)
    drawn = {}
    for kind in KINDS:
        for staleness in arguments.staleness:
            measured, foretold = measure(kind, staleness, arguments)
            drawn[kind, staleness] = measured, foretold
            print_table(kind, staleness, measured, foretold, arguments.pairs)
    if arguments.output_dir is not None:
        draw(drawn, arguments, Path(arguments.output_dir))


def measure(
    kind: str, staleness: float, arguments: argparse.Namespace
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return for each family errors, and medians and interval ends foretold, ``(resamples, pairs[, 3])``."""
    families = standard_families(arguments.families)
    measured = {name: np.zeros((arguments.resamples, len(arguments.pairs))) for name in families}
    foretold = {name: np.zeros((arguments.resamples, len(arguments.pairs), 3)) for name in families}
    for resample in range(arguments.resamples):
        case = synthetic_case(kind, staleness, arguments.seed + resample)
        order = torch.randperm(len(case.old), generator=torch.Generator().manual_seed(resample))
        probe, judged = probe_of(case, order[: arguments.probe]), order[-2_000:]
        curves = probe_learning_curves(probe, families=families, settings=ProbeSettings(seed=resample))
        for name, fit in families.items():
            for place, pairs in enumerate(arguments.pairs):
                corrected = corrected_by(case, fit, order[:pairs])
                measured[name][resample, place] = errors_left(case, corrected, judged)[1]
                forecast = Forecast.of_draws(score_draws(curves[name], pairs))
                foretold[name][resample, place] = forecast.estimate, forecast.low, forecast.high
    return measured, foretold


def print_table(
    kind: str, staleness: float, measured: dict[str, np.ndarray], foretold: dict[str, np.ndarray], pairs: list[int]
) -> None:
    print(f"## {kind}, staleness {staleness:g}")
    print("family         pairs   error left [95 % of mean]   foretold, median [mean 90 % interval]   inside")
    for name, errors in measured.items():
        for place, count in enumerate(pairs):
            column, said = errors[:, place], foretold[name][:, place]
            half = 1.96 * column.std(ddof=1) / len(column) ** 0.5
            inside = ((said[:, 1] <= column) & (column <= said[:, 2])).mean()
            middle, low, high = said.mean(axis=0)
            print(
                f"{name:<13} {count:6d}   {column.mean():.3f} [{column.mean() - half:.3f}, {column.mean() + half:.3f}]"
                f"        {middle:.3f} [{low:.3f}, {high:.3f}]                    {inside:4.0%}"
            )
    print(flush=True)


def draw(
    drawn: dict[tuple[str, float], tuple[dict[str, np.ndarray], dict[str, np.ndarray]]],
    arguments: argparse.Namespace, folder: Path,
) -> None:  # fmt: skip
    """Draw errors as points and the law over them, one panel for each kind and staleness."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no drawing: matplotlib is not installed")
        return
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(KINDS), len(arguments.staleness), figsize=(4 * len(arguments.staleness), 3 * len(KINDS)), squeeze=False,
        sharex=True, sharey=True,
    )  # fmt: skip
    for (kind, staleness), (measured, foretold) in drawn.items():
        panel = axes[KINDS.index(kind)][arguments.staleness.index(staleness)]
        for number, name in enumerate(measured):
            said = foretold[name].mean(axis=0)
            panel.plot(arguments.pairs, said[:, 0], color=f"C{number}", label=f"{name}: law")
            panel.fill_between(arguments.pairs, said[:, 1], said[:, 2], color=f"C{number}", alpha=0.2)
            panel.plot(arguments.pairs, measured[name].mean(axis=0), "o", color=f"C{number}", label=f"{name}: measured")
        panel.axvline(arguments.probe, color="grey", linestyle=":")
        panel.set(title=f"{kind}, staleness {staleness:g}", xscale="log", xlabel="pairs", ylabel="score error left")
    axes[0][0].legend(fontsize="small")
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    for ending in ("svg", "png"):
        figure.savefig(folder / f"synthetic_drift.{ending}")
        print(f"drawn: synthetic_drift.{ending}")


if __name__ == "__main__":
    main()
