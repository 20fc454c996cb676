"""Corrector error against staleness, capacity and number of pairs, on encoders whose drift is known.

    python examples/benchmarks/synthetic_drift.py --output_dir runs/synthetic

Targets are unit vectors of a low-dimensional source plus a little noise. Training moves an encoder by ``--staleness``
times a direction that is, by kind:

* ``linear``: a linear map of the old vector, which an affine corrector can learn to the end;
* ``smooth``: a random network of the old vector, smooth but not linear;
* ``partly``: half a linear map, half noise of each target that cannot be read off its old vector.

For every kind, staleness, family and number of pairs the score error on other targets is printed as a share of that of
the stale vectors, mean and 95 % interval over paired resamples, beside what the planner's law, fitted to a probe of
``--probe`` pairs, says of that number. With matplotlib installed and ``--output_dir`` given, the same is drawn.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import print_head
from torch.nn.functional import normalize

from hf_corrector.planning.probe import (
    Fit,
    Probe,
    ProbeSettings,
    probe_learning_curves,
    query_moment,
    residual_errors,
    standard_families,
)

KINDS = ("linear", "smooth", "partly")
DIM, SOURCE_DIM, QUERIES = 64, 24, 300


@dataclass(frozen=True)
class SyntheticDrift:
    """Vectors before and after a drift of known nature, and queries that each look for one target.

    Attributes:
        name: Kind and staleness.
        old: ``(n, dim)``.
        new: ``(n, dim)``.
        queries: By the new encoder, ``(q, dim)``.
        relevant: The target of each query.
    """

    name: str
    old: torch.Tensor
    new: torch.Tensor
    queries: torch.Tensor
    relevant: list[dict[int, float]]


def synthetic_drift(kind: str, staleness: float, *, targets: int = 6_000, seed: int = 0) -> SyntheticDrift:
    """Make targets and move them.

    Args:
        kind: One of :data:`KINDS`.
        staleness: Length of the displacement, relative to the vectors.
        targets: How many.
        seed: Of everything random.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    source = gaussian(targets, SOURCE_DIM) * torch.linspace(2.0, 0.3, SOURCE_DIM)
    old = normalize(source @ gaussian(SOURCE_DIM, DIM) + 0.5 * gaussian(targets, DIM), dim=1)
    linear = normalize(old @ gaussian(DIM, DIM) + 0.5 * gaussian(DIM) / DIM**0.5, dim=1)
    match kind:
        case "linear":
            direction = linear
        case "smooth":
            hidden = torch.tanh(2.0 * DIM**0.5 * old @ gaussian(DIM, 2 * DIM) / DIM**0.5)
            direction = normalize(hidden @ gaussian(2 * DIM, DIM), dim=1)
        case _:
            direction = normalize(linear + normalize(gaussian(targets, DIM), dim=1), dim=1)
    new = normalize(old + staleness * direction, dim=1)
    wanted = torch.randperm(targets, generator=generator)[:QUERIES]
    queries = normalize(new[wanted] + 0.9 * normalize(gaussian(QUERIES, DIM), dim=1), dim=1)
    return SyntheticDrift(f"{kind}-{staleness:g}", old, new, queries, [{row: 1.0} for row in wanted.tolist()])


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
    torch.set_num_threads(1)
    print_head("synthetic drift: score error left by correction, as a share of the stale vectors'", arguments)
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
        drift = synthetic_drift(kind, staleness, seed=arguments.seed + resample)
        order = torch.randperm(len(drift.old), generator=torch.Generator().manual_seed(resample))
        probed = order[: arguments.probe]
        probe = Probe(drift.old[probed], drift.new[probed], drift.queries)
        curves = probe_learning_curves(probe, families=families, settings=ProbeSettings(seed=resample))
        for name, fit in families.items():
            for place, pairs in enumerate(arguments.pairs):
                measured[name][resample, place] = score_ratio(drift, fit, order[:pairs], order[-2_000:])
                forecast = curves[name].scores.forecast(pairs)
                foretold[name][resample, place] = forecast.estimate, forecast.low, forecast.high
    return measured, foretold


def score_ratio(drift: SyntheticDrift, fit: Fit, fitted: torch.Tensor, judged: torch.Tensor) -> float:
    """Return the score error a fit leaves on other targets, as a share of the stale vectors'."""
    moment, correct = query_moment(drift.queries), fit(drift.old[fitted], drift.new[fitted], None)
    left = residual_errors(correct(drift.old[judged], None), drift.new[judged], moment)
    return float(left.scores.mean() / residual_errors(drift.old[judged], drift.new[judged], moment).scores.mean())


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
    figure.savefig(folder / "synthetic_drift.svg")
    print(f"drawn: {folder / 'synthetic_drift.svg'}")


if __name__ == "__main__":
    main()
