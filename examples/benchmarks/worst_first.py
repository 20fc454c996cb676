"""Re-embed a part of the corpus: worst first against uniformly at random, at the same number of encoder passes.

    python examples/benchmarks/worst_first.py --drifts runs/drifts/nl2bash-150 runs/drifts/stackexchange-300

A corrector is fitted to ``--pairs`` random pairs, the index is corrected, and a share of its rows is replaced by fresh
vectors, chosen

* ``uniform``: at random;
* ``residual``: largest predicted residual first;
* ``traffic``: the most often retrieved first, by the corrected index for one half of the queries;
* ``residual x traffic``: by the product.

The other half of the queries judges. Printed are MRR@10, and the score error over all targets as a share of the stale
index's, as means over resamples; differences to ``uniform`` are paired, their 95 % intervals over queries for MRR@10
and over resamples for the score error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from drifts import Drift, load_drift
from planner_cells import start

from hf_corrector.index.base import TensorVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.metrics import mrr_at_k, paired_bootstrap
from hf_corrector.planning.probe import Probe, query_moment, residual_errors, standard_families
from hf_corrector.planning.worst_first import ResidualPredictor, cross_fitted_residuals, worst_first

ORDERS = ("uniform", "residual", "traffic", "residual x traffic")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--drifts", type=Path, nargs="+", required=True, help="folders that drifts.py wrote")
    flags.add_argument("--pairs", type=int, default=500)
    flags.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.3], help="share of the corpus re-encoded")
    flags.add_argument("--family", default="affine")
    flags.add_argument("--resamples", type=int, default=10)
    arguments = flags.parse_args()
    start("part re-embedding: worst first against uniform", arguments)
    for folder in arguments.drifts:
        compare(load_drift(folder), arguments)


def compare(drift: Drift, arguments: argparse.Namespace) -> None:
    """Print one drift's table."""
    found = [resample(drift, arguments, seed) for seed in range(arguments.resamples)]
    explained = [one[2] for one in found]
    print(f"## {drift.name}: variance of log residuals explained {np.mean(explained):.2f}")
    print("share  order                MRR@10   minus uniform [95 %]          score error   minus uniform [95 %]")
    for share in arguments.shares:
        quality = {name: np.mean([one[0][share, name] for one in found], axis=0) for name in ORDERS}
        bootstrap = paired_bootstrap(quality, generator=np.random.default_rng(0))
        for name in ORDERS:
            gain = bootstrap.difference(name, "uniform")
            errors = np.array([one[1][share, name] for one in found])
            less = errors - np.array([one[1][share, "uniform"] for one in found])
            half = 2.26 * less.std(ddof=1) / len(less) ** 0.5 if len(less) > 1 else float("nan")
            print(
                f"{share:5.0%}  {name:<19} {quality[name].mean():.4f}   {gain.estimate:+.4f} "
                f"[{gain.low:+.4f}, {gain.high:+.4f}]   {errors.mean():11.4f}   {less.mean():+.4f} "
                f"[{less.mean() - half:+.4f}, {less.mean() + half:+.4f}]"
            )
    print(flush=True)


def resample(
    drift: Drift, arguments: argparse.Namespace, seed: int
) -> tuple[dict[tuple[float, str], np.ndarray], dict[tuple[float, str], float], float]:
    """Return MRR@10 of the judging queries, score errors, and the share of variance the predictor explains."""
    generator = torch.Generator().manual_seed(seed)
    usable = torch.ones(len(drift.old), dtype=torch.bool)
    usable[drift.held_out] = False
    rows = usable.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=generator)][: arguments.pairs]
    # The same halves in every resample, so that resamples can be averaged query by query.
    queries = torch.randperm(len(drift.relevant), generator=torch.Generator().manual_seed(0))
    asked, judging = queries[::2], queries[1::2]
    fit = standard_families([arguments.family])[arguments.family]
    probe = Probe(drift.old[rows], drift.new[rows])
    corrected = fit(probe.stale, probe.fresh, None)(drift.old, None)
    predictor = ResidualPredictor.fit(probe.stale, cross_fitted_residuals(probe, fit, seed=seed))
    predicted = predictor.predict(TensorVectors(drift.old))
    retrieved = ExactIndex(TensorVectors(corrected)).search(drift.queries_new[asked], 10).rows.numpy()
    # One for everybody: what nobody asked for today may be asked for tomorrow.
    traffic = 1.0 + np.bincount(retrieved.ravel(), minlength=len(drift.old))
    chance = np.random.default_rng(seed).random(len(drift.old))
    orders = {"uniform": worst_first(chance), "residual": worst_first(predicted),
              "traffic": worst_first(np.ones(len(drift.old)), traffic + chance / 2),
              "residual x traffic": worst_first(predicted, traffic)}  # fmt: skip
    relevant, moment = [drift.relevant[one] for one in judging.tolist()], query_moment(drift.queries_new)
    before = residual_errors(drift.old, drift.new, moment).scores.mean()
    quality, errors = {}, {}
    for share in arguments.shares:
        for name, order in orders.items():
            mixed, fresh_rows = corrected.clone(), torch.from_numpy(order[: int(share * len(order))].copy())
            mixed[fresh_rows] = drift.new[fresh_rows]
            ranked = ExactIndex(TensorVectors(mixed)).search(drift.queries_new[judging], 10).rows.numpy()
            quality[share, name] = mrr_at_k(ranked, relevant, k=10)
            errors[share, name] = float(residual_errors(mixed, drift.new, moment).scores.mean() / before)
    return quality, errors, predictor.explained


if __name__ == "__main__":
    main()
