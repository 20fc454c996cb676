"""The record of a training run, as its model card and reports read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_corrector.evaluation.staleness import StalenessReport
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.records import RunRecord
from hf_corrector.training.live_cache import LiveCache


@dataclass(frozen=True)
class RunContext:
    """What whoever started a run knows of it, and the trainer does not.

    Attributes:
        command: What was run.
        arguments: Arguments beside the trainer's own, for instance which data; JSON values.
        timing: Seconds by phase.
        measured: Targets encoded for the measurement alone.
    """

    command: str = "train"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    timing: Mapping[str, float] = field(default_factory=dict)
    measured: int = 0


@dataclass(frozen=True)
class RunState:
    """What a trainer knows of its run.

    Attributes:
        args: Its arguments.
        live: The cache in use, or None.
        corrector: The corrector, or None.
        report: The last judgement, or None.
        cost: Encoder passes by purpose.
        phases: Seconds by phase of a step.
        history: What was logged.
        scan_said: How training looked at all targets, or nothing.
    """

    args: TrainingArguments
    live: LiveCache | None
    corrector: CorrectorModel | None
    report: StalenessReport | None
    cost: Mapping[str, int]
    phases: Mapping[str, float]
    history: list[dict[str, Any]]
    scan_said: str


def record_of(state: RunState, context: RunContext) -> RunRecord:
    """Make ``run.json``; what was not judged is left out."""
    live, report = state.live, state.report
    manifests = [] if live is None else [live.first.manifest.to_dict(), live.cache.manifest.to_dict()]
    history = [{key: value for key, value in entry.items() if _is_number(value)} for entry in state.history]
    arguments = {**context.arguments, **plain_arguments(state.args), "scan_chosen": state.scan_said}
    return RunRecord(
        command=context.command, seed=state.args.seed, arguments=arguments,
        evaluation={} if report is None else report.to_dict(),
        fidelity={} if report is None else report.fidelity_dict(),
        cost={**state.cost, "measurement_target_passes": context.measured},
        timing={**context.timing, **{f"train_{name}": spent for name, spent in state.phases.items()}},
        manifests=manifests, history=history,
        verdict={} if report is None else {"sentence": report.judgement.sentence()},
        corrector={} if state.corrector is None else state.corrector.describe(),
    )  # fmt: skip


def plain_arguments(values: Any) -> dict[str, Any]:
    """Return arguments as JSON values, for a run's record."""
    # TrainingArguments writes its own dictionary because it knows which of its fields are secrets.
    given = values.to_dict() if isinstance(values, TrainingArguments) else dict(vars(values))
    return {name: value if _is_plain(value) else str(value) for name, value in sorted(given.items())}


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return value is None or isinstance(value, bool | int | str)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")
