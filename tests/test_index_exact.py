"""Exact search against brute force, in whatever pieces it is done."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import RunningTopK, TensorVectors, merge_results, pack, unpack
from hf_corrector.index.exact import Blocks, ExactIndex


def vectors(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def coarse(rows: int, dim: int, seed: int) -> torch.Tensor:
    """Small whole numbers: a handful of distinct scores, so nearly all are ties, and no rounding."""
    return torch.randint(-1, 2, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


def brute_force(queries: torch.Tensor, targets: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort everything by (score descending, row ascending) with numpy."""
    scores = (queries.double() @ targets.double().T).float().numpy()
    rows = np.stack([np.lexsort((np.arange(len(targets)), -line)) for line in scores])[:, :k]
    return rows, np.take_along_axis(scores, rows, axis=1)


@pytest.mark.parametrize("k", [1, 5, 64, 300])
def test_equals_brute_force(k: int) -> None:
    queries, targets = vectors(17, 24, 0), vectors(300, 24, 1)
    result = ExactIndex(TensorVectors(targets)).search(queries, k)
    rows, scores = brute_force(queries, targets, k)
    np.testing.assert_array_equal(result.rows.numpy(), rows)
    np.testing.assert_array_equal(result.scores.numpy(), scores)
    plain = torch.gather(queries @ targets.T, 1, result.rows)
    torch.testing.assert_close(result.scores, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 3, 64, 199, 200, 1000])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_ties_go_to_the_smaller_row_whatever_the_chunks(chunk_rows: int, k: int) -> None:
    queries, targets = coarse(9, 6, 0), coarse(200, 6, 1)
    index = ExactIndex(TensorVectors(targets), chunk_rows=chunk_rows, budget_bytes=4000)
    rows, scores = brute_force(queries, targets, k)
    result = index.search(queries, k)
    np.testing.assert_array_equal(result.rows.numpy(), rows)
    np.testing.assert_array_equal(result.scores.numpy(), scores)


def test_all_scores_equal_returns_the_first_rows() -> None:
    result = ExactIndex(TensorVectors(torch.ones(5000, 3)), chunk_rows=700).search(torch.ones(2, 3), 10)
    assert result.rows.tolist() == [list(range(10))] * 2


def test_equal_vectors_tie_however_chunks_round() -> None:
    """Copies of a vector far apart must score equal to the bit, though float32 products depend on matrix shapes."""
    targets = vectors(50, 384, 0).repeat(20, 1)
    queries = vectors(13, 384, 1)
    results = [
        ExactIndex(TensorVectors(targets), chunk_rows=rows, budget_bytes=budget).search(queries, 40)
        for rows, budget in ((1, 10**6), (7, 2000), (333, 10**6), (1000, 10**7))
    ]
    for result in results:
        assert torch.equal(result.rows, results[0].rows)
        assert torch.equal(result.scores, results[0].scores)
        assert torch.equal(result.rows[:, :20] % 50, result.rows[:, :1].expand(-1, 20))
        assert bool((result.rows[:, :20].diff(dim=1) > 0).all())


def test_negative_zero_ties_with_zero() -> None:
    best = RunningTopK(1, 3)
    best.update(torch.tensor([[-0.0, 0.0, -0.0]]), first_query=0, first_row=0)
    assert best.result().rows.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_search_of_the_whole_equals_merged_searches_of_parts(seed: int) -> None:
    make = coarse if seed % 2 else vectors
    queries, targets = make(8, 5, seed), make(120, 5, seed + 100)
    cuts = [0, 3, 40, 41, 120]
    parts = [
        ExactIndex(TensorVectors(targets[start:stop])).search(queries, 20).shifted(start)
        for start, stop in pairwise(cuts)
    ]
    whole = ExactIndex(TensorVectors(targets)).search(queries, 20)
    merged = merge_results(parts[::-1], 20)
    assert torch.equal(merged.rows, whole.rows)
    assert torch.equal(merged.scores, whole.scores)


def test_more_asked_for_than_there_are_is_padded() -> None:
    result = ExactIndex(TensorVectors(vectors(3, 4, 0))).search(vectors(2, 4, 1), 6)
    assert result.rows[:, 3:].tolist() == [[-1] * 3] * 2
    assert bool((result.scores[:, 3:] == float("-inf")).all())
    assert sorted(result.rows[0, :3].tolist()) == [0, 1, 2]


def test_no_targets_and_no_queries_give_empty_answers() -> None:
    assert ExactIndex(TensorVectors(torch.empty(0, 4))).search(vectors(2, 4, 0), 3).rows.tolist() == [[-1] * 3] * 2
    assert ExactIndex(TensorVectors(vectors(5, 4, 0))).search(torch.empty(0, 4), 3).rows.shape == (0, 3)


@pytest.mark.parametrize("chunk_rows", [1, 13, 100])
def test_excluded_rows_are_never_returned(chunk_rows: int) -> None:
    queries, targets = vectors(11, 8, 0), vectors(60, 8, 1)
    generator = np.random.default_rng(0)
    excluded = [generator.choice(60, size=query * 6, replace=False) for query in range(11)]  # none to all
    index = ExactIndex(TensorVectors(targets), chunk_rows=chunk_rows, budget_bytes=3000)
    result = index.search(queries, 10, excluded=excluded)
    whole, _ = brute_force(queries, targets, 60)
    for query, hidden in enumerate(excluded):
        left = [row for row in whole[query] if row not in hidden][:10]
        assert result.rows[query].tolist() == left + [-1] * (10 - len(left))


def test_a_row_excluded_twice_is_excluded() -> None:
    result = ExactIndex(TensorVectors(torch.eye(3))).search(torch.ones(1, 3), 3, excluded=[np.array([1, 1])])
    assert result.rows.tolist() == [[0, 2, -1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_stored_dtypes_are_scored_as_their_exact_values(dtype: torch.dtype) -> None:
    queries, targets = vectors(5, 16, 0), vectors(40, 16, 1).to(dtype)
    rows, scores = brute_force(queries, targets, 10)
    result = ExactIndex(TensorVectors(targets)).search(queries, 10)
    np.testing.assert_array_equal(result.rows.numpy(), rows)
    np.testing.assert_array_equal(result.scores.numpy(), scores)


def test_scores_ignore_autocast_and_leave_no_gradient() -> None:
    queries, targets = vectors(5, 64, 0).requires_grad_(), vectors(40, 64, 1).requires_grad_()
    index = ExactIndex(TensorVectors(targets))
    plain = index.search(queries, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = index.search(queries, 10)
    assert torch.equal(plain.scores, mixed.scores)
    assert not plain.scores.requires_grad


def test_blocks_keep_within_the_budget() -> None:
    for budget in (10**5, 10**7, 10**9):
        for dim in (1, 384, 4096):
            blocks = Blocks.within(budget, dim=dim)
            assert blocks.rows == 1 or blocks.rows * dim * 20 <= budget // 2
            assert blocks.queries == 1 or blocks.queries * blocks.rows * 40 <= budget // 2


def test_running_best_takes_rows_in_any_order() -> None:
    scores = coarse(4, 90, 0)
    best = RunningTopK(4, 12)
    for start in (60, 0, 30):
        best.update(scores[:, start : start + 30], first_query=0, first_row=start)
    rows = np.stack([np.lexsort((np.arange(90), -line)) for line in scores.numpy()])[:, :12]
    np.testing.assert_array_equal(best.result().rows.numpy(), rows)


def test_packing_is_undone_by_unpacking_and_keeps_the_order() -> None:
    extreme = torch.tensor([3.4e38, 1.0, 1e-40, 0.0, -1e-40, -1.0, -3.4e38])
    for row in (0, 1, 2**32 - 2):
        keys = pack(extreme, torch.tensor(row))
        assert bool((keys.diff() < 0).all())
        rows, scores = unpack(keys)
        assert torch.equal(scores, extreme) and bool((rows == row).all())


def test_vectors_that_are_not_finite_are_named() -> None:
    targets = vectors(10, 4, 0)
    targets[7, 2] = float("nan")
    with pytest.raises(DataError, match="target 7: expected finite"):
        ExactIndex(TensorVectors(targets), chunk_rows=4).search(vectors(2, 4, 1), 3)
    with pytest.raises(DataError, match="query 1: expected finite"):
        ExactIndex(TensorVectors(vectors(3, 1, 0))).search(torch.tensor([[0.0], [float("inf")]]), 3)


def test_arguments_that_do_not_fit_are_refused() -> None:
    index = ExactIndex(TensorVectors(vectors(10, 4, 0)))
    with pytest.raises(DataError, match="query vectors"):
        index.search(vectors(2, 5, 0), 3)
    with pytest.raises(ConfigurationError, match="k >= 1"):
        index.search(vectors(2, 4, 0), 0)
    with pytest.raises(DataError, match="one array for each of 2"):
        index.search(vectors(2, 4, 0), 3, excluded=[np.array([1])])
    with pytest.raises(DataError, match="rows from 0 to 9"):
        index.search(vectors(1, 4, 0), 3, excluded=[np.array([10])])
    with pytest.raises(ConfigurationError):
        ExactIndex(TensorVectors(vectors(10, 4, 0)), chunk_rows=0)
    with pytest.raises(DataError, match="target vectors"):
        TensorVectors(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="merge"):
        merge_results([index.search(vectors(2, 4, 0), 3)], 4)


def test_progress_bar_does_not_change_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    queries, targets = vectors(3, 4, 0), TensorVectors(vectors(50, 4, 1))
    quiet = ExactIndex(targets).search(queries, 5)
    assert capsys.readouterr().err == ""
    loud = ExactIndex(targets, progress=True).search(queries, 5)
    assert "50" in capsys.readouterr().err
    assert torch.equal(quiet.rows, loud.rows)
