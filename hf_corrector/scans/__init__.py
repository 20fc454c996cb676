"""Ways to look at all targets in every training step: all of them, or as many as a step can afford."""

from hf_corrector.scans.base import ScanPlan, TargetScan
from hf_corrector.scans.block_scan import BlockScan
from hf_corrector.scans.choice import ScanTask, choose_scan, correction_ops, fast_in_bfloat16
from hf_corrector.scans.pooled_scan import PooledScan
from hf_corrector.scans.rerank_scan import RerankScan
from hf_corrector.scans.shortlist_scan import ShortlistScan, stale_index

__all__ = [
    "BlockScan",
    "PooledScan",
    "RerankScan",
    "ScanPlan",
    "ScanTask",
    "ShortlistScan",
    "TargetScan",
    "choose_scan",
    "correction_ops",
    "fast_in_bfloat16",
    "stale_index",
]
