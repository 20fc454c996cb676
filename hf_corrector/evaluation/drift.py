"""How far approximate target vectors are from exact ones, and what that does to the sampling distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import RunningTopK, SearchResult, TargetVectors
from hf_corrector.index.exact import DEFAULT_BUDGET_BYTES, Blocks, RowMask, checked_queries, read_chunks
from hf_corrector.metrics import Relevant

_BYTES_PER_SCORE = 64  # two float64 logits, two probabilities, and in the first pass keys and what topk sets aside


@dataclass(frozen=True)
class Fidelity:
    """How close a sampling distribution over targets is to the exact one, known positives left out of both.

    Attributes:
        tv: Mean over queries of the total variation: 0 equal, 1 disjoint.
        hard_negative_recall: Mean share of the exact ``hard_k`` best targets that are among the approximate ones.
        queries: Number of queries.
        hard_k: How many best targets are compared.
    """

    tv: float
    hard_negative_recall: float
    queries: int
    hard_k: int = 50

    def to_dict(self) -> dict[str, float | int]:
        """Return all fields for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FidelityOptions:
    """How :func:`sampler_fidelity` measures.

    Attributes:
        hard_k: How many best targets are compared.
        budget_bytes: Working memory, as in :class:`~hf_corrector.index.exact.ExactIndex`.
        device: Where scores are computed; must know float64.
        progress: Show a progress bar over targets, three in a row.
    """

    hard_k: int = 50
    budget_bytes: int = DEFAULT_BUDGET_BYTES
    device: torch.device | str = "cpu"
    progress: bool = False


def sampler_fidelity(
    queries: torch.Tensor,
    approx: TargetVectors,
    *,
    exact: TargetVectors,
    scale: float,
    relevant: Relevant,
    options: FidelityOptions | None = None,
) -> Fidelity:
    """Compare softmax(scale * query · target) over all targets under approximate and exact target vectors.

    Both sets of vectors are read twice: once for the normalisers and the best targets, once for the difference of the
    probabilities. Sums are accumulated in float64; no array of queries by targets is ever held.

    Args:
        queries: Query vectors of the current encoder, ``(queries, dim)``.
        approx: Target vectors the sampler uses: stale or corrected.
        exact: Target vectors of the current encoder, same rows.
        scale: Inverse temperature.
        relevant: For each query its relevant target rows and grades; those with a grade above 0 are masked.
        options: How to measure.

    Returns:
        Total variation and hard-negative recall, means over queries.

    Raises:
        DataError: If shapes do not fit, a vector is not finite, or a query has no target left once masked.
        ConfigurationError: If ``scale`` or ``hard_k`` is not positive.
    """
    options = options or FidelityOptions()
    if not (np.isfinite(scale) and scale > 0) or options.hard_k < 1:
        raise ConfigurationError(
            "sampler fidelity", expected="scale > 0 and hard_k >= 1", got=f"scale={scale}, hard_k={options.hard_k}",
            cure="Pass the scale the encoder is trained with.",
        )  # fmt: skip
    _check_same_rows(approx, exact)
    queries = checked_queries(queries, exact).to(options.device)
    mask, left = _mask_of_positives(relevant, queries=len(queries), targets=len(exact))
    measure = _Measure(queries, mask, scale, options)
    log_approx, best_approx = measure.normalise(approx)
    log_exact, best_exact = measure.normalise(exact)
    variation = measure.variation(approx, exact, log_normalisers=(log_approx, log_exact))
    recall = _overlap(best_approx, best_exact, targets=len(exact)) / np.minimum(left, options.hard_k)
    return Fidelity(float(variation.mean()), float(recall.mean()), len(queries), options.hard_k)


def mean_cosine(approx: TargetVectors, exact: TargetVectors, *, progress: bool = False) -> float:
    """Return the mean cosine of approximate and exact vectors over all targets.

    Args:
        approx: Stale or corrected target vectors.
        exact: Target vectors of the current encoder, same rows and size.
        progress: Show a progress bar.

    Raises:
        DataError: If there are no targets, shapes differ, or a vector is zero or not finite.
    """
    _check_same_rows(approx, exact)
    if len(exact) == 0:
        raise DataError("mean cosine", expected="at least one target", got="none", cure="Pass vectors of a corpus.")
    blocks = Blocks.within(DEFAULT_BUDGET_BYTES, dim=3 * exact.dim)
    total = 0.0
    others = read_chunks(exact, blocks.rows)
    for start, mine in read_chunks(approx, blocks.rows, progress=progress):
        _, theirs = next(others)
        norms = mine.norm(dim=1) * theirs.norm(dim=1)
        if bool((norms == 0).any()):
            row = start + int((norms == 0).nonzero()[0, 0])
            raise DataError(f"target {row}", expected="a vector with a direction", got="zeros", cure="Encode it again.")
        total += float(((mine * theirs).sum(dim=1) / norms).sum())
    return total / len(exact)


class _Measure:
    """Queries, mask and block sizes shared by both passes."""

    def __init__(self, queries: torch.Tensor, mask: RowMask, scale: float, options: FidelityOptions) -> None:
        self.queries, self.mask, self.scale, self.options = queries, mask, scale, options
        self.blocks = Blocks.within(
            options.budget_bytes, dim=2 * queries.shape[1], bytes_per_score=_BYTES_PER_SCORE
        )  # twice the size, as both sets are held in the second pass

    def normalise(self, vectors: TargetVectors) -> tuple[torch.Tensor, SearchResult]:
        """Return the log of the normaliser of each query, ``(queries,)``, and the best targets."""
        log_normalisers = self.queries.new_full((len(self.queries),), float("-inf"))
        best = RunningTopK(len(self.queries), self.options.hard_k, device=self.queries.device)
        for start, chunk in self._chunks(vectors, self.options.progress):
            for first in range(0, len(self.queries), self.blocks.queries):
                logits = self._logits(chunk, first, start)
                part = slice(first, first + len(logits))
                log_normalisers[part] = torch.logaddexp(log_normalisers[part], logits.logsumexp(dim=1))
                best.update(logits.float(), first_query=first, first_row=start)
        return log_normalisers, best.result()

    def variation(
        self, approx: TargetVectors, exact: TargetVectors, *, log_normalisers: tuple[torch.Tensor, torch.Tensor]
    ) -> npt.NDArray[np.float64]:
        """Return the total variation of each query, ``(queries,)``."""
        log_approx, log_exact = (log[:, None] for log in log_normalisers)
        total = self.queries.new_zeros(len(self.queries))
        others = self._chunks(exact, False)
        for start, mine in self._chunks(approx, self.options.progress):
            _, theirs = next(others)
            for first in range(0, len(self.queries), self.blocks.queries):
                part = slice(first, first + self.blocks.queries)
                difference = (self._logits(mine, first, start) - log_approx[part]).exp_()
                difference -= (self._logits(theirs, first, start) - log_exact[part]).exp_()
                total[part] += difference.abs_().sum(dim=1)
        return np.asarray(total.cpu().numpy() / 2, dtype=np.float64)

    def _chunks(self, vectors: TargetVectors, progress: bool) -> Iterator[tuple[int, torch.Tensor]]:
        return read_chunks(vectors, self.blocks.rows, device=self.queries.device, progress=progress)

    def _logits(self, chunk: torch.Tensor, first_query: int, first_row: int) -> torch.Tensor:
        logits = (self.queries[first_query : first_query + self.blocks.queries] @ chunk.T).mul_(self.scale)
        self.mask.hide(logits, first_query=first_query, first_row=first_row)
        return logits


def _mask_of_positives(relevant: Relevant, *, queries: int, targets: int) -> tuple[RowMask, npt.NDArray[np.int64]]:
    """Return the mask of known positives, and how many targets are left to each query."""
    positives = [np.array([row for row, grade in judged.items() if grade > 0], np.int64) for judged in relevant]
    mask = RowMask(positives, queries=queries, targets=targets)
    left = targets - np.array([len(rows) for rows in positives], np.int64)
    if len(left) == 0 or left.min() < 1:
        raise DataError(
            "sampler fidelity", expected="at least one query, and for each at least one target that is no positive",
            got="no queries" if len(left) == 0 else f"none for query {int(left.argmin())}", cure="Use a larger corpus.",
        )  # fmt: skip
    return mask, left


def _overlap(approx: SearchResult, exact: SearchResult, *, targets: int) -> npt.NDArray[np.int64]:
    """Count for each query the rows in both results, ``(queries,)``."""
    owner = np.arange(len(exact.rows))[:, None] * targets
    mine, theirs = approx.rows.numpy(), exact.rows.numpy()
    shared = np.isin(np.where(theirs >= 0, owner + theirs, -1), np.where(mine >= 0, owner + mine, -2))
    return np.asarray(shared.sum(axis=1), dtype=np.int64)


def _check_same_rows(approx: TargetVectors, exact: TargetVectors) -> None:
    if (len(approx), approx.dim) != (len(exact), exact.dim):
        raise DataError(
            "approximate vectors", expected=f"{len(exact)} targets of size {exact.dim}, as the exact ones",
            got=f"{len(approx)} of size {approx.dim}", cure="Pass vectors of the same corpus in the same order.",
        )  # fmt: skip
