"""Exact search: every query against every target. The reference all other indexes are tested against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import MAX_ROWS, RunningTopK, SearchResult, TargetVectors

DEFAULT_BUDGET_BYTES = 256 * 2**20

_BYTES_PER_SCORE = 40  # float64 and float32 scores, their bits and keys, and what topk sets aside


class ExactIndex:
    """Brute-force inner-product search in bounded memory.

    Inner products are computed in float64 and rounded to float32. Float32 products differ in the last bit with the
    shape of the matrices, so that equal vectors would tie or not by accident; rounded from float64 they do not, and the
    result is the same whatever the chunk size.

    Args:
        vectors: The targets.
        budget_bytes: Working memory; queries and results come on top. A very small one is exceeded rather than
            refused, as at least one row and one query are held.
        chunk_rows: Targets read at a time, instead of what the budget allows.
        device: Where scores are computed; must know float64.
        progress: Show a progress bar over targets.

    Raises:
        ConfigurationError: If budget or chunk are not positive, or there are 2**32 targets or more.
    """

    def __init__(
        self,
        vectors: TargetVectors,
        *,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        chunk_rows: int | None = None,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> None:
        if len(vectors) >= MAX_ROWS:
            raise ConfigurationError(
                "exact index", expected=f"fewer than {MAX_ROWS} targets", got=str(len(vectors)),
                cure="Search parts of them and merge the results.",
            )  # fmt: skip
        self.vectors = vectors
        self.device = torch.device(device)
        self.progress = progress
        self.blocks = Blocks.within(budget_bytes, dim=vectors.dim, chunk_rows=chunk_rows)

    def search(
        self, queries: torch.Tensor, k: int, *, excluded: Sequence[npt.NDArray[np.int64]] | None = None
    ) -> SearchResult:
        """Find the ``k`` targets of highest inner product for each query.

        Args:
            queries: Query vectors, ``(queries, dim)``.
            k: How many targets to return; rows beyond the number of targets are -1.
            excluded: For each query target rows that must not be returned, for instance its known positives.

        Returns:
            Rows and scores, score descending, ties by row ascending.

        Raises:
            ConfigurationError: If ``k`` is below 1.
            DataError: If shapes do not fit, excluded rows do not exist or a vector is not finite.
        """
        queries = checked_search(queries, k, self.vectors).to(self.device)
        mask = RowMask(excluded, queries=len(queries), targets=len(self.vectors))
        best = RunningTopK(len(queries), k, device=self.device)
        for start, chunk in read_chunks(self.vectors, self.blocks.rows, device=self.device, progress=self.progress):
            for first in range(0, len(queries), self.blocks.queries):
                scores = (queries[first : first + self.blocks.queries] @ chunk.T).float()
                mask.hide(scores, first_query=first, first_row=start)
                best.update(scores, first_query=first, first_row=start)
        return best.result()


@dataclass(frozen=True)
class Blocks:
    """How many targets and queries are scored at a time.

    Attributes:
        rows: Targets in a block.
        queries: Queries in a block.
    """

    rows: int
    queries: int

    @classmethod
    def within(
        cls, budget_bytes: int, *, dim: int, chunk_rows: int | None = None, bytes_per_score: int = _BYTES_PER_SCORE
    ) -> Blocks:
        """Choose block sizes: half of the budget for target vectors, half for scores.

        Args:
            budget_bytes: Working memory.
            dim: Size of a vector.
            chunk_rows: Targets in a block, if already decided.
            bytes_per_score: Working memory of one query-target pair.

        Raises:
            ConfigurationError: If budget or chunk are not positive.
        """
        if budget_bytes < 1 or (chunk_rows is not None and chunk_rows < 1):
            raise ConfigurationError(
                "exact search", expected="a positive budget of bytes and a positive chunk of rows",
                got=f"budget_bytes={budget_bytes}, chunk_rows={chunk_rows}", cure="Leave them at their defaults.",
            )  # fmt: skip
        half = budget_bytes // 2
        rows = chunk_rows or max(1, min(half // (20 * max(dim, 1)), 65_536))  # stored, float64 and a spare float64
        return cls(rows=rows, queries=max(1, half // (bytes_per_score * rows)))


class RowMask:
    """Rows that are hidden from single queries.

    Args:
        excluded: For each query an array of rows, or None to hide nothing.
        queries: Number of queries.
        targets: Number of targets.

    Raises:
        DataError: If there is not one array per query, or a row does not exist.
    """

    def __init__(self, excluded: Sequence[npt.NDArray[np.int64]] | None, *, queries: int, targets: int) -> None:
        if excluded is not None and len(excluded) != queries:
            raise DataError(
                "excluded rows", expected=f"one array for each of {queries} queries", got=str(len(excluded)),
                cure="Pass an empty array for a query without any.",
            )  # fmt: skip
        arrays = [np.asarray(rows, dtype=np.int64).reshape(-1) for rows in excluded or []]
        rows = np.concatenate([*arrays, np.empty(0, np.int64)])
        owners = np.repeat(np.arange(len(arrays)), [len(array) for array in arrays])
        if len(rows) and not 0 <= rows.min() <= rows.max() < targets:
            raise DataError(
                "excluded rows", expected=f"rows from 0 to {targets - 1}", got=f"{rows.min()} to {rows.max()}",
                cure="Take them from the same corpus as the vectors.",
            )  # fmt: skip
        order = np.argsort(rows, kind="stable")
        self._rows, self._owners = rows[order], owners[order].astype(np.int64)

    def hide(self, scores: torch.Tensor, *, first_query: int, first_row: int) -> None:
        """Set the scores of hidden rows to minus infinity, in place.

        Args:
            scores: Scores of consecutive queries and rows, ``(queries, rows)``.
            first_query: Query of the first line.
            first_row: Row of the first column.
        """
        begin, end = np.searchsorted(self._rows, [first_row, first_row + scores.shape[1]])
        lines = self._owners[begin:end] - first_query
        here = (lines >= 0) & (lines < len(scores))
        if here.any():
            line = torch.from_numpy(lines[here]).to(scores.device)
            column = torch.from_numpy(self._rows[begin:end][here] - first_row).to(scores.device)
            scores[line, column] = float("-inf")


def read_chunks(
    vectors: TargetVectors, rows: int, *, device: torch.device | str = "cpu", progress: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield all targets in order, as (first row, float64 vectors ``(at most rows, dim)`` on ``device``).

    Raises:
        DataError: If a vector is not finite or the rows read are not the rows asked for.
    """
    with tqdm(total=len(vectors), unit="target", desc="targets", disable=not progress, leave=False) as bar:
        for start in range(0, len(vectors), rows):
            stop = min(start + rows, len(vectors))
            chunk = vectors.read(start, stop).detach().to(device=device, dtype=torch.float64)
            if chunk.shape != (stop - start, vectors.dim):
                raise DataError(
                    f"targets {start} to {stop - 1}", expected=f"vectors of shape {(stop - start, vectors.dim)}",
                    got=str(tuple(chunk.shape)), cure="Check what reads the vectors.",
                )  # fmt: skip
            _check_finite(chunk, "target", start)
            yield start, chunk
            bar.update(stop - start)


def checked_search(queries: torch.Tensor, k: int, vectors: TargetVectors) -> torch.Tensor:
    """Return query vectors as float64 without gradient, once they and ``k`` are found in order.

    Raises:
        ConfigurationError: If ``k`` is below 1.
        DataError: As :func:`checked_queries`.
    """
    check_k(k)
    return checked_queries(queries, vectors)


def check_k(k: int) -> None:
    """Refuse to search for less than one target (ConfigurationError)."""
    if k < 1:
        raise ConfigurationError("search", expected="k >= 1", got=str(k), cure="Ask for at least one target.")


def checked_queries(queries: torch.Tensor, vectors: TargetVectors) -> torch.Tensor:
    """Return query vectors as float64 without gradient.

    Raises:
        DataError: If they do not have the targets' size or are not finite.
    """
    if queries.ndim != 2 or queries.shape[1] != vectors.dim or not queries.is_floating_point():
        raise DataError(
            "query vectors", expected=f"floating point numbers of shape (queries, {vectors.dim}), as the targets",
            got=f"{queries.dtype} of shape {tuple(queries.shape)}", cure="Encode queries for this index.",
        )  # fmt: skip
    queries = queries.detach().to(torch.float64)
    _check_finite(queries, "query", 0)
    return queries


def _check_finite(vectors: torch.Tensor, what: str, first: int) -> None:
    finite = torch.isfinite(vectors).all(dim=1)
    if not bool(finite.all()):
        row = first + int((~finite).nonzero()[0, 0])
        raise DataError(f"{what} {row}", expected="finite numbers", got="NaN or infinity", cure="Encode it again.")
