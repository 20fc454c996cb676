"""Follow a moving encoder outside of training: error over the stream, and how good the drift detector's alarms are.

    python examples/benchmarks/online_adaptation.py --drifts runs/drifts/nl2bash-300 runs/drifts/stackexchange-300

Three parts, all of affine correctors, one thread.

* **Synthetic drift**: targets move along a direction that turns slowly, and at half time jump to another one. Batches
  of uniformly drawn targets are encoded by the encoder of their time; the squared error of a batch is measured before
  the batch is learnt from. Printed are means over the gradual half, the ``--after`` batches after the jump, the rest.
* **Real drifts** that ``drifts.py`` kept: the targets a training run re-encoded, in the order it did, are the stream;
  of every target only its last re-encoding was kept, and late ones were encoded by an encoder that had moved further.
  Printed are the error over the last two thirds of the stream, and the error that the final corrector leaves on
  targets no fit has seen, against vectors of the encoder at the end.
* **The detector** over ``--streams`` synthetic streams of squared errors: alarms while the mean is at the bound all the
  time, and batches from a jump to the alarm.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import print_head
from drifts import load_drift
from torch.nn.functional import normalize

from hf_corrector.adaptation import StreamingCorrector, StreamingOptions
from hf_corrector.drift_detection import AdaptationPolicy, DriftDetector
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.training.corrector_fit import fit_corrector

DIM, TARGETS = 64, 4_000
Batch = tuple[torch.Tensor, torch.Tensor]
Learn = Callable[[torch.Tensor, torch.Tensor], None]


@dataclass
class Method:
    """One way to follow a stream.

    Attributes:
        name: What is printed.
        corrector: What it has learnt so far.
        learn: Takes in a batch.
        seconds: Processor time spent in that.
    """

    name: str
    corrector: CorrectorModel
    learn: Learn
    seconds: float = 0.0


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--drifts", type=Path, nargs="*", default=[], help="folders that drifts.py wrote")
    flags.add_argument("--batches", type=int, default=300)
    flags.add_argument("--batch_size", type=int, default=32)
    flags.add_argument("--after", type=int, default=30, help="batches after the jump that are reported apart")
    flags.add_argument("--every", type=int, default=10, help="batches between fits")
    flags.add_argument("--window", type=int, default=1_000, help="pairs of a fit from scratch to the recent ones")
    flags.add_argument("--half_lives", type=float, nargs="+", default=[300.0, 1_000.0, 3_000.0])
    flags.add_argument("--resamples", type=int, default=3, help="synthetic drifts")
    flags.add_argument("--streams", type=int, default=200, help="synthetic streams of the detector")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    torch.set_num_threads(1)
    shown = copy.copy(arguments)
    shown.drifts = [folder.name for folder in arguments.drifts]
    print_head("online adaptation: error over a stream, and alarms", shown)
    print_synthetic(arguments)
    for folder in arguments.drifts:
        print_real(folder, arguments)
    print_detector(arguments)


def methods(dim: int, arguments: argparse.Namespace) -> list[Method]:
    """Return the ways to follow a stream, each from the identity on."""

    def affine() -> CorrectorModel:
        return CorrectorModel(CorrectorConfig(kind="affine", input_dim=dim))

    def ignore(stale: torch.Tensor, fresh: torch.Tensor) -> None:
        return

    found = [Method("none", affine(), ignore)]
    for name, most in (("from scratch, all pairs", None), (f"from scratch, last {arguments.window}", arguments.window)):
        corrector = affine()
        found.append(Method(name, corrector, from_scratch(corrector, every=arguments.every, most=most)))
    for half_life in (None, *arguments.half_lives):
        corrector = affine()
        options = StreamingOptions(half_life=half_life, solve_batches=arguments.every)
        streaming = StreamingCorrector(corrector, options=options)
        name = "never forgets" if half_life is None else f"half-life {half_life:g}"
        found.append(Method(f"partial_fit, {name}", corrector, taking_in(streaming)))
    return found


def taking_in(streaming: StreamingCorrector) -> Learn:
    def learn(stale: torch.Tensor, fresh: torch.Tensor) -> None:
        streaming.partial_fit(stale, fresh)

    return learn


def from_scratch(corrector: CorrectorModel, *, every: int, most: int | None) -> Learn:
    """Keep pairs and fit to them every so many batches, as partial_fit does from the first on."""
    kept: list[Batch] = []

    def learn(stale: torch.Tensor, fresh: torch.Tensor) -> None:
        kept.append((stale, fresh))
        if len(kept) == 1 or len(kept) % every == 0:
            olds, news = (torch.cat(parts) for parts in zip(*kept, strict=True))
            start = 0 if most is None else max(len(olds) - most, 0)
            fit_corrector(corrector, olds[start:], news[start:])

    return learn


def follow(method: Method, stream: Iterator[Batch]) -> np.ndarray:
    """Return the mean squared error of every batch before it was learnt from, ``(batches,)``."""
    errors = []
    for stale, fresh in stream:
        errors.append(float((method.corrector.correct(stale) - fresh).square().sum(dim=1).mean()))
        start = time.process_time()
        method.learn(stale, fresh)
        method.seconds += time.process_time() - start
    return np.array(errors)


def synthetic_stream(arguments: argparse.Namespace, seed: int) -> Iterator[Batch]:
    """Draw batches while the encoder moves: gradually, and at half time with a jump."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    stale = normalize(gaussian(TARGETS, 24) @ gaussian(24, DIM) + 0.5 * gaussian(TARGETS, DIM), dim=1)
    own = 0.3 * normalize(gaussian(TARGETS, DIM), dim=1)
    ways = [normalize(stale @ gaussian(DIM, DIM), dim=1) for _ in range(4)]
    for batch in range(arguments.batches):
        jumped, angle = batch >= arguments.batches // 2, torch.tensor(torch.pi / 2 * batch / arguments.batches)
        first, second = ways[2:] if jumped else ways[:2]
        strength = 0.2 + 0.6 * batch / arguments.batches
        moved = stale + strength * (angle.cos() * first + angle.sin() * second + own)
        rows = torch.randint(TARGETS, (arguments.batch_size,), generator=generator)
        yield stale[rows], normalize(moved[rows], dim=1)


def print_synthetic(arguments: argparse.Namespace) -> None:
    half = arguments.batches // 2
    end = half + arguments.after
    parts = {"gradual": slice(0, half), "after jump": slice(half, end), "rest": slice(end, None)}
    table: dict[str, list[list[float]]] = {}
    for seed in range(arguments.seed, arguments.seed + arguments.resamples):
        for method in methods(DIM, arguments):
            errors = follow(method, synthetic_stream(arguments, seed))
            values = [float(errors[part].mean()) for part in parts.values()]
            table.setdefault(method.name, []).append([*values, float(errors.mean()), method.seconds])
    print(f"## synthetic drift, {arguments.resamples} of them, mean squared error before learning (± half the range)")
    print(f"{'method':<30}" + "".join(f"{name:>17}" for name in (*parts, "all")) + f"{'seconds':>9}")
    for name, rows in table.items():
        values = np.array(rows)
        middle, spread = values.mean(axis=0), (values.max(axis=0) - values.min(axis=0)) / 2
        cells = "".join(f"  {middle[one]:.4f} ± {spread[one]:.4f}" for one in range(4))
        print(f"{name:<30}{cells}{middle[4]:9.2f}")
    print(flush=True)


def print_real(folder: Path, arguments: argparse.Namespace) -> None:
    drift = load_drift(folder)
    order = torch.argsort(drift.free_steps, stable=True)
    rows, fresh = drift.free_rows[order], drift.free_fresh[order]
    unseen = torch.ones(len(drift.old), dtype=torch.bool)
    unseen[rows] = False
    steps = f"{int(drift.free_steps.min())} to {int(drift.free_steps.max())}"
    print(f"## {drift.name}: {len(rows)} pairs of steps {steps}, {int(unseen.sum())} targets unseen")
    print(f"{'method':<30}{'last two thirds':>17}{'unseen, at the end':>20}{'seconds':>9}")
    batches = list(zip(drift.old[rows].split(64), fresh.split(64), strict=True))
    for method in methods(drift.old.shape[1], arguments):
        errors = follow(method, iter(batches))
        left = (method.corrector.correct(drift.old[unseen]) - drift.new[unseen]).square().sum(dim=1).mean()
        print(f"{method.name:<30}{errors[len(errors) // 3 :].mean():17.4f}{float(left):20.4f}{method.seconds:9.2f}")
    print(flush=True)


def squared_errors(generator: np.random.Generator, mean: float, *, rare: bool = False) -> np.ndarray:
    """Draw 32 squared errors: gamma with a coefficient of variation of one half, or 4 rarely and else 0."""
    return 4.0 * (generator.random(32) < mean / 4) if rare else np.minimum(generator.gamma(4.0, mean / 4, 32), 4.0)


def print_detector(arguments: argparse.Namespace) -> None:
    policy, seeds = AdaptationPolicy(bound=0.2), range(arguments.seed, arguments.seed + arguments.streams)
    print(f"## detector, bound {policy.bound}, alpha {policy.alpha}, {arguments.streams} streams of batches of 32")
    for rare in (False, True):
        alarms = sum(first_alarm(policy, [policy.bound] * 500, seed, rare=rare) is not None for seed in seeds)
        kind = "rare large" if rare else "gamma"
        print(f"mean at the bound for 500 batches, {kind} errors: {alarms} streams with a false alarm")
    print("mean of .1, then after so many batches another: batches to the alarm, median [5 %, 95 %], missed, too early")
    for change in (0, 100, 400):
        for mean in (0.21, 0.22, 0.25, 0.3, 0.5):
            means = [0.1] * change + [mean] * 400
            found = [first_alarm(policy, means, seed) for seed in seeds]
            caught = np.array([one - change for one in found if one is not None and one > change])
            missed, early = sum(one is None for one in found), sum(one is not None and one <= change for one in found)
            low, middle, high = np.quantile(caught, [0.05, 0.5, 0.95]) if len(caught) else (np.nan,) * 3
            print(f"  after {change:>3} to {mean:.2f}: {middle:5.0f} [{low:.0f}, {high:.0f}], {missed}, {early}")
    detector, values = DriftDetector(policy), squared_errors(np.random.default_rng(0), 0.1)
    start = time.process_time()
    for _ in range(2_000):
        detector.observe(values)
    print(f"a call takes {(time.process_time() - start) / 2_000 * 1e6:.0f} µs of processor time")


def first_alarm(policy: AdaptationPolicy, means: list[float], seed: int, *, rare: bool = False) -> int | None:
    """Return the batch of the first alarm, from 1 on."""
    generator, detector = np.random.default_rng(seed), DriftDetector(policy)
    for number, mean in enumerate(means, 1):
        if detector.observe(squared_errors(generator, mean, rare=rare)).alarm:
            return number
    return None


if __name__ == "__main__":
    main()
