"""Quality of the trained encoder against all encoder passes, for every remedy against staleness, over seeds.

    python examples/benchmarks/strategies_full.py --data FOLDER --output_dir runs/strategies_full --sets nl2bash

Every strategy trains the same encoder on the same batches and is judged by MRR@10 of its test queries over a freshly
encoded index, so that what is compared is the encoder and not what is left of its cache:

* ``in_batch``, ``uniform``: negatives that need no cache;
* ``ignore``: drawn from the softmax over the cache as made before training;
* ``rerank``: the nearest 32 targets by stale scores are encoded in every step, and negatives drawn from those;
* ``query_side``: the target tower is frozen, so that nothing goes stale;
* ``refresh-N``: the cache is re-encoded every N steps;
* ``affine``, ``kernel+tokens``: through that corrector, never re-encoded.

Passes are texts through the encoder, queries and targets, for whatever purpose but the final index, which all but
``query_side`` need once. Differences are paired by query and seed; their intervals are over seeds and queries, both
drawn anew in every resample. A run that is in ``--output_dir`` already is not made again, so seeds, sets and
strategies may be added in later calls. With matplotlib installed the table is drawn too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import data_folder, half_is_fast, print_head

from hf_corrector._extras import demo_encoder
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import RetrievalData, positives_as_rows
from hf_corrector.index.exact import ExactIndex
from hf_corrector.metrics import mrr_at_k
from hf_corrector.models import DualEncoderModel
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer

# Fits that bring earlier pairs forward by the clock of the drift can use more of them, and cost more.
LONG_WINDOW = {"corrector_window": 200, "corrector_update_steps": 20}
STRATEGIES: dict[str, dict[str, Any]] = {
    "in_batch": {"negatives": "in_batch", "staleness": "ignore"},
    "uniform": {"negatives": "uniform", "staleness": "ignore"},
    "ignore": {"staleness": "ignore"},
    "rerank": {"staleness": "rerank", "rerank_candidates": 32},
    "query_side": {"staleness": "ignore", "train_targets": False},
    "refresh-100": {"staleness": "refresh", "refresh_steps": "100"},
    "refresh-30": {"staleness": "refresh", "refresh_steps": "30"},
    "affine": {"corrector_kind": "affine"},
    "kernel+tokens": {"corrector_kind": "kernel", "corrector_side": "tokens", **LONG_WINDOW},
}
TRAINING_COSTS = (
    "initial_target_passes", "train_target_passes", "refresh_target_passes", "rerank_target_passes", "query_passes",
)  # fmt: skip
CORRECTORS = ("affine", "kernel+tokens")
# What loses more than this to ``ignore`` is said in the drawing's title: drawn, it would flatten the rest.
LOWEST_DRAWN = -0.05


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", help="folder that holds the data sets")
    flags.add_argument("--output_dir", required=True)
    flags.add_argument("--model", default=None, help="encoder; by default all-MiniLM-L6-v2 of the extra 'demo'")
    flags.add_argument("--sets", nargs="+", default=["nl2bash"])
    flags.add_argument("--layers", type=int, default=3)
    flags.add_argument("--steps", type=int, default=150)
    flags.add_argument("--num_negatives", type=int, default=1)
    flags.add_argument("--max_length", type=int, default=32)
    flags.add_argument("--learning_rate", type=float, default=1e-4)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    arguments = flags.parse_args()
    print_head("strategies against staleness, quality against all encoder passes", arguments)
    regime = f"{arguments.layers}-layers-{arguments.steps}-steps-{arguments.num_negatives}-negatives"
    for name in arguments.sets:
        data = load_retrieval_data(data_folder(arguments.data, name))
        folder = Path(arguments.output_dir) / f"{name}-{regime}"
        folder.mkdir(parents=True, exist_ok=True)
        for seed in arguments.seeds:
            for strategy in arguments.strategies:
                file = folder / f"{strategy}-{seed}.json"
                if not file.exists():
                    file.write_text(json.dumps(run(arguments, data, strategy, seed)))
        print_table(f"{name}, {regime}", folder)


def load_encoder(arguments: argparse.Namespace, *, separate: bool) -> DualEncoderModel:
    name = str(demo_encoder()) if arguments.model is None else arguments.model
    return DualEncoderModel.from_encoder(
        name, num_hidden_layers=arguments.layers, query_max_length=arguments.max_length,
        target_max_length=arguments.max_length, separate_towers=separate,
    )  # fmt: skip


def run(arguments: argparse.Namespace, data: RetrievalData, strategy: str, seed: int) -> dict[str, Any]:
    """Train one strategy with one seed, and judge its encoder on a fresh index."""
    out = Path(arguments.output_dir) / f"running-{strategy}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    args = DualEncoderTrainingArguments(
        str(out), max_steps=arguments.steps, learning_rate=arguments.learning_rate, seed=seed, bf16=half_is_fast(),
        num_negatives=arguments.num_negatives, logging_steps=50, save_strategy="no", report_to=[], disable_tqdm=True,
        **STRATEGIES[strategy],
    )  # fmt: skip
    model = load_encoder(arguments, separate=strategy == "query_side")
    trainer = DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus)
    trainer.hold_out(data.test)
    trainer.prepare()
    started = time.time()
    trainer.train()
    seconds, cost = time.time() - started, dict(trainer.cost)
    fresh, queries = trainer.run_judge.encode_fresh(), trainer.run_judge.encode_queries(data.test)
    rows = ExactIndex(fresh).search(queries, 10).rows.numpy()
    quality = mrr_at_k(rows, positives_as_rows(data.test, data.corpus), k=10)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    print(f"{strategy:<14} seed {seed}: MRR@10 {quality.mean():.4f}, {seconds:.0f} s, {cost}, last log {logs[-1]}")
    print(end="", flush=True)
    shutil.rmtree(out)
    return {"mrr@10": quality.tolist(), "cost": cost, "seconds": seconds, "logs": logs}


def print_table(title: str, folder: Path) -> None:
    """Print quality, passes and paired differences of all runs in a folder."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in folder.glob("*.json"):
        name, seed = file.stem.rsplit("-", 1)
        found.setdefault(name, {})[int(seed)] = json.loads(file.read_text())
    seeds = sorted(set.intersection(*(set(runs) for runs in found.values())))
    if not seeds:
        print("no seed has run with every strategy yet")
        return
    order = [name for name in STRATEGIES if name in found]
    values = {name: np.array([found[name][seed]["mrr@10"] for seed in seeds]) for name in order}
    passes = {
        name: float(np.mean([sum(found[name][seed]["cost"].get(key, 0) for key in TRAINING_COSTS) for seed in seeds]))
        for name in order
    }
    print(f"\n## {title}: {len(seeds)} seeds, {values[order[0]].shape[1]} test queries")
    print("strategy         MRR@10 [95 %]            passes   minus ignore [95 %]          minus refresh-30 [95 %]")
    for name in order:
        mean = interval(values[name])
        parts = [f"{name:<14} {mean[0]:.4f} [{mean[1]:.4f}, {mean[2]:.4f}] {passes[name]:9,.0f}"]
        for other in ("ignore", "refresh-30"):
            if other in values:
                gain = interval(values[name] - values[other])
                parts.append(
                    f"{gain[0]:+.4f} [{gain[1]:+.4f}, {gain[2]:+.4f}] ({gain[0] / max(gain[3], 1e-9):+.1f} se)"
                )
        print("   ".join(parts))
    print(end="\n", flush=True)
    seeds_text = f"{title}, {len(seeds)} seeds, paired 95 % intervals"
    draw(seeds_text, values, passes, folder / "quality-over-passes.png")


def interval(values: np.ndarray) -> tuple[float, float, float, float]:
    """Return mean, 95 % interval and standard error over seeds and queries, for values ``(seeds, queries)``."""
    generator, means = np.random.default_rng(0), []
    for _ in range(2000):
        seeds = generator.integers(len(values), size=len(values))
        queries = generator.integers(values.shape[1], size=values.shape[1])
        means.append(values[seeds][:, queries].mean())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(values.mean()), float(low), float(high), float(np.std(means))


def draw(title: str, values: dict[str, np.ndarray], passes: dict[str, float], file: Path) -> None:
    """Draw what each strategy gains over ``ignore`` over what it encodes; skipped without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None or "ignore" not in values:
        print("not drawn: matplotlib is not installed, or 'ignore' was not run")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    taken: list[float] = []
    left_out = []
    for name in sorted(values, key=lambda one: passes[one]):
        gain, low, high, _ = interval(values[name] - values["ignore"])
        if high < LOWEST_DRAWN:
            left_out.append(f"{name} at {gain:+.3f}, {passes[name]:,.0f} texts")
            continue
        place = passes[name]
        while any(abs(np.log(place / other)) < 0.05 for other in taken):
            place *= 1.07  # beside its neighbour, where both cost the same
        taken.append(place)
        colour = "tab:blue" if name in CORRECTORS else "tab:gray"
        axes.errorbar(place, gain, yerr=[[gain - low], [high - gain]], fmt="o", capsize=3, color=colour)
        axes.annotate(
            name, (place, high), textcoords="offset points", xytext=(0, 4), fontsize=8, rotation=50, color=colour
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="texts through the encoder while training", ylabel="MRR@10 on a fresh index, minus ignore")
    axes.set_title(title + ("" if not left_out else f"\nbelow the axis: {'; '.join(left_out)}"), fontsize=9)
    axes.set_xscale("log")
    axes.margins(y=0.25)
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
    print(f"drawn: {file.name}")


if __name__ == "__main__":
    main()
