"""Blocks of features for ridge regression: what is read off a target, as a matrix with one row a pair."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_corrector.side_features import TokenStatistics, csr_matrix, row_of_entries, take_rows, tfidf

GRAM_ROWS = 256
# Rows of dense features that are computed or multiplied at a time.
PIECE_ROWS = 8192
# Landmarks whose kernel value exceeds this are one and the same to double precision.
DUPLICATE = 1.0 - 1e-9
NUGGET = 1e-6


@dataclass(frozen=True, eq=False)
class Block:
    """One group of features that share a ridge strength.

    Attributes:
        name: What the features are.
        matrix: ``(n, m)`` float64, dense or CSR.
        unit: Mean squared length of a row: strengths are relative to it.
    """

    name: str
    matrix: torch.Tensor
    unit: float

    @classmethod
    def of(cls, name: str, matrix: torch.Tensor) -> Block:
        """Measure the unit of a matrix."""
        values = matrix.values() if matrix.layout == torch.sparse_csr else matrix
        return cls(name, matrix, float(values.square().sum()) / max(len(matrix), 1) or 1.0)

    def gram(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Return inner products of all rows in units, ``(n, n)``."""
        matrix = self.matrix.to(dtype)
        if matrix.layout != torch.sparse_csr:
            return (matrix @ matrix.T).div_(self.unit)
        count = len(matrix)
        gram = torch.empty(count, count, dtype=dtype)
        for start in range(0, count, GRAM_ROWS):
            rows = torch.arange(start, min(start + GRAM_ROWS, count))
            # A sparse product of two sparse matrices is not there on every platform; this one is.
            gram[:, rows] = matrix @ take_rows(matrix, rows).to_dense().T.contiguous()
        return gram.div_(self.unit)

    def take(self, rows: torch.Tensor) -> Block:
        """Return the block of some pairs, in the same units."""
        return Block(self.name, take_rows(self.matrix, rows), self.unit)

    def forward(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return features @ coefficients: ``(m, k)`` to ``(n, k)``."""
        return self.matrix @ coefficients

    def backward(self, values: torch.Tensor) -> torch.Tensor:
        """Return features.T @ values: ``(n, k)`` to ``(m, k)``."""
        if self.matrix.layout != torch.sparse_csr:
            return self.matrix.T @ values
        return transposed(self.matrix) @ values


def transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return the transpose of a CSR matrix in CSR layout."""
    columns, width = matrix.col_indices(), matrix.shape[1]
    order = torch.argsort(columns, stable=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(columns, minlength=width).cumsum(0)])
    return csr_matrix(starts, row_of_entries(matrix)[order], matrix.values()[order], width=len(matrix))


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """The columns of token counts that a fit gives a displacement, and how they are weighted.

    Attributes:
        columns: Columns that occur in the pairs, ascending, ``(m,)`` int64.
        idf: Inverse document frequency of all columns, ``(width,)`` float32.
        vocabulary: Number of columns that are tokens.
    """

    columns: torch.Tensor
    idf: torch.Tensor
    vocabulary: int


def token_blocks(counts: torch.Tensor, statistics: TokenStatistics | None) -> tuple[list[Block], TokenColumns]:
    """Return a block of tokens, one of token pairs where there are any, and their columns.

    Args:
        counts: Token counts of the pairs' targets, CSR ``(n, width)``.
        statistics: How common each column is in the corpus; estimated from the pairs if None.
    """
    if statistics is None:
        frequency = torch.bincount(counts.col_indices(), minlength=counts.shape[1])
        statistics = TokenStatistics(frequency, len(counts), counts.shape[1])
    weighted = tfidf(counts, statistics.idf, vocabulary=statistics.vocabulary)
    seen = torch.unique(weighted.col_indices()[weighted.values() > 0])
    parts = {"tokens": seen[seen < statistics.vocabulary], "bigrams": seen[seen >= statistics.vocabulary]}
    blocks = [Block.of(name, _columns(weighted, kept)) for name, kept in parts.items() if len(kept)]
    return blocks, TokenColumns(seen, statistics.idf, statistics.vocabulary)


def _columns(matrix: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return some columns of a CSR matrix, ``kept`` ascending, as CSR float64 ``(n, len(kept))``."""
    place = torch.full((matrix.shape[1],), -1, dtype=torch.int64)
    place[kept] = torch.arange(len(kept))
    column = place[matrix.col_indices()]
    here = column >= 0
    lengths = torch.bincount(row_of_entries(matrix)[here], minlength=len(matrix))
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    return csr_matrix(starts, column[here], matrix.values()[here].double(), width=len(kept))


def radial(vectors: torch.Tensor, landmarks: torch.Tensor, width: float) -> torch.Tensor:
    """Return exp(−‖x − l‖² / 2 width²) for all vectors ``(n, dim)`` and landmarks ``(p, dim)``, ``(n, p)``."""
    squares = vectors.square().sum(dim=1)[:, None] + landmarks.square().sum(dim=1)[None]
    distance = torch.addmm(squares, vectors, landmarks.T, alpha=-2.0).clamp_(min=0.0)
    return distance.div_(-2.0 * width * width).exp_()


def typical_distance(vectors: torch.Tensor) -> float:
    """Return the median distance between different vectors of a small sample; 1 where all are the same."""
    sample = vectors[torch.linspace(0, len(vectors) - 1, min(len(vectors), 500)).round().long()]
    distances = torch.pdist(sample)
    distances = distances[distances > 1e-9 * float(sample.norm(dim=1).mean())]
    return float(distances.median()) if len(distances) else 1.0


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Points of a Nyström approximation of a radial kernel (Williams and Seeger, 2000).

    Attributes:
        points: Different vectors, ``(p, dim)`` float64.
        whitening: Turns kernel values into features whose inner products approximate the kernel, ``(p, p)`` float64.
        width: Width of the kernel.
    """

    points: torch.Tensor
    whitening: torch.Tensor
    width: float

    @classmethod
    def choose(cls, vectors: torch.Tensor, count: int, width: float, *, seed: int) -> Landmarks:
        """Take ``count`` vectors at random, drop duplicates, and factorise their kernel matrix.

        A nugget on its diagonal keeps near-duplicates, which rounding alone would tell apart, from exploding.
        """
        order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:count]
        points = vectors[order.sort().values]
        kernel = radial(points, points, width)
        earlier = torch.tril(kernel > DUPLICATE, diagonal=-1).any(dim=1)
        points, kernel = points[~earlier], kernel[~earlier][:, ~earlier]
        kernel.diagonal().add_(NUGGET)
        factor = torch.linalg.cholesky(kernel)
        identity = torch.eye(len(points), dtype=torch.float64)
        return cls(points, torch.linalg.solve_triangular(factor.T, identity, upper=True), width)

    def features(self, vectors: torch.Tensor) -> torch.Tensor:
        """Return Nyström features of vectors ``(n, dim)``, ``(n, p)``; no second matrix of that size is made."""
        found = torch.empty(len(vectors), len(self.points), dtype=vectors.dtype)
        for rows, piece in zip(torch.split(found, PIECE_ROWS), torch.split(vectors, PIECE_ROWS), strict=True):
            torch.matmul(radial(piece, self.points, self.width), self.whitening, out=rows)
        return found


class DenseBlocks:
    """The dense ones among some blocks, side by side and scaled by their strengths, without a copy of them.

    Args:
        blocks: All blocks.
        strengths: Strength of each.
    """

    def __init__(self, blocks: list[Block], strengths: dict[str, float]) -> None:
        kept = [one for one in blocks if one.matrix.layout != torch.sparse_csr]
        self._parts = [(one.matrix, (strengths[one.name] / one.unit) ** 0.5) for one in kept]
        self._widths = [one.matrix.shape[1] for one in kept]

    def inner(self, noise: torch.Tensor) -> torch.Tensor:
        """Return 1 + features.T @ (features / noise), ``(m, m)``, for the noise of each row ``(n,)``."""
        inner = torch.eye(sum(self._widths), dtype=torch.float64)
        for start in range(0, len(noise), PIECE_ROWS):
            rows = slice(start, start + PIECE_ROWS)
            scaled = torch.cat([matrix[rows] * factor for matrix, factor in self._parts], dim=1)
            inner.addmm_(scaled.T, scaled / noise[rows, None])
        return inner

    def forward(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return features @ coefficients: ``(m, k)`` to ``(n, k)``."""
        found = torch.zeros(len(self._parts[0][0]), coefficients.shape[1], dtype=torch.float64)
        for (matrix, factor), part in zip(self._parts, torch.split(coefficients, self._widths), strict=True):
            found.addmm_(matrix, part, alpha=factor)
        return found

    def backward(self, values: torch.Tensor) -> torch.Tensor:
        """Return features.T @ values: ``(n, k)`` to ``(m, k)``."""
        return torch.cat([(matrix.T @ values) * factor for matrix, factor in self._parts])
