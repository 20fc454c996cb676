"""Fitting every kind of corrector to the same pairs, and choosing one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_corrector.errors import ConfigurationError, HFCorrectorError
from hf_corrector.fitting import Pairs
from hf_corrector.metrics import FloatArray
from hf_corrector.models.configuration_corrector import SAME_SIZE_KINDS, CorrectorConfig
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.side_features import TokenStatistics
from hf_corrector.training.corrector_choice import ChoiceOptions, Fitted, choose_corrector, out_of_fold
from hf_corrector.training.corrector_fit import CorrectorFitting, fit_to_pairs


@dataclass(frozen=True, eq=False)
class PairSide:
    """Side features of fitting pairs.

    Attributes:
        features: One row a pair, ``(n, width)``, dense or CSR.
        vocabulary: How many of the columns of token counts are tokens; None for other kinds.
        statistics: How common each token is among all targets; None to take that from the pairs.
    """

    features: torch.Tensor
    vocabulary: int | None = None
    statistics: TokenStatistics | None = None


@dataclass(frozen=True, eq=False)
class FitPairs:
    """What correctors are fitted to.

    Attributes:
        rows: Target rows, ascending, ``(n,)`` int64.
        source: Vectors to correct, ``(n, dim_in)``.
        goal: Where they should go, ``(n, dim_out)``.
        weights: Weight of each pair, ``(n,)``, or None.
        sides: Side features of the pairs by their kind.
        normalize: Whether corrected vectors get unit length.
    """

    rows: npt.NDArray[np.int64]
    source: torch.Tensor
    goal: torch.Tensor
    weights: torch.Tensor | None
    sides: Mapping[str, PairSide] = field(default_factory=dict)
    normalize: bool = True

    def beside(self, side: str | None) -> Pairs:
        """Return the pairs with one kind of side features, or with none."""
        if side is None:
            return Pairs.collect(self.source, self.goal, weights=self.weights)
        chosen = self.sides[side]
        pairs = Pairs.collect(self.source, self.goal, weights=self.weights, side=chosen.features)
        return dataclasses.replace(pairs, statistics=chosen.statistics)

    def config(self, kind: str, side: str | None) -> CorrectorConfig:
        """Return the configuration of a corrector for these pairs."""
        found = None if side is None else self.sides[side]
        return CorrectorConfig(
            kind=kind, input_dim=self.source.shape[1], output_dim=self.goal.shape[1], normalize_output=self.normalize,
            side=side, side_dim=None if found is None else found.features.shape[1],
            side_vocabulary=None if found is None else found.vocabulary,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted corrector.

    Attributes:
        model: The corrector.
        side: Kind of its side features, or None.
        pairs: What it was fitted to.
        seconds: What fitting took.
    """

    model: CorrectorModel
    side: str | None
    pairs: Pairs
    seconds: float

    @property
    def fitted(self) -> Fitted:
        """The corrector as it is compared with others."""
        return Fitted(self.model, self.pairs)

    @property
    def name(self) -> str:
        """Kind, and side features where there are any."""
        return fit_name(str(self.model.config.kind), self.side)


def fit_name(kind: str, side: str | None) -> str:
    """Name a kind with or without side features, as rows of the table are called."""
    return kind if side is None else f"{kind} + {side}"


def fit_all(
    pairs: FitPairs, kinds: tuple[str, ...], *, seed: int, progress: bool = False
) -> tuple[list[Fit], list[str]]:  # fmt: skip
    """Fit every kind, with and without each kind of side features; ``progress`` shows a bar.

    Returns:
        What could be fitted, and a sentence on each that could not.

    Raises:
        ConfigurationError: If nothing could be fitted.
    """
    fits, notes = [], []
    for kind in tqdm(kinds, desc="fit correctors", unit="kind", disable=not progress):
        if kind in SAME_SIZE_KINDS and pairs.source.shape[1] != pairs.goal.shape[1]:
            notes.append(f"{kind} is no map between vectors of different size.")
            continue
        for side in (None, *pairs.sides):
            if side is not None and kind == "identity":
                continue
            try:
                fits.append(fit_one(pairs, kind, side, seed=seed))
            except (HFCorrectorError, RuntimeError) as error:
                notes.append(f"{fit_name(kind, side)} could not be fitted: {error}")
    if not fits:
        raise ConfigurationError(
            "upgrade", expected="a kind of corrector that can be fitted", got=" ".join(notes), cure="Name other kinds."
        )
    return fits, notes


def fit_one(pairs: FitPairs, kind: str, side: str | None, *, seed: int) -> Fit:
    """Fit one kind to all pairs."""
    started = time.perf_counter()
    given = pairs.beside(side)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CorrectorModel(pairs.config(kind, side))
    fit_to_pairs(model, given, fitting=CorrectorFitting(seed=seed))
    return Fit(model, side, given, time.perf_counter() - started)


def out_of_fold_errors(fit: Fit, *, seed: int) -> FloatArray:
    """Return the squared distance of each pair's corrected vector from the fresh one, by fits without it, ``(n,)``."""
    predicted = out_of_fold(fit.fitted, seed=seed)
    errors: FloatArray = (predicted.double() - fit.pairs.fresh).square().sum(dim=1).numpy()
    return errors


@dataclass(frozen=True, eq=False)
class Choice:
    """The corrector to adopt.

    Attributes:
        fit: The corrector.
        losses: Mean loss of fits that had not seen a pair, by name; empty where nothing was chosen between.
        sentence: Why this one.
    """

    fit: Fit
    losses: Mapping[str, float]
    sentence: str


def choose(fits: list[Fit], options: ChoiceOptions, *, kind: str, side: str | None) -> Choice:
    """Choose the kind asked for, or by what fits do to pairs they have not seen.

    Args:
        fits: All that could be fitted.
        options: How to compare.
        kind: ``"auto"`` or a kind.
        side: ``"auto"``, None or a kind of side features.

    Raises:
        ConfigurationError: If the kind asked for is not among the fits.
    """
    eligible = {
        fit.name: fit for fit in fits if kind in ("auto", fit.model.config.kind) and side in ("auto", fit.side)
    }  # fmt: skip
    if not eligible:
        raise ConfigurationError(
            "kind", expected=f"one of {sorted({fit.name for fit in fits})}",
            got=fit_name(kind, None if side == "auto" else side), cure="Choose one of them, or leave it to 'auto'.",
        )  # fmt: skip
    if len(eligible) == 1:
        (only,) = eligible.values()
        return Choice(only, {}, f"{only.name} is what was asked for.")
    found = choose_corrector({name: fit.fitted for name, fit in eligible.items()}, options)
    losses = {row.name: row.loss for row in found.rows if row.loss is not None}
    return Choice(eligible[found.name], losses, found.sentence)
