import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from hf_corrector.candidate_sampling import ContrastSet, GivenTargets, SamplingPlan, contrast_set, sample_candidates
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import ConfigurationError
from hf_corrector.index.base import TensorVectors
from hf_corrector.losses import truncated_softmax_loss
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.sampling import Candidates, DrawKeys, ExcludedRows, ScoredTargets, draw_softmax
from hf_corrector.scans import BlockScan, ScanPlan

TARGETS, DIM = 60, 8
MODES = ("softmax", "top_k", "uniform")


def targets(count: int = TARGETS) -> CorrectedTargets:
    vectors = torch.randn(count, DIM, generator=torch.Generator().manual_seed(0))
    return CorrectedTargets(TensorVectors(normalize(vectors, dim=1)))


def queries(count: int) -> torch.Tensor:
    return normalize(torch.randn(count, DIM, generator=torch.Generator().manual_seed(1)), dim=1)


def plan_of(negatives: str = "softmax", k: int = 4, fraction: float = 0.25, scale: float = 5.0) -> SamplingPlan:
    return SamplingPlan(negatives=negatives, num_negatives=k, uniform_fraction=fraction, scale=scale, seed=3)


def keys_of(count: int, step: int = 0) -> DrawKeys:
    return DrawKeys(seed=3, step=step, query_ids=np.arange(count))


def drawn_from(
    seen: CorrectedTargets, asked: torch.Tensor, plan: SamplingPlan, *, excluded: ExcludedRows, keys: DrawKeys
) -> Candidates:
    """Sample from the plain scan of all targets; without a filter the positives do not matter."""
    positives = torch.zeros(len(asked), dtype=torch.int64)
    scan = BlockScan(seen, ScanPlan())
    return sample_candidates(scan, asked, plan, positives=positives, excluded=excluded, keys=keys).candidates


def sample(
    plan: SamplingPlan, batch: int = 40, banned: list[list[int]] | None = None, count: int = TARGETS
) -> Candidates:
    excluded = ExcludedRows([[]] * batch if banned is None else banned)
    return drawn_from(targets(count), queries(batch), plan, excluded=excluded, keys=keys_of(batch))


# ---------------------------------------------------------------------- sampling


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("negatives", MODES)
def test_negatives_are_distinct_and_never_known_positives(negatives: str, fraction: float) -> None:
    best = (queries(40) @ targets().read(0, TARGETS).T).topk(2, dim=1).indices.tolist()
    found = sample(plan_of(negatives, k=20, fraction=fraction), banned=best)
    assert found.ids.shape == found.scores.shape == found.log_proposal.shape == (40, 20)
    assert found.mask.all()
    for ids, banned in zip(found.ids.tolist(), best, strict=True):
        assert len(set(ids)) == 20
        assert not set(ids) & set(banned)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("negatives", MODES)
def test_where_targets_run_out_places_are_masked(negatives: str, fraction: float) -> None:
    found = sample(
        plan_of(negatives, k=8, fraction=fraction), batch=12, banned=[[0, 2], [], [0, 1, 2, 3, 4]] * 4, count=5
    )
    assert torch.equal(found.mask, found.ids >= 0)
    for ids, free in zip(found.ids.tolist(), [{1, 3, 4}, {0, 1, 2, 3, 4}, set()] * 4, strict=True):
        drawn = [one for one in ids if one >= 0]
        assert len(set(drawn)) == len(drawn)
        assert set(drawn) <= free
        assert len(drawn) >= min(len(free), round(8 * fraction))
    assert torch.isfinite(found.log_proposal[found.mask]).all()


@pytest.mark.parametrize("negatives", MODES)
def test_scores_are_the_inner_products_with_the_targets(negatives: str) -> None:
    found = sample(plan_of(negatives))
    expected = torch.einsum("bd,bkd->bk", queries(40), targets().read(0, TARGETS)[found.ids])
    assert torch.allclose(found.scores, expected, atol=1e-6)


def test_top_k_takes_the_highest_scores() -> None:
    scores = queries(40) @ targets().read(0, TARGETS).T
    found = sample(plan_of("top_k", fraction=0.0))
    assert torch.equal(found.ids, scores.topk(4, dim=1).indices)
    assert not found.uniform.any()


def test_softmax_takes_what_is_drawn_from_the_softmax() -> None:
    found = sample(plan_of("softmax", fraction=0.0))
    scores = queries(40) @ targets().read(0, TARGETS).T
    draws = draw_softmax(
        ScoredTargets(lambda start, stop: scores[:, start:stop], TARGETS), 4, scale=5.0,
        excluded=ExcludedRows([[]] * 40), keys=keys_of(40),
    )  # fmt: skip
    assert torch.equal(found.ids, draws.ids)
    assert not found.uniform.any()


@pytest.mark.parametrize("negatives", ["softmax", "top_k"])
def test_uniform_share_is_drawn_uniformly_and_marked(negatives: str) -> None:
    found = sample(plan_of(negatives, k=3, fraction=0.5), batch=20_000)
    assert found.uniform.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert set(found.uniform.sum(dim=1).tolist()) == {1, 2}
    plain = sample(plan_of(negatives, k=3, fraction=0.0), batch=20_000)
    hard = found.ids[~found.uniform]
    assert torch.equal(hard, plain.ids[(torch.arange(3) < (~found.uniform).sum(dim=1)[:, None])])


@pytest.mark.parametrize("plan", [plan_of("uniform"), plan_of("softmax", fraction=1.0), plan_of("top_k", fraction=1.0)])
def test_all_uniform_negatives_are_the_same_whichever_way_they_are_asked_for(plan: SamplingPlan) -> None:
    assert torch.equal(sample(plan).ids, sample(plan_of("uniform", fraction=0.0)).ids)
    assert sample(plan).uniform.all()


@pytest.mark.parametrize("negatives", MODES)
def test_negatives_depend_on_step_and_query_but_not_on_the_company(negatives: str) -> None:
    plan, batch = plan_of(negatives, fraction=0.5), queries(40)
    known = [[query] for query in range(40)]
    everyone = drawn_from(targets(), batch, plan, excluded=ExcludedRows(known), keys=keys_of(40))
    some = [31, 4]
    alone = drawn_from(
        targets(), batch[some], plan, excluded=ExcludedRows([known[one] for one in some]),
        keys=DrawKeys(3, 0, np.array(some)),
    )  # fmt: skip
    assert torch.equal(alone.ids, everyone.ids[some])
    later = drawn_from(targets(), batch, plan, excluded=ExcludedRows(known), keys=keys_of(40, step=1))
    assert not torch.equal(later.ids, everyone.ids)


@pytest.mark.parametrize("negatives", MODES)
def test_identity_corrector_gives_the_candidates_of_no_corrector(negatives: str) -> None:
    stale = targets().stale
    corrected = CorrectedTargets(stale, CorrectorModel(CorrectorConfig(kind="identity", input_dim=DIM)))
    excluded = ExcludedRows([[]] * 40)
    found = drawn_from(corrected, queries(40), plan_of(negatives), excluded=excluded, keys=keys_of(40))
    expected = sample(plan_of(negatives))
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.log_proposal, expected.log_proposal)


def test_sampling_sends_no_gradient_into_the_queries() -> None:
    batch = queries(4).requires_grad_(True)
    excluded = ExcludedRows([[]] * 4)
    assert not drawn_from(targets(), batch, plan_of(), excluded=excluded, keys=keys_of(4)).scores.requires_grad


@pytest.mark.parametrize(
    ("negatives", "k", "fraction"), [("random", 1, 0.0), ("softmax", 0, 0.0), ("softmax", 1, -0.1), ("softmax", 1, 1.1)]
)
def test_plans_out_of_range_are_refused(negatives: str, k: int, fraction: float) -> None:
    with pytest.raises(ConfigurationError, match="sampling plan"):
        plan_of(negatives, k, fraction)


# ---------------------------------------------------------------------- expected draws


def counted_draws(plan: SamplingPlan, banned: list[int], batch: int = 60_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw very often for one query; return how often each target was drawn per query and what was foretold."""
    one_query = queries(1).expand(batch, -1)
    found = drawn_from(targets(), one_query, plan, excluded=ExcludedRows([banned] * batch), keys=keys_of(batch))
    drawn = torch.bincount(found.ids.flatten(), minlength=TARGETS) / batch
    foretold = torch.zeros(TARGETS)
    foretold[found.ids.flatten()] = found.log_proposal.flatten().exp()
    return drawn, foretold


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_log_proposal_of_a_single_draw_is_its_probability(fraction: float) -> None:
    drawn, foretold = counted_draws(plan_of(k=1, fraction=fraction), banned=[3, 8])
    assert foretold.sum().item() == pytest.approx(1.0, abs=1e-4)
    spread = (foretold * (1 - foretold) / 60_000).sqrt()
    assert ((drawn - foretold).abs() <= 4.5 * spread + 1e-6).all()


@pytest.mark.parametrize(("negatives", "scale"), [("softmax", 1.0), ("uniform", 1.0), ("softmax", 0.0001)])
def test_log_proposal_of_several_draws_is_how_often_each_target_is_drawn_if_none_prevails(
    negatives: str, scale: float
) -> None:
    drawn, foretold = counted_draws(plan_of(negatives, k=4, fraction=0.25, scale=scale), banned=[3, 8])
    seen = foretold > 0
    assert seen.sum() == TARGETS - 2
    assert torch.allclose(drawn[seen], foretold[seen], rtol=0.1)


def test_loss_with_sampling_correction_estimates_the_full_softmax() -> None:
    batch, positive = 20_000, 5
    one_query, all_scores = queries(1), (queries(1) @ targets().read(0, TARGETS).T)[0]
    excluded = ExcludedRows([[positive]] * batch)
    plan = plan_of(k=4, fraction=0.25, scale=2.0)
    found = drawn_from(targets(), one_query.expand(batch, -1), plan, excluded=excluded, keys=keys_of(batch))
    others = torch.arange(TARGETS) != positive
    estimate = torch.exp(2.0 * found.scores - found.log_proposal).sum(dim=1)
    assert estimate.mean().item() == pytest.approx(torch.exp(2.0 * all_scores[others]).sum().item(), rel=0.03)


# ---------------------------------------------------------------------- contrast sets


def candidates_of(ids: list[list[int]], uniform: list[list[bool]] | None = None) -> Candidates:
    rows = torch.tensor(ids)
    return Candidates(
        ids=rows, scores=torch.zeros(rows.shape), log_proposal=rows.float() / 10, mask=rows >= 0,
        uniform=torch.zeros(rows.shape, dtype=torch.bool) if uniform is None else torch.tensor(uniform),
    )  # fmt: skip


def contrast(
    candidates: Candidates | None, positives: list[int], known: list[list[int]], *, shared: bool
) -> ContrastSet:
    given = GivenTargets(torch.tensor(positives), ExcludedRows(known))
    return contrast_set(candidates, given, share_negatives=shared)


def columns(found: ContrastSet, query: int) -> list[int]:
    """Return the columns a query is contrasted with."""
    return found.allowed[query].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("shared", [True, False])
def test_columns_are_the_positives_and_then_each_sampled_target_once(shared: bool) -> None:
    found = contrast(candidates_of([[9, 4], [4, 7], [1, 9]]), [1, 2, 3], [[1], [2], [3]], shared=shared)
    assert found.rows.tolist() == [1, 2, 3, 4, 7, 9]


def test_shared_negatives_contrast_each_query_with_every_column() -> None:
    found = contrast(candidates_of([[9, 4], [4, 7]]), [1, 2], [[1], [2]], shared=True)
    assert found.allowed.all()


def test_own_negatives_contrast_each_query_with_what_was_drawn_for_it() -> None:
    found = contrast(candidates_of([[9, 4], [4, 2], [1, 9]]), [1, 2, 3], [[1], [2], [3]], shared=False)
    assert found.rows.tolist() == [1, 2, 3, 4, 9]
    assert [columns(found, query) for query in range(3)] == [[0, 3, 4], [1, 3], [0, 2, 4]]


@pytest.mark.parametrize("shared", [True, False])
def test_other_known_positives_are_never_contrasted(shared: bool) -> None:
    found = contrast(candidates_of([[9, 4], [4, 7]]), [1, 2], [[1, 2, 9], [2, 4]], shared=shared)
    assert found.rows.tolist() == [1, 2, 4, 7, 9]
    assert columns(found, 0) == ([0, 2, 3] if shared else [0, 2])
    assert columns(found, 1) == ([0, 1, 3, 4] if shared else [1, 3])


def test_of_equal_positives_in_a_batch_only_the_first_counts_for_others() -> None:
    found = contrast(None, [5, 6, 5, 7], [[5], [6], [5], [7]], shared=True)
    assert found.rows.tolist() == [5, 6, 5, 7]
    assert [columns(found, query) for query in range(4)] == [[0, 1, 3], [0, 1, 3], [1, 2, 3], [0, 1, 3]]


def test_own_positive_is_contrasted_even_where_it_is_not_the_first_of_its_kind() -> None:
    found = contrast(candidates_of([[5], [9]]), [5, 5], [[5], [5]], shared=False)
    assert [columns(found, query) for query in range(2)] == [[0], [1, 2]]


def test_target_drawn_for_a_query_that_is_the_positive_of_two_others_counts_once() -> None:
    found = contrast(candidates_of([[5], [5], [8]]), [8, 5, 5], [[8], [5], [5]], shared=False)
    assert found.rows.tolist() == [8, 5, 5]
    assert [columns(found, query) for query in range(3)] == [[0, 1], [1], [0, 2]]


@pytest.mark.parametrize("shared", [True, False])
def test_masked_places_make_no_column(shared: bool) -> None:
    found = contrast(candidates_of([[4, -1], [-1, -1]]), [1, 2], [[1], [2]], shared=shared)
    assert found.rows.tolist() == [1, 2, 4]
    assert columns(found, 1) == ([0, 1, 2] if shared else [1])


def test_log_proposal_stands_in_the_columns_drawn() -> None:
    found = contrast(candidates_of([[9, 4], [4, 1]]), [1, 2], [[1], [2]], shared=False)
    assert found.rows.tolist() == [1, 2, 4, 9]
    assert torch.allclose(found.log_proposal, torch.tensor([[0.0, 0.0, 0.4, 0.9], [0.1, 0.0, 0.4, 0.0]]))


def test_columns_some_query_drew_uniformly_are_marked() -> None:
    found = contrast(candidates_of([[9, 4], [4, 1]], [[True, False], [False, True]]), [1, 2], [[1], [2]], shared=True)
    assert found.rows[found.uniform].tolist() == [1, 9]


def test_what_the_data_name_is_there_for_sure() -> None:
    given = GivenTargets(torch.tensor([1, 2]), ExcludedRows([[1, 6], [2]]), grades=[{1: 1.0, 6: 1.0}, {2: 1.0}],
                         negatives=[[4], []])  # fmt: skip
    found = contrast_set(candidates_of([[9, 4], [4, 7]]), given, share_negatives=False)
    assert found.rows.tolist() == [1, 2, 4, 6, 7, 9]
    assert found.rows[found.certain].tolist() == [1, 2, 4, 6]
    # Target 4 counts for the first query whether or not it is drawn, for the second only if it is.
    assert torch.allclose(found.log_proposal, torch.tensor([[0, 0, 0, 0, 0, 0.9], [0, 0, 0.4, 0, 0.7, 0]]))


def test_without_candidates_only_the_batch_itself_is_encoded() -> None:
    found = contrast(None, [1, 2, 3], [[1, 3], [2], [3]], shared=True)
    assert found.rows.tolist() == [1, 2, 3]
    assert [columns(found, query) for query in range(3)] == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert not found.log_proposal.any()
    assert not found.uniform.any()


@pytest.mark.parametrize("shared", [True, False])
def test_contrast_with_all_targets_is_the_full_softmax(shared: bool) -> None:
    positives = torch.tensor([3, 17, 40])
    excluded = ExcludedRows([[3], [17], [40]])
    found = drawn_from(targets(), queries(3), plan_of("uniform", k=TARGETS - 1), excluded=excluded, keys=keys_of(3))
    whole = contrast_set(found, GivenTargets(positives, excluded), share_negatives=shared)
    assert sorted(whole.rows.tolist()) == list(range(TARGETS))
    assert whole.allowed.all()
    vectors = targets().read(0, TARGETS)
    losses = truncated_softmax_loss(queries(3) @ vectors[whole.rows].T, torch.arange(3), whole.allowed, scale=20.0)
    full = cross_entropy(20.0 * queries(3) @ vectors.T, positives, reduction="none")
    assert torch.allclose(losses, full, atol=1e-5)
