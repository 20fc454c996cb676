"""Fitting a corrector of any kind to given pairs of stale and fresh embeddings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from hf_corrector.errors import ConfigurationError
from hf_corrector.fitting import (
    PRIORS,
    RELATIVE_RIDGES,
    AffineFit,
    CompositeFit,
    CompositePlan,
    Pairs,
    fit_affine,
    fit_composite,
    fit_low_rank,
    fit_mean_shift,
    fit_procrustes,
)
from hf_corrector.fitting.composite import DEFAULT_LANDMARKS, DensePart
from hf_corrector.losses import corrector_loss
from hf_corrector.models.configuration_corrector import CLOSED_FORM_KINDS
from hf_corrector.models.modeling_corrector import CorrectorModel

HELD_OUT_SHARE = 0.1
PATIENCE = 5
SIDE_FOLDS = 4
# Of a low-rank corrector with side features, whose rank is not chosen by the fit.
DEFAULT_RANK = 64


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
        seed: Seed of the order of pairs and of the choice of landmarks.
    """

    window: int = 100
    update_steps: int = 10
    learning_rate: float = 1e-3
    batch_size: int = 256
    updates: int = 4
    finishing_updates: int = 200
    max_epochs: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Search:
    """How much a closed-form fit looks for; online, most of it is taken over from the fit before.

    Attributes:
        priors: Candidates for the map of an affine fit at infinite ridge.
        relative_ridges: Candidates for its strength.
        composite: Strengths and kernel width of an earlier composite fit, and the precision to solve in.
    """

    priors: tuple[str, ...] = PRIORS
    relative_ridges: tuple[float, ...] = RELATIVE_RIDGES
    composite: CompositePlan = field(default_factory=CompositePlan)


def fit_corrector(
    corrector: CorrectorModel,
    stale: torch.Tensor,
    fresh: torch.Tensor,
    *,
    target_rows: torch.Tensor | None = None,
    side: torch.Tensor | None = None,
    fitting: CorrectorFitting | None = None,
) -> CorrectorModel:
    """Fit a corrector of any kind to pairs of stale and fresh embeddings, in place.

    Args:
        corrector: What to fit; changed and returned.
        stale: Stale embeddings, ``(n, input_dim)``.
        fresh: Embeddings of the same targets by the current encoder, ``(n, output_dim)``.
        target_rows: Which target each pair belongs to, ``(n,)`` int64; pairs of one target are merged.
        side: Side features of each pair's target, ``(n, side_dim)``, for a corrector that reads some.
        fitting: Settings of the gradient fit.

    Raises:
        ConfigurationError: If shapes disagree, a number is not finite, or there are fewer than two targets.
    """
    return fit_to_pairs(corrector, Pairs.collect(stale, fresh, target_rows=target_rows, side=side), fitting=fitting)


def fit_to_pairs(corrector: CorrectorModel, pairs: Pairs, *, fitting: CorrectorFitting | None = None) -> CorrectorModel:
    """Fit a corrector of any kind to collected pairs, in place.

    Closed-form kinds are solved; ``residual_mlp`` is trained by AdamW, with the state that was best on a tenth of the
    targets kept. Side features are fitted together with an affine map, whatever the kind: what they add stays, what
    the stale vector adds is then that of the kind.

    Args:
        corrector: What to fit; changed and returned.
        pairs: What to fit it to.
        fitting: Settings of the gradient fit.

    Raises:
        ConfigurationError: If sizes or side features are not those of the corrector.
    """
    fitting = CorrectorFitting() if fitting is None else fitting
    check_sizes(corrector, pairs)
    if corrector.config.kind != "residual_mlp":
        solve_closed_form(corrector, pairs, search=Search(composite=CompositePlan(seed=fitting.seed)))
        return corrector
    added = None
    if corrector.config.side is not None:
        added = _cross_fitted_side(corrector, pairs, seed=fitting.seed)
    fit_gradient(corrector, pairs, fitting, added=added)
    return corrector


def solve_closed_form(corrector: CorrectorModel, pairs: Pairs, *, search: Search | None = None) -> None:
    """Solve for a closed-form corrector's buffers, in place; the identity has none.

    Args:
        corrector: The corrector.
        pairs: What to fit on.
        search: What to look for.

    Raises:
        ConfigurationError: If the kind has no closed form, or sizes or side features are not those of the corrector.
    """
    config, search = corrector.config, Search() if search is None else search
    check_sizes(corrector, pairs)
    if config.kind == "identity":
        return
    if config.kind not in CLOSED_FORM_KINDS:
        raise ConfigurationError(
            "corrector fit", expected="a kind with a closed form", got=repr(config.kind), cure="Use the gradient fit."
        )
    if config.kind == "kernel" or config.side is not None:
        found = fit_composite(pairs, _plan_for(corrector, pairs, search.composite))
        corrector.load_parameters({**_composite_map(corrector, pairs, found), **side_parameters(found)})
        facts = _facts(found)
    else:
        parameters, facts = _solve_plain(corrector, pairs, search)
        corrector.load_parameters(parameters)
    corrector.fitted_pairs.fill_(len(pairs))
    config.fit_summary = facts


def _solve_plain(
    corrector: CorrectorModel, pairs: Pairs, search: Search
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Solve a kind that reads the stale vector alone and needs no kernel."""
    match corrector.config.kind:
        case "mean_shift":
            return {"shift": fit_mean_shift(pairs)}, {"pairs": len(pairs)}
        case "procrustes":
            fit = fit_procrustes(pairs)
            return {"mean": fit.mean, "weight": fit.weight, "bias": fit.bias}, {"pairs": len(pairs)}
        case "low_rank":
            fit, rank = fit_low_rank(pairs, rank=corrector.config.rank)
            return _low_rank_map(fit, pairs, rank), {"pairs": len(pairs), "rank": rank, "prior": fit.prior}
        case _:
            fit = fit_affine(pairs, priors=search.priors, relative_ridges=search.relative_ridges)
            facts = {key: value for key, value in vars(fit).items() if not isinstance(value, torch.Tensor)}
            return {"mean": fit.mean, "weight": fit.weight, "bias": fit.bias}, facts


def _low_rank_map(fit: AffineFit | CompositeFit, pairs: Pairs, rank: int) -> dict[str, torch.Tensor]:
    """Keep the ``rank`` directions in which a fit moves its pairs most, as weight = up · down."""
    moved = (pairs.stale - fit.mean.double()) @ fit.weight.double().T * pairs.weights.sqrt()[:, None]
    _, directions = torch.linalg.eigh(moved.T @ moved)
    up = directions[:, -rank:]
    return {"mean": fit.mean, "bias": fit.bias, "up": up, "down": up.T @ fit.weight.double()}


def _plan_for(corrector: CorrectorModel, pairs: Pairs, plan: CompositePlan) -> CompositePlan:
    """Say which blocks a kind consists of."""
    config = corrector.config
    square = config.input_dim == config.output_dim
    match config.kind:
        case "mean_shift":
            return dataclasses.replace(plan, prior="identity", linear=False, landmarks=0)
        case "procrustes":
            return dataclasses.replace(plan, prior="procrustes", linear=False, landmarks=0)
        case "kernel":
            most = min(config.num_landmarks, plan.landmarks or DEFAULT_LANDMARKS, len(pairs))
            return dataclasses.replace(plan, landmarks=most)
        case "low_rank":
            return dataclasses.replace(plan, prior="identity" if square else "zero", landmarks=0)
        case _:
            return dataclasses.replace(plan, landmarks=0)


def _composite_map(corrector: CorrectorModel, pairs: Pairs, found: CompositeFit) -> dict[str, torch.Tensor]:
    """Return the buffers of the part that reads the stale vector."""
    match corrector.config.kind:
        case "mean_shift":
            return {"shift": found.bias}
        case "low_rank":
            rank = min(corrector.config.rank or DEFAULT_RANK, *found.weight.shape)
            return _low_rank_map(found, pairs, rank)
        case "kernel":
            parameters = {"mean": found.mean, "weight": found.weight, "bias": found.bias}
            if found.radial is not None:
                parameters["landmarks"], parameters["landmark_weight"] = found.radial.landmarks, found.radial.weight
                parameters["landmark_width"] = torch.tensor(found.radial.width)
            return parameters
        case _:
            return {"mean": found.mean, "weight": found.weight, "bias": found.bias}


def fit_side(corrector: CorrectorModel, pairs: Pairs, *, plan: CompositePlan) -> None:
    """Fit what side features add, together with an affine map that is not kept; in place."""
    found = fit_composite(pairs, dataclasses.replace(plan, landmarks=0))
    corrector.load_parameters(side_parameters(found))
    corrector.config.fit_summary = _facts(found)


def _cross_fitted_side(corrector: CorrectorModel, pairs: Pairs, *, seed: int) -> torch.Tensor:
    """Fit what side features add, and return it for each pair as fits without that pair have it, ``(n, dim_out)``.

    A network trained beside what a fit adds to its own pairs would take them for better explained than others are.
    """
    fit_side(corrector, pairs, plan=CompositePlan(seed=seed))
    summary = corrector.config.fit_summary or {}
    plan = CompositePlan(prior=summary["prior"], strengths=summary["strengths"], relative_width=0.0, seed=seed)
    final = {name: corrector.get_buffer(name).clone() for name in corrector.state_dict() if name.startswith("side_")}
    fold_of = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)) % min(SIDE_FOLDS, len(pairs))
    added = torch.zeros(len(pairs), pairs.fresh.shape[1], device=corrector.fitted_pairs.device)
    for fold in fold_of.unique().tolist():
        others, own = (fold_of != fold).nonzero()[:, 0], (fold_of == fold).nonzero()[:, 0]
        corrector.load_parameters(side_parameters(fit_composite(pairs.take(others), plan)))
        side = pairs.take(own).side
        if side is not None:
            added[own.to(added.device)] = corrector.side_displacement(side.to(added.device))
    corrector.load_parameters(final)
    return added


def _facts(found: CompositeFit) -> dict[str, object]:
    return {name: getattr(found, name) for name in ("prior", "strengths", "relative_width", "loo_error", "pairs")}


def side_parameters(found: CompositeFit) -> dict[str, torch.Tensor]:
    """Return the buffers of the part that reads side features."""
    side = found.side
    if isinstance(side, DensePart):
        return {"side_mean": side.mean, "side_weight": side.weight}
    if side is None:
        return {}
    # Columns without a displacement share the last row of the table, which is zero.
    places = torch.full((len(side.columns.idf),), len(side.table))
    places[side.columns.columns] = torch.arange(len(side.table))
    return {"side_idf": side.columns.idf, "side_place": places, "side_table": F.pad(side.table, (0, 0, 0, 1))}


def check_sizes(corrector: CorrectorModel, pairs: Pairs) -> None:
    """Refuse pairs of other sizes or with other side features than a corrector's (ConfigurationError)."""
    config = corrector.config
    if (pairs.stale.shape[1], pairs.fresh.shape[1]) != (config.input_dim, config.output_dim):
        raise ConfigurationError(
            "corrector fit", expected=f"vectors of sizes {config.input_dim} and {config.output_dim}",
            got=f"{pairs.stale.shape[1]} and {pairs.fresh.shape[1]}",
            cure="Configure the corrector for these encoders.",
        )  # fmt: skip
    wanted = None if config.side is None else (config.side == "tokens", config.side_dim)
    got = None if pairs.side is None else (pairs.side.layout == torch.sparse_csr, pairs.side.shape[1])
    if wanted != got:
        raise ConfigurationError(
            "corrector fit", expected=f"side features {config.side!r} of width {config.side_dim}",
            got="none" if pairs.side is None else f"{pairs.side.layout} of shape {tuple(pairs.side.shape)}",
            cure="Pass `side`, or configure the corrector with side, side_dim and side_vocabulary.",
        )  # fmt: skip


def gradient_update(
    corrector: CorrectorModel,
    optimizer: torch.optim.Optimizer,
    stale: torch.Tensor,
    fresh: torch.Tensor,
    *,
    added: torch.Tensor | None = None,
) -> float:
    """Do one gradient step on ‖h(stale) − fresh‖² and return the loss before it.

    The corrector's parameters ask for no gradient outside of this function, so that neither the encoder's optimiser,
    nor its clipping, nor a distributed wrapper ever sees them. What side features add, ``added``, is not descended on.
    """
    parameters = list(corrector.parameters())
    with torch.enable_grad():
        for parameter in parameters:
            parameter.requires_grad_(True)
        loss = corrector_loss(corrector.combine(stale, added), fresh)
        gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(False)
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    corrector.forget_encoders()
    return float(loss.detach())


def fit_gradient(
    corrector: CorrectorModel, pairs: Pairs, fitting: CorrectorFitting, *, added: torch.Tensor | None = None
) -> None:
    """Train a residual MLP, keeping the state that is best on a tenth of the targets; in place.

    Args:
        corrector: The network.
        pairs: What to fit on; heavier pairs are drawn more often.
        fitting: How to fit.
        added: What side features add to each pair, ``(n, dim_out)``.
    """
    generator = torch.Generator().manual_seed(fitting.seed)
    order = torch.randperm(len(pairs), generator=generator)
    held_out = order[: max(int(len(order) * HELD_OUT_SHARE), 1)]
    kept = order[len(held_out) :] if len(order) > 1 else order
    device = corrector.fitted_pairs.device
    stale, fresh = pairs.stale.float().to(device), pairs.fresh.float().to(device)
    added, weights = torch.zeros_like(fresh) if added is None else added, pairs.weights.to(device)
    if corrector.config.input_dim != corrector.config.output_dim:
        _start_from_affine(corrector, pairs)
    optimizer = torch.optim.AdamW(corrector.parameters(), lr=fitting.learning_rate, weight_decay=0.0)

    def held_out_error() -> float:
        with torch.no_grad():
            corrected = corrector.combine(stale[held_out], added[held_out])
            errors = (corrected - fresh[held_out]).square().sum(dim=1).double()
        return float((errors * weights[held_out]).sum() / weights[held_out].sum())

    best = held_out_error()
    best_state, waited = {name: value.clone() for name, value in corrector.state_dict().items()}, 0
    for _ in range(fitting.max_epochs):
        if bool((pairs.weights == pairs.weights[0]).all()):
            shuffled = kept[torch.randperm(len(kept), generator=generator)]
        else:
            shuffled = kept[torch.multinomial(pairs.weights[kept], len(kept), True, generator=generator)]
        for batch in shuffled.split(fitting.batch_size):
            gradient_update(corrector, optimizer, stale[batch], fresh[batch], added=added[batch])
        error = held_out_error()
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
    corrector.fitted_pairs.fill_(len(pairs))
    corrector.config.fit_summary = {"pairs": len(pairs), "held_out_error": best}


def _start_from_affine(corrector: CorrectorModel, pairs: Pairs) -> None:
    """Between spaces of different size there is no identity to start at: start at the ridge solution."""
    fit: AffineFit | CompositeFit
    fit = fit_affine(pairs) if pairs.side is None else fit_composite(pairs)
    corrector.skip.copy_(fit.weight)
    with torch.no_grad():
        corrector.output.bias.copy_(fit.bias - fit.weight @ fit.mean)
