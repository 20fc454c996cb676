"""Bridge between the scan of all targets and the loss: which targets each query of a batch is contrasted with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.sampling import (
    Candidates,
    DrawKeys,
    ExcludedRows,
    IntArray,
    NegativeFilter,
    draw_uniform,
    uniform_counts,
)
from hf_corrector.scans import TargetScan

SAMPLED_NEGATIVES = ("softmax", "top_k", "uniform")
TooGood = Callable[[IntArray], npt.NDArray[np.bool_]]
_ROUNDING = 2.0**-20
_MOST_PROPOSALS = 256  # uniform targets looked at for each one that does not score too high


@dataclass(frozen=True)
class SamplingPlan:
    """How negatives are chosen.

    Attributes:
        negatives: ``"softmax"`` (drawn from P_h over all targets), ``"top_k"`` (its highest) or ``"uniform"``.
        num_negatives: Negatives per query, k.
        uniform_fraction: Share of the k drawn uniformly, so that no target is never looked at.
        scale: Inverse temperature β of P_h.
        seed: Seed the draws are keyed by.
        negative_filter: Which targets are too good to be negatives.
    """

    negatives: str
    num_negatives: int
    uniform_fraction: float
    scale: float
    seed: int
    negative_filter: NegativeFilter = field(default_factory=NegativeFilter)

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        if self.negatives not in SAMPLED_NEGATIVES or self.num_negatives < 1 or not 0 <= self.uniform_fraction <= 1:
            raise ConfigurationError(
                "sampling plan", expected=f"negatives among {SAMPLED_NEGATIVES}, num_negatives >= 1, "
                "uniform_fraction between 0 and 1",
                got=f"{self.negatives!r}, {self.num_negatives}, {self.uniform_fraction}", cure="Correct the argument.",
            )  # fmt: skip

    @property
    def hard_share(self) -> float:
        """Expected number of a query's negatives that are not uniform."""
        return 0.0 if self.negatives == "uniform" else self.num_negatives * (1 - self.uniform_fraction)


@dataclass(frozen=True)
class Sampled:
    """Candidates, and what else their sampler knows.

    Attributes:
        candidates: The negatives; places that could not be filled are masked.
        log_normalizer: Of the softmax they were drawn from, ``(batch,)`` float64, or None where there was none.
        excluded: What could not be drawn, ceilings of scores included.
        too_good: Says which targets, rows ``(n,)``, score above each query's ceiling, ``(batch, n)`` bool, so that it
            must not share them either; None without a ceiling.
    """

    candidates: Candidates
    log_normalizer: torch.Tensor | None
    excluded: ExcludedRows
    too_good: TooGood | None


@torch.no_grad()
def sample_candidates(
    scan: TargetScan, queries: torch.Tensor, plan: SamplingPlan, *, positives: torch.Tensor, excluded: ExcludedRows,
    keys: DrawKeys,
) -> Sampled:  # fmt: skip
    """Choose k distinct negatives per query from all targets.

    Args:
        scan: All targets as the sampler sees them.
        queries: Query embeddings, ``(batch, dim)``.
        plan: How to choose.
        positives: The positive of each query, which the filter compares with, ``(batch,)`` int64.
        excluded: Known positives, never returned; the filter compares with them too.
        keys: What the draws are keyed by.
    """
    queries = queries.detach().float().to(scan.device)
    k, draws = plan.num_negatives, None
    excluded = _below_ceiling(scan, queries, plan.negative_filter, positives=positives, excluded=excluded, keys=keys)
    too_good = _above_ceiling(scan, queries, excluded)
    hard = torch.full((len(queries), 0), -1, dtype=torch.int64)
    if plan.negatives == "softmax":
        draws = scan.draw(queries, k, scale=plan.scale, excluded=excluded, keys=keys)
        hard = draws.ids.cpu()
    elif plan.negatives == "top_k":
        hard = scan.top(queries, k, excluded=excluded, keys=keys).ids.cpu()
    uniform = _draw_uniform_below(scan, queries, 2 * k, excluded=excluded, keys=keys)
    ids, is_uniform = _mix(hard.numpy(), uniform, plan, keys)
    scores = scan.score(queries, ids.clamp(min=0))
    if draws is None:
        found = _candidates(ids, is_uniform, scores, plan, num_targets=len(scan), excluded=excluded)
        return Sampled(found, None, excluded, too_good)
    # Drawn ones with the score they were drawn by, which may be rounded or a few steps old.
    drawn = (~is_uniform & (ids >= 0)).to(scores.device)
    scores = torch.where(drawn, draws.scores[:, : ids.shape[1]], scores)
    found = _candidates(ids, is_uniform, scores, plan, num_targets=len(scan), excluded=excluded)
    rate = torch.exp(_log_uniform_rate(plan, len(scan), excluded).to(scores.device))
    expected = plan.hard_share * _chances(scores, draws.log_normalizer, plan.scale) + rate[:, None]
    log_proposal = torch.log(expected).clamp(min=-80.0).float()
    return Sampled(replace(found, log_proposal=log_proposal), draws.log_normalizer, excluded, too_good)


def _chances(scores: torch.Tensor, log_normalizer: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the probability of targets in a softmax, ``(batch, k)`` float64; 0 in one without any target."""
    missing = (log_normalizer == -torch.inf)[:, None]
    # A softmax that is known from a sample may be normalised by less than one of its targets outside the sample.
    return torch.exp(scale * scores.double() - log_normalizer[:, None]).clamp(max=1.0).masked_fill(missing, 0.0)


def _draw_uniform_below(
    scan: TargetScan, queries: torch.Tensor, count: int, *, excluded: ExcludedRows, keys: DrawKeys
) -> IntArray:
    """Draw distinct targets uniformly among those that do not score too high, ``(batch, count)``, −1 for none."""
    if excluded.ceiling is None:
        return draw_uniform(len(scan), count, excluded=excluded, keys=keys)
    # Scores of single targets are summed in another order than those of blocks, which a ceiling may come from.
    ceiling = excluded.ceiling - _ROUNDING * excluded.ceiling.abs().nan_to_num(posinf=0.0)
    drawn = np.full((len(queries), count), -1, dtype=np.int64)
    left, size = np.arange(len(queries)), count
    while len(left) and size <= _MOST_PROPOSALS * count:
        # Each query draws more until half as many remain as were asked for, whatever others do.
        some = ExcludedRows([excluded.per_query[row] for row in left])
        found = draw_uniform(len(scan), size, excluded=some, keys=keys.of(left))
        rows, there = torch.from_numpy(left).to(queries.device), found >= 0
        scores = scan.score(queries[rows], torch.from_numpy(np.where(there, found, _any_row(found))))
        found[(scores > ceiling[rows, None]).cpu().numpy()] = -1
        drawn[left] = _first_found(found, count)
        few = (drawn[left] >= 0).sum(axis=1) < (count + 1) // 2
        left, size = left[few & there.all(axis=1)], 4 * size
    return drawn


def _any_row(found: IntArray) -> int:
    """Return a row that is scored anyway, for places without one."""
    return max(int(found.max(initial=0)), 0)


def _first_found(ids: IntArray, count: int) -> IntArray:
    """Return the first ``count`` of each query's targets that are some, −1 behind them."""
    order = np.argsort(ids < 0, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(ids, order, axis=1)


def sample_uniformly(num_targets: int, plan: SamplingPlan, *, excluded: ExcludedRows, keys: DrawKeys) -> Candidates:
    """Choose k distinct negatives per query by chance, without looking at any vector; their scores are zero."""
    drawn = draw_uniform(num_targets, plan.num_negatives, excluded=excluded, keys=keys)
    ids = torch.from_numpy(drawn)
    return _candidates(ids, ids >= 0, torch.zeros(ids.shape), plan, num_targets=num_targets, excluded=excluded)


def _below_ceiling(
    scan: TargetScan, queries: torch.Tensor, wanted: NegativeFilter, *, positives: torch.Tensor, excluded: ExcludedRows,
    keys: DrawKeys,
) -> ExcludedRows:  # fmt: skip
    """Add to what is excluded the targets that score too high."""
    if wanted.by_score:
        scores = _lowest_positive(scan, queries, positives, excluded) if wanted.reads_positives else queries[:, 0]
        excluded = excluded.below(wanted.ceiling(scores.float()))
    if wanted.range_min:
        # Counted among what is left by the ceiling, as sentence-transformers does.
        skipped = scan.skip_highest(queries, wanted.range_min, excluded=excluded, keys=keys).to(queries.device)
        limit = skipped if excluded.ceiling is None else torch.minimum(skipped, excluded.ceiling)
        excluded = excluded.below(limit)
    return excluded


def _above_ceiling(scan: TargetScan, queries: torch.Tensor, excluded: ExcludedRows) -> TooGood | None:
    """Return what finds the targets above each query's ceiling by the scan's scores, or None without one."""
    ceiling = excluded.ceiling
    if ceiling is None:
        return None

    def too_good(rows: IntArray) -> npt.NDArray[np.bool_]:
        scores = scan.score(queries, torch.from_numpy(rows).expand(len(queries), -1))
        return np.asarray((scores > ceiling[:, None]).cpu().numpy())

    return too_good


def _lowest_positive(
    scan: TargetScan, queries: torch.Tensor, positives: torch.Tensor, excluded: ExcludedRows
) -> torch.Tensor:
    """Return the score of each query's lowest-scoring positive, the one trained on included, ``(batch,)``."""
    own = positives.cpu().numpy()
    known = [np.union1d(rows, one) for rows, one in zip(excluded.per_query, own, strict=True)]
    rows = np.repeat(own[:, None], max((len(one) for one in known), default=1), axis=1)
    for number, one in enumerate(known):
        rows[number, : len(one)] = one
    return scan.score(queries, torch.from_numpy(rows)).amin(dim=1)


def _mix(
    hard: IntArray, uniform: IntArray, plan: SamplingPlan, keys: DrawKeys
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Fill each query's k places with hard targets first, then with uniform ones not among them."""
    k = plan.num_negatives
    counts = np.full(len(uniform), k) if plan.negatives == "uniform" else uniform_counts(k, plan.uniform_fraction, keys)
    ids = np.full((len(uniform), k), -1, dtype=np.int64)
    from_uniform = np.zeros((len(uniform), k), dtype=bool)
    for row, count in enumerate(counts.tolist()):
        chosen = [one for one in hard[row, : k - count].tolist() if one >= 0] if count < k else []
        taken = set(chosen)
        extra = [one for one in uniform[row].tolist() if one >= 0 and one not in taken][:count]
        ids[row, : len(chosen) + len(extra)] = chosen + extra
        from_uniform[row, len(chosen) : len(chosen) + len(extra)] = True
    return torch.from_numpy(ids), torch.from_numpy(from_uniform)


def _candidates(
    ids: torch.Tensor, is_uniform: torch.Tensor, scores: torch.Tensor, plan: SamplingPlan, *, num_targets: int,
    excluded: ExcludedRows,
) -> Candidates:  # fmt: skip
    """Put candidates together whose hard ones, if any, were not drawn but taken for sure."""
    device = scores.device
    by_chance = _log_uniform_rate(plan, num_targets, excluded).float().to(device)[:, None].expand_as(scores)
    is_uniform = is_uniform.to(device)
    log_proposal = torch.where(is_uniform, by_chance, torch.zeros_like(scores))
    return Candidates(ids.to(device), scores, log_proposal, (ids >= 0).to(device), is_uniform)


def _log_uniform_rate(plan: SamplingPlan, num_targets: int, excluded: ExcludedRows) -> torch.Tensor:
    """Return the log of the expected number of uniform draws of one target, ``(batch,)`` float64."""
    free = torch.tensor([num_targets - len(known) for known in excluded.per_query])
    rate = (plan.num_negatives - plan.hard_share) / free.clamp(min=1).double()
    return torch.log(rate).clamp(min=-80.0)


@dataclass(frozen=True)
class GivenTargets:
    """What the data say about the queries of a batch.

    Attributes:
        positives: The positive each query is trained on, ``(batch,)`` int64.
        excluded: All known positives of each query.
        grades: For each query all its positives and their grades, to train on all of them; empty to train on one.
        negatives: For each query given hard negatives; empty for none.
        teacher: For each query the teacher's scores of targets; empty for none.
    """

    positives: torch.Tensor
    excluded: ExcludedRows
    grades: Sequence[Mapping[int, float]] = ()
    negatives: Sequence[Sequence[int]] = ()
    teacher: Sequence[Mapping[int, float]] = ()

    @property
    def more_rows(self) -> IntArray:
        """All rows the data name besides the positives trained on, distinct."""
        rows = [row for known in (*self.grades, *self.negatives) for row in known]
        return np.unique(np.asarray(rows, dtype=np.int64))


@dataclass(frozen=True)
class ContrastSet:
    """The targets a batch encodes, one column each, and which of them count for which query.

    Attributes:
        rows: Target rows: the positives of the batch, then all other distinct targets, ``(columns,)`` int64 on the CPU.
        allowed: ``(batch, columns)`` bool; a query's own positive is always allowed, its other known positives never,
            and of columns with the same target only the first.
        log_proposal: Log expected draws, ``(batch, columns)`` float32; 0 where a column was not drawn.
        uniform: Which columns some query drew uniformly, ``(columns,)`` bool on the CPU.
        certain: Which columns would be there whatever was drawn, as the data name them, ``(columns,)`` bool on the CPU.
        label_weights: What each query's probability should be, ``(batch, columns)`` float32, where several positives
            are trained on.
        teacher_scores: The teacher's, ``(batch, columns)`` float32 with NaN where it said nothing, if there is one.
    """

    rows: torch.Tensor
    allowed: torch.Tensor
    log_proposal: torch.Tensor
    uniform: torch.Tensor
    certain: torch.Tensor
    label_weights: torch.Tensor | None = None
    teacher_scores: torch.Tensor | None = None


def contrast_set(
    candidates: Candidates | None, given: GivenTargets, *, share_negatives: bool, too_good: TooGood | None = None
) -> ContrastSet:
    """Decide which targets a batch encodes and which of them each query is contrasted with.

    Args:
        candidates: Sampled targets, or None for none.
        given: What the data say.
        share_negatives: Contrast each query with every column (the usual in-batch negatives, sampled ones included),
            or only with the targets sampled or given for it.
        too_good: Says which targets a query must not share, see :class:`Sampled`. Given negatives are kept whatever
            they score.
    """
    positives, batch = given.positives.cpu().numpy(), len(given.positives)
    ids = np.zeros((batch, 0), dtype=np.int64) if candidates is None else candidates.ids.cpu().numpy()
    wanted = np.union1d(ids[ids >= 0], given.more_rows)
    columns = _Columns(np.concatenate([positives, np.setdiff1d(wanted, positives)]))
    query, place = np.nonzero(ids >= 0)
    column = columns.first_of(ids[query, place])
    allowed = np.zeros((batch, len(columns.rows)), dtype=bool)
    if share_negatives:
        allowed[:, columns.first] = True if too_good is None else ~too_good(columns.rows[columns.first])
    allowed[query, column] = True
    for number, rows in enumerate(given.negatives):
        allowed[number, columns.first_of(np.asarray(rows, dtype=np.int64))] = True
    for number, known in enumerate(given.excluded.per_query):
        allowed[number] &= ~np.isin(columns.rows, known)
    allowed[np.arange(batch), np.arange(batch)] = True
    log_proposal = torch.zeros(batch, len(columns.rows))
    uniform = np.zeros(len(columns.rows), dtype=bool)
    if candidates is not None:
        log_proposal[query, column] = candidates.log_proposal.cpu()[query, place]
        uniform[column[candidates.uniform.cpu().numpy()[query, place]]] = True
    for number, rows in enumerate(given.negatives):
        # They are there for sure, drawn or not.
        log_proposal[number, columns.first_of(np.asarray(rows, dtype=np.int64))] = 0.0
    certain = np.isin(columns.rows, np.concatenate([positives, given.more_rows]))
    device = given.positives.device
    weights, teacher = _label_weights(columns, given), _teacher_scores(columns, given)
    return ContrastSet(
        torch.from_numpy(columns.rows), torch.from_numpy(allowed).to(device), log_proposal.to(device),
        torch.from_numpy(uniform), torch.from_numpy(certain), None if weights is None else weights.to(device),
        None if teacher is None else teacher.to(device),
    )  # fmt: skip


class _Columns:
    """Rows of the columns, and the first column of each distinct row."""

    def __init__(self, rows: IntArray) -> None:
        self.rows = rows
        self._distinct, self.first = np.unique(rows, return_index=True)

    def first_of(self, rows: IntArray) -> IntArray:
        """Return the first column of each row, all of which have one."""
        return np.asarray(self.first[np.searchsorted(self._distinct, rows)], dtype=np.int64)

    def has(self, rows: IntArray) -> npt.NDArray[np.bool_]:
        """Say which rows have a column."""
        return np.isin(rows, self._distinct)


def _label_weights(columns: _Columns, given: GivenTargets) -> torch.Tensor | None:
    if not given.grades:
        return None
    weights = torch.zeros(len(given.grades), len(columns.rows))
    own = given.positives.tolist()
    for number, grades in enumerate(given.grades):
        total = sum(grades.values())
        for row, grade in grades.items():
            # The positive trained on has a column of its own, which may not be the first with that target.
            column = number if row == own[number] else int(columns.first_of(np.asarray([row]))[0])
            weights[number, column] = grade / total
    return weights


def _teacher_scores(columns: _Columns, given: GivenTargets) -> torch.Tensor | None:
    if not given.teacher:
        return None
    scores = torch.full((len(given.teacher), len(columns.rows)), torch.nan)
    own = given.positives.tolist()
    for number, known in enumerate(given.teacher):
        rows = np.asarray(list(known), dtype=np.int64)
        there = columns.has(rows)
        found = torch.tensor(list(known.values()))[torch.from_numpy(there)]
        place = np.where(rows[there] == own[number], number, columns.first_of(rows[there]))
        scores[number, place] = found.float()
    return scores
