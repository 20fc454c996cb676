"""Fitting a corrector online, to the pairs that training yields for free."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hf_corrector.fitting import RELATIVE_RIDGES, CompositePlan, Pairs
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.side_features import SideFeatures, TokenCounts, TokenStatistics
from hf_corrector.training.corrector_fit import (
    CorrectorFitting,
    Search,
    fit_side,
    gradient_update,
    solve_closed_form,
)
from hf_corrector.training.pair_window import PairWindow, WindowPairs

# Between full choices of prior and ridge, every third strength around the identity is enough to follow the drift.
ONLINE_RIDGES = RELATIVE_RIDGES[::3]
# Targets and landmarks of a composite fit during training: solved in seconds, and refined when training ends.
ONLINE_TARGETS, ONLINE_LANDMARKS, FINAL_TARGETS = 4096, 1024, 8192
# Names and order of what a checkpoint remembers of the last composite fit.
REMEMBERED = ("constant", "linear", "radial", "tokens", "bigrams", "side", "relative_width")


@dataclass(frozen=True)
class OnlineTargets:
    """The cached targets a corrector is fitted to.

    Attributes:
        count: How many there are.
        gather_stale: Returns the stale vectors of target rows ``(n,)``, as ``(n, input_dim)``.
        side: Their side features, or None.
        held_out: Rows that are never fitted on, ``(n,)`` int64, so that queries looking for them can judge the fit.
        drift_from_zero: Whether the stale vectors are those of the encoder that training starts from.
    """

    count: int
    gather_stale: Callable[[torch.Tensor], torch.Tensor]
    side: SideFeatures | None = None
    held_out: torch.Tensor | None = None
    drift_from_zero: bool = True

    def token_statistics(self) -> TokenStatistics | None:
        """Return how common each token is among all targets, for side features that are token counts."""
        return self.side.statistics() if isinstance(self.side, TokenCounts) else None


class OnlineCorrector:
    """Follow the encoder's drift with a corrector fitted to the targets re-encoded in training.

    Args:
        corrector: The corrector; its parameters stop asking for gradients.
        targets: The cached targets.
        fitting: How to fit.
    """

    def __init__(self, corrector: CorrectorModel, targets: OnlineTargets, *, fitting: CorrectorFitting) -> None:
        corrector.requires_grad_(False)
        self.corrector, self.fitting, self.targets = corrector, fitting, targets
        self.window = PairWindow(fitting.window, int(corrector.config.output_dim or 0))
        self.seen = torch.zeros(targets.count, dtype=torch.bool)
        self._usable = torch.ones(targets.count, dtype=torch.bool)
        if targets.held_out is not None:
            self._usable[targets.held_out] = False
        self._optimizer = self._new_optimizer()
        self._statistics = targets.token_statistics()
        self._progress, self._solves = 0.0, 0
        self._remembered: dict[str, float] = {}

    @property
    def fitted_rows(self) -> torch.Tensor:
        """Rows of all targets whose fresh embeddings the corrector has been fitted on, ``(n,)`` int64."""
        return self.seen.nonzero()[:, 0]

    @property
    def _is_composite(self) -> bool:
        return self.corrector.config.kind == "kernel" or self.corrector.config.side is not None

    def _new_optimizer(self) -> torch.optim.Optimizer | None:
        if self.corrector.config.kind != "residual_mlp":
            return None
        return torch.optim.AdamW(self.corrector.parameters(), lr=self.fitting.learning_rate, weight_decay=0.0)

    def observe(self, rows: torch.Tensor, fresh: torch.Tensor, *, step: int) -> None:
        """Take in targets that were re-encoded at ``step``: rows ``(n,)`` and embeddings ``(n, dim)``."""
        rows = rows.detach().cpu()
        usable = self._usable[rows]
        self.window.add(rows[usable], fresh[usable.to(fresh.device)], step=step, progress=self._progress)

    def advance(self, learning_rate: float) -> None:
        """Note that the encoder was updated with this learning rate; their sum is the clock of the drift."""
        self._progress += learning_rate

    def due(self, step: int) -> bool:
        """Say whether :meth:`update` has something to do after a step, so many steps having been done before."""
        return self._optimizer is not None or (step + 1) % self.fitting.update_steps == 0

    def update(self, step: int) -> bool:
        """Follow the drift after a step; say whether the corrector changed.

        Args:
            step: Optimiser steps done before this one.
        """
        if not self.due(step):
            return False
        if self._optimizer is None:
            return self._solve(online=True)
        if (step + 1) % self.fitting.update_steps == 0 and self._is_composite:
            self._solve(online=True)
        self._descend(self._optimizer, self.fitting.updates, step=step)
        return True

    def refit(self) -> bool:
        """Fit to the window now; say whether the corrector changed."""
        if self._optimizer is None:
            return self._solve(online=True)
        if self._is_composite:
            self._solve(online=True)
        self._descend(self._optimizer, self.fitting.finishing_updates, step=-2)
        return True

    def finish(self) -> bool:
        """Fit once more when training ends, with the full choice of priors or a falling learning rate."""
        if self._optimizer is None:
            return self._solve(online=False)
        if self._is_composite:
            self._solve(online=False)
        self._descend(self._optimizer, self.fitting.finishing_updates, step=-1, falling=True)
        return True

    def _solve(self, *, online: bool) -> bool:
        found = self.window.pairs()
        if len(found.rows) < 2 or self.corrector.config.kind == "identity":
            return False
        if self._is_composite:
            found = found.latest(ONLINE_TARGETS if online else FINAL_TARGETS)
        pairs = self._pairs(found)
        if self._optimizer is not None:
            fit_side(self.corrector, pairs, plan=self._plan(online=online))
        else:
            solve_closed_form(self.corrector, pairs, search=self._search(online=online))
        self._remember()
        self._solves += 1
        if self._optimizer is None:
            # A network, unlike a solution, still holds what it learnt from earlier windows.
            self.seen.zero_()
        self.seen[found.rows] = True
        return True

    def _pairs(self, found: WindowPairs) -> Pairs:
        side = None if self.targets.side is None else self.targets.side.gather(found.rows)
        clock = None
        if self._is_composite and self.targets.drift_from_zero and self._progress > 0:
            # What was re-encoded before the first update has not moved at all; a little keeps the kernel regular.
            clock = (found.progress / self._progress).clamp(min=1e-3, max=1.0)
        pairs = Pairs.collect(self.targets.gather_stale(found.rows), found.fresh, side=side, clock=clock)
        return dataclasses.replace(pairs, statistics=self._statistics)

    def _search(self, *, online: bool) -> Search:
        square = self.corrector.config.input_dim == self.corrector.config.output_dim
        if online and square:
            return Search(("identity",), ONLINE_RIDGES, self._plan(online=True))
        return Search(composite=self._plan(online=online))

    def _plan(self, *, online: bool) -> CompositePlan:
        """Choose strengths anew at fits 1, 2, 4, 8 … and at the end; in between take them over."""
        square = self.corrector.config.input_dim == self.corrector.config.output_dim
        if not online:
            return CompositePlan(seed=self.fitting.seed)
        chosen = math.log2(self._solves + 1).is_integer() or not self._remembered
        strengths = {name: value for name, value in self._remembered.items() if name != "relative_width"}
        return CompositePlan(
            prior="identity" if square else "best", strengths=None if chosen else strengths,
            relative_width=None if chosen else self._remembered["relative_width"], seed=self.fitting.seed,
            dtype=torch.float32, landmarks=ONLINE_LANDMARKS,
        )  # fmt: skip

    def _remember(self) -> None:
        summary = self.corrector.config.fit_summary or {}
        if "strengths" in summary:
            self._remembered = {**summary["strengths"], "relative_width": summary["relative_width"]}

    def _descend(self, optimizer: torch.optim.Optimizer, updates: int, *, step: int, falling: bool = False) -> None:
        found = self.window.pairs()
        if not len(found.rows):
            return
        device = self.corrector.fitted_pairs.device
        generator = torch.Generator().manual_seed((self.fitting.seed + 1) * 1_000_003 + step)
        loss = 0.0
        for update in range(updates):
            # Set anew each time: after a finish, training may go on.
            optimizer.param_groups[0]["lr"] = self.fitting.learning_rate * (1 - update / updates if falling else 1.0)
            picked = torch.randint(len(found.rows), (self.fitting.batch_size,), generator=generator)
            rows, added = found.rows[picked], None
            if self.targets.side is not None:
                added = self.corrector.side_displacement(self.targets.side.gather(rows).to(device))
            stale = self.targets.gather_stale(rows).to(device)
            loss = gradient_update(self.corrector, optimizer, stale, found.fresh[picked].to(device), added=added)
        self.seen[found.rows] = True
        self.corrector.fitted_pairs.fill_(int(self.seen.sum()))
        summary = {} if self.corrector.config.fit_summary is None else self.corrector.config.fit_summary
        self.corrector.config.fit_summary = {**summary, "pairs": int(self.seen.sum()), "loss": loss}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint needs beside the corrector's weights, as flat tensors."""
        remembered = [self._remembered.get(name, math.nan) for name in REMEMBERED]
        state = {
            **self.window.state(), "seen": self.seen, "progress": torch.tensor(self._progress, dtype=torch.float64),
            "solves": torch.tensor(self._solves), "remembered": torch.tensor(remembered, dtype=torch.float64),
        }  # fmt: skip
        if self._optimizer is not None:
            for number, values in self._optimizer.state_dict()["state"].items():
                state.update({f"optimizer.{number}.{name}": torch.as_tensor(one) for name, one in values.items()})
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        self.window.load_state(state)
        self.seen = state["seen"].bool()
        self._progress, self._solves = float(state["progress"]), int(state["solves"])
        remembered = zip(REMEMBERED, state["remembered"].tolist(), strict=True)
        self._remembered = {name: value for name, value in remembered if not math.isnan(value)}
        if self._optimizer is not None:
            content = self._optimizer.state_dict()
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in state.items():
                if key.startswith("optimizer."):
                    _, number, name = key.split(".")
                    entries.setdefault(int(number), {})[name] = value
            self._optimizer.load_state_dict({**content, "state": entries})
