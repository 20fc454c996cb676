"""Every way to go on with an old index, judged on the same queries and targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.evaluation.evaluator import SHOWN
from hf_corrector.fitting import Pairs, fit_affine
from hf_corrector.index.base import TensorVectors
from hf_corrector.index_upgrade.fits import Fit, out_of_fold_errors
from hf_corrector.index_upgrade.judged_corpus import JudgedCorpus, Overlaid, Search
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.metrics import FloatArray

TOP = 10

PerQuery = dict[str, dict[str, FloatArray]]


@dataclass(frozen=True, eq=False)
class Judged:
    """Quality of every condition, and what is needed to watch the chosen one.

    Attributes:
        per_query: ``per_query[condition][metric]``, ``(queries,)``, in the order of the table.
        ranked: ``ranked[condition]`` of ``old``, ``stale``, ``corrected`` and ``fresh``: rows of the whole corpus, best
            first, ``(queries, at most SHOWN)``.
        overlap: Mean share of the ten best targets that the corrected index has in common with the fresh one.
        notes: Which conditions could not be had, one sentence each.
    """

    per_query: PerQuery
    ranked: dict[str, npt.NDArray[np.int64]]
    overlap: float
    notes: tuple[str, ...]


def judge_conditions(
    search: Search, fits: list[Fit], chosen: Fit, *, num_pairs: int, options: UpgradeOptions
) -> Judged:
    """Search every condition.

    Args:
        search: The judged targets.
        fits: Correctors to compare.
        chosen: The corrector that would be adopted; may be one of ``fits``.
        num_pairs: Encoder passes spent on fitting pairs: what a partial re-embedding may spend too.
        options: Depth of reranking and seed.
    """
    corpus, notes = search.corpus, []
    found: PerQuery = {}
    ranked: dict[str, npt.NDArray[np.int64]] = {}
    if corpus.old_queries is not None:
        ranked["old"] = search.rows(corpus.old_queries, TensorVectors(corpus.stale), search.deepest)
        found["old"] = search.quality_of(ranked["old"])
    if corpus.same_size:
        ranked["stale"] = search.rows(corpus.queries, TensorVectors(corpus.stale), search.deepest)
        found["stale"] = search.quality_of(ranked["stale"])
    else:
        notes.append("Vectors differ in size, so new queries cannot search the old index as it is.")
    for fit in fits:
        found[fit.name] = search.quality(*corpus.corrected(fit))
    ranked["corrected"] = search.rows(*corpus.corrected(chosen), search.deepest)
    found["corrected"] = search.quality_of(ranked["corrected"])
    replaced = partial_mask(corpus, num_pairs, seed=options.seed)
    if corpus.same_size:
        mixed = Overlaid(TensorVectors(corpus.stale), corpus.fresh, replaced)
        found["partial"] = search.quality(corpus.queries, mixed)
    if corpus.direction == "targets":
        aligned = Overlaid(TensorVectors(corpus.corrected_targets(chosen)), corpus.fresh, replaced)
        found["partial_aligned"] = search.quality(corpus.queries, aligned)
    candidates = _candidates(search, options.rerank_depth)
    if candidates is not None:
        found["rerank"] = search.quality_of(search.reranked(candidates))
    ranked["fresh"] = search.rows(corpus.queries, TensorVectors(corpus.fresh), search.deepest)
    found["fresh"] = search.quality_of(ranked["fresh"])
    shown = {name: _whole_corpus(rows[:, :SHOWN], corpus) for name, rows in ranked.items()}
    return Judged(found, shown, top_overlap(ranked["corrected"], ranked["fresh"]), tuple(notes))


def _whole_corpus(ranked: npt.NDArray[np.int64], corpus: JudgedCorpus) -> npt.NDArray[np.int64]:
    """Turn rows of the judged part into rows of the whole corpus; -1 stays what it is."""
    return np.where(ranked < 0, -1, corpus.rows[ranked])


def partial_mask(corpus: JudgedCorpus, num_pairs: int, *, seed: int) -> torch.Tensor:
    """Draw which judged targets a partial re-embedding of ``num_pairs`` of all targets has reached, ``(m,)`` bool.

    The fitting pairs themselves will not do: no positive is among them, which a partial re-embedding would not avoid.
    """
    share = num_pairs / corpus.total
    mask = torch.zeros(len(corpus.rows), dtype=torch.bool)
    order = np.random.default_rng([seed, 2]).permutation(len(corpus.rows))
    mask[torch.from_numpy(order[: round(share * len(corpus.rows))])] = True
    return mask


def _candidates(search: Search, depth: int) -> npt.NDArray[np.int64] | None:
    """Return what the old index finds first: for the new queries where that is possible, else for the old ones."""
    corpus = search.corpus
    queries = corpus.queries if corpus.same_size else corpus.old_queries
    return None if queries is None else search.rows(queries, TensorVectors(corpus.stale), depth)


def top_overlap(mine: npt.NDArray[np.int64], theirs: npt.NDArray[np.int64]) -> float:
    """Return the mean share of the ten best targets two rankings ``(queries, k)`` have in common."""
    shared = [len(np.intersect1d(a[:TOP], b[:TOP])) for a, b in zip(mine, theirs, strict=True)]
    return float(np.mean(shared) / min(TOP, theirs.shape[1]))


@dataclass(frozen=True, eq=False)
class ErrorPredictor:
    """Predict how far from the fresh vector correction will leave a target, from its stale vector.

    A ridge regression of the errors of fits that had not seen the target; it ranked targets better than the errors of
    nearby pairs, than their distance and than the length of the correction.
    """

    weight: torch.Tensor
    offset: torch.Tensor

    @classmethod
    def fit(cls, chosen: Fit, *, seed: int) -> ErrorPredictor:
        """Fit to the pairs a corrector was fitted to."""
        errors = torch.from_numpy(out_of_fold_errors(chosen, seed=seed))
        fit = fit_affine(Pairs.collect(chosen.pairs.stale, errors[:, None]))
        return cls(fit.weight, fit.bias - fit.weight @ fit.mean)

    def predict(self, stale: torch.Tensor) -> FloatArray:
        """Return predicted squared errors, ``(n,)``; only their order means something."""
        predicted: FloatArray = (stale.float() @ self.weight.T + self.offset)[:, 0].double().numpy()
        return predicted


def urgency(predicted: FloatArray, traffic: FloatArray | None = None) -> FloatArray:
    """Return how urgent re-embedding each target is: its predicted error, ``(n,)``, with traffic times one plus that.

    With traffic an error that is predicted below 0, which no squared error is, counts as 0; the urgency of a target
    does not depend on which others are asked about.
    """
    if traffic is None:
        return predicted
    weighed: FloatArray = np.maximum(predicted, 0.0) * (1 + traffic)
    return weighed


def reembedding(
    search: Search, chosen: Fit, urgent: FloatArray, *, typical: npt.NDArray[np.bool_], metric: str
) -> Callable[[float], FloatArray]:
    """Return a function from a share to the quality of each query when so many targets, most urgent first, are fresh.

    Args:
        search: The judged targets.
        chosen: Corrects the others.
        urgent: Urgency of each judged target, ``(m,)``.
        typical: Judged targets that stand for the corpus, ``(m,)``: the share is one of these.
        metric: What is returned of each query.
    """
    corpus = search.corpus
    corrected = TensorVectors(corpus.corrected_targets(chosen))
    # By places rather than by values, as many targets may be of the same urgency.
    order = np.argsort(-urgent, kind="stable")
    reached = np.cumsum(typical[order])

    def quality(share: float) -> FloatArray:
        replaced = torch.zeros(len(urgent), dtype=torch.bool)
        replaced[torch.from_numpy(order[reached <= round(share * int(typical.sum()))])] = True
        return search.quality(corpus.queries, Overlaid(corrected, corpus.fresh, replaced))[metric]

    return quality
