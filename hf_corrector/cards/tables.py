"""What a card shows of a record, as Markdown; all of it read from plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from hf_corrector.metrics import parse_metric
from hf_corrector.records import RunRecord

MISSING = "*missing: not recorded*"
CONDITIONS = {"old": "old model kept", "stale": "stale index", "corrected": "corrected", "fresh": "full re-embed"}
_WRITTEN = {"mrr": "MRR", "ndcg": "nDCG"}
_OF_READING = {
    "answer_log_likelihood": "log P(a|x)", "answer_log_likelihood_per_token": "the same per token",
    "exact_match": "exact match", "f1": "F1", "gold_recall@10": "gold recall@10", "attribution": "attribution",
}  # fmt: skip
_FINGERPRINT = {
    "name": "name", "revision": "revision", "weights": "weights", "tokenizer": "tokenizer", "prompt": "prompt",
    "max_length": "tokens at most", "pooling": "pooling", "normalize": "unit length",
}  # fmt: skip
_COSTS = {
    "initial_target_passes": "targets encoded for the first cache",
    "train_target_passes": "targets encoded by training steps",
    "refresh_target_passes": "targets encoded by refreshes",
    "rerank_target_passes": "targets encoded to rerank",
    "final_target_passes": "targets encoded at the end",
    "pair_target_passes": "targets encoded as fitting pairs",
    "measurement_target_passes": "targets encoded for this measurement alone",
    "probe_target_passes": "targets encoded for the corrector alone",
    "query_passes": "queries encoded",
    "reader_passes": "prompts read",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; bars in its cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(one) for one in line) + " |" for line in lines)


def pairs(values: Mapping[str, Any]) -> str:
    """Return a table of names and values."""
    return table(["", ""], [[name, _value(value)] for name, value in values.items()]) if values else MISSING


def metric_name(metric: str) -> str:
    """Write ``"mrr@10"`` as ``"MRR@10"``, and metrics of answers in words."""
    if metric in _OF_READING:
        return _OF_READING[metric]
    name, cut = parse_metric(metric)
    return f"{_WRITTEN.get(name, name)}@{cut}"


def results(record: RunRecord) -> str:
    """Return every way to go on with its intervals, or every condition of a judgement."""
    if record.rows:
        return _ways(record)
    intervals, evaluation = record.evaluation.get("intervals"), record.evaluation
    if not intervals:
        return MISSING
    metrics = list(next(iter(intervals.values())))
    rows = [
        [CONDITIONS.get(name, name), *(spread(found.get(metric)) for metric in metrics)]
        for name, found in intervals.items()
    ]
    if "corrected" in intervals:
        recovery = evaluation.get("recovery", {})
        # Of answers it is told by condition.
        recovery = recovery.get("corrected", recovery)
        rows.append(["recovery, corrected", *(_percent(recovery.get(metric)) for metric in metrics)])
    return table(["", *(metric_name(one) for one in metrics)], rows)


def _ways(record: RunRecord) -> str:
    primary = str(record.arguments.get("primary", "mrr@10"))
    head = ["", f"{metric_name(primary)} [95 %]", "recovery", "of fresh", "encoder passes", "hours", "price"]
    priced = any(row.get("price") is not None for row in record.rows)
    rows = []
    for row in record.rows:
        per_query = row.get("passes_per_query")
        passes = f"{per_query:,} a query" if per_query else f"{row.get('passes', 0):,}"
        seconds = None if per_query else row.get("seconds")
        rows.append([
            str(row.get("label", row.get("method"))), spread(row.get("metrics", {}).get(primary)),
            _percent(row.get("recovery")), _percent(row.get("retention")), passes,
            "" if seconds is None else f"{seconds / 3600:.3g}",
            "" if row.get("price") is None or per_query else f"{row['price']:.2f}",
        ])  # fmt: skip
    return table(head if priced else head[:-1], [row if priced else row[:-1] for row in rows])


def counts(record: RunRecord) -> str:
    """Say how many queries and targets it was judged on."""
    evaluation, arguments = record.evaluation, record.arguments
    asked = "questions" if "questions" in evaluation else "queries"
    if asked not in evaluation:
        return MISSING
    clean, total = evaluation.get(f"clean_{asked}"), evaluation[asked]
    text = f"Means over {clean:,} clean {asked} of {total:,}"
    if "kind" in record.corrector:
        text += ", none of whose targets the corrector was fitted on"
    rows, judged = _rows(record), arguments.get("judged_targets")
    if rows is None:
        return f"{text}."
    if judged is not None and judged < rows:
        return (
            f"{text}; judged on {judged:,} of {rows:,} targets, the same in every row. With so few to confuse them all "
            "levels are higher than on the whole corpus: compare rows, not levels."
        )
    return f"{text}, and all {rows:,} targets."


def checks(record: RunRecord) -> str:
    """Return the rules of the verdict and what each found; empty for a run without one."""
    found = record.verdict.get("checks", [])
    rows = [[one["rule"], "yes" if one["passed"] else "**no**", one["found"]] for one in found]
    return table(["rule", "holds", "found"], rows) if rows else ""


def slices(record: RunRecord) -> str:
    """Return how each slice of queries fares, worst first."""
    rows = [
        [
            one["slice"], f"{one['queries']:,}", one["against"], spread(one["difference"]), spread(one["adjusted"]),
            "yes" if one["judged"] else "too few queries",
        ]
        for one in record.verdict.get("slices", [])
    ]  # fmt: skip
    head = ["slice", "queries", "against", "difference [95 %]", "widened for all slices", "judged"]
    return table(head, rows) if rows else "*missing: no slices were looked at*"


def worst_slice(record: RunRecord) -> str | None:
    """Name the slice that fares worst, or None."""
    worst = record.verdict.get("worst_slice")
    if not worst:
        return None
    return f"`{worst['slice']}` fares worst: {spread(worst['difference'])} against {worst['against']}."


def costs(record: RunRecord) -> str:
    """Return what was encoded, and the seconds of each phase."""
    spent = {_COSTS.get(name, name): value for name, value in record.cost.items() if value}
    seconds = {f"seconds: {name.replace('_', ' ')}": f"{value:,.1f}" for name, value in record.timing.items()}
    return pairs({**spent, **seconds})


def data(record: RunRecord, licence: str | None = None) -> str:
    """Return which targets and queries it is about."""
    manifest = record.manifests[0] if record.manifests else {}
    rows = _rows(record)
    return pairs({
        "name": data_name(record) or MISSING, "licence of the texts": licence or MISSING,
        "targets": MISSING if rows is None else f"{rows:,}",
        "hash of the targets' texts": manifest.get("texts_hash", MISSING),
        "split judged on": record.arguments.get("judged_split") or MISSING,
        "queries judged on": record.evaluation.get("queries", record.evaluation.get("questions", MISSING)),
    })  # fmt: skip


def data_name(record: RunRecord) -> str:
    """Name the data, of a folder by its own name alone; empty where it is not known."""
    name = record.arguments.get("data")
    if not name:
        return ""
    return PurePath(str(name)).name if str(name).startswith(("/", "~", ".")) else str(name)


def encoders(found: Mapping[str, Any]) -> str:
    """Return both encoders side by side."""
    stale, fresh = found.get("stale_encoder") or {}, found.get("fresh_encoder") or {}
    sizes = (found.get("input_dim"), found.get("output_dim"))
    if found.get("direction") == "queries":
        sizes = sizes[::-1]
    rows = [
        [words, _known(stale, name), _known(fresh, name)] for name, words in _FINGERPRINT.items()
    ]  # fmt: skip
    rows.append(["size", *(MISSING if one is None else str(one) for one in sizes)])
    return table(["", "old (the vectors there are)", "new (the queries to come)"], rows)


def encoder(found: Mapping[str, Any]) -> str:
    """Return an encoder that stayed as it was."""
    return table(["", ""], [[words, _known(found, name)] for name, words in _FINGERPRINT.items()])


def corrector(found: Mapping[str, Any]) -> str:
    """Say in a few words what map it is."""
    if "kind" not in found:
        return MISSING
    reads = f", which also reads the targets' {found['side']}" if found.get("side") else ""
    length = "of unit length" if found.get("normalize_output") else "not normalised"
    return (
        f"a map of kind `{found.get('kind')}`{reads}, from {found.get('input_dim')} to {found.get('output_dim')} "
        f"numbers {length}; {found.get('numbers', 0):,} numbers, fitted on {found.get('fitted_pairs', 0):,} pairs"
    )


def _rows(record: RunRecord) -> int | None:
    return int(record.manifests[0]["rows"]) if record.manifests else None


def _known(fingerprint: Mapping[str, Any], name: str) -> str:
    if name not in fingerprint:
        return MISSING
    value = fingerprint[name]
    if name in ("weights", "tokenizer"):
        return f"`{str(value)[:12]}`" if value else MISSING
    if name == "revision":
        return MISSING if value is None else f"`{value}`"
    return f"`{value}`" if name == "prompt" and value else _value(value) or "none"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"


def spread(found: Mapping[str, Any] | None) -> str:
    """Write an estimate with its interval."""
    if not found or found.get("estimate") is None:
        return MISSING
    return f"{_number(found['estimate'])} [{_number(found['low'])}, {_number(found['high'])}]"


def _percent(found: Mapping[str, Any] | None) -> str:
    """Write a ratio; empty where it makes no sense for a row, words where these queries cannot tell."""
    if found is None:
        return ""
    if found.get("estimate") is None:
        return "not told by these queries"
    return f"{100 * found['estimate']:.0f} % [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
