"""What can be measured of an upgrade where the new encoder's vectors are known of a sample only.

Every target of the sample is corrected by a fit that has not seen it, so that all of the sample can be both fitted to
and judged by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.index.base import TensorVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.index_upgrade.conditions import ErrorPredictor, PerQuery
from hf_corrector.index_upgrade.fits import Choice, Fit
from hf_corrector.index_upgrade.vector_inputs import VectorInputs
from hf_corrector.metrics import FloatArray, parse_metric, quality
from hf_corrector.training.corrector_choice import out_of_fold

NEIGHBOURS = 10
NEIGHBOUR_METRIC = f"recall@{NEIGHBOURS}"
# Neighbours of so many show as much as those of all, and a larger sample is searched in the same time.
MAX_NEIGHBOUR_QUERIES = 2000

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class VectorBench:
    """Queries that search the sampled targets, whatever vectors these have.

    Attributes:
        queries: By the new encoder, ``(q, dim_new)``.
        old_queries: By the old encoder, ``(q, dim_old)``, or None.
        relevant: Places in the sample that answer each query, and their grades.
        own: The place of each query in the sample, where queries are targets themselves, ``(q,)``; None where not.
        options: Metrics and working memory.
    """

    queries: torch.Tensor
    old_queries: torch.Tensor | None
    relevant: list[dict[int, float]] = field(repr=False)
    own: IntArray | None
    options: JudgeOptions

    @classmethod
    def of(cls, inputs: VectorInputs, options: JudgeOptions, *, seed: int) -> VectorBench:
        """Search by judged queries; where there are none, by new vectors of targets for their new neighbours."""
        judged = inputs.queries
        if judged is not None:
            return cls(judged.new, judged.old, judged.relevant, None, options)
        own = np.random.default_rng([seed, 5]).permutation(len(inputs.fresh))[:MAX_NEIGHBOUR_QUERIES]
        own = np.sort(own)
        plain = replace(options, metrics=(NEIGHBOUR_METRIC,), primary=NEIGHBOUR_METRIC)
        blank = cls(inputs.fresh[torch.from_numpy(own)], None, [], own, plain)
        nearest = blank.rows(inputs.fresh)
        return replace(blank, relevant=[dict.fromkeys(row.tolist(), 1.0) for row in nearest])

    def rows(self, targets: torch.Tensor, queries: torch.Tensor | None = None) -> IntArray:
        """Return the best places for each query, ``(q, k)``; never its own."""
        deepest = max(parse_metric(metric)[1] for metric in self.options.metrics)
        index = ExactIndex(
            TensorVectors(targets), budget_bytes=self.options.budget_bytes, device=self.options.device, progress=False
        )
        depth = min(deepest + (self.own is not None), len(targets))
        found: IntArray = index.search(self.queries if queries is None else queries, depth).rows.numpy()
        if self.own is not None:
            # Whoever searches for neighbours finds itself first, whatever the vectors are worth.
            order = np.argsort(found == self.own[:, None], axis=1, kind="stable")
            found = np.take_along_axis(found, order, axis=1)[:, : min(deepest, len(targets) - 1)]
        return np.pad(found, ((0, 0), (0, deepest - found.shape[1])), constant_values=-1)

    def quality(self, targets: torch.Tensor, queries: torch.Tensor | None = None) -> dict[str, FloatArray]:
        """Return every metric for each query."""
        return quality(self.rows(targets, queries), self.relevant, metrics=self.options.metrics)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Sampled targets as fits see them that were made without them.

    Attributes:
        bench: What searches them.
        corrected: By the chosen kind, ``(n, dim_new)``.
        per_query: ``per_query[condition][metric]``, ``(q,)``, in the order of the table.
    """

    bench: VectorBench
    corrected: torch.Tensor
    per_query: PerQuery


def measure(inputs: VectorInputs, bench: VectorBench, fits: list[Fit], choice: Choice, *, seed: int) -> HeldOut:
    """Search every condition; kinds that were too slow to be compared are left out."""
    found: PerQuery = {}
    if bench.old_queries is not None:
        found["old"] = bench.quality(inputs.stale, bench.old_queries)
    if inputs.same_size:
        found["stale"] = bench.quality(inputs.stale)
    compared = [fit for fit in fits if fit.name in choice.losses or fit is choice.fit]
    corrected = {fit.name: out_of_fold(fit.fitted, seed=seed) for fit in compared}
    for name, vectors in corrected.items():
        found[name] = bench.quality(vectors)
    chosen = corrected[choice.fit.name]
    found["corrected"] = found[choice.fit.name]
    found["fresh"] = bench.quality(inputs.fresh)
    return HeldOut(bench, chosen, found)


def partly_reembedded(
    inputs: VectorInputs, held_out: HeldOut, predictor: ErrorPredictor
) -> Callable[[float], FloatArray]:
    """Return a function from a share to the primary metric when so many targets, worst first, are embedded anew."""
    order = np.argsort(-predictor.predict(inputs.stale), kind="stable")
    metric = held_out.bench.options.primary

    def at(share: float) -> FloatArray:
        replaced = torch.zeros(len(order), dtype=torch.bool)
        replaced[torch.from_numpy(order[: round(share * len(order))])] = True
        return held_out.bench.quality(torch.where(replaced[:, None], inputs.fresh, held_out.corrected))[metric]

    return at
