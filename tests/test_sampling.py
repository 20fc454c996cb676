from collections.abc import Callable
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from hf_corrector.sampling import (
    BLOCK_ROWS,
    DrawKeys,
    ExcludedRows,
    ScoredTargets,
    SoftmaxDraws,
    draw_softmax,
    draw_uniform,
    uniform_counts,
)
from hf_corrector.sampling.softmax import KEPT_SCORES_BYTES, ScoreBlock

# Seeds are fixed, so a test either always passes or always fails; a right sampler fails one seed in a thousand.
SIGNIFICANT = 1e-3


def keys_of(count: int, *, seed: int = 0, step: int = 0) -> DrawKeys:
    return DrawKeys(seed=seed, step=step, query_ids=np.arange(count))


def nothing_excluded(count: int) -> ExcludedRows:
    return ExcludedRows([[]] * count)


def same_scores(scores: torch.Tensor, batch: int) -> ScoreBlock:
    return lambda start, stop: scores[start:stop].expand(batch, -1)


def draw(scores: torch.Tensor, batch: int, k: int, *, banned: tuple[int, ...] = (), **changes: int) -> SoftmaxDraws:
    """Draw for many queries that score all targets alike."""
    return draw_softmax(
        ScoredTargets(same_scores(scores, batch), len(scores)), k, scale=1.0, excluded=ExcludedRows([banned] * batch),
        keys=keys_of(batch, **changes),
    )  # fmt: skip


def frequencies_fit(draws: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Compare how often each target was drawn with its probability, rare targets taken together."""
    count, probabilities = len(draws), probabilities.double() / probabilities.double().sum()
    observed = torch.bincount(draws, minlength=len(probabilities)).double()
    often = probabilities * count >= 20
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    expected = torch.cat([probabilities[often], probabilities[~often].sum()[None]]) * count
    if expected[-1] < 20:
        assert observed[-1] < 60
        observed, expected = observed[:-1], expected[:-1] * (observed[:-1].sum() / expected[:-1].sum())
    return bool(chisquare(observed.numpy(), expected.numpy()).pvalue > SIGNIFICANT)


def in_succession(probabilities: torch.Tensor, k: int) -> dict[tuple[int, ...], float]:
    """Return the probability of every ordered draw of k without replacement (Plackett-Luce)."""
    found = {}
    for order in permutations(range(len(probabilities)), k):
        chance, left = 1.0, 1.0
        for one in order:
            chance *= float(probabilities[one]) / left
            left -= float(probabilities[one])
        found[order] = chance
    return found


def orders_fit(ids: torch.Tensor, expected: dict[tuple[int, ...], float]) -> bool:
    seen: dict[tuple[int, ...], int] = dict.fromkeys(expected, 0)
    for row in ids.tolist():
        seen[tuple(row)] += 1
    scaled = np.array(list(expected.values())) * len(ids)
    return bool(chisquare(list(seen.values()), scaled).pvalue > SIGNIFICANT)


# ---------------------------------------------------------------------- keyed numbers


def test_numbers_are_uniform_in_the_unit_interval() -> None:
    numbers = keys_of(500).uniforms(200, stream=1)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert chisquare(np.histogram(numbers, bins=50, range=(0, 1))[0]).pvalue > SIGNIFICANT


def test_numbers_of_neighbouring_queries_steps_seeds_and_streams_are_unrelated() -> None:
    base = keys_of(2000).uniforms(4, stream=1)
    others = [
        keys_of(2000, seed=1).uniforms(4, stream=1),
        keys_of(2000, step=1).uniforms(4, stream=1),
        keys_of(2000).uniforms(4, stream=2),
        np.roll(base, 1, axis=0),
        np.roll(base, 1, axis=1),
    ]
    for other in others:
        assert abs(np.corrcoef(base.ravel(), other.ravel())[0, 1]) < 4 / 8000**0.5


def test_each_number_depends_only_on_seed_step_stream_query_and_place() -> None:
    all_queries = keys_of(10, seed=-3, step=7).uniforms(6, stream=1)
    some = DrawKeys(seed=-3, step=7, query_ids=np.array([8, 2])).uniforms(4, stream=1)
    assert np.array_equal(some, all_queries[[8, 2], :4])


# ---------------------------------------------------------------------- softmax draws


def test_single_draws_follow_the_softmax() -> None:
    scores = torch.randn(30, generator=torch.Generator().manual_seed(0)) * 1.5
    draws = draw(scores, 40_000, 1)
    assert frequencies_fit(draws.ids[:, 0], scores.softmax(dim=0))


def test_scale_sharpens_the_distribution_and_scores_come_back_unscaled() -> None:
    scores = torch.linspace(0, 1, 8)
    draws = draw_softmax(
        ScoredTargets(same_scores(scores, 20_000), 8),
        1,
        scale=3.0,
        excluded=nothing_excluded(20_000),
        keys=keys_of(20_000),
    )
    assert frequencies_fit(draws.ids[:, 0], (3 * scores).softmax(dim=0))
    assert torch.allclose(draws.scores, scores[draws.ids], atol=1e-6)
    assert torch.allclose(draws.log_normalizer, torch.logsumexp(3 * scores.double(), dim=0), atol=1e-6)


def test_single_draws_follow_the_softmax_across_blocks() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2 * BLOCK_ROWS + 100, generator=generator)
    scores[[0, BLOCK_ROWS - 1, BLOCK_ROWS, 2 * BLOCK_ROWS - 1, 2 * BLOCK_ROWS, 2 * BLOCK_ROWS + 99]] += 7
    ids = torch.cat([draw(scores, 2500, 1, step=step).ids[:, 0] for step in range(4)])
    assert frequencies_fit(ids, scores.softmax(dim=0))


def test_several_draws_follow_the_softmax_without_replacement() -> None:
    scores = torch.tensor([1.5, 0.0, -1.0, 0.7, 0.7, -0.3])
    assert orders_fit(draw(scores, 60_000, 3).ids, in_succession(scores.double().softmax(dim=0), 3))


def test_several_draws_agree_with_gumbel_top_k() -> None:
    scores = torch.tensor([1.5, 0.0, -1.0, 0.7, 0.7, -0.3, 2.0])
    gumbel = -torch.log(-torch.log(torch.rand(40_000, 7, generator=torch.Generator().manual_seed(2)).clamp(min=1e-30)))
    reference = (scores + gumbel).topk(3, dim=1).indices
    tables = []
    for ids in (draw(scores, 40_000, 3).ids, reference):
        sets = [tuple(row) for row in ids.sort(dim=1).values.tolist()]
        tables.append([sets.count(one) for one in combinations(range(7), 3)])
    assert chi2_contingency(np.array(tables)).pvalue > SIGNIFICANT


def test_several_draws_across_blocks_are_without_replacement() -> None:
    likely = [5, BLOCK_ROWS + 4, BLOCK_ROWS + 5, 2 * BLOCK_ROWS + 8]
    scores = torch.full((2 * BLOCK_ROWS + 100,), -60.0)
    scores[likely] = torch.tensor([1.0, 0.5, 0.0, -0.5])
    ids = torch.cat([draw(scores, 2500, 3, step=step).ids for step in range(4)])
    places = torch.full((len(scores),), -1)
    places[likely] = torch.arange(4)
    assert orders_fit(places[ids], in_succession(scores[likely].double().softmax(dim=0), 3))


@pytest.mark.parametrize("targets", [40, 2 * BLOCK_ROWS + 10])
def test_excluded_targets_have_no_mass(targets: int) -> None:
    scores = torch.randn(targets, generator=torch.Generator().manual_seed(3)) * 3
    banned = (0, 7, targets - 1, int(scores.argmax()))
    batch = 20_000 if targets == 40 else 1500
    draws = draw(scores, batch, 2, banned=banned)
    allowed = scores.clone()
    allowed[list(banned)] = float("-inf")
    assert not np.isin(draws.ids.numpy(), banned).any()
    assert frequencies_fit(draws.ids[:, 0], allowed.softmax(dim=0))
    assert torch.allclose(draws.log_normalizer, torch.logsumexp(allowed.double(), dim=0), atol=1e-9)


def test_scores_too_many_to_keep_give_the_same_draws_as_kept_ones() -> None:
    batch = 64
    targets = KEPT_SCORES_BYTES["cpu"] // (4 * batch) + 1000
    base = torch.randn(targets, generator=torch.Generator().manual_seed(4)) * 3
    banned = base.topk(2).indices.tolist()

    def counted(queries: torch.Tensor, calls: list[int]) -> ScoreBlock:
        def score_block(start: int, stop: int) -> torch.Tensor:
            calls.append(start)
            return base[start:stop] * (1 + queries[:, None] / 100)

        return score_block

    found, calls_made = [], []
    for queries in (torch.arange(batch), torch.tensor([63, 4])):
        calls: list[int] = []
        excluded = ExcludedRows([banned] * len(queries))
        keys = DrawKeys(seed=5, step=9, query_ids=queries.numpy())
        scored = ScoredTargets(counted(queries, calls), targets)
        found.append(draw_softmax(scored, 3, scale=1.0, excluded=excluded, keys=keys))
        calls_made.append(len(calls))
    blocks = -(-targets // BLOCK_ROWS)
    assert calls_made[1] == blocks
    assert calls_made[0] > blocks
    assert torch.equal(found[0].ids[[63, 4]], found[1].ids)
    assert torch.equal(found[0].scores[[63, 4]], found[1].scores)
    assert not np.isin(found[0].ids.numpy(), banned).any()


def test_draws_depend_on_seed_step_and_query_but_not_on_order_or_company() -> None:
    scores = torch.randn(100, 5000, generator=torch.Generator().manual_seed(6))
    rows = [[query, query + 5] for query in range(100)]

    def draws_of(queries: np.ndarray, seed: int = 1, step: int = 2) -> torch.Tensor:
        return draw_softmax(
            ScoredTargets(lambda start, stop: scores[torch.from_numpy(queries), start:stop], 5000), 4, scale=2.0,
            excluded=ExcludedRows([rows[query] for query in queries]), keys=DrawKeys(seed, step, queries),
        ).ids  # fmt: skip

    everyone = draws_of(np.arange(100))
    some = np.array([93, 2, 41])
    assert torch.equal(draws_of(some), everyone[some])
    assert torch.equal(draws_of(some[:1]), everyone[some[:1]])
    assert not torch.equal(draws_of(np.arange(100), seed=2), everyone)
    assert not torch.equal(draws_of(np.arange(100), step=3), everyone)


def test_no_target_is_drawn_twice_for_a_query() -> None:
    scores = torch.zeros(12)
    scores[3] = 30.0
    for row in draw(scores, 2000, 10).ids.tolist():
        assert len(set(row)) == 10
        assert min(row) >= 0


def test_queries_that_run_out_of_targets_get_masked_places() -> None:
    excluded = ExcludedRows([[0, 1], [], [0, 1, 2, 3, 4]])
    draws = draw_softmax(
        ScoredTargets(same_scores(torch.zeros(5), 3), 5), 6, scale=1.0, excluded=excluded, keys=keys_of(3)
    )
    assert sorted(draws.ids[0, :3].tolist()) == [2, 3, 4]
    assert sorted(draws.ids[1, :5].tolist()) == [0, 1, 2, 3, 4]
    assert draws.ids[0, 3:].tolist() == [-1, -1, -1]
    assert draws.ids[1, 5:].tolist() == [-1]
    assert draws.ids[2].tolist() == [-1] * 6
    assert torch.equal(torch.isinf(draws.scores), draws.ids < 0)


@pytest.mark.parametrize("gap", [40.0, 5000.0])
def test_targets_run_out_only_when_all_are_drawn_however_unlikely_the_last_are(gap: float) -> None:
    scores = torch.zeros(BLOCK_ROWS + 3)
    scores[:] = float("-inf")
    order = [BLOCK_ROWS + 1, 7, BLOCK_ROWS + 2, 9]
    scores[order] = -gap * torch.arange(4)
    assert draw(scores, 50, 5).ids.tolist() == [[*order, -1]] * 50


def test_half_precision_scores_are_drawn_from_in_full_precision() -> None:
    scores = torch.linspace(-2, 2, 20).bfloat16()
    draws = draw(scores, 20_000, 1)
    assert draws.scores.dtype == torch.float32
    assert draws.log_normalizer.dtype == torch.float64
    assert frequencies_fit(draws.ids[:, 0], scores.float().softmax(dim=0))


def test_excluded_rows_beyond_the_targets_are_ignored() -> None:
    assert draw(torch.zeros(4), 5, 4, banned=(1, 900)).ids.sort(dim=1).values.tolist() == [[-1, 0, 2, 3]] * 5


# ---------------------------------------------------------------------- uniform draws


def uniform(targets: int, k: int, batch: int, **changes: int) -> np.ndarray:
    return draw_uniform(targets, k, excluded=nothing_excluded(batch), keys=keys_of(batch, **changes))


@pytest.mark.parametrize(("targets", "k"), [(50, 1), (50, 4), (10, 8), (7, 7)])
def test_uniform_draws_are_uniform_in_every_place(targets: int, k: int) -> None:
    ids = uniform(targets, k, 20_000)
    for place in {0, k - 1}:
        assert chisquare(np.bincount(ids[:, place], minlength=targets)).pvalue > SIGNIFICANT


def test_uniform_pairs_are_uniform_over_all_ordered_pairs() -> None:
    ids = uniform(6, 2, 30_000)
    counts = np.bincount(ids[:, 0] * 6 + ids[:, 1], minlength=36).reshape(6, 6)
    assert counts.trace() == 0
    assert chisquare(counts[~np.eye(6, dtype=bool)]).pvalue > SIGNIFICANT


@pytest.mark.parametrize(("targets", "k"), [(1_000_000, 5), (30, 12), (12, 10)])
def test_uniform_draws_are_distinct_and_never_excluded(targets: int, k: int) -> None:
    banned = [0, 3, 3, targets - 1][: targets - k + 1]
    ids = draw_uniform(targets, k, excluded=ExcludedRows([banned] * 500), keys=keys_of(500))
    for row in ids.tolist():
        drawn = [one for one in row if one >= 0]
        assert len(set(drawn)) == len(drawn) == min(k, targets - len(set(banned)))
        assert not set(drawn) & set(banned)
        assert max(drawn) < targets


def test_uniform_draws_that_run_out_end_in_minus_one() -> None:
    excluded = ExcludedRows([[0, 2], [0, 1, 2, 3]])
    ids = draw_uniform(4, 3, excluded=excluded, keys=keys_of(2))
    assert sorted(ids[0].tolist()) == [-1, 1, 3]
    assert ids[0, 2] == -1
    assert ids[1].tolist() == [-1, -1, -1]


def test_uniform_draws_depend_only_on_their_key() -> None:
    everyone = uniform(20, 15, 40, seed=3, step=4)
    some = np.array([30, 7])
    alone = draw_uniform(20, 15, excluded=nothing_excluded(2), keys=DrawKeys(3, 4, some))
    assert np.array_equal(alone, everyone[some])
    assert not np.array_equal(uniform(20, 15, 40, seed=3, step=5), everyone)


# ---------------------------------------------------------------------- how many of them


@pytest.mark.parametrize(("k", "fraction"), [(1, 0.25), (7, 0.3), (32, 0.1)])
def test_uniform_share_is_exact_on_average(k: int, fraction: float) -> None:
    counts = uniform_counts(k, fraction, keys_of(40_000))
    low = int(np.floor(k * fraction))
    assert set(counts.tolist()) == {low, low + 1}
    chance = k * fraction - low
    assert abs(counts.mean() - k * fraction) < 4 * (chance * (1 - chance) / 40_000) ** 0.5


@pytest.mark.parametrize(("k", "fraction", "count"), [(4, 0.0, 0), (4, 0.5, 2), (4, 1.0, 4)])
def test_whole_uniform_shares_are_not_random(k: int, fraction: float, count: int) -> None:
    assert uniform_counts(k, fraction, keys_of(1000)).tolist() == [count] * 1000


@pytest.mark.parametrize(
    "numbers",
    [
        lambda keys: uniform_counts(1, 0.25, keys),
        lambda keys: draw_uniform(9, 2, excluded=nothing_excluded(3), keys=keys),
    ],
)
def test_drawing_leaves_global_generators_alone(numbers: Callable[[DrawKeys], np.ndarray]) -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    numbers(keys_of(3))
    draw(torch.zeros(9), 3, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
