"""nDCG@k for the ``evaluate`` library; this file can be loaded by its path."""

from __future__ import annotations

from hf_corrector.evaluation.modules.base import RankingMetric
from hf_corrector.metrics import FloatArray, IntArray, Relevant, ndcg_at_k


class NdcgAtK(RankingMetric):
    """Mean normalised discounted cumulative gain with linear gain, as trec_eval's ndcg_cut."""

    label = "ndcg"
    summary = "Normalised discounted cumulative gain of the first k results, with linear gain as trec_eval's ndcg_cut."

    def values(self, ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
        """Return the nDCG of each query, ``(queries,)``."""
        return ndcg_at_k(ranked, relevant, k=k)
