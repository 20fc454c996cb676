"""Bridge between corrected targets and the loss: which targets each query of a batch is contrasted with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import ConfigurationError
from hf_corrector.index.exact import ExactIndex
from hf_corrector.sampling import Candidates, DrawKeys, ExcludedRows, draw_softmax, draw_uniform, uniform_counts

SAMPLED_NEGATIVES = ("softmax", "top_k", "uniform")


@dataclass(frozen=True)
class SamplingPlan:
    """How negatives are chosen.

    Attributes:
        negatives: ``"softmax"`` (drawn from P_h over all targets), ``"top_k"`` (its highest) or ``"uniform"``.
        num_negatives: Negatives per query, k.
        uniform_fraction: Share of the k drawn uniformly, so that no target is never looked at.
        scale: Inverse temperature β of P_h.
        seed: Seed the draws are keyed by.
    """

    negatives: str
    num_negatives: int
    uniform_fraction: float
    scale: float
    seed: int

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


@torch.no_grad()
def sample_candidates(
    targets: CorrectedTargets, queries: torch.Tensor, plan: SamplingPlan, *, excluded: ExcludedRows, keys: DrawKeys
) -> Candidates:
    """Choose k distinct negatives per query from all targets.

    Args:
        targets: All targets as the sampler sees them.
        queries: Query embeddings, ``(batch, dim)``.
        plan: How to choose.
        excluded: Known positives, never returned.
        keys: What the draws are keyed by.

    Returns:
        The negatives; places that could not be filled are masked.
    """
    queries = queries.detach().float().to(targets.device)
    k, log_normalizer = plan.num_negatives, None
    hard = torch.full((len(queries), 0), -1, dtype=torch.int64)
    if plan.negatives == "softmax":
        draws = draw_softmax(
            lambda start, stop: queries @ targets.read(start, stop).T, len(targets), k,
            scale=plan.scale, excluded=excluded, keys=keys,
        )  # fmt: skip
        hard, log_normalizer = draws.ids.cpu(), draws.log_normalizer
    elif plan.negatives == "top_k":
        found = ExactIndex(targets, device=str(targets.device)).search(queries, k, excluded=excluded.per_query)
        hard = torch.as_tensor(found.rows)
    uniform = draw_uniform(len(targets), 2 * k, excluded=excluded, keys=keys)
    ids, is_uniform = _mix(hard.numpy(), uniform, plan, keys)
    mask = ids >= 0
    rows = targets.gather(ids.clamp(min=0).reshape(-1)).reshape(*ids.shape, -1)
    scores = torch.einsum("bd,bkd->bk", queries, rows.to(queries.device))
    free = torch.tensor([len(targets) - len(known) for known in excluded.per_query], device=scores.device)
    log_proposal = _log_expected_draws(scores, log_normalizer, plan, free, is_uniform)
    return Candidates(
        ids=ids.to(queries.device), scores=scores, log_proposal=log_proposal, mask=mask.to(queries.device),
        uniform=is_uniform.to(queries.device),
    )  # fmt: skip


def _mix(
    hard: np.ndarray, uniform: np.ndarray, plan: SamplingPlan, keys: DrawKeys
) -> tuple[torch.Tensor, torch.Tensor]:
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


def _log_expected_draws(
    scores: torch.Tensor,
    log_normalizer: torch.Tensor | None,
    plan: SamplingPlan,
    free: torch.Tensor,
    is_uniform: torch.Tensor,
) -> torch.Tensor:
    """Return the log of the expected number of times each chosen target is drawn, ``(batch, k)`` float32.

    ``free`` is the number of targets that are not excluded for each query, ``(batch,)``.
    """
    uniform_rate = ((plan.num_negatives - plan.hard_share) / free.clamp(min=1).double())[:, None]
    if log_normalizer is not None:
        probability = torch.exp(plan.scale * scores.double() - log_normalizer[:, None])
        return torch.log(plan.hard_share * probability + uniform_rate).clamp(min=-80.0).float()
    by_chance = torch.log(uniform_rate).clamp(min=-80.0).float().expand_as(scores)
    return torch.where(is_uniform.to(scores.device), by_chance, torch.zeros_like(scores))


@dataclass(frozen=True)
class ContrastSet:
    """The targets a batch encodes, one column each, and which of them count for which query.

    Attributes:
        rows: Target rows: the positives of the batch, then the distinct sampled targets not among them,
            ``(batch + m,)`` int64 on the CPU.
        allowed: ``(batch, batch + m)`` bool; a query's own positive is always allowed, its other known positives never,
            and of columns with the same target only the first.
        log_proposal: Log expected draws, ``(batch, batch + m)`` float32; 0 where a column was not drawn.
        uniform: Which columns some query drew uniformly, ``(batch + m,)`` bool on the CPU.
    """

    rows: torch.Tensor
    allowed: torch.Tensor
    log_proposal: torch.Tensor
    uniform: torch.Tensor


def contrast_set(
    candidates: Candidates | None, positive_rows: torch.Tensor, *, excluded: ExcludedRows, share_negatives: bool
) -> ContrastSet:
    """Decide which targets a batch encodes and which of them each query is contrasted with.

    Args:
        candidates: Sampled targets, or None for none.
        positive_rows: The positive of each query, ``(batch,)`` int64.
        excluded: All known positives of each query.
        share_negatives: Contrast each query with every column (the usual in-batch negatives, sampled ones included),
            or only with the targets sampled for it.
    """
    device, batch = positive_rows.device, len(positive_rows)
    positives = positive_rows.cpu().numpy()
    ids = np.zeros((batch, 0), dtype=np.int64) if candidates is None else candidates.ids.cpu().numpy()
    rows = np.concatenate([positives, np.setdiff1d(ids[ids >= 0], positives)])
    distinct, first_column = np.unique(rows, return_index=True)
    query, place = np.nonzero(ids >= 0)
    column = first_column[np.searchsorted(distinct, ids[query, place])]
    allowed = np.zeros((batch, len(rows)), dtype=bool)
    if share_negatives:
        allowed[:, first_column] = True
    allowed[query, column] = True
    for number, known in enumerate(excluded.per_query):
        allowed[number] &= ~np.isin(rows, known)
    allowed[np.arange(batch), np.arange(batch)] = True
    log_proposal, uniform = torch.zeros(batch, len(rows)), np.zeros(len(rows), dtype=bool)
    if candidates is not None:
        log_proposal[query, column] = candidates.log_proposal.cpu()[query, place]
        uniform[column[candidates.uniform.cpu().numpy()[query, place]]] = True
    return ContrastSet(
        torch.from_numpy(rows), torch.from_numpy(allowed).to(device), log_proposal.to(device), torch.from_numpy(uniform)
    )
