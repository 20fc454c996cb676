"""What one line of other packages' training files says, form by form.

======================  =======================================================================================
form                    keys of a line
======================  =======================================================================================
FlagEmbedding           ``query, pos[], neg[], pos_scores[], neg_scores[], prompt, type``, texts without ids
Tevatron, passages      ``query_id, query, positive_passages[{docid, title, text, score}], negative_passages[...]``
Tevatron, ids           ``query_id, query_text, positive_document_ids[], negative_document_ids[]``
Tevatron, corpus        ``docid, text`` (or ``document_text``), ``title``
======================  =======================================================================================

Only ``neg``, the negatives, scores, titles, ``prompt`` and ``type`` may be missing. ``answers[]`` becomes a column of
its own, further fields become metadata.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hf_corrector._files import hash_strings
from hf_corrector.data.assembly import with_title
from hf_corrector.data.fields import (
    answers_field,
    as_identifier,
    clean_text,
    identifier,
    list_field,
    metadata_of,
    score_of,
    text_field,
)
from hf_corrector.data.judged_queries import Query
from hf_corrector.errors import DataError

PASSAGE_FIELDS = ("docid", "title", "text", "score")
TEVATRON_FIELDS = ("query_id", "query", "positive_passages", "negative_passages")
TEVATRON_ID_FIELDS = ("query_id", "query_text", "positive_document_ids", "negative_document_ids")
FLAG_FIELDS = ("query", "pos", "neg", "pos_scores", "neg_scores")
KNOWN_FORMS = (
    "FlagEmbedding's query, pos[, neg, pos_scores, neg_scores, prompt, type]; Tevatron's query_id, query, "
    "positive_passages, negative_passages; or its query_id, query_text, positive_document_ids, negative_document_ids "
    "beside a corpus of docid, text"
)


class Passage(NamedTuple):
    """A target as a line names it; ``text`` is None where it stands in the corpus file."""

    target_id: str
    text: str | None
    score: float | None
    record: Mapping[str, Any]

    @property
    def metadata(self) -> str:
        """The title and all further fields, a JSON object."""
        if not self.record:
            return "{}"
        title = self.record.get("title")
        return metadata_of(self.record, PASSAGE_FIELDS, {"title": title.strip()} if title and title.strip() else {})


class TrainingLine(NamedTuple):
    """A query with its answers and given negatives."""

    query: Query
    positives: list[Passage]
    negatives: list[Passage]
    prompt: str = ""


@dataclass(frozen=True)
class Form:
    """One of the forms above.

    Attributes:
        name: For notes and errors.
        keys: What the first line of a file must have, any of these sets.
        read: Turns a record and its place into a line; None for a corpus.
    """

    name: str
    keys: tuple[frozenset[str], ...]
    read: Callable[[dict[str, Any], str], TrainingLine] | None


def read_flag_embedding(record: dict[str, Any], where: str) -> TrainingLine:
    """Read a line of FlagEmbedding's; equal texts become one target.

    Raises:
        DataError: If the line is wrong.
    """
    query = _query_text(record, "query", where)
    positives = _texts(record, "pos", where)
    for passage in positives:
        if not passage.text:
            raise DataError(where, expected="text in every pos", got="none", cure="Remove the empty text.")
    negatives = [passage for passage in _texts(record, "neg", where) if passage.text]
    prompt = record.get("prompt") or ""
    clean_text(prompt, "prompt", where)  # its spaces count, for it is put right before the query
    known = _query(f"q-{hash_strings([query])}", query, record, FLAG_FIELDS, where)
    return TrainingLine(known, positives, negatives, prompt)


def read_tevatron_passages(record: dict[str, Any], where: str) -> TrainingLine:
    """Read a line of Tevatron's older form, with the passages in it.

    Raises:
        DataError: If the line is wrong, or one passage is both positive and negative.
    """
    query_id, query = identifier(record, where, ("query_id",)), _query_text(record, "query", where)
    positives = [_passage(one, where) for one in list_field(record, "positive_passages", where, optional=False)]
    negatives = [_passage(one, where) for one in list_field(record, "negative_passages", where)]
    _refuse_both(positives, negatives, where)
    return TrainingLine(_query(query_id, query, record, TEVATRON_FIELDS, where), positives, negatives)


def read_tevatron_ids(record: dict[str, Any], where: str) -> TrainingLine:
    """Read a line of Tevatron's newer form, whose passages stand in a corpus file.

    Raises:
        DataError: If the line is wrong, or one id is both positive and negative.
    """
    query_id, query = identifier(record, where, ("query_id",)), _query_text(record, "query_text", where)
    positives = _ids(record, "positive_document_ids", where, optional=False)
    negatives = _ids(record, "negative_document_ids", where)
    _refuse_both(positives, negatives, where)
    return TrainingLine(_query(query_id, query, record, TEVATRON_ID_FIELDS, where), positives, negatives)


def read_corpus_line(record: Any, where: str) -> Passage:
    """Read a line of a Tevatron corpus, whose text is called ``text`` or, in its README, ``document_text``.

    Raises:
        DataError: If the line is wrong.
    """
    target_id = identifier(record, where, ("docid",))
    if "text" not in record and "document_text" in record:
        record = {**record, "text": record["document_text"]}
        del record["document_text"]
    text = with_title(text_field(record, "title", where), text_field(record, "text", where))
    return Passage(target_id, text, None, record)


FORMS = (
    Form("FlagEmbedding", (frozenset({"query", "pos"}),), read_flag_embedding),
    Form("Tevatron", (frozenset({"query_id", "query", "positive_passages"}),), read_tevatron_passages),
    Form("Tevatron with a corpus", (frozenset({"query_id", "positive_document_ids"}),), read_tevatron_ids),
    Form("Tevatron's corpus", (frozenset({"docid", "text"}), frozenset({"docid", "document_text"})), None),
)


def form_of(record: Any, where: str) -> Form:
    """Recognise a file by the keys of its first line.

    Raises:
        DataError: If they are those of no form, or of a query and document pair.
    """
    keys = set(record) if isinstance(record, dict) else set()
    for form in FORMS:
        is_pair = form.read is None and "query_id" in keys
        if any(wanted <= keys for wanted in form.keys) and not is_pair:
            return form
    got = f"the keys {sorted(keys)}" if isinstance(record, dict) else type(record).__name__
    cure = f"Known are {KNOWN_FORMS}."
    if "_id" in keys:
        cure = "For BEIR, pass the folder with corpus.jsonl, queries.jsonl and qrels/. " + cure
    elif keys >= {"query", "positives"}:
        cure = "Give texts: tokens of another package are of no use here. " + cure
    raise DataError(where, expected="a line of a known form", got=got, cure=cure)


def _query(query_id: str, text: str, record: Mapping[str, Any], known: tuple[str, ...], where: str) -> Query:
    return Query(query_id, text, metadata_of(record, (*known, "answers")), answers_field(record, where))


def _query_text(record: Mapping[str, Any], key: str, where: str) -> str:
    text = text_field(record, key, where)
    if not text:
        raise DataError(where, expected=f"text in {key!r}", got="none", cure="Fill in the query or remove the line.")
    return text


def _texts(record: Mapping[str, Any], kind: str, where: str) -> list[Passage]:
    texts = [clean_text(text, kind, where) for text in list_field(record, kind, where, optional=kind == "neg")]
    key = f"{kind}_scores"
    scores = [score_of(score, key, where) for score in list_field(record, key, where)]
    if scores and len(scores) != len(texts):
        raise DataError(
            where, expected=f"as many {key} as texts in {kind!r}, or none", got=f"{len(scores)} for {len(texts)}",
            cure="Give a score for each, null where there is none.",
        )  # fmt: skip
    scores = scores or [None] * len(texts)
    return [Passage(f"t-{hash_strings([text])}", text, score, {}) for text, score in zip(texts, scores, strict=True)]


def _passage(record: Any, where: str) -> Passage:
    target_id = identifier(record, where, ("docid",))
    text = with_title(text_field(record, "title", where), text_field(record, "text", where))
    return Passage(target_id, text, score_of(record.get("score"), "score", where), record)


def _ids(record: Mapping[str, Any], key: str, where: str, *, optional: bool = True) -> list[Passage]:
    passages = []
    for value in list_field(record, key, where, optional=optional):
        found = as_identifier(value)
        if found is None:
            raise DataError(where, expected=f"ids in {key!r}", got=repr(value), cure="Write ids as strings.")
        passages.append(Passage(found, None, None, {}))
    return passages


def _refuse_both(positives: list[Passage], negatives: list[Passage], where: str) -> None:
    both = {passage.target_id for passage in positives} & {passage.target_id for passage in negatives}
    if both:
        raise DataError(
            where, expected="negatives that are not positives", got=f"{sorted(both)} in both",
            cure="Remove them from one of the two lists.",
        )  # fmt: skip
