"""How often the planner's 90 % intervals hold what then happens.

    python examples/benchmarks/planner_coverage.py --drifts runs/drifts/nl2bash-150 runs/drifts/stackexchange-150

A cell is a drift, a number of probed targets and a draw of the probe. The planner sees the probe alone and forecasts,
for ``--horizons`` times as many pairs, the squared error, the score error (as a share of the stale vectors') and the
recovery of MRR@10 of every family. Then that many pairs, the probe among them, are taken from the drift, the family is
fitted, and its errors on other targets and MRR@10 over the whole corpus are measured. Recovery is judged only where the
fresh index is better than the stale one by more than four standard errors, else there is nothing to recover; and as it
is measured on a few hundred queries only, the standard error of that ratio, from differences query by query, is added
to the forecast before asking whether it holds the measured value.

Coverage is given with a 95 % interval over resampled cells, and the mean interval score (Gneiting and Raftery 2007;
lower is better) divided by the value itself. Cells of one real drift share its targets, and cells of one synthetic seed
share its drift, so cells are less independent than these intervals take them to be.

What "unseen" means: priors and noise terms of the planner were chosen, among some 35 settings, by their coverage on
drifts of nl2bash and on synthetic drifts of these very kinds with seeds below 1,000. Unseen synthetic drifts are other
seeds of the same generator, not other kinds of drift. Cells of stackexchange-75 were in the first table that was looked
at, before the choice was narrowed to nl2bash. The rule for recovery (four standard errors, measuring error added) was
set after a first look at unseen synthetic cells, so its coverage there is no test on untouched data.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_head
from drifts import load_drift
from synthetic_drift import KINDS, synthetic_drift

from hf_corrector.learning_curves import Forecast, interval_score
from hf_corrector.metrics import Relevant
from hf_corrector.planning.plan import recovery_draws
from hf_corrector.planning.probe import (
    Fit,
    Probe,
    ProbeSettings,
    probe_learning_curves,
    query_moment,
    residual_errors,
    standard_families,
)

SEEN = ("nl2bash",)
FIRST_UNSEEN_SEED = 1_000
QUANTITIES = ("squared error", "score error", "recovery")


@dataclass(frozen=True)
class Case:
    """A drift with everything a cell needs.

    Attributes:
        name: Of the drift.
        seen: Whether the planner's constants were chosen with it.
        old: ``(n, dim)``.
        new: ``(n, dim)``.
        queries: By the new encoder, ``(q, dim)``.
        relevant: For each query its relevant rows.
        rows: Rows that may be probed: no query's positive.
    """

    name: str
    seen: bool
    old: torch.Tensor
    new: torch.Tensor
    queries: torch.Tensor
    relevant: Relevant
    rows: torch.Tensor

    def quality(self, vectors: torch.Tensor) -> np.ndarray:
        """Return MRR@10 of every query, ``(q,)``."""
        scores, ranks = self.queries @ vectors.T, np.zeros(len(self.relevant))
        for query, known in enumerate(self.relevant):
            # The rank of the best positive is all that MRR needs, and a tenth of a search.
            ranks[query] = 1 + int((scores[query] > scores[query, list(known)].max()).sum())
        return np.where(ranks <= 10, 1.0 / ranks, 0.0)

    @cached_property
    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """MRR@10 of every query with stale and with fresh vectors, ``(q,)`` each."""
        return self.quality(self.old), self.quality(self.new)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--drifts", type=Path, nargs="*", default=[], help="folders that drifts.py wrote")
    flags.add_argument("--synthetic", type=int, default=20, help="drifts of each kind and staleness; 0 for none")
    flags.add_argument("--staleness", type=float, nargs="+", default=[0.2, 0.7])
    flags.add_argument("--probes", type=int, nargs="+", default=[100, 200, 400])
    flags.add_argument("--horizons", type=int, nargs="+", default=[2, 8])
    flags.add_argument("--families", nargs="+", default=["mean_shift", "affine"])
    flags.add_argument("--resamples", type=int, default=6, help="probes of each real drift and size")
    flags.add_argument("--max_pairs", type=int, default=4_000, help="no forecast for more pairs than this is judged")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--output_dir", type=Path, help="folder for cells.jsonl; cells there already are not run again")
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    shown = copy.copy(arguments)
    shown.drifts = [folder.name for folder in arguments.drifts]
    print_head("coverage of the planner's nominal 90 % intervals", shown)
    started, cells = time.time(), Cells(arguments.output_dir)
    families = standard_families(arguments.families)
    for number, folder in enumerate(arguments.drifts):
        run_real(cells, real_case(folder), families, arguments, seed=arguments.seed * 1_000 + number)
    for kind in KINDS:
        for staleness in arguments.staleness:
            for resample in range(arguments.synthetic):
                seed = FIRST_UNSEEN_SEED + arguments.seed * 1_000 + resample
                for probe in arguments.probes:
                    make = lambda kind=kind, staleness=staleness, seed=seed: synthetic_case(kind, staleness, seed)  # noqa: E731
                    key = f"synthetic {kind}-{staleness:g}/{probe}/{seed}"
                    cells.run(
                        key, lambda make=make, probe=probe, seed=seed: cell(make(), families, probe, seed, arguments)
                    )
    print_coverage(cells.found)
    print(f"\n{len(cells.found)} cells, {time.time() - started:.0f} s for those run now")


class Cells:
    """Measured cells, kept in a file where there is a folder for it."""

    def __init__(self, folder: Path | None) -> None:
        self.found: dict[str, dict[str, Any]] = {}
        self.file = None if folder is None else folder / "cells.jsonl"
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            self.found = {one["key"]: one for one in map(json.loads, lines)}

    def run(self, key: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure a cell unless it is there already."""
        if key in self.found:
            return
        self.found[key] = {"key": key, **measure()}
        if self.file is not None:
            with open(self.file, "a") as handle:
                handle.write(json.dumps(self.found[key]) + "\n")


def run_real(cells: Cells, case: Case, families: dict[str, Fit], arguments: argparse.Namespace, *, seed: int) -> None:
    for resample in range(arguments.resamples):
        for probe in arguments.probes:
            own = seed * 1_000 + resample * 10 + arguments.probes.index(probe)
            cells.run(
                f"{case.name}/{probe}/{resample}",
                lambda probe=probe, own=own: cell(case, families, probe, own, arguments),
            )


def real_case(folder: Path) -> Case:
    drift = load_drift(folder)
    usable = torch.ones(len(drift.old), dtype=torch.bool)
    usable[drift.held_out] = False
    return Case(
        drift.name, drift.name.startswith(SEEN), drift.old, drift.new, drift.queries_new, drift.relevant,
        usable.nonzero()[:, 0],
    )  # fmt: skip


def synthetic_case(kind: str, staleness: float, seed: int) -> Case:
    drift = synthetic_drift(kind, staleness, seed=seed)
    wanted = torch.tensor([row for known in drift.relevant for row in known])
    usable = torch.ones(len(drift.old), dtype=torch.bool)
    usable[wanted] = False
    name = f"synthetic {drift.name}"
    return Case(name, False, drift.old, drift.new, drift.queries, drift.relevant, usable.nonzero()[:, 0])


def cell(
    case: Case, families: dict[str, Fit], probed: int, seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:  # fmt: skip
    """Forecast from one probe and measure what happens."""
    order = case.rows[torch.randperm(len(case.rows), generator=torch.Generator().manual_seed(seed))]
    judged, moment = order[-min(3_000, len(order) // 3) :], query_moment(case.queries)
    probe = Probe(case.old[order[:probed]], case.new[order[:probed]], case.queries)
    curves = probe_learning_curves(probe, families=families, settings=ProbeSettings(seed=seed))
    stale, fresh = case.ends
    gap, error = (fresh - stale).mean(), (fresh - stale).std() / len(stale) ** 0.5
    before = residual_errors(case.old[judged], case.new[judged], moment)
    rows = []
    for name, fit in families.items():
        for horizon in arguments.horizons:
            pairs = horizon * probed
            if pairs > min(arguments.max_pairs, len(order) - len(judged)):
                continue
            correct = fit(case.old[order[:pairs]], case.new[order[:pairs]], None)
            left = residual_errors(correct(case.old[judged], None), case.new[judged], moment)
            said = {
                "squared error": (curves[name].squared.forecast(pairs), left.squared.mean()),
                "score error": (curves[name].scores.forecast(pairs), left.scores.mean() / before.scores.mean()),
            }
            if gap > 4 * error:
                gains = case.quality(correct(case.old, None)) - stale
                found = gains.mean() / gap
                measuring = (gains - found * (fresh - stale)).std() / len(stale) ** 0.5 / gap
                draws = recovery_draws(curves[name], pairs, seed=seed)
                noise = measuring * np.random.default_rng(seed + 1).standard_normal(len(draws))
                said["recovery"] = (Forecast.of_draws(draws + noise), found)
            rows += [
                {"family": name, "horizon": horizon, "quantity": quantity, "low": forecast.low,
                 "estimate": forecast.estimate, "high": forecast.high, "level": forecast.level, "value": float(value)}
                for quantity, (forecast, value) in said.items()
            ]  # fmt: skip
    return {"drift": case.name, "seen": case.seen, "probe": probed, "rows": rows}


def print_coverage(cells: dict[str, dict[str, Any]]) -> None:
    """Print coverage by quantity for unseen and seen drifts, then for unseen ones by parts."""
    unseen = [one for one in cells.values() if not one["seen"]]
    groups: list[tuple[str, list[dict[str, Any]], Callable[[dict[str, Any]], bool]]] = [
        ("all unseen", unseen, lambda row: True),
        ("seen", [one for one in cells.values() if one["seen"]], lambda row: True),
        ("unseen, real", [one for one in unseen if not one["drift"].startswith("synthetic")], lambda row: True),
        ("unseen, synthetic", [one for one in unseen if one["drift"].startswith("synthetic")], lambda row: True),
    ]
    rows = [row for one in cells.values() for row in one["rows"]]
    for horizon in sorted({row["horizon"] for row in rows}):
        groups.append((f"unseen, {horizon} x probe", unseen, lambda row, h=horizon: row["horizon"] == h))
    for family in sorted({row["family"] for row in rows}):
        groups.append((f"unseen, {family}", unseen, lambda row, f=family: row["family"] == f))
    for drift in sorted({one["drift"] for one in cells.values()}):
        groups.append((drift, [one for one in cells.values() if one["drift"] == drift], lambda row: True))
    for probe in sorted({one["probe"] for one in cells.values()}):
        groups.append((f"unseen, probe {probe}", [one for one in unseen if one["probe"] == probe], lambda row: True))
    for quantity in QUANTITIES:
        print(
            f"\n## {quantity}\n{'cells of':<28}  cells  forecasts   coverage [95 %]       width   score   median error"
        )
        for name, members, wanted in groups:
            print_group(name, [[r for r in one["rows"] if r["quantity"] == quantity and wanted(r)] for one in members])


def print_group(name: str, cells: list[list[dict[str, Any]]]) -> None:
    """Print one line; width, score and error are relative to the value, for recovery absolute."""
    cells = [rows for rows in cells if rows]
    if not cells:
        return
    inside, count = (np.array(part, float) for part in zip(*(
        (sum(row["low"] <= row["value"] <= row["high"] for row in rows), len(rows)) for rows in cells), strict=True
    ))  # fmt: skip
    drawn = np.random.default_rng(0).integers(len(cells), size=(5_000, len(cells)))
    low, high = np.percentile(inside[drawn].sum(axis=1) / count[drawn].sum(axis=1), (2.5, 97.5))
    flat = [row for rows in cells for row in rows]
    unit = np.array([1.0 if row["quantity"] == "recovery" else row["value"] for row in flat])
    width = np.array([row["high"] - row["low"] for row in flat]) / unit
    score = np.array([
        interval_score(Forecast(row["estimate"], row["low"], row["high"], row["level"]), row["value"]) for row in flat
    ]) / unit  # fmt: skip
    error = np.array([row["estimate"] - row["value"] for row in flat]) / unit
    print(
        f"{name:<28} {len(cells):6d} {len(flat):10d}   {inside.sum() / count.sum():.3f} [{low:.3f}, {high:.3f}]   "
        f"{width.mean():.3f}   {score.mean():.3f}   {np.median(error):+.3f}"
    )


if __name__ == "__main__":
    main()
