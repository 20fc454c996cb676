"""A bounded memory of a stream of pairs, for correctors that have no sufficient statistics."""

from __future__ import annotations

import torch

from hf_corrector.fitting import Forgetting, Pairs
from hf_corrector.side_features import TokenStatistics, csr_matrix, take_rows


class RecentPairs:
    """Keep so many pairs: the latest where earlier ones are forgotten, else a uniform sample of all.

    The sample is a reservoir by random keys: the pairs of the largest keys stay (Efraimidis and Spirakis, 2006, with
    equal weights). A target that comes again replaces its earlier pair.

    Args:
        most: Pairs to keep.
        forgetting: How fast earlier pairs lose their weight.
        seed: Seed of the keys.
    """

    def __init__(self, most: int, *, forgetting: Forgetting, seed: int = 0) -> None:
        self.most, self.forgetting, self._seed = most, forgetting, seed
        self.clear()

    def clear(self) -> None:
        """Forget all pairs."""
        self.seen, self._mass = 0, 0.0
        self._stale = self._fresh = torch.zeros(0, 0)
        self._weights = self._keys = torch.zeros(0, dtype=torch.float64)
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._side: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._stale)

    def add(self, pairs: Pairs, *, target_rows: torch.Tensor | None = None) -> None:
        """Take in a batch of pairs.

        Args:
            pairs: The pairs in the order they came.
            target_rows: Which target each pair is of, ``(n,)`` int64; all different, and new, if not given.
        """
        count = len(pairs)
        keys = torch.arange(self.seen, self.seen + count, dtype=torch.float64)
        rows = -1 - torch.arange(self.seen, self.seen + count) if target_rows is None else target_rows.cpu()
        if self.forgetting.half_life is None:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.seen)
            keys = torch.rand(count, generator=generator, dtype=torch.float64)
        weights = pairs.weights * self.forgetting.within(count)
        if self.seen == 0:
            parts = pairs.stale.float(), pairs.fresh.float(), weights, keys, rows
            self._side = pairs.side
        else:
            parts = (
                torch.cat([self._stale, pairs.stale.float()]), torch.cat([self._fresh, pairs.fresh.float()]),
                torch.cat([self._weights * self.forgetting.carry(count), weights]), torch.cat([self._keys, keys]),
                torch.cat([self._rows, rows]),
            )  # fmt: skip
            self._side = None if pairs.side is None or self._side is None else _below(self._side, pairs.side)
        self._stale, self._fresh, self._weights, self._keys, self._rows = parts
        self.seen += count
        self._mass = self._mass * self.forgetting.carry(count) + float(weights.sum())
        self._keep(_latest(self._rows))
        if len(self) > self.most:
            self._keep(torch.topk(self._keys, self.most).indices.sort().values)

    def discount(self, weight: float) -> None:
        """Let all pairs together count, from now on, as so many new ones at most."""
        if self._mass <= weight:
            return
        factor = weight / self._mass
        self._mass = weight
        if self.forgetting.half_life is None:
            # Keys of a sample by weight are u ** (1 / weight): those that are kept make room for new ones faster.
            self._keys = self._keys ** (1.0 / factor)
        else:
            self._weights = self._weights * factor

    def _keep(self, places: torch.Tensor) -> None:
        if len(places) == len(self):
            return
        self._stale, self._fresh, self._weights = self._stale[places], self._fresh[places], self._weights[places]
        self._keys, self._rows = self._keys[places], self._rows[places]
        self._side = None if self._side is None else take_rows(self._side, places)

    def pairs(self, statistics: TokenStatistics | None = None) -> Pairs:
        """Return the pairs that are kept, in the order they came, with the weights they have by now."""
        # Relative weights are all that counts, and a weight that has become 0 would be refused.
        weights = (self._weights / self._weights.max()).clamp(min=1e-12)
        return Pairs(self._stale.double(), self._fresh.double(), weights, self._side, statistics=statistics)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the content as tensors."""
        state = {
            "recent_seen": torch.tensor(self.seen), "recent_mass": torch.tensor(self._mass, dtype=torch.float64),
            "recent_stale": self._stale, "recent_fresh": self._fresh,
            "recent_weights": self._weights, "recent_keys": self._keys, "recent_rows": self._rows,
        }  # fmt: skip
        if self._side is not None and self._side.layout == torch.sparse_csr:
            state["recent_side_starts"] = self._side.crow_indices()
            state["recent_side_columns"] = self._side.col_indices()
            state["recent_side_values"] = self._side.values()
            state["recent_side_width"] = torch.tensor(self._side.shape[1])
        elif self._side is not None:
            state["recent_side"] = self._side
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        self.seen, self._mass = int(state["recent_seen"]), float(state["recent_mass"])
        self._stale, self._fresh = state["recent_stale"], state["recent_fresh"]
        self._weights, self._keys = state["recent_weights"], state["recent_keys"]
        self._rows, self._side = state["recent_rows"], state.get("recent_side")
        if "recent_side_starts" in state:
            self._side = csr_matrix(
                state["recent_side_starts"], state["recent_side_columns"], state["recent_side_values"],
                width=int(state["recent_side_width"]),
            )  # fmt: skip


def _latest(rows: torch.Tensor) -> torch.Tensor:
    """Return the places of the last pair of each target, ascending."""
    order = torch.argsort(rows, stable=True)
    ordered = rows[order]
    last = torch.ones(len(rows), dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return order[last].sort().values


def _below(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Put the rows of two matrices under each other, both dense or both CSR."""
    if first.layout != torch.sparse_csr:
        return torch.cat([first, second])
    starts = torch.cat([first.crow_indices(), second.crow_indices()[1:] + first.crow_indices()[-1]])
    columns = torch.cat([first.col_indices(), second.col_indices()])
    return csr_matrix(starts, columns, torch.cat([first.values(), second.values()]), width=first.shape[1])
