"""Searching stale vectors through a corrector: every backend against correcting every row and exact search of that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from hf_corrector.affine_view import AffineView, least_squares
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_retriever import CorrectedRetriever, RetrieverOptions
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.index.base import SearchResult, TensorVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.index.faiss import FaissIndex, FaissParameters
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.records import EncoderFingerprint, FittedTargets
from hf_corrector.search_strategies import TwoStageStrategy
from hf_corrector.side_features import DenseSide

ROWS, DIM = 9000, 24


def vectors(rows: int, dim: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


STALE = TensorVectors(vectors(ROWS, DIM, 0))


def corrector_of(
    kind: str, *, normalize_output: bool = True, dim_out: int = DIM, strength: float = 0.3
) -> CorrectorModel:
    """Make a corrector that moves vectors far."""
    config = CorrectorConfig(kind=kind, input_dim=DIM, output_dim=dim_out, normalize_output=normalize_output)
    corrector, generator = CorrectorModel(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in corrector.state_dict().items():
            if name not in ("fitted_pairs", "skip", "landmark_width") and tensor.is_floating_point():
                tensor.add_(strength * torch.randn(tensor.shape, generator=generator))
    return corrector


def by_correcting_all(corrector: CorrectorModel, queries: torch.Tensor, k: int, **more: object) -> SearchResult:
    return ExactIndex(TensorVectors(corrector.correct(STALE.tensor))).search(queries, k, **more)


def assert_same(found: SearchResult, expected: SearchResult) -> None:
    """Rows equal; scores to the rounding of a corrector whose sums depend on how many rows it is given."""
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=1e-6)
    assert float((found.rows == expected.rows).float().mean()) > 0.999


def recall(found: SearchResult, expected: SearchResult) -> float:
    return float((found.rows[:, :, None] == expected.rows[:, None, :]).any(dim=1).float().mean())


@pytest.mark.parametrize("snapshot", ["float32", "bfloat16", "none"])
@pytest.mark.parametrize("kind", ["identity", "mean_shift", "low_rank", "affine", "residual_mlp"])
@pytest.mark.parametrize("queries", [3, 40])
def test_exact_is_correcting_every_row(kind: str, snapshot: str, queries: int) -> None:
    corrector, asked = corrector_of(kind), vectors(queries, DIM, 2)
    found = CorrectedRetriever(STALE, corrector, options=RetrieverOptions(snapshot=snapshot)).search(asked, 10)
    assert_same(found, by_correcting_all(corrector, asked, 10))
    assert found.exact.tolist() == [True] * queries


@pytest.mark.parametrize("normalize_output", [True, False])
@pytest.mark.parametrize(
    ("kind", "dim_out"),
    [("identity", DIM), ("mean_shift", DIM), ("procrustes", DIM), ("low_rank", DIM), ("affine", DIM), ("affine", 9)],
)
@pytest.mark.parametrize("queries", [3, 300])
def test_folded_with_inverse_norms_is_correcting_every_row(
    kind: str, dim_out: int, normalize_output: bool, queries: int
) -> None:
    corrector = corrector_of(kind, normalize_output=normalize_output, dim_out=dim_out)
    asked = vectors(queries, dim_out, 2)
    for stale in (STALE, TensorVectors(STALE.tensor.bfloat16())):
        found = CorrectedRetriever(stale, corrector, backend="folded").search(asked, 10)
        everything = TensorVectors(corrector.correct(stale.tensor.float()))
        assert_same(found, ExactIndex(everything).search(asked, 10))
        assert bool(found.exact.all())


def test_without_inverse_norms_the_folded_order_is_another() -> None:
    """Say why they are kept: the same scan without them misses targets."""
    corrector, asked = corrector_of("affine"), vectors(40, DIM, 2)
    view = AffineView.of(corrector)
    assert view is not None and view.exact and view.normalize
    folded, offsets = view.fold(asked)
    plain = ExactIndex(STALE).search(folded, 10)
    assert recall(plain, by_correcting_all(corrector, asked, 10)) < 0.95
    inverse = view.inverse_norms(STALE)
    scores = (folded @ STALE.tensor.double().T + offsets[:, None]) * inverse.double()
    expected = asked.double() @ corrector.correct(STALE.tensor).double().T
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "dim_out"), [("residual_mlp", DIM), ("residual_mlp", 12), ("affine", DIM)])
def test_two_stages_find_nearly_all(kind: str, dim_out: int) -> None:
    corrector, asked = corrector_of(kind, dim_out=dim_out, strength=0.15), vectors(60, dim_out, 2)
    for shortlist, least in ((None, 0.99), (80, 0.99)):
        options = RetrieverOptions(shortlist=shortlist)
        found = CorrectedRetriever(STALE, corrector, backend="two_stage", options=options).search(asked, 10)
        assert recall(found, by_correcting_all(corrector, asked, 10)) >= least
        assert not bool(found.exact.any())


class CountedTargets(CorrectedTargets):
    """Counts the rows that are corrected one by one."""

    judged = 0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.judged += len(rows)
        return super().gather(rows)


def test_more_candidates_are_judged_only_where_the_map_is_off() -> None:
    judged, asked = [], vectors(60, DIM, 2)
    for strength in (0.0, 0.2, 0.3):
        corrector = corrector_of("residual_mlp", strength=strength)
        rows = CountedTargets(STALE, corrector)
        view = AffineView.fit(rows, normalize=True)
        expected, recalls = by_correcting_all(corrector, asked, 10), []
        for shortlist in (40, None):
            rows.judged = 0
            strategy = TwoStageStrategy(rows, view, shortlist=shortlist, certify=False, device="cpu")
            recalls.append(recall(strategy.search(asked.double(), 10, None), expected))
        assert recalls[1] >= recalls[0]
        if strength == 0.2:
            assert recalls[0] < 0.985 < recalls[1] - 0.003
        judged.append(rows.judged / len(asked))
    assert 40 <= judged[0] < 41 < judged[1] < judged[2] <= 320


@pytest.mark.parametrize("backend", ["exact", "two_stage"])
def test_side_features_are_read_for_the_rows_they_belong_to(backend: str) -> None:
    config = CorrectorConfig(kind="affine", input_dim=DIM, side="matrix", side_dim=3)
    corrector, generator = CorrectorModel(config), torch.Generator().manual_seed(4)
    corrector.side_weight.copy_(0.2 * torch.randn(3, DIM, generator=generator))
    side, asked = DenseSide(torch.randn(ROWS, 3, generator=generator)), vectors(30, DIM, 2)
    options = RetrieverOptions(certify=backend == "two_stage")
    found = CorrectedRetriever(STALE, corrector, side=side, backend=backend, options=options).search(asked, 10)
    everything = TensorVectors(corrector.correct(STALE.tensor, side.matrix))
    assert_same(found, ExactIndex(everything).search(asked, 10))
    with pytest.raises(ConfigurationError, match="affine map"):
        CorrectedRetriever(STALE, corrector, side=side, backend="folded").search(asked, 10)


def test_a_shortlist_of_everything_is_exact() -> None:
    corrector, asked = corrector_of("residual_mlp"), vectors(5, DIM, 2)
    found = CorrectedRetriever(STALE, corrector, backend="two_stage", options=RetrieverOptions(shortlist=ROWS))
    assert_same(found.search(asked, 10), by_correcting_all(corrector, asked, 10))
    assert bool(found.search(asked, 10).exact.all())


@pytest.mark.parametrize("strength", [0.05, 0.15, 0.6])
@pytest.mark.parametrize("queries", [4, 50])
def test_certificate_grows_the_shortlist_until_all_is_proved(strength: float, queries: int) -> None:
    corrector, asked = corrector_of("residual_mlp", strength=strength), vectors(queries, DIM, 2)
    retriever = CorrectedRetriever(STALE, corrector, backend="two_stage", options=RetrieverOptions(certify=True))
    found = retriever.search(asked, 10)
    assert_same(found, by_correcting_all(corrector, asked, 10))
    assert bool(found.exact.all())


@pytest.mark.parametrize("shortlist", [10, 200, 2000])
@pytest.mark.parametrize("kind", ["residual_mlp", "affine"])
def test_no_query_is_certified_wrongly(kind: str, shortlist: int) -> None:
    corrector, asked = corrector_of(kind, strength=0.08), vectors(200, DIM, 2)
    options = RetrieverOptions(certify=True, shortlist=shortlist)
    found = CorrectedRetriever(STALE, corrector, backend="two_stage", options=options).search(asked, 5)
    expected = by_correcting_all(corrector, asked, 5)
    right = (found.rows == expected.rows).all(dim=1)
    assert bool((right | ~found.exact).all())
    if shortlist == 2000:
        assert float(found.exact.float().mean()) > 0.5


@pytest.mark.parametrize("kind", ["residual_mlp", "affine"])
def test_faiss_over_the_stale_vectors_finds_nearly_all(kind: str) -> None:
    corrector, asked = corrector_of(kind, strength=0.1), vectors(60, DIM, 2)
    options = RetrieverOptions(factory="HNSW32", parameters=FaissParameters(ef_search=300), shortlist=200)
    found = CorrectedRetriever(STALE, corrector, backend="faiss", options=options).search(asked, 10)
    assert recall(found, by_correcting_all(corrector, asked, 10)) >= 0.98
    assert not bool(found.exact.any())


@pytest.mark.parametrize("backend", ["exact", "folded", "two_stage", "faiss"])
def test_excluded_rows_and_padding(backend: str) -> None:
    corrector, asked = corrector_of("affine", strength=0.1), vectors(20, DIM, 2)
    few = TensorVectors(STALE.tensor[:30])
    excluded = [np.arange(query + 5) for query in range(20)]
    options = RetrieverOptions(factory="Flat" if backend == "faiss" else None)
    found = CorrectedRetriever(few, corrector, backend=backend, options=options).search(asked, 27, excluded=excluded)
    everything = TensorVectors(corrector.correct(few.tensor))
    assert_same(found, ExactIndex(everything).search(asked, 27, excluded=excluded))
    assert found.rows.shape == (20, 27) and (found.rows[19] >= 0).sum() == 6


@pytest.mark.parametrize("backend", ["exact", "folded", "two_stage"])
def test_a_changed_corrector_is_noticed(backend: str) -> None:
    corrector, asked = corrector_of("affine"), vectors(20, DIM, 2)
    retriever = CorrectedRetriever(STALE, corrector, backend=backend)
    before = retriever.search(asked, 10)
    assert retriever.prepare() is retriever.prepare()
    corrector.weight.mul_(-1.0)
    found = retriever.search(asked, 10)
    assert not torch.equal(found.rows, before.rows)
    assert recall(found, by_correcting_all(corrector, asked, 10)) > 0.99
    corrector.load_state_dict(corrector_of("affine").state_dict())
    assert torch.equal(retriever.search(asked, 10).rows, before.rows)


@pytest.mark.parametrize("backend", ["exact", "faiss"])
def test_queries_are_moved_backward_into_the_old_space(backend: str) -> None:
    config = CorrectorConfig(kind="affine", input_dim=10, output_dim=DIM)
    backward, asked = CorrectorModel(config), vectors(20, 10, 2)
    backward.weight.normal_(generator=torch.Generator().manual_seed(3))
    options = RetrieverOptions(direction="queries", factory="Flat" if backend == "faiss" else None)
    found = CorrectedRetriever(STALE, backward, backend=backend, options=options).search(asked, 10)
    assert_same(found, ExactIndex(STALE).search(backward.correct(asked), 10))
    assert found.exact.tolist() == [backend == "exact"] * 20


def test_identity_over_a_cache_is_searching_the_cache(tmp_path: Path) -> None:
    fingerprint = EncoderFingerprint.of_precomputed("old", normalize=True)
    cache = TargetCache.from_arrays(
        tmp_path / "cache", STALE.tensor[:500], [f"t{row}" for row in range(500)], fingerprint=fingerprint,
        shard_rows=170,
    )  # fmt: skip
    identity, asked = CorrectorModel(CorrectorConfig(input_dim=DIM)), vectors(20, DIM, 2)
    for backend in ("exact", "folded", "two_stage"):
        found = CorrectedRetriever(cache, identity, backend=backend).search(asked, 10)
        expected = ExactIndex(cache).search(asked, 10)
        assert torch.equal(found.rows, expected.rows) and torch.equal(found.scores, expected.scores)


def test_vectors_of_another_cache_are_refused(tmp_path: Path) -> None:
    fingerprint = EncoderFingerprint.of_precomputed("old", normalize=True)
    ids = [f"t{row}" for row in range(100)]
    cache = TargetCache.from_arrays(tmp_path / "cache", STALE.tensor[:100], ids, fingerprint=fingerprint)
    corrector = corrector_of("affine")
    own = RetrieverOptions(fitted=FittedTargets(cache.manifest.checksum, "digest", (1, 2)))
    other = RetrieverOptions(fitted=FittedTargets("0" * 16, "digest", (1, 2)))
    assert CorrectedRetriever(cache, corrector, options=own).source == cache.manifest.checksum
    with pytest.raises(CacheMismatchError, match="fitted to, 0000"):
        CorrectedRetriever(cache, corrector, options=other)
    with pytest.raises(CacheMismatchError, match="no cache"):
        CorrectedRetriever(STALE, corrector, options=own)
    index = FaissIndex.build(cache, "Flat", source="another")
    with pytest.raises(ConfigurationError, match="a faiss index of the stale vectors"):
        CorrectedRetriever(cache, corrector, backend="faiss", options=RetrieverOptions(faiss=index))
    with pytest.raises(ConfigurationError, match="100 vectors"):
        CorrectedRetriever(STALE, corrector, backend="faiss", options=RetrieverOptions(faiss=index))


def test_what_does_not_fit_is_refused() -> None:
    affine, network = corrector_of("affine"), corrector_of("residual_mlp")
    with pytest.raises(ConfigurationError, match="size 5"):
        CorrectedRetriever(TensorVectors(vectors(10, 5, 0)), affine)
    with_side = CorrectorModel(CorrectorConfig(kind="affine", input_dim=DIM, side="matrix", side_dim=2))
    with pytest.raises(ConfigurationError, match="8999 targets"):
        CorrectedRetriever(STALE, with_side, side=DenseSide(torch.ones(ROWS - 1, 2)))
    with pytest.raises(ConfigurationError, match="got none"):
        CorrectedRetriever(STALE, with_side)
    with pytest.raises(ConfigurationError, match="two_stage"):
        CorrectedRetriever(STALE, network, backend="folded").search(vectors(1, DIM, 0), 1)
    with pytest.raises(ConfigurationError, match="a backend among"):
        CorrectedRetriever(STALE, affine, backend="flat")
    with pytest.raises(ConfigurationError, match="either factory or faiss"):
        CorrectedRetriever(STALE, affine, backend="faiss")
    with pytest.raises(ConfigurationError, match="none for others"):
        CorrectedRetriever(STALE, affine, options=RetrieverOptions(factory="Flat"))
    with pytest.raises(ConfigurationError, match="a backend among"):
        CorrectedRetriever(STALE, affine, backend="folded", options=RetrieverOptions(direction="queries"))
    with pytest.raises(ConfigurationError, match="a corrector of queries to size 24"):
        CorrectedRetriever(STALE, corrector_of("affine", dim_out=7), options=RetrieverOptions(direction="queries"))
    with pytest.raises(ConfigurationError, match="certify"):
        CorrectedRetriever(STALE, affine, options=RetrieverOptions(certify=True))
    for wrong in ({"direction": "both"}, {"snapshot": "float16"}, {"shortlist": 0}, {"fit_rows": 0}):
        with pytest.raises(ConfigurationError):
            RetrieverOptions(**wrong)


def test_queries_that_do_not_fit_are_refused() -> None:
    retriever = CorrectedRetriever(STALE, corrector_of("affine", dim_out=7))
    with pytest.raises(DataError, match=r"\(queries, 7\)"):
        retriever.search(vectors(2, DIM, 0), 3)
    with pytest.raises(DataError, match="finite"):
        retriever.search(torch.full((1, 7), float("nan")), 3)
    with pytest.raises(ConfigurationError, match="k >= 1"):
        retriever.search(vectors(2, 7, 0), 0)


def test_corrected_rows_are_corrected_once_each_and_in_order() -> None:
    corrector = corrector_of("residual_mlp")
    rows, expected = CorrectedTargets(STALE, corrector, snapshot_bytes=0), corrector.correct(STALE.tensor)
    wanted = torch.tensor([5, 3, 5, 8999])
    torch.testing.assert_close(rows.gather(wanted), expected[wanted])
    torch.testing.assert_close(rows.read(10, 20), expected[10:20])
    torch.testing.assert_close(rows.snapshot(), expected)
    assert not rows.read(0, 1).requires_grad


def test_least_squares_finds_an_affine_map_that_is_there() -> None:
    inputs = vectors(300, 8, 0).double()
    weight, offset = vectors(5, 8, 1).double(), vectors(1, 5, 2)[0].double()
    found = least_squares(inputs, inputs @ weight.T + offset)
    torch.testing.assert_close(found[0], weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], offset, rtol=1e-4, atol=1e-4)
    assert least_squares(inputs[:0], torch.zeros(0, 5).double())[0].shape == (5, 8)


def test_slack_bounds_what_the_map_misses() -> None:
    rows = CorrectedTargets(STALE, corrector_of("residual_mlp"), snapshot_bytes=0)
    view = AffineView.fit(rows, normalize=True, fit_rows=500)
    inverse = view.inverse_norms(STALE)
    mapped = (STALE.tensor.double() @ view.weight.T + view.offset) * inverse[:, None].double()
    apart = (rows.snapshot().double() - mapped).norm(dim=1)
    slack = view.slack(rows, inverse).double()
    assert bool((slack >= apart).all()) and bool((slack < apart * 1.001 + 1e-3).all())
    assert not view.exact
