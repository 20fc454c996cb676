"""What the planner's benchmarks share: drifts to probe, what a fit leaves on other targets, and a file of cells."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_head
from drifts import load_drift
from synthetic_encoders import synthetic_drift

from hf_corrector.index.base import TensorVectors
from hf_corrector.metrics import Relevant
from hf_corrector.planning.judged import JudgedQueries
from hf_corrector.planning.probe import (
    FamilyCurve,
    Fit,
    Probe,
    ProbeSettings,
    probe_learning_curves,
    query_moment,
    residual_errors,
    standard_families,
)
from hf_corrector.planning.rehearsal import rehearsed_exponent
from hf_corrector.side_features import TokenCounts

# Fits that take seconds; every third draw of a probe, and so many pairs, are enough for them.
SLOW = ("kernel", "kernel + tokens", "affine + tokens")
MOST_SLOW_PAIRS = 1_600
# Queries of a synthetic drift are the farther from their targets the larger; by seed in turn.
QUERY_NOISES = (0.6, 0.9, 1.2)
SYNTHETIC_QUERIES, MOST_QUERIES = 1_000, 1_500


def start(title: str, arguments: argparse.Namespace) -> None:
    """Use one thread and print the head, with the names of drifts in place of their paths."""
    torch.set_num_threads(1)
    shown = copy.copy(arguments)
    if "drifts" in shown:
        shown.drifts = [folder.name for folder in arguments.drifts]
    print_head(title, shown)


def add_cell_arguments(flags: argparse.ArgumentParser, *, synthetic: int, kinds: Sequence[str]) -> None:
    """Add what says which cells there are."""
    flags.add_argument("--drifts", type=Path, nargs="*", default=[], help="folders that drifts.py wrote")
    flags.add_argument("--synthetic", type=int, default=synthetic, help="drifts of each kind and staleness; 0 for none")
    flags.add_argument("--kinds", nargs="+", default=list(kinds), help="of synthetic drift")
    flags.add_argument("--staleness", type=float, nargs="+", default=[0.2, 0.7])
    flags.add_argument("--probes", type=int, nargs="+", default=[100, 200, 400])
    flags.add_argument("--horizons", type=int, nargs="+", default=[2, 8])
    flags.add_argument("--families", nargs="+", default=["mean_shift", "procrustes", "affine", "kernel"], help="kinds")
    flags.add_argument("--with_tokens", nargs="*", default=["affine"], help="kinds that read tokens too, where known")
    flags.add_argument("--resamples", type=int, default=4, help="probes of each real drift and size")
    flags.add_argument("--max_pairs", type=int, default=4_000, help="no forecast for more pairs than this is judged")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--output_dir", type=Path, help="folder for cells.jsonl; cells there already are not run again")


@dataclass(frozen=True)
class Case:
    """A drift with everything a cell needs.

    Attributes:
        name: Of the drift.
        old: ``(n, dim)``.
        new: ``(n, dim)``.
        queries: By the new encoder, ``(q, dim)``.
        relevant: For each query its relevant rows.
        tokens: Of all targets, or None.
    """

    name: str
    old: torch.Tensor
    new: torch.Tensor
    queries: torch.Tensor
    relevant: Relevant
    tokens: TokenCounts | None = None

    @cached_property
    def rows(self) -> torch.Tensor:
        """Rows that may be probed: no query's positive."""
        usable = torch.ones(len(self.old), dtype=torch.bool)
        usable[[row for known in self.relevant for row in known]] = False
        return usable.nonzero()[:, 0]

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

    def families(self, arguments: argparse.Namespace, *, slow: bool) -> dict[str, Fit]:
        """Return the families asked for that this drift has what they read for."""
        families = standard_families(arguments.families)
        if self.tokens is not None and arguments.with_tokens:
            families |= standard_families(arguments.with_tokens, side="tokens", side_vocabulary=self.tokens.vocabulary)
        return {name: fit for name, fit in families.items() if slow or name not in SLOW}


def real_case(folder: Path) -> Case:
    drift = load_drift(folder)
    counts = TokenCounts.from_flat(drift.tokens.numpy(), drift.offsets.numpy(), vocabulary=int(drift.tokens.max()) + 1)
    queries, relevant = drift.queries_new[:MOST_QUERIES], drift.relevant[:MOST_QUERIES]
    return Case(folder.name, drift.old, drift.new, queries, relevant, counts)


def synthetic_case(kind: str, staleness: float, seed: int) -> Case:
    noise = QUERY_NOISES[seed % len(QUERY_NOISES)]
    drift = synthetic_drift(kind, staleness, seed=seed, queries=SYNTHETIC_QUERIES, query_noise=noise)
    return Case(f"synthetic {drift.name}", drift.old, drift.new, drift.queries, drift.relevant, drift.tokens)


@dataclass(frozen=True)
class Outcome:
    """What a family fitted to so many pairs left on other targets, and what had been forecast.

    Attributes:
        family: The family.
        horizon: Pairs over those of the probe.
        pairs: Pairs fitted to.
        curve: Its curve on the probe.
        squared: Mean squared error on other targets.
        score: Score error on them, as a share of the stale vectors'.
        recovery: Of MRR@10 over the whole corpus, or None where fresh vectors bring too little to recover.
        measuring: Standard error of that from the number of queries.
        exponent: What was rehearsed on the corrected index of the probe's best family, or None.
    """

    family: str
    horizon: int
    pairs: int
    curve: FamilyCurve
    squared: float
    score: float
    recovery: float | None
    measuring: float
    exponent: float | None


def outcomes(
    case: Case, families: dict[str, Fit], probed: int, *, seed: int, arguments: argparse.Namespace
) -> Iterator[Outcome]:
    """Forecast from one probe and measure what happens."""
    order = case.rows[torch.randperm(len(case.rows), generator=torch.Generator().manual_seed(seed))]
    judged, probe = order[-min(3_000, len(order) // 3) :], probe_of(case, order[:probed])
    curves = probe_learning_curves(probe, families=families, settings=ProbeSettings(seed=seed))
    stale, fresh = case.ends
    gap, error = (fresh - stale).mean(), (fresh - stale).std() / len(stale) ** 0.5
    exponent = None
    if gap > 4 * error:
        best = min(curves, key=lambda name: float(curves[name].score_ratios[:, -1].mean()))
        corrected = TensorVectors(corrected_by(case, families[best], order[:probed]))
        queries = JudgedQueries(case.queries, None, case.relevant)
        exponent = rehearsed_exponent(probe, queries, corrected=corrected, seed=seed)
    for name, fit in families.items():
        for horizon in arguments.horizons:
            pairs, most = horizon * probed, MOST_SLOW_PAIRS if name in SLOW else arguments.max_pairs
            if pairs > min(most, len(order) - len(judged)):
                continue
            corrected = corrected_by(case, fit, order[:pairs])
            squared, score = errors_left(case, corrected, judged)
            recovery, measuring = None, 0.0
            if gap > 4 * error:
                gains = case.quality(corrected) - stale
                recovery = float(gains.mean() / gap)
                measuring = float((gains - recovery * (fresh - stale)).std() / len(stale) ** 0.5 / gap)
            yield Outcome(name, horizon, pairs, curves[name], squared, score, recovery, measuring, exponent)


def probe_of(case: Case, rows: torch.Tensor) -> Probe:
    """Return what the planner sees of these rows."""
    side = None if case.tokens is None else case.tokens.gather(rows)
    return Probe(case.old[rows], case.new[rows], case.queries, side)


def errors_left(case: Case, corrected: torch.Tensor, rows: torch.Tensor) -> tuple[float, float]:
    """Return mean squared error of these rows, and their score error as a share of the stale vectors'."""
    moment = query_moment(case.queries)
    left, before = (residual_errors(one[rows], case.new[rows], moment) for one in (corrected, case.old))
    return float(left.squared.mean()), float(left.scores.mean() / before.scores.mean())


def corrected_by(case: Case, fit: Fit, rows: torch.Tensor) -> torch.Tensor:
    """Fit to some rows and correct all targets, ``(n, dim)``."""
    tokens = case.tokens
    correct = fit(case.old[rows], case.new[rows], None if tokens is None else tokens.gather(rows))
    return correct(case.old, None if tokens is None else tokens.read(0, len(tokens)))


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


def run_cells(
    cells: Cells, arguments: argparse.Namespace, describe: Callable[[Outcome], list[dict[str, Any]]], *, first_seed: int
) -> None:
    """Measure every cell asked for: synthetic drifts first, as they are quick.

    Args:
        cells: Where they go.
        arguments: See :func:`add_cell_arguments`.
        describe: What to keep of an outcome.
        first_seed: Seed of the first synthetic drift.
    """

    def measured(case: Case, probed: int, seed: int, slow: bool) -> dict[str, Any]:
        families = case.families(arguments, slow=slow)
        found = outcomes(case, families, probed, seed=seed, arguments=arguments)
        return {"drift": case.name, "probe": probed, "rows": [row for one in found for row in describe(one)]}

    for resample in range(arguments.synthetic):
        seed = first_seed + resample
        for kind in arguments.kinds:
            for staleness in arguments.staleness:
                case = synthetic_case(kind, staleness, seed)
                for place, probed in enumerate(arguments.probes):
                    key, slow = f"{case.name}/{probed}/{seed}", (resample + place) % 3 == 0
                    cells.run(key, lambda c=case, p=probed, s=seed, w=slow: measured(c, p, s, w))
    for resample in range(arguments.resamples):
        for number, folder in enumerate(arguments.drifts):
            case = real_case(folder)
            for place, probed in enumerate(arguments.probes):
                seed = (first_seed + number) * 1_000 + resample * 10 + place
                key, slow = f"{case.name}/{probed}/{resample}", (resample + place) % 3 == 0
                cells.run(key, lambda c=case, p=probed, s=seed, w=slow: measured(c, p, s, w))
