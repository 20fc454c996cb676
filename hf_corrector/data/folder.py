"""Read a BEIR folder: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/{train,dev,test}.tsv``.

A line of ``corpus.jsonl`` is ``{"_id": ..., "title": ..., "text": ...}``, of ``queries.jsonl`` ``{"_id": ...,
"text": ...}``, with a list of texts in ``"answers"`` where it is known what to answer; further fields are kept as
metadata. A qrels line is query id, target id and an integer grade, separated by tabs, under the header
``query-id corpus-id score``; a grade of 0 or less says that a target is no answer, and makes it neither a positive nor
a given negative. UTF-8 with or without a byte order mark; any line ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hf_corrector.data.assembly import Judgement, Records, assemble, check_split_names, choose_splits
from hf_corrector.data.json_lines import json_records, numbered_lines
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.errors import DataError

CORPUS_FILE, QUERIES_FILE, QRELS_FOLDER = "corpus.jsonl", "queries.jsonl", "qrels"
HEADER = ("query-id", "corpus-id", "score")


def load_folder(folder: Path, splits: Mapping[str, str] | None = None) -> RetrievalData:
    """Read a BEIR folder.

    Args:
        folder: Where the files are.
        splits: Qrels files by split, relative to the folder, for instance ``{"test": "qrels_alt/test-ai.tsv"}``; None
            takes ``qrels/{train,dev,test}.tsv``, those that exist.

    Raises:
        ConfigurationError: If ``splits`` has other keys than train, dev and test.
        DataError: At the first thing that is wrong, naming file and line.
    """
    paths = _qrels_paths(folder, splits)
    for name in (CORPUS_FILE, QUERIES_FILE):
        if not (folder / name).is_file():
            raise DataError(
                str(folder), expected=f"a file {name}", got="none of that name",
                cure=f"Pass the folder that holds {CORPUS_FILE}, {QUERIES_FILE} and {QRELS_FOLDER}/.",
            )  # fmt: skip
    # Judgements are small and read first, so that a mistake in them is not found after a large corpus.
    judgements = {split: read_qrels(path) for split, path in paths.items()}
    return assemble(json_records(folder / CORPUS_FILE), json_records(folder / QUERIES_FILE), judgements)


def _qrels_paths(folder: Path, splits: Mapping[str, str] | None) -> dict[str, Path]:
    if splits is None:
        files = {path.stem: path for path in sorted((folder / QRELS_FOLDER).glob("*.tsv"))}
        return {split: files[name] for split, name in choose_splits(files, where=str(folder / QRELS_FOLDER)).items()}
    check_split_names(splits)
    paths = {split: folder / name for split, name in splits.items()}
    for split, path in paths.items():
        if not path.is_file():
            raise DataError(
                str(path), expected=f"the judgements of {split}", got="no such file",
                cure="Give paths relative to the folder, such as qrels/train.tsv.",
            )  # fmt: skip
    return paths


def read_qrels(path: Path) -> Records[Judgement]:
    """Read a qrels file whole.

    A header cannot be mistaken for a judgement, because its third field is no integer; a file that begins with a
    judgement is therefore accepted without a header.
    """
    judgements: list[tuple[int, Judgement]] = []
    records = Records(str(path), "line", judgements)
    first = True
    for number, line in numbered_lines(path):
        try:
            fields = line.decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            raise DataError(
                records.where(number), expected="UTF-8", got=str(error), cure="Convert the file to UTF-8."
            ) from error
        is_header = first and _is_header(fields, where=records.where(number))
        first = False
        if not is_header:
            judgements.append((number, _judgement(fields, where=records.where(number))))
    if not judgements:
        raise DataError(str(path), expected="judgements", got="none", cure="Remove the file or add judgements.")
    return records


def _is_header(fields: list[str], *, where: str) -> bool:
    if len(fields) != len(HEADER) or _is_integer(fields[2]):
        return False
    names = tuple(field.strip().lower().replace("_", "-") for field in fields)
    if names != HEADER:
        raise DataError(
            where, expected=f"the header {' '.join(HEADER)} or a judgement", got=repr("\t".join(fields)),
            cure="Put the three columns in this order, separated by tabs, under this header.",
        )  # fmt: skip
    return True


def _judgement(fields: list[str], *, where: str) -> Judgement:
    if len(fields) != len(HEADER):
        cure = "Separate query id, target id and grade by tabs."
        if len(re.split(r"\s+", "\t".join(fields).strip())) == len(HEADER) + 1:
            cure = "Drop the second column of a TREC qrels file and separate the other three by tabs."
        raise DataError(where, expected="three fields separated by tabs", got=repr("\t".join(fields)), cure=cure)
    query_id, target_id, grade = fields
    if not _is_integer(grade):
        raise DataError(where, expected="an integer grade", got=repr(grade), cure="Write grades such as 0, 1 or 2.")
    return Judgement(query_id, target_id, int(grade))


def _is_integer(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?[0-9]+\s*", text) is not None
