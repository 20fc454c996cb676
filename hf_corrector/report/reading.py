"""From ``run.json`` to what a report shows: every value is checked once, here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from hf_corrector.errors import InputError
from hf_corrector.records import RECORD_FILE, RunRecord
from hf_corrector.report.facts import (
    LABELS,
    Check,
    Condition,
    Example,
    Examples,
    RecoveryPoint,
    Result,
    Run,
    Slice,
)
from hf_corrector.report.nodes import Level, Node, clean_text

DRIFT = ("cosine_stale_fresh", "cosine_corrected_fresh", "sampling_tv", "residual_uniform", "loss")
_TRAINING = ("train", "demo")
_LONGEST_VALUE = 300


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read the records of some runs.

    Args:
        folders: Folders of runs, or their ``run.json``.

    Raises:
        InputError: If there is none, one is no record, or it is damaged; names file and place.
    """
    if not folders:
        raise InputError("report", expected="at least one run", got="none", cure=f"Name folders with {RECORD_FILE}.")
    places = [Path(one).parent if Path(one).name == RECORD_FILE else Path(one) for one in folders]
    return [read_run(place, label=label) for place, label in zip(places, _labels(places), strict=True)]


def read_run(folder: Path, *, label: str) -> Run:
    """Read one record.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        raise InputError(
            str(folder), expected=f"the folder of a run, with {RECORD_FILE}", got="no such file",
            cure="Name the --output_dir of train, demo, evaluate, plan or upgrade.",
        )  # fmt: skip
    record = Node(asdict(RunRecord.load(folder)), str(path))
    evaluation, verdict = record.get("evaluation"), record.get("verdict")
    sentence = next((one for one in (verdict.get("sentence"), evaluation.get("sentence")) if not one.missing), None)
    plan = evaluation.get("plan")
    decision = plan.get("verdict") if verdict.get("decision").missing else verdict.get("decision")
    metrics, metric = _metrics(record)
    clean = evaluation.get("intervals")
    return Run(
        label=label, command=record.get("command").text(), sentence="" if sentence is None else sentence.text(),
        decision="" if decision.missing else decision.text(),
        checks=tuple(
            Check(one.get("rule").text(), one.get("passed").flag(), one.get("found").text())
            for one in verdict.get("checks").entries()
        ),
        metric=metric, metrics=metrics, note=_note(record), interval=_interval(plan),
        conditions=_conditions(record, metric, clean=not clean.missing),
        slices=tuple(_slice(one) for one in verdict.get("slices").entries()),
        points=_points(record), drift=_drift(record.get("history")),
        fidelity={
            name: {key: value.number() for key, value in one.members()}
            for name, one in record.get("fidelity").members()
        },
        examples=_examples(record.get("examples")), facts=_facts(record),
    )  # fmt: skip


def _labels(places: Sequence[Path]) -> list[str]:
    """Name runs by their folders, by more of the path where these are equal."""
    resolved = [place.resolve() for place in places]
    if len(set(resolved)) < len(resolved):
        raise InputError(
            "report", expected="different runs", got=" ".join(map(str, places))[:200], cure="Name each run once."
        )
    depth = 1
    while len({one.parts[-depth:] for one in resolved}) < len(resolved):
        depth += 1
    return [clean_text("/".join(one.parts[-depth:])) for one in resolved]


def _metrics(record: Node) -> tuple[tuple[str, ...], str]:
    """Return everything measured, and the primary metric."""
    evaluation = record.get("evaluation")
    if not evaluation.get("plan").get("quality").missing:
        return ("mrr@10",), "mrr@10"
    measured = next((one for _, one in evaluation.get("all_queries").members()), Node({}, ""))
    names = tuple(name for name, _ in measured.members())
    given = [evaluation.get("primary"), record.get("arguments").get("primary")]
    primary = next((one.text() for one in given if not one.missing), "mrr@10")
    return names, primary if primary in names else next(iter(names), "")


def _note(record: Node) -> str:
    """Say what must be known of a run's numbers of quality."""
    evaluation = record.get("evaluation")
    if not evaluation.get("plan").get("quality").missing:
        return "Old and stale indexes are judged on clean queries; corrected (as planned) and fresh ones are forecast."
    queries, clean = evaluation.get("queries"), evaluation.get("clean_queries")
    if queries.missing or clean.missing:
        return ""
    counted = f"{clean.count():,} clean of {queries.count():,} queries."
    if not clean.count():
        return f"{counted} Means are of all queries, flattered by targets the corrector was fitted on; no intervals."
    judged, targets = record.get("arguments").get("judged_targets"), _targets(record)
    if not judged.missing and targets is not None and judged.count() < targets:
        counted += f" Judged on {judged.count():,} of {targets:,} targets: compare rows, not levels."
    return counted


def _interval(plan: Node) -> str:
    for _, one in plan.get("quality").members():
        return f"{100 * one.get('level').number():g} % intervals of forecasts"
    return "95 % intervals by resampling queries"


def _targets(record: Node) -> int | None:
    """Return the number of targets, as the first manifest has it."""
    for manifest in record.get("manifests").entries():
        return manifest.get("rows").count()
    return None


def _conditions(record: Node, metric: str, *, clean: bool) -> tuple[Condition, ...]:
    """Return what was compared, in the order of the record but for fresh, which is last."""
    evaluation, found = record.get("evaluation"), []
    quality = evaluation.get("plan").get("quality")
    if not quality.missing:
        words = {"corrected": "corrected (forecast)", "fresh": "fresh (forecast)"}
        return tuple(
            Condition(name, words.get(name, LABELS.get(name, name)), {metric: one.level()})
            for name, one in quality.members()
        )
    rows = list(record.get("rows").entries())
    if rows:
        return tuple(_row(row) for row in rows)
    measured = evaluation.get("intervals" if clean else "all_queries")
    recoveries, passes = evaluation.get("comparisons").get("recovery"), _passes(record)
    for name, values in measured.members():
        recovery, reason = _recovery(recoveries.get(name).get(metric))
        found.append(
            Condition(
                name, LABELS.get(name, name), {key: one.level() for key, one in values.members()}, recovery, reason,
                passes.get(name),
            )
        )  # fmt: skip
    return tuple(found)


def _row(row: Node) -> Condition:
    """Read a row of an upgrade."""
    recovery, reason = _recovery(row.get("recovery"))
    return Condition(
        row.get("method").text(), row.get("label").text(),
        {name: one.level() for name, one in row.get("metrics").members()}, recovery, reason,
        row.get("passes").count(), row.get("passes_per_query").count(),
    )  # fmt: skip


def _recovery(node: Node) -> tuple[Level | None, str]:
    if node.missing:
        return None, ""
    reason = node.get("reason")
    return (node.level(), "") if reason.missing else (None, reason.text())


def _passes(record: Node) -> Mapping[str, int | None]:
    """Return encoder passes over targets by condition, where the record says enough: of training, up to that index."""
    if record.get("command").text() not in _TRAINING:
        return {}
    cost = record.get("cost")
    kinds = ("initial_target_passes", "train_target_passes", "refresh_target_passes", "rerank_target_passes")
    if any(cost.get(name).missing for name in (*kinds, "final_target_passes")):
        return {}
    trained = sum(cost.get(name).count() for name in kinds)
    passes = dict.fromkeys(("stale", "corrected"), trained)
    return {**passes, "fresh": trained + cost.get("final_target_passes").count()}


def _slice(row: Node) -> Slice:
    return Slice(
        row.get("slice").text(), row.get("queries").count(),
        {name: value.number() for name, value in row.get("means").members()}, row.get("difference").level(),
        row.get("against").text(), row.get("judged").flag(),
    )  # fmt: skip


def _points(record: Node) -> tuple[RecoveryPoint, ...]:
    """Return recovery by pairs: every family's forecasts of a plan, or what an upgrade measured."""
    found = []
    for family in record.get("evaluation").get("plan").get("families").entries():
        name, pairs = family.get("name").text(), list(family.get("pairs").entries())
        recoveries = list(family.get("recoveries").entries())
        if len(pairs) != len(recoveries):
            raise InputError(
                family.where, expected="as many recoveries as numbers of pairs",
                got=f"{len(recoveries)} and {len(pairs)}", cure="Restore run.json.",
            )  # fmt: skip
        found += [
            RecoveryPoint(name, name, count.count(), one.level(), True)
            for count, one in zip(pairs, recoveries, strict=True)
        ]  # fmt: skip
    number = record.get("arguments").get("num_pairs")
    for row in [] if number.missing else record.get("rows").entries():
        recovery, _ = _recovery(row.get("recovery"))
        if recovery is not None and row.get("passes").count() == number.count():
            method, label = row.get("method").text(), row.get("label").text()
            found.append(RecoveryPoint(method, label, number.count(), recovery, False))
    return tuple(found)


def _drift(history: Node) -> dict[str, tuple[tuple[float, float], ...]]:
    """Return steps and values of the logged quantities that a report draws."""
    found: dict[str, list[tuple[float, float]]] = {}
    for entry in history.entries():
        for name in DRIFT:
            value, step = entry.get(name), entry.get("step")
            if not value.missing and not step.missing:
                found.setdefault(name, []).append((step.number(), value.number()))
    return {name: tuple(values) for name, values in found.items()}


def _examples(node: Node) -> Examples | None:
    if node.missing:
        return None
    return Examples(
        node.get("rule").text(), node.get("against").text(), node.get("queries").count(), node.get("helped").count(),
        node.get("harmed").count(), tuple(_example(one) for one in node.get("shown").entries()),
    )  # fmt: skip


def _example(node: Node) -> Example:
    return Example(
        node.get("chosen").text(), node.get("query").text(), _results(node.get("relevant")),
        node.get("relevant_count").count(), {name: one.number() for name, one in node.get("values").members()},
        {name: _results(one) for name, one in node.get("results").members()},
    )  # fmt: skip


def _results(node: Node) -> tuple[Result, ...]:
    return tuple(
        Result(one.get("id").text(), one.get("text").text(), one.get("relevant").flag()) for one in node.entries()
    )


def _facts(record: Node) -> dict[str, dict[str, str]]:
    """Return tables of names and values in words."""
    try:
        when = datetime.fromtimestamp(record.get("created").number(), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError) as error:
        raise InputError(
            f"{record.where}, created", expected="a time", got=str(error), cure="Restore run.json."
        ) from error
    targets = _targets(record)
    return {
        "run": {
            "command": record.get("command").text(), "written": when, "seed": str(record.get("seed").count()),
            "targets": "" if targets is None else f"{targets:,}", "machine": record.get("machine").text(),
        },
        "cost": {name.replace("_", " "): f"{one.count():,}" for name, one in record.get("cost").members()},
        "timing": {name.replace("_", " "): f"{one.number():,.1f}" for name, one in record.get("timing").members()},
        "versions": {name: one.text() for name, one in record.get("versions").members()},
        "arguments": {name: _plain(one) for name, one in record.get("arguments").members()},
    }  # fmt: skip


def _plain(node: Node) -> str:
    """Write any JSON value as short text."""
    text = node.value if isinstance(node.value, str) else json.dumps(node.value, ensure_ascii=False)
    text = clean_text(text)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
