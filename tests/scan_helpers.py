"""Small sets of targets and scans of them, shared by the tests of scans."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.index.base import TensorVectors
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.sampling import (
    BLOCK_ROWS,
    DrawKeys,
    ExcludedRows,
    SoftmaxDraws,
)
from hf_corrector.scans import BlockScan, PooledScan, RerankScan, ScanPlan, ShortlistScan, TargetScan, stale_index

DIM, BATCH, SCALE = 8, 6, 10.0
STRATEGIES = ["full", "amortised", "pooled", "shortlist", "rerank"]
MANY = 2 * BLOCK_ROWS + 300


def unit(rows: int, seed: int, dim: int = DIM) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def clustered(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    near = unit(40, 6)[torch.randint(40, (rows,), generator=generator)]
    return F.normalize(near + 0.35 * torch.randn(rows, DIM, generator=generator), dim=1)


def turned(seed: int = 0, **config: bool) -> CorrectorModel:
    """A corrector that moves every vector a good deal."""
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=DIM, **config))
    turn(corrector, seed)
    return corrector


def turn(corrector: CorrectorModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    corrector.weight.copy_(0.3 * torch.randn(DIM, DIM, generator=generator))
    corrector.bias.copy_(0.1 * torch.randn(DIM, generator=generator))


def targets_of(rows: int = MANY, corrector: CorrectorModel | None = None) -> CorrectedTargets:
    return CorrectedTargets(TensorVectors(clustered(rows)), corrector)


def make_scan(strategy: str, targets: CorrectedTargets, **sizes: int) -> TargetScan:
    """Make a scan whose sizes take in all targets unless told otherwise."""
    sizes = {"pool": len(targets), "shortlist": len(targets)} | sizes
    if strategy == "rerank":
        stale = BlockScan(CorrectedTargets(targets.stale), ScanPlan())
        return RerankScan(stale, targets.gather, candidates=sizes["shortlist"])
    plan = ScanPlan(strategy, **sizes)
    if strategy == "pooled":
        return PooledScan(targets, plan)
    if strategy == "shortlist":
        return ShortlistScan(targets, plan, index=stale_index(targets.stale))
    return BlockScan(targets, plan)


def keys_of(batch: int = BATCH, step: int = 0) -> DrawKeys:
    return DrawKeys(seed=2, step=step, query_ids=np.arange(batch))


def nothing(batch: int = BATCH) -> ExcludedRows:
    return ExcludedRows([[]] * batch)


def assert_same(first: SoftmaxDraws, second: SoftmaxDraws) -> None:
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.log_normalizer, second.log_normalizer)


QUERIES = unit(BATCH, 1)


def draw_from(scan: TargetScan, step: int) -> SoftmaxDraws:
    return scan.draw(QUERIES, 5, scale=SCALE, excluded=nothing(), keys=keys_of(step=step))
