"""The part of the corpus that is judged, under every condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.index.base import TargetVectors, TensorVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.index_upgrade.fits import Fit
from hf_corrector.index_upgrade.options import DEFAULT_JUDGED, FULL_UP_TO, UpgradeOptions
from hf_corrector.metrics import FloatArray, parse_metric, quality
from hf_corrector.side_features import SideFeatures

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class JudgedCorpus:
    """Vectors of the judged targets and queries.

    Attributes:
        rows: Their rows in the whole corpus, ascending, ``(m,)`` int64.
        total: Number of targets of the whole corpus.
        relevant: For each query its relevant targets, counted within ``rows``, and their grades.
        stale: Vectors of the old encoder, ``(m, dim_old)``.
        fresh: Vectors of the new encoder, ``(m, dim_new)``.
        queries: Queries by the new encoder, ``(q, dim_new)``.
        old_queries: Queries by the old encoder, ``(q, dim_old)``, or None.
        sides: Side features of ``rows`` by their kind.
        direction: ``"targets"`` or ``"queries"``.
    """

    rows: IntArray
    total: int
    relevant: list[dict[int, float]] = field(repr=False)
    stale: torch.Tensor
    fresh: torch.Tensor
    queries: torch.Tensor
    old_queries: torch.Tensor | None
    sides: Mapping[str, SideFeatures]
    direction: str

    @property
    def is_whole(self) -> bool:
        """Whether every target is judged."""
        return len(self.rows) == self.total

    @property
    def same_size(self) -> bool:
        """Whether new queries can be compared with old targets at all."""
        return self.stale.shape[1] == self.fresh.shape[1]

    def corrected(self, fit: Fit) -> tuple[torch.Tensor, TargetVectors]:
        """Return queries and targets as a corrector leaves them; only one of the two is changed."""
        if self.direction == "queries":
            return fit.model.correct(self.queries), TensorVectors(self.stale)
        return self.queries, TensorVectors(self.corrected_targets(fit))

    def corrected_targets(self, fit: Fit) -> torch.Tensor:
        """Return corrected vectors of all judged targets, ``(m, dim_new)``."""
        return fit.model.correct(self.stale, None if fit.side is None else self.sides[fit.side])

    def cosines(self, fit: Fit, *, without: IntArray) -> FloatArray:
        """Return the cosine of each corrected target to the one it stands for, leaving some rows out, ``(n,)``.

        Where queries are mapped, mapped fresh targets stand for the cached ones.
        """
        seen = torch.from_numpy(~np.isin(self.rows, without))
        if self.direction == "queries":
            mine, theirs = fit.model.correct(self.fresh), self.stale
        else:
            mine, theirs = self.corrected_targets(fit), self.fresh
        cosines: FloatArray = F.cosine_similarity(mine, theirs, dim=1)[seen].double().numpy()
        return cosines


def judged_rows(positives: IntArray, total: int, options: UpgradeOptions) -> IntArray:
    """Return the rows to judge on: all, or the positives and as many others as asked for, drawn from the whole corpus.

    They are drawn without looking at the fitting pairs, so that these are as rare among them as in the corpus.
    """
    wanted = options.judge_targets
    if wanted is None:
        wanted = "full" if total <= FULL_UP_TO else DEFAULT_JUDGED
    others = np.setdiff1d(np.arange(total), positives, assume_unique=True)
    if wanted == "full" or wanted >= len(others):
        return np.arange(total)
    chosen = np.random.default_rng([options.seed, 1]).choice(others, wanted, replace=False)
    return np.sort(np.concatenate([positives, chosen]))


@dataclass(frozen=True, eq=False)
class Overlaid:
    """Vectors some rows of which are replaced.

    Attributes:
        base: The vectors below.
        fresh: What stands in place of them, ``(targets, dim)``.
        replaced: Which rows are replaced, ``(targets,)`` bool.
    """

    base: TargetVectors
    fresh: torch.Tensor
    replaced: torch.Tensor

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.fresh)

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return int(self.fresh.shape[1])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop``, ``(stop - start, dim)``."""
        below = self.base.read(start, stop).float()
        return torch.where(self.replaced[start:stop, None], self.fresh[start:stop], below)


class Search:
    """Searches and scores conditions over the judged targets.

    Args:
        corpus: What is judged.
        options: Metrics and working memory.
    """

    def __init__(self, corpus: JudgedCorpus, options: JudgeOptions) -> None:
        self.corpus, self.options = corpus, options
        self.deepest = max(parse_metric(metric)[1] for metric in options.metrics)

    def rows(self, queries: torch.Tensor, vectors: TargetVectors, k: int) -> IntArray:
        """Return the best ``k`` targets of each query, ``(q, k)``."""
        index = ExactIndex(
            vectors, budget_bytes=self.options.budget_bytes, device=self.options.device, progress=self.options.progress
        )
        found: IntArray = index.search(queries, k).rows.numpy()
        return found

    def quality(self, queries: torch.Tensor, vectors: TargetVectors) -> dict[str, FloatArray]:
        """Return every metric for each query."""
        return self.quality_of(self.rows(queries, vectors, self.deepest))

    def quality_of(self, ranked: IntArray) -> dict[str, FloatArray]:
        """Score rankings, ``(q, any number)``; those too short for a metric end in nothing."""
        short = max(0, self.deepest - ranked.shape[1])
        padded = np.pad(ranked, ((0, 0), (0, short)), constant_values=-1)
        return quality(padded, self.corpus.relevant, metrics=self.options.metrics)

    def reranked(self, candidates: IntArray) -> IntArray:
        """Order candidates ``(q, depth)`` by their fresh scores, ties by row."""
        fresh, queries = self.corpus.fresh.double(), self.corpus.queries.double()
        ordered = []
        for query, rows in zip(queries, np.sort(candidates, axis=1), strict=True):
            scores = (fresh[torch.from_numpy(np.maximum(rows, 0))] @ query).float().numpy()
            ordered.append(rows[np.argsort(np.where(rows < 0, np.inf, -scores), kind="stable")])
        return np.stack(ordered)
