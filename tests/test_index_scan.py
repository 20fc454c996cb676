"""The fast scan against the float64 reference, and its error bound against what really happens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import RunningTopK, TensorVectors
from hf_corrector.index.exact import ExactIndex, RowMask
from hf_corrector.index.products import Probe, Products, RowBounds, ScoreBlock, bfloat16_is_fast
from hf_corrector.index.scan import Chunk, ScanIndex, ScannedRows, highest_scores, inner_products, scan

CPU = torch.device("cpu")


def vectors(rows: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def close_vectors(rows: int, dim: int, seed: int) -> torch.Tensor:
    """Unit vectors around few centres: scores far closer to each other than bfloat16 can tell apart."""
    centres = vectors(7, dim, 99)[torch.arange(rows) % 7]
    return torch.nn.functional.normalize(centres + 1e-3 * vectors(rows, dim, seed), dim=1)


def assert_same(found: object, expected: object) -> None:
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("make", [vectors, close_vectors])
@pytest.mark.parametrize(("queries", "k"), [(1, 1), (3, 10), (40, 10), (300, 3), (5, 400)])
def test_equals_the_reference(precision: str, make: object, queries: int, k: int) -> None:
    targets = TensorVectors(make(9000, 24, 1))
    asked = make(queries, 24, 2)
    assert_same(ScanIndex(targets, precision=precision).search(asked, k), ExactIndex(targets).search(asked, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{}, {"keep": True}, {"changing": True}, {"precision": "bfloat16"}, {"keep": True, "precision": "float32"}],
)
@pytest.mark.parametrize("queries", [2, 50])
def test_every_stored_dtype_and_way_of_reading_gives_the_same(
    dtype: torch.dtype, options: dict[str, object], queries: int
) -> None:
    targets = TensorVectors((7.0 * vectors(5000, 33, 1)).to(dtype))
    asked = vectors(queries, 33, 2)
    assert_same(ScanIndex(targets, **options).search(asked, 12), ExactIndex(targets).search(asked, 12))


@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_smaller_row(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = TensorVectors(torch.randint(-1, 2, (6000, 5), generator=generator).float())
    asked = torch.randint(-1, 2, (40, 5), generator=generator).float()
    for precision in ("float32", "bfloat16"):
        assert_same(ScanIndex(targets, precision=precision).search(asked, 30), ExactIndex(targets).search(asked, 30))


def test_equal_rows_cost_time_and_not_correctness() -> None:
    targets = TensorVectors(torch.ones(9000, 3))
    assert ScanIndex(targets).search(torch.ones(20, 3), 4).rows.tolist() == [[0, 1, 2, 3]] * 20


def test_rows_ascending_in_score_are_all_looked_at() -> None:
    targets = TensorVectors(torch.linspace(0, 1, 20_000)[:, None].expand(-1, 4).contiguous())
    asked = torch.ones(33, 4)
    assert_same(ScanIndex(targets).search(asked, 5), ExactIndex(targets).search(asked, 5))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_excluded_rows_are_never_returned(precision: str) -> None:
    targets, asked = TensorVectors(vectors(130, 8, 1)), vectors(40, 8, 0)
    generator = np.random.default_rng(0)
    excluded = [generator.choice(130, size=3 * query, replace=False) for query in range(40)]
    found = ScanIndex(targets, precision=precision).search(asked, 20, excluded=excluded)
    assert_same(found, ExactIndex(targets).search(asked, 20, excluded=excluded))


def test_more_asked_for_than_there_are_is_padded() -> None:
    targets = TensorVectors(vectors(3, 4, 0))
    for asked in (vectors(2, 4, 1), vectors(70, 4, 1), torch.empty(0, 4)):
        assert_same(ScanIndex(targets).search(asked, 6), ExactIndex(targets).search(asked, 6))
    assert ScanIndex(TensorVectors(torch.empty(0, 4))).search(vectors(2, 4, 0), 3).rows.tolist() == [[-1] * 3] * 2


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("dim", [1, 37, 384])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_no_score_is_further_off_than_the_bound(half: bool, queries: int, dim: int, size: float) -> None:
    """Every term of the formula, at several magnitudes, against float64."""
    rows, asked = size * vectors(500, dim, 1), vectors(queries, dim, 2).double()
    offsets = size * vectors(queries, 1, 3)[:, 0].double()
    scale = vectors(500, 1, 4)[:, 0].abs() + 0.1
    slack, reach = size * vectors(500, 1, 5)[:, 0].abs(), asked.norm(dim=1)
    bounds = RowBounds.of(rows) if half else RowBounds(RowBounds.of(rows).norm)
    for probe in (Probe(asked), Probe(asked, offsets), Probe(asked, offsets, scale), Probe(asked, row_scale=scale)):
        exact = asked @ rows.double().T + (0 if probe.offsets is None else offsets[:, None])
        exact = exact if probe.row_scale is None else exact * scale.double()
        products = Products(probe, half=half, bounds=bounds, device=CPU)
        got = products.of(rows.to(products.dtype), 0).scores.double()
        assert bool(((got - exact).abs() <= products.margin[:, None] + products.relative * got.abs()).all())
        assert bool((products.thresholds(exact[:, 0].float())[:, None] <= got[:, :1]).all())
    bounded = Probe(asked, offsets, scale, slack, reach)
    products = Products(bounded, half=half, bounds=bounds, device=CPU)
    got = products.of(rows.to(products.dtype), 0).scores
    upper = (asked @ rows.double().T + offsets[:, None]) * scale.double() + reach[:, None] * slack.double()
    assert bool((products.upper(got.T[:7]) >= upper.T[:7]).all())


def test_the_bound_is_not_so_wide_that_it_rules_nothing_out() -> None:
    rows = torch.nn.functional.normalize(vectors(500, 384, 1), dim=1)
    asked = torch.nn.functional.normalize(vectors(40, 384, 2), dim=1).double()
    half = Products(Probe(asked), half=True, bounds=RowBounds.of(rows), device=CPU)
    single = Products(Probe(asked), half=False, bounds=RowBounds(RowBounds.of(rows).norm), device=CPU)
    assert half.margin.max() < 4e-3 and single.margin.max() < 3e-5


def test_reduced_float32_products_widen_the_bound() -> None:
    probe, bounds = Probe(vectors(3, 8, 0).double()), RowBounds(2.0)
    before = Products(probe, half=False, bounds=bounds, device=CPU).margin
    torch.set_float32_matmul_precision("medium")
    try:
        assert bool((Products(probe, half=False, bounds=bounds, device=CPU).margin > 10 * before).all())
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(Products(probe, half=False, bounds=bounds, device=CPU).margin, before)


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 640, 1000])
@pytest.mark.parametrize("rows_first", [False, True])
def test_hits_are_all_scores_at_the_threshold_in_order(rows: int, rows_first: bool) -> None:
    scores = vectors(9, rows, 0).bfloat16()
    laid_out = scores.T.contiguous().T if rows_first else scores
    laid_out[2] = float("-inf")
    thresholds = torch.full((9,), 0.5).bfloat16()
    thresholds[2:4] = float("-inf")
    lines, columns, values = ScoreBlock(laid_out, rows_first).hits(thresholds)
    expected = ((laid_out >= thresholds[:, None]) & (laid_out > float("-inf"))).nonzero()
    assert torch.equal(torch.stack([lines, columns], dim=1), expected)
    assert torch.equal(values, laid_out[lines, columns].float())


def test_shortlist_is_what_the_computed_scores_say() -> None:
    """Offsets, scale and slack included, without exact scores; ties of bfloat16 go to the smaller row."""
    rows, asked = vectors(9000, 16, 1), vectors(40, 16, 2).double()
    probe = Probe(asked, vectors(40, 1, 3)[:, 0].double(), vectors(9000, 1, 4)[:, 0].abs() + 0.5)
    for precision in ("float32", "bfloat16"):
        scanned = ScannedRows(TensorVectors(rows), precision=precision)
        found = scan(scanned, probe, 50)
        products = Products(probe, half=precision == "bfloat16", bounds=scanned.bounds, device=CPU)
        whole = RunningTopK(40, 50)
        for start in range(0, 9000, 3000):
            chunk = rows[start : start + 3000].to(products.dtype)
            whole.update(products.of(chunk, start).scores.float(), first_query=0, first_row=start)
        if precision == "bfloat16":  # float32 sums depend on the shape of the matrices in the last bit
            assert_same(found, whole.result())
        torch.testing.assert_close(found.scores, whole.result().scores, rtol=1e-5, atol=1e-5)


def test_slack_finds_what_the_formula_alone_misses() -> None:
    """Rows stand for something up to their slack away; the scan must return the best by what they stand for."""
    stored, meant = vectors(8000, 12, 1), vectors(8000, 12, 1) + 0.3 * vectors(8000, 12, 5)
    asked = vectors(35, 12, 2).double()
    slack = (meant - stored).norm(dim=1)

    def rescore(lines: torch.Tensor, rows: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        return inner_products(asked, lines, meant[rows])

    probe = Probe(asked, row_slack=slack, reach=asked.norm(dim=1))
    expected = ExactIndex(TensorVectors(meant)).search(asked, 10)
    for precision in ("float32", "bfloat16"):
        rows = ScannedRows(TensorVectors(stored), precision=precision)
        assert_same(scan(rows, probe, 10, rescore=rescore), expected)
        hidden = [found[:3] for found in expected.rows.numpy()]
        mask = RowMask(hidden, queries=35, targets=8000)
        fewer = ExactIndex(TensorVectors(meant)).search(asked, 10, excluded=hidden)
        assert_same(scan(rows, probe, 10, mask=mask, rescore=rescore), fewer)
        shortlist = scan(rows, probe, 11)
        upper = highest_scores(rows, probe, shortlist.scores[:, 10])
        left = (asked @ meant.double().T).scatter(1, shortlist.rows, float("-inf")).max(dim=1).values
        assert bool((upper >= left).all())


def test_changed_vectors_are_seen_after_forgetting_or_always() -> None:
    tensor, asked = vectors(300, 8, 0), vectors(4, 8, 1)
    kept = ScanIndex(TensorVectors(tensor), keep=True)
    always = ScanIndex(TensorVectors(tensor), changing=True)
    for index in (kept, always):
        index.search(asked, 3)
    tensor.mul_(50.0).add_(1.0)
    kept.forget()
    for index in (kept, always):
        assert_same(index.search(asked, 3), ExactIndex(TensorVectors(tensor)).search(asked, 3))


def test_autocast_changes_nothing_and_no_gradient_is_left() -> None:
    targets, asked = TensorVectors(vectors(400, 64, 1).requires_grad_()), vectors(5, 64, 0).requires_grad_()
    plain = ScanIndex(targets, precision="float32").search(asked, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ScanIndex(targets, precision="float32").search(asked, 10)
    assert_same(mixed, plain)
    assert not plain.scores.requires_grad


def test_single_rows_reach_the_running_best() -> None:
    best = RunningTopK(4, 2)
    best.update_some(torch.tensor([0, 0, 0, 3]), torch.tensor([1, 5, 9, 2]), torch.tensor([1.0, 3.0, 3.0, 0.5]))
    best.update_some(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert best.result().rows.tolist() == [[5, 9], [-1, -1], [-1, -1], [2, -1]]
    assert best.floor().tolist() == [3.0, float("-inf"), float("-inf"), float("-inf")]


def test_speed_is_measured_once() -> None:
    assert bfloat16_is_fast() is bfloat16_is_fast()


@pytest.mark.parametrize("keep", [False, True])
def test_vectors_that_are_not_finite_are_named(keep: bool) -> None:
    targets = vectors(5000, 4, 0)
    targets[4711, 2] = float("nan")
    with pytest.raises(DataError, match="target 4711: expected finite"):
        ScanIndex(TensorVectors(targets), keep=keep).search(vectors(2, 4, 1), 3)
    with pytest.raises(DataError, match="target 4711: expected finite"):
        ScanIndex(TensorVectors(targets), changing=True).search(vectors(2, 4, 1), 3)
    with pytest.raises(DataError, match="query 0: expected finite"):
        ScanIndex(TensorVectors(vectors(3, 1, 0))).search(torch.tensor([[float("inf")]]), 3)


def test_arguments_that_do_not_fit_are_refused() -> None:
    index = ScanIndex(TensorVectors(vectors(10, 4, 0)))
    with pytest.raises(DataError, match="query vectors"):
        index.search(vectors(2, 5, 0), 3)
    with pytest.raises(ConfigurationError, match="k >= 1"):
        index.search(vectors(2, 4, 0), 0)
    with pytest.raises(DataError, match="rows from 0 to 9"):
        index.search(vectors(1, 4, 0), 3, excluded=[np.array([10])])
    with pytest.raises(ConfigurationError, match="precision"):
        ScanIndex(TensorVectors(vectors(10, 4, 0)), precision="float16")
    with pytest.raises(ConfigurationError, match="changing"):
        ScanIndex(TensorVectors(vectors(10, 4, 0)), keep=True, changing=True)
