"""Judge stale, corrected, fresh and old indexes on the same queries, and say what correction recovers.

The conditions, all with human judgements as the measure:

* ``stale``: queries of the new encoder, targets of the old one;
* ``corrected``: queries of the new encoder, corrected targets;
* ``fresh``: queries and targets of the new encoder;
* ``old``: queries and targets of the old encoder, the model kept.

Others may stand beside them, for instance one for each kind of corrector; they are treated like ``corrected``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.evaluation.verdict_words import number, opposite, percent, spread
from hf_corrector.index.base import TargetVectors
from hf_corrector.index.exact import DEFAULT_BUDGET_BYTES, ExactIndex
from hf_corrector.metrics import (
    DEFAULT_METRICS,
    RESAMPLES,
    Bootstrap,
    FloatArray,
    IntArray,
    Interval,
    Relevant,
    Undefined,
    metric_name,
    paired_bootstrap,
    parse_metric,
    quality,
)  # fmt: skip

Condition: TypeAlias = tuple[torch.Tensor, TargetVectors]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Statistic = TypeVar("Statistic", Interval, Interval | Undefined)

# How much of every ranking is kept, for examples.
SHOWN = 5
_RESERVED = (
    "clean_queries", "queries", "intervals", "differences", "recovery", "retention", "comparisons", "all_queries",
    "primary",
)  # fmt: skip


@dataclass(frozen=True)
class JudgeOptions:
    """How :func:`judge` measures.

    Attributes:
        metrics: What is measured.
        primary: The metric the sentence speaks of; one of ``metrics``.
        resamples: Resamples of queries behind each interval.
        seed: Seed of the resampling.
        budget_bytes: Working memory of a search.
        device: Where scores are computed; must know float64.
        progress: Show a progress bar for each search.
    """

    metrics: tuple[str, ...] = DEFAULT_METRICS
    primary: str = "mrr@10"
    resamples: int = RESAMPLES
    seed: int = 0
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    device: torch.device | str = "cpu"
    progress: bool = False


@dataclass(frozen=True, eq=False)
class Judgement:
    """What was measured. Of clean queries only, but for ``all_queries`` and what has a line per query.

    Attributes:
        metrics: What was measured.
        primary: The metric :meth:`sentence` speaks of.
        queries: Number of queries.
        clean_queries: Number of queries none of whose positives took part in fitting.
        means: ``means[condition][metric]``; empty if no query is clean, as are the next three.
        differences: ``differences["fresh-stale"][metric]``, paired.
        recovery: ``recovery[condition][metric]`` for all but stale and fresh; empty if either is missing.
        retention: ``retention[condition][metric]``, the share of fresh, for all but fresh; empty if fresh is missing.
        all_queries: ``all_queries[condition][metric]``, plain means over all queries.
        per_query: ``per_query[condition][metric]``, values of all queries, ``(queries,)``.
        clean: Which queries are clean, ``(queries,)``.
        ranked: ``ranked[condition]``, the rows of the best targets of all queries, ``(queries, at most SHOWN)``; empty
            where only values were compared.
    """

    metrics: tuple[str, ...]
    primary: str
    queries: int
    clean_queries: int
    means: Mapping[str, Mapping[str, Interval]]
    differences: Mapping[str, Mapping[str, Interval]]
    recovery: Mapping[str, Mapping[str, Interval | Undefined]]
    retention: Mapping[str, Mapping[str, Interval | Undefined]]
    all_queries: Mapping[str, Mapping[str, float]]
    per_query: Mapping[str, Mapping[str, FloatArray]] = field(repr=False)
    clean: BoolArray = field(repr=False)
    ranked: Mapping[str, IntArray] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: one entry per condition, counts, intervals; ``None`` where nothing can be said."""
        names = list(self.all_queries)
        return {
            **{name: self._clean_means(name) for name in names},
            "clean_queries": self.clean_queries,
            "queries": self.queries,
            "primary": self.primary,
            "intervals": _plain(self.means),
            "differences": _plain(self.differences),
            "recovery": _plain(self.recovery).get("corrected", {}),
            "retention": _plain(self.retention).get("corrected", {}),
            "comparisons": {"recovery": _plain(self.recovery), "retention": _plain(self.retention)},
            "all_queries": {name: dict(self.all_queries[name]) for name in names},
        }

    def _clean_means(self, name: str) -> dict[str, float | None]:
        if not self.means:
            return dict.fromkeys(self.metrics)
        return {metric: self.means[name][metric].estimate for metric in self.metrics}

    def table(self) -> str:
        """Return an aligned table for a terminal: means, below each its 95 % interval, then recovery."""
        return _table(self)

    def sentence(self) -> str:
        """Say in one sentence what was lost, what correction recovered and whether the old model is better."""
        return _sentence(self)


def judge(
    conditions: Mapping[str, Condition], relevant: Relevant, *, clean: BoolArray, options: JudgeOptions | None = None
) -> Judgement:
    """Search every condition exactly and compare them on the same queries.

    Means, intervals, recovery = (x - stale) / (fresh - stale) and retention = x / fresh are of the clean queries. The
    same resamples of queries serve all conditions and metrics. Ties, missing results and self-matches: see
    :mod:`hf_corrector.metrics`.

    Args:
        conditions: By name, query vectors ``(queries, dim)`` and target vectors; the same queries and targets in the
            same order in all of them. Any of the four names in the module's text may be missing.
        relevant: For each query its relevant target rows and grades.
        clean: Which queries count, ``(queries,)``; see :func:`clean_queries`.
        options: How to measure.

    Returns:
        The judgement, which prints itself.

    Raises:
        DataError: If conditions, judgements and ``clean`` do not fit together, or a query has no relevant target.
        ConfigurationError: If a metric or the name of a condition cannot be used.
    """
    options = options or JudgeOptions()
    clean = np.asarray(clean)
    _check(conditions, relevant, clean, options)
    deepest = max(parse_metric(metric)[1] for metric in options.metrics)
    per_query, ranked = {}, {}
    for name, (queries, vectors) in conditions.items():
        index = ExactIndex(vectors, budget_bytes=options.budget_bytes, device=options.device, progress=options.progress)
        rows = index.search(queries, deepest).rows.numpy()
        per_query[name], ranked[name] = quality(rows, relevant, metrics=options.metrics), rows[:, :SHOWN]
    return compare(per_query, clean=clean, options=options, ranked=ranked)


def compare(
    per_query: Mapping[str, Mapping[str, FloatArray]], *, clean: BoolArray, options: JudgeOptions,
    ranked: Mapping[str, IntArray] | None = None,
) -> Judgement:  # fmt: skip
    """Compare conditions whose quality is known already; :func:`judge` without the searches.

    Args:
        per_query: ``per_query[condition][metric]``, values of the same queries, ``(queries,)``.
        clean: Which queries count, ``(queries,)``.
        options: Metrics, resamples and seed.
        ranked: What to keep as :attr:`Judgement.ranked`.

    Raises:
        DataError: If lengths differ.
    """
    bootstraps = _resample(per_query, clean, options) if clean.any() else {}
    names = list(per_query)
    methods = [name for name in names if name not in ("stale", "fresh")]
    full = [name for name in names if name != "fresh"] if "fresh" in names else []
    gaps = methods if {"stale", "fresh"} <= set(names) else []
    return Judgement(
        metrics=tuple(options.metrics), primary=options.primary, queries=len(clean), clean_queries=int(clean.sum()),
        means=_each(names, bootstraps, lambda bootstrap, name: bootstrap.mean(name)),
        differences=_differences(names, bootstraps),
        recovery=_each(gaps, bootstraps, lambda bootstrap, name: bootstrap.recovery(name)),
        retention=_each(full, bootstraps, lambda bootstrap, name: bootstrap.retention(name)),
        all_queries={n: {metric: float(x.mean()) for metric, x in v.items()} for n, v in per_query.items()},
        per_query=per_query, clean=clean, ranked={} if ranked is None else ranked,
    )  # fmt: skip


def clean_queries(relevant: Relevant, fitted_rows: Iterable[int]) -> BoolArray:
    """Find the queries none of whose positives the corrector was fitted on.

    A corrector has seen the fresh vectors of its fitting pairs, so queries that look for those targets flatter it.

    Args:
        relevant: For each query its relevant target rows and grades.
        fitted_rows: Target rows of the fitting pairs, in any order.

    Returns:
        True for clean queries, ``(queries,)``.
    """
    fitted = set(np.asarray(fitted_rows if isinstance(fitted_rows, np.ndarray) else list(fitted_rows)).tolist())
    clean = [not any(grade > 0 and row in fitted for row, grade in judged.items()) for judged in relevant]
    return np.array(clean, dtype=np.bool_)


def _check(conditions: Mapping[str, Condition], relevant: Relevant, clean: BoolArray, options: JudgeOptions) -> None:
    queries = len(relevant)
    if options.primary not in options.metrics:
        raise ConfigurationError(
            "judge", expected=f"the primary metric among {list(options.metrics)}", got=repr(options.primary),
            cure="Add it to metrics.",
        )  # fmt: skip
    if not conditions or any(name in _RESERVED for name in conditions):
        raise ConfigurationError(
            "judge", expected=f"at least one condition, none called {' or '.join(_RESERVED)}",
            got=str(list(conditions)), cure="Pass for instance stale, corrected and fresh.",
        )  # fmt: skip
    if clean.dtype != np.bool_ or clean.shape != (queries,):
        raise DataError(
            "clean", expected=f"{queries} booleans, one per query", got=f"{clean.dtype} of shape {clean.shape}",
            cure="Use clean_queries(relevant, fitted_rows).",
        )  # fmt: skip
    sizes = {name: (len(vectors), len(given)) for name, (given, vectors) in conditions.items()}
    if queries == 0 or len(set(sizes.values())) > 1 or any(size[1] != queries for size in sizes.values()):
        raise DataError(
            "judge", expected=f"the same targets and {queries} (at least one) queries in every condition",
            got=f"targets and queries {sizes}", cure="Encode the same queries and targets for every condition.",
        )  # fmt: skip
    targets = next(iter(sizes.values()))[0]
    for query, judged in enumerate(relevant):
        known = [row for row, grade in judged.items() if grade > 0]
        if not known or not 0 <= min(known) <= max(known) < targets:
            raise DataError(
                f"judgements of query {query}", expected=f"at least one relevant target, rows from 0 to {targets - 1}",
                got=str(known[:5]), cure="Leave out queries that nothing in the corpus answers.",
            )  # fmt: skip


def _resample(
    per_query: Mapping[str, Mapping[str, FloatArray]], clean: BoolArray, options: JudgeOptions
) -> dict[str, Bootstrap]:
    """Return for each metric a bootstrap over conditions, all from the same resamples."""
    names = tuple(per_query)
    columns = {f"{metric} of {name}": per_query[name][metric][clean] for metric in options.metrics for name in names}
    whole = paired_bootstrap(columns, generator=np.random.default_rng(options.seed), resamples=options.resamples)
    parts = {}
    for place, metric in enumerate(options.metrics):
        own = slice(place * len(names), (place + 1) * len(names))
        parts[metric] = Bootstrap(names, whole.means[own], whole.resampled[:, own])
    return parts


def _each(
    names: Iterable[str], bootstraps: Mapping[str, Bootstrap], statistic: Callable[[Bootstrap, str], Statistic]
) -> dict[str, dict[str, Statistic]]:
    if not bootstraps:
        return {}
    return {name: {metric: statistic(bootstrap, name) for metric, bootstrap in bootstraps.items()} for name in names}


def _differences(names: list[str], bootstraps: Mapping[str, Bootstrap]) -> dict[str, dict[str, Interval]]:
    """Compare everything with stale, and the old model with everything."""
    pairs = [(name, "stale") for name in names if name != "stale" and "stale" in names]
    pairs += [("old", name) for name in names if name not in ("old", "stale") and "old" in names]
    if not bootstraps:
        return {}
    return {
        f"{first}-{second}": {metric: part.difference(first, second) for metric, part in bootstraps.items()}
        for first, second in pairs
    }


def _plain(
    statistics: Mapping[str, Mapping[str, Interval | Undefined]],
) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: {metric: dict(x.to_dict()) for metric, x in row.items()} for name, row in statistics.items()}


def _table(judgement: Judgement) -> str:
    """Lay out means, intervals and recovery in columns."""
    head = f"{judgement.clean_queries:,} clean of {judgement.queries:,} queries"
    rows = [["", *(metric_name(metric) for metric in judgement.metrics)]]
    notes = []
    if judgement.means:
        head += "; mean and 95 % interval"
        for name, means in judgement.means.items():
            intervals = [means[metric] for metric in judgement.metrics]
            rows.append([name, *(number(x.estimate) for x in intervals)])
            rows.append(["", *(f"[{number(x.low)}, {number(x.high)}]" for x in intervals)])
    else:
        head += "; means of all queries, flattered by targets the corrector was fitted on"
        rows += [[n, *(number(v[m]) for m in judgement.metrics)] for n, v in judgement.all_queries.items()]
    for name, recovery in judgement.recovery.items():
        if name == "old":
            continue
        known = [recovery[metric] for metric in judgement.metrics]
        rows.append([f"recovery, {name}", *("-" if isinstance(x, Undefined) else percent(x) for x in known)])
        notes += [
            f"no recovery of {metric_name(m)}: {x.reason}" for m, x in recovery.items() if isinstance(x, Undefined)
        ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    return "\n".join([head, *lines, *dict.fromkeys(notes)])


def _sentence(judgement: Judgement) -> str:
    """Join what was lost, what correction did about it and how the old model compares."""
    if not judgement.means:
        return (
            f"All {judgement.queries:,} queries look for targets the corrector was fitted on, so nothing honest can be "
            "said about what it recovers."
        )
    words = [_words_on_loss(judgement), _words_on_correction(judgement), _words_on_old(judgement)]
    return "; ".join(part for part in words if part) + "."


def _words_on_loss(judgement: Judgement) -> str:
    metric = judgement.primary
    count = f"{judgement.clean_queries:,} clean quer{'y' if judgement.clean_queries == 1 else 'ies'}"
    values = ", ".join(f"{name} {number(means[metric].estimate)}" for name, means in judgement.means.items())
    loss = judgement.differences.get("fresh-stale", {}).get(metric)
    if loss is None:
        return f"{metric_name(metric)} on {count}: {values}"
    if loss.low > 0:
        return f"The stale index loses {spread(loss)} of {metric_name(metric)} on {count} ({values})"
    if loss.high < 0:
        return (
            f"Nothing to recover: the fresh index is worse than the stale one, by {spread(opposite(loss))} of "
            f"{metric_name(metric)} on {count} ({values})"
        )
    return (
        f"Nothing to recover that {count} could show: fresh minus stale is {spread(loss)} of {metric_name(metric)} "
        f"({values})"
    )


def _words_on_correction(judgement: Judgement) -> str:
    gain = judgement.differences.get("corrected-stale", {}).get(judgement.primary)
    if gain is None:
        return ""
    recovery = judgement.recovery.get("corrected", {}).get(judgement.primary)
    if gain.low > 0:
        if isinstance(recovery, Interval):
            return f"correction recovered {percent(recovery)} of the loss without re-encoding the corpus"
        return f"correction gained {spread(gain)} over stale all the same"
    if gain.high < 0:
        return f"correction made it worse, by {spread(opposite(gain))}"
    return f"correction changed it by {spread(gain)}, which may be nothing"


def _words_on_old(judgement: Judgement) -> str:
    against = {
        name: judgement.differences[f"old-{name}"][judgement.primary]
        for name in ("fresh", "corrected")
        if f"old-{name}" in judgement.differences
    }
    if not against:
        return ""
    fresh, corrected = against.get("fresh"), against.get("corrected")
    if fresh is not None and fresh.low > 0:
        return f"keeping the old model is better even than re-encoding everything, by {spread(fresh)}"
    name = "corrected" if corrected is not None else "fresh"
    rest = against[name]
    other = "correction" if corrected is not None else "re-encoding everything"
    if rest.low > 0:
        return f"keeping the old model is better than {other}, by {spread(rest)}"
    if rest.high < 0:
        return f"keeping the old model would be worse than {other}, by {spread(opposite(rest))}"
    return f"keeping the old model may be as good as {other} (difference {spread(rest)})"
