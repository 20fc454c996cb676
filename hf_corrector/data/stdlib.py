"""The embedded defaults: find a function of Python's own library by what its docstring says, or say what it is called.

Made on the user's machine from the sources Python came with, so there is nothing to download and nothing to license.
The query is the first paragraph of a docstring. For retrieval the target is the code without docstring and without its
name; for question answering the name is the answer, and stays in the target.
"""

from __future__ import annotations

import json
import logging
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Features

from hf_corrector.data.anonymous_source import SourceFile, is_stub
from hf_corrector.data.retrieval import (
    ANSWER_FEATURES,
    QUERY_FEATURES,
    TARGET_FEATURES,
    RetrievalData,
    dataset_from_rows,
    hash_fraction,
)
from hf_corrector.errors import DataError

logger = logging.getLogger(__name__)

# Tests describe nothing, installed packages are not the library, and the tables were not written by people.
SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "__pycache__",
        "_bundled",
        "pydoc_data",
        "encodings",
    }
)
MIN_QUERY_CHARACTERS, MIN_QUERY_WORDS = 20, 4
TEST_FRACTION, DEV_FRACTION = 0.15, 0.05


@dataclass(frozen=True)
class _Example:
    """One documented definition; ``identifier`` is its dotted name, with a number where a name is defined again."""

    identifier: str
    query: str
    target: str
    metadata: str
    name: str


def standard_library_data() -> RetrievalData:
    """Build the default data set from the sources of the running Python's standard library.

    Takes some seconds; the same Python version gives the same data.

    Raises:
        DataError: If this Python was installed without its sources.
    """
    return python_source_data(Path(sysconfig.get_path("stdlib")))


def python_source_data(folder: Path) -> RetrievalData:
    """Build a data set from all Python files below a folder.

    Equal targets become one target and equal queries one query with several positives. Queries go to train, dev and
    test (about 80, 5 and 15 %) by the hash of a target's id; queries that share a target stay together. Metadata hold
    ``module``, ``kind`` (function, class or method) and ``name``. Left out are docstrings that say next to nothing,
    definitions without a body, and files that cannot be parsed; the notes count the last.

    Args:
        folder: The folder that module names start from, such as ``src``.

    Raises:
        DataError: If there is no documented Python source, or not enough for three splits.
    """
    return _source_data(folder, questions=False)


def standard_library_questions() -> RetrievalData:
    """Build the default questions and answers from the sources of the running Python's standard library.

    Takes some seconds; the same Python version gives the same data.

    Raises:
        DataError: If this Python was installed without its sources.
    """
    return python_source_questions(Path(sysconfig.get_path("stdlib")))


def python_source_questions(folder: Path) -> RetrievalData:
    """Build questions, answers and targets that hold them from all Python files below a folder.

    As :func:`python_source_data`, but targets keep their names, and a query's ``answers`` are the names of the
    functions and classes it describes. Left out as well is what could be answered without any target: definitions
    whose name, but for case and punctuation, is in the query, and special methods such as ``__repr__``.

    Args:
        folder: The folder that module names start from, such as ``src``.

    Raises:
        DataError: If there is no documented Python source, or not enough for three splits.
    """
    return _source_data(folder, questions=True)


def _source_data(folder: Path, *, questions: bool) -> RetrievalData:
    unreadable: list[str] = []
    examples = list(_examples(folder, unreadable, questions=questions))
    if not examples:
        raise DataError(
            str(folder), expected="Python files with docstrings", got="none",
            cure="Install a Python that brings its sources, or load another data set.",
        )  # fmt: skip
    target_of: dict[str, _Example] = {}
    query_of: dict[str, _Example] = {}
    positives: dict[str, dict[str, str]] = {}
    for example in examples:
        target = target_of.setdefault(example.target, example)
        query = query_of.setdefault(example.query, example)
        positives.setdefault(query.identifier, {})[target.identifier] = target.name
    groups = _connected(positives.values())
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "dev": [], "test": []}
    for query in query_of.values():
        row = _query_row(query, positives[query.identifier], with_answers=questions)
        splits[_split_name(groups[row["positive_ids"][0]])].append(row)
    for name, rows in splits.items():
        if not rows:
            raise DataError(
                str(folder), expected=f"queries for {name}", got=f"{len(query_of)} queries, none of them for it",
                cure="Take a folder with more documented functions.",
            )  # fmt: skip
    corpus = ({"id": item.identifier, "text": text, "metadata": item.metadata} for text, item in target_of.items())
    features = Features({**QUERY_FEATURES, **(ANSWER_FEATURES if questions else {})})
    built = {name: dataset_from_rows(rows, features) for name, rows in splits.items()}
    notes = (f"files that could not be parsed: {len(unreadable)}, the first {unreadable[0]}",) if unreadable else ()
    return RetrievalData(corpus=dataset_from_rows(corpus, TARGET_FEATURES), notes=notes, **built)


def _examples(folder: Path, unreadable: list[str], *, questions: bool) -> Iterator[_Example]:
    seen: dict[str, int] = {}
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if SKIPPED_FOLDERS.intersection(relative.parts) or relative.name.startswith("test_"):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        try:
            with tokenize.open(path) as handle:  # honours the file's own declaration of its encoding
                found = list(_file_examples(SourceFile(handle.read()), module, questions=questions))
        except (SyntaxError, ValueError, RecursionError, tokenize.TokenError) as error:
            logger.info("%s skipped: %s", path, error)
            unreadable.append(relative.as_posix())
            continue
        for example in found:
            count = seen[example.identifier] = seen.get(example.identifier, 0) + 1
            identifier = example.identifier if count == 1 else f"{example.identifier}#{count}"
            if not (questions and _gives_itself_away(example)):
                yield replace(example, identifier=identifier)


def _file_examples(source: SourceFile, module: str, *, questions: bool) -> Iterator[_Example]:
    for item in source.documented():
        query = _first_paragraph(item.docstring)
        if len(query) < MIN_QUERY_CHARACTERS or len(query.split()) < MIN_QUERY_WORDS or is_stub(item.node):
            continue
        metadata = json.dumps({"module": module, "kind": item.kind, "name": item.path[-1]})
        target = source.undocumented(item.node) if questions else source.anonymous(item.node)
        yield _Example(".".join((module, *item.path)), query, target, metadata, item.path[-1])


def _gives_itself_away(example: _Example) -> bool:
    """Tell whether the name is in the query, as one word or as several, or is one that the language prescribes."""
    name = example.name
    letters, words = (re.sub(r"[\W_]", "", text.lower()) for text in (name, example.query))
    return letters in words or (name.startswith("__") and name.endswith("__"))


def _first_paragraph(docstring: str) -> str:
    lines = []
    for line in docstring.strip().splitlines():
        if not line.strip():
            break
        lines.append(line)
    return " ".join(" ".join(lines).split())


def _connected(groups: Iterable[Iterable[str]]) -> dict[str, str]:
    """Map every target to the first (by name) of those it is connected with through shared queries."""
    parent: dict[str, str] = {}

    def root(item: str) -> str:
        while parent.setdefault(item, item) != item:
            item = parent[item]
        return item

    for group in groups:
        roots = sorted({root(item) for item in group})
        for other in roots:
            parent[other] = roots[0]
    return {item: root(item) for item in parent}


def _split_name(target_id: str) -> str:
    position = hash_fraction(target_id)
    if position < TEST_FRACTION:
        return "test"
    return "dev" if position < TEST_FRACTION + DEV_FRACTION else "train"


def _query_row(query: _Example, name_of: Mapping[str, str], *, with_answers: bool) -> dict[str, Any]:
    """Make a row of a split; ``name_of`` holds what each of the query's targets is called."""
    answers = {"answers": list(dict.fromkeys(name_of.values()))} if with_answers else {}
    return {
        "query_id": query.identifier, "query": query.query, "positive_ids": list(name_of),
        "positive_grades": [1.0] * len(name_of), "metadata": query.metadata, **answers,
    }  # fmt: skip
