"""The stages of an upgrade between its inputs and its decision, each callable alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.cache.side_store import open_side, side_details, stored_sides
from hf_corrector.data.retrieval import column
from hf_corrector.errors import CacheError, ConfigurationError, DataError
from hf_corrector.evaluation.evaluator import BoolArray, Judgement
from hf_corrector.evaluation.verdict import Evidence
from hf_corrector.evaluation.verdict_slices import QuerySlice, metadata_values, slice_queries
from hf_corrector.index.exact import ExactIndex
from hf_corrector.index_upgrade.conditions import ErrorPredictor, reembedding, urgency
from hf_corrector.index_upgrade.corpus_sides import CorpusSide, SideRows
from hf_corrector.index_upgrade.fits import Fit, FitPairs, PairSide
from hf_corrector.index_upgrade.fresh_targets import FreshTargets
from hf_corrector.index_upgrade.inputs import UpgradeInputs, encode_queries
from hf_corrector.index_upgrade.judged_corpus import JudgedCorpus, Search, judged_rows
from hf_corrector.index_upgrade.options import UpgradeOptions, Wanted
from hf_corrector.metrics import FloatArray
from hf_corrector.pair_choice import Limits, PairChoice, choose_pairs, traffic_of_searches
from hf_corrector.side_features import SideFeatures, TokenCounts
from hf_corrector.training.corrector_choice import MAX_QUERIES, ChoiceOptions

# Searching a large index for a long log takes longer than all else; so many queries show where the traffic goes.
MAX_LOGGED = 2000
LOGGED_DEPTH = 10
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, eq=False)
class ChosenPairs:
    """Fitting pairs and what choosing them took.

    Attributes:
        choice: The pairs.
        traffic: How often each target is asked for, ``(rows,)``, where that is known.
        query_passes: Queries encoded for it.
    """

    choice: PairChoice
    traffic: FloatArray | None = field(repr=False)
    query_passes: int


def pair_choice(inputs: UpgradeInputs, wanted: Wanted, options: UpgradeOptions) -> ChosenPairs:
    """Choose which targets to re-encode for fitting; what answers a judged query is held out."""
    traffic, passes = None, 0
    if options.reembed_by_traffic and wanted.pairs != "traffic":
        raise ConfigurationError(
            "reembed_by_traffic", expected="pairs='traffic', which finds out what is asked for",
            got=f"pairs={wanted.pairs!r}", cure="Leave it out: by predicted error alone, less is left wrong.",
        )  # fmt: skip
    if wanted.pairs == "traffic":
        traffic, passes = _traffic(inputs, options)
    limits = Limits(inputs.positives, options.duplicate_cosine, options.seed)
    choice = choose_pairs(inputs.cache, wanted.num_pairs, method=wanted.pairs, traffic=traffic, limits=limits)
    return ChosenPairs(choice, traffic, passes)


def _traffic(inputs: UpgradeInputs, options: UpgradeOptions) -> tuple[FloatArray, int]:
    """Search the old index for logged queries, with its own encoder where that is at hand."""
    log = dict(options.query_log or {})
    if not log and inputs.data.train is not None:
        log = dict.fromkeys(column(inputs.data.train, "query"), 1.0)
    model = inputs.old_model or (inputs.model if inputs.same_size else None)
    if not log or model is None:
        raise ConfigurationError(
            "pairs='traffic'", expected="a query log or a train split, and an encoder that can search the old index",
            got="no log" if not log else "no encoder of that size", cure="Give options.query_log and old_model.",
        )  # fmt: skip
    queries, counts = list(log), np.fromiter(log.values(), dtype=np.float64)
    if len(queries) > MAX_LOGGED:
        odds = counts / counts.sum()
        size = min(MAX_LOGGED, int((odds > 0).sum()))
        kept = np.random.default_rng([options.seed, 3]).choice(len(queries), size, replace=False, p=odds)
        queries, counts = [queries[one] for one in kept], counts[kept]
    judging = options.judging
    index = ExactIndex(inputs.cache, budget_bytes=judging.budget_bytes, device=judging.device)
    found = index.search(encode_queries(model, queries, options), LOGGED_DEPTH).rows.numpy()
    return traffic_of_searches(found, len(inputs.cache), counts=counts), len(queries)


def choice_options(inputs: UpgradeInputs, wanted: Wanted, options: UpgradeOptions) -> ChoiceOptions:
    """Say how correctors are compared: by other queries than the judged ones where there are any, else by distance.

    Where queries are mapped there is nothing to rank by, as fitting pairs are targets.
    """
    others = [one for one in (inputs.data.train, inputs.data.dev) if one is not None and one is not inputs.split]
    other = next((one for one in others if len(one)), None)
    asked_for = wanted.kind != "auto" and wanted.side != "auto"
    if other is None or asked_for or wanted.direction == "queries":
        return ChoiceOptions(seed=options.seed)
    chosen = np.random.default_rng([options.seed, 4]).permutation(len(other))[:MAX_QUERIES]
    queries = encode_queries(inputs.model, column(other.select(np.sort(chosen)), "query"), options)
    return ChoiceOptions(queries=queries, scale=float(inputs.model.config.scale), seed=options.seed)


def available_sides(inputs: UpgradeInputs, wanted: Wanted) -> dict[str, SideFeatures]:
    """Return the side features to compare with and without, of all targets, by kind.

    What the cache does not store is made once and stored in its folder, which changes no vector, so that whoever
    applies the corrector finds the same. Where that cannot be written it is read off the corpus.
    """
    if wanted.side is None or wanted.direction == "queries":
        return {}
    kind = "tokens" if wanted.side == "auto" else wanted.side
    if kind in stored_sides(inputs.cache):
        return {kind: open_side(inputs.cache, kind)}
    # The cache's own encoder is whose tokens 'embed' would have stored.
    reader = (inputs.old_model or inputs.model) if kind == "tokens" else inputs.model
    cache = inputs.cache
    read_off = CorpusSide(inputs.data.corpus, reader, kind, cache.manifest)
    try:
        read_off.store(cache)
    except (OSError, CacheError):  # a folder that is read-only, full, or being written into
        return {kind: read_off}
    return {kind: open_side(cache, kind)}


def fit_pairs(
    inputs: UpgradeInputs, choice: PairChoice, fresh: FreshTargets, *, sides: Mapping[str, SideFeatures],
    direction: str,
) -> FitPairs:  # fmt: skip
    """Re-encode the chosen targets and pair them with their cached vectors."""
    stale, new = inputs.cache.gather(choice.rows), fresh.gather(choice.rows)
    forward = direction == "targets"
    return FitPairs(
        rows=choice.rows, source=stale if forward else new, goal=new if forward else stale,
        weights=None if choice.weights is None else torch.from_numpy(choice.weights),
        sides={kind: _pair_side(side, choice) for kind, side in sides.items()},
        normalize=bool(inputs.model.config.normalize) if forward else inputs.cache.fingerprint.normalize,
    )  # fmt: skip


def _pair_side(side: SideFeatures, choice: PairChoice) -> PairSide:
    features = side.gather(choice.rows)
    if isinstance(side, TokenCounts) or (isinstance(side, CorpusSide) and side.kind == "tokens"):
        return PairSide(features, side.vocabulary, side.statistics())
    return PairSide(features)


def details_of_side(
    inputs: UpgradeInputs, kind: str | None, sides: Mapping[str, SideFeatures]
) -> dict[str, Any] | None:
    """Return what the side features of a fit were made with, as a cache that stores such says; None where unknown."""
    side = None if kind is None else sides[kind]
    if isinstance(side, CorpusSide):
        return dict(side.details())
    return None if kind is None or kind not in stored_sides(inputs.cache) else side_details(inputs.cache, kind) or None


def judged_corpus(
    inputs: UpgradeInputs, fresh: FreshTargets, options: UpgradeOptions, *, sides: Mapping[str, SideFeatures],
    direction: str,
) -> JudgedCorpus:  # fmt: skip
    """Encode the judged queries and re-encode the judged targets."""
    rows = judged_rows(inputs.positives, len(inputs.cache), options)
    queries, old = column(inputs.judged, "query"), inputs.old_model
    place = {row: new for new, row in enumerate(rows.tolist())}
    return JudgedCorpus(
        rows=rows, total=len(inputs.cache),
        relevant=[{place[row]: grade for row, grade in known.items()} for known in inputs.relevant],
        stale=inputs.cache.gather(rows), fresh=fresh.gather(rows),
        queries=encode_queries(inputs.model, queries, options),
        old_queries=None if old is None else encode_queries(old, queries, options),
        sides={kind: SideRows(side, rows) for kind, side in sides.items()}, direction=direction,
    )  # fmt: skip


def evidence_of(
    inputs: UpgradeInputs, judgement: Judgement, slices: tuple[QuerySlice, ...], *, wanted: Wanted,
    options: UpgradeOptions, clean: BoolArray,
) -> Evidence:  # fmt: skip
    """Gather what the verdict looks at."""
    names = [name for name in ("old", "stale", "corrected", "fresh") if name in judgement.per_query]
    return Evidence(
        metric=judgement.primary,
        per_query={name: judgement.per_query[name][judgement.primary] for name in names},
        clean=clean, slices=slices,
        passes=(wanted.num_pairs, len(inputs.cache)), resamples=options.judging.resamples, seed=options.judging.seed,
        direction=wanted.direction,
    )  # fmt: skip


def query_slices(inputs: UpgradeInputs, options: UpgradeOptions) -> tuple[QuerySlice, ...]:
    """Slice by fields of the queries, or where no query has the field by that of each query's best target.

    Raises:
        DataError: If neither has a field, or one is named twice.
    """
    slices: list[QuerySlice] = []
    for name in options.slice_by:
        values = metadata_values(column(inputs.judged, "metadata"), name, where="judged queries")
        if all(value is None for value in values):
            best = [max(known, key=lambda row: (known[row], -row)) for known in inputs.relevant]
            texts = column(inputs.data.corpus.select(best), "metadata")
            values = metadata_values(texts, name, where="targets of judged queries")
        slices += slice_queries(values, name=name, min_queries=options.thresholds.min_slice_queries)
    names = [one.name for one in slices]
    if len(set(names)) < len(names):
        raise DataError("slice_by", expected="different fields", got=str(options.slice_by), cure="Name each once.")
    return tuple(slices)


class Urgency:
    """Which targets correction is expected to serve worst; fitted when first asked.

    Args:
        inputs: The cache.
        chosen: The corrector.
        traffic: How often each target is asked for, ``(rows,)``, if the order is to be weighed by it.
        seed: Seed of the folds.
    """

    def __init__(self, inputs: UpgradeInputs, chosen: Fit, *, traffic: FloatArray | None, seed: int) -> None:
        self._cache, self._chosen, self._traffic, self._seed = inputs.cache, chosen, traffic, seed
        self._predictor: ErrorPredictor | None = None

    def predicted(self, stale: torch.Tensor) -> FloatArray:
        """Return the predicted squared errors of targets from their stale vectors, ``(n,)``."""
        if self._predictor is None:
            self._predictor = ErrorPredictor.fit(self._chosen, seed=self._seed)
        return self._predictor.predict(stale)

    def first(self, share: float | None) -> npt.NDArray[np.int64]:
        """Return the rows of the cache to re-embed first, most urgent first; none for a share of None."""
        if share is None:
            return np.zeros(0, dtype=np.int64)
        total = len(self._cache)
        parts = [
            self.predicted(self._cache.read(start, min(start + _ROWS_AT_ONCE, total)))
            for start in range(0, total, _ROWS_AT_ONCE)
        ]
        order = np.argsort(-urgency(np.concatenate(parts), self._traffic), kind="stable")
        return order[: round(share * total)]

    def reembedding(
        self, search: Search, positives: npt.NDArray[np.int64], *, metric: str
    ) -> Callable[[float], FloatArray]:
        """Return what :func:`~hf_corrector.evaluation.verdict.decide` asks for parts of the corpus."""
        corpus = search.corpus
        urgent = urgency(self.predicted(corpus.stale), None if self._traffic is None else self._traffic[corpus.rows])
        # In a sample positives are more frequent than in the corpus: the others say how urgent its worst part is.
        typical = np.ones(len(corpus.rows), dtype=np.bool_) if corpus.is_whole else ~np.isin(corpus.rows, positives)
        return reembedding(search, self._chosen, urgent, typical=typical, metric=metric)
