"""Bridge between corrector and index: a corrector seen as an affine map.

For ``h(z) = Wz + c`` the score of a corrected target is a score of the stale one: ``⟨q, Wz + c⟩ = ⟨Wᵀq, z⟩ + ⟨q, c⟩``.
Where h normalises, one inverse norm per row, ``s = 1 / ‖Wz + c‖``, multiplies it. So a stale index answers for the
corrected one with nothing rewritten; for correctors that are no affine map the best affine one makes a shortlist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.index.base import RowVectors
from hf_corrector.models.modeling_corrector import CorrectorModel

READ_ROWS = 16_384

_SMALLEST_NORM = 1e-12  # what torch.nn.functional.normalize divides by at least


@dataclass(frozen=True, eq=False)
class AffineView:
    """An affine map that a corrector is, or is near to.

    Attributes:
        weight: W, ``(dim_out, dim_in)`` float64.
        offset: c, ``(dim_out,)`` float64.
        normalize: Whether what it stands for is divided by its norm.
        exact: Whether the corrector is this map, and not only near to it.
    """

    weight: torch.Tensor
    offset: torch.Tensor
    normalize: bool
    exact: bool

    @classmethod
    def of(cls, corrector: CorrectorModel) -> AffineView | None:
        """Return the affine map a corrector is; None if it is none."""
        found = corrector.affine_map()
        if found is None:
            return None
        normalize = corrector.config.normalize_output and corrector.config.kind != "identity"
        return cls(found[0].detach().double().cpu(), found[1].detach().double().cpu(), normalize, exact=True)

    @classmethod
    def fit(cls, rows: CorrectedTargets, *, normalize: bool, fit_rows: int = 20_000, seed: int = 0) -> AffineView:
        """Fit the affine map nearest to a corrector, by least squares on some of its own rows.

        Args:
            rows: Stale rows and corrector.
            normalize: Whether the fitted map will be divided by its norm.
            fit_rows: How many rows to correct for it.
            seed: Seed they are drawn with.
        """
        generator = torch.Generator().manual_seed(seed)
        picked = torch.randperm(len(rows), generator=generator)[:fit_rows].sort().values
        stale, corrected = rows.stale.gather(picked).double().cpu(), rows.gather(picked).double().cpu()
        weight, offset = least_squares(stale, corrected)
        return cls(weight, offset, normalize, exact=False)

    def fold(self, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``Wᵀq`` ``(queries, dim_in)`` and ``⟨q, c⟩`` ``(queries,)`` for queries of the corrected space."""
        wide = queries.double()
        return wide @ self.weight.to(wide), wide @ self.offset.to(wide)

    def inverse_norms(self, stale: RowVectors) -> torch.Tensor | None:
        """Return ``1 / ‖Wz + c‖`` of all rows in one pass, ``(targets,)`` float32; None if nothing is normalised."""
        if not self.normalize:
            return None
        inverse = torch.empty(len(stale))
        for start, stop in ranges(len(stale)):
            inverse[start:stop] = 1.0 / self._apply(stale.read(start, stop)).norm(dim=1).clamp(min=_SMALLEST_NORM)
        return inverse

    def slack(self, rows: CorrectedTargets, inverse_norms: torch.Tensor | None) -> torch.Tensor:
        """Return for all rows an upper bound of ``‖h(z) − s·(Wz + c)‖``, ``(targets,)`` float32.

        That is how far a score of the folded query may be off, per unit of the query's norm (Cauchy-Schwarz). It costs
        as much as correcting every row once.
        """
        slack = torch.empty(len(rows))
        for start, stop in ranges(len(rows)):
            view, corrected = self._apply(rows.stale.read(start, stop)), rows.read(start, stop).cpu()
            view = view if inverse_norms is None else view * inverse_norms[start:stop, None]
            # Norm and map are computed in float32, whose rounding errors go on top; dim in view of their summation.
            rounding = (rows.stale.dim + rows.dim) * 2.0**-23 * (view.norm(dim=1) + corrected.norm(dim=1) + 1)
            slack[start:stop] = (corrected - view).norm(dim=1) * (1 + 1e-4) + rounding
        return slack

    def allowance(self, queries: torch.Tensor, *, row_norm: float, largest_scale: float) -> torch.Tensor:
        """Bound what the corrector's own float32 arithmetic may add to a folded score, ``(queries,)`` float64.

        Four times the usual bound for sums of all magnitudes involved: the corrector may add in another order and keep
        W as a displacement, W − I.
        """
        dim_out, dim_in = self.weight.shape
        magnitude = (self.weight.norm() + dim_out**0.5) * row_norm + self.offset.norm()
        per_norm = float(4 * (dim_in + dim_out) * 2.0**-24 * magnitude * largest_scale)
        norms: torch.Tensor = queries.double().norm(dim=1)
        return norms * per_norm

    def _apply(self, stale: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            mapped: torch.Tensor = stale.detach().float().cpu() @ self.weight.float().T + self.offset.float()
        return mapped


def least_squares(inputs: torch.Tensor, outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit ``outputs ≈ inputs Wᵀ + c`` with a ridge just large enough to be solvable.

    Args:
        inputs: ``(n, dim_in)`` float64.
        outputs: ``(n, dim_out)`` float64.

    Returns:
        W ``(dim_out, dim_in)`` and c ``(dim_out,)``.
    """
    if not len(inputs):
        return torch.zeros(outputs.shape[1], inputs.shape[1]).double(), torch.zeros(outputs.shape[1]).double()
    mean_in, mean_out = inputs.mean(dim=0), outputs.mean(dim=0)
    centred = inputs - mean_in
    gram = centred.T @ centred
    ridge = 1e-6 * float(gram.diagonal().mean()) + 1e-30
    factor = torch.linalg.cholesky(gram + ridge * torch.eye(len(gram), dtype=gram.dtype))
    weight = torch.cholesky_solve(centred.T @ (outputs - mean_out), factor).T
    return weight, mean_out - weight @ mean_in


def ranges(rows: int) -> Iterator[tuple[int, int]]:
    """Yield first and last row (exclusive) of each stretch of rows that is read at a time."""
    for start in range(0, rows, READ_ROWS):
        yield start, min(start + READ_ROWS, rows)
