"""Fitting a corrector: once to given pairs, or online to the pairs that training yields for free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import PRIORS, RELATIVE_RIDGES, AffineFit, Pairs, fit_affine, fit_mean_shift
from hf_corrector.losses import corrector_loss
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.training.pair_window import PairWindow

# Between full choices of prior and ridge, every third strength around the identity is enough to follow the drift.
ONLINE_RIDGES = RELATIVE_RIDGES[::3]
HELD_OUT_SHARE = 0.1
PATIENCE = 5


@dataclass(frozen=True)
class CorrectorFitting:
    """How a corrector is fitted.

    Attributes:
        window: Online: fit on the targets re-encoded in so many most recent steps.
        update_steps: Online: steps between closed-form fits.
        learning_rate: AdamW learning rate of gradient fits.
        batch_size: Pairs per gradient update.
        updates: Online: gradient updates per step.
        finishing_updates: Gradient updates with falling learning rate when training ends.
        max_epochs: Offline: passes over the pairs at most; ends early by the error on held-out targets.
        seed: Seed of the order of pairs.
    """

    window: int = 100
    update_steps: int = 10
    learning_rate: float = 1e-3
    batch_size: int = 256
    updates: int = 4
    finishing_updates: int = 200
    max_epochs: int = 200
    seed: int = 0


def fit_corrector(
    corrector: CorrectorModel,
    stale: torch.Tensor,
    fresh: torch.Tensor,
    *,
    target_rows: torch.Tensor | None = None,
    fitting: CorrectorFitting | None = None,
) -> CorrectorModel:
    """Fit a corrector of any kind to pairs of stale and fresh embeddings, in place.

    Closed-form kinds are solved; ``residual_mlp`` is trained by AdamW, with the state that was best on a tenth of the
    targets kept.

    Args:
        corrector: What to fit; changed and returned.
        stale: Stale embeddings, ``(n, input_dim)``.
        fresh: Embeddings of the same targets by the current encoder, ``(n, output_dim)``.
        target_rows: Which target each pair belongs to, ``(n,)`` int64; pairs of one target are merged.
        fitting: Settings of the gradient fit.

    Raises:
        ConfigurationError: If shapes disagree, a number is not finite, or there are fewer than two targets.
    """
    pairs = Pairs.collect(stale, fresh, target_rows=target_rows)
    if corrector.config.kind == "residual_mlp":
        _check_sizes(corrector, pairs)
        _fit_gradient(corrector, pairs, CorrectorFitting() if fitting is None else fitting)
    else:
        solve_closed_form(corrector, pairs)
    return corrector


def solve_closed_form(
    corrector: CorrectorModel,
    pairs: Pairs,
    *,
    priors: tuple[str, ...] = PRIORS,
    relative_ridges: tuple[float, ...] = RELATIVE_RIDGES,
) -> None:
    """Solve for a closed-form corrector's buffers, in place; the identity has none.

    Raises:
        ConfigurationError: If the kind has no closed form or the sizes disagree.
    """
    config = corrector.config
    _check_sizes(corrector, pairs)
    match config.kind:
        case "identity":
            return
        case "mean_shift":
            corrector.shift.copy_(fit_mean_shift(pairs))
            summary: dict[str, object] = {"pairs": len(pairs.stale)}
        case "affine":
            fit = fit_affine(pairs, priors=priors, relative_ridges=relative_ridges)
            _load_affine(corrector, fit)
            summary = {key: value for key, value in asdict(fit).items() if not isinstance(value, torch.Tensor)}
        case kind:
            raise ConfigurationError(
                "corrector fit", expected="a kind with a closed form", got=repr(kind), cure="Use the gradient fit."
            )
    corrector.fitted_pairs.fill_(len(pairs.stale))
    config.fit_summary = summary


def _check_sizes(corrector: CorrectorModel, pairs: Pairs) -> None:
    config = corrector.config
    if (pairs.stale.shape[1], pairs.fresh.shape[1]) != (config.input_dim, config.output_dim):
        raise ConfigurationError(
            "corrector fit", expected=f"vectors of sizes {config.input_dim} and {config.output_dim}",
            got=f"{pairs.stale.shape[1]} and {pairs.fresh.shape[1]}",
            cure="Configure the corrector for these encoders.",
        )  # fmt: skip


def _load_affine(corrector: CorrectorModel, fit: AffineFit) -> None:
    corrector.mean.copy_(fit.mean)
    corrector.weight.copy_(fit.weight)
    corrector.bias.copy_(fit.bias)


def gradient_update(
    corrector: CorrectorModel, optimizer: torch.optim.Optimizer, stale: torch.Tensor, fresh: torch.Tensor
) -> float:
    """Do one gradient step on ‖h(stale) − fresh‖² and return the loss before it.

    The corrector's parameters ask for no gradient outside of this function, so that neither the encoder's optimiser,
    nor its clipping, nor a distributed wrapper ever sees them.
    """
    parameters = list(corrector.parameters())
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        loss = corrector_loss(corrector(stale), fresh)
        gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(False)
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def _fit_gradient(corrector: CorrectorModel, pairs: Pairs, fitting: CorrectorFitting) -> None:
    generator = torch.Generator().manual_seed(fitting.seed)
    order = torch.randperm(len(pairs.stale), generator=generator)
    held_out = order[: max(int(len(order) * HELD_OUT_SHARE), 1)]
    kept = order[len(held_out) :] if len(order) > 1 else order
    device = corrector.fitted_pairs.device
    stale, fresh = pairs.stale.float().to(device), pairs.fresh.float().to(device)
    if corrector.config.input_dim != corrector.config.output_dim:
        _start_from_affine(corrector, pairs)
    optimizer = torch.optim.AdamW(corrector.parameters(), lr=fitting.learning_rate, weight_decay=0.0)
    with torch.no_grad():
        best = float(corrector_loss(corrector(stale[held_out]), fresh[held_out]))
    best_state, waited = {name: value.clone() for name, value in corrector.state_dict().items()}, 0
    for _ in range(fitting.max_epochs):
        shuffled = kept[torch.randperm(len(kept), generator=generator)]
        for batch in shuffled.split(fitting.batch_size):
            gradient_update(corrector, optimizer, stale[batch], fresh[batch])
        with torch.no_grad():
            error = float(corrector_loss(corrector(stale[held_out]), fresh[held_out]))
        waited += 1
        if error < best:
            best, waited = error, 0
            best_state = {name: value.clone() for name, value in corrector.state_dict().items()}
        elif waited >= PATIENCE:
            if optimizer.param_groups[0]["lr"] < fitting.learning_rate / 50:
                break
            optimizer.param_groups[0]["lr"] /= 4
            waited = 0
    corrector.load_state_dict(best_state)
    corrector.fitted_pairs.fill_(len(pairs.stale))
    corrector.config.fit_summary = {"pairs": len(pairs.stale), "held_out_error": best}


def _start_from_affine(corrector: CorrectorModel, pairs: Pairs) -> None:
    """Between spaces of different size there is no identity to start at: start at the ridge solution."""
    fit = fit_affine(pairs)
    corrector.skip.copy_(fit.weight)
    with torch.no_grad():
        corrector.output.bias.copy_(fit.bias - fit.weight @ fit.mean)


class OnlineCorrector:
    """Follow the encoder's drift with a corrector fitted to the targets re-encoded in training.

    Args:
        corrector: The corrector; its parameters stop asking for gradients.
        gather_stale: Returns the stale vectors of target rows ``(n,)``, as ``(n, input_dim)``.
        num_targets: Number of cached targets.
        fitting: How to fit.
        held_out: Rows that are never fitted on, ``(n,)`` int64, so that queries looking for them can judge the fit.
    """

    def __init__(
        self,
        corrector: CorrectorModel,
        gather_stale: Callable[[torch.Tensor], torch.Tensor],
        *,
        num_targets: int,
        fitting: CorrectorFitting,
        held_out: torch.Tensor | None = None,
    ) -> None:
        corrector.requires_grad_(False)
        self.corrector, self.fitting, self._gather_stale = corrector, fitting, gather_stale
        self.window = PairWindow(fitting.window, int(corrector.config.output_dim or 0))
        self.seen = torch.zeros(num_targets, dtype=torch.bool)
        self._usable = torch.ones(num_targets, dtype=torch.bool)
        if held_out is not None:
            self._usable[held_out] = False
        self._optimizer = self._new_optimizer()

    @property
    def fitted_rows(self) -> torch.Tensor:
        """Rows of all targets whose fresh embeddings the corrector has been fitted on, ``(n,)`` int64."""
        return self.seen.nonzero()[:, 0]

    def _new_optimizer(self) -> torch.optim.Optimizer | None:
        if self.corrector.config.kind != "residual_mlp":
            return None
        return torch.optim.AdamW(self.corrector.parameters(), lr=self.fitting.learning_rate, weight_decay=0.0)

    def observe(self, rows: torch.Tensor, fresh: torch.Tensor, *, step: int) -> None:
        """Take in targets that were re-encoded at ``step``: rows ``(n,)`` and embeddings ``(n, dim)``."""
        rows = rows.detach().cpu()
        usable = self._usable[rows]
        self.window.add(rows[usable], fresh[usable.to(fresh.device)], step=step)

    def update(self, step: int) -> bool:
        """Follow the drift after a step; say whether the corrector changed.

        Args:
            step: Optimiser steps done before this one.
        """
        if self._optimizer is not None:
            self._descend(self._optimizer, self.fitting.updates, step=step)
            return True
        due = (step + 1) % self.fitting.update_steps == 0
        return self._solve(online=True) if due else False

    def finish(self) -> bool:
        """Fit once more when training ends, with the full choice of priors or a falling learning rate."""
        if self._optimizer is None:
            return self._solve(online=False)
        self._descend(self._optimizer, self.fitting.finishing_updates, step=-1, falling=True)
        return True

    def _solve(self, *, online: bool) -> bool:
        found = self.window.pairs()
        if len(found.rows) < 2 or self.corrector.config.kind == "identity":
            return False
        pairs = Pairs.collect(self._gather_stale(found.rows), found.fresh)
        square = self.corrector.config.input_dim == self.corrector.config.output_dim
        if online and square:
            solve_closed_form(self.corrector, pairs, priors=("identity",), relative_ridges=ONLINE_RIDGES)
        else:
            solve_closed_form(self.corrector, pairs)
        self.seen.zero_()
        self.seen[found.rows] = True
        return True

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
            stale = self._gather_stale(found.rows[picked]).to(device)
            loss = gradient_update(self.corrector, optimizer, stale, found.fresh[picked].to(device))
        self.seen[found.rows] = True
        self.corrector.fitted_pairs.fill_(int(self.seen.sum()))
        self.corrector.config.fit_summary = {"pairs": int(self.seen.sum()), "loss": loss}

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint needs beside the corrector's weights, as flat tensors."""
        state = {**self.window.state(), "seen": self.seen}
        if self._optimizer is not None:
            for number, values in self._optimizer.state_dict()["state"].items():
                state.update({f"optimizer.{number}.{name}": torch.as_tensor(one) for name, one in values.items()})
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        self.window.load_state(state)
        self.seen = state["seen"].bool()
        if self._optimizer is not None:
            content = self._optimizer.state_dict()
            entries: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in state.items():
                if key.startswith("optimizer."):
                    _, number, name = key.split(".")
                    entries.setdefault(int(number), {})[name] = value
            self._optimizer.load_state_dict({**content, "state": entries})
