"""From raw records, wherever they were read, to checked :class:`~hf_corrector.data.retrieval.RetrievalData`.

A reader hands over three kinds of :class:`Records`: targets, queries and judgements. Everything that can be wrong with
their content is found here, and reported with the line or row it came from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from datasets import Dataset, Features

from hf_corrector.data.fields import answers_field, identifier, metadata_of, text_field
from hf_corrector.data.retrieval import (
    ANSWER_FEATURES,
    QUERY_FEATURES,
    SPLITS,
    TARGET_FEATURES,
    RetrievalData,
    column,
    dataset_from_rows,
)
from hf_corrector.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
DEV_ALIASES = ("dev", "validation", "valid", "val")
KNOWN_FIELDS = ("_id", "id", "title", "text")
KNOWN_QUERY_FIELDS = (*KNOWN_FIELDS, "answers")


@dataclass(frozen=True)
class Records(Generic[Item]):
    """Numbered items from one file or one table.

    Attributes:
        name: The file or table, for messages.
        unit: What the numbers count: ``"line"`` or ``"row"``.
        items: Pairs of a number and an item; may be a generator, and is then read once.
    """

    name: str
    unit: str
    items: Iterable[tuple[int, Item]]

    def where(self, number: int) -> str:
        """Say where an item stands, for an error."""
        return f"{self.name}, {self.unit} {number}"


class Judgement(NamedTuple):
    """One line of a qrels file."""

    query_id: str
    target_id: str
    grade: int


class _Query(NamedTuple):
    number: int
    text: str
    metadata: str
    answers: tuple[str, ...]


def choose_splits(available: Iterable[str], wanted: Mapping[str, str] | None = None, *, where: str) -> dict[str, str]:
    """Choose which published split plays train, dev and test.

    Args:
        available: Names of the published splits.
        wanted: The user's choice, ``{"test": "published name"}``; None takes those of the same name, where
            ``validation``, ``valid`` and ``val`` are other names of ``dev``.
        where: For the error.

    Returns:
        Published names by ``"train"``, ``"dev"``, ``"test"``; those without one are left out.

    Raises:
        ConfigurationError: If ``wanted`` has other keys.
        DataError: If a wanted split is not available, or none is.
    """
    names = list(available)
    if wanted is not None:
        check_split_names(wanted)
        for name in wanted.values():
            if name not in names:
                raise DataError(
                    where, expected=f"one of the splits {sorted(names)}", got=repr(name), cure="Correct `splits`."
                )
        return dict(wanted)
    aliases = {"train": ("train",), "dev": DEV_ALIASES, "test": ("test",)}
    found = {split: [name for name in aliases[split] if name in names] for split in SPLITS}
    if len(found["dev"]) > 1:
        raise DataError(
            where, expected=f"one of {list(DEV_ALIASES)}", got=f"{found['dev']}", cure="Choose with `splits`."
        )
    if not any(found.values()):
        raise DataError(
            where, expected="judgements for train, dev or test", got=f"the splits {sorted(names)}",
            cure="Add qrels/train.tsv, qrels/dev.tsv or qrels/test.tsv, or name the splits with `splits`.",
        )  # fmt: skip
    return {split: published[0] for split, published in found.items() if published}


def check_split_names(splits: Mapping[str, str]) -> None:
    """Refuse a choice of splits that names others than train, dev and test.

    Raises:
        ConfigurationError: If it does, or names none.
    """
    if not splits or not set(splits) <= set(SPLITS):
        raise ConfigurationError(
            "splits", expected=f"some of {list(SPLITS)} as keys", got=f"{list(splits)}", cure="Correct the keys."
        )


def assemble(
    targets: Records[Any], queries: Records[Any], judgements: Mapping[str, Records[Judgement]]
) -> RetrievalData:
    """Check and join targets, queries and the judgements of each split.

    Judgements with a grade of 0 or less are dropped, and queries left without a positive; both are counted in the
    notes. Targets without text stay (published sets have them) and are counted in a logged warning. Splits have a
    column ``answers`` if any query has some.

    Raises:
        DataError: At the first record that is wrong, naming its file and line.
    """
    query_by_id = _read_queries(queries)
    corpus, target_ids, notes = _read_targets(targets)
    answered = any(query.answers for query in query_by_id.values())
    features = Features({**QUERY_FEATURES, **(ANSWER_FEATURES if answered else {})})
    splits: dict[str, Dataset] = {}
    for name, records in judgements.items():
        graded, more = _read_judgements(records, query_by_id, target_ids)
        notes += [f"{name}: {note}" for note in more]
        splits[name] = dataset_from_rows(_query_rows(graded, query_by_id, queries, features), features)
    notes += shared_queries(splits)
    for note in notes:
        logger.info("%s", note)
    return RetrievalData(
        corpus=corpus, train=splits.get("train"), dev=splits.get("dev"), test=splits.get("test"), notes=tuple(notes)
    )


def _read_targets(records: Records[Any]) -> tuple[Dataset, set[str], list[str]]:
    seen: set[str] = set()
    empty: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for number, record in records.items:
            where = records.where(number)
            target_id = identifier(record, where)
            if target_id in seen:
                raise duplicate(where, target_id)
            seen.add(target_id)
            title = text_field(record, "title", where)
            joined = with_title(title, text_field(record, "text", where))
            if not joined:
                empty.append(number)
            extra = {"title": title} if title else {}
            yield {"id": target_id, "text": joined, "metadata": metadata_of(record, KNOWN_FIELDS, extra)}

    corpus = dataset_from_rows(rows(), TARGET_FEATURES)
    if not seen:
        raise DataError(records.name, expected="at least one target", got="none", cure="Add targets.")
    if not empty:
        return corpus, seen, []
    return corpus, seen, [warn_of_empty(records.name, len(empty), len(seen), f"{records.unit} {empty[0]}")]


def warn_of_empty(name: str, empty: int, targets: int, first: str) -> str:
    """Log how many targets have no text, which published sets do have, and return it as a note."""
    note = f"corpus: targets without text: {empty} of {targets}, the first at {first}"
    logger.warning("%s: %s", name, note)
    return note


def _read_queries(records: Records[Any]) -> dict[str, _Query]:
    queries: dict[str, _Query] = {}
    for number, record in records.items:
        where = records.where(number)
        query_id = identifier(record, where)
        if query_id in queries:
            raise duplicate(where, query_id)
        extra = {"title": record["title"]} if record.get("title") else {}
        metadata = metadata_of(record, KNOWN_QUERY_FIELDS, extra)
        answers = answers_field(record, where)
        queries[query_id] = _Query(number, text_field(record, "text", where), metadata, answers)
    return queries


def _read_judgements(
    records: Records[Judgement], queries: Mapping[str, _Query], target_ids: set[str]
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Group judgements by query, checking that both ends exist and that no two contradict each other."""
    graded: dict[str, dict[str, int]] = {}
    for number, (query_id, target_id, grade) in records.items:
        for kind, wanted, known in (("query", query_id, queries), ("target", target_id, target_ids)):
            if wanted not in known:
                raise DataError(
                    records.where(number), expected=f"the id of a known {kind}",
                    got=f"{wanted!r}, which is not among the {len(known)} {kind} ids",
                    cure=f"Add the {kind} or remove the judgement.",
                )  # fmt: skip
        if graded.setdefault(query_id, {}).setdefault(target_id, grade) != grade:
            raise DataError(
                records.where(number), expected=f"one grade for {query_id!r} and {target_id!r}",
                got=f"{grade} after {graded[query_id][target_id]}", cure="Keep one of the two judgements.",
            )  # fmt: skip
    positive = {query: {target: g for target, g in grades.items() if g > 0} for query, grades in graded.items()}
    dropped = sum(map(len, graded.values())) - sum(map(len, positive.values()))
    kept = {query: grades for query, grades in positive.items() if grades}
    if not kept:
        raise DataError(
            records.name, expected="at least one judgement with a grade above 0", got=f"{dropped} judgements below",
            cure="Remove the split or add judgements.",
        )  # fmt: skip
    notes = [f"judgements dropped for a grade of 0 or less: {dropped}"] if dropped else []
    if len(kept) < len(graded):
        notes.append(f"queries dropped for want of a positive target: {len(graded) - len(kept)}")
    return kept, notes


def _query_rows(
    graded: Mapping[str, Mapping[str, int]], queries: Mapping[str, _Query], records: Records[Any], features: Features
) -> Iterator[dict[str, Any]]:
    for query_id, grades in graded.items():
        query = queries[query_id]
        if not query.text:
            raise DataError(
                records.where(query.number), expected="text in a judged query", got=f"none for {query_id!r}",
                cure="Fill in the query, or remove it and its judgements.",
            )  # fmt: skip
        values = {
            "query_id": query_id, "query": query.text, "positive_ids": list(grades),
            "positive_grades": [float(grade) for grade in grades.values()], "metadata": query.metadata,
            "answers": list(query.answers),
        }  # fmt: skip
        yield {name: values[name] for name in features}


def shared_queries(splits: Mapping[str, Dataset]) -> list[str]:
    """Note queries of dev and test that were also trained on, word for word."""
    if "train" not in splits:
        return []
    trained = set(column(splits["train"], "query"))
    notes = []
    for name in ("dev", "test"):
        shared = sum(query in trained for query in column(splits[name], "query")) if name in splits else 0
        if shared:
            notes.append(f"{name}: queries that also occur in train, word for word: {shared}")
    return notes


def with_title(title: str, text: str) -> str:
    """Put a title in front of a text, as one text."""
    return f"{title} {text}".strip() if title else text


def duplicate(where: str, found: str) -> DataError:
    """Return the error for an id that occurs twice."""
    return DataError(
        where, expected="an _id of its own", got=f"{found!r} again",
        cure="Remove the repeated record or rename one of the two.",
    )  # fmt: skip
