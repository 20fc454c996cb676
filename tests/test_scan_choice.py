"""Which scan is chosen: by sizes alone, the same at every start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_corrector.models import CorrectorConfig
from hf_corrector.models.configuration_corrector import KINDS, SIDES
from hf_corrector.scans import ScanPlan, ScanTask, choose_scan, correction_ops, fast_in_bfloat16
from hf_corrector.scans.base import SCAN_DTYPES
from hf_corrector.scans.choice import AMORTISED_STEPS, UNNOTICED_SECONDS

# BERT-base, 32 queries with 8 negatives of 128 tokens each, on one thread.
TASK = ScanTask(
    targets=100_000, dim=768, batch=32, processes=1, correction_ops=2.0 * 768**2, steps_between_fits=10,
    step_ops=6.0 * 86e6 * 320 * 128, half_encoder=False, device="cpu",
)  # fmt: skip
SIZES = [1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 1_000_000_000]
BUDGETS = [0.0, 1e-4, 0.001, 0.01, 0.03, 0.1, 0.3, 0.9, 1.0]
TASKS = [
    TASK, replace(TASK, device="cuda", half_encoder=True), replace(TASK, step_ops=1e11),
    replace(TASK, correction_ops=0.0), replace(TASK, processes=8, batch=256), replace(TASK, steps_between_fits=1),
]  # fmt: skip
WANTED = ScanPlan(snapshot_bytes=2**50)


def rank(plan: ScanPlan) -> int:
    """Number the plans from the most faithful to the least."""
    if plan.strategy == "amortised":
        return 1 + AMORTISED_STEPS.index(plan.refresh_steps)
    return 0 if plan.strategy == "full" else 1 + len(AMORTISED_STEPS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_more_targets_never_make_the_choice_more_faithful(task: ScanTask, dtype: str) -> None:
    wanted = replace(WANTED, dtype=dtype)
    for budget in BUDGETS[1:]:
        ranks = [rank(choose_scan(replace(task, targets=size), wanted, budget=budget)[0]) for size in SIZES]
        within = [
            one for one, size in zip(ranks, SIZES, strict=True)
            if replace(task, targets=size).share(choose_scan(replace(task, targets=size), wanted, budget=budget)[0])
            <= budget
        ]  # fmt: skip
        assert within == sorted(within)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", SIZES)
def test_a_larger_budget_never_makes_the_choice_less_faithful(task: ScanTask, size: int) -> None:
    sized = replace(task, targets=size)
    plans = [choose_scan(sized, WANTED, budget=budget)[0] for budget in BUDGETS]
    ranks = [rank(plan) for plan, budget in zip(plans, BUDGETS, strict=True) if sized.share(plan) <= budget]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 0


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_choice_keeps_to_the_budget_or_is_the_cheapest(task: ScanTask, size: int, budget: float) -> None:
    sized = replace(task, targets=size)
    plan, sentence = choose_scan(sized, WANTED, budget=budget)
    if sized.share(plan) > budget and sized.scan_seconds(plan) > UNNOTICED_SECONDS:
        others = [replace(WANTED, strategy="full"), replace(WANTED, strategy="shortlist")]
        assert all(sized.share(plan) <= sized.share(other) for other in others)
    assert ("within the budget" in sentence) is (sized.share(plan) <= budget)
    assert ("above the budget" in sentence) is (sized.share(plan) > budget)
    assert sentence.count("\n") == 0
    assert repr(plan.strategy) in sentence
    assert plan.dtype in sentence
    assert f"{sized.share(plan):.1%}" in sentence
    assert f"{size:,}" in sentence


def test_choice_is_the_same_on_every_call() -> None:
    for size in SIZES:
        found = {choose_scan(replace(TASK, targets=size), WANTED, budget=0.1) for _ in range(5)}
        assert len(found) == 1


def test_small_sets_are_scanned_in_full_and_huge_ones_by_a_shortlist() -> None:
    assert choose_scan(replace(TASK, targets=2000), WANTED, budget=0.1)[0].strategy == "full"
    assert choose_scan(replace(TASK, targets=10**9), WANTED, budget=0.1)[0].strategy == "shortlist"


def test_amortised_is_between_the_two_where_correction_is_what_costs() -> None:
    dear = replace(TASK, correction_ops=1e8, steps_between_fits=1)
    found = [choose_scan(replace(dear, targets=size), WANTED, budget=0.1)[0].strategy for size in SIZES]
    assert found[0] == "full"
    assert "amortised" in found


def test_snapshot_that_does_not_fit_is_not_amortised() -> None:
    dear = replace(TASK, correction_ops=1e8, steps_between_fits=1)
    for size in SIZES:
        plan, _ = choose_scan(replace(dear, targets=size), replace(WANTED, snapshot_bytes=0), budget=0.1)
        assert plan.strategy != "amortised"


def test_arithmetic_and_sizes_stay_those_wanted() -> None:
    for dtype in ("float32", "bfloat16"):
        wanted = ScanPlan(dtype=dtype, pool=77, shortlist=55)
        for size in SIZES:
            plan, _ = choose_scan(replace(TASK, targets=size), wanted, budget=0.1)
            assert (plan.dtype, plan.pool, plan.shortlist) == (dtype, 77, 55)


def test_float16_is_no_arithmetic_of_a_scan() -> None:
    assert fast_in_bfloat16("cuda")
    assert isinstance(fast_in_bfloat16("cpu"), bool)
    assert torch.float16 not in SCAN_DTYPES.values()


@pytest.mark.parametrize("side", [None, *SIDES])
@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_every_corrector_are_known_and_grow_with_its_size(kind: str, side: str | None) -> None:
    ops = []
    for dim in (16, 64, 256):
        config = CorrectorConfig(kind=kind, input_dim=dim)
        if side is not None and kind not in ("identity", "mean_shift"):
            config = CorrectorConfig(kind=kind, input_dim=dim, side=side, side_dim=30)
        ops.append(correction_ops(config))
    assert 0 < ops[0] < ops[1] < ops[2]


def test_products_are_counted_as_the_corrector_makes_them() -> None:
    assert correction_ops(CorrectorConfig(kind="affine", input_dim=10, output_dim=20)) == 2 * 10 * 20
    mlp = CorrectorConfig(kind="residual_mlp", input_dim=10, output_dim=20, hidden_dim=50)
    assert correction_ops(mlp) == 2 * 50 * 30
