"""What a retrieval-augmented model is given to read: targets found for queries, with their vectors and words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hf_corrector.data.tokens import TokenStore
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import RowVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.models.text_encoding import Tokens
from hf_corrector.sampling import Candidates


@dataclass(frozen=True)
class RetrievedTargets:
    """The passages of a batch of queries.

    Attributes:
        candidates: Which targets each query reads, from any sampler; ``(batch, k)``.
        places: Where each of them stands among the distinct targets below, ``(batch, k)`` int64; any number where
            masked.
        passages: The reader's tokens of the distinct targets, without special tokens.
        tokens: The target tower's tokens of the distinct targets, ``(m, length)``, where they are encoded anew.
        vectors: Their vectors as they are, ``(m, dim)``, where they are not.

    Raises:
        ConfigurationError: If there are both tokens and vectors, or neither.
        DataError: If a query has no passage.
    """

    candidates: Candidates
    places: torch.Tensor
    passages: Sequence[Sequence[int]]
    tokens: Tokens | None = None
    vectors: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Check what can be checked before anything is encoded."""
        if (self.tokens is None) == (self.vectors is None):
            raise ConfigurationError(
                "RetrievedTargets", expected="either tokens to encode, or vectors",
                got="neither" if self.tokens is None else "both", cure="Give one of them.",
            )  # fmt: skip
        empty = (~self.mask.any(dim=1)).nonzero()[:, 0].tolist()
        if empty:
            raise DataError(
                f"query {empty[0]} of the batch", expected="at least one retrieved target", got="none",
                cure="Search a cache that holds targets, without filters that leave none.",
            )  # fmt: skip

    @property
    def mask(self) -> torch.Tensor:
        """Which places hold a passage, ``(batch, k)`` bool."""
        return self.candidates.mask

    def passages_of(self, query: int) -> list[Sequence[int]]:
        """Return the reader's tokens of one query's passages, in the order of its candidates."""
        places = self.places[query][self.mask[query].to(self.places.device)].tolist()
        return [self.passages[place] for place in places]


CandidateFn = Callable[[torch.Tensor], RetrievedTargets]


def distinct_rows(ids: torch.Tensor, mask: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Return the distinct rows of some candidates, ascending, and the place of each among them, ``(batch, k)``."""
    rows, kept = ids.cpu().numpy(), mask.cpu().numpy()
    distinct = np.unique(rows[kept])
    places = np.searchsorted(distinct, np.where(kept, rows, distinct[0] if len(distinct) else 0))
    return distinct.astype(np.int64), torch.from_numpy(places.astype(np.int64))


class NearestPassages:
    """Find the k nearest targets of any view of them: cached, corrected or encoded anew.

    An object of it is what :meth:`RetrievalAugmentedModel.answer_log_likelihoods` and ``generate`` ask for passages.

    Args:
        view: Vectors of all targets.
        passages: The reader's tokens of the targets, by row: a store, or lists.
        k: Passages per query; all targets if there are fewer.
        device: Where the search runs.

    Raises:
        ConfigurationError: If ``k`` is less than 1, or view and passages are of different targets.
    """

    def __init__(
        self, view: RowVectors, passages: TokenStore | Sequence[Sequence[int]], *, k: int = 8,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if k < 1 or len(view) != len(passages):
            raise ConfigurationError(
                "NearestPassages", expected="k of at least 1, and as many passages as vectors",
                got=f"k={k}, {len(passages)} passages and {len(view)} vectors", cure="Give those of one corpus.",
            )  # fmt: skip
        self._view, self._passages, self._k = view, passages, k
        self._index = ExactIndex(view, device=device)

    def __call__(self, queries: torch.Tensor) -> RetrievedTargets:
        """Return the nearest targets of queries, ``(batch, dim)``."""
        found = self._index.search(queries, max(1, min(self._k, len(self._view))))
        mask = found.rows >= 0
        candidates = Candidates(
            found.rows, found.scores, torch.zeros_like(found.scores), mask, torch.zeros_like(mask)
        )  # fmt: skip
        rows, places = distinct_rows(found.rows, mask)
        vectors = self._view.gather(torch.from_numpy(rows)).to(queries.device)
        return RetrievedTargets(candidates, places, passage_tokens(self._passages, rows), vectors=vectors)


def passage_tokens(passages: TokenStore | Sequence[Sequence[int]], rows: np.ndarray) -> Sequence[Sequence[int]]:
    """Return the reader's tokens of some targets."""
    return passages.tokens(rows) if isinstance(passages, TokenStore) else [passages[row] for row in rows.tolist()]


def closed_book(queries: torch.Tensor) -> RetrievedTargets:
    """Give every query, ``(batch, dim)``, one passage without words, so that the reader knows only what it has learnt.

    The passage is no target: its row is −1.
    """
    one = torch.zeros(len(queries), 1, device=queries.device)
    candidates = Candidates(one.long() - 1, one, one, one == 0, one != 0)
    return RetrievedTargets(candidates, one.long().cpu(), [[]], vectors=queries.new_zeros(1, queries.shape[1]))
