"""Upgrade of an index after fine-tuning: every family, every source and number of pairs, on the same drift.

    python examples/benchmarks/drifts.py --data FOLDER --output_dir runs/drifts --set nl2bash
    python examples/benchmarks/upgrade_drift.py --drifts runs/drifts/nl2bash-300 --output_dir runs/upgrade

For each number of pairs, targets are drawn at random (positives of the judged queries are never among them) and
re-encoded; every family is fitted to them, ``auto`` chooses among the fits by cross-validation on queries without
judgements, and all are judged on the same queries. ``free`` are the pairs that training itself had re-encoded.

Recovery is (x - stale) / (fresh - stale) of MRR@10, means over resamples of the pairs; intervals are over queries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_head
from drifts import Drift, load_drift

from hf_corrector.fitting import Pairs
from hf_corrector.metrics import Interval, paired_bootstrap, quality
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.side_features import TokenCounts
from hf_corrector.training.corrector_choice import ChoiceOptions, Fitted, choose_corrector
from hf_corrector.training.corrector_fit import CorrectorFitting, fit_to_pairs

FAMILIES = (
    "mean_shift", "procrustes", "low_rank", "affine", "kernel", "residual_mlp", "affine+tokens", "kernel+tokens",
)  # fmt: skip
RIVALS = ("affine", "kernel", "procrustes")
VOCABULARY = 30_522


class Bench:
    """One drift, and what any version of the target vectors is worth on it."""

    def __init__(self, drift: Drift) -> None:
        self.drift = drift
        vocabulary = max(VOCABULARY, int(drift.tokens.max()) + 1)
        self.counts = TokenCounts.from_flat(drift.tokens.numpy(), drift.offsets.numpy(), vocabulary=vocabulary)
        self.statistics = self.counts.statistics()
        self.known = torch.zeros(len(drift.queries_new), len(drift.new), dtype=torch.bool)
        for query, rows in enumerate(drift.relevant):
            self.known[query, list(rows)] = True
        self.exact = self.softmax(drift.new)
        self.usable = torch.ones(len(drift.new), dtype=torch.bool)
        self.usable[drift.held_out] = False

    def softmax(self, targets: torch.Tensor) -> torch.Tensor:
        """Distribution of each query over these targets, positives masked, ``(q, n)``."""
        scores = self.drift.scale * (self.drift.queries_new @ targets.T)
        return scores.masked_fill_(self.known, float("-inf")).softmax(dim=1)

    def variation(self, targets: torch.Tensor) -> float:
        """Mean total variation between the softmax over these and over the fresh targets, positives masked."""
        return float(0.5 * (self.softmax(targets) - self.exact).abs().sum(dim=1).mean())

    def mrr(self, queries: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
        """Reciprocal rank at 10 of each query, ``(q,)``."""
        ranked = (queries @ targets.T).topk(10, dim=1).indices.numpy()
        return quality(ranked, self.drift.relevant, metrics=("mrr@10",))["mrr@10"]

    def pairs(self, rows: torch.Tensor, fresh: torch.Tensor, clock: torch.Tensor | None, side: bool) -> Pairs:
        """Collect pairs, with their tokens if ``side``."""
        beside = self.counts.gather(rows) if side else None
        pairs = Pairs.collect(self.drift.old[rows], fresh, side=beside, clock=clock)
        return dataclasses.replace(pairs, statistics=self.statistics)

    def fit(
        self, family: str, rows: torch.Tensor, fresh: torch.Tensor, clock: torch.Tensor | None
    ) -> tuple[Fitted, float]:
        """Fit one family, named as kind or kind+side; return it and the seconds it took."""
        kind, _, side = family.partition("+")
        settings: dict[str, Any] = {"kind": kind, "input_dim": self.drift.old.shape[1]}
        settings["output_dim"] = self.drift.new.shape[1]
        if side:
            settings |= {"side": side, "side_dim": self.counts.width, "side_vocabulary": self.counts.vocabulary}
        pairs = self.pairs(rows, fresh, clock, bool(side))
        started = time.time()
        model = fit_to_pairs(CorrectorModel(CorrectorConfig(**settings)), pairs, fitting=CorrectorFitting(seed=0))
        return Fitted(model, pairs), time.time() - started

    def corrected(self, model: CorrectorModel) -> torch.Tensor:
        """Correct all targets, ``(n, dim)``."""
        return model.correct(self.drift.old, self.counts if model.config.side else None)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--drifts", nargs="+", required=True, help="folders made by drifts.py")
    flags.add_argument("--output_dir", required=True)
    flags.add_argument("--pairs", nargs="+", default=["100", "500", "2000", "free"], help="numbers, or 'free'")
    flags.add_argument("--resamples", type=int, default=10, help="times the pairs are drawn")
    flags.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    print_head("upgrade of an index after fine-tuning", arguments)
    out = Path(arguments.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    for folder in arguments.drifts:
        bench = Bench(load_drift(Path(folder)))
        print_drift(bench)
        for source in arguments.pairs:
            values, facts = measure(bench, source, arguments)
            stem = f"{bench.drift.name}-{source}"
            kept = {name: column.tolist() for name, column in values.items()}
            (out / f"{stem}.json").write_text(json.dumps({"mrr@10": kept, "facts": facts}))
            print_table(bench, source, values, facts)


def print_drift(bench: Bench) -> None:
    drift = bench.drift
    cosine = float(torch.nn.functional.cosine_similarity(drift.old, drift.new).mean())
    conditions = {
        "old model kept": bench.mrr(drift.queries_old, drift.old), "stale": bench.mrr(drift.queries_new, drift.old),
        "fresh": bench.mrr(drift.queries_new, drift.new),
    }  # fmt: skip
    means = paired_bootstrap(conditions, generator=np.random.default_rng(0))
    print(
        f"## {drift.name}: {len(drift.old):,} targets, {len(drift.relevant):,} queries, cosine(old, new) {cosine:.3f}"
    )
    for name in conditions:
        found = means.mean(name)
        print(f"{name:<16} MRR@10 {found.estimate:.4f} [{found.low:.4f}, {found.high:.4f}]")
    print(f"{'stale':<16} total variation of the softmax {bench.variation(drift.old):.3f}\n", flush=True)


def measure(
    bench: Bench, source: str, arguments: argparse.Namespace
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Fit and judge everything on several draws of the pairs; values are means over draws, ``(queries,)``."""
    drift = bench.drift
    values: dict[str, list[np.ndarray]] = defaultdict(list)
    facts: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for draw in range(1 if source == "free" else arguments.resamples):
        rows, fresh, clock = choose(bench, source, arguments.seed + draw)
        fits = {}
        for family in arguments.families:
            try:
                fits[family], seconds = bench.fit(
                    family, rows, fresh, clock if "+" in family or family == "kernel" else None
                )
            except torch.linalg.LinAlgError as error:
                print(f"{family} on {source}, draw {draw}: {error}")
                continue
            targets = bench.corrected(fits[family].model)
            values[family].append(bench.mrr(drift.queries_new, targets))
            facts[family]["tv"].append(bench.variation(targets))
            facts[family]["seconds"].append(seconds)
        options = ChoiceOptions(queries=drift.queries_other, scale=drift.scale, seed=draw)
        started = time.time()
        name = choose_corrector(fits, options).name
        values["auto"].append(values[name][-1])
        facts["auto"]["tv"].append(facts[name]["tv"][-1])
        facts["auto"]["seconds"].append(time.time() - started)
        facts["auto"][f"chose {name}"].append(1.0)
        partly = drift.old.clone()
        partly[rows] = fresh
        values["partial re-embedding"].append(bench.mrr(drift.queries_new, partly))
        facts["partial re-embedding"]["tv"].append(bench.variation(partly))
    count = {name: len(found) for name, found in values.items()}
    means = {name: np.mean(found, axis=0) for name, found in values.items() if count[name] == max(count.values())}
    means |= {"stale": bench.mrr(drift.queries_new, drift.old), "fresh": bench.mrr(drift.queries_new, drift.new)}
    shown = {
        name: {key: float(np.sum(one) if key.startswith("chose") else np.mean(one)) for key, one in found.items()}
        for name, found in facts.items()
    }  # fmt: skip
    shown["pairs"] = {"count": float(len(rows))}
    return means, shown


def choose(bench: Bench, source: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return rows, fresh vectors and, for free pairs, their clock."""
    drift = bench.drift
    if source == "free":
        kept = bench.usable[drift.free_rows]
        latest = torch.argsort(drift.free_steps[kept], descending=True, stable=True)[:8192].sort().values
        return drift.free_rows[kept][latest], drift.free_fresh[kept][latest], drift.free_clock[kept][latest]
    order = torch.randperm(len(drift.new), generator=torch.Generator().manual_seed(seed))
    rows = order[bench.usable[order]][: int(source)].sort().values
    return rows, drift.new[rows], None


def print_table(bench: Bench, source: str, values: dict[str, np.ndarray], facts: dict[str, dict[str, float]]) -> None:
    bootstrap = paired_bootstrap(values, generator=np.random.default_rng(0))
    print(f"### {bench.drift.name}, {source} pairs ({int(facts['pairs']['count'])})")
    print("method                 MRR@10   recovery              TV    auto minus it              seconds")
    for name in values:
        recovery, mean = bootstrap.recovery(name), bootstrap.mean(name).estimate
        shown = (
            f"{recovery.estimate:5.2f} [{recovery.low:5.2f}, {recovery.high:5.2f}]"
            if isinstance(recovery, Interval) else "undefined"
        )  # fmt: skip
        lead = bootstrap.difference("auto", name)
        fact = facts.get(name, {})
        print(
            f"{name:<22} {mean:.4f}   {shown:<20} {fact.get('tv', float('nan')):5.3f}   "
            f"{lead.estimate:+.4f} [{lead.low:+.4f}, {lead.high:+.4f}]   {fact.get('seconds', 0.0):6.1f}"
        )
    chosen = {key.removeprefix("chose "): int(one) for key, one in facts["auto"].items() if key.startswith("chose")}
    behind = [name for name in RIVALS if name in values and bootstrap.difference("auto", name).high < 0]
    print(f"auto chose {chosen}; clearly behind: {behind or 'none'}\n", flush=True)


if __name__ == "__main__":
    main()
