"""The card: its metadata for the Hub, and its text from a template and the tables of a record."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_corrector.cards import tables
from hf_corrector.cards.tables import MISSING
from hf_corrector.records import RunRecord, shareable
from hf_corrector.version import __version__

TAGS = ("target-corrector", "embedding-adapter", "feature-extraction")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Encoders in folders are recorded by the folder's own name, which has no slash.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SETTINGS = (
    "num_pairs", "kind", "side", "pairs", "direction", "judged_targets", "judge_queries", "split", "negatives",
    "num_negatives", "staleness", "corrector_kind", "corrector_side", "corrector_window", "corrector_update_steps",
    "max_steps", "learning_rate", "warmup_steps", "per_device_train_batch_size", "num_layers", "max_length", "pooling",
    "query_prompt", "target_prompt", "compute_dtype", "bf16", "slice_by",
)  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """What no run knows of itself.

    Attributes:
        license: Licence of the weights, as the Hub abbreviates it, for instance ``"apache-2.0"``.
        datasets: Hub ids of the data it was fitted and judged on.
        language: Codes of the languages of the texts.
        stale_name: What to call the old encoder, where the run knew it by a folder alone; best its Hub id.
        fresh_name: The same of the new one.
        data_license: Licence of the texts it was fitted and judged on, in words.
        data_note: What else is to be known of them, for instance how much of each was read.
    """

    license: str | None = None
    datasets: Sequence[str] = ()
    language: Sequence[str] = ()
    stale_name: str | None = None
    fresh_name: str | None = None
    data_license: str | None = None
    data_note: str | None = None

    def name_encoders(self, corrector: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a corrector says of itself, with these names of its encoders."""
        named = dict(corrector)
        for key, name in (("stale_encoder", self.stale_name), ("fresh_encoder", self.fresh_name)):
            if name is not None and named.get(key):
                named[key] = {**named[key], "name": name}
        return named


def card_of_run(record: RunRecord, facts: CardFacts | None = None, *, of_encoder: bool = False) -> str:
    """Write the card of what a run saved.

    What the record does not say is printed as missing. Where the card will be loaded from is left open, as
    ``PATH_OR_HUB_ID``; a push fills it in.

    Args:
        record: The run.
        facts: What only its author knows.
        of_encoder: Whether it is the card of a dual encoder that was trained rather than of the corrector.
    """
    facts = CardFacts() if facts is None else facts
    corrector, is_encoder = facts.name_encoders(described(record)), of_encoder
    stale, fresh = _encoder(corrector, "stale_encoder"), _encoder(corrector, "fresh_encoder")
    title = _title(stale, fresh, is_encoder=is_encoder)
    kwargs = {
        **_common(corrector, facts, is_encoder=is_encoder), "title": title, "recorded": True,
        "sentence": record.verdict.get("sentence"), "results": tables.results(record),
        "counts": tables.counts(record), "checks": tables.checks(record), "slices": tables.slices(record),
        "worst": tables.worst_slice(record), "costs": tables.costs(record),
        "data": tables.data(record, facts.data_license), "data_note": facts.data_note,
        **how_it_was_made(record, _SETTINGS),
    }  # fmt: skip
    metadata = _metadata(record, facts, title=title, encoders=(stale, fresh), is_encoder=is_encoder)
    return render(metadata, kwargs)


def card_of_corrector(corrector: Mapping[str, Any]) -> str:
    """Write the card of a corrector of whose run nothing is known.

    Args:
        corrector: What it says of itself, see :meth:`CorrectorModel.describe`.
    """
    return _unrecorded(corrector, is_encoder=False)


def card_of_dual_encoder(corrector: Mapping[str, Any]) -> str:
    """Write the card of a dual encoder of whose training nothing is known.

    Args:
        corrector: What its corrector says of itself; empty without one.
    """
    return _unrecorded(corrector, is_encoder=True)


def how_it_was_made(record: RunRecord, settings: Sequence[str]) -> dict[str, Any]:
    """Return what every card says of a run, with those of the settings that were given."""
    given = {name: record.arguments[name] for name in settings if record.arguments.get(name) not in (None, [], "")}
    return {
        "settings": tables.pairs(given), "command": record.command, "seed": record.seed,
        "machine": record.machine or MISSING,
        "date": datetime.fromtimestamp(record.created, tz=UTC).strftime("%Y-%m-%d"),
        "versions": ", ".join(f"{name} {value}" for name, value in record.versions.items()) or MISSING,
    }  # fmt: skip


def _unrecorded(corrector: Mapping[str, Any], *, is_encoder: bool) -> str:
    stale, fresh = _encoder(corrector, "stale_encoder"), _encoder(corrector, "fresh_encoder")
    title = _title(stale, fresh, is_encoder=is_encoder)
    kwargs = {**_common(corrector, CardFacts(), is_encoder=is_encoder), "title": title, "recorded": False}
    metadata = ModelCardData(
        library_name="hf_corrector", tags=list(TAGS), pipeline_tag="feature-extraction",
        **base_models((stale, fresh), relation=_relation(is_encoder)),
    )  # fmt: skip
    return render(metadata, kwargs)


def render(metadata: ModelCardData, kwargs: Mapping[str, Any], *, template: str = "card.md.jinja") -> str:
    """Fill in a template of this folder."""
    words = resources.files("hf_corrector.cards").joinpath(template).read_text(encoding="utf-8")
    text = str(ModelCard.from_template(metadata, template_str=words, **kwargs))
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def _common(corrector: Mapping[str, Any], facts: CardFacts, *, is_encoder: bool) -> dict[str, Any]:
    return {
        "is_encoder": is_encoder, "corrector": corrector, "has_corrector": "kind" in corrector,
        "direction": corrector.get("direction", "targets"), "side": corrector.get("side"),
        "encoders": tables.encoders(corrector), "input_dim": corrector.get("input_dim"),
        "output_dim": corrector.get("output_dim"), "described": tables.corrector(corrector),
        "license_text": facts.license or MISSING, "writer": __version__,
    }  # fmt: skip


def _metadata(
    record: RunRecord, facts: CardFacts, *, title: str, encoders: tuple[dict[str, Any], dict[str, Any]],
    is_encoder: bool,
) -> ModelCardData:  # fmt: skip
    task = "question-answering" if "questions" in record.evaluation else "information-retrieval"
    results = eval_results(record, "fresh" if is_encoder else "corrected", task=task)
    return ModelCardData(
        library_name="hf_corrector", tags=list(TAGS), pipeline_tag="feature-extraction", license=facts.license,
        datasets=list(facts.datasets) or None, language=list(facts.language) or None,
        eval_results=results or None, model_name=title, **base_models(encoders, relation=_relation(is_encoder)),
    )  # fmt: skip


def eval_results(record: RunRecord, condition: str, *, task: str) -> list[EvalResult]:
    """Return what the metadata say of one condition of a judgement, for instance ``"fresh"``."""
    data = tables.data_name(record) or "unknown"
    return [
        EvalResult(
            task_type=task, task_name=task.replace("-", " ").title(), dataset_type=data, dataset_name=data,
            dataset_split=record.arguments.get("judged_split"), metric_type=name,
            metric_name=f"{tables.metric_name(name)}, {tables.CONDITIONS[condition]}", metric_value=one["estimate"],
            metric_args={"low": one["low"], "high": one["high"], "interval": "95 %"},
        )
        for name, one in record.evaluation.get("intervals", {}).get(condition, {}).items()
    ]  # fmt: skip


def base_models(parts: Sequence[Mapping[str, Any]], *, relation: str) -> dict[str, Any]:
    """Name the parts the Hub knows: those that came from it at a commit, or were named as it names them."""
    came = [one.get("name", "") for one in parts if _COMMIT.fullmatch(str(one.get("revision") or ""))]
    named = [one["name"] for one in parts if _HUB_ID.fullmatch(str(one.get("name", "")))]
    known = list(dict.fromkeys([*came, *named]))
    return {"base_model": known, "base_model_relation": relation} if known else {}


def _relation(is_encoder: bool) -> str:
    # Of an encoder trained here, the fresh one is the card's own.
    return "finetune" if is_encoder else "adapter"


def described(record: RunRecord) -> dict[str, Any]:
    """Return what the corrector says of itself; the old encoder is that of the cache where it says nothing."""
    if "stale_encoder" in record.corrector or not record.manifests:
        return record.corrector
    return {**record.corrector, "stale_encoder": shareable(record.manifests[0]["fingerprint"])}


def _encoder(corrector: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(corrector.get(name) or {})


def _title(stale: Mapping[str, Any], fresh: Mapping[str, Any], *, is_encoder: bool) -> str:
    old, new = stale.get("name", "an unnamed encoder"), fresh.get("name", "another")
    if is_encoder:
        return f"Dual encoder trained from {old}" if stale else "Dual encoder"
    if stale and fresh and old == new:
        return f"Corrector from {old} to the same trained further"
    return f"Corrector from {old} to {new}"
