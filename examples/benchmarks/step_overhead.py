"""What looking at all targets costs a training step, and how faithful it is: every scan at 10,000 to 1,000,000 targets.

    python examples/benchmarks/step_overhead.py --data FOLDER --drift runs/drifts/nl2bash-300

``--drift`` is a folder made by ``drifts.py``. Its stale vectors are repeated with noise until there are so many
targets: real vectors tiled, not a real corpus. A corrector is fitted to the drift's free pairs and grows towards that
fit step by step, being replaced every ``--fit_steps`` steps (a network: every step), as in training. In each of
``--steps`` steps a batch of the drift's queries draws negatives; measured are the seconds of that and of keeping the
scan up to date, beside those of a real step of MiniLM (32 queries, their positives and negatives, forward, backward and
AdamW, bfloat16 autocast where that is fast) timed in the same run.

Fidelity is against ``full`` in float32 at the same step: total variation of the two softmaxes, and how many of the 50
hardest negatives are among the 50 this scan would take. Targets that a pool does not hold have no mass in that step.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import data_folder, half_is_fast, print_head
from drifts import Drift, load_drift
from torch.nn import functional as F

from hf_corrector._extras import demo_encoder
from hf_corrector.batching import pad_tokens
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import column
from hf_corrector.index.base import TensorVectors
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.sampling import DrawKeys, ExcludedRows, draw_pool
from hf_corrector.scans import BlockScan, PooledScan, ScanPlan, ShortlistScan, TargetScan, stale_index
from hf_corrector.training.corrector_fit import fit_corrector

HARD = 50
FIDELITY_EVERY = 13  # steps; no divisor of what refreshes go by
PLANS = {
    "full fp32": ScanPlan("full", "float32"),
    "full bf16": ScanPlan("full", "bfloat16"),
    "amortised-20 bf16": ScanPlan("amortised", "bfloat16", refresh_steps=20),
    "amortised-50 bf16": ScanPlan("amortised", "bfloat16", refresh_steps=50),
    "shortlist 256+8192": ScanPlan("shortlist", shortlist=256, pool=8192),
    "pooled 8192": ScanPlan("pooled", "bfloat16", pool=8192),
    "pooled 65536": ScanPlan("pooled", "bfloat16", pool=65_536),
}


@dataclass
class Course:
    """A corrector on its way to a fit.

    Attributes:
        fitted: Where it ends.
        corrector: What the scans read.
        every: Steps between replacements.
    """

    fitted: CorrectorModel
    corrector: CorrectorModel
    every: int

    def at(self, step: int, steps: int) -> bool:
        """Bring the corrector to a step of the second half of a run; say whether it changed."""
        if step % self.every:
            return False
        share = 0.5 + 0.5 * step / steps
        values = {name: tensor * share for name, tensor in self.fitted.state_dict().items()}
        own = self.corrector.state_dict()
        for name, tensor in own.items():
            # Displacements grow; centres, and the first layer of a network, stay.
            moving = name.split(".")[0] in ("weight", "offset", "output", "bias", "shift")
            tensor.copy_(values[name] if moving else self.fitted.state_dict()[name])
        return True


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--drift", required=True, help="folder made by drifts.py")
    flags.add_argument("--data", help="folder that holds nl2bash/, for the step of the encoder")
    flags.add_argument("--targets", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    flags.add_argument("--kinds", nargs="+", default=["affine", "residual_mlp"])
    flags.add_argument("--plans", nargs="+", choices=list(PLANS), default=list(PLANS))
    flags.add_argument("--steps", type=int, default=40)
    flags.add_argument("--fit_steps", type=int, default=10)
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--num_negatives", type=int, default=1)
    flags.add_argument("--noise", type=float, default=0.5, help="norm of the noise added to tiles of unit norm")
    flags.add_argument("--device", default="cpu")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    if arguments.steps < FIDELITY_EVERY:
        flags.error(
            f"--steps: expected at least {FIDELITY_EVERY}, got {arguments.steps}; fidelity is looked at so often"
        )
    folder, arguments.drift = Path(arguments.drift), Path(arguments.drift).name
    print_head("step_overhead", arguments)
    drift = load_drift(folder)
    encoding = encoder_seconds(arguments)
    print(f"a step of the encoder: {encoding:.3f} s (median of 5), {arguments.num_negatives} negatives per query\n")
    for kind in arguments.kinds:
        course = course_of(kind, drift, arguments)
        for count in arguments.targets:
            stale = TensorVectors(tiled(drift.old.float(), count, arguments))
            print(f"## {kind}, {count:,} targets")
            print("scan                  ms a step   share of step   worst step ms    TV to full   hard negatives@50")
            for name in arguments.plans:
                measure(name, stale, course, drift, encoding, arguments)
            print(flush=True)


def tiled(old: torch.Tensor, count: int, arguments: argparse.Namespace) -> torch.Tensor:
    """Repeat vectors with noise, piece by piece, until there are so many."""
    generator, size = torch.Generator().manual_seed(arguments.seed), arguments.noise / old.shape[1] ** 0.5
    whole = torch.empty(count, old.shape[1])
    for start in range(0, count, len(old)):
        piece = whole[start : start + len(old)]
        noise = torch.randn(piece.shape, generator=generator) * (size if start else 0.0)
        piece.copy_(F.normalize(old[: len(piece)] + noise, dim=1))
    return whole


def course_of(kind: str, drift: Drift, arguments: argparse.Namespace) -> Course:
    """Fit a corrector to the free pairs, and start one on its way there."""
    torch.manual_seed(arguments.seed)
    empty = CorrectorModel(CorrectorConfig(kind=kind, input_dim=drift.old.shape[1], output_dim=drift.new.shape[1]))
    stale = drift.old[drift.free_rows].float()
    fitted = fit_corrector(empty, stale, drift.free_fresh.float(), target_rows=drift.free_rows).requires_grad_(False)
    fitted = fitted.to(arguments.device)
    return Course(fitted, copy.deepcopy(fitted), 1 if kind == "residual_mlp" else arguments.fit_steps)


def measure(
    name: str, stale: TensorVectors, course: Course, drift: Drift, encoding: float, arguments: argparse.Namespace
) -> None:  # fmt: skip
    """Run a scan through some steps, and print what it took and how faithful it was."""
    plan, generator = PLANS[name], np.random.default_rng(arguments.seed)
    course.at(0, arguments.steps)
    targets = CorrectedTargets(stale, course.corrector, device=arguments.device, snapshot_bytes=0)
    scan = made(targets, plan)
    exact = BlockScan(targets, ScanPlan())
    seconds, variation, recall = [], [], []
    for step in range(arguments.steps):
        picked = torch.from_numpy(generator.choice(len(drift.queries_new), arguments.batch, replace=False))
        queries = drift.queries_new[picked].float().to(arguments.device)
        keys = DrawKeys(arguments.seed, step, picked.numpy())
        excluded = ExcludedRows([list(drift.relevant[one]) for one in picked.tolist()])
        started = now(arguments.device)
        if step and course.at(step, arguments.steps):
            scan.invalidate()
        if step:
            scan.advance()
        scan.draw(queries, arguments.num_negatives, scale=drift.scale, excluded=excluded, keys=keys)
        seconds.append(now(arguments.device) - started)
        if (step + 1) % FIDELITY_EVERY == 0:
            exact.renew()
            distance, found = fidelity(scan, exact, queries, excluded=excluded, keys=keys, scale=drift.scale)
            variation.append(distance)
            recall.append(found)
    # The first step also makes what later ones reuse; a run of thousands of steps does not notice it.
    spent = float(np.mean(seconds[1:]))
    print(
        f"{name:<20} {1e3 * spent:10.1f} {spent / (spent + encoding):15.1%} {1e3 * max(seconds[1:]):15.0f} "
        f"{np.mean(variation):13.3f} {np.mean(recall):19.3f}", flush=True,
    )  # fmt: skip


def made(targets: CorrectedTargets, plan: ScanPlan) -> TargetScan:
    """Make the scan of a plan."""
    if plan.strategy == "pooled":
        return PooledScan(targets, plan)
    if plan.strategy == "shortlist":
        return ShortlistScan(targets, plan, index=stale_index(targets.stale))
    return BlockScan(targets, plan)


def fidelity(
    scan: TargetScan, exact: BlockScan, queries: torch.Tensor, *, excluded: ExcludedRows, keys: DrawKeys, scale: float
) -> tuple[float, float]:
    """Return total variation to the full softmax, and recall of its hardest negatives, means over queries."""
    full = probabilities(exact, queries, excluded, keys, scale)
    mine = probabilities(scan, queries, excluded, keys, scale)
    variation = 0.5 * (full - mine).abs().sum(dim=1)
    best = full.topk(HARD, dim=1).indices.cpu()
    found = scan.top(queries, HARD, excluded=excluded, keys=keys).ids.cpu()
    overlap = [len(set(a) & set(b)) / HARD for a, b in zip(best.tolist(), found.tolist(), strict=True)]
    return float(variation.mean()), float(np.mean(overlap))


def probabilities(
    scan: TargetScan, queries: torch.Tensor, excluded: ExcludedRows, keys: DrawKeys, scale: float
) -> torch.Tensor:
    """Return what a scan draws from, ``(batch, targets)``; reads the scans' own parts, which nothing else needs."""
    if isinstance(scan, BlockScan):
        scored = scan._scored(queries)
        blocks = [scored.score_block(at, min(at + 4096, len(scan))).float() for at in range(0, len(scan), 4096)]
        scores = torch.cat(blocks, dim=1)
        excluded.strike(scores, 0)
        return torch.softmax(scale * scores, dim=1)
    logits = torch.full((len(queries), len(scan)), -torch.inf)
    if isinstance(scan, ShortlistScan):
        listed = scan._listed(queries, excluded=excluded, keys=keys)
        weighted = scale * listed.scores.double().cpu() + listed.log_weight.cpu()
        line = torch.arange(len(queries))[:, None].expand(listed.ids.shape)
        there = listed.ids.cpu() >= 0
        logits[line[there], listed.ids.cpu()[there]] = weighted[there].float()
    else:
        pool = torch.from_numpy(draw_pool(len(scan), scan._plan.pool, seed=keys.seed, step=keys.step))
        scores = scan.score(queries, pool.expand(len(queries), -1)).cpu()
        logits[:, pool] = scale * scores
        excluded.strike(logits, 0)
    return torch.softmax(logits, dim=1)


def encoder_seconds(arguments: argparse.Namespace) -> float:
    """Time real steps of MiniLM on texts of nl2bash, without any scan."""
    data = load_retrieval_data(data_folder(arguments.data, "nl2bash"))
    model = DualEncoderModel.from_encoder(str(demo_encoder()), query_max_length=32, target_max_length=32)
    model.to(arguments.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    texts = column(data.corpus, "text")
    wanted = arguments.batch * (1 + arguments.num_negatives)
    rows = np.random.default_rng(arguments.seed).permutation(len(texts))[:wanted]
    queries = padded(model, column(data.train, "query")[: arguments.batch], "query", arguments.device)
    targets = padded(model, [texts[row] for row in rows], "target", arguments.device)
    found = []
    for _ in range(6):
        started = now(arguments.device)
        with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=half_is_fast()):
            asked, answers = model.embed(queries, "query"), model.embed(targets, "target")
        labels = torch.arange(arguments.batch, device=asked.device)
        F.cross_entropy(20.0 * asked @ answers.T, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(now(arguments.device) - started)
    return float(np.median(found[1:]))


def padded(model: DualEncoderModel, texts: list[str], role: str, device: str) -> dict[str, torch.Tensor]:
    tokens = pad_tokens(model.tokenize(texts, role), model.pad_token_id(role))
    return {name: tensor.to(device) for name, tensor in tokens.items()}


def now(device: str) -> float:
    """Return seconds, everything queued on the device done."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
