"""What the four metrics of rankings share: their inputs, and the way from ids to rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

import datasets
import evaluate
import numpy as np

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.metrics import FloatArray, IntArray, Relevant

INPUTS = """
Args:
    predictions: For each query the ids of its results, best first, without repetition; or its run as {id: score},
        which is ranked by falling score, equal scores by falling id, as trec_eval does.
    references: For each query its judged targets, as {id: grade} or as [{"id": ..., "grade": ...}]; those with a
        grade above 0 are relevant.
    k: How many results count; a number or a list of numbers. Default 10.

Returns:
    For each k the mean over queries. A query without results, or without relevant targets, counts 0. No result is
    removed for having the id of its query.
"""


class Judged(TypedDict):
    """One judgement: a target's id and its grade."""

    id: str
    grade: float


Run: TypeAlias = Sequence[str] | Mapping[str, float]
Reference: TypeAlias = Sequence[Judged] | Mapping[str, float]


class RankingMetric(evaluate.Metric, ABC):  # type: ignore[misc]  # evaluate 0.4.6 has no types
    """Mean over queries of a metric of their rankings.

    Stays abstract, as ``evaluate.load`` takes the first concrete metric it finds in a module's namespace.
    """

    label = ""
    summary = ""

    @abstractmethod
    def values(self, ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
        """Return one value per query, ``(queries,)``, of rankings ``(queries, at least k)``."""

    def add(self, *, prediction: Run, reference: Reference) -> None:
        """Add one query; see :meth:`add_batch`."""
        super().add(prediction=_as_ids(prediction), reference=_as_records(reference))

    def add_batch(self, *, predictions: Sequence[Run], references: Sequence[Reference]) -> None:
        """Add queries: rankings and judgements in any of the forms below, stored in one."""
        if len(predictions) != len(references):
            raise DataError(
                "queries", expected=f"references for {len(predictions)} predictions", got=str(len(references)),
                cure="Pass both in the same order of queries.",
            )  # fmt: skip
        super().add_batch(
            predictions=[_as_ids(run) for run in predictions], references=[_as_records(each) for each in references]
        )

    def _info(self) -> evaluate.MetricInfo:
        judged = {"id": datasets.Value("string"), "grade": datasets.Value("float64")}
        features = {
            "predictions": datasets.List(datasets.Value("string")),
            "references": datasets.List(judged),
        }
        return evaluate.MetricInfo(
            description=self.summary,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(features),
            reference_urls=["https://github.com/usnistgov/trec_eval"],
        )

    def _compute(
        self, predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Judged]], k: int | list[int] = 10
    ) -> dict[str, float]:
        cuts = [k] if isinstance(k, int) else list(k)
        if not cuts or min(cuts) < 1:
            raise ConfigurationError("metric", expected="cut-offs k >= 1", got=str(k), cure="Pass for instance k=10.")
        ranked, relevant = to_rows(predictions, references, width=max(cuts))
        return {f"{self.label}@{cut}": float(self.values(ranked, relevant, k=cut).mean()) for cut in cuts}


def to_rows(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Judged]], *, width: int
) -> tuple[IntArray, list[dict[int, float]]]:
    """Number the ids of each query from 0.

    Args:
        predictions: For each query the ids of its results, best first.
        references: For each query its judgements.
        width: Least number of columns; shorter rankings are padded.

    Returns:
        Rankings ``(queries, columns)``, padded with -1, and judgements by number.

    Raises:
        DataError: If there are no queries, or a target is judged twice.
    """
    if len(predictions) == 0:
        raise DataError("queries", expected="at least one", got="none", cure="Pass predictions and references.")
    ranked = np.full((len(predictions), max(width, *(len(ids) for ids in predictions))), -1, np.int64)
    relevant: list[dict[int, float]] = []
    for query, (ids, judged) in enumerate(zip(predictions, references, strict=True)):
        numbers: dict[str, int] = {}
        for place, target in enumerate(ids):
            ranked[query, place] = numbers.setdefault(target, len(numbers))
        grades = {numbers.setdefault(each["id"], len(numbers)): each["grade"] for each in judged}
        if len(grades) != len(judged):
            raise DataError(
                f"references of query {query}", expected="every id once", got="an id twice", cure="Keep one grade."
            )
        relevant.append(grades)
    return ranked, relevant


def _as_ids(run: Run) -> list[str]:
    """Return ids best first; a run is ordered as trec_eval orders it."""
    if isinstance(run, Mapping):
        return sorted(_checked_ids(run), key=lambda target: (run[target], target), reverse=True)
    return _checked_ids(run)


def _as_records(reference: Reference) -> list[Judged]:
    if isinstance(reference, Mapping):
        return [{"id": target, "grade": float(reference[target])} for target in _checked_ids(reference)]
    _checked_ids([each["id"] for each in reference])
    return [{"id": each["id"], "grade": float(each["grade"])} for each in reference]


def _checked_ids(ids: Sequence[str] | Mapping[str, float]) -> list[str]:
    """Refuse numbers, which would otherwise meet ``"1"`` in one input and ``1`` in the other."""
    if isinstance(ids, str) or any(not isinstance(target, str) for target in ids):
        raise DataError("ids of targets", expected="a list of strings", got=repr(ids)[:80], cure="Pass str(id).")
    return list(ids)
