"""Which targets each query is contrasted with: keyed draws from a softmax over all targets, and uniform ones.

Every random number is a function of (seed, step, query), so that the draws do not depend on how queries are spread over
processes, nor on where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.int64]
ScoreBlock = Callable[[int, int], torch.Tensor]

# The draws depend on this number (it decides which cumulative sums are formed), so it is not an option.
BLOCK_ROWS = 4096
KEPT_SCORES_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Candidates:
    """Targets sampled for each query; every sampler returns this and every loss takes it.

    Attributes:
        ids: Rows of the sampled targets, ``(batch, k)`` int64; −1 where masked.
        scores: Their scores under the sampling distribution, ``(batch, k)`` float32.
        log_proposal: Log of the expected number of times each was drawn, ``(batch, k)`` float32.
        mask: Whether the place holds a target at all, ``(batch, k)`` bool.
        uniform: Whether the place was filled by a uniform draw, ``(batch, k)`` bool.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    log_proposal: torch.Tensor
    mask: torch.Tensor
    uniform: torch.Tensor


@dataclass(frozen=True)
class DrawKeys:
    """What random draws are keyed by.

    Attributes:
        seed: Seed of the run.
        step: Number of the draw within the run; two draws with equal keys are equal.
        query_ids: Stable number of each query, ``(batch,)`` int64.
    """

    seed: int
    step: int
    query_ids: IntArray

    def uniforms(self, count: int, *, stream: int) -> npt.NDArray[np.float64]:
        """Return numbers in [0, 1), ``(batch, count)``; streams are independent of each other.

        The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014) chained over the key's parts.
        """
        with np.errstate(over="ignore"):
            state = _mix(np.asarray(self.seed, dtype=np.int64).astype(np.uint64))
            state = _mix(state ^ np.asarray(self.step, dtype=np.int64).astype(np.uint64))
            state = _mix(state ^ np.uint64(stream))
            rows = _mix(state ^ self.query_ids.astype(np.int64).astype(np.uint64))
            bits = _mix(rows[:, None] ^ _mix(np.arange(1, count + 1, dtype=np.uint64))[None, :])
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    mixed = np.asarray(values, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)


class ExcludedRows:
    """Known positives of a batch of queries, ready to be struck out of blocks of scores.

    Args:
        rows: For each query the target rows that must never be returned as its negatives.
    """

    def __init__(self, rows: Sequence[npt.ArrayLike]) -> None:
        arrays = [np.unique(np.asarray(one, dtype=np.int64)) for one in rows]
        queries = np.repeat(np.arange(len(arrays)), [len(one) for one in arrays])
        targets = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        order = np.argsort(targets, kind="stable")
        self.per_query = arrays
        self._targets, self._queries = targets[order], queries[order]

    def strike(self, scores: torch.Tensor, start: int) -> None:
        """Set the scores of excluded targets to −inf, in place.

        Args:
            scores: Scores of the targets from row ``start`` on, ``(batch, n)``.
            start: Row of the first column.
        """
        low, high = np.searchsorted(self._targets, [start, start + scores.shape[1]])
        if high > low:
            queries = torch.from_numpy(self._queries[low:high])
            columns = torch.from_numpy(self._targets[low:high] - start)
            scores[queries.to(scores.device), columns.to(scores.device)] = float("-inf")


@dataclass(frozen=True)
class SoftmaxDraws:
    """Distinct targets drawn from P(y|x) ∝ exp(β·s(x, y)).

    Attributes:
        ids: Rows in the order drawn, ``(batch, k)`` int64; −1 where the targets ran out.
        scores: Unscaled scores, ``(batch, k)`` float32; −inf where the targets ran out.
        log_normalizer: log Σ exp(β·s) over all targets not excluded, ``(batch,)`` float64.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    log_normalizer: torch.Tensor


def draw_softmax(
    score_block: ScoreBlock, num_targets: int, k: int, *, scale: float, excluded: ExcludedRows, keys: DrawKeys
) -> SoftmaxDraws:
    """Draw k distinct targets per query from the softmax over all targets, without a random number per target.

    A block of targets is drawn by its share of the mass, then a target within the block (inverse CDF), k times without
    replacement: the distribution of Gumbel-top-k, at ``batch × k`` random numbers instead of ``batch × num_targets``.

    Args:
        score_block: Returns the scores of targets ``start`` to ``stop``, ``(batch, stop − start)`` float32; called once
            per block and, where the scores of all targets do not fit in memory, again for the blocks drawn.
        num_targets: Number of targets.
        k: Draws per query.
        scale: Inverse temperature β.
        excluded: Known positives; they have no mass.
        keys: What the draws are keyed by.

    Returns:
        The draws, see :class:`SoftmaxDraws`.
    """
    blocks = _ScoreBlocks(score_block, num_targets, scale=scale, excluded=excluded)
    log_mass = blocks.log_masses()
    log_normalizer = torch.logsumexp(log_mass, dim=1)
    uniforms = torch.from_numpy(keys.uniforms(k, stream=1)).to(log_mass.device)
    batch = len(log_mass)
    ids = torch.full((batch, k), -1, dtype=torch.int64, device=log_mass.device)
    logits = torch.full((batch, k), float("-inf"), dtype=torch.float64, device=log_mass.device)
    everyone = torch.arange(batch, device=log_mass.device)
    for draw in range(k):
        # Relative to what is left, so that a target however unlikely at first is drawn before the targets run out.
        left = torch.logsumexp(log_mass, dim=1, keepdim=True)
        mass = torch.exp(log_mass - left).nan_to_num(0.0)
        cumulative = mass.cumsum(dim=1)
        point = uniforms[:, draw : draw + 1] * cumulative[:, -1:]
        block = torch.searchsorted(cumulative, point, right=True).clamp(max=mass.shape[1] - 1)
        before = (cumulative.gather(1, block) - mass.gather(1, block)).clamp(min=0.0)
        block = block[:, 0]
        block_logits = blocks.logits_of(block)
        taken = ids[:, :draw] - block[:, None] * BLOCK_ROWS
        inside = (taken >= 0) & (taken < BLOCK_ROWS) & (ids[:, :draw] >= 0)
        block_logits[everyone[:, None].expand_as(taken)[inside], taken[inside]] = float("-inf")
        weights = torch.exp(block_logits - left).nan_to_num(0.0)
        column = _inverse_cdf(weights, point - before)
        alive = weights.gather(1, column[:, None])[:, 0] > 0
        ids[:, draw] = torch.where(alive, block * BLOCK_ROWS + column, ids[:, draw])
        logits[:, draw] = torch.where(alive, block_logits[everyone, column], logits[:, draw])
        block_logits[everyone, column] = float("-inf")
        log_mass[everyone, block] = torch.logsumexp(block_logits, dim=1)
    return SoftmaxDraws(ids=ids, scores=(logits / scale).float(), log_normalizer=log_normalizer)


def _inverse_cdf(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return for each row the column whose cumulative weight first exceeds the point, never one without weight."""
    cumulative = weights.cumsum(dim=1)
    points = points.clamp(min=0.0)
    # Rounding may put the point at or beyond the total: the last column with weight is then meant.
    below_total = torch.nextafter(cumulative[:, -1:], torch.zeros_like(points))
    return torch.searchsorted(cumulative, torch.minimum(points, below_total), right=True)[:, 0].clamp(
        max=weights.shape[1] - 1
    )


class _ScoreBlocks:
    """Scaled scores by block, kept in memory if all of them fit and computed again if not."""

    def __init__(self, score_block: ScoreBlock, num_targets: int, *, scale: float, excluded: ExcludedRows) -> None:
        self._score_block, self._num_targets = score_block, num_targets
        self._scale, self._excluded = scale, excluded
        self._kept: list[torch.Tensor] = []

    def log_masses(self) -> torch.Tensor:
        """Return the log-sum-exp of every block, ``(batch, blocks)`` float64."""
        masses = []
        for start in range(0, self._num_targets, BLOCK_ROWS):
            logits = self._logits(start)
            masses.append(torch.logsumexp(logits.double(), dim=1))
            if len(self._excluded.per_query) * self._num_targets * 4 <= KEPT_SCORES_BYTES:
                self._kept.append(logits)
        return torch.stack(masses, dim=1)

    def logits_of(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return each query's scaled scores in the block chosen for it, ``(batch, widest block)`` float64."""
        shape = (len(blocks), min(BLOCK_ROWS, self._num_targets))
        chosen = torch.full(shape, float("-inf"), dtype=torch.float64, device=blocks.device)
        for block in torch.unique(blocks).tolist():
            rows = (blocks == block).nonzero()[:, 0]
            logits = self._kept[block] if self._kept else self._logits(block * BLOCK_ROWS)
            chosen[rows, : logits.shape[1]] = logits[rows].double()
        return chosen

    def _logits(self, start: int) -> torch.Tensor:
        scores = self._score_block(start, min(start + BLOCK_ROWS, self._num_targets)).float() * self._scale
        self._excluded.strike(scores, start)
        return scores


def draw_uniform(num_targets: int, k: int, *, excluded: ExcludedRows, keys: DrawKeys) -> IntArray:
    """Draw k distinct targets per query uniformly.

    Args:
        num_targets: Number of targets.
        k: Draws per query.
        excluded: Rows that are never drawn.
        keys: What the draws are keyed by.

    Returns:
        Rows, ``(batch, k)`` int64; −1 where a query has fewer targets left.
    """
    drawn = np.full((len(keys.query_ids), k), -1, dtype=np.int64)
    free = [num_targets - len(rows) for rows in excluded.per_query]
    wanted = 4 * k + 16
    proposals = np.minimum((keys.uniforms(wanted, stream=2) * num_targets).astype(np.int64), num_targets - 1)
    for row, banned in enumerate(excluded.per_query):
        seen = set(banned.tolist())
        fresh = [one for one in dict.fromkeys(proposals[row].tolist()) if one not in seen][:k]
        if len(fresh) < min(k, free[row]):
            # So few targets are left that rejection is a bad idea: shuffle them all with further keyed numbers.
            rest = np.setdiff1d(np.arange(num_targets), np.asarray([*seen, *fresh], dtype=np.int64))
            one_query = DrawKeys(keys.seed, keys.step, keys.query_ids[row : row + 1])
            fresh += rest[np.argsort(one_query.uniforms(len(rest), stream=3)[0], kind="stable")].tolist()
        fresh = fresh[:k]
        drawn[row, : len(fresh)] = fresh
    return drawn


def uniform_counts(k: int, fraction: float, keys: DrawKeys) -> IntArray:
    """Decide how many of each query's k negatives are drawn uniformly.

    ``k × fraction`` is rounded up or down at random, keyed by the query, so that the mean over queries is exact.

    Returns:
        Counts between 0 and k, ``(batch,)`` int64.
    """
    return np.floor(k * fraction + keys.uniforms(1, stream=4)[:, 0]).astype(np.int64).clip(0, k)
