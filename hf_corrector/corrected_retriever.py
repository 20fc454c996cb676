"""Bridge between cache, corrector and index: search stale vectors as if every one had been corrected.

One source of stale vectors and one corrector go in, so that vectors of two encoders are never compared unaligned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hf_corrector.affine_view import AffineView
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.index.base import RowVectors
from hf_corrector.index.exact import check_k
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.records import FittedTargets
from hf_corrector.search_strategies import (
    CorrectedResult,
    ExactStrategy,
    Excluded,
    FaissStrategy,
    FoldedStrategy,
    QueriesBackward,
    Strategy,
    TwoStageStrategy,
)
from hf_corrector.side_features import SideFeatures

if TYPE_CHECKING:
    from hf_corrector.index.faiss import FaissIndex, FaissParameters

BACKENDS = ("exact", "folded", "two_stage", "faiss")
DIRECTIONS = ("targets", "queries")
SNAPSHOTS = ("float32", "bfloat16", "none")


@dataclass(frozen=True)
class RetrieverOptions:
    """How a :class:`CorrectedRetriever` works; every field has a default.

    Attributes:
        direction: ``"targets"``: the corrector moves targets to where the queries' encoder would put them.
            ``"queries"``: it was fitted the other way and moves queries to where the old encoder would put them.
        snapshot: Of backend ``"exact"``: keep all corrected rows, in float32 or bfloat16 (single rows that decide are
            then corrected again), or correct chunk by chunk in every search (``"none"``).
        shortlist: Of backends ``"two_stage"`` and ``"faiss"``: candidates per query that the corrector itself judges;
            four times k, and at least 40, if not given. ``"two_stage"`` then finds eight times as many where the
            corrector is no affine map, and judges also those of them that may be among the best, going by how far the
            map was off for the first ones.
        certify: Of backend ``"two_stage"``: bound for every row how far the affine map is off (that costs as much as
            correcting all rows once) and say which queries are exact; without ``shortlist``, judge as many candidates
            as it takes to make all exact.
        factory: Of backend ``"faiss"``: the index to make of the stale vectors, in faiss' words.
        faiss: Of backend ``"faiss"``: an index of the stale vectors that exists already, instead of ``factory``.
        parameters: Of backend ``"faiss"``: how thoroughly to search.
        fit_rows: Rows on which the affine map next to a corrector that is none is fitted.
        seed: Seed they are drawn with, and those that faiss trains on.
        device: Where to scan.
        fitted: What was noted when the corrector was fitted, to check that it belongs to the cache.
    """

    direction: str = "targets"
    snapshot: str = "float32"
    shortlist: int | None = None
    certify: bool = False
    factory: str | None = None
    faiss: FaissIndex | None = field(default=None, compare=False)
    parameters: FaissParameters | None = None
    fit_rows: int = 20_000
    seed: int = 0
    device: str = "cpu"
    fitted: FittedTargets | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        if self.direction not in DIRECTIONS or self.snapshot not in SNAPSHOTS:
            raise ConfigurationError(
                "retriever", expected=f"a direction among {DIRECTIONS} and a snapshot among {SNAPSHOTS}",
                got=f"{self.direction!r} and {self.snapshot!r}", cure="Choose one of them.",
            )  # fmt: skip
        if self.fit_rows < 1 or (self.shortlist is not None and self.shortlist < 1):
            raise ConfigurationError(
                "retriever", expected="fit_rows and shortlist of at least 1",
                got=f"{self.fit_rows} and {self.shortlist}", cure="Correct them.",
            )  # fmt: skip


class CorrectedRetriever:
    """Search stale target vectors through a corrector.

    ========== ======================================================== ================ ==========================
    backend    how                                                      result           for
    ========== ======================================================== ================ ==========================
    exact      scan of corrected rows                                   exact            any corrector
    folded     scan of stale rows by the folded query, inverse norms    exact            affine correctors
    two_stage  shortlist by the nearest affine map, corrected, judged   near, or proved  any corrector
    faiss      shortlist by a faiss index of the stale vectors, judged  near             any corrector, many targets
    ========== ======================================================== ================ ==========================

    What a backend has to compute once per corrector (snapshot, inverse norms, affine map) is computed in the first
    search or by :meth:`prepare`, and again after the corrector has changed, which is noticed.

    Args:
        vectors: The stale vectors: a cache, or :class:`hf_corrector.index.base.TensorVectors`.
        corrector: The corrector; of kind ``"identity"`` where vectors are those of the queries' own encoder.
        side: Side features of the same targets, if the corrector takes any.
        backend: See above.
        options: Everything else.

    Raises:
        ConfigurationError: If sizes or options do not fit together.
        CacheMismatchError: If the corrector was fitted to another cache.
    """

    def __init__(
        self,
        vectors: RowVectors,
        corrector: CorrectorModel,
        *,
        side: SideFeatures | None = None,
        backend: str = "exact",
        options: RetrieverOptions | None = None,
    ) -> None:
        self.vectors, self.corrector, self.side, self.backend = vectors, corrector, side, backend
        self.options = RetrieverOptions() if options is None else options
        self.source = _checked_source(vectors, self.options.fitted)
        self._check_backend()
        self._check_sizes()
        self._strategy: Strategy | None = None
        self._state = _State(corrector)

    @property
    def query_dim(self) -> int:
        """Size of a query vector."""
        config = self.corrector.config
        return config.input_dim if self.options.direction == "queries" else int(config.output_dim or config.input_dim)

    def search(self, queries: torch.Tensor, k: int, *, excluded: Excluded = None) -> CorrectedResult:
        """Find the ``k`` targets of highest inner product with each query after correction.

        Args:
            queries: Query vectors of the encoder that the corrector leads to (with ``direction="queries"`` of the one
                it leads from), ``(queries, dim)``.
            k: How many targets to return; rows beyond the number of targets are -1.
            excluded: For each query target rows that must not be returned.

        Raises:
            ConfigurationError: If ``k`` is below 1.
            DataError: If shapes do not fit, excluded rows do not exist or a vector is not finite.
        """
        check_k(k)
        if queries.ndim != 2 or queries.shape[1] != self.query_dim or not queries.is_floating_point():
            raise DataError(
                "query vectors", expected=f"floating point numbers of shape (queries, {self.query_dim})",
                got=f"{queries.dtype} of shape {tuple(queries.shape)}",
                cure="Encode queries with the encoder that the corrector belongs to.",
            )  # fmt: skip
        if not bool(torch.isfinite(queries).all()):
            raise DataError(
                "query vectors", expected="finite numbers", got="NaN or infinity", cure="Encode them again."
            )
        return self.prepare().search(queries.detach().double().to(self.options.device), k, excluded)

    def prepare(self) -> Strategy:
        """Compute what the backend needs once per corrector, unless it is there, and return the strategy."""
        state = _State(self.corrector)
        if self._strategy is None or state.facts != self._state.facts:
            self._strategy, self._state = self._make(), state
        return self._strategy

    def invalidate(self) -> None:
        """Forget all that was computed; call it when the stale vectors have changed."""
        self._strategy = None

    def _make(self) -> Strategy:
        options = self.options
        if options.direction == "queries":
            index = self._faiss() if self.backend == "faiss" else None
            return QueriesBackward(self.vectors, self.corrector, index, device=options.device)
        rows = self._corrected_rows()
        view = AffineView.of(self.corrector)
        match self.backend:
            case "exact":
                return ExactStrategy(rows, snapshot=options.snapshot, device=options.device)
            case "folded" if view is not None:
                return FoldedStrategy(rows, view, device=options.device)
            case "folded":
                raise ConfigurationError(
                    "folded search", expected="a corrector that is an affine map and takes no side features",
                    got=f"kind {self.corrector.config.kind!r}", cure="Use backend 'two_stage'.",
                )  # fmt: skip
            case "two_stage":
                if view is None:
                    view = self._fit(rows, normalize=self.corrector.config.normalize_output)
                return TwoStageStrategy(
                    rows, view, shortlist=options.shortlist, certify=options.certify, device=options.device
                )
            case _:
                # faiss cannot multiply a row's score by its inverse norm, so the map is fitted to normalised rows.
                if view is None or view.normalize:
                    view = self._fit(rows, normalize=False)
                return FaissStrategy(
                    rows, view, self._faiss(), shortlist=options.shortlist, parameters=options.parameters
                )

    def _corrected_rows(self) -> CorrectedTargets:
        device = self.corrector.fitted_pairs.device
        return CorrectedTargets(self.vectors, self.corrector, side=self.side, device=device, snapshot_bytes=0)

    def _fit(self, rows: CorrectedTargets, *, normalize: bool) -> AffineView:
        return AffineView.fit(rows, normalize=normalize, fit_rows=self.options.fit_rows, seed=self.options.seed)

    def _faiss(self) -> FaissIndex:
        from hf_corrector.index.faiss import FaissIndex  # loads a large library

        if self.options.faiss is not None:
            return self.options.faiss
        return FaissIndex.build(
            self.vectors, str(self.options.factory), parameters=self.options.parameters, source=self.source,
            seed=self.options.seed,
        )  # fmt: skip

    def _check_backend(self) -> None:
        options = self.options
        usable = BACKENDS if options.direction == "targets" else ("exact", "faiss")
        one_index = (options.factory is None) != (options.faiss is None)
        if self.backend not in usable or (self.backend == "faiss") != one_index:
            raise ConfigurationError(
                "retriever", expected=f"a backend among {usable}; either factory or faiss for 'faiss', none for others",
                got=f"{self.backend!r}, factory {options.factory!r}, faiss {options.faiss is not None}",
                cure="Correct the arguments.",
            )  # fmt: skip
        if options.certify and self.backend != "two_stage":
            raise ConfigurationError(
                "retriever", expected="certify with backend 'two_stage' only", got=repr(self.backend),
                cure="Leave it out; 'exact' and 'folded' are exact anyway.",
            )  # fmt: skip
        given = options.faiss
        if given is not None and (
            (len(given), given.dim) != (len(self.vectors), self.vectors.dim)
            or (given.description.source and self.source and given.description.source != self.source)
        ):
            raise ConfigurationError(
                "retriever", expected=f"a faiss index of the stale vectors {self.source}",
                got=f"one of {len(given)} vectors of size {given.dim} {given.description.source}",
                cure="Build it again from these vectors.",
            )  # fmt: skip

    def _check_sizes(self) -> None:
        if self.options.direction == "targets":
            self._corrected_rows()
            return
        config = self.corrector.config
        if config.output_dim != self.vectors.dim or config.side is not None:
            raise ConfigurationError(
                "retriever", expected=f"a corrector of queries to size {self.vectors.dim}, without side features",
                got=f"one to size {config.output_dim}{'' if config.side is None else ' and side features'}",
                cure="Fit the corrector with new vectors as input and old ones as output.",
            )  # fmt: skip


class _State:
    """What changes when a corrector does: its tensors, where they are, their versions (raised by writes in place).

    The tensors themselves are held, so that none of their addresses is given to another.
    """

    def __init__(self, corrector: CorrectorModel) -> None:
        self.tensors = [*corrector.parameters(), *corrector.buffers()]
        facts = [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in self.tensors]
        self.facts = (corrector.config.kind, corrector.config.normalize_output, facts)


def _checked_source(vectors: RowVectors, fitted: FittedTargets | None) -> str:
    """Return what tells the stale vectors from others, if anything does, and refuse a corrector of others."""
    checksum = vectors.manifest.checksum if isinstance(vectors, TargetCache) else ""
    if fitted is not None and fitted.cache != checksum:
        raise CacheMismatchError(
            "retriever", expected=f"the cache that the corrector was fitted to, {fitted.cache}",
            got=checksum or "vectors that are no cache", cure="Open the cache the corrector belongs to.",
        )  # fmt: skip
    return checksum
