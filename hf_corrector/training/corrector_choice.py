"""Choosing between fitted correctors by what they do to pairs that were left out of their fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.errors import ConfigurationError, HFCorrectorError
from hf_corrector.fitting import CompositePlan, Pairs
from hf_corrector.metrics import Interval, paired_bootstrap
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.training.corrector_fit import CorrectorFitting, Search, fit_to_pairs, solve_closed_form

FOLDS = 4
# Networks take part up to so many pairs: each comparison trains as many of them as there are folds. A limit in seconds
# would make the choice depend on what else the machine does.
NETWORK_PAIRS = 2500
MAX_QUERIES = 1000


@dataclass(frozen=True, eq=False)
class Fitted:
    """A corrector and what it was fitted to.

    Attributes:
        model: The corrector.
        pairs: All pairs it was fitted to, with its side features.
    """

    model: CorrectorModel
    pairs: Pairs


@dataclass(frozen=True, eq=False)
class ChoiceOptions:
    """How correctors are compared.

    Attributes:
        queries: Query embeddings of the current encoder, ``(q, dim_out)``; at most :data:`MAX_QUERIES` are used. With
            queries, correctors are compared by the total variation they leave between the softmax over fresh and over
            corrected vectors; without, by squared distance to the fresh vectors.
        scale: Inverse temperature of that softmax.
        network_pairs: Candidates trained by gradient descent are left out above so many pairs; so is a candidate that
            cannot be fitted to a part of them.
        seed: Seed of the folds, of fits and of the bootstrap.
    """

    queries: torch.Tensor | None = None
    scale: float = 20.0
    network_pairs: int = NETWORK_PAIRS
    seed: int = 0


@dataclass(frozen=True)
class ChoiceRow:
    """What was found of one candidate.

    Attributes:
        name: Its name.
        loss: Mean loss on pairs left out of the fit; None where it was not compared.
        behind: Its loss minus that of the chosen one, paired, with a 95 % interval; None where it was not compared.
    """

    name: str
    loss: float | None
    behind: Interval | None


@dataclass(frozen=True)
class ChosenCorrector:
    """Which corrector to use, and why.

    Attributes:
        name: Name of the chosen candidate.
        rows: What was found of each, best first.
        sentence: Why it was chosen.
    """

    name: str
    rows: tuple[ChoiceRow, ...]
    sentence: str


def choose_corrector(candidates: Mapping[str, Fitted], options: ChoiceOptions | None = None) -> ChosenCorrector:
    """Choose the corrector that does best on pairs left out of its fit (cross-validation over targets).

    What decides should be what the corrector is for: the ranking of targets for real queries. Each pair is corrected by
    a fit that has not seen it, and the softmax of each query over these vectors is compared with that over the fresh
    ones. Hyperparameters are those of the fit to all pairs.

    Args:
        candidates: Fitted correctors by name, all fitted to the same pairs.
        options: How to compare.

    Raises:
        ConfigurationError: If there is no candidate, or they were fitted to different numbers of pairs.
    """
    options = ChoiceOptions() if options is None else options
    counts = {len(one.pairs) for one in candidates.values()}
    if len(counts) != 1:
        raise ConfigurationError(
            "choice of corrector", expected="candidates fitted to the same pairs", got=f"{sorted(counts)} pairs",
            cure="Fit at least one, and all of them to the same pairs.",
        )  # fmt: skip
    slow = {
        name
        for name, one in candidates.items()
        if one.model.config.kind == "residual_mlp" and len(one.pairs) > options.network_pairs
    }
    compared = {name: one for name, one in candidates.items() if name not in slow or len(slow) == len(candidates)}
    losses, failed = {}, {}
    for name, one in compared.items():
        try:
            losses[name] = held_out_losses(one, options)
        except (HFCorrectorError, RuntimeError) as error:
            failed[name] = str(error)
    if not losses:
        raise ConfigurationError(
            "choice of corrector", expected="a candidate that can be fitted to a part of the pairs", got=str(failed),
            cure="Give more pairs, or name a kind.",
        )  # fmt: skip
    slow = {name for name in candidates if name not in losses}
    ordered = sorted(losses, key=lambda name: float(losses[name].mean()))
    bootstrap = paired_bootstrap(losses, generator=np.random.default_rng(options.seed), resamples=2000)
    rows = [ChoiceRow(name, float(losses[name].mean()), bootstrap.difference(name, ordered[0])) for name in ordered]
    rows += [ChoiceRow(name, None, None) for name in sorted(slow)]
    return ChosenCorrector(ordered[0], tuple(rows), _sentence(rows, options))


def held_out_losses(fitted: Fitted, options: ChoiceOptions) -> npt.NDArray[np.float64]:
    """Return the loss of fits that leave each pair out: one value a query, or one a pair without queries."""
    predicted = out_of_fold(fitted, seed=options.seed)
    fresh = fitted.pairs.fresh
    if options.queries is None:
        errors = (predicted.double() - fresh).square().sum(dim=1)
        return (errors * fitted.pairs.weights / fitted.pairs.weights.mean()).numpy()
    step = max(1, -(-len(options.queries) // MAX_QUERIES))
    queries = options.queries[::step].detach().cpu().double()
    exact = torch.softmax(options.scale * queries @ fresh.T, dim=1)
    seen = torch.softmax(options.scale * queries @ predicted.double().T, dim=1)
    return (0.5 * (exact - seen).abs().sum(dim=1)).numpy()


def out_of_fold(fitted: Fitted, *, seed: int) -> torch.Tensor:
    """Correct each pair's stale vector by a fit that has not seen the pair, ``(n, dim_out)`` float32."""
    pairs, folds = fitted.pairs, min(FOLDS, len(fitted.pairs))
    fold_of = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)) % folds
    predicted = torch.empty(len(pairs), pairs.fresh.shape[1])
    for fold in range(folds):
        kept, left = (fold_of != fold).nonzero()[:, 0], pairs.take((fold_of == fold).nonzero()[:, 0])
        model = refit(fitted.model, pairs.take(kept), seed=seed)
        predicted[fold_of == fold] = model.correct(left.stale.float(), left.side)
    return predicted


def refit(model: CorrectorModel, pairs: Pairs, *, seed: int) -> CorrectorModel:
    """Fit a corrector like ``model`` to other pairs, with the hyperparameters it was found to need."""
    summary = model.config.fit_summary or {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = copy.deepcopy(model.config)
        config.rank = config.fitted_rank if config.rank is None else config.rank
        like = CorrectorModel(config)
    if model.config.kind == "residual_mlp":
        return fit_to_pairs(like, pairs, fitting=CorrectorFitting(seed=seed))
    plan = CompositePlan(seed=seed)
    if "strengths" in summary:
        plan = CompositePlan(
            prior=summary["prior"], strengths=summary["strengths"], relative_width=summary["relative_width"], seed=seed
        )
    solve_closed_form(like, pairs, search=Search(composite=plan))
    return like


def _sentence(rows: list[ChoiceRow], options: ChoiceOptions) -> str:
    measure = "squared distance to the fresh vector" if options.queries is None else "total variation of the softmax"
    best, others = rows[0], [row for row in rows[1:] if row.loss is not None]
    sentence = f"{best.name} leaves the least {measure} on pairs left out of the fit ({best.loss:.4f})"
    if others and others[0].behind is not None:
        behind = others[0].behind
        clear = "" if behind.low > 0 else ", a difference these pairs do not settle"
        sentence += (
            f"; {others[0].name} follows, {behind.estimate:.4f} [{behind.low:.4f}, {behind.high:.4f}] behind{clear}"
        )
    slow = [row.name for row in rows if row.loss is None]
    return sentence + (f"; not compared: {', '.join(slow)}." if slow else ".")
