from __future__ import annotations

import numpy as np
import pytest
import torch
from process_helpers import run_on_ranks

from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.index.base import TensorVectors
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.sampling import BLOCK_ROWS, DrawKeys, ExcludedRows
from hf_corrector.scans import BlockScan, ScanPlan

DIM, BATCH = 8, 5


def scan_for_a_while(targets: int, strategy: str, dtype: str) -> list[torch.Tensor]:
    """Draw a few times from a scan whose corrector changes; return everything it says."""
    generator = torch.Generator().manual_seed(0)
    vectors, queries = (torch.randn(rows, DIM, generator=generator) for rows in (targets, BATCH))
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=DIM))
    scan = BlockScan(
        CorrectedTargets(TensorVectors(vectors), corrector), ScanPlan(strategy, dtype=dtype, refresh_steps=3)
    )
    excluded, found = ExcludedRows([[row, targets - 1] for row in range(BATCH)]), []
    for step in range(3):
        keys = DrawKeys(seed=1, step=step, query_ids=np.arange(BATCH))
        draws = scan.draw(queries, 6, scale=3.0, excluded=excluded, keys=keys)
        highest = scan.top(queries, 9, excluded=excluded, keys=keys)
        skipped = scan.skip_highest(queries, 4, excluded=excluded, keys=keys)
        found += [draws.ids, draws.scores, draws.log_normalizer, highest.ids, highest.scores, skipped]
        corrector.weight.copy_(0.3 * torch.randn(DIM, DIM, generator=generator))
        scan.invalidate()
        scan.advance()
    return found


@pytest.mark.parametrize("strategy", ["full", "amortised"])
@pytest.mark.parametrize("targets", [50, 4 * BLOCK_ROWS + 77])
def test_scans_of_several_processes_say_what_one_says(targets: int, strategy: str) -> None:
    for dtype in ("float32", "bfloat16"):
        # In a process of its own, as products of several threads round differently on some processors.
        (alone,) = run_on_ranks(scan_for_a_while, 1, targets, strategy, dtype)
        for found in run_on_ranks(scan_for_a_while, 3, targets, strategy, dtype):
            assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
