"""Quality that is measured without any more re-encoding: the old model, the stale index and the corrected one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_corrector.errors import DataError
from hf_corrector.index.base import TargetVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.metrics import FloatArray, Relevant, parse_metric, quality
from hf_corrector.planning.plan import MeasuredQuality
from hf_corrector.planning.probe import Correct
from hf_corrector.side_features import SideFeatures


@dataclass(frozen=True, eq=False)
class CorrectedBy:
    """Stale vectors as a family's fit corrects them, chunk by chunk.

    Attributes:
        stale: The cached vectors.
        correct: What :data:`hf_corrector.planning.probe.Fit` returned.
        size: Size of a corrected vector.
        side: Side features of all targets, or None.
    """

    stale: TargetVectors
    correct: Correct
    size: int
    side: SideFeatures | None = None

    def __len__(self) -> int:
        return len(self.stale)

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.size

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return corrected rows ``start`` to ``stop``, ``(stop - start, dim)`` float32."""
        beside = None if self.side is None else self.side.read(start, stop)
        return self.correct(self.stale.read(start, stop).float(), beside)


@dataclass(frozen=True, eq=False)
class JudgedQueries:
    """Queries with judgements, none of whose positives was probed.

    Attributes:
        new: By the new encoder, ``(queries, dim)``.
        old: By the old encoder, or None.
        relevant: For each query its relevant target rows and grades.
        metric: What to measure, for instance ``"mrr@10"``.
    """

    new: torch.Tensor
    old: torch.Tensor | None
    relevant: Relevant
    metric: str = "mrr@10"


def measure_quality(
    family: str, queries: JudgedQueries, *, stale: TargetVectors, corrected: TargetVectors
) -> MeasuredQuality:
    """Search the old index with old and new queries, and the corrected one with new ones.

    Between spaces of different size new queries cannot search the old index at all, which counts as finding nothing.

    Args:
        family: The family that corrects.
        queries: Queries and judgements.
        stale: The cached vectors.
        corrected: The same, corrected.

    Raises:
        DataError: If there are no queries.
    """
    if not len(queries.relevant):
        raise DataError(
            "plan", expected="judged queries none of whose positives was probed", got="none",
            cure="Probe fewer targets, or give more judgements.",
        )  # fmt: skip

    def measured(vectors: torch.Tensor, targets: TargetVectors) -> FloatArray:
        _, deepest = parse_metric(queries.metric)
        ranked = ExactIndex(targets).search(vectors, deepest).rows.numpy()
        return quality(ranked, queries.relevant, metrics=(queries.metric,))[queries.metric]

    searchable = stale.dim == queries.new.shape[1]
    return MeasuredQuality(
        family=family, old=None if queries.old is None else measured(queries.old, stale),
        stale=measured(queries.new, stale) if searchable else np.zeros(len(queries.relevant)),
        corrected=measured(queries.new, corrected),
    )  # fmt: skip
