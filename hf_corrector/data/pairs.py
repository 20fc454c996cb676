"""Turn text pairs, the training format of sentence-transformers, into a retrieval data set.

The order of the columns matters and their names do not: (query, positive[, negative ...]). A column called ``label``,
``labels``, ``score`` or ``scores`` is a label and no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from datasets import ClassLabel, Dataset

from hf_corrector._files import hash_strings
from hf_corrector.data.judged_queries import Judged, JudgedQueries, Query
from hf_corrector.data.retrieval import (
    SPLITS,
    TARGET_FEATURES,
    RetrievalData,
    dataset_from_rows,
    hash_fraction,
    is_text,
    iterate_columns,
)
from hf_corrector.errors import ConfigurationError, DataError

LABEL_COLUMNS = ("label", "labels", "score", "scores")
RESERVED_COLUMNS = ("return_loss", "dataset_name")
ID_SUFFIXES = ("_id", "_ids", "-id", "-ids")


@dataclass(frozen=True)
class _Columns:
    texts: tuple[str, ...]
    label: str | None


def from_pairs(
    dataset: Dataset, *, dev_fraction: float = 0.05, test_fraction: float = 0.05, seed: int = 42
) -> RetrievalData:
    """Build a retrieval data set from pairs of texts.

    Equal queries become one query with several positives, and equal targets one target. Negatives join the corpus and
    become the ``negative_ids`` of their query, but for those that another row has as an answer to it. A query goes to
    train, dev or test by the hash of its text (without regard to case and spacing), so that equal queries never lie on
    both sides of a split, and adding rows moves no query. Ids are hashes of the texts.

    Args:
        dataset: Columns of strings in the order query, positive and any number of negatives. With two such columns
            there may be a label column of 0 and 1, where 0 makes the second text a negative.
        dev_fraction: Share of the queries for dev; 0 for none.
        test_fraction: Share of the queries for test; 0 for none.
        seed: Another seed, another split.

    Raises:
        ConfigurationError: If the fractions leave nothing to train on.
        DataError: If the columns cannot be read as pairs, or a row lacks its query or positive.
    """
    if dev_fraction < 0 or test_fraction < 0 or not dev_fraction + test_fraction < 1:
        raise ConfigurationError(
            "dev_fraction and test_fraction", expected="numbers from 0 whose sum is below 1",
            got=f"{dev_fraction} and {test_fraction}", cure="Leave some queries for training.",
        )  # fmt: skip
    targets, judged = _collect(dataset)
    found = judged.finish()
    target_ids = [f"t-{hash_strings([text])}" for text in targets]
    splits: dict[str, Dataset | None] = {}
    for name in SPLITS:
        chosen = found.dataset(target_ids, partial(_is_in, name, (dev_fraction, test_fraction, seed)))
        splits[name] = chosen if len(chosen) else None
    if splits["train"] is None:
        raise DataError(
            "dataset", expected="queries to train on", got=f"{len(dataset)} rows, none of them in train",
            cure="Give more rows or smaller fractions.",
        )  # fmt: skip
    rows = (
        {"id": target_id, "text": text, "metadata": "{}"} for target_id, text in zip(target_ids, targets, strict=True)
    )
    return RetrievalData(corpus=dataset_from_rows(rows, TARGET_FEATURES), notes=found.notes, **splits)


def _collect(dataset: Dataset) -> tuple[dict[str, int], JudgedQueries]:
    """Read all rows; returns target rows by text, and what is said about the queries."""
    targets: dict[str, int] = {}
    judged = JudgedQueries()
    for row, (texts, is_positive) in enumerate(_rows(dataset, _find_columns(dataset))):
        rows = [targets.setdefault(text, len(targets)) for text in texts[1:]]
        query = Query(f"q-{hash_strings(texts[:1])}", texts[0])
        labels = [is_positive, *[False] * (len(rows) - 1)]
        judged.add(query, map(Judged, rows, labels), where=f"dataset, row {row}")
    return targets, judged


def _is_in(split: str, choice: tuple[float, float, int], query: str) -> bool:
    dev_fraction, test_fraction, seed = choice
    position = hash_fraction(f"{seed} {' '.join(query.split()).casefold()}")
    if position < test_fraction:
        return split == "test"
    return split == ("dev" if position < test_fraction + dev_fraction else "train")


def _find_columns(dataset: Dataset) -> _Columns:
    if not isinstance(dataset, Dataset):
        raise DataError(
            "dataset", expected="one datasets.Dataset", got=type(dataset).__name__,
            cure='Choose one split, for instance load_dataset(..., split="train").',
        )  # fmt: skip
    names = dataset.column_names
    refused = [name for name in names if name in RESERVED_COLUMNS]
    ids = [name for name in names if name.lower() == "id" or name.lower().endswith(ID_SUFFIXES)]
    if refused or ids:
        raise DataError(
            "dataset", expected="columns of texts, the query first", got=f"{names}",
            cure=f"Drop {refused + ids} with remove_columns; where ids stand for texts, put the texts in their place.",
        )  # fmt: skip
    labels = [name for name in names if name in LABEL_COLUMNS]
    texts = tuple(name for name in names if name not in LABEL_COLUMNS)
    if len(texts) < 2 or len(labels) > 1 or (labels and len(texts) > 2):
        raise DataError(
            "dataset", expected="query, positive and any number of negatives, or query, text and one label column",
            got=f"{names}", cure="Choose and order the columns with select_columns.",
        )  # fmt: skip
    for name in texts:
        if not is_text(dataset.features[name]):
            raise DataError(
                f"dataset, column {name!r}", expected="strings", got=f"{dataset.features[name]}",
                cure="Write one text per cell, several negatives as several columns.",
            )  # fmt: skip
    _check_label(dataset, labels)
    return _Columns(texts, labels[0] if labels else None)


def _check_label(dataset: Dataset, labels: list[str]) -> None:
    """Refuse named classes, because which of them is the positive one cannot be told from the number."""
    if labels and isinstance(dataset.features[labels[0]], ClassLabel):
        raise DataError(
            f"dataset, column {labels[0]!r}", expected="1 for positive and 0 for negative pairs",
            got=f"the classes {dataset.features[labels[0]].names}",
            cure='Map the classes to 0 and 1, then cast_column(..., Value("int64")).',
        )  # fmt: skip


def _rows(dataset: Dataset, columns: _Columns) -> Iterator[tuple[list[str], bool]]:
    """Yield stripped texts, query first, and whether the first target is a positive; empty negatives are left out."""
    names = columns.texts if columns.label is None else (*columns.texts, columns.label)
    for row, values in enumerate(iterate_columns(dataset, *names)):
        texts = [(text or "").strip() for text in values[: len(columns.texts)]]
        for name, text in zip(columns.texts[:2], texts[:2], strict=True):
            if not text:
                raise DataError(
                    f"dataset, row {row}", expected=f"text in {name!r}", got="none",
                    cure="Remove such rows with dataset.filter.",
                )  # fmt: skip
        label = 1 if columns.label is None else values[-1]
        if label not in (0, 1):
            raise DataError(
                f"dataset, row {row}", expected=f"0 or 1 in {columns.label!r}", got=repr(label),
                cure="Keep the pairs that are positives and drop the column, or map it to 0 and 1.",
            )  # fmt: skip
        yield [*texts[:2], *filter(None, texts[2:])], bool(label)
