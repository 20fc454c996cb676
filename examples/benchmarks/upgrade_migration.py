"""Migration to an encoder of another family and size, and one that is not worth it.

    python examples/benchmarks/upgrade_migration.py --data FOLDER --output_dir runs/migration

The index was made by all-MiniLM-L6-v2 (384 dimensions). The new encoder consists of its first layers, a new projection
to 256 dimensions and an own training on nl2bash with in-batch negatives; ``--steps`` gives one encoder each: the first,
hardly trained, should be recognised as worse than the old one. Both directions are tried: targets forward, and new
queries mapped back to the old index. Intervals are over queries; pairs are drawn ``--resamples`` times.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import compute_dtype, data_folder, fine_tune, print_head

from hf_corrector import upgrade
from hf_corrector._extras import demo_encoder
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.metrics import paired_bootstrap
from hf_corrector.models import DualEncoderModel


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", help="folder that holds nl2bash/")
    flags.add_argument("--output_dir", required=True)
    flags.add_argument("--steps", type=int, nargs="+", default=[5, 300], help="training steps of the new encoders")
    flags.add_argument("--layers", type=int, default=3)
    flags.add_argument("--dim", type=int, default=256)
    flags.add_argument("--pairs", type=int, default=2000)
    flags.add_argument("--resamples", type=int, default=10)
    flags.add_argument("--kinds", nargs="+", default=["procrustes", "affine", "kernel"])
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    print_head("migration to another family and size", arguments)
    out = Path(arguments.output_dir)
    data = load_retrieval_data(data_folder(arguments.data, "nl2bash"))
    old = load(arguments, layers=6, dim=None)
    encoding = EncodeOptions(compute_dtype=compute_dtype(), progress=False)
    cache = build_cache(old, data.corpus, out / "old", options=encoding).cache
    for steps in arguments.steps:
        new = load(arguments, layers=arguments.layers, dim=arguments.dim)
        fine_tune(new, data, out / f"training-{steps}", steps=steps, seed=arguments.seed, learning_rate=2e-4)
        for direction in ("targets", "queries"):
            judged = []
            for draw in range(arguments.resamples):
                options = UpgradeOptions(
                    output_dir=out / f"encoder-{steps}", kinds=tuple(arguments.kinds), encoding=encoding, seed=draw
                )
                report = upgrade(
                    cache, new, data, num_pairs=arguments.pairs, old_model=old, direction=direction, options=options
                )
                if draw == 0:
                    print(f"## {steps} steps, {direction}\n{report.table()}\n\n{report.verdict}\n", flush=True)
                judged.append((report.decision.decision, report.judgement.per_query))
            print_draws(judged)


def print_draws(judged: list) -> None:
    """Print what changes with the draw of the pairs: decisions, and the difference to the old model."""
    means = {
        name: np.mean([per_query[name]["mrr@10"] for _, per_query in judged], axis=0) for name in ("old", "corrected")
    }
    gain = paired_bootstrap(means, generator=np.random.default_rng(0)).difference("corrected", "old")
    spread = np.std([per_query["corrected"]["mrr@10"].mean() for _, per_query in judged])
    decisions = [decision for decision, _ in judged]
    counts = {one: decisions.count(one) for one in sorted(set(decisions))}
    print(
        f"{len(judged)} draws of pairs: decisions {counts}; corrected minus old model kept {gain.estimate:+.4f} "
        f"[{gain.low:+.4f}, {gain.high:+.4f}], standard deviation between draws {spread:.4f}\n",
        flush=True,
    )


def load(arguments: argparse.Namespace, *, layers: int, dim: int | None) -> DualEncoderModel:
    """Load the first layers of MiniLM, with a projection that is not trained yet if ``dim`` is given."""
    return DualEncoderModel.from_encoder(
        str(demo_encoder()), num_hidden_layers=layers, projection_dim=dim, query_max_length=32, target_max_length=32
    )


if __name__ == "__main__":
    main()
