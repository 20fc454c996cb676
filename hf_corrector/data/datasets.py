"""Load retrieval data from wherever it is: the door to this folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hf_corrector.data.folder import CORPUS_FILE, QRELS_FOLDER, QUERIES_FILE, load_folder
from hf_corrector.data.hub import load_hub
from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.retrieval import RetrievalData, positives_as_rows, texts_hash, validate
from hf_corrector.data.training_files import holds_training_files, is_training_file, load_training_files
from hf_corrector.errors import ConfigurationError, DataError

__all__ = ["RetrievalData", "load_retrieval_data", "from_pairs", "validate", "positives_as_rows", "texts_hash"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load_retrieval_data(
    source: str | Path,
    *,
    splits: Mapping[str, str] | None = None,
    subset: str | None = None,
    revision: str | None = None,
) -> RetrievalData:
    """Load a retrieval data set from a folder, a file or the Hub.

    Args:
        source: A BEIR folder (``corpus.jsonl``, ``queries.jsonl``, ``qrels/*.tsv``), a Hub id whose configurations are
            those of BEIR or mteb, a downloaded copy of such a repository, or training data of Tevatron or
            FlagEmbedding, a ``.jsonl`` file or a folder of them (``.gz`` too, see
            :mod:`~hf_corrector.data.training_files`). For pairs of texts, see
            :func:`~hf_corrector.data.pairs.from_pairs`.
        splits: Which judgements play train, dev and test; others are then not read. Files of a folder
            (``{"train": "qrels/train.tsv", "test": "qrels_alt/test-ai.tsv"}``) or splits on the Hub
            (``{"dev": "validation"}``). None takes the usual names, and those that exist.
        subset: On the Hub, the prefix of the configurations where a set holds several.
        revision: On the Hub, the commit, tag or branch.

    Raises:
        ConfigurationError: If the arguments contradict each other.
        DataError: If there is no such set or its content is wrong; names file and line.
        ConnectionError: If the Hub cannot be reached.
    """
    folder = Path(source).expanduser()
    if is_training_file(folder) or (folder.is_dir() and _is_training_folder(folder)):
        _refuse_revision(source, revision or subset)
        return load_training_files(folder, splits)
    if folder.is_dir():
        has_qrels = any((folder / QRELS_FOLDER).glob("*.tsv"))
        if (folder / "README.md").is_file() and not ((folder / CORPUS_FILE).is_file() and (has_qrels or splits)):
            _refuse_revision(source, revision)
            return load_hub(str(folder), splits, subset=subset)
        _refuse_revision(source, revision or subset)
        return load_folder(folder, splits)
    if isinstance(source, Path) or HUB_ID.fullmatch(source) is None or folder.exists():
        raise DataError(
            str(source), expected="a folder, a .jsonl file, or a data set on the Hub such as mteb/scifact",
            got="a file" if folder.exists() else "no such folder", cure="Check the path.",
        )  # fmt: skip
    return load_hub(source, splits, subset=subset, revision=revision)


def _is_training_folder(folder: Path) -> bool:
    """Tell other packages' training files from a BEIR folder and from a copy of a Hub repository."""
    is_beir = (folder / QUERIES_FILE).exists() or (folder / QRELS_FOLDER).exists()
    return not is_beir and holds_training_files(folder)


def _refuse_revision(source: str | Path, value: str | None) -> None:
    if value is not None:
        raise ConfigurationError(
            str(source), expected="no `revision` or `subset` for what is on this machine", got=repr(value),
            cure="Leave it out, or pass a Hub id.",
        )  # fmt: skip
