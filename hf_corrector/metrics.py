"""Ranking quality per query, and intervals by resampling queries.

The rules, the same for every number this package reports:

* A ranking is a row of target rows, best first, ``-1`` where there was nothing more to return. A target stands in a
  ranking once; a repeated one is an error, as it would lift recall and nDCG above 1.
* Relevant is what has a grade above 0. Grades of 0 and below count as "not relevant", as in trec_eval.
* A query without results counts 0 and stays in the mean. A query without any relevant target also counts 0, as in
  trec_eval; :func:`hf_corrector.evaluation.evaluator.judge` refuses such queries instead.
* Ties are broken before a ranking gets here: score descending, then row ascending.
* Nothing is removed: a target whose id happens to equal the query's id is a target like any other.
* nDCG has linear gain, as trec_eval's ``ndcg_cut``: the sum of grade / log2(rank + 1), divided by that of the best
  order of all relevant targets cut at k. Recall divides by the number of relevant targets, not by min(number, k).

Intervals treat queries as the sample: targets, encoders and judgements are taken as given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hf_corrector.errors import ConfigurationError, DataError

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]
Relevant: TypeAlias = Sequence[Mapping[int, float]]

DEFAULT_METRICS = ("mrr@10", "recall@10", "recall@100", "ndcg@10", "success@10")
METRIC_NAMES = ("success", "recall", "mrr", "ndcg")
_WRITTEN = {"mrr": "MRR", "ndcg": "nDCG"}
PERCENTILES = (2.5, 97.5)
RESAMPLES = 5_000

_BLOCK_BYTES = 64 * 2**20
_NEGLIGIBLE = 1e-9  # means of metrics lie in [0, 1]; below this a gap is rounding


def success_at_k(ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
    """Return 1 for each query with a relevant target among its first ``k``, else 0 (hit rate).

    Args:
        ranked: Target rows, best first, padded with -1, ``(queries, at least k)``.
        relevant: For each query its relevant target rows and their grades.
        k: How many results count.

    Returns:
        One value per query, ``(queries,)``.

    Raises:
        DataError: If rankings and judgements do not fit together, see the module's rules.
    """
    return _success(_compare(ranked, relevant, k), k)


def recall_at_k(ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
    """Return the share of each query's relevant targets among its first ``k``; arguments as :func:`success_at_k`."""
    return _recall(_compare(ranked, relevant, k), k)


def mrr_at_k(ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
    """Return 1 / rank of the first relevant target, 0 beyond rank ``k``; arguments as :func:`success_at_k`."""
    return _mrr(_compare(ranked, relevant, k), k)


def ndcg_at_k(ranked: IntArray, relevant: Relevant, *, k: int) -> FloatArray:
    """Return nDCG with linear gain, as trec_eval's ``ndcg_cut``; arguments as :func:`success_at_k`."""
    return _ndcg(_compare(ranked, relevant, k), k)


def quality(ranked: IntArray, relevant: Relevant, *, metrics: Sequence[str] = DEFAULT_METRICS) -> dict[str, FloatArray]:
    """Compute several metrics from one ranking.

    Args:
        ranked: Target rows, best first, padded with -1, ``(queries, at least the largest cut-off)``.
        relevant: For each query its relevant target rows and their grades.
        metrics: Names such as ``"ndcg@10"``, see :func:`parse_metric`.

    Returns:
        For each name one value per query, ``(queries,)``.

    Raises:
        ConfigurationError: If a name is no metric.
        DataError: If rankings and judgements do not fit together.
    """
    parsed = {metric: parse_metric(metric) for metric in metrics}
    if not parsed:
        return {}
    compared = _compare(ranked, relevant, max(k for _, k in parsed.values()))
    return {metric: _METRICS[name](compared, k) for metric, (name, k) in parsed.items()}


def parse_metric(metric: str) -> tuple[str, int]:
    """Split ``"mrr@10"`` into ``("mrr", 10)``.

    Raises:
        ConfigurationError: If it is none of success, recall, mrr, ndcg with a cut-off of at least 1.
    """
    name, _, cut = metric.partition("@")
    if name not in METRIC_NAMES or not (cut.isascii() and cut.isdigit()) or int(cut) < 1:
        raise ConfigurationError(
            "metric", expected=f"one of {', '.join(f'{known}@k' for known in METRIC_NAMES)} with k >= 1",
            got=repr(metric), cure="Write it as 'ndcg@10'.",
        )  # fmt: skip
    return name, int(cut)


def metric_name(metric: str) -> str:
    """Write ``"mrr@10"`` as ``"MRR@10"``; other names stay as they are."""
    name, at, cut = metric.partition("@")
    return f"{_WRITTEN.get(name, name)}{at}{cut}"


@dataclass(frozen=True, eq=False)
class _Compared:
    """Rankings looked up in the judgements: all that the metrics need.

    Attributes:
        gains: Grade of each ranked target, 0 where not relevant, ``(queries, k)``.
        owners: Query of each relevant target, ``(judgements,)``, ascending.
        grades: Grade of each relevant target, descending within a query, ``(judgements,)``.
        totals: Number of relevant targets of each query, ``(queries,)``.
    """

    gains: FloatArray
    owners: IntArray
    grades: FloatArray
    totals: IntArray


def _compare(ranked: IntArray, relevant: Relevant, k: int) -> _Compared:
    """Look every ranked target up in its query's judgements; vectorised over queries."""
    ranked = _checked_ranking(np.asarray(ranked), len(relevant), k)
    owners, rows, grades = _flatten(relevant)
    stride = 1 + max(int(ranked.max(initial=0)), int(rows.max(initial=0)))
    keys = owners * stride + rows
    order = np.argsort(keys)
    keys, sorted_grades = keys[order], grades[order]
    wanted = np.arange(len(relevant))[:, None] * stride + ranked
    wanted[ranked < 0] = -1
    gains = np.zeros(wanted.shape)
    if len(keys):
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        gains = np.where(keys[place] == wanted, sorted_grades[place], 0.0)
    best_first = np.lexsort((-grades, owners))
    totals = np.bincount(owners, minlength=len(relevant)).astype(np.int64)
    return _Compared(gains=gains, owners=owners[best_first], grades=grades[best_first], totals=totals)


def _checked_ranking(ranked: IntArray, queries: int, k: int) -> IntArray:
    """Cut rankings at ``k`` after refusing what would give a wrong number without a sign of it."""
    if k < 1:
        raise ConfigurationError("metric", expected="a cut-off k >= 1", got=str(k), cure="Pass a larger k.")
    if ranked.ndim != 2 or ranked.dtype.kind not in "iu" or ranked.shape[0] != queries:
        raise DataError(
            "rankings", expected=f"integers of shape ({queries}, k), one row per query",
            got=f"{ranked.dtype} of shape {ranked.shape}", cure="Pass the rows of a search for the same queries.",
        )  # fmt: skip
    if ranked.shape[1] < k:
        raise DataError(
            "rankings", expected=f"at least {k} columns for a metric at {k}", got=f"{ranked.shape[1]}",
            cure=f"Search with k={k}; where fewer targets exist, pad with -1.",
        )  # fmt: skip
    ranked = ranked[:, :k].astype(np.int64, copy=False)
    ordered = np.sort(ranked, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    if twice.any():
        raise DataError(
            f"ranking of query {int(np.argmax(twice))}", expected="every target at most once",
            got="a target twice", cure="Remove duplicates from the ranking before judging it.",
        )  # fmt: skip
    return ranked


def _flatten(relevant: Relevant) -> tuple[IntArray, IntArray, FloatArray]:
    """Return owners, rows and grades of all judgements above 0 as three flat arrays."""
    sizes = np.fromiter((len(judged) for judged in relevant), np.int64, len(relevant))
    owners = np.repeat(np.arange(len(relevant), dtype=np.int64), sizes)
    rows = np.fromiter((row for judged in relevant for row in judged), np.int64, len(owners))
    grades = np.fromiter((grade for judged in relevant for grade in judged.values()), np.float64, len(owners))
    wrong = (rows < 0) | ~np.isfinite(grades)
    if wrong.any():
        first = int(np.argmax(wrong))
        raise DataError(
            f"judgements of query {owners[first]}", expected="target rows >= 0 with finite grades",
            got=f"row {rows[first]} with grade {grades[first]}", cure="Look the target up in the corpus.",
        )  # fmt: skip
    kept = grades > 0
    return owners[kept], rows[kept], grades[kept]


def _success(compared: _Compared, k: int) -> FloatArray:
    return np.asarray((compared.gains[:, :k] > 0).any(axis=1), dtype=np.float64)


def _recall(compared: _Compared, k: int) -> FloatArray:
    found = (compared.gains[:, :k] > 0).sum(axis=1)
    return np.asarray(found / np.maximum(compared.totals, 1), dtype=np.float64)


def _mrr(compared: _Compared, k: int) -> FloatArray:
    reciprocal = (compared.gains[:, :k] > 0) / np.arange(1, k + 1)
    return np.asarray(reciprocal.max(axis=1), dtype=np.float64)


def _ndcg(compared: _Compared, k: int) -> FloatArray:
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    starts = np.cumsum(compared.totals) - compared.totals
    rank = np.arange(len(compared.owners)) - starts[compared.owners]
    kept = rank < k
    ideal = np.bincount(
        compared.owners[kept], compared.grades[kept] * discount[rank[kept]], minlength=len(compared.totals)
    )
    found = compared.gains[:, :k] @ discount
    return np.asarray(found / np.where(ideal > 0, ideal, 1.0), dtype=np.float64)  # without relevant targets 0 / 1


_METRICS = {"success": _success, "recall": _recall, "mrr": _mrr, "ndcg": _ndcg}


@dataclass(frozen=True)
class Interval:
    """A statistic of the queries at hand and its 95 % percentile interval.

    Attributes:
        estimate: The statistic itself, of the sample as it is.
        low: The 2.5th percentile over resampled queries.
        high: The 97.5th percentile.
    """

    estimate: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return estimate, low and high for JSON."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Undefined:
    """A ratio these queries cannot tell, as its denominator may well be 0.

    Attributes:
        reason: Why, in words.
    """

    reason: str

    def to_dict(self) -> dict[str, float | str | None]:
        """Return what :meth:`Interval.to_dict` returns with ``None`` for each number, and the reason."""
        return {"estimate": None, "low": None, "high": None, "reason": self.reason}


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Means of several methods over the same queries, and over the same resamples of them.

    Attributes:
        names: Methods.
        means: Mean over queries, ``(methods,)``.
        resampled: Mean over each resample, ``(resamples, methods)``.
    """

    names: tuple[str, ...]
    means: FloatArray
    resampled: FloatArray

    def mean(self, name: str) -> Interval:
        """Return the mean of one method."""
        return self._interval(self._weights(name))

    def difference(self, first: str, second: str) -> Interval:
        """Return mean(first) - mean(second), paired: both see the same resampled queries."""
        return self._interval(self._weights(first) - self._weights(second))

    def recovery(self, name: str, *, stale: str = "stale", fresh: str = "fresh") -> Interval | Undefined:
        """Return (name - stale) / (fresh - stale): 0 is no better than stale, 1 as good as fresh.

        Undefined unless the interval of fresh - stale lies above 0: with a loss that may be nothing the ratio can take
        any value, and a fresh index worse than the stale one leaves nothing to recover. Resamples whose denominator is
        not positive all the same count as minus infinity for the lower end and plus infinity for the upper one, which
        widens the interval rather than flatters it.
        """
        below = self._weights(stale)
        return self._ratio(self._weights(name) - below, self._weights(fresh) - below, f"{fresh} - {stale}")

    def retention(self, name: str, *, full: str = "fresh") -> Interval | Undefined:
        """Return name / full; undefined, by the same rule as :meth:`recovery`, unless ``full`` is clearly above 0."""
        return self._ratio(self._weights(name), self._weights(full), full)

    def _weights(self, name: str) -> FloatArray:
        if name not in self.names:
            raise ConfigurationError(
                "bootstrap", expected=f"one of {list(self.names)}", got=repr(name), cure="Pass its values too."
            )
        weights = np.zeros(len(self.names))
        weights[self.names.index(name)] = 1.0
        return weights

    def _interval(self, weights: FloatArray) -> Interval:
        low, high = np.percentile(self.resampled @ weights, PERCENTILES)
        return Interval(float(self.means @ weights), float(low), float(high))

    def _ratio(self, above: FloatArray, below: FloatArray, label: str) -> Interval | Undefined:
        gap = self._interval(below)
        if gap.low <= _NEGLIGIBLE:
            found = f"{gap.estimate:.4f} [{gap.low:.4f}, {gap.high:.4f}]"
            return Undefined(f"{label} is {found} over these queries, not clearly above 0")
        above_each, below_each = self.resampled @ above, self.resampled @ below
        usable = below_each > _NEGLIGIBLE
        ratios = np.divide(above_each, below_each, out=np.zeros(len(usable)), where=usable)
        low = np.percentile(np.where(usable, ratios, -np.inf), PERCENTILES[0], method="higher")
        high = np.percentile(np.where(usable, ratios, np.inf), PERCENTILES[1], method="lower")
        return Interval(float(self.means @ above / gap.estimate), float(low), float(high))


def paired_bootstrap(
    values: Mapping[str, FloatArray], *, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Bootstrap:
    """Resample queries with replacement, the same ones for every method.

    Args:
        values: For each method one value per query, ``(queries,)``, in the same order of queries.
        generator: Source of randomness; the result depends on its state and on nothing else.
        resamples: How many times the queries are drawn.

    Returns:
        Means to read intervals of means, differences and ratios from.

    Raises:
        DataError: If there are no queries, values are not finite or lengths differ.
        ConfigurationError: If ``resamples`` is below 1.
    """
    if resamples < 1:
        raise ConfigurationError("bootstrap", expected="resamples >= 1", got=str(resamples), cure="Pass 1,000 or more.")
    columns = {name: np.asarray(column, dtype=np.float64) for name, column in values.items()}
    shapes = {column.shape for column in columns.values()}
    if len(shapes) != 1 or any(len(shape) != 1 or shape[0] == 0 for shape in shapes):
        raise DataError(
            "bootstrap", expected="one value per query for every method, of at least one query",
            got=f"shapes {sorted(shapes)}", cure="Judge every method on the same queries.",
        )  # fmt: skip
    table = np.stack(list(columns.values()), axis=1)
    if not np.isfinite(table).all():
        raise DataError("bootstrap", expected="finite values", got="NaN or infinity", cure="Count such a query as 0.")
    resampled = _resampled_means(table, generator, resamples)
    return Bootstrap(names=tuple(columns), means=table.mean(axis=0), resampled=resampled)


def _resampled_means(table: FloatArray, generator: np.random.Generator, resamples: int) -> FloatArray:
    """Return the mean of each resample, ``(resamples, methods)``, in blocks of bounded memory."""
    queries = len(table)
    block = max(1, _BLOCK_BYTES // (24 * queries))  # drawn rows, their bin numbers and their counts: 8 bytes each
    means = np.empty((resamples, table.shape[1]))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(queries, size=(size, queries))
        drawn += np.arange(size)[:, None] * queries
        counts = np.bincount(drawn.ravel(), minlength=size * queries).reshape(size, queries)
        means[start : start + size] = counts @ table / queries
    return means
