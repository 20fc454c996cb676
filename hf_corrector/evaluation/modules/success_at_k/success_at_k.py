"""Success@k for the ``evaluate`` library; this file can be loaded by its path."""

from __future__ import annotations

from hf_corrector.evaluation.modules.base import RankingMetric
from hf_corrector.metrics import FloatArray, IntArray, Relevant, success_at_k


class SuccessAtK(RankingMetric):
    """Share of queries with a relevant target among the first k results."""

    label = "success"
    summary = "Share of queries with a relevant target among the first k results (hit rate)."

    def values(self, ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
        """Return 1 or 0 for success of each query, ``(queries,)``."""
        return success_at_k(ranked, relevant, k=k)
