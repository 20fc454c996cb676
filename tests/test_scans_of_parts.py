"""Ways to look at a part of the targets that stands for all, and the one that encodes what it looks at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scan_helpers import (
    BATCH,
    MANY,
    QUERIES,
    SCALE,
    clustered,
    draw_from,
    keys_of,
    make_scan,
    nothing,
    targets_of,
    turned,
)

from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.index.base import TensorVectors
from hf_corrector.sampling import (
    DrawKeys,
    draw_pool,
)
from hf_corrector.scans import BlockScan, PooledScan, RerankScan, ScanPlan, ShortlistScan, stale_index

# ---------------------------------------------------------------------- parts of the targets


def test_pooled_draws_lie_in_the_pool_of_the_step() -> None:
    targets = targets_of(2000)
    scan, pools = PooledScan(targets, ScanPlan("pooled", pool=150)), []
    for step in range(3):
        pools.append(draw_pool(2000, 150, seed=2, step=step))
        assert np.isin(draw_from(scan, step).ids.numpy(), pools[-1]).all()
        assert np.isin(scan.top(QUERIES, 9, excluded=nothing(), keys=keys_of(step=step)).ids.numpy(), pools[-1]).all()
    assert len(np.intersect1d(pools[0], pools[1])) < 60


def test_pooled_draws_from_a_pool_of_all_are_the_full_ones() -> None:
    targets = targets_of(corrector=turned())
    pooled, full = PooledScan(targets, ScanPlan("pooled", pool=MANY)), BlockScan(targets, ScanPlan())
    first, second = draw_from(pooled, 0), draw_from(full, 0)
    assert torch.equal(first.ids, second.ids)
    assert torch.allclose(first.log_normalizer, second.log_normalizer, atol=1e-6)


@pytest.mark.parametrize("strategy", ["pooled", "shortlist"])
def test_normaliser_of_a_part_is_unbiased(strategy: str) -> None:
    targets = targets_of(2000, turned())
    scan = make_scan(strategy, targets, pool=200, shortlist=20)
    sums = [torch.exp(draw_from(scan, step).log_normalizer) for step in range(300)]
    exact = torch.exp(SCALE * (QUERIES @ targets.read(0, 2000).T).double()).sum(dim=1)
    found = torch.stack(sums)
    error = found.std(dim=0) / len(sums) ** 0.5
    assert ((found.mean(dim=0) - exact).abs() < 4 * error).all()
    assert (error < 0.1 * exact).all()


def test_pool_passes_over_its_share_of_the_highest() -> None:
    targets, above = targets_of(2000), []
    scan = PooledScan(targets, ScanPlan("pooled", pool=500))
    scores = QUERIES @ targets.read(0, 2000).T
    for step in range(60):
        keys = DrawKeys(seed=2, step=step, query_ids=np.arange(BATCH))
        ceiling = scan.skip_highest(QUERIES, 5, excluded=nothing(), keys=keys)
        pool = scores[:, torch.from_numpy(draw_pool(2000, 500, seed=2, step=step))]
        above.append((pool > ceiling[:, None] - 1e-6).sum(dim=1))
    counts = torch.stack(above).float()
    assert set(counts.unique().tolist()) == {1.0, 2.0}
    assert counts.mean().item() == pytest.approx(5 / 4, abs=0.1)


@pytest.mark.parametrize("corrected", [True, False])
def test_head_of_a_shortlist_is_exact(corrected: bool) -> None:
    targets = targets_of(2000, turned(normalize_output=False) if corrected else None)
    scan = make_scan("shortlist", targets, shortlist=40, pool=60)
    found = scan.top(QUERIES, 40, excluded=nothing(), keys=keys_of())
    best = (QUERIES @ targets.read(0, 2000).T).topk(40, dim=1)
    assert torch.equal(found.ids.sort(dim=1).values, best.indices.sort(dim=1).values)
    assert torch.allclose(found.scores, best.values, atol=1e-5)


def test_draws_from_a_shortlist_are_near_the_whole_softmax() -> None:
    targets, batch, steps = targets_of(3000, turned()), 200, 60
    scan = make_scan("shortlist", targets, shortlist=150, pool=300)
    query, counts = QUERIES[:1].expand(batch, -1), torch.zeros(3000)
    for step in range(steps):
        keys = DrawKeys(seed=2, step=step, query_ids=np.arange(batch))
        ids = scan.draw(query, 1, scale=SCALE, excluded=nothing(batch), keys=keys).ids
        counts += torch.bincount(ids[:, 0], minlength=3000)
    exact = (SCALE * QUERIES[:1] @ targets.read(0, 3000).T).softmax(dim=1)[0]
    drawn = counts / counts.sum()
    head = exact.topk(150).indices
    # Single frequencies are noisy; what the head and the tail get is not.
    assert 0.2 < exact[head].sum() < 0.95
    assert drawn[head].sum().item() == pytest.approx(exact[head].sum().item(), abs=0.03)
    groups = exact.argsort(descending=True).tensor_split([10, 30, 80, 150, 400, 1000])
    variation = 0.5 * sum(abs(float(drawn[group].sum() - exact[group].sum())) for group in groups)
    assert variation < 0.04


def test_large_sets_are_searched_by_clusters() -> None:
    vectors = clustered(20_500)
    targets = CorrectedTargets(TensorVectors(vectors))
    index = stale_index(targets.stale)
    assert index.description.factory.startswith("IVF")
    scan = ShortlistScan(targets, ScanPlan("shortlist", shortlist=50, pool=1000), index=index)
    draws = draw_from(scan, 0)
    exact = torch.logsumexp(SCALE * (QUERIES @ vectors.T).double(), dim=1)
    assert torch.allclose(draws.log_normalizer, exact, atol=0.3)


# ---------------------------------------------------------------------- encoded anew


def test_reranked_draws_are_among_the_nearest_stale_ones_with_fresh_scores() -> None:
    targets, asked = targets_of(500, turned()), list[int]()

    def encode(rows: torch.Tensor) -> torch.Tensor:
        asked.extend(rows.tolist())
        return targets.gather(rows)

    scan = RerankScan(BlockScan(CorrectedTargets(targets.stale), ScanPlan()), encode, candidates=12)
    draws = draw_from(scan, 0)
    nearest = (QUERIES @ clustered(500).T).topk(12, dim=1).indices
    assert all(set(ids) <= set(near) for ids, near in zip(draws.ids.tolist(), nearest.tolist(), strict=True))
    assert sorted(asked) == torch.unique(nearest).tolist()
    fresh = (QUERIES @ targets.read(0, 500).T).gather(1, nearest).double()
    assert torch.allclose(draws.log_normalizer, torch.logsumexp(SCALE * fresh, dim=1), atol=1e-5)


def test_a_target_is_encoded_once_in_a_step_however_often_it_is_asked_for() -> None:
    targets, asked = targets_of(500), list[int]()

    def encode(rows: torch.Tensor) -> torch.Tensor:
        asked.extend(rows.tolist())
        return targets.gather(rows)

    scan = RerankScan(BlockScan(targets, ScanPlan()), encode, candidates=12)
    draws = draw_from(scan, 0)
    scan.top(QUERIES, 3, excluded=nothing(), keys=keys_of())
    scan.skip_highest(QUERIES, 3, excluded=nothing(), keys=keys_of())
    scan.score(QUERIES, draws.ids)
    assert len(set(asked)) == len(asked)
    scan.score(QUERIES, torch.full((BATCH, 1), 499))
    assert 499 in asked
    before = len(asked)
    scan.advance()
    draw_from(scan, 0)
    assert len(asked) > before
