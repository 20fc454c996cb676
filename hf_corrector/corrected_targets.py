"""Bridge between cache and corrector: cached targets as they look after correction."""

from __future__ import annotations

import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.index.base import RowVectors
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.side_features import SideFeatures

DEFAULT_SNAPSHOT_BYTES = 2**30
READ_ROWS = 16_384


class CorrectedTargets:
    """Stale target vectors seen through a corrector, chunk by chunk or, where they fit, from a snapshot in memory.

    The snapshot holds exactly what the corrector returns; it is made on the first read after :meth:`invalidate`.

    Args:
        stale: The cached vectors; any source of rows.
        corrector: The corrector, or None to see the stale vectors themselves.
        side: Side features of the same targets, for a corrector that reads some.
        device: Where reads return their rows.
        snapshot_bytes: Keep all corrected rows in memory if they need no more than this; 0 for never.
    """

    def __init__(
        self,
        stale: RowVectors,
        corrector: CorrectorModel | None = None,
        *,
        side: SideFeatures | None = None,
        device: torch.device | str = "cpu",
        snapshot_bytes: int = DEFAULT_SNAPSHOT_BYTES,
    ) -> None:
        if corrector is not None and corrector.config.input_dim != stale.dim:
            raise ConfigurationError(
                "corrected targets", expected=f"cached vectors of size {corrector.config.input_dim}",
                got=f"size {stale.dim}", cure="Use the corrector that was fitted for this cache.",
            )  # fmt: skip
        self.stale, self.corrector, self.device = stale, corrector, torch.device(device)
        self.side = _wanted_side(stale, corrector, side)
        self.dim = stale.dim if corrector is None else int(corrector.config.output_dim or stale.dim)
        self._fits = len(stale) * self.dim * 4 <= snapshot_bytes
        self._snapshot: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.stale)

    def invalidate(self) -> None:
        """Forget the snapshot; call it whenever the corrector has changed."""
        self._snapshot = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return corrected rows ``start`` to ``stop``, ``(stop − start, dim)`` float32."""
        if self._fits:
            if self._snapshot is None:
                self._snapshot = self.snapshot()
            return self._snapshot[start:stop]
        return self._correct(self.stale.read(start, stop), self._read_side(start, stop))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return corrected rows in the order asked for, ``(n, dim)`` float32.

        Args:
            rows: Target rows, ``(n,)`` int64.
        """
        if self._fits:
            return self.read(0, len(self))[rows.to(self.device)]
        rows = rows.cpu()
        unique, positions = torch.unique(rows, return_inverse=True)
        corrected = self._gathered(unique)
        # Rows that ascend, as those of a pool do, are in their places; moving them takes as long as reading them.
        return corrected if torch.equal(unique, rows) else corrected[positions.to(corrected.device)]

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        if self.corrector is None or len(rows) <= READ_ROWS:
            return self._correct(self.stale.gather(rows), None if self.side is None else self.side.gather(rows))
        # So many that what a corrector computes on its way would be written to memory and read again.
        corrected = torch.empty(len(rows), self.dim, device=self.device)
        for start in range(0, len(rows), READ_ROWS):
            corrected[start : start + READ_ROWS] = self._gathered(rows[start : start + READ_ROWS])
        return corrected

    def _read_side(self, start: int, stop: int) -> torch.Tensor | None:
        return None if self.side is None else self.side.read(start, stop)

    @torch.no_grad()
    def _correct(self, stale: torch.Tensor, side: torch.Tensor | None) -> torch.Tensor:
        stale = stale.to(self.device, torch.float32)
        if self.corrector is None:
            return stale
        corrected: torch.Tensor = self.corrector(stale, None if side is None else side.to(self.device))
        return corrected

    def snapshot(self) -> torch.Tensor:
        """Return all corrected rows, ``(rows, dim)`` float32."""
        snapshot = torch.empty(len(self), self.dim, device=self.device)
        for start in range(0, len(self), READ_ROWS):
            stop = min(start + READ_ROWS, len(self))
            snapshot[start:stop] = self._correct(self.stale.read(start, stop), self._read_side(start, stop))
        return snapshot


def _wanted_side(stale: RowVectors, corrector: CorrectorModel | None, side: SideFeatures | None) -> SideFeatures | None:
    """Return the side features if the corrector reads any, after checking that they are those of these targets."""
    if corrector is None or corrector.config.side is None:
        return None
    config = corrector.config
    if side is None or side.kind != config.side or side.width != config.side_dim or len(side) != len(stale):
        got = "none" if side is None else f"{side.kind!r} of {len(side)} targets and width {side.width}"
        raise ConfigurationError(
            "corrected targets",
            expected=f"side features {config.side!r} of {len(stale)} targets and width {config.side_dim}", got=got,
            cure="Pass those stored with the cache, see open_side().",
        )  # fmt: skip
    return side
