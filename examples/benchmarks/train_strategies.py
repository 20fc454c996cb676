"""Strategies against staleness side by side: quality, fidelity of sampling, encoder passes.

    python examples/benchmarks/train_strategies.py --data FOLDER --output_dir runs/strategies

Every strategy trains the same encoder on the same batches of nl2bash and is judged on the same test queries:

* ``in_batch``, ``uniform``: negatives that need no cache;
* ``ignore``: the softmax over the cache as made before training;
* ``refresh-N``: the cache is re-encoded every N steps;
* ``mean_shift``, ``affine``, ``residual_mlp``: the cache is seen through that corrector;
* ``affine+tokens``, ``kernel+tokens``: through one that also reads the targets' tokens.

Then the free pairs of the affine run are given to every family once more, after training, and its encoder re-encodes
random targets instead, so that families and sources of pairs can be compared on one drift.

Positives of test queries are held out of every fit, so that all test queries are clean.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import data_folder, half_is_fast, print_head

from hf_corrector._extras import demo_encoder
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import RetrievalData, positives_as_rows
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.staleness import Conditions, StalenessReport, measure_staleness
from hf_corrector.metrics import paired_bootstrap
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.corrector_fit import CorrectorFitting, fit_corrector
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer

# Fits that bring earlier pairs forward by the clock of the drift can use more of them, and cost more.
LONG_WINDOW = {"corrector_window": 200, "corrector_update_steps": 20}
STRATEGIES: dict[str, dict[str, Any]] = {
    "in_batch": {"negatives": "in_batch", "staleness": "ignore"},
    "uniform": {"negatives": "uniform", "staleness": "ignore"},
    "ignore": {"negatives": "softmax", "staleness": "ignore"},
    "mean_shift": {"negatives": "softmax", "corrector_kind": "mean_shift"},
    "affine": {"negatives": "softmax", "corrector_kind": "affine"},
    "residual_mlp": {"negatives": "softmax", "corrector_kind": "residual_mlp"},
    "affine+tokens": {"negatives": "softmax", "corrector_kind": "affine", "corrector_side": "tokens", **LONG_WINDOW},
    "kernel+tokens": {"negatives": "softmax", "corrector_kind": "kernel", "corrector_side": "tokens", **LONG_WINDOW},
    "refresh-100": {"negatives": "softmax", "staleness": "refresh", "refresh_steps": "100"},
    "refresh-30": {"negatives": "softmax", "staleness": "refresh", "refresh_steps": "30"},
}
TRAINING_COSTS = ("initial_target_passes", "train_target_passes", "refresh_target_passes")
FAMILIES = ("mean_shift", "affine", "residual_mlp")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", help="folder that holds nl2bash/")
    flags.add_argument("--output_dir", required=True)
    flags.add_argument("--model", default=None, help="encoder; by default all-MiniLM-L6-v2 of the extra 'demo'")
    flags.add_argument("--layers", type=int, default=6, help="3 is the fast variant")
    flags.add_argument("--steps", type=int, default=300)
    flags.add_argument("--max_length", type=int, default=32)
    flags.add_argument("--learning_rate", type=float, default=5e-5)
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--strategies", nargs="+", choices=list(STRATEGIES), default=list(STRATEGIES))
    arguments = flags.parse_args()
    print_head("train_strategies on nl2bash", arguments)
    data = load_retrieval_data(data_folder(arguments.data, "nl2bash"))
    results = Path(arguments.output_dir)
    for seed in arguments.seeds:
        for strategy in arguments.strategies:
            trainer, report, seconds = train(arguments, data, strategy, seed)
            quality = report.judgement.per_query["fresh"]["mrr@10"].tolist()
            (results / f"{strategy}-{seed}.json").write_text(json.dumps({"mrr@10": quality, "cost": trainer.cost}))
            print_run(strategy, seed, trainer, report, seconds)
            if strategy == "affine":
                compare_families(trainer, data, seed)
            shutil.rmtree(results / f"{strategy}-{seed}", ignore_errors=True)
    print_quality(results)


def load_encoder(arguments: argparse.Namespace) -> DualEncoderModel:
    name = str(demo_encoder()) if arguments.model is None else arguments.model
    return DualEncoderModel.from_encoder(
        name, num_hidden_layers=arguments.layers, query_max_length=arguments.max_length,
        target_max_length=arguments.max_length,
    )  # fmt: skip


def train(
    arguments: argparse.Namespace, data: RetrievalData, strategy: str, seed: int
) -> tuple[DualEncoderTrainer, StalenessReport, float]:
    """Train one strategy and judge it on the test split."""
    out = Path(arguments.output_dir) / f"{strategy}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    args = DualEncoderTrainingArguments(
        str(out), max_steps=arguments.steps, learning_rate=arguments.learning_rate, seed=seed, bf16=half_is_fast(),
        logging_steps=100, save_strategy="no", report_to=[], disable_tqdm=True, **STRATEGIES[strategy],
    )  # fmt: skip
    trainer = DualEncoderTrainer(load_encoder(arguments), args, train_dataset=data.train, targets=data.corpus)
    trainer.hold_out(data.test)
    trainer.prepare()
    if trainer.live_cache is None:
        trainer.build_cache()
        trainer.cost["initial_target_passes"] = 0
    started = time.time()
    trainer.train()
    seconds = time.time() - started
    report = trainer.judge(data.test, old_model=load_encoder(arguments), options=JudgeOptions(seed=seed))
    return trainer, report, seconds


def print_run(strategy: str, seed: int, trainer: DualEncoderTrainer, report: StalenessReport, seconds: float) -> None:
    """Print one strategy's quality, fidelity and cost."""
    print(f"## {strategy}, seed {seed}")
    print(report.table())
    everything = report.judgement.all_queries
    gap = everything["fresh"]["mrr@10"] - everything["stale"]["mrr@10"]
    recovered = (everything["corrected"]["mrr@10"] - everything["stale"]["mrr@10"]) / gap
    print(f"all queries, MRR@10: {({name: round(row['mrr@10'], 4) for name, row in everything.items()})}, "
          f"recovery {recovered:.3f}")  # fmt: skip
    phases = trainer.step_log.total_seconds
    print(f"passes: {trainer.cost}")
    shares = {name: round(spent / phases["step"], 3) for name, spent in phases.items() if name != "step"}
    print(f"seconds: train {seconds:.0f}, share of steps {shares}")
    summary = None if trainer.model.corrector is None else trainer.model.corrector.config.fit_summary
    print(f"last fit: {json.dumps(summary)}\n", flush=True)


def compare_families(trainer: DualEncoderTrainer, data: RetrievalData, seed: int) -> None:
    """Fit every family on the free pairs and on random re-encoded targets, and judge all on the same queries."""
    live = trainer.live_cache
    queries, fresh = trainer.run_judge.encode_queries(data.test), trainer.run_judge.encode_fresh()
    relevant = positives_as_rows(data.test, data.corpus)
    window = live.online.window.pairs()
    sources = {"free pairs": (window.rows, window.fresh)}
    held_out = torch.tensor(sorted({row for known in relevant for row in known}))
    shuffled = torch.randperm(len(fresh), generator=torch.Generator().manual_seed(seed))
    shuffled = shuffled[~torch.isin(shuffled, held_out)]
    for count in (100, 500, 2000):
        rows = shuffled[:count].sort().values
        sources[f"{count} random"] = (rows, torch.stack([fresh.read(row, row + 1)[0] for row in rows.tolist()]))
    print(f"### families on the drift of this run, seed {seed}")
    print("source              family         pairs  clean    MRR@10   recovery of MRR@10       TV   hard@50  cosine")
    for name, (rows, targets) in sources.items():
        for family in FAMILIES:
            config = CorrectorConfig(kind=family, input_dim=live.cache.dim)
            stale = live.cache.gather(rows)
            corrector = fit_corrector(CorrectorModel(config), stale, targets, fitting=CorrectorFitting(seed=seed))
            report = measure_staleness(
                Conditions(queries, live.cache, CorrectedTargets(live.cache, corrector), fresh), relevant,
                fitted_rows=rows.numpy(), scale=trainer.model.config.scale, options=JudgeOptions(seed=seed),
            )  # fmt: skip
            found, fidelity = report.to_dict(), report.fidelity_dict()["corrected"]
            recovery = found["recovery"]["mrr@10"]
            shown = (
                "-"
                if recovery["estimate"] is None
                else (f"{recovery['estimate']:.2f} [{recovery['low']:.2f}, {recovery['high']:.2f}]")
            )
            print(
                f"{name:<19} {family:<13} {len(rows):6d} {found['clean_queries']:6d} "
                f"{found['corrected']['mrr@10']:9.3f}   {shown:<18} {fidelity['tv']:11.3f} "
                f"{fidelity['hard_negative_recall@50']:9.3f} {fidelity['cosine']:7.3f}"
            )
    print(flush=True)


def print_quality(results: Path) -> None:
    """Print the quality of the encoders themselves, searched on a fresh index, with paired differences.

    All results in the folder are compared, so strategies may be run in several calls.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(results.glob("*.json")):
        runs.setdefault(file.stem.rsplit("-", 1)[0], []).append(json.loads(file.read_text()))
    means = {name: np.mean([run["mrr@10"] for run in runs[name]], axis=0) for name in STRATEGIES if name in runs}
    reference = "ignore" if "ignore" in means else next(iter(means))
    bootstrap = paired_bootstrap(means, generator=np.random.default_rng(0))
    print("## quality of the trained encoders (MRR@10 on a fresh index, all test queries, mean over seeds)")
    for name in means:
        mean, gain = bootstrap.mean(name), bootstrap.difference(name, reference)
        passes = np.mean([sum(v for k, v in run["cost"].items() if k in TRAINING_COSTS) for run in runs[name]])
        print(
            f"{name:<13} {mean.estimate:.4f} [{mean.low:.4f}, {mean.high:.4f}]   minus {reference}: "
            f"{gain.estimate:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]   {passes:9,.0f} target passes   "
            f"{len(runs[name])} seeds"
        )


if __name__ == "__main__":
    main()
