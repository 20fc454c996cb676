"""Closed-form fits of a corrector to pairs of stale and fresh embeddings.

:class:`Pairs` is what is fitted to; :mod:`.affine` holds the affine families, :mod:`.composite` ridge regression on
several blocks of features at once (stale vectors, landmarks, side features), :mod:`.blocks` what a block is,
:mod:`.streaming` fits to pairs that are not kept.
"""

from __future__ import annotations

from hf_corrector.fitting.affine import fit_affine, fit_low_rank, fit_mean_shift, fit_procrustes
from hf_corrector.fitting.composite import CompositeFit, CompositePlan, fit_composite
from hf_corrector.fitting.pairs import Pairs
from hf_corrector.fitting.ridge import PRIORS, RELATIVE_RIDGES, AffineFit
from hf_corrector.fitting.streaming import Forgetting, PairStatistics

__all__ = [
    "PRIORS", "RELATIVE_RIDGES", "AffineFit", "CompositeFit", "CompositePlan", "Forgetting", "PairStatistics", "Pairs",
    "fit_affine", "fit_composite", "fit_low_rank", "fit_mean_shift", "fit_procrustes",
]  # fmt: skip
