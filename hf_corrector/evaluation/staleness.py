"""The whole judgement of a stale index: quality under every condition, and fidelity of the sampling distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_corrector.evaluation.drift import Fidelity, FidelityOptions, mean_cosine, sampler_fidelity
from hf_corrector.evaluation.evaluator import Judgement, JudgeOptions, clean_queries, judge
from hf_corrector.index.base import TargetVectors
from hf_corrector.metrics import Relevant


@dataclass(frozen=True)
class Conditions:
    """Vectors of one set of queries and targets under every condition.

    Attributes:
        queries: Queries of the current encoder, ``(q, dim)`` float32.
        stale: Targets as cached.
        corrected: Targets as cached, seen through the corrector; None where there is none.
        fresh: Targets re-encoded by the current encoder.
        old_queries: Queries of the old encoder, ``(q, dim)`` float32, or None.
        old: Targets of the old encoder, or None.
    """

    queries: torch.Tensor
    stale: TargetVectors
    corrected: TargetVectors | None
    fresh: TargetVectors
    old_queries: torch.Tensor | None = None
    old: TargetVectors | None = None


@dataclass(frozen=True)
class StalenessReport:
    """Quality and fidelity, as they go into ``run.json``.

    Attributes:
        judgement: Quality by condition, with intervals.
        fidelity: By ``"stale"`` and ``"corrected"``: how close sampling is to the exact softmax.
        cosines: By the same names: mean cosine to the fresh vectors.
    """

    judgement: Judgement
    fidelity: dict[str, Fidelity]
    cosines: dict[str, float]

    def fidelity_dict(self) -> dict[str, dict[str, float]]:
        """Return ``{"stale": {"tv", "hard_negative_recall@50", "cosine"}, …}``."""
        return {
            name: {
                "tv": one.tv, f"hard_negative_recall@{one.hard_k}": one.hard_negative_recall,
                "cosine": self.cosines[name],
            }
            for name, one in self.fidelity.items()
        }  # fmt: skip

    def table(self) -> str:
        """Return tables of quality and of fidelity for a terminal."""
        lines = [self.judgement.table(), "", "sampling from the cache        TV   hard-negative recall@50   cosine"]
        for name, values in self.fidelity_dict().items():
            tv, recall, cosine = values.values()
            lines.append(f"{name:<26} {tv:6.3f}   {recall:23.3f}   {cosine:6.3f}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the judgement as JSON values."""
        return self.judgement.to_dict()


def measure_staleness(
    conditions: Conditions, relevant: Relevant, *, fitted_rows: np.ndarray, scale: float,
    options: JudgeOptions | None = None,
) -> StalenessReport:  # fmt: skip
    """Judge every condition on clean queries and measure how faithful sampling from the cache is.

    Args:
        conditions: What is compared.
        relevant: For each query its relevant target rows and grades.
        fitted_rows: Target rows whose fresh vectors the corrector was fitted on, ``(n,)`` int64; queries that look
            for one of these are not clean. Fidelity is measured on clean queries too, where there are any.
        scale: Inverse temperature β of the softmax.
        options: How to measure.

    Raises:
        DataError: If vectors and judgements do not fit together.
    """
    options = JudgeOptions() if options is None else options
    clean = clean_queries(relevant, fitted_rows)
    compared: dict[str, tuple[torch.Tensor, TargetVectors]] = {}
    if conditions.old is not None and conditions.old_queries is not None:
        compared["old"] = (conditions.old_queries, conditions.old)
    corrected = conditions.stale if conditions.corrected is None else conditions.corrected
    approximations = {"stale": conditions.stale, "corrected": corrected}
    compared.update({name: (conditions.queries, vectors) for name, vectors in approximations.items()})
    compared["fresh"] = (conditions.queries, conditions.fresh)
    judgement = judge(compared, relevant, clean=clean, options=options)
    # A query that all targets answer has no negative to sample.
    has_negatives = np.array([len(known) < len(conditions.stale) for known in relevant])
    judged = np.flatnonzero(has_negatives & (clean if clean.any() else True))
    queries, known = conditions.queries[torch.from_numpy(judged)], [relevant[one] for one in judged.tolist()]
    reading = FidelityOptions(device=options.device, progress=options.progress)
    fidelity = {
        name: sampler_fidelity(
            queries, vectors, exact=conditions.fresh, scale=scale, relevant=known, options=reading
        )
        for name, vectors in approximations.items()
    }  # fmt: skip
    cosines = {
        name: mean_cosine(vectors, conditions.fresh, progress=options.progress)
        for name, vectors in approximations.items()
    }
    return StalenessReport(judgement, fidelity, cosines)
