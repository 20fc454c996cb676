"""Recall@k for the ``evaluate`` library; this file can be loaded by its path."""

from __future__ import annotations

from hf_corrector.evaluation.modules.base import RankingMetric
from hf_corrector.metrics import FloatArray, IntArray, Relevant, recall_at_k


class RecallAtK(RankingMetric):
    """Mean share of a query's relevant targets among its first k results."""

    label = "recall"
    summary = "Mean share of a query's relevant targets that are among its first k results."

    def values(self, ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
        """Return the recall of each query, ``(queries,)``."""
        return recall_at_k(ranked, relevant, k=k)
