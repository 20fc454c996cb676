"""From measurements to a decision: correct the index, keep the old model, or re-embed a part first.

The rules are data: :class:`Thresholds` with a reason for each, and the :class:`Check` of each with its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from hf_corrector.errors import ConfigurationError
from hf_corrector.evaluation.verdict_slices import MIN_SLICE_QUERIES, BoolArray, QuerySlice, SliceRow, judge_slices
from hf_corrector.evaluation.verdict_words import opposite, percent, spread
from hf_corrector.metrics import RESAMPLES, Bootstrap, FloatArray, Interval, Undefined, metric_name, paired_bootstrap

Decision = Literal["go", "no-go", "re-embed first"]
# What the command line returns; 1 and 2 are errors and wrong usage.
EXIT_CODES: dict[Decision, int] = {"go": 0, "no-go": 3, "re-embed first": 4}


@dataclass(frozen=True)
class Thresholds:
    """What a correction must reach; see :data:`REASONS`.

    Attributes:
        min_recovery: Lower bound of recovery, at least.
        non_inferiority: Corrected minus old must lie above minus this with its whole interval.
        min_retention: Lower bound of corrected / fresh, where neither a stale index nor the old model can be judged.
        max_slice_loss: A slice is harmed that loses more than this, with an interval below 0.
        min_slice_queries: Slices of fewer queries are pooled and cannot be said to be harmed.
        min_queries: Fewer clean queries than this decide nothing.
        reembed_shares: Shares of the targets that are tried, worst first, where correction alone is not enough.
    """

    min_recovery: float = 0.5
    non_inferiority: float = 0.0
    min_retention: float = 0.9
    max_slice_loss: float = 0.02
    min_slice_queries: int = MIN_SLICE_QUERIES
    min_queries: int = 30
    reembed_shares: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        shares = all(0 < share < 1 for share in self.reembed_shares)
        positive = min(self.non_inferiority, self.max_slice_loss, self.min_queries, self.min_slice_queries) >= 0
        if not (0 <= self.min_recovery <= 1 and 0 <= self.min_retention <= 1 and positive and shares):
            raise ConfigurationError(
                "thresholds", expected="recovery, retention and shares between 0 and 1, and nothing below 0",
                got=str(self), cure="Correct the value.",
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return every threshold with its reason."""
        return {
            name: {"value": list(value) if isinstance(value, tuple) else value, "reason": REASONS[name]}
            for name, value in asdict(self).items()
        }


REASONS = {
    "min_recovery": "below half of what a full re-embedding brings, an index built for one purpose serves another; "
    "the lower bound counts, as the estimate is as often too high as too low",
    "non_inferiority": "an upgrade that may be worse than doing nothing is none; raise it only where the old model "
    "cannot be kept anyway",
    "min_retention": "with nothing to compare but a full re-embedding, a loss of a tenth is what users notice",
    "max_slice_loss": "below this a slice's loss is within what judgements disagree on; a false alarm costs a look at "
    "the slice, a missed one costs its users, so the interval is not widened for the number of slices",
    "min_slice_queries": "intervals by resampling are too narrow on fewer queries",
    "min_queries": "intervals by resampling are too narrow on fewer queries",
    "reembed_shares": "beyond half, re-embedding everything is simpler and exact",
}


@dataclass(frozen=True)
class Check:
    """One rule and what it found.

    Attributes:
        rule: Name.
        passed: Whether it holds.
        found: What was found, in words.
    """

    rule: str
    passed: bool
    found: str


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is judged: the primary metric of every query under every condition that could be had.

    Attributes:
        metric: The primary metric.
        per_query: Its values under ``corrected`` and ``fresh``, and where known ``old`` and ``stale``, ``(queries,)``.
        clean: Which queries count, ``(queries,)``.
        slices: Groups that must not be harmed.
        passes: Encoder passes of correction and of a full re-embedding.
        resamples: Resamples behind each interval.
        seed: Seed of the resampling.
        direction: ``"targets"`` where the index is corrected, ``"queries"`` where new queries are mapped to the old
            index.
        counted: What the queries are called.
    """

    metric: str
    per_query: Mapping[str, FloatArray] = field(repr=False)
    clean: BoolArray = field(repr=False)
    slices: tuple[QuerySlice, ...] = ()
    passes: tuple[int, int] = (0, 0)
    resamples: int = RESAMPLES
    seed: int = 0
    direction: str = "targets"
    counted: str = "clean queries"

    def with_corrected(self, values: FloatArray) -> Evidence:
        """Return the same with other values for ``corrected``."""
        return replace(self, per_query={**self.per_query, "corrected": values})

    def bootstrap(self) -> Bootstrap:
        """Resample clean queries."""
        values = {name: column[self.clean] for name, column in self.per_query.items()}
        return paired_bootstrap(values, generator=np.random.default_rng(self.seed), resamples=self.resamples)


@dataclass(frozen=True)
class Verdict:
    """A decision and what it rests on.

    Attributes:
        decision: ``"go"``, ``"no-go"`` or ``"re-embed first"``.
        sentence: The decision in one sentence.
        checks: Every rule and what it found.
        slices: Every slice, worst first.
        reembed_share: Which share of the targets to re-embed first, where that is the decision.
        thresholds: The rules.
    """

    decision: Decision
    sentence: str
    checks: tuple[Check, ...]
    slices: tuple[SliceRow, ...]
    reembed_share: float | None
    thresholds: Thresholds

    @property
    def exit_code(self) -> int:
        """What the command line returns."""
        return EXIT_CODES[self.decision]

    @property
    def worst_slice(self) -> SliceRow | None:
        """The slice that fares worst among those with enough queries, else among all."""
        return self.slices[0] if self.slices else None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        worst = self.worst_slice
        return {
            "decision": self.decision, "sentence": self.sentence, "reembed_share": self.reembed_share,
            "worst_slice": None if worst is None else worst.to_dict(),
            "slices": [row.to_dict() for row in self.slices], "checks": [asdict(check) for check in self.checks],
            "thresholds": self.thresholds.to_dict(), "exit_code": self.exit_code,
        }  # fmt: skip


def decide(
    evidence: Evidence, thresholds: Thresholds, *, reembed: Callable[[float], FloatArray] | None = None
) -> Verdict:
    """Apply the rules.

    In this order: too few queries decide nothing; where every check passes it is a go; where one fails and not even a
    full re-embedding is shown to be better than the old model, the old one is kept, unless the new model on the stale
    index is; where nothing was lost there is nothing to correct; else shares of the targets are re-embedded, worst
    first, until every check passes, and where none is enough everything should be re-embedded.

    Args:
        evidence: What was measured.
        thresholds: The rules.
        reembed: Returns the values of the primary metric, ``(queries,)``, with that share of the targets re-embedded,
            worst first, and the others corrected; None where that is impossible.
    """
    if int(evidence.clean.sum()) < max(thresholds.min_queries, 1):
        count = int(evidence.clean.sum())
        counted = evidence.counted
        check = Check("enough queries", False, f"{count} {counted}, fewer than {thresholds.min_queries}")
        sentence = f"No-go: {count} {counted} are too few to tell; judge at least {thresholds.min_queries}."
        return Verdict("no-go", sentence, (check,), (), None, thresholds)
    case = _Case(evidence, thresholds)
    checks, rows = case.checks(), case.slice_rows
    passed = all(check.passed for check in checks)
    if not passed and case.keeps_old:
        decision, sentence, share = "no-go", case.keep_old_sentence(), None
    elif passed:
        decision, sentence, share = "go", case.go_sentence(), None
    elif case.nothing_lost:
        decision, sentence, share = "no-go", case.nothing_lost_sentence(), None
    else:
        return _reembed_first(case, checks, reembed)
    return Verdict(decision, sentence, checks, rows, share, thresholds)  # type: ignore[arg-type]


def _reembed_first(case: _Case, checks: tuple[Check, ...], reembed: Callable[[float], FloatArray] | None) -> Verdict:
    """Find the smallest share of re-embedded targets with which every check passes."""
    for share in sorted(case.thresholds.reembed_shares):
        if reembed is None:
            break
        partly = _Case(case.evidence.with_corrected(reembed(share)), case.thresholds)
        if all(check.passed for check in partly.checks()):
            sentence = case.reembed_sentence(share, partly)
            return Verdict("re-embed first", sentence, checks, case.slice_rows, share, case.thresholds)
    return Verdict("no-go", case.not_enough_sentence(), checks, case.slice_rows, None, case.thresholds)


class _Case:
    """Intervals the rules and the sentences speak of."""

    def __init__(self, evidence: Evidence, thresholds: Thresholds) -> None:
        self.evidence, self.thresholds = evidence, thresholds
        self.bootstrap = evidence.bootstrap()
        self.has_old, self.has_stale = "old" in evidence.per_query, "stale" in evidence.per_query
        self.slice_rows = tuple(
            judge_slices(
                evidence.per_query, evidence.slices, clean=evidence.clean, resamples=evidence.resamples,
                seed=evidence.seed, min_queries=thresholds.min_slice_queries,
            )
        )  # fmt: skip

    def difference(self, first: str, second: str) -> Interval:
        """Return a paired difference of means."""
        return self.bootstrap.difference(first, second)

    @property
    def recovery(self) -> Interval | Undefined:
        """What is recovered of the way from stale to fresh; from old to fresh where a stale index is impossible."""
        if not (self.has_stale or self.has_old):
            return Undefined("neither a stale index nor the old model was judged")
        start = "stale" if self.has_stale else "old"
        return self.bootstrap.recovery("corrected", stale=start)

    @property
    def harmed(self) -> list[SliceRow]:
        """Slices with enough queries that lose more than allowed, with an interval below 0."""
        worst = -self.thresholds.max_slice_loss
        return [
            row for row in self.slice_rows
            if row.judged and row.difference.high < 0 and row.difference.estimate < worst
        ]  # fmt: skip

    @property
    def keeps_old(self) -> bool:
        """Whether a full re-embedding is worse than the old model, or is not shown to be better."""
        return self.has_old and self.difference("fresh", "old").low <= 0 and not self._stale_beats_old

    @property
    def _stale_beats_old(self) -> bool:
        return self.has_stale and self.difference("stale", "old").low > 0

    @property
    def nothing_lost(self) -> bool:
        """Whether the new model on the old index loses nothing that could be shown."""
        return self.has_stale and isinstance(self.recovery, Undefined)

    def checks(self) -> tuple[Check, ...]:
        """Apply every rule to ``corrected``."""
        limits, checks = self.thresholds, []
        if self.has_old:
            gain = self.difference("corrected", "old")
            text = f"corrected − old is {spread(gain)}"
            checks.append(Check("not worse than the old model", gain.low > -limits.non_inferiority, text))
        if self.has_stale:
            gain = self.difference("corrected", "stale")
            checks.append(Check("better than the stale index", gain.low > 0, f"corrected − stale is {spread(gain)}"))
        if self.has_stale or self.has_old:
            found = self.recovery
            text = found.reason if isinstance(found, Undefined) else f"recovery is {percent(found)}"
            enough = isinstance(found, Interval) and found.low >= limits.min_recovery
            checks.append(Check(f"recovers at least {100 * limits.min_recovery:.0f} %", enough, text))
        else:
            kept = self.bootstrap.retention("corrected")
            text = kept.reason if isinstance(kept, Undefined) else f"corrected / fresh is {percent(kept)}"
            enough = isinstance(kept, Interval) and kept.low >= limits.min_retention
            checks.append(Check(f"keeps at least {100 * limits.min_retention:.0f} % of fresh", enough, text))
        if self.slice_rows:
            harmed = [f"{row.name} {spread(row.difference)}" for row in self.harmed]
            checks.append(Check("harms no slice", not harmed, "; ".join(harmed) or self._worst()))
        return tuple(checks)

    # ------------------------------------------------------------------ sentences

    def go_sentence(self) -> str:
        """Say what is gained and what it costs."""
        spent, full = self.evidence.passes
        action = "correct the index" if self.evidence.direction == "targets" else "map new queries to the old index"
        parts = [f"Go: {action}; on {self._queries()} {self._level('corrected')}, {self._against_old()}"]
        parts += [self._recovered()] if isinstance(self.recovery, Interval) else []
        parts += [f"for {spent:,} encoder passes instead of {full:,}"]
        parts += [f"and no slice is harmed ({self._worst()})"] if self.slice_rows else []
        return ", ".join(parts) + "."

    def keep_old_sentence(self) -> str:
        """Say that the new model does not pay."""
        fresh, mine = self.difference("old", "fresh"), self.difference("old", "corrected")
        if fresh.low > 0:
            why = f"by {spread(fresh)} of {self._metric()} even than re-embedding everything"
            return f"No-go: keeping the old model is better, {why}, on {self._queries()}."
        if mine.low > 0:
            return (
                f"No-go: keeping the old model is better than correction, by {spread(mine)} of {self._metric()} on "
                f"{self._queries()}, and even re-embedding everything is not shown to beat it "
                f"({spread(opposite(fresh))})."
            )
        return (
            f"No-go: keeping the old model is better, as nothing shows on {self._queries()} that the new one brings "
            f"more: fully re-embedded it changes {self._metric()} by {spread(opposite(fresh))}."
        )

    def nothing_lost_sentence(self) -> str:
        """Say that there is nothing to correct."""
        loss = self.difference("fresh", "stale")
        advice = "search the old index with the new model as it is" if self._stale_beats_old or not self.has_old else (
            "the old index serves the new model as it is"
        )  # fmt: skip
        return (
            f"No-go: there is nothing to correct; on {self._queries()} re-embedding everything changes "
            f"{self._metric()} by {spread(loss)}, so {advice}."
        )

    def reembed_sentence(self, share: float, partly: _Case) -> str:
        """Say which part to re-embed."""
        harmed = self.harmed
        if harmed and all(check.passed for check in self.checks() if check.rule != "harms no slice"):
            why = f"correction alone harms {harmed[0].name} ({spread(harmed[0].difference)})"
        else:
            why = f"correction alone does not reach the floor ({self._failed()})"
        reached = f"{self._level('corrected', partly)}"
        passes = self.evidence.passes[0] + round(share * self.evidence.passes[1])
        found = partly.recovery
        recovered = f", {percent(found)} recovered" if isinstance(found, Interval) else ""
        return (
            f"Re-embed these {100 * share:.0f} % first: {why}; with those targets re-embedded that correction is "
            f"expected to serve worst, and the others corrected, {reached}{recovered}, for about "
            f"{passes:,} encoder passes instead of {self.evidence.passes[1]:,}."
        )

    def not_enough_sentence(self) -> str:
        """Say that only a full re-embedding is enough."""
        harmed = self.harmed
        harm = f" and harms {harmed[0].name} ({spread(harmed[0].difference)})" if harmed else ""
        best = self.difference("fresh", "old") if self.has_old else None
        gain = "" if best is None else f", which beats the old model by {spread(best)}"
        return (
            f"No-go: correction is not enough on {self._queries()} ({self._failed()}){harm}, nor is a part of the "
            f"targets re-embedded first; re-embed everything{gain}, or keep the old model until then."
        )

    def _failed(self) -> str:
        failed = [check.found for check in self.checks() if not check.passed and check.rule != "harms no slice"]
        return "; ".join(failed) or "a slice is harmed"

    def _queries(self) -> str:
        return f"{int(self.evidence.clean.sum()):,} {self.evidence.counted}"

    def _metric(self) -> str:
        return metric_name(self.evidence.metric)

    def _level(self, name: str, case: _Case | None = None) -> str:
        mean = (self if case is None else case).bootstrap.mean(name)
        return f"{self._metric()} is {spread(mean)}"

    def _against_old(self) -> str:
        if not self.has_old:
            return "the old model kept could not be judged"
        gain = self.difference("corrected", "old")
        way = f"{spread(gain)} above" if gain.estimate >= 0 else f"{spread(opposite(gain))} below"
        return f"{way} the old model kept"

    def _recovered(self) -> str:
        found = self.recovery
        way = "of what the stale index loses" if self.has_stale else "of the way from the old model to a fresh index"
        return f"{percent(found)} {way} recovered" if isinstance(found, Interval) else ""

    def _worst(self) -> str:
        row = self.slice_rows[0]
        return f"worst is {row.name}, {spread(row.difference)} against {row.against} on {row.queries} queries"
