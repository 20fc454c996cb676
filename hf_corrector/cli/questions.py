"""What the commands of question answering share: questions by name, and a reader by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_corrector.cli.common import STDLIB
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import RetrievalData, given_answers
from hf_corrector.data.stdlib import standard_library_questions
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.rag.default_reader import default_reader
from hf_corrector.rag.storage import load_reader

QUESTIONS_HELP = (
    "BEIR folder or Hub data set whose queries have answers; by default 'stdlib', questions made from Python's own "
    "standard library"
)


def load_questions(name: str) -> RetrievalData:
    """Load questions, answers and targets; what was odd or is left out goes to the terminal.

    Raises:
        DataError: If there are no answers, or the data cannot be read.
    """
    if name == STDLIB:
        print("reading Python's standard library ...", flush=True)
    data = standard_library_questions() if name == STDLIB else load_retrieval_data(name)
    for note in data.notes:
        print(f"note: {note}")
    return replace(data, **{split: _answered(one, split, name) for split, one in data.splits.items()})


def _answered(split: Dataset, name: str, source: str) -> Dataset:
    known = [row for row, answers in enumerate(given_answers(split)) if answers]
    if not known:
        raise DataError(
            f"{source}, {name}", expected="queries with answers", got="none that has any",
            cure='Add "answers": ["..."] to the lines of queries.jsonl, or leave the split out.',
        )  # fmt: skip
    if len(known) < len(split):
        print(f"note: {name}: questions without an answer left out: {len(split) - len(known)}")
    return split.select(known)


def some_questions(split: Dataset, count: int) -> Dataset:
    """Draw so many questions, the same ones every time, in their order; 0 or more than there are takes all."""
    if not 0 < count < len(split):
        return split
    drawn = np.random.default_rng(0).choice(len(split), size=count, replace=False)
    return split.select(np.sort(drawn))


def reader_of(name: str | None, num_layers: int | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a reader, or make the default one.

    Args:
        name: Folder or Hub id of a decoder or an encoder-decoder; None for the default one.
        num_layers: Of the default one, how many layers of MiniLM it keeps.

    Raises:
        ConfigurationError: If a number of layers is given for another reader, or the default one has fewer.
    """
    if name is None:
        return default_reader(num_hidden_layers=num_layers)
    if num_layers is not None:
        raise ConfigurationError(
            "--reader_layers", expected="none with --reader, which is used as it is", got=str(num_layers),
            cure="Leave one of the two out.",
        )  # fmt: skip
    return load_reader(name)
