"""Questions with answers: checked before any work, tokenised once, padded batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, LargeList, List

from hf_corrector._distributed import on_main
from hf_corrector._files import hash_strings
from hf_corrector.batching import pad_tokens
from hf_corrector.data.retrieval import column, is_text, iterate_columns
from hf_corrector.data.tokens import TokenStore, token_store_key
from hf_corrector.errors import DataError
from hf_corrector.models.towers import hash_tokenizer
from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel
from hf_corrector.rag.reader_inputs import ReaderTokenizer
from hf_corrector.shared_writing import seen_by_all

COLUMNS = ("query_id", "query", "answers")


def check_questions(split: Dataset, name: str) -> None:
    """Refuse a split without questions, or with one that has no text, no id of its own or no answer.

    Questions without an answer are refused rather than left out, so that numbers of two runs are of the same questions.

    Raises:
        DataError: Naming split and row.
    """
    if not isinstance(split, Dataset) or not set(COLUMNS) <= set(split.column_names):
        got = split.column_names if isinstance(split, Dataset) else type(split).__name__
        raise DataError(
            name, expected=f"a datasets.Dataset with the columns {list(COLUMNS)}", got=str(got),
            cure="Add the column 'answers', a list of texts for every question.",
        )  # fmt: skip
    found = split.features["answers"]
    if not isinstance(found, List | LargeList) or not is_text(found.feature):
        raise DataError(
            f"{name}, column 'answers'", expected="a list of strings", got=str(found), cure="Convert it with map()."
        )
    seen: set[str] = set()
    for row, (query_id, query, answers) in enumerate(iterate_columns(split, *COLUMNS)):
        usable = bool(answers) and all(one is not None and one.strip() for one in answers)
        if not query_id or query_id in seen or not query or not query.strip() or not usable:
            raise DataError(
                f"{name}, row {row}", expected="a query_id of its own, a query, and answers with text in them",
                got=f"{query_id!r}{' again' if query_id in seen else ''}, {query!r} and {answers!r}",
                cure="Correct the row, or leave out questions without an answer with Dataset.filter.",
            )  # fmt: skip
        seen.add(query_id)
    if not seen:
        raise DataError(name, expected="at least one question", got="none", cure="Leave it out, or give questions.")


def first_answers(split: Dataset) -> list[str]:
    """Return what is trained and measured on where a question has several answers: the first."""
    return [answers[0] for answers in column(split, "answers")]


def tokenize_answers(reader: ReaderTokenizer, split: Dataset, name: str) -> list[list[int]]:
    """Tokenise the first answers of a split, their end included.

    Args:
        reader: The reader's tokenizer.
        split: Questions with answers.
        name: What errors call the split.

    Raises:
        DataError: If an answer is too long or says nothing to the reader, naming split, row and question.
    """
    ids = column(split, "query_id")
    return reader.answers(first_answers(split), name=lambda row: f"{name}, row {row}, answer to {ids[row]!r}")


def tokenize_passages(
    model: RetrievalAugmentedModel, texts: Sequence[str], path: Path, *, progress: bool
) -> TokenStore:
    """Tokenise targets as the reader reads them into a memory-mapped store, or open the one that is there.

    Raises:
        CacheMismatchError: If ``path`` holds the tokens of another tokenizer, of another cut or of other texts.
    """
    reader, made = model.reader, list[TokenStore]()
    key = token_store_key(
        tokenizer=hash_tokenizer(reader.tokenizer), prompt="", max_length=reader.format.field_room,
        texts_hash=hash_strings(texts),
    )  # fmt: skip

    def make() -> None:
        made.append(TokenStore.open_or_build(path, texts, reader.passages, key=key, progress=progress))

    on_main("tokenising passages", make)
    return seen_by_all(path, lambda: made[0] if made else TokenStore.open(path, key=key, verify="sizes"))


class QuestionDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Every question with its first answer as one example, in tokens.

    Args:
        queries: The query tower's tokens.
        questions: The reader's tokens of the same.
        answers: The reader's tokens of the answers.
    """

    def __init__(
        self, queries: TokenStore, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
    ) -> None:  # fmt: skip
        self._queries, self._questions, self._answers = queries, questions, answers

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._queries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one example with its tokens."""
        return {
            "query_row": index, "query_tokens": self._queries.tokens([index])[0],
            "question_tokens": self._questions[index], "answer_tokens": self._answers[index],
        }  # fmt: skip


@dataclass(frozen=True)
class QuestionCollator:
    """Pad examples to a batch: ``questions``, ``reader_questions`` and ``answers``, and ``query_rows`` ``(batch,)``.

    Attributes:
        pad_token_id: The padding id of the query tower.
    """

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Pad each kind of tokens to its longest; the reader's are cut out of the padding again, whatever it is."""
        return {
            "questions": pad_tokens([one["query_tokens"] for one in examples], self.pad_token_id),
            "reader_questions": pad_tokens([one["question_tokens"] for one in examples], 0),
            "answers": pad_tokens([one["answer_tokens"] for one in examples], 0),
            "query_rows": torch.tensor([one["query_row"] for one in examples], dtype=torch.int64),
        }
