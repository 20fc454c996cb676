"""What a corrector is fitted to: stale and fresh embeddings of the same targets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.side_features import TokenStatistics, take_rows


@dataclass(frozen=True)
class Pairs:
    """Stale and fresh embeddings of the same targets, one row a target.

    Attributes:
        stale: ``(n, dim_in)`` float64.
        fresh: ``(n, dim_out)`` float64.
        weights: Positive weight of each target, ``(n,)`` float64.
        side: Side features of each target, ``(n, width)`` float32, dense or, for token counts, in CSR layout; or None.
        clock: How far the encoder had moved since the stale vectors were made when each fresh vector was, as a share
            of how far it has moved now, in (0, 1], ``(n,)`` float64; None where all were made by the encoder of now.
        statistics: How common each token is, for side features that are token counts; from the pairs if None.
    """

    stale: torch.Tensor
    fresh: torch.Tensor
    weights: torch.Tensor
    side: torch.Tensor | None = None
    clock: torch.Tensor | None = None
    statistics: TokenStatistics | None = None

    @classmethod
    def collect(
        cls,
        stale: torch.Tensor,
        fresh: torch.Tensor,
        *,
        target_rows: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        side: torch.Tensor | None = None,
        clock: torch.Tensor | None = None,
    ) -> Pairs:
        """Bring pairs into float64 and merge those of the same target into one weighted mean.

        Merging is what turns leaving one row out into leaving one target out.

        Args:
            stale: Stale embeddings, ``(n, dim_in)``.
            fresh: Fresh embeddings, ``(n, dim_out)``.
            target_rows: Which target each row belongs to, ``(n,)`` int64; all different if not given.
            weights: Weight of each row, ``(n,)``; 1 if not given.
            side: Side features of each row's target, ``(n, width)``, dense or CSR.
            clock: See the class, ``(n,)``.

        Raises:
            ConfigurationError: If shapes disagree, a number is not finite, or fewer than two targets are left.
        """
        weights = torch.ones(len(stale)) if weights is None else weights
        check_pairs(stale, fresh, weights)
        _check_beside(len(stale), side, clock, target_rows)
        stale, fresh, weights = stale.double().cpu(), fresh.double().cpu(), weights.double().cpu()
        side = None if side is None else side.cpu()
        clock = None if clock is None else clock.double().cpu()
        if target_rows is not None:
            unique, group = torch.unique(target_rows.cpu(), return_inverse=True)
            total = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, group, weights)
            share = (weights / total[group])[:, None]
            stale, fresh = _merge(stale, group, share), _merge(fresh, group, share)
            clock = None if clock is None else _merge(clock[:, None], group, share)[:, 0]
            first = torch.full((len(unique),), len(group)).scatter_reduce(0, group, torch.arange(len(group)), "amin")
            side = None if side is None else take_rows(side, first)
            weights = total
        if len(stale) < 2:
            raise ConfigurationError(
                "corrector fit", expected="pairs of at least 2 targets", got=str(len(stale)), cure="Give more pairs."
            )
        return cls(stale, fresh, weights, side, clock)

    def __len__(self) -> int:
        """Return the number of distinct targets."""
        return len(self.stale)

    def take(self, rows: torch.Tensor) -> Pairs:
        """Return some of the pairs, ``rows`` being places ``(m,)`` int64."""
        side = None if self.side is None else take_rows(self.side, rows)
        clock = None if self.clock is None else self.clock[rows]
        return Pairs(self.stale[rows], self.fresh[rows], self.weights[rows], side, clock, self.statistics)


def _merge(values: torch.Tensor, group: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    merged = torch.zeros(int(group.max()) + 1, values.shape[1], dtype=torch.float64)
    return merged.index_add_(0, group, values * share)


def check_pairs(stale: torch.Tensor, fresh: torch.Tensor, weights: torch.Tensor) -> None:
    """Refuse pairs whose shapes disagree, that are not finite or have no weight (ConfigurationError)."""
    if stale.dim() != 2 or fresh.dim() != 2 or not len(stale) == len(fresh) == len(weights):
        raise ConfigurationError(
            "corrector fit",
            expected="stale (n, dim_in), fresh (n, dim_out) and weights (n,)",
            got=f"{tuple(stale.shape)}, {tuple(fresh.shape)} and {tuple(weights.shape)}",
            cure="Pass one fresh vector and one weight for every stale vector.",
        )
    finite = torch.isfinite(stale).all(dim=1) & torch.isfinite(fresh).all(dim=1) & (weights > 0)
    finite &= torch.isfinite(weights)
    if not finite.all():
        row = int((~finite).nonzero()[0])
        raise ConfigurationError(
            f"corrector fit, pair {row}",
            expected="finite vectors and a positive weight",
            got="NaN, infinity or no weight",
            cure="Leave that pair out or encode it again.",
        )


def _check_beside(
    count: int, side: torch.Tensor | None, clock: torch.Tensor | None, target_rows: torch.Tensor | None
) -> None:
    """Refuse what does not stand beside each pair."""
    if target_rows is not None and target_rows.shape != (count,):
        raise ConfigurationError(
            "corrector fit", expected=f"one target row for each of {count} pairs",
            got=f"shape {tuple(target_rows.shape)}", cure="Pass the row of every pair's target.",
        )  # fmt: skip
    if side is not None and (side.dim() != 2 or len(side) != count or not _finite(side)):
        raise ConfigurationError(
            "corrector fit", expected=f"finite side features of shape ({count}, width)",
            got=f"shape {tuple(side.shape)}" + ("" if _finite(side) else " with NaN or infinity"),
            cure="Pass the side features of every pair's target, see SideFeatures.gather.",
        )  # fmt: skip
    if clock is not None and (clock.shape != (count,) or not bool(((clock > 0) & (clock <= 1)).all())):
        raise ConfigurationError(
            "corrector fit", expected=f"a clock in (0, 1] for each of {count} pairs",
            got=f"shape {tuple(clock.shape)}", cure="Leave it out where all fresh vectors are of one encoder.",
        )  # fmt: skip


def _finite(side: torch.Tensor) -> bool:
    values = side.values() if side.layout == torch.sparse_csr else side
    return bool(torch.isfinite(values).all())
