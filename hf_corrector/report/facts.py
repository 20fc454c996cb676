"""What a report shows of one run, as plain frozen data; how it is read off a record is in :mod:`.reading`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hf_corrector.report.nodes import Level

# What is measured in every run, in the order of every table; other conditions stand between "corrected" and "fresh".
LABELS = {"old": "old model kept", "stale": "stale", "corrected": "corrected", "fresh": "fresh"}


@dataclass(frozen=True)
class Condition:
    """One way to search, and what it is worth.

    Attributes:
        name: ``"stale"``, ``"corrected"``, ``"fresh"``, ``"old"`` or another method.
        label: What tables call it.
        metrics: Quality by metric.
        recovery: Share of the loss won back, of the primary metric; None where there is none to be won.
        no_recovery: Why it cannot be said, where that was recorded.
        passes: Encoder passes over targets that it takes; None where not recorded.
        passes_per_query: Passes over targets that every search costs.
    """

    name: str
    label: str
    metrics: Mapping[str, Level]
    recovery: Level | None = None
    no_recovery: str = ""
    passes: int | None = None
    passes_per_query: int = 0


@dataclass(frozen=True)
class Slice:
    """A group of queries.

    Attributes:
        name: Field and value.
        queries: Clean queries in it.
        means: Mean of the primary metric by condition.
        difference: Corrected minus ``against``.
        against: What it is compared with.
        judged: Whether there were enough queries to judge by.
    """

    name: str
    queries: int
    means: Mapping[str, float]
    difference: Level
    against: str
    judged: bool


@dataclass(frozen=True)
class Result:
    """A target that was found.

    Attributes:
        id: Its id.
        text: The beginning of its text.
        relevant: Whether it answers the query.
    """

    id: str
    text: str
    relevant: bool


@dataclass(frozen=True)
class Example:
    """A judged query.

    Attributes:
        chosen: Why it is shown.
        query: Its text.
        relevant: Some of what answers it.
        relevant_count: How many targets answer it.
        values: Primary metric by condition.
        results: Best targets by condition.
    """

    chosen: str
    query: str
    relevant: tuple[Result, ...]
    relevant_count: int
    values: Mapping[str, float]
    results: Mapping[str, tuple[Result, ...]]


@dataclass(frozen=True)
class Examples:
    """All examples of a run.

    Attributes:
        rule: How they were chosen, in words.
        against: What correction is compared with.
        queries: Of how many queries.
        helped: How many of these correction helped.
        harmed: How many it harmed.
        shown: The examples.
    """

    rule: str
    against: str
    queries: int
    helped: int
    harmed: int
    shown: tuple[Example, ...]


@dataclass(frozen=True)
class RecoveryPoint:
    """Recovery with so many fitting pairs.

    Attributes:
        method: Kind of corrector, or ``"corrected"`` for the one that was chosen.
        label: What tables call it.
        pairs: Fitting pairs.
        recovery: Share of the loss won back.
        forecast: Whether that is expected rather than measured.
    """

    method: str
    label: str
    pairs: int
    recovery: Level
    forecast: bool


@dataclass(frozen=True)
class Check:
    """A rule of the verdict.

    Attributes:
        rule: Its name.
        passed: Whether it holds.
        found: What was found.
    """

    rule: str
    passed: bool
    found: str


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        label: What the page calls it.
        command: What was run.
        sentence: The verdict; empty where none was recorded.
        decision: ``"go"`` and the like; empty where none was asked for.
        checks: What the decision rests on.
        metric: The primary metric; empty where nothing was judged.
        metrics: Everything measured.
        note: What must be known of all its numbers of quality.
        interval: What its intervals are.
        conditions: What was compared.
        slices: Groups of queries, worst first.
        points: Recovery by fitting pairs.
        drift: By logged quantity: steps and values.
        fidelity: By condition: how close sampling is.
        examples: Example queries; None where there are none.
        facts: By table (costs, seconds, versions, arguments, …): name and value in words.
    """

    label: str
    command: str
    sentence: str
    decision: str
    checks: tuple[Check, ...]
    metric: str
    metrics: tuple[str, ...]
    note: str
    interval: str
    conditions: tuple[Condition, ...]
    slices: tuple[Slice, ...]
    points: tuple[RecoveryPoint, ...]
    drift: Mapping[str, tuple[tuple[float, float], ...]]
    fidelity: Mapping[str, Mapping[str, float]]
    examples: Examples | None
    facts: Mapping[str, Mapping[str, str]]
