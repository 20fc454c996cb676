"""Searching stale vectors through a corrector: speed and recall beside a plain matrix product and topk.

    python examples/benchmarks/search_corrected.py --drift runs/drifts/nl2bash-300 [--rows 1000000]

``--drift`` is a folder made by ``drifts.py``. With ``--rows`` its stale vectors are repeated with noise added until
there are so many: real vectors tiled, not a real corpus. The correctors are fitted to the drift's free pairs. Rounds
alternate in order, so that whatever else the machine does hits all ways; what is reported is the ratio of a way's time
to its baseline's in the same round, with a bootstrap interval over rounds. Recall is against correcting every row and
searching in float64.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import print_head
from drifts import Drift, load_drift
from torch.nn import functional as F

from hf_corrector.corrected_retriever import CorrectedRetriever, RetrieverOptions
from hf_corrector.index.base import RunningTopK, TensorVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.index.faiss import FaissIndex, FaissParameters
from hf_corrector.index.scan import ScanIndex
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.training.corrector_fit import fit_corrector

RAW_ROWS = 8192
FAISS = {"IVF1024,Flat": {"nprobe": 16}, "HNSW32": {"ef_search": 128}, "IVF1024,PQ96x4fs,RFlat": {"nprobe": 16}}


@dataclass
class Way:
    """One way to search.

    Attributes:
        run: Returns rows ``(queries, k)``.
        baseline: Name of the way whose time it is divided by.
        expected: Rows that recall is measured against.
        once: Seconds spent once per corrector.
    """

    run: Callable[[], torch.Tensor]
    baseline: str
    expected: torch.Tensor
    once: float = 0.0


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--drift", required=True, help="folder made by drifts.py")
    flags.add_argument("--rows", type=int, default=0, help="tile up to so many rows; 0 for the real ones alone")
    flags.add_argument("--noise", type=float, default=0.5, help="norm of the noise added to tiles of unit norm")
    flags.add_argument("--queries", type=int, default=256)
    flags.add_argument("--k", type=int, default=10)
    flags.add_argument("--shortlist", type=int, default=0, help="candidates of two_stage; 0 for its default")
    flags.add_argument("--faiss_shortlist", type=int, default=200)
    flags.add_argument("--rounds", type=int, default=10)
    flags.add_argument("--kinds", nargs="*", default=["affine", "residual_mlp"])
    flags.add_argument("--faiss", nargs="*", default=[], help=f"of {list(FAISS)}, or other factories")
    flags.add_argument("--streamed", action="store_true", help="also correct every row in every search")
    flags.add_argument("--threads", type=int, default=0)
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.drift = Path(arguments.drift)
    folder, arguments.drift = arguments.drift, arguments.drift.name
    print_head("search_corrected", arguments)
    drift = load_drift(folder)
    stale = tiled(drift.old.float(), arguments)
    picked = np.random.default_rng(arguments.seed).permutation(len(drift.queries_new))[: arguments.queries]
    queries = drift.queries_new[np.sort(picked)].float()
    print(f"{len(stale)} rows of size {stale.shape[1]}, {len(queries)} queries at a time, k={arguments.k}")
    print("seconds once: to prepare for a corrector (snapshot, norms, least squares) or to build the index\n")
    for kind in arguments.kinds:
        corrector = fitted(kind, drift)
        ways = ways_to_search(corrector, stale, queries, arguments)
        report(kind, ways, measure(ways, arguments.rounds), len(queries), arguments.seed)


def tiled(old: torch.Tensor, arguments: argparse.Namespace) -> torch.Tensor:
    """Repeat vectors with noise, piece by piece, until there are ``--rows``."""
    if not arguments.rows:
        return old.contiguous()
    generator, size = torch.Generator().manual_seed(arguments.seed), arguments.noise / old.shape[1] ** 0.5
    whole = torch.empty(arguments.rows, old.shape[1])
    for start in range(0, arguments.rows, len(old)):
        piece = whole[start : start + len(old)]
        noise = torch.randn(piece.shape, generator=generator) * (size if start else 0.0)
        piece.copy_(F.normalize(old[: len(piece)] + noise, dim=1))
    return whole


def fitted(kind: str, drift: Drift) -> CorrectorModel:
    """Fit a corrector to the targets that training re-encoded anyway."""
    torch.manual_seed(0)
    config = CorrectorConfig(kind=kind, input_dim=drift.old.shape[1], output_dim=drift.new.shape[1])
    stale = drift.old[drift.free_rows].float()
    return fit_corrector(CorrectorModel(config), stale, drift.free_fresh.float(), target_rows=drift.free_rows)


def raw(rows: torch.Tensor, queries: torch.Tensor, k: int) -> torch.Tensor:
    """Search as one would without a library: product, topk, merge, in chunks that stay in the processor's cache."""
    best = RunningTopK(len(queries), k)
    asked, lines = queries.to(rows.dtype), torch.arange(len(queries)).repeat_interleave(k)
    for start in range(0, len(rows), RAW_ROWS):
        values, places = (asked @ rows[start : start + RAW_ROWS].T).topk(k, dim=1)
        best.update_some(lines, places.reshape(-1) + start, values.reshape(-1).float())
    return best.result().rows


def ways_to_search(
    corrector: CorrectorModel, stale: torch.Tensor, queries: torch.Tensor, arguments: argparse.Namespace
) -> dict[str, Way]:
    """Prepare everything that is compared."""
    k = arguments.k
    corrected = corrector.correct(stale)
    expected = ExactIndex(TensorVectors(corrected)).search(queries, k).rows
    half, corrected_half = stale.bfloat16(), corrected.bfloat16()
    ways = {
        "raw fp32": Way(lambda: raw(corrected, queries, k), "raw fp32", expected),
        "raw bf16": Way(lambda: raw(corrected_half, queries, k), "raw bf16", expected),
    }
    for memory, rows in (("fp32", stale), ("bf16", half)):
        ways[f"stale flat {memory}"] = flat(rows, queries, k, f"raw {memory}", expected)

    def add(name: str, rows: torch.Tensor, backend: str, baseline: str, **options: object) -> None:
        retriever = CorrectedRetriever(
            TensorVectors(rows), corrector, backend=backend, options=RetrieverOptions(**options)
        )
        once = spent(retriever.prepare) + spent(lambda: retriever.search(queries[:1], k))
        ways[name] = Way(lambda: retriever.search(queries, k).rows, baseline, expected, once)

    add("exact, fp32 snapshot", stale, "exact", "raw fp32")
    add("exact, bf16 snapshot", stale, "exact", "raw bf16", snapshot="bfloat16")
    if arguments.streamed:
        add("exact, no snapshot", stale, "exact", "raw fp32", snapshot="none")
    for memory, rows in (("fp32", stale), ("bf16", half)):
        if corrector.config.kind == "affine":
            add(f"folded {memory}", rows, "folded", f"stale flat {memory}")
        shortlist = arguments.shortlist or None
        add(f"two_stage {memory}", rows, "two_stage", f"stale flat {memory}", shortlist=shortlist)
    for factory in arguments.faiss:
        started = time.perf_counter()
        index = FaissIndex.build(TensorVectors(stale), factory, parameters=FaissParameters(**FAISS.get(factory, {})))
        built = time.perf_counter() - started
        add(f"faiss {factory}", stale, "faiss", "stale flat fp32", faiss=index, shortlist=arguments.faiss_shortlist)
        ways[f"faiss {factory}"].once += built
        ways[f"  stale {factory} alone"] = flat(index, queries, k, "stale flat fp32", expected, built)
    return ways


def flat(
    vectors: torch.Tensor | FaissIndex, queries: torch.Tensor, k: int, baseline: str, expected: torch.Tensor,
    once: float = 0.0,
) -> Way:  # fmt: skip
    """Search stale vectors as they are."""
    index = vectors if isinstance(vectors, FaissIndex) else ScanIndex(TensorVectors(vectors))
    return Way(lambda: index.search(queries, k).rows, baseline, expected, once)


def spent(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Time all ways in turn, every other round backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way.run()
    for number in range(rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            seconds[name].append(spent(ways[name].run))
    return seconds


def report(kind: str, ways: dict[str, Way], seconds: dict[str, list[float]], queries: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    print(f"{kind:<30} queries/s   time ratio [95 %]   to {'':<16} recall@k   seconds once")
    for name, way in ways.items():
        own, base = np.array(seconds[name]), np.array(seconds[way.baseline])
        drawn = generator.integers(len(own), size=(5000, len(own)))
        low, high = np.quantile(np.median(own[drawn] / base[drawn], axis=1), [0.025, 0.975])
        rows = way.run()
        recall = float((rows[:, :, None] == way.expected[:, None, :]).any(dim=1).float().mean())
        print(f"{name:<30} {queries / np.median(own):9.0f}   {np.median(own / base):5.2f} [{low:.2f}, {high:.2f}]   "
              f"{way.baseline:<18} {recall:9.4f} {way.once:14.2f}", flush=True)  # fmt: skip
    print()


if __name__ == "__main__":
    main()
