"""From judged pairs to padded batches, without touching a text or a model."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from hf_corrector.batching import pad_tokens
from hf_corrector.data.tokens import TokenStore
from hf_corrector.errors import DataError


class PairExample(TypedDict):
    """One positive judgement: a query and one target that answers it."""

    query_tokens: list[int]
    query_row: int
    target_row: int
    target_tokens: list[int]


class PairBatch(TypedDict):
    """A batch of positive judgements.

    ``queries`` and ``positives`` hold ``input_ids`` and ``attention_mask``, int64 ``(batch, longest)``; ``query_rows``
    and ``positive_rows`` are int64 ``(batch,)``.
    """

    queries: dict[str, torch.Tensor]
    positives: dict[str, torch.Tensor]
    query_rows: torch.Tensor
    positive_rows: torch.Tensor


@dataclass(frozen=True)
class PairCollator:
    """Turn :class:`PairExample` into :class:`PairBatch`; pickles into dataloader workers.

    Attributes:
        pad_token_id: The padding id of the query tokenizer.
        target_pad_token_id: That of the target tokenizer; None where both towers share one.
    """

    pad_token_id: int
    target_pad_token_id: int | None = None

    def __call__(self, examples: Sequence[PairExample]) -> PairBatch:
        """Pad queries and targets, each to their own longest."""
        target_pad = self.pad_token_id if self.target_pad_token_id is None else self.target_pad_token_id
        return {
            "queries": pad_tokens([example["query_tokens"] for example in examples], self.pad_token_id),
            "positives": pad_tokens([example["target_tokens"] for example in examples], target_pad),
            "query_rows": torch.tensor([example["query_row"] for example in examples], dtype=torch.int64),
            "positive_rows": torch.tensor([example["target_row"] for example in examples], dtype=torch.int64),
        }


class PairDataset(Dataset[PairExample]):
    """Every (query, positive target) judgement of a split as one example, queries in order, targets by row.

    With ``one_example_per_query`` every query is one example, with its positive of the best grade (of the lowest row
    among equals): for losses that see all positives of a query at once, to which a query of many would otherwise come
    many times.

    Texts and tokens stay in memory-mapped stores: the object itself holds 24 bytes per example, and pickles into
    dataloader workers.

    Args:
        positives: Target rows and grades of each query, from :func:`~hf_corrector.data.retrieval.positives_as_rows`.
        queries: Tokens of the split's queries, in the same order.
        targets: Tokens of the corpus.
        one_example_per_query: Take only the best positive of each query.

    Attributes:
        query_rows: Row of the query in its split, int64 ``(examples,)``.
        target_rows: Row of the target in the corpus, int64 ``(examples,)``.
        grades: Grade of the judgement, float64 ``(examples,)``.

    Raises:
        DataError: If the stores do not fit the judgements.
    """

    def __init__(
        self,
        positives: Sequence[Mapping[int, float]],
        queries: TokenStore,
        targets: TokenStore,
        *,
        one_example_per_query: bool = False,
    ) -> None:
        if len(queries) != len(positives):
            raise DataError(
                "queries", expected=f"tokens of {len(positives)} queries", got=f"{len(queries)}",
                cure="Build the store from the queries of this split.",
            )  # fmt: skip
        query_rows, target_rows, grades = array("q"), array("q"), array("d")
        for query, graded in enumerate(positives):
            chosen = _best(graded) if one_example_per_query else sorted(graded)
            query_rows.extend([query] * len(chosen))
            target_rows.extend(chosen)
            grades.extend(graded[target] for target in chosen)
        self.query_rows: npt.NDArray[np.int64] = np.array(query_rows, dtype=np.int64)
        self.target_rows: npt.NDArray[np.int64] = np.array(target_rows, dtype=np.int64)
        self.grades: npt.NDArray[np.float64] = np.array(grades, dtype=np.float64)
        self.queries, self.targets = queries, targets
        judged = len(self.target_rows) > 0
        if not judged or not 0 <= self.target_rows.min() <= self.target_rows.max() < len(targets):
            raise DataError(
                "positives", expected=f"judgements on the {len(targets)} rows of the targets",
                got=f"rows {self.target_rows.min()} to {self.target_rows.max()}" if judged else "no judgement",
                cure="Build the store from the corpus the judgements are about.",
            )  # fmt: skip

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.query_rows)

    def __getitem__(self, index: int) -> PairExample:
        """Return one example with its tokens."""
        query_row, target_row = int(self.query_rows[index]), int(self.target_rows[index])
        return {
            "query_tokens": self.queries.tokens([query_row])[0],
            "query_row": query_row,
            "target_row": target_row,
            "target_tokens": self.targets.tokens([target_row])[0],
        }


def _best(graded: Mapping[int, float]) -> list[int]:
    """Return the target of the best grade, the lowest row among equals; nothing where there is none."""
    return [min(graded, key=lambda row: (-graded[row], row))] if graded else []
