"""Which targets each query is contrasted with: keyed draws from a softmax over all targets, and uniform ones.

Every random number is a function of (seed, step, query) and of what it is drawn for, so that the draws do not depend on
how queries and targets are spread over processes, nor on where a run was interrupted.
"""

from hf_corrector.sampling.candidates import Candidates
from hf_corrector.sampling.exclusions import ExcludedRows, NegativeFilter
from hf_corrector.sampling.keys import DrawKeys, IntArray
from hf_corrector.sampling.softmax import (
    BLOCK_ROWS,
    ListedTargets,
    ScoredTargets,
    SoftmaxDraws,
    draw_listed,
    draw_softmax,
    share_of_blocks,
    top_listed,
    top_scores,
)
from hf_corrector.sampling.uniform import draw_pool, draw_uniform, skipped_counts, uniform_counts

__all__ = [
    "BLOCK_ROWS",
    "Candidates",
    "DrawKeys",
    "ExcludedRows",
    "IntArray",
    "ListedTargets",
    "NegativeFilter",
    "ScoredTargets",
    "SoftmaxDraws",
    "draw_listed",
    "draw_pool",
    "draw_softmax",
    "draw_uniform",
    "share_of_blocks",
    "skipped_counts",
    "top_listed",
    "top_scores",
    "uniform_counts",
]
