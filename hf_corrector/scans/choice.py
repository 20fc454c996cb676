"""Which scan a run can afford, from sizes alone: the same on every process and at every start."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from hf_corrector.models.configuration_corrector import CorrectorConfig
from hf_corrector.scans.base import ScanPlan

AMORTISED_STEPS = (5, 10, 20, 50, 100)
# A scan this short is not worth a less faithful one, however short the steps of a tiny encoder are.
UNNOTICED_SECONDS = 2e-3


@dataclass(frozen=True)
class Machine:
    """What a process can do in a second, in round numbers.

    Only their proportions matter, and they are no measurement: a choice by timing would differ from start to start.

    Attributes:
        products: Multiply-adds of float32 matrix products, times two.
        half_products: The same in bfloat16.
        encoder_share: Which part of that an encoder reaches.
        read: Bytes read from memory.
        exponentials: Exponentials, sums and what else drawing takes for each score.
    """

    products: float
    half_products: float
    encoder_share: float
    read: float
    exponentials: float


_CPU_THREAD = Machine(4e10, 1.5e11, 0.4, 6e9, 2e8)
_CPU_THREAD_NO_HALF = replace(_CPU_THREAD, half_products=2e10)
_GPU = Machine(1e14, 4e14, 0.4, 2e12, 1e11)


@dataclass(frozen=True)
class ScanTask:
    """What has to be looked at, and how long a step takes besides.

    Attributes:
        targets: Number of all targets.
        dim: Size of a vector.
        batch: Queries per step, those of all processes.
        processes: How many share the targets.
        correction_ops: Operations to correct one target; 0 without a corrector.
        steps_between_fits: Steps for which the corrector stays as it is.
        step_ops: Operations of one process's models in a step, forward and backward.
        half_encoder: Whether they compute in half precision.
        device: ``"cpu"`` or ``"cuda"``.
        threads: Of a CPU.
    """

    targets: int
    dim: int
    batch: int
    processes: int
    correction_ops: float
    steps_between_fits: int
    step_ops: float
    half_encoder: bool
    device: str
    threads: int = 1

    @property
    def machine(self) -> Machine:
        """The machine assumed."""
        if self.device != "cpu":
            return _GPU
        one = _CPU_THREAD if fast_in_bfloat16(self.device) else _CPU_THREAD_NO_HALF
        return Machine(
            one.products * self.threads, one.half_products * self.threads, one.encoder_share, one.read * self.threads,
            one.exponentials * self.threads,
        )  # fmt: skip

    def step_seconds(self) -> float:
        """Seconds of a step without any scan."""
        rate = self.machine.half_products if self.half_encoder else self.machine.products
        return self.step_ops / (rate * self.machine.encoder_share)

    def scan_seconds(self, plan: ScanPlan) -> float:
        """Seconds per step of a scan."""
        own, machine = self.targets / self.processes, self.machine
        half = plan.dtype == "bfloat16"
        # Rows that do not fit in memory are corrected again in every step.
        scored, corrected = own, own / self.steps_between_fits if self.fits(plan) else own
        if plan.strategy == "amortised":
            corrected = own / max(plan.refresh_steps, 1)
        elif plan.strategy == "pooled":
            scored = corrected = min(plan.pool, self.targets)
        elif plan.strategy == "shortlist":
            lists = 4 * math.sqrt(self.targets)
            visited = max(16.0, lists / 32) / lists * self.targets
            listed = self.batch * plan.shortlist + min(plan.pool, self.targets)
            searching = self.batch * visited * self.dim * 4 / machine.read
            return searching + listed * (self.correction_ops / machine.products + 4 * self.dim * 4 / machine.read)
        products = 2 * self.batch * scored * self.dim / (machine.half_products if half else machine.products)
        reading = scored * self.dim * (2 if half else 4) / machine.read
        drawing = self.batch * scored / machine.exponentials
        correcting = corrected * (self.correction_ops / machine.products + 3 * self.dim * 4 / machine.read)
        return max(products, reading) + drawing + (correcting if self.correction_ops else 0.0)

    def fits(self, plan: ScanPlan) -> bool:
        """Say whether a process's share of corrected targets may be kept in memory."""
        size = self.targets / self.processes * self.dim * (2 if plan.dtype == "bfloat16" else 4)
        return size <= plan.snapshot_bytes

    def share(self, plan: ScanPlan) -> float:
        """Return the part of a step's time a scan takes."""
        scan = self.scan_seconds(plan)
        return scan / (scan + self.step_seconds())


def choose_scan(task: ScanTask, wanted: ScanPlan, *, budget: float) -> tuple[ScanPlan, str]:
    """Choose the most faithful scan that takes no more than a share of a step's time.

    Full before amortised, and amortised with the fewest steps; a shortlist where none of them fits the time or the
    memory.

    Args:
        task: What has to be looked at.
        wanted: Arithmetic, sizes and memory.
        budget: Largest share of a step's time.

    Returns:
        The plan and a sentence that says why.
    """
    candidates = [replace(wanted, strategy="full")]
    if task.correction_ops and task.fits(wanted):
        candidates += [replace(wanted, strategy="amortised", refresh_steps=steps) for steps in AMORTISED_STEPS]
    for plan in candidates:
        if task.share(plan) <= budget:
            return plan, _sentence(task, plan, f"within the budget of {100 * budget:g}%")
        if task.scan_seconds(plan) <= UNNOTICED_SECONDS:
            return plan, _sentence(task, plan, f"above the budget of {100 * budget:g}%, but too short to be noticed")
    plan = replace(wanted, strategy="shortlist")
    cheapest = min((*candidates, plan), key=task.share)
    reason = f"full would take {task.share(candidates[0]):.0%}"
    if task.share(plan) > budget:
        return cheapest, _sentence(
            task, cheapest, f"the cheapest, though above the budget of {100 * budget:g}%; {reason}"
        )
    return plan, _sentence(task, plan, f"within the budget of {100 * budget:g}%; {reason}")


def _sentence(task: ScanTask, plan: ScanPlan, reason: str) -> str:
    every = f", each target corrected anew every {plan.refresh_steps} steps" if plan.strategy == "amortised" else ""
    return (
        f"scan='auto' chose {plan.strategy!r} in {plan.dtype}{every}, for {task.targets:,} targets on {task.device}: "
        f"about {task.share(plan):.1%} of a step by its operations, {reason}."
    )


def correction_ops(config: CorrectorConfig) -> float:
    """Return the operations a corrector takes for one target, in round numbers."""
    dim_in, dim_out = config.input_dim, int(config.output_dim or config.input_dim)
    match config.kind:
        case "identity" | "mean_shift":
            ops = 4.0 * dim_in
        case "residual_mlp":
            ops = 2.0 * int(config.hidden_dim or 2 * dim_in) * (dim_in + dim_out)
        case "kernel":
            ops = 2.0 * dim_in * dim_out + 2.0 * int(config.num_landmarks or 1024) * (dim_in + dim_out)
        case _:
            ops = 2.0 * dim_in * dim_out
    return ops + (200.0 * dim_out if config.side is not None else 0.0)


def fast_in_bfloat16(device: str) -> bool:
    """Say whether a processor multiplies bfloat16 in hardware; float16 never is on a CPU."""
    if device == "cuda" and torch.cuda.is_available():
        # Emulated on what came before Ampere.
        return torch.cuda.get_device_capability() >= (8, 0)
    if device != "cpu":
        return True
    try:
        able = torch.cpu.get_capabilities()
    except AttributeError:  # torch 2.6, and some after it, cannot say; float32 is right everywhere
        return False
    return any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
