"""Read the training files of Tevatron and FlagEmbedding as they are: one ``.jsonl``, or a folder of them.

A file is recognised by the keys of its first line (:mod:`~hf_corrector.data.training_forms`). In a folder, files whose
name has the word dev, validation, valid, val or test in it are those splits, all others are training data. The corpus
holds every target the files name: those of a Tevatron corpus file first, then others as they are met.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from hf_corrector._files import xxh3
from hf_corrector.data.assembly import DEV_ALIASES, check_split_names, duplicate, shared_queries, warn_of_empty
from hf_corrector.data.json_lines import json_records
from hf_corrector.data.judged_queries import Judged, JudgedQueries
from hf_corrector.data.retrieval import SPLITS, TARGET_FEATURES, RetrievalData, dataset_from_rows
from hf_corrector.data.training_forms import Form, Passage, TrainingLine, form_of, read_corpus_line
from hf_corrector.errors import ConfigurationError, DataError

logger = logging.getLogger(__name__)
FILE_NAME = re.compile(r".+\.jsonl?(\.gz)?", re.IGNORECASE)
FOLDER_NAME = re.compile(r".+\.jsonl(\.gz)?", re.IGNORECASE)
NO_IN_BATCH = "no_in_batch_neg"


@dataclass(frozen=True)
class _Files:
    """What to read: corpus files, and the files of each split with their forms."""

    corpora: list[Path]
    splits: dict[str, list[tuple[Path, Form]]]


def is_training_file(path: Path) -> bool:
    """Tell by its name whether a file may hold lines of JSON."""
    return path.is_file() and FILE_NAME.fullmatch(path.name) is not None


def holds_training_files(folder: Path) -> bool:
    """Tell whether a folder has a file of a known form; only first lines are read."""
    for path in _jsonl_files(folder):
        try:
            _form(path)
        except DataError:
            continue
        return True
    return False


def load_training_files(source: Path, splits: Mapping[str, str] | None = None) -> RetrievalData:
    """Read a file or a folder of training files.

    Lines with the same query id (FlagEmbedding: the same text) are about one query. A target that answers a query on
    one line is not its negative on another; such negatives are dropped and counted in the notes, as are queries
    without a positive. FlagEmbedding's prompts are kept as metadata and noted.

    Args:
        source: The file, plain or gzipped, or the folder.
        splits: In a folder, which file is train, dev or test, ``{"train": "train.jsonl"}``; others are not read, but
            for corpus files. None goes by the names of the files.

    Raises:
        ConfigurationError: If ``splits`` has other keys, or is given for a single file.
        DataError: At the first thing that is wrong, naming file and line.
    """
    files = _choose(source, splits)
    reading = _Reading(judged={name: JudgedQueries() for name in SPLITS if name in files.splits})
    corpus = dataset_from_rows(_corpus_rows(files, reading), TARGET_FEATURES)
    if not len(corpus):
        raise DataError(str(source), expected="at least one target", got="none", cure="Add targets.")
    notes = _notes(files, reading)
    if reading.empty:
        notes.append(warn_of_empty(str(source), reading.empty, len(corpus), reading.first_empty))
    target_ids = list(reading.row_of)
    found: dict[str, Dataset] = {}
    for name, queries in reading.judged.items():
        split = queries.finish()
        found[name] = split.dataset(target_ids)
        if not len(found[name]):
            raise DataError(
                f"{source}, {name}", expected="at least one query with a positive", got=f"{len(queries)} without",
                cure="Remove the files of this split, or add positives.",
            )  # fmt: skip
        notes += [f"{name}: {note}" for note in split.notes]
    notes += shared_queries(found)
    for note in notes:
        logger.info("%s", note)
    return RetrievalData(
        corpus=corpus, train=found.get("train"), dev=found.get("dev"), test=found.get("test"), notes=tuple(notes)
    )


class _Reading:
    """Targets met so far, and what was said about queries."""

    def __init__(self, judged: dict[str, JudgedQueries]) -> None:
        self.judged = judged
        self.row_of: dict[str, int] = {}
        self._hashes = array("Q")
        self.prompt: str | None = None
        self.empty, self.first_empty = 0, ""

    def rows(self, passages: Iterable[Passage], where: str) -> Iterator[dict[str, str]]:
        """Yield a row of the corpus for each target that is met for the first time.

        Raises:
            DataError: If a target came with another text before, or without a text and is not known.
        """
        for passage in passages:
            row = self.row_of.get(passage.target_id)
            if passage.text is None:
                if row is None:
                    raise DataError(
                        where, expected="the id of a known target",
                        got=f"{passage.target_id!r}, which is not among the {len(self.row_of)} target ids",
                        cure="Add the target to the corpus file, or remove the id.",
                    )  # fmt: skip
                continue
            digest = int(xxh3(passage.text.encode("utf-8")), 16)
            if row is not None:
                if self._hashes[row] != digest:
                    raise DataError(
                        where, expected=f"one text for the target {passage.target_id!r}",
                        got=f"another: {passage.text[:80]!r}", cure="Give each target an id of its own.",
                    )  # fmt: skip
                continue
            self.row_of[passage.target_id] = len(self.row_of)
            self._hashes.append(digest)
            if not passage.text:
                self.empty += 1
                self.first_empty = self.first_empty or where
            yield {"id": passage.target_id, "text": passage.text, "metadata": passage.metadata}

    def judge(self, split: str, line: TrainingLine, where: str) -> None:
        """Keep what a line says about its query.

        Raises:
            DataError: If the query's text or prompt differs from before.
        """
        if self.prompt is None:
            self.prompt = line.prompt
        if line.prompt != self.prompt:
            raise DataError(
                where, expected=f"one prompt for all queries, {self.prompt!r} as before", got=repr(line.prompt),
                cure="An encoder here has one prompt for queries: load data of one prompt at a time and pass it to the "
                "encoder as query_prompt, or write each prompt into its query and remove the field.",
            )  # fmt: skip
        positives = [Judged(self.row_of[one.target_id], True, one.score) for one in line.positives]
        negatives = [Judged(self.row_of[one.target_id], False, one.score) for one in line.negatives]
        self.judged[split].add(line.query, [*positives, *negatives], where=where)


def _corpus_rows(files: _Files, reading: _Reading) -> Iterator[dict[str, str]]:
    """Read everything once: yields the targets, and leaves the judgements in ``reading``."""
    for path in files.corpora:
        records = json_records(path)
        for number, record in records.items:
            where = records.where(number)
            passage = read_corpus_line(record, where)
            if passage.target_id in reading.row_of:
                raise duplicate(where, passage.target_id)
            yield from reading.rows([passage], where)
    for split, paths in files.splits.items():
        for path, form in paths:
            yield from _split_rows(split, path, form, reading)


def _split_rows(split: str, path: Path, form: Form, reading: _Reading) -> Iterator[dict[str, str]]:
    records = json_records(path)
    for number, record in records.items:
        where = records.where(number)
        if not isinstance(record, dict) or form.read is None:
            raise DataError(where, expected="one object", got=type(record).__name__, cure="Write one per line.")
        line = form.read(record, where)
        yield from reading.rows([*line.positives, *line.negatives], where)
        reading.judge(split, line, where)


def _notes(files: _Files, reading: _Reading) -> list[str]:
    notes = [f"{name}: read {', '.join(path.name for path, _ in paths)}" for name, paths in files.splits.items()]
    if reading.prompt:
        notes.append(f"prompt of the queries, kept as metadata, to be given to the encoder: {reading.prompt!r}")
    for path in (path for paths in files.splits.values() for path, _ in paths):
        if path.name.split(".")[0].endswith(NO_IN_BATCH) or path.absolute().parent.name.endswith(NO_IN_BATCH):
            notes.append(f"{path.name}: meant for training on given negatives only; drawn ones may be right answers")
    return notes


def _jsonl_files(folder: Path) -> list[Path]:
    return sorted(
        path for path in folder.iterdir() if FOLDER_NAME.fullmatch(path.name) and not path.name.startswith(".")
    )


def _form(path: Path) -> Form:
    """Recognise a file by its first line.

    Raises:
        DataError: If it has none, or one of no known form.
    """
    first: tuple[int, Any] | None = next(iter(json_records(path).items), None)
    if first is None:
        raise DataError(str(path), expected="one JSON object per line", got="an empty file", cure="Remove the file.")
    return form_of(first[1], f"{path}, line {first[0]}")


def _choose(source: Path, splits: Mapping[str, str] | None) -> _Files:
    """Decide which files to read, and as what."""
    if source.is_file():
        if splits is not None:
            raise ConfigurationError(
                "splits", expected="none for a single file, which is training data", got=f"{dict(splits)}",
                cure="Pass its folder and name the files of the splits.",
            )  # fmt: skip
        return _files(str(source), [(source, _form(source))], {source: "train"})
    paths = _jsonl_files(source)
    if splits is None:
        return _files(str(source), [(path, _form(path)) for path in paths], {path: _split_of(path) for path in paths})
    check_split_names(splits)
    chosen = {source / name: split for split, name in splits.items()}
    if len(chosen) < len(splits):
        raise ConfigurationError(
            "splits", expected="a file of its own for each split", got=f"{dict(splits)}", cure="Name different files."
        )
    for path, split in chosen.items():
        if not path.is_file():
            raise DataError(
                str(path),
                expected=f"the data of {split}",
                got="no such file",
                cure="Give paths relative to the folder.",
            )
    others = [(path, _form(path)) for path in paths if path not in chosen]
    corpora = [(path, form) for path, form in others if form.read is None]
    return _files(str(source), [*corpora, *((path, _form(path)) for path in chosen)], chosen)


def _files(source: str, forms: list[tuple[Path, Form]], split_of: Mapping[Path, str]) -> _Files:
    corpora = [path for path, form in forms if form.read is None]
    judged = [(path, form) for path, form in forms if form.read is not None]
    if not judged:
        raise DataError(
            source, expected="training data", got="a corpus only", cure="Pass the folder that holds both."
        )  # fmt: skip
    without = [path for path, form in judged if form.name == "Tevatron with a corpus"]
    if without and not corpora:
        raise DataError(
            str(without[0]), expected="a corpus file with docid and text beside it, for the ids it names", got="none",
            cure="Pass the folder that holds both.",
        )  # fmt: skip
    splits = {name: [one for one in judged if split_of[one[0]] == name] for name in SPLITS}
    return _Files(corpora, {name: paths for name, paths in splits.items() if paths})


def _split_of(path: Path) -> str:
    words = set(re.split(r"[^a-z]+", path.name.lower()))
    if words & set(DEV_ALIASES):
        return "dev"
    return "test" if "test" in words else "train"
