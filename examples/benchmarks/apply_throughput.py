"""How fast a whole cache is corrected into another, beside what this machine could do at best.

    python examples/benchmarks/apply_throughput.py [--rows 131072 --dim 384] [--output_dir FOLDER] [--rounds 5]

For every kind of corrector there are four times, taken in turn so that whatever else the machine does hits all of
them: the bare matrix products of that kind, by ``torch.mm`` on rows in memory; the corrector on the same rows; the
files alone (read and written with checksums, flushed), without a corrector; and ``write_corrected``, which does it all.
What follows are shares of what would be possible, medians over rounds: the products alone; products and files one after
the other; the longer of the two; and of the processor's time (all threads) the products' part, which other jobs on the
machine change less. All in float32.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import print_head

from hf_corrector.cache import CachePlan, CacheWriter, TargetCache
from hf_corrector.corrected_cache import DEFAULT_CHUNK_ROWS, DEFAULT_SHARD_ROWS, ApplyOptions, write_corrected
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.records import EncoderFingerprint

KINDS = ("affine", "residual_mlp", "kernel")
TASKS = ("products", "corrector", "files", "all")
PRODUCT_ROWS = 65_536
OLD, NEW = (EncoderFingerprint.of_precomputed(name, normalize=True) for name in ("old", "new"))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rows", type=int, default=131_072)
    flags.add_argument("--dim", type=int, default=384)
    flags.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    flags.add_argument("--landmarks", type=int, default=2048, help="of the kind 'kernel'")
    flags.add_argument("--chunk_rows", type=int, default=DEFAULT_CHUNK_ROWS)
    flags.add_argument("--shard_rows", type=int, default=DEFAULT_SHARD_ROWS)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--output_dir", help="where to write; by default the system's temporary folder")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    print_head("apply_throughput", arguments)
    torch.manual_seed(arguments.seed)
    vectors = torch.nn.functional.normalize(torch.randn(arguments.rows, arguments.dim))
    with tempfile.TemporaryDirectory(dir=arguments.output_dir) as folder:
        ids = [str(row) for row in range(arguments.rows)]
        cache = TargetCache.from_arrays(Path(folder) / "old", vectors, ids, fingerprint=OLD)
        heads = ("GF/s", *TASKS, "rows/s", "/products", "/sum", "/longer", "/cpu")
        print("kind          " + " ".join(f"{head:>9}" for head in heads))
        for kind in arguments.kinds:
            report(kind, measure(kind, cache, vectors, Path(folder), arguments), arguments)


def measure(
    kind: str, cache: TargetCache, vectors: torch.Tensor, folder: Path, arguments: argparse.Namespace
) -> dict[str, np.ndarray]:
    """Time the four things in turn; wall and processor seconds of every round, ``(rounds, 2)``."""
    corrector = make_corrector(kind, arguments)
    options = ApplyOptions(shard_rows=arguments.shard_rows, chunk_rows=arguments.chunk_rows, progress=False)
    new = folder / "new"
    tasks: dict[str, Callable[[], object]] = {
        "products": lambda: multiply(kind, vectors, arguments),
        "corrector": lambda: correct(corrector, vectors, arguments.chunk_rows),
        "files": lambda: copy(cache, new, arguments),
        "all": lambda: write_corrected(corrector, cache, new, encoder=NEW, options=options),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in tasks}
    for number in range(arguments.rounds + 1):
        for name, task in tasks.items():
            shutil.rmtree(new, ignore_errors=True)
            started, used = time.perf_counter(), time.process_time()
            task()
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - started, time.process_time() - used))
    return {name: np.array(values) for name, values in seconds.items()}


def make_corrector(kind: str, arguments: argparse.Namespace) -> CorrectorModel:
    """Make a corrector with random weights, as speed does not depend on them."""
    corrector = CorrectorModel(CorrectorConfig(kind=kind, input_dim=arguments.dim))
    parameters = {name: 0.02 * torch.randn(buffer.shape) for name, buffer in corrector.named_buffers()}
    del parameters["fitted_pairs"]
    if kind == "kernel":
        parameters["landmarks"] = torch.randn(arguments.landmarks, arguments.dim) / arguments.dim**0.5
        parameters["landmark_weight"] = 0.02 * torch.randn(arguments.landmarks, arguments.dim)
        parameters["landmark_width"] = torch.ones(())
    corrector.load_parameters(parameters)
    return corrector


def products_of(kind: str, arguments: argparse.Namespace) -> list[tuple[int, int]]:
    """Return the sizes of the matrices a row is multiplied with."""
    dim, hidden = arguments.dim, 2 * arguments.dim
    match kind:
        case "residual_mlp":
            return [(dim, hidden), (hidden, dim)]
        case "kernel":
            return [(dim, dim), (dim, arguments.landmarks), (arguments.landmarks, dim)]
    return [(dim, dim)]


def multiply(kind: str, vectors: torch.Tensor, arguments: argparse.Namespace) -> None:
    """Do the products alone, on as many rows at a time as suits a product."""
    rows = min(PRODUCT_ROWS, len(vectors))
    for size_in, size_out in products_of(kind, arguments):
        left = vectors[:rows] if size_in == arguments.dim else vectors.new_zeros(rows, size_in)
        right, out = vectors.new_ones(size_in, size_out), vectors.new_empty(rows, size_out)
        for start in range(0, len(vectors), rows):
            count = min(rows, len(vectors) - start)
            torch.mm(left[:count], right, out=out[:count])


@torch.no_grad()
def correct(corrector: CorrectorModel, vectors: torch.Tensor, chunk_rows: int) -> None:
    for start in range(0, len(vectors), chunk_rows):
        corrector(vectors[start : start + chunk_rows])


def copy(cache: TargetCache, path: Path, arguments: argparse.Namespace) -> None:
    """Write the rows as they are, with all that is checked on the way."""
    plan = CachePlan(
        ids=cache.ids, dim=cache.dim, dtype="float32", fingerprint=OLD, texts_hash=cache.texts_hash,
        shard_rows=arguments.shard_rows,
    )  # fmt: skip
    with CacheWriter(path, plan) as writer:
        for shard in writer.pending_shards():
            cache.check_bytes(shard.start, shard.stop)
            writer.write_shard(shard.index, cache.read(shard.start, shard.stop))
        writer.finish()


def report(kind: str, spent: dict[str, np.ndarray], arguments: argparse.Namespace) -> None:
    """Print one line; ``spent`` are wall and processor seconds, ``(rounds, 2)`` each."""
    wall = {name: values[:, 0] for name, values in spent.items()}
    middle = [float(np.median(wall[name])) for name in TASKS]
    flops = 2.0 * arguments.rows * sum(one * other for one, other in products_of(kind, arguments))
    bounds = (wall["products"], wall["products"] + wall["files"], np.maximum(wall["products"], wall["files"]))
    shares = [float(np.median(bound / wall["all"])) for bound in bounds]
    shares.append(float(np.median(spent["products"][:, 1] / spent["all"][:, 1])))
    figures = [f"{flops / middle[0] / 1e9:9.0f}", *(f"{one:9.3f}" for one in middle)]
    figures += [f"{arguments.rows / middle[-1]:9.0f}", *(f"{share:9.2f}" for share in shares)]
    print(f"{kind:<13} " + " ".join(figures), flush=True)


if __name__ == "__main__":
    main()
