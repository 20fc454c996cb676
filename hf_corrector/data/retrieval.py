"""What a retrieval data set is here: a corpus of targets and splits of judged queries.

Every reader (:mod:`~hf_corrector.data.folder`, :mod:`~hf_corrector.data.hub`, :mod:`~hf_corrector.data.pairs`,
:mod:`~hf_corrector.data.training_files`, :mod:`~hf_corrector.data.stdlib`) ends in a :class:`RetrievalData`; a user may
build one by hand and check it with :func:`validate`. A target's **row** is its position in the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets

from hf_corrector._files import hash_strings, xxh3
from hf_corrector.errors import DataError

SPLITS = ("train", "dev", "test")
TARGET_FEATURES = Features({"id": Value("string"), "text": Value("string"), "metadata": Value("string")})
QUERY_FEATURES = Features(
    {
        "query_id": Value("string"),
        "query": Value("string"),
        "positive_ids": List(Value("string")),
        "positive_grades": List(Value("float64")),
        "metadata": Value("string"),
    }
)
# Columns a split may have: hard negatives that were given, and what a teacher gave to positives and to them.
GIVEN_FEATURES = Features(
    {
        "negative_ids": List(Value("string")),
        "positive_scores": List(Value("float64")),
        "negative_scores": List(Value("float64")),
    }
)
# Another such column: what a reader should say; several answers are as many ways of being right.
ANSWER_FEATURES = Features({"answers": List(Value("string"))})
# Arrow addresses the bytes of one chunk of strings with 31 bits; ten thousand texts per chunk stay far below.
ROWS_PER_CHUNK = 10_000


@dataclass(frozen=True)
class RetrievalData:
    """Targets, and queries with the targets that answer them.

    Attributes:
        corpus: Columns ``id``, ``text`` and ``metadata`` (a JSON object as a string), one row per target.
        train: Columns ``query_id``, ``query``, ``positive_ids``, ``positive_grades`` and ``metadata``, one row per
            query; None where the set has no such split. There may also be ``negative_ids``, hard negatives that came
            with the data; a teacher's ``positive_scores`` and ``negative_scores``, one for each id, where null is
            no score; and ``answers``, texts that answer the query. An empty list has nothing to say about its query.
        dev: As ``train``, for choices made during training.
        test: As ``train``, for the final judgement.
        notes: What loading left out or found odd, one sentence each.
    """

    corpus: Dataset
    train: Dataset | None
    dev: Dataset | None
    test: Dataset | None
    notes: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, Dataset]:
        """The splits that exist, by name, in the order train, dev, test."""
        found = {"train": self.train, "dev": self.dev, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}


def dataset_from_rows(rows: Iterable[dict[str, Any]], features: Features) -> Dataset:
    """Build an in-memory data set chunk by chunk, so that Python objects of only one chunk exist at a time."""
    iterator, chunks = iter(rows), []
    while chunk := list(islice(iterator, ROWS_PER_CHUNK)):
        chunks.append(Dataset.from_list(chunk, features=features))
    if not chunks:
        return Dataset.from_dict({name: [] for name in features}, features=features)
    return concatenate_datasets(chunks)


def column(dataset: Dataset, name: str) -> list[Any]:
    """Return one column as plain Python values, whatever output format the user has set."""
    values: list[Any] = dataset.with_format(None)[name][:]
    return values


def iterate_columns(dataset: Dataset, *names: str) -> Iterator[tuple[Any, ...]]:
    """Yield the named columns row by row as plain Python values, reading a thousand rows at a time."""
    for batch in dataset.with_format(None).select_columns(list(names)).iter(batch_size=1000):
        yield from zip(*(batch[name] for name in names), strict=True)


def texts_hash(corpus: Dataset) -> str:
    """Hash ids and texts in order, 32 hexadecimal digits; two corpora with equal hashes have equal rows."""
    return hash_strings(value for pair in iterate_columns(corpus, "id", "text") for value in pair)


def hash_fraction(key: str) -> float:
    """Map a string to [0, 1) by its hash: the same on every machine, whatever else is in the data."""
    return int(xxh3(key.encode("utf-8"))[:13], 16) / 16**13


def positives_as_rows(split: Dataset, corpus: Dataset, *, name: str = "split") -> list[dict[int, float]]:
    """Return each query's positives as ``{target row: grade}``, in the order of the split.

    Args:
        split: Judged queries.
        corpus: All targets.
        name: What errors call the split.

    Raises:
        DataError: If a query names a target that is not in the corpus.
    """
    row_of = {target_id: row for row, target_id in enumerate(column(corpus, "id"))}
    positives = []
    for number, (ids, grades) in enumerate(iterate_columns(split, "positive_ids", "positive_grades")):
        try:
            positives.append({row_of[target_id]: float(grade) for target_id, grade in zip(ids, grades, strict=True)})
        except KeyError as error:
            raise unknown_target(f"{name}, row {number}", "positive_ids", error.args[0]) from error
    return positives


def with_optional_columns(dataset: Dataset) -> Dataset:
    """Add the columns a user may leave out: empty ``metadata``, and a grade of 1 for every positive.

    Given negatives, a teacher's scores and answers stay absent where they are.
    """
    if not isinstance(dataset, Dataset):
        return dataset
    if "positive_ids" in dataset.column_names and "positive_grades" not in dataset.column_names:
        grades = [[1.0] * len(ids) for ids in column(dataset, "positive_ids")]
        dataset = dataset.add_column("positive_grades", grades)
    if "metadata" not in dataset.column_names:
        dataset = dataset.add_column("metadata", ["{}"] * len(dataset))
    return dataset


def validate(data: RetrievalData, *, name: str | None = None) -> None:
    """Check a data set built by hand: columns, unique ids, targets that exist, finite scores, answers with words.

    Args:
        data: What to check.
        name: What to call a single split in errors, where it is not the caller's train, dev or test.

    Raises:
        DataError: At the first thing that is wrong, naming the split and the row.
    """
    target_ids = validate_corpus(data.corpus)
    if not data.splits:
        raise DataError("data", expected="a train, dev or test split", got="none of them", cure="Give at least one.")
    for usual_name, split in data.splits.items():
        where = usual_name if name is None else name
        _check_columns(split, where, QUERY_FEATURES)
        _unique(split, "query_id", where=where)
        _check_texts(split, "query", where=where)
        _check_positives(split, where, target_ids)
        _check_optional_types(split, where)
        _check_given(split, where, target_ids)
        _check_answers(split, where)


def validate_corpus(corpus: Dataset) -> set[str]:
    """Check targets: columns, unique ids, at least one of them; and return their ids.

    Raises:
        DataError: At the first thing that is wrong.
    """
    _check_columns(corpus, "corpus", TARGET_FEATURES)
    if not len(corpus):
        raise DataError("corpus", expected="at least one target", got="none", cure="Add targets.")
    target_ids = _unique(corpus, "id", where="corpus")
    _check_texts(corpus, "text", where="corpus")
    return target_ids


def _check_columns(dataset: Dataset, where: str, features: Features) -> None:
    if not isinstance(dataset, Dataset):
        raise DataError(
            where, expected="a datasets.Dataset", got=type(dataset).__name__, cure="Use Dataset.from_dict or from_list."
        )
    for name, wanted in features.items():
        if name not in dataset.column_names:
            raise DataError(
                where, expected=f"the columns {list(features)}", got=f"{dataset.column_names}",
                cure=f"Add the column {name!r}.",
            )  # fmt: skip
        if not _compatible(wanted, dataset.features[name]):
            raise _wrong_type(dataset, where, name, wanted)


def _wrong_type(dataset: Dataset, where: str, name: str, wanted: Any) -> DataError:
    return DataError(
        f"{where}, column {name!r}", expected=f"{wanted}", got=f"{dataset.features[name]}",
        cure="Convert it with cast_column.",
    )  # fmt: skip


def is_text(feature: Any) -> bool:
    """Tell whether a column of this type holds strings."""
    return isinstance(feature, Value) and feature.dtype in {"string", "large_string"}


def _compatible(wanted: Any, found: Any) -> bool:
    if isinstance(wanted, List):
        return isinstance(found, List | LargeList) and _compatible(wanted.feature, found.feature)
    if wanted.dtype == "string":
        return is_text(found)
    return isinstance(found, Value) and found.dtype.startswith(("int", "uint", "float"))


def _unique(dataset: Dataset, name: str, *, where: str) -> set[str]:
    seen: set[str] = set()
    for row, value in enumerate(column(dataset, name)):
        if not value or value in seen:
            raise DataError(
                f"{where}, row {row}", expected=f"a unique {name!r}", got=f"{value!r}{' again' if value else ''}",
                cure="Give every row an id of its own.",
            )  # fmt: skip
        seen.add(value)
    return seen


def _check_texts(dataset: Dataset, name: str, *, where: str) -> None:
    """Refuse nulls anywhere and empty queries; a target may be empty, as in published sets."""
    for row, (text,) in enumerate(iterate_columns(dataset, name)):
        if text is None or (name == "query" and not text.strip()):
            raise DataError(
                f"{where}, row {row}", expected=f"text in {name!r}", got=repr(text), cure="Fill or remove the row."
            )


def _check_positives(split: Dataset, where: str, target_ids: set[str]) -> None:
    for row, (ids, grades) in enumerate(iterate_columns(split, "positive_ids", "positive_grades")):
        place = f"{where}, row {row}"
        if not ids or not grades or len(ids) != len(grades) or len(set(ids)) != len(ids):
            raise DataError(
                place, expected="one or more distinct positive_ids, with as many positive_grades",
                got=f"{ids!r} and {grades!r}", cure="Give every query at least one positive, with a grade each.",
            )  # fmt: skip
        for target_id, grade in zip(ids, grades, strict=True):
            if target_id not in target_ids:
                raise unknown_target(place, "positive_ids", target_id)
            if grade is None or not 0 < grade < float("inf"):
                raise DataError(
                    place, expected="grades above 0", got=repr(grade), cure="Remove what is not a positive."
                )


def given_columns(split: Dataset) -> Iterator[tuple[list[Any], list[Any], list[Any], list[Any]]]:
    """Yield positive ids, given negatives and both kinds of scores row by row; lists that are absent are empty."""
    names = ["positive_ids", *GIVEN_FEATURES]
    present = [name for name in names if name in split.column_names]
    places = [present.index(name) if name in present else None for name in names]
    for values in iterate_columns(split, *present):
        positives, negatives, *scores = [[] if place is None else values[place] or [] for place in places]
        yield positives, negatives, scores[0], scores[1]


def _check_optional_types(split: Dataset, where: str) -> None:
    for name, wanted in {**GIVEN_FEATURES, **ANSWER_FEATURES}.items():
        if name not in split.column_names:
            continue
        # A column without a single value has no type yet.
        found = split.features[name]
        inner = found.feature if isinstance(found, List | LargeList) else found
        untyped = isinstance(inner, Value) and inner.dtype == "null"
        if not untyped and not _compatible(wanted, found):
            raise _wrong_type(split, where, name, wanted)


def _check_given(split: Dataset, where: str, target_ids: set[str]) -> None:
    """Check given negatives and a teacher's scores, where there are any."""
    if not any(name in split.column_names for name in GIVEN_FEATURES):
        return
    for row, (positives, negatives, *scores) in enumerate(given_columns(split)):
        place = f"{where}, row {row}"
        _check_negatives(place, positives, negatives, target_ids)
        for name, ids, values in zip(("positive", "negative"), (positives, negatives), scores, strict=True):
            _check_scores(place, name, ids, values)


def _check_negatives(place: str, positives: list[str], negatives: list[str], target_ids: set[str]) -> None:
    if len(set(negatives)) != len(negatives):
        raise DataError(place, expected="distinct negative_ids", got=repr(negatives), cure="Keep one of each.")
    for target_id in negatives:
        if target_id not in target_ids:
            raise unknown_target(place, "negative_ids", target_id)
        if target_id in positives:
            raise DataError(
                place, expected="negative_ids that are not positive_ids", got=f"{target_id!r} in both",
                cure="Remove it from one of them.",
            )  # fmt: skip


def _check_scores(place: str, kind: str, ids: list[str], scores: list[float | None]) -> None:
    if scores and len(scores) != len(ids):
        raise DataError(
            place, expected=f"as many {kind}_scores as {kind}_ids, or none", got=f"{len(scores)} for {len(ids)}",
            cure="Give a score for each, null where there is none, or an empty list.",
        )  # fmt: skip
    for score in scores:
        if score is not None and not abs(score) < float("inf"):
            raise DataError(
                place, expected=f"finite {kind}_scores", got=repr(score), cure="Write null where there is no score."
            )


def given_answers(split: Dataset) -> list[list[str]]:
    """Return the answers of each query, in the order of the split; empty lists where there are none."""
    if "answers" not in split.column_names:
        return [[] for _ in range(len(split))]
    return [values or [] for values in column(split, "answers")]


def _check_answers(split: Dataset, where: str) -> None:
    for row, answers in enumerate(given_answers(split)):
        for answer in answers:
            if answer is None or not answer.strip():
                raise DataError(
                    f"{where}, row {row}", expected="text in every one of the answers", got=repr(answer),
                    cure="Remove it; an empty list says that no answer is known.",
                )  # fmt: skip


def unknown_target(where: str, name: str, target_id: str) -> DataError:
    """Return the error for an id in the column ``name`` that is not in the corpus."""
    return DataError(
        where, expected=f"{name} of the corpus", got=f"{target_id!r}, which is not there",
        cure=f"Add the target to the corpus or remove it from the {name.removesuffix('_ids')}s.",
    )  # fmt: skip
