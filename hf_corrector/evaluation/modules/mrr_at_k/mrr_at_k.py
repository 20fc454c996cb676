"""MRR@k for the ``evaluate`` library; this file can be loaded by its path."""

from __future__ import annotations

from hf_corrector.evaluation.modules.base import RankingMetric
from hf_corrector.metrics import FloatArray, IntArray, Relevant, mrr_at_k


class MrrAtK(RankingMetric):
    """Mean of 1 / rank of the first relevant target among the first k results."""

    label = "mrr"
    summary = "Mean of 1 / rank of the first relevant target, 0 if it is not among the first k results."

    def values(self, ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
        """Return the reciprocal rank of each query, ``(queries,)``."""
        return mrr_at_k(ranked, relevant, k=k)
