"""What a probe of re-encoded targets says: the error of every family at nested sizes, on rows it was not fitted on.

Two errors are measured:

* the squared error ‖h(stale) − fresh‖², which the fit itself makes small;
* the score error E_q Var_y ⟨q, h(stale_y) − fresh_y⟩, the mean over queries of the variance over targets of what the
  corrected score is wrong by. A constant added to all scores of a query changes no ranking and no softmax, so it is
  left out; this is why a mean shift, which takes a good part of the squared error away, recovers next to nothing.

With M the queries' second moment and e_y the residual less its mean, the score error is the mean of e_yᵀ M e_y, so
every target has a share of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.learning_curves import LearningCurve, fit_learning_curve
from hf_corrector.metrics import FloatArray
from hf_corrector.models.configuration_corrector import CorrectorConfig
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.side_features import take_rows
from hf_corrector.training.corrector_fit import CorrectorFitting, fit_corrector

Correct: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
Fit: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], Correct]

SMALLEST_SIZE = 12
SMALLEST_PROBE = 40
# Score errors below this come of rounding float32 vectors.
_NO_DRIFT = 1e-12


@dataclass(frozen=True, eq=False)
class Probe:
    """Targets drawn uniformly at random and re-encoded.

    Attributes:
        stale: Their cached vectors, ``(n, dim_in)``.
        fresh: Their vectors by the current encoder, ``(n, dim_out)``.
        queries: Vectors of real queries by the current encoder, ``(q, dim_out)``; without them the fresh vectors
            themselves stand in for queries.
        side: Their side features, ``(n, width)``, dense or CSR, or None.
    """

    stale: torch.Tensor
    fresh: torch.Tensor
    queries: torch.Tensor | None = None
    side: torch.Tensor | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be measured on (DataError)."""
        shapes = [tuple(one.shape) for one in (self.stale, self.fresh)]
        if self.stale.dim() != 2 or self.fresh.dim() != 2 or len(self.stale) != len(self.fresh):
            raise DataError(
                "probe", expected="stale (n, dim_in) and fresh (n, dim_out)", got=str(shapes),
                cure="Pass the cached and the re-encoded vector of every target.",
            )  # fmt: skip
        if len(self.stale) < SMALLEST_PROBE:
            raise DataError(
                "probe", expected=f"at least {SMALLEST_PROBE} targets", got=str(len(self.stale)),
                cure="Re-encode more; some hundred make useful forecasts.",
            )  # fmt: skip
        if self.queries is not None and self.queries.shape[1:] != self.fresh.shape[1:]:
            raise DataError(
                "probe", expected=f"queries of size {self.fresh.shape[1]}", got=str(tuple(self.queries.shape)),
                cure="Encode the queries with the encoder that re-encoded the targets.",
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.stale)


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is measured.

    Attributes:
        sizes: Numbers of pairs to fit on, ascending; halvings of the largest one possible if empty.
        folds: Each part is held out once, so the largest size is ``1 − 1 / folds`` of the probe.
        repeats: Times the probe is cut into folds anew.
        seed: Seed of the cuts.
        progress: Whether to show a progress bar over fits.
    """

    sizes: tuple[int, ...] = ()
    folds: int = 5
    repeats: int = 1
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        if self.folds < 2 or self.repeats < 1:
            raise ConfigurationError(
                "probe", expected="at least 2 folds and 1 repeat", got=f"{self.folds} and {self.repeats}",
                cure="Raise them.",
            )  # fmt: skip

    def sizes_for(self, probe: int) -> tuple[int, ...]:
        """Return the sizes to fit on in a probe of ``probe`` targets.

        Raises:
            ConfigurationError: If a given size leaves nothing to judge on.
        """
        largest = probe - -(-probe // self.folds)
        if self.sizes:
            if self.sizes[-1] > largest or self.sizes[0] < 2:
                raise ConfigurationError(
                    "probe", expected=f"sizes from 2 to {largest}", got=str(list(self.sizes)),
                    cure="Leave some of the probe to judge on.",
                )  # fmt: skip
            return self.sizes
        sizes = [largest]
        while sizes[-1] // 2 >= SMALLEST_SIZE:
            sizes.append(sizes[-1] // 2)
        return tuple(sizes[::-1])


@dataclass(frozen=True, eq=False)
class FamilyCurve:
    """One family's errors on a probe, each divided by that of the stale vectors where it says so.

    Attributes:
        name: The family.
        sizes: Numbers of pairs fitted on, ``(sizes,)``.
        squared_errors: Mean squared error on held-out rows, ``(resamples, sizes)``.
        cosines: Mean cosine of corrected and fresh, ``(resamples, sizes)``.
        score_ratios: Score error over that of the stale vectors, ``(resamples, sizes)``.
        squared: Learning curve of the squared error.
        scores: Learning curve of the score ratio.
        probe: Targets of the probe.
        same_size: Whether stale and fresh vectors have the same size.
    """

    name: str
    sizes: tuple[int, ...]
    squared_errors: FloatArray
    cosines: FloatArray
    score_ratios: FloatArray
    squared: LearningCurve
    scores: LearningCurve
    probe: int
    same_size: bool = True


def standard_families(
    kinds: Sequence[str], *, side: str | None = None, side_vocabulary: int | None = None,
    fitting: CorrectorFitting | None = None,
) -> dict[str, Fit]:  # fmt: skip
    """Return for each kind of corrector the function that fits it, by its name.

    Args:
        kinds: Kinds of correctors.
        side: Kind of the probe's side features, which every family but the identity then reads; None for none. Such a
            family is called ``"affine + tokens"``.
        side_vocabulary: How many of the columns of ``"tokens"`` are tokens.
        fitting: Settings of gradient fits.
    """

    def make(kind: str) -> Fit:
        def fit(stale: torch.Tensor, fresh: torch.Tensor, features: torch.Tensor | None) -> Correct:
            reads = features is not None and side is not None
            config = CorrectorConfig(
                kind=kind, input_dim=stale.shape[1], output_dim=fresh.shape[1], side=side if reads else None,
                side_dim=features.shape[1] if reads and features is not None else None,
                side_vocabulary=side_vocabulary if reads else None,
            )  # fmt: skip
            # The same start whatever was fitted before, for kinds with random initial weights.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                corrector = CorrectorModel(config)
            fit_corrector(corrector, stale, fresh, side=features if reads else None, fitting=fitting)

            @torch.no_grad()
            def correct(vectors: torch.Tensor, beside: torch.Tensor | None) -> torch.Tensor:
                corrected: torch.Tensor = corrector(vectors.float(), beside if reads else None)
                return corrected

            return correct

        return fit

    return {kind if side is None else f"{kind} + {side}": make(kind) for kind in kinds}


def probe_learning_curves(
    probe: Probe, *, families: Mapping[str, Fit], settings: ProbeSettings | None = None
) -> dict[str, FamilyCurve]:
    """Fit every family at nested sizes of a probe and judge it on rows left out.

    The probe is cut into folds; for each, every size is a prefix of the other folds' rows in random order, so that all
    sizes of a resample are judged on the same rows and every row judges once.

    Args:
        probe: Stale and fresh vectors, and queries.
        families: How to fit each family, by name; see :func:`standard_families`.
        settings: Sizes and folds.

    Raises:
        DataError: If stale and fresh vectors are the same.
        ConfigurationError: If a size leaves nothing to judge on.
    """
    settings = ProbeSettings() if settings is None else settings
    sizes = settings.sizes_for(len(probe))
    moment = query_moment(probe.fresh if probe.queries is None else probe.queries)
    pieces = list(cuts(len(probe), settings))
    stale = [residual_errors(stale_baseline(probe, fitted, held_out), probe.fresh[held_out], moment)
             for fitted, held_out in pieces]  # fmt: skip
    if min(base.scores.mean() for base in stale) <= _NO_DRIFT:
        raise DataError(
            "probe", expected="fresh vectors that differ from the stale ones", got="the same vectors",
            cure="Nothing has drifted: search the index as it is.",
        )  # fmt: skip
    curves = {}
    total = len(families) * len(pieces) * len(sizes)
    with tqdm(total=total, desc="fit families", unit="fit", disable=not settings.progress) as bar:

        def judged(fit: Fit, fitted: torch.Tensor, held_out: torch.Tensor) -> RowErrors:
            errors = _judged(probe, fit, fitted, held_out, moment)
            bar.update()
            return errors

        for name, fit in families.items():
            found = [[judged(fit, fitted[:size], held_out) for size in sizes] for fitted, held_out in pieces]
            curves[name] = _family_curve(name, sizes, found, stale, probe)
    return curves


@dataclass(frozen=True, eq=False)
class RowErrors:
    """Errors of some targets, one value each.

    Attributes:
        squared: Squared errors, ``(n,)``.
        scores: Shares of the score error, ``(n,)``.
        cosines: Cosines to the fresh vectors, ``(n,)``.
    """

    squared: FloatArray
    scores: FloatArray
    cosines: FloatArray


def residual_errors(vectors: torch.Tensor, fresh: torch.Tensor, moment: torch.Tensor) -> RowErrors:
    """Measure vectors ``(n, dim)`` against the fresh ones of the same targets, n at least 2.

    Args:
        vectors: Stale or corrected vectors.
        fresh: Fresh vectors, ``(n, dim)``.
        moment: The queries' second moment, see :func:`query_moment`.
    """
    residual = vectors.double() - fresh.double()
    centred = residual - residual.mean(dim=0)
    # The mean is of these very rows, which takes a share of 1 / n out of their spread.
    shares = (centred @ moment * centred).sum(dim=1) * len(centred) / (len(centred) - 1)
    cosines = F.cosine_similarity(vectors.double(), fresh.double(), dim=1)
    return RowErrors(residual.square().sum(dim=1).numpy(), shares.numpy(), cosines.numpy())


def query_moment(queries: torch.Tensor) -> torch.Tensor:
    """Return the second moment M = E[q qᵀ] of queries ``(q, dim)``, as ``(dim, dim)`` float64."""
    given = queries.double()
    return given.T @ given / len(given)


def stale_baseline(probe: Probe, fitted: torch.Tensor, held_out: torch.Tensor) -> torch.Tensor:
    """Return what an index without correction holds for the held-out rows, ``(n, dim_out)``.

    Between spaces of different size stale vectors cannot be searched at all: the mean of the fitted rows' fresh vectors
    stands in, which ranks nothing.
    """
    if probe.stale.shape[1] == probe.fresh.shape[1]:
        return probe.stale[held_out]
    return probe.fresh[fitted].mean(dim=0).expand(len(held_out), -1)


def cuts(rows: int, settings: ProbeSettings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield for each resample the rows to fit on, in random order, and the rows to judge on."""
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.repeats):
        order = torch.randperm(rows, generator=generator)
        for fold in range(settings.folds):
            held_out = order[fold :: settings.folds]
            kept = torch.cat([order[other :: settings.folds] for other in range(settings.folds) if other != fold])
            yield kept[torch.randperm(len(kept), generator=generator)], held_out


def _judged(
    probe: Probe, fit: Fit, fitted: torch.Tensor, held_out: torch.Tensor, moment: torch.Tensor
) -> RowErrors:  # fmt: skip
    correct = fit(probe.stale[fitted], probe.fresh[fitted], side_rows(probe.side, fitted))
    corrected = correct(probe.stale[held_out], side_rows(probe.side, held_out))
    return residual_errors(corrected, probe.fresh[held_out], moment)


def side_rows(side: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor | None:
    """Return some rows of side features, dense or CSR, if there are any."""
    return None if side is None else take_rows(side, rows)


def _family_curve(
    name: str, sizes: tuple[int, ...], found: list[list[RowErrors]], stale: list[RowErrors], probe: Probe
) -> FamilyCurve:
    rows = len(probe)
    squared = np.array([[one.squared.mean() for one in row] for row in found])
    scores = np.array(
        [[one.scores.mean() / base.scores.mean() for one in row] for row, base in zip(found, stale, strict=True)]
    )
    last = [row[-1] for row in found]
    relative = [np.concatenate([one.squared for one in last])]
    relative[0] = relative[0] / relative[0].mean() - 1.0
    corrected, before = (np.concatenate([one.scores for one in part]) for part in (last, stale))
    relative.append(corrected / corrected.mean() - before / before.mean())
    # Every row judges once in each repeat, so there are only so many independent ones.
    squared_sd, scores_sd = (float(one.std()) / rows**0.5 for one in relative)
    return FamilyCurve(
        name=name, sizes=sizes, squared_errors=squared, score_ratios=scores,
        cosines=np.array([[one.cosines.mean() for one in row] for row in found]),
        squared=fit_learning_curve(sizes, squared, population=rows, relative_sd=squared_sd),
        scores=fit_learning_curve(sizes, scores, population=rows, relative_sd=scores_sd),
        probe=rows, same_size=probe.stale.shape[1] == probe.fresh.shape[1],
    )  # fmt: skip
