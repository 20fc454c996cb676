"""What every scan of the targets answers, and how it is told to go about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hf_corrector._distributed import all_gather_rows
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import ConfigurationError
from hf_corrector.sampling import DrawKeys, ExcludedRows, ListedTargets, SoftmaxDraws, draw_listed, top_listed

STRATEGIES = ("full", "amortised", "pooled", "shortlist")
SCAN_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SCORED_ROWS = 2**15  # rows corrected and scored at a time: 50 MB at a size of 384


@dataclass(frozen=True)
class ScanPlan:
    """How the targets are looked at.

    Attributes:
        strategy: ``"full"``: all, through the corrector as it is now. ``"amortised"``: all, each corrected anew every
            ``refresh_steps`` steps. ``"pooled"``: ``pool`` targets drawn anew in every step. ``"shortlist"``: the
            ``shortlist`` nearest by an index of the stale vectors, corrected, and ``pool`` drawn ones that stand for
            all others.
        dtype: Arithmetic of the scores, ``"float32"`` or ``"bfloat16"``.
        refresh_steps: Of ``"amortised"``.
        pool: Of ``"pooled"`` and ``"shortlist"``, in targets.
        shortlist: Of ``"shortlist"``, in targets.
        snapshot_bytes: ``"full"`` keeps corrected rows in memory if they need no more, per process.

    Raises:
        ConfigurationError: If a value is out of its range.
    """

    strategy: str = "full"
    dtype: str = "float32"
    refresh_steps: int = 20
    pool: int = 8192
    shortlist: int = 256
    snapshot_bytes: int = 8 * 2**30

    def __post_init__(self) -> None:
        """Check the values."""
        if (
            self.strategy not in STRATEGIES or self.dtype not in SCAN_DTYPES
            or min(self.refresh_steps, self.pool, self.shortlist) < 1
        ):  # fmt: skip
            raise ConfigurationError(
                "scan", expected=f"a strategy among {STRATEGIES}, a dtype among {tuple(SCAN_DTYPES)}, sizes >= 1",
                got=str(self), cure="Correct the argument.",
            )  # fmt: skip


class TargetScan(Protocol):
    """All targets of a run, ready to be drawn from."""

    @property
    def device(self) -> torch.device:
        """Where queries are expected."""

    def __len__(self) -> int:
        """Return the number of all targets."""

    def draw(
        self, queries: torch.Tensor, k: int, *, scale: float, excluded: ExcludedRows, keys: DrawKeys
    ) -> SoftmaxDraws:
        """Draw k distinct targets per query, ``(batch, dim)``, from the softmax this scan sees."""

    def top(self, queries: torch.Tensor, k: int, *, excluded: ExcludedRows, keys: DrawKeys) -> SoftmaxDraws:
        """Return the k highest scores of each query instead; log_normalizer is NaN."""

    def score(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the scores of chosen targets, ``(batch, n)`` float32, for rows ``(batch, n)`` int64."""

    def skip_highest(
        self, queries: torch.Tensor, count: int, *, excluded: ExcludedRows, keys: DrawKeys
    ) -> torch.Tensor:  # fmt: skip
        """Return a ceiling, ``(batch,)``, above which the ``count`` highest scores of each query lie."""

    def invalidate(self) -> None:
        """Take note that the corrector has changed."""

    def advance(self) -> None:
        """Take note that a step has ended."""

    def renew(self) -> None:
        """Forget everything that depends on earlier steps, so that a resumed run sees the same."""


def unkept(targets: CorrectedTargets) -> CorrectedTargets:
    """Return the same targets without a snapshot of all of them, as a scan keeps what it needs by itself."""
    return CorrectedTargets(
        targets.stale, targets.corrector, side=targets.side, device=targets.device, snapshot_bytes=0
    )  # fmt: skip


class CorrectedScan:
    """What all scans of corrected targets have in common.

    Args:
        targets: All targets through the corrector.
    """

    def __init__(self, targets: CorrectedTargets) -> None:
        self._targets = unkept(targets)

    @property
    def device(self) -> torch.device:
        """Where queries are expected."""
        return self._targets.device

    def __len__(self) -> int:
        return len(self._targets)

    def score(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the scores of chosen targets through the corrector as it is now, ``(batch, n)``."""
        return score_rows(self._targets, queries, rows)


class ListedScan(ABC):
    """Answers from a list of targets for each query, which is all that a scan looks at."""

    @abstractmethod
    def _listed(self, queries: torch.Tensor, *, excluded: ExcludedRows, keys: DrawKeys) -> ListedTargets:
        """Return what is looked at for each query."""

    def draw(
        self, queries: torch.Tensor, k: int, *, scale: float, excluded: ExcludedRows, keys: DrawKeys
    ) -> SoftmaxDraws:
        """Draw k distinct targets per query, see :class:`hf_corrector.scans.TargetScan`."""
        return draw_listed(self._listed(queries, excluded=excluded, keys=keys), k, scale=scale, keys=keys)

    def top(self, queries: torch.Tensor, k: int, *, excluded: ExcludedRows, keys: DrawKeys) -> SoftmaxDraws:
        """Return the k highest scores of each query among those looked at, equal ones by row."""
        return top_listed(self._listed(queries, excluded=excluded, keys=keys), k)

    def skip_highest(
        self, queries: torch.Tensor, count: int, *, excluded: ExcludedRows, keys: DrawKeys
    ) -> torch.Tensor:  # fmt: skip
        """Return a ceiling above which the ``count`` highest scores of each list lie, ``(batch,)``."""
        scores = self._listed(queries, excluded=excluded, keys=keys).scores
        return just_below(scores.topk(min(count, scores.shape[1]), dim=1).values[:, -1])


def exchange_columns(own: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return what every process has for the same queries, ``(batch, n_r)`` each, in rank order."""
    return [part.T for part in all_gather_rows(own.T.contiguous())]


def just_below(scores: torch.Tensor) -> torch.Tensor:
    """Return the next smaller float32 numbers, so that scores equal to the given ones lie above."""
    return torch.nextafter(scores.float(), torch.full_like(scores.float(), -torch.inf))


def score_rows(targets: CorrectedTargets, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the scores of chosen targets through the corrector as it is now, ``(batch, n)``, for rows ``(batch, n)``.

    Several queries that ask for the same target have it corrected once.
    """
    scores, step = [], max(1, _SCORED_ROWS // max(1, rows.shape[1]))
    for start in range(0, max(len(rows), 1), step):
        wanted = rows[start : start + step]
        vectors = targets.gather(wanted.reshape(-1)).reshape(*wanted.shape, targets.dim).to(queries.device)
        scores.append(torch.einsum("bd,bkd->bk", queries[start : start + step].float(), vectors))
    return torch.cat(scores)
