"""The card of a retriever and the language model that reads what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from hf_corrector.cards import tables
from hf_corrector.cards.rendering import (
    CardFacts,
    base_models,
    described,
    eval_results,
    how_it_was_made,
    render,
)
from hf_corrector.cards.tables import MISSING
from hf_corrector.records import RunRecord
from hf_corrector.version import __version__

TEMPLATE = "reading_card.md.jinja"
TASK = "question-answering"
TAGS = ("retrieval-augmented-generation", "target-corrector", TASK)
_SETTINGS = (
    "objective", "objective_temperature", "reader_weight", "passages", "num_passages", "uniform_fraction", "staleness",
    "refresh_steps", "rerank_candidates", "corrector_kind", "corrector_side", "max_steps", "learning_rate",
    "generator_learning_rate", "cross_attention_learning_rate", "per_device_train_batch_size", "num_layers",
    "reader_layers", "max_length", "pooling", "query_prompt", "target_prompt", "language", "bf16",
)  # fmt: skip
_READER = {
    "reader_name": "name", "reader_type": "architecture", "reader_numbers": "numbers", "reader_prompt": "prompt",
    "reader_max_length": "tokens of a prompt at most", "answer_max_length": "tokens of an answer at most",
}  # fmt: skip


def card_of_reading_run(record: RunRecord, facts: CardFacts | None = None) -> str:
    """Write the card of the model a run of retrieval-augmented training saved.

    What the record does not say is printed as missing. Where the card will be loaded from is left open, as
    ``PATH_OR_HUB_ID``; a push fills it in.

    Args:
        record: The run.
        facts: What only its author knows; ``stale_name`` is the retriever that training started from.
    """
    facts = CardFacts() if facts is None else facts
    corrector = facts.name_encoders(described(record))
    # With this objective the retriever is not trained, and no cache of its vectors goes stale.
    frozen = record.arguments.get("objective") == "generator_only"
    kwargs = {
        **_common(corrector, record.arguments, facts), "recorded": True, "frozen": frozen,
        "trained": _how_it_was_trained(record.arguments, frozen=frozen),
        "encoder": tables.encoder(dict(corrector.get("stale_encoder") or {})),
        "results": tables.results(_judged_once(record) if frozen else record), "differences": differences(record),
        "counts": tables.counts(record), "costs": tables.costs(record),
        "data": tables.data(record, facts.data_license), "data_note": facts.data_note,
        **how_it_was_made(record, _SETTINGS),
    }  # fmt: skip
    results = eval_results(record, "fresh", task=TASK)
    return render(_metadata(corrector, record.arguments, facts, results=results), kwargs, template=TEMPLATE)


def card_of_retrieval_augmented(reader: Mapping[str, Any], corrector: Mapping[str, Any]) -> str:
    """Write the card of a model of whose training nothing is known.

    Args:
        reader: What it says of its reader, see ``RetrievalAugmentedModel.describe()``.
        corrector: What its corrector says of itself; empty without one.
    """
    facts = CardFacts()
    return render(
        _metadata(corrector, reader, facts),
        {**_common(corrector, reader, facts), "recorded": False, "frozen": False}, template=TEMPLATE,
    )  # fmt: skip


def _how_it_was_trained(arguments: Mapping[str, Any], *, frozen: bool) -> str:
    if frozen and arguments.get("num_passages") == 0:
        return "the latter trained on questions and answers without passages"
    if frozen:
        return "the latter trained on questions and answers with what the former finds, which stayed as it was"
    if arguments.get("train_targets") is False:
        return "trained on questions and answers with passages from a cache of embeddings, which were not trained"
    return "trained on questions and answers with passages from a cache of embeddings that goes stale meanwhile"


def _judged_once(record: RunRecord) -> RunRecord:
    """Return the record of a run that left the retriever as it was: its index, encoded anew or not, is one."""
    intervals = record.evaluation.get("intervals")
    if not intervals:
        return record
    return replace(record, evaluation={**record.evaluation, "intervals": {"index": intervals["fresh"]}})


def differences(record: RunRecord) -> str:
    """Return how answers differ between stale, corrected and fresh targets, question by question."""
    found = record.evaluation.get("differences")
    if not found:
        return MISSING
    metrics = list(next(iter(found.values())))
    rows = [[name.replace("-", " − "), *(tables.spread(one.get(metric)) for metric in metrics)]
            for name, one in found.items()]  # fmt: skip
    return tables.table(["", *map(tables.metric_name, metrics)], rows)


def _common(corrector: Mapping[str, Any], reader: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    known = {name: reader.get(name) for name in _READER} | {"reader_name": _reader_name(reader)}
    return {
        "title": _title(corrector, reader), "has_corrector": "kind" in corrector,
        "described": tables.corrector(corrector), "encoders": tables.encoders(corrector),
        "reader": tables.pairs({words: _shown(known[name]) for name, words in _READER.items()}),
        "license_text": facts.license or MISSING, "writer": __version__,
    }  # fmt: skip


def _shown(value: Any) -> Any:
    if value in (None, ""):
        return MISSING
    return f"`{value}`".replace("\n", "\\n") if isinstance(value, str) else value


def _reader_name(reader: Mapping[str, Any]) -> str:
    """Name the reader: of one in a folder the folder's own name alone."""
    name = str(reader.get("reader_name") or "")
    return PurePath(name).name if name.startswith(("/", "~", ".")) else name


def _title(corrector: Mapping[str, Any], reader: Mapping[str, Any]) -> str:
    stale = dict(corrector.get("stale_encoder") or {})
    retriever, read_by = stale.get("name") or "an unnamed encoder", _reader_name(reader) or "an unnamed reader"
    return f"Retriever from {retriever} with {read_by} as its reader"


def _metadata(
    corrector: Mapping[str, Any], reader: Mapping[str, Any], facts: CardFacts, *, results: Any = None
) -> ModelCardData:  # fmt: skip
    parts = (dict(corrector.get("stale_encoder") or {}), {"name": _reader_name(reader)})
    return ModelCardData(
        library_name="hf_corrector", tags=list(TAGS), pipeline_tag=TASK, license=facts.license,
        datasets=list(facts.datasets) or None, language=list(facts.language) or None, eval_results=results or None,
        model_name=_title(corrector, reader), **base_models(parts, relation="finetune"),
    )  # fmt: skip
