"""Exact draws from a softmax over all targets, of which every process may hold only a part.

A target's perturbed logit is its logit plus a Gumbel number; the k highest of them are k draws from the softmax without
replacement (Gumbel-top-k). No number per target is drawn: the highest perturbed logit of a block of targets is itself
Gumbel, at the block's log-sum-exp, and each following one is Gumbel below the one before it (top-down sampling,
Maddison et al. 2014, Kool et al. 2019). As the numbers of a block are keyed by the block, the draws do not depend on
which process holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from hf_corrector.sampling.exclusions import ExcludedRows
from hf_corrector.sampling.keys import FIRST_OF_BLOCK, LISTED, NEXT_OF_BLOCK, WITHIN_BLOCK, DrawKeys

ScoreBlock = Callable[[int, int], torch.Tensor]
Exchange = Callable[[torch.Tensor], Sequence[torch.Tensor]]

# The draws depend on this number (it decides which targets form a block), so it is not an option.
BLOCK_ROWS = 4096
KEPT_SCORES_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
_SMALLEST_MASS = 1e-290  # smaller float64 numbers lose digits
_PER_BLOCK = 2**20  # draws from one block by one query that have numbers of their own


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


def _alone(own: torch.Tensor) -> Sequence[torch.Tensor]:
    return [own]


@dataclass(frozen=True)
class ScoredTargets:
    """The targets of a softmax, as one process sees them.

    Attributes:
        score_block: Returns the unscaled scores of targets ``start`` to ``stop``, ``(batch, stop − start)`` float32, in
            any floating type; called once per block and, where the scores of all targets do not fit in
            memory, again for the blocks drawn from.
        count: Number of all targets.
        own: First and last (exclusive) block this process scores; all if None.
        exchange: Returns the tensors that all processes pass in, in order of their blocks.
    """

    score_block: ScoreBlock
    count: int
    own: tuple[int, int] | None = None
    exchange: Exchange = _alone

    @property
    def blocks(self) -> range:
        """The blocks this process scores."""
        return range(-(-self.count // BLOCK_ROWS)) if self.own is None else range(*self.own)


def share_of_blocks(count: int, part: int, parts: int) -> tuple[int, int]:
    """Return first and last (exclusive) block of one of several nearly equal, contiguous parts of the targets."""
    blocks = -(-count // BLOCK_ROWS)
    return blocks * part // parts, blocks * (part + 1) // parts


def draw_softmax(
    targets: ScoredTargets, k: int, *, scale: float, excluded: ExcludedRows, keys: DrawKeys
) -> SoftmaxDraws:
    """Draw k distinct targets per query from the softmax over all targets.

    Args:
        targets: All targets, or this process's part of them.
        k: Draws per query.
        scale: Inverse temperature β.
        excluded: Targets without mass.
        keys: What the draws are keyed by.

    Returns:
        The draws, the same in all processes; see :class:`SoftmaxDraws`.
    """
    logits = _Logits(targets, scale=scale, excluded=excluded)
    masses = logits.masses()
    log_normalizer = torch.logsumexp(torch.cat(list(targets.exchange(masses)), dim=1), dim=1)
    firsts = keys.uniforms(len(targets.blocks), stream=FIRST_OF_BLOCK, first=targets.blocks.start)
    heads = masses + gumbel(torch.from_numpy(firsts).to(masses.device))
    everywhere = torch.cat(list(targets.exchange(heads)), dim=1)
    # No target below the k-th highest head can be among the k drawn: each head above it stands for another target.
    floor = everywhere.topk(min(k, everywhere.shape[1]), dim=1).values[:, -1]
    if everywhere.shape[1] < k:
        floor = torch.full_like(floor, float("-inf"))
    drawn = _draw_own(logits, masses, heads, k, floor=floor, keys=keys)
    parts = [torch.cat(list(targets.exchange(one)), dim=1) for one in (drawn.ids, drawn.logits, drawn.heads)]
    return _highest(parts[0], parts[1], parts[2], k, scale=scale, log_normalizer=log_normalizer)


@dataclass(frozen=True)
class ListedTargets:
    """Targets listed for each query.

    Attributes:
        ids: Rows, distinct for each query, ``(batch, n)`` int64; −1 for none.
        scores: Their unscaled scores, ``(batch, n)`` float32.
        log_weight: Log of how many targets each stands for, ``(batch, n)``; None where each stands for itself.
    """

    ids: torch.Tensor
    scores: torch.Tensor
    log_weight: torch.Tensor | None = None


def draw_listed(targets: ListedTargets, k: int, *, scale: float, keys: DrawKeys) -> SoftmaxDraws:
    """Draw k distinct targets per query from a softmax over targets listed for it."""
    logits = scale * targets.scores.double()
    weighted = logits if targets.log_weight is None else logits + targets.log_weight
    weighted = weighted.masked_fill(targets.ids < 0, -torch.inf)
    noise = torch.from_numpy(keys.numbers(targets.ids.cpu().numpy().clip(0), stream=LISTED)).to(logits.device)
    log_normalizer = torch.logsumexp(weighted, dim=1)
    return _highest(targets.ids, logits, weighted + gumbel(noise), k, scale=scale, log_normalizer=log_normalizer)


def top_listed(targets: ListedTargets, k: int) -> SoftmaxDraws:
    """Return the k highest scores of targets listed for each query, equal ones by row; no normaliser is known."""
    by_row = torch.argsort(targets.ids, dim=1, stable=True)
    ids = targets.ids.gather(1, by_row)
    scores = targets.scores.gather(1, by_row).masked_fill(ids < 0, -torch.inf)
    unknown = torch.full((len(ids),), torch.nan, dtype=torch.float64, device=ids.device)
    return _highest(ids, scores, scores, k, scale=1.0, log_normalizer=unknown)


def gumbel(uniforms: torch.Tensor) -> torch.Tensor:
    """Turn numbers in [0, 1) into Gumbel numbers."""
    return -torch.log(-torch.log(uniforms.clamp(min=2.0**-54)))


def _highest(
    ids: torch.Tensor, logits: torch.Tensor, perturbed: torch.Tensor, k: int, *, scale: float,
    log_normalizer: torch.Tensor,
) -> SoftmaxDraws:  # fmt: skip
    """Take the k highest perturbed logits of each query."""
    missing = k - ids.shape[1]
    if missing > 0:
        ids = F.pad(ids, (0, missing), value=-1)
        logits, perturbed = (F.pad(one, (0, missing), value=-torch.inf) for one in (logits, perturbed))
    # Float64 numbers of distinct targets do not tie in practice; the place decides all the same.
    order = _highest_places(perturbed, k)
    alive = perturbed.gather(1, order) > -torch.inf
    found = torch.where(alive, ids.gather(1, order), torch.full_like(order, -1))
    scores = torch.where(alive, logits.gather(1, order), torch.full_like(perturbed[:, :k], -torch.inf)) / scale
    return SoftmaxDraws(found, scores.float(), log_normalizer)


def _highest_places(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the places of the k highest values of each row, highest first, equal ones by place, ``(batch, k)``."""
    if not values.numel():
        return torch.zeros(len(values), k, dtype=torch.int64, device=values.device)
    # Sorting only what may be among them: topk alone chooses among values equal to the k-th as it likes.
    outside = values < values.topk(k, dim=1).values[:, -1:]
    most = values.shape[1] - int(outside.sum(dim=1).min())
    columns = torch.arange(values.shape[1], device=values.device).expand_as(values)
    places = torch.where(outside, columns + values.shape[1], columns).topk(most, dim=1, largest=False).values
    there = places < values.shape[1]
    places = places % values.shape[1]
    order = torch.argsort(
        values.gather(1, places).masked_fill(~there, -torch.inf), dim=1, descending=True, stable=True
    )  # fmt: skip
    return places.gather(1, order[:, :k])


@dataclass(frozen=True)
class _OwnDraws:
    ids: torch.Tensor
    logits: torch.Tensor
    heads: torch.Tensor


def _draw_own(
    logits: _Logits, masses: torch.Tensor, heads: torch.Tensor, k: int, *, floor: torch.Tensor, keys: DrawKeys
) -> _OwnDraws:
    """Draw what this process's blocks contribute, highest perturbed logit first, down to ``floor``."""
    batch, device, first = len(masses), masses.device, logits.targets.blocks.start
    drawn = _OwnDraws(
        torch.full((batch, k), -1, dtype=torch.int64, device=device),
        torch.full((batch, k), -torch.inf, dtype=torch.float64, device=device),
        torch.full((batch, k), -torch.inf, dtype=torch.float64, device=device),
    )
    everyone, blocks_drawn = torch.arange(batch, device=device), torch.full((batch, k), -1, device=device)
    heads = heads.clone()
    for draw in range(k if heads.shape[1] else 0):
        value, block = heads.max(dim=1)
        alive = (value >= floor) & (value > -torch.inf)
        if not bool(alive.any()):
            break
        weights = logits.of(block)
        _strike_drawn(weights, drawn.ids[:, :draw] - (block[:, None] + first) * BLOCK_ROWS)
        times = (blocks_drawn[:, :draw] == block[:, None]).sum(dim=1)
        positions = ((block + first) * _PER_BLOCK + times).cpu().numpy()[:, None]
        within, following = (
            torch.from_numpy(keys.numbers(positions, stream=stream)).to(device)
            for stream in (WITHIN_BLOCK, NEXT_OF_BLOCK)
        )
        column, logit, left = _take_one(weights, within)
        drawn.ids[:, draw] = torch.where(alive, (block + first) * BLOCK_ROWS + column, drawn.ids[:, draw])
        drawn.logits[:, draw] = torch.where(alive, logit, drawn.logits[:, draw])
        drawn.heads[:, draw] = torch.where(alive, value, drawn.heads[:, draw])
        blocks_drawn[:, draw] = block
        heads[everyone, block] = _gumbel_below(value, left, following[:, 0])
    return drawn


def _gumbel_below(limit: torch.Tensor, location: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw a Gumbel number at ``location`` given that it is below ``limit``; −inf where the location is."""
    below = location - torch.logaddexp(location - limit, -gumbel(uniforms))
    return torch.where(location > -torch.inf, torch.minimum(below, limit), torch.full_like(below, -torch.inf))


def _strike_drawn(weights: torch.Tensor, columns: torch.Tensor) -> None:
    """Set logits of columns that were drawn before to −inf; columns of other blocks lie outside."""
    inside = (columns >= 0) & (columns < weights.shape[1])
    query = torch.arange(len(weights), device=weights.device)[:, None].expand_as(columns)
    weights[query[inside], columns[inside]] = -torch.inf


def _take_one(logits: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw one column of each row from its softmax; return it, its logit and the log-sum-exp of all others."""
    highest = logits.amax(dim=1, keepdim=True)
    # Rows without mass stay so: −inf minus −inf is no number.
    masses = torch.exp(logits - highest.masked_fill(highest == -torch.inf, 0.0))
    column = _inverse_cdf(masses, shares)
    everyone = torch.arange(len(logits), device=logits.device)
    logit = logits[everyone, column]
    masses[everyone, column] = 0.0
    rest = masses.sum(dim=1)
    left = torch.log(rest) + highest[:, 0]
    vanished = rest < _SMALLEST_MASS
    if bool(vanished.any()):
        others = logits[vanished]
        others[torch.arange(len(others), device=logits.device), column[vanished]] = -torch.inf
        left[vanished] = torch.logsumexp(others, dim=1)
    return column, logit, left


def _inverse_cdf(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Return for each row the column whose cumulative weight first exceeds a share of it, never one without weight."""
    cumulative = weights.cumsum(dim=1)
    points = shares * cumulative[:, -1:]
    # Rounding may put the point at the total: the last column with weight is then meant.
    below_total = torch.nextafter(cumulative[:, -1:], torch.zeros_like(points))
    found = torch.searchsorted(cumulative, torch.minimum(points, below_total), right=True)[:, 0]
    return found.clamp(max=weights.shape[1] - 1)


class _Logits:
    """Scaled scores of a process's blocks, kept in memory if all of them fit and computed again if not."""

    def __init__(self, targets: ScoredTargets, *, scale: float, excluded: ExcludedRows) -> None:
        self.targets, self._scale, self._excluded = targets, scale, excluded
        self._kept: torch.Tensor | None = None

    def masses(self) -> torch.Tensor:
        """Return the log-sum-exp of every own block, ``(batch, blocks)`` float64."""
        batch, blocks = len(self._excluded.per_query), self.targets.blocks
        # Made first: small results between large temporary ones would keep their memory from being given back.
        found = torch.zeros(batch, len(blocks), dtype=torch.float64)
        for number, block in enumerate(blocks):
            scores = self._score(block)
            if number == 0 and batch * len(blocks) * BLOCK_ROWS * 4 <= KEPT_SCORES_BYTES.get(scores.device.type, 0):
                shape = (batch, len(blocks), min(BLOCK_ROWS, self.targets.count))
                self._kept = torch.full(shape, -torch.inf, dtype=torch.float32, device=scores.device)
            if self._kept is None:
                logits = scores.to(torch.float32, copy=True)
            else:
                logits = self._kept[:, number, : scores.shape[1]].copy_(scores)
            found = found.to(logits.device)
            found[:, number] = torch.logsumexp(self._scaled(logits, block), dim=1)
        # A process without a block still takes part; its scores would have been where an empty block's are.
        return found if len(blocks) else found.to(self.targets.score_block(0, 0).device)

    def of(self, blocks: torch.Tensor) -> torch.Tensor:
        """Return each query's logits in the own block chosen for it, ``(batch, widest block)`` float64."""
        everyone = torch.arange(len(blocks), device=blocks.device)
        if self._kept is not None:
            return self._kept[everyone, blocks].double()
        shape = (len(blocks), min(BLOCK_ROWS, self.targets.count))
        chosen = torch.full(shape, -torch.inf, dtype=torch.float64, device=blocks.device)
        for block in np.unique(blocks.cpu().numpy()).tolist():
            logits = self.compute(self.targets.blocks.start + block)
            here = blocks == block
            chosen[here, : logits.shape[1]] = logits[here].double()
        return chosen

    def compute(self, block: int) -> torch.Tensor:
        """Return the logits of one block by its number among all, ``(batch, rows)`` float32."""
        # A copy, as it is written to and may be a part of something kept.
        return self._scaled(self._score(block).to(torch.float32, copy=True), block)

    def _score(self, block: int) -> torch.Tensor:
        start = block * BLOCK_ROWS
        return self.targets.score_block(start, min(start + BLOCK_ROWS, self.targets.count))

    def _scaled(self, scores: torch.Tensor, block: int) -> torch.Tensor:
        """Turn scores into logits, in place."""
        self._excluded.strike(scores, block * BLOCK_ROWS)
        return scores.mul_(self._scale)


def top_scores(targets: ScoredTargets, count: int, *, excluded: ExcludedRows) -> torch.Tensor:
    """Return the highest scores of each query among all targets not excluded, ``(batch, count)``, −inf where none."""
    logits = _Logits(targets, scale=1.0, excluded=excluded)
    best: torch.Tensor | None = None
    for block in targets.blocks:
        scores = logits.compute(block)
        joined = scores if best is None else torch.cat([best, scores], dim=1)
        best = joined.topk(min(count, joined.shape[1]), dim=1).values
    if best is None:
        best = logits.masses().float()
    everywhere = torch.cat(list(targets.exchange(best)), dim=1)
    found = everywhere.topk(min(count, everywhere.shape[1]), dim=1).values
    return F.pad(found, (0, count - found.shape[1]), value=-torch.inf)
