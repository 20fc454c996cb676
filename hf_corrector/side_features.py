"""Side features: what a corrector may read of a target besides its stale vector.

The displacement of an embedding cannot all be read off the stale vector. What the text says tells more: a sparse bag
of the target's tokens and pairs of adjacent tokens, the mean of the encoder's input word embeddings, or any matrix the
user has.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.errors import ConfigurationError, DataError

SIDES = ("tokens", "word_embeddings", "matrix")
# Adjacent tokens share so many columns by their hash; more buckets changed nothing measurable on real drift.
DEFAULT_BIGRAM_BUCKETS = 2**14
_BLOCK_ROWS = 16_384
_COUNTED_ENTRIES = 2**22
# Part of the format: saved correctors have learned a displacement for each bucket. 2**64 over the golden ratio, odd.
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class SideFeatures(Protocol):
    """Side features of all targets, one row a target."""

    @property
    def kind(self) -> str:
        """One of :data:`SIDES`."""

    @property
    def width(self) -> int:
        """Number of columns."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop``, ``(stop - start, width)`` float32, dense or in CSR layout."""

    def gather(self, rows: torch.Tensor | npt.NDArray[np.int64]) -> torch.Tensor:
        """Return any rows, ``(n, width)`` float32, dense or in CSR layout."""


@dataclass(frozen=True, eq=False)
class TokenCounts:
    """How often each token, and each pair of adjacent tokens, occurs in each target: a sparse matrix by rows.

    Columns below ``vocabulary`` are tokens, the others hash buckets of token pairs.

    Attributes:
        offsets: Where each row starts, and where the last one ends, ``(rows + 1,)`` int64.
        columns: Columns, ascending within a row, ``(entries,)`` int32.
        counts: How often each occurs, ``(entries,)`` uint16; more than 65,535 times counts as 65,535.
        width: Number of columns.
        vocabulary: Number of columns that are tokens.
    """

    offsets: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    counts: npt.NDArray[np.uint16]
    width: int
    vocabulary: int
    kind: str = "tokens"

    @classmethod
    def from_lists(
        cls, tokens: Sequence[Sequence[int]], *, vocabulary: int, bigram_buckets: int = DEFAULT_BIGRAM_BUCKETS
    ) -> TokenCounts:
        """Count the tokens of each target.

        Args:
            tokens: Token ids of each target.
            vocabulary: Size of the vocabulary.
            bigram_buckets: Columns that pairs of adjacent tokens are hashed into; 0 to leave them out.

        Raises:
            DataError: If a token id is outside of the vocabulary; names the target.
        """
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        flat = np.fromiter((one for row in tokens for one in row), np.int64, int(offsets[-1]))
        return cls.from_flat(flat, offsets, vocabulary=vocabulary, bigram_buckets=bigram_buckets)

    @classmethod
    def from_flat(
        cls,
        tokens: npt.NDArray[np.integer],
        offsets: npt.NDArray[np.int64],
        *,
        vocabulary: int,
        bigram_buckets: int = DEFAULT_BIGRAM_BUCKETS,
    ) -> TokenCounts:
        """Count tokens that stand one after the other, ``(total,)``; row ``i`` is ``offsets[i]`` to ``offsets[i + 1]``.

        Raises:
            DataError: If a token id is outside of the vocabulary; names the target.
        """
        outside = np.flatnonzero((tokens < 0) | (tokens >= vocabulary))
        if len(outside):
            row = int(np.searchsorted(offsets, outside[0], side="right")) - 1
            raise DataError(
                f"tokens of target {row}", expected=f"token ids from 0 to {vocabulary - 1}",
                got=str(tokens[outside[0]]),
                cure="Count the tokens with the vocabulary of the tokenizer that made them.",
            )  # fmt: skip
        pieces, rows, width = [], len(offsets) - 1, vocabulary + bigram_buckets
        for start in range(0, rows, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, rows)
            part = np.asarray(tokens[offsets[start] : offsets[stop]], dtype=np.int64)
            owners = np.repeat(np.arange(stop - start, dtype=np.int64), np.diff(offsets[start : stop + 1]))
            keys = owners * width + part
            if bigram_buckets:
                within = owners[:-1] == owners[1:]
                buckets = vocabulary + hash_bigrams(part[:-1], part[1:], buckets=bigram_buckets)
                keys = np.concatenate([keys, (owners[:-1] * width + buckets)[within]])
            keys, counts = np.unique(keys, return_counts=True)
            pieces.append((keys // width + start, keys % width, counts))
        owners, columns, counts = (
            np.concatenate([piece[one] for piece in pieces]) if pieces else np.zeros(0, np.int64) for one in range(3)
        )
        starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=rows))]).astype(np.int64)
        return cls(starts, columns.astype(np.int32), np.minimum(counts, 65_535).astype(np.uint16), width, vocabulary)

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.offsets) - 1

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return the counts of rows ``start`` to ``stop`` as a CSR tensor ``(stop - start, width)`` float32."""
        begin, end = int(self.offsets[start]), int(self.offsets[stop])
        return _csr(self.offsets[start : stop + 1] - begin, self.columns[begin:end], self.counts[begin:end], self.width)

    def gather(self, rows: torch.Tensor | npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the counts of any rows ``(n,)`` as a CSR tensor ``(n, width)`` float32."""
        wanted = np.asarray(rows, dtype=np.int64)
        lengths = self.offsets[wanted + 1] - self.offsets[wanted]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        entries = np.repeat(self.offsets[wanted] - starts[:-1], lengths) + np.arange(starts[-1])
        return _csr(starts, self.columns[entries], self.counts[entries], self.width)

    def statistics(self) -> TokenStatistics:
        """Return in how many targets each column occurs."""
        frequency = np.zeros(self.width, dtype=np.int64)
        for start in range(0, len(self.columns), _COUNTED_ENTRIES):
            # Piece by piece, as counting makes 8 bytes of each entry.
            frequency += np.bincount(self.columns[start : start + _COUNTED_ENTRIES], minlength=self.width)
        return TokenStatistics(torch.from_numpy(frequency), len(self), self.vocabulary)


@dataclass(frozen=True, eq=False)
class TokenStatistics:
    """How common each column of token counts is.

    Attributes:
        frequency: In how many targets each column occurs, ``(width,)`` int64.
        targets: Number of targets.
        vocabulary: Number of columns that are tokens; the others are buckets of token pairs.
    """

    frequency: torch.Tensor
    targets: int
    vocabulary: int

    @property
    def idf(self) -> torch.Tensor:
        """Inverse document frequency log((1 + targets) / (1 + frequency)), ``(width,)`` float32."""
        return torch.log((1 + self.targets) / (1 + self.frequency.double())).float()


def tfidf(counts: torch.Tensor, idf: torch.Tensor, *, vocabulary: int) -> torch.Tensor:
    """Weight counts by (1 + log count)·idf; tokens and token pairs of a row each get unit length.

    Args:
        counts: CSR matrix of counts, ``(n, width)``.
        idf: Inverse document frequency of each column, ``(width,)``.
        vocabulary: Number of columns that are tokens.

    Returns:
        A CSR matrix of the same layout, float32; a row without any informative token is zero.
    """
    columns = counts.col_indices()
    values = (1.0 + counts.values().float().log()) * idf[columns]
    part = 2 * row_of_entries(counts) + (columns >= vocabulary)
    squares = torch.zeros(2 * len(counts), device=values.device).index_add_(0, part, values.square())
    values = values / squares.sqrt().clamp(min=1e-12)[part]
    return csr_matrix(counts.crow_indices(), columns, values, width=counts.shape[1])


def hash_bigrams(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64], *, buckets: int) -> npt.NDArray[np.int64]:
    """Return a bucket for each pair of token ids, ``(n,)``; the same in every process and version."""
    keys = (first.astype(np.uint64) << np.uint64(32)) + second.astype(np.uint64)
    mixed = (keys ^ (keys >> np.uint64(29))) * _HASH_MULTIPLIER
    return ((mixed >> np.uint64(33)) % np.uint64(buckets)).astype(np.int64)


def take_rows(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return some rows ``(m,)`` of a dense or CSR matrix, in the layout it has."""
    if matrix.layout != torch.sparse_csr:
        return matrix[rows]
    starts, columns, values = matrix.crow_indices(), matrix.col_indices(), matrix.values()
    lengths = starts.diff()[rows]
    taken = torch.cat([torch.zeros(1, dtype=torch.int64, device=rows.device), lengths.cumsum(0)])
    entries = torch.repeat_interleave(starts[rows] - taken[:-1], lengths) + torch.arange(
        int(taken[-1]), device=rows.device
    )
    return csr_matrix(taken, columns[entries], values[entries], width=matrix.shape[1])


def csr_matrix(starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, *, width: int) -> torch.Tensor:
    """Make a CSR matrix ``(len(starts) - 1, width)``; the parts are not checked."""
    with warnings.catch_warnings():
        # torch says once that this layout is in beta; what is used of it here is covered by tests.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, size=(len(starts) - 1, width), check_invariants=False)


@dataclass(frozen=True, eq=False)
class DenseSide:
    """A dense matrix of side features.

    Attributes:
        matrix: ``(rows, width)``, any floating dtype.
        kind: ``"word_embeddings"`` or ``"matrix"``.
    """

    matrix: torch.Tensor
    kind: str = "matrix"

    def __post_init__(self) -> None:
        """Refuse what is no matrix of numbers (ConfigurationError)."""
        if self.matrix.dim() != 2 or not self.matrix.is_floating_point() or self.kind not in SIDES[1:]:
            raise ConfigurationError(
                "side features", expected=f"floating numbers of shape (rows, width), of a kind among {SIDES[1:]}",
                got=f"{self.matrix.dtype} of shape {tuple(self.matrix.shape)}, kind {self.kind!r}",
                cure="Pass one row of numbers for every target.",
            )  # fmt: skip

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.matrix.shape[1])

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.matrix)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop``, ``(stop - start, width)`` float32."""
        return self.matrix[start:stop].float()

    def gather(self, rows: torch.Tensor | npt.NDArray[np.int64]) -> torch.Tensor:
        """Return any rows ``(n,)`` as ``(n, width)`` float32."""
        return self.matrix[torch.as_tensor(rows)].float()


def mean_word_embeddings(counts: TokenCounts, embeddings: torch.Tensor) -> DenseSide:
    """Average the input word embeddings of each target's tokens.

    Args:
        counts: The targets' tokens.
        embeddings: Input word embeddings of the encoder, ``(vocabulary, dim)``.

    Raises:
        ConfigurationError: If the vocabulary has another size.
    """
    if len(embeddings) != counts.vocabulary:
        raise ConfigurationError(
            "word embeddings", expected=f"one row for each of {counts.vocabulary} tokens", got=str(len(embeddings)),
            cure="Use the embeddings of the encoder whose tokenizer made the tokens.",
        )  # fmt: skip
    table = embeddings.detach().float().cpu()
    # Buckets of token pairs have no embedding.
    table = torch.cat([table, torch.zeros(counts.width - counts.vocabulary, table.shape[1])])
    means = torch.zeros(len(counts), table.shape[1])
    for start in range(0, len(counts), _BLOCK_ROWS):
        bag = counts.read(start, min(start + _BLOCK_ROWS, len(counts)))
        tokens = bag.values() * (bag.col_indices() < counts.vocabulary)
        total = torch.zeros(len(bag)).index_add_(0, row_of_entries(bag), tokens)
        means[start : start + len(bag)] = (bag @ table) / total.clamp(min=1.0)[:, None]
    return DenseSide(means, kind="word_embeddings")


def row_of_entries(bag: torch.Tensor) -> torch.Tensor:
    """Return the row of each stored entry of a CSR matrix, ``(entries,)`` int64."""
    lengths = bag.crow_indices().diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def _csr(
    starts: npt.NDArray[np.int64], columns: npt.NDArray[np.int32], values: npt.NDArray[np.uint16], width: int
) -> torch.Tensor:
    return csr_matrix(
        torch.from_numpy(np.array(starts, dtype=np.int64)), torch.from_numpy(np.array(columns, dtype=np.int64)),
        torch.from_numpy(np.array(values, dtype=np.float32)), width=width,
    )  # fmt: skip
