import dataclasses
import re

import pytest
import torch
from drift_helpers import DIM, bent_drift, lexical_drift, linear_drift, token_counts, unit_rows

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import CompositePlan, Pairs, blocks, composite, fit_affine, fit_composite
from hf_corrector.fitting.blocks import Block, Landmarks, radial, token_blocks, transposed
from hf_corrector.fitting.composite import MAX_DUAL_ROWS, check_memory, conjugate_gradients, solve_dual
from hf_corrector.fitting.strengths import choose_strengths, noise_of

COUNT = 80
STRENGTHS = {"constant": 1.0, "linear": 2.0, "tokens": 1.5, "bigrams": 0.5}


def lexical_pairs(count: int = COUNT, **settings: torch.Tensor) -> Pairs:
    counts = token_counts(count)
    stale = unit_rows(count)
    return Pairs.collect(stale, lexical_drift(stale, counts), side=counts.read(0, count), **settings)


def blocks_of(pairs: Pairs) -> list[Block]:
    constant = Block("constant", torch.ones(len(pairs), 1, dtype=torch.float64), 1.0)
    tokens, _ = token_blocks(pairs.side, None)
    return [constant, Block.of("linear", pairs.stale - pairs.stale.mean(dim=0)), *tokens]


def dense(block: Block) -> torch.Tensor:
    return block.matrix.to_dense() if block.matrix.layout == torch.sparse_csr else block.matrix


# ---------------------------------------------------------------------- blocks


def test_gram_and_products_of_a_sparse_block_are_those_of_the_dense_one() -> None:
    for block in blocks_of(lexical_pairs()):
        full = dense(block)
        torch.testing.assert_close(block.gram(), full @ full.T / block.unit)
        assert abs(float(block.gram().diagonal().mean()) - 1) < 1e-9
        values = torch.randn(COUNT, 3, dtype=torch.float64)
        torch.testing.assert_close(block.backward(values), full.T @ values)
        torch.testing.assert_close(block.forward(block.backward(values)), full @ (full.T @ values))


def test_transposed_sparse_matrix_is_the_transpose() -> None:
    matrix = token_counts(20).read(0, 20)
    assert torch.equal(transposed(matrix).to_dense(), matrix.to_dense().T)


def test_landmarks_give_the_kernel_back_and_duplicates_are_dropped() -> None:
    vectors = unit_rows(60).double()
    vectors[30:] = vectors[:30]
    landmarks = Landmarks.choose(vectors, 60, 0.8, seed=0)
    assert len(landmarks.points) == 30
    features = landmarks.features(vectors)
    torch.testing.assert_close(features @ features.T, radial(vectors, vectors, 0.8), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- the solution


def primal_optimum(pairs: Pairs, residual: torch.Tensor) -> torch.Tensor:
    """Solve the ridge problem itself: weighted squares plus |coefficients|² over each block's variance."""
    blocks = blocks_of(pairs)
    scaled = torch.cat([dense(one) * (STRENGTHS[one.name] / one.unit) ** 0.5 for one in blocks], dim=1)
    weight = 1 / noise_of(pairs)[:, None]
    left = scaled.T @ (scaled * weight) + torch.eye(scaled.shape[1], dtype=torch.float64)
    return scaled @ torch.linalg.solve(left, scaled.T @ (residual * weight))


@pytest.mark.parametrize("weighted", [False, True])
def test_dual_and_conjugate_gradients_are_the_ridge_optimum(weighted: bool) -> None:
    weights = torch.rand(COUNT, generator=torch.Generator().manual_seed(1)) + 0.2 if weighted else None
    pairs = lexical_pairs(weights=weights)
    residual, blocks = pairs.fresh - pairs.stale, blocks_of(pairs)
    expected = primal_optimum(pairs, residual)
    for dual in (
        solve_dual(blocks, residual, pairs, STRENGTHS),
        conjugate_gradients(blocks, residual, noise_of(pairs), STRENGTHS),
    ):
        found = sum(one.forward(one.backward(dual)) * (STRENGTHS[one.name] / one.unit) for one in blocks)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_more_targets_than_the_dual_takes_are_fitted_too() -> None:
    many = lexical_pairs(MAX_DUAL_ROWS + 100)
    fit = fit_composite(many, CompositePlan(prior="identity", strengths=STRENGTHS))
    few = fit_composite(many.take(torch.arange(500)), CompositePlan(prior="identity", strengths=STRENGTHS))
    torch.testing.assert_close(fit.weight, few.weight, atol=0.1, rtol=0)
    assert fit.loo_error < 0.1


@pytest.mark.parametrize("dense_side", [False, True])
def test_fit_in_pieces_is_the_fit_as_a_whole(monkeypatch: pytest.MonkeyPatch, dense_side: bool) -> None:
    """More pairs than the dual takes, whichever of the kernel widths is chosen."""
    stale = unit_rows(600)
    side = torch.randn(600, 5, generator=torch.Generator().manual_seed(4)) if dense_side else None
    for widths in ((1.0, 0.5), (0.5, 1.0)):
        monkeypatch.setattr(composite, "RELATIVE_WIDTHS", widths)
        pairs, plan = Pairs.collect(stale, bent_drift(stale), side=side), CompositePlan(landmarks=60)
        whole = fit_composite(pairs, plan)
        with monkeypatch.context() as patched:
            patched.setattr(composite, "MAX_DUAL_ROWS", 100)
            patched.setattr(composite, "CG_COLUMNS", 3)
            patched.setattr(blocks, "PIECE_ROWS", 250)
            found = fit_composite(pairs, plan)
        assert found.relative_width == whole.relative_width
        assert found.strengths == pytest.approx(whole.strengths)
        torch.testing.assert_close(found.weight, whole.weight, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.radial.weight, whole.radial.weight, atol=1e-4, rtol=1e-3)


def test_fit_that_needs_too_much_memory_is_refused_before_work_with_what_would_do() -> None:
    def pairs(count: int) -> Pairs:
        rows = torch.zeros(1, 384, dtype=torch.float64).expand(count, -1)  # takes no memory by itself
        return Pairs(rows, rows, torch.ones(1, dtype=torch.float64).expand(count))

    plan = CompositePlan(landmarks=2048)
    check_memory(pairs(100_000), plan)
    with pytest.raises(ConfigurationError, match=r"at most 4\.0 GiB.*for 1,000,000 pairs.*Fit on") as caught:
        fit_composite(pairs(1_000_000), plan)
    allowed = int(re.search(r"([\d,]+) pairs at most", str(caught.value))[1].replace(",", ""))
    check_memory(pairs(allowed), plan)
    with pytest.raises(ConfigurationError):
        check_memory(pairs(allowed + 1), plan)
    check_memory(pairs(MAX_DUAL_ROWS), CompositePlan(landmarks=2048, memory_bytes=1))


def test_leave_one_out_error_is_that_of_really_leaving_each_target_out() -> None:
    pairs = lexical_pairs(30)
    residual, blocks = pairs.fresh - pairs.stale, blocks_of(pairs)
    error, _ = choose_strengths(blocks, residual, pairs, start=STRENGTHS, fixed=True)
    left_out = []
    for one in range(len(pairs)):
        kept = torch.tensor([row for row in range(len(pairs)) if row != one])
        parts = [block.take(kept) for block in blocks]
        dual = solve_dual(parts, residual[kept], dataclasses.replace(pairs.take(kept), side=None), STRENGTHS)
        predicted = sum(
            dense(block)[one] @ part.backward(dual) * (STRENGTHS[block.name] / block.unit)
            for block, part in zip(blocks, parts, strict=True)
        )
        left_out.append(float((predicted - residual[one]).square().sum()))
    assert abs(error - sum(left_out) / len(left_out)) < 1e-9


def test_chosen_strengths_are_no_worse_than_where_the_search_began() -> None:
    pairs = lexical_pairs()
    residual, blocks = pairs.fresh - pairs.stale, blocks_of(pairs)
    before, _ = choose_strengths(blocks, residual, pairs, start=None, fixed=True)
    after, strengths = choose_strengths(blocks, residual, pairs, start=None, fixed=False)
    assert after <= before
    assert choose_strengths(blocks, residual, pairs, start=strengths, fixed=True)[0] == after


def test_useless_side_features_are_given_little_strength() -> None:
    counts, stale = token_counts(300), unit_rows(300)
    fit = fit_composite(Pairs.collect(stale, linear_drift(stale), side=counts.read(0, 300)))
    plain = fit_affine(Pairs.collect(stale, linear_drift(stale)))
    assert fit.strengths["tokens"] < 0.2 * fit.strengths["linear"]
    assert fit.loo_error < 1.1 * plain.loo_error


def test_without_landmarks_or_side_the_fit_is_close_to_the_affine_one() -> None:
    stale = unit_rows(300)
    pairs = Pairs.collect(stale, linear_drift(stale))
    assert fit_composite(pairs).loo_error < 1.1 * fit_affine(pairs).loo_error


def test_landmarks_follow_a_bent_drift() -> None:
    stale = unit_rows(600)
    pairs = Pairs.collect(stale, bent_drift(stale))
    assert fit_composite(pairs, CompositePlan(landmarks=300)).loo_error < 0.9 * fit_affine(pairs).loo_error


# ---------------------------------------------------------------------- the clock


def test_clock_tells_earlier_pairs_from_those_of_now() -> None:
    stale = unit_rows(300)
    clock = torch.linspace(0.1, 1, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    fresh = stale + clock[:, None] * (linear_drift(stale) - stale)
    with_clock = fit_composite(Pairs.collect(stale, fresh, clock=clock), CompositePlan(prior="identity"))
    without = fit_composite(Pairs.collect(stale, fresh), CompositePlan(prior="identity"))

    def error(fit: composite.CompositeFit) -> float:
        moved = stale + (stale - fit.mean) @ fit.weight.T + fit.bias
        return float((moved - linear_drift(stale)).square().sum(dim=1).mean())

    assert error(with_clock) < 0.4 * error(without)


def test_pairs_that_are_all_of_now_are_fitted_as_without_a_clock() -> None:
    pairs = lexical_pairs()
    plan = CompositePlan(prior="identity", strengths=STRENGTHS)
    timed = fit_composite(dataclasses.replace(pairs, clock=torch.ones(COUNT, dtype=torch.float64)), plan)
    assert torch.equal(timed.weight, fit_composite(pairs, plan).weight)


def test_too_many_targets_with_a_clock_are_refused() -> None:
    stale = unit_rows(MAX_DUAL_ROWS + 1)
    with pytest.raises(ConfigurationError, match="clock"):
        fit_composite(Pairs.collect(stale, stale, clock=torch.ones(len(stale))))


@pytest.mark.parametrize("prior", ["identity", "elsewhere"])
def test_prior_that_does_not_fit_the_sizes_is_refused(prior: str) -> None:
    with pytest.raises(ConfigurationError, match="prior"):
        fit_composite(Pairs.collect(unit_rows(20), unit_rows(20, DIM + 1)), CompositePlan(prior=prior))
