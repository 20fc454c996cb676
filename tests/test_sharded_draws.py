"""The same draws, bit for bit, however many processes share the targets; here threads that wait for each other."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier
from typing import TypeVar

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency

from hf_corrector.sampling import (
    BLOCK_ROWS,
    DrawKeys,
    ExcludedRows,
    ScoredTargets,
    SoftmaxDraws,
    draw_softmax,
    share_of_blocks,
    top_scores,
)
from hf_corrector.sampling.softmax import KEPT_SCORES_BYTES

PARTS = [2, 3, 5]
Found = TypeVar("Found")


class Meeting:
    """Threads that exchange tensors as processes do: all at once, rows sent as columns."""

    def __init__(self, parts: int) -> None:
        self._barrier, self._passed = Barrier(parts, timeout=60), [torch.zeros(0)] * parts

    def exchange(self, part: int, own: torch.Tensor) -> Sequence[torch.Tensor]:
        self._passed[part] = own.T.contiguous()
        self._barrier.wait()
        everyone = [one.T for one in self._passed]
        self._barrier.wait()
        return everyone


def on_parts(scores: torch.Tensor, parts: int, work: Callable[[ScoredTargets], Found]) -> list[Found]:
    """Let each of several threads work on its part of the targets, ``scores`` being ``(batch, targets)``."""
    meeting, count = Meeting(parts), scores.shape[1]

    def one(part: int) -> Found:
        own = share_of_blocks(count, part, parts)
        first, stop = own[0] * BLOCK_ROWS, min(own[1] * BLOCK_ROWS, count)

        def score_block(start: int, end: int) -> torch.Tensor:
            assert end <= start or first <= start < end <= stop
            return scores[:, start:end]

        return work(ScoredTargets(score_block, count, own, lambda own: meeting.exchange(part, own)))

    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(one, range(parts)))


def scores_of(targets: int, batch: int = 9, *, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(batch, targets, generator=torch.Generator().manual_seed(seed)) * spread


def assert_same(scores: torch.Tensor, k: int, excluded: ExcludedRows, parts: int) -> SoftmaxDraws:
    """Draw from one part and from several; return the draws."""
    keys = DrawKeys(seed=3, step=5, query_ids=np.arange(len(scores)) * 7)

    def draw(targets: ScoredTargets) -> SoftmaxDraws:
        return draw_softmax(targets, k, scale=1.0, excluded=excluded, keys=keys)

    whole = draw(ScoredTargets(lambda start, stop: scores[:, start:stop], scores.shape[1]))
    for part in on_parts(scores, parts, draw):
        assert torch.equal(part.ids, whole.ids)
        assert torch.equal(part.scores, whole.scores)
        assert torch.equal(part.log_normalizer, whole.log_normalizer)
    return whole


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("targets", [1, BLOCK_ROWS, 3 * BLOCK_ROWS + 1, 11 * BLOCK_ROWS])
def test_parts_are_contiguous_nearly_equal_and_together_everything(targets: int, parts: int) -> None:
    shares = [share_of_blocks(targets, part, parts) for part in range(parts)]
    assert shares[0][0] == 0
    assert shares[-1][1] == -(-targets // BLOCK_ROWS)
    assert all(one[1] == other[0] for one, other in pairwise(shares))
    sizes = [stop - start for start, stop in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("k", [1, 4, 12])
def test_draws_of_several_parts_are_those_of_one(parts: int, k: int) -> None:
    scores = scores_of(7 * BLOCK_ROWS + 50)
    likely = scores.topk(3, dim=1).indices.tolist()
    draws = assert_same(scores, k, ExcludedRows(likely), parts)
    assert (draws.ids >= 0).all()
    assert not any(set(ids) & set(known) for ids, known in zip(draws.ids.tolist(), likely, strict=True))


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("targets", [40, BLOCK_ROWS, BLOCK_ROWS + 1])
def test_processes_without_a_block_take_part_all_the_same(parts: int, targets: int) -> None:
    assert_same(scores_of(targets), 6, ExcludedRows([[0, targets - 1]] * 9), parts)


@pytest.mark.parametrize("parts", PARTS)
def test_ceilings_hold_on_every_part(parts: int) -> None:
    scores = scores_of(5 * BLOCK_ROWS)
    ceiling = scores.topk(40, dim=1).values[:, -1]
    draws = assert_same(scores, 5, ExcludedRows([[]] * 9, ceiling), parts)
    assert (draws.scores <= ceiling[:, None]).all()
    assert_same(scores, 5, ExcludedRows([[]] * 9, torch.full((9,), -torch.inf)), parts)


@pytest.mark.parametrize("parts", PARTS)
def test_targets_that_run_out_run_out_on_every_part(parts: int) -> None:
    scores = torch.full((9, 6 * BLOCK_ROWS), -torch.inf)
    alive = [3, BLOCK_ROWS, 5 * BLOCK_ROWS + 9]
    scores[:, alive] = torch.tensor([0.0, -2000.0, -5.0])
    draws = assert_same(scores, 8, ExcludedRows([[]] * 9), parts)
    assert draws.ids[:, :3].sort(dim=1).values.tolist() == [alive] * 9
    assert (draws.ids[:, 3:] == -1).all()


def test_draws_are_the_same_where_one_part_can_keep_its_scores_and_the_whole_cannot() -> None:
    batch = 64
    targets = KEPT_SCORES_BYTES["cpu"] // (4 * batch) + BLOCK_ROWS
    one_query = scores_of(targets, 1)
    scores = one_query.expand(batch, -1)
    draws = assert_same(scores, 2, ExcludedRows([[int(one_query.argmax())]] * batch), 3)
    assert torch.allclose(draws.scores, one_query[0][draws.ids])


@pytest.mark.parametrize("parts", PARTS)
def test_highest_scores_of_several_parts_are_those_of_one(parts: int) -> None:
    scores, excluded = scores_of(4 * BLOCK_ROWS + 7), ExcludedRows([[1, 2]] * 9)
    left = scores.clone()
    left[:, [1, 2]] = -torch.inf
    for found in on_parts(scores, parts, lambda targets: top_scores(targets, 6, excluded=excluded)):
        assert torch.equal(found, left.topk(6, dim=1).values)


def test_highest_scores_that_do_not_exist_are_minus_infinity() -> None:
    scores = scores_of(4)
    for found in on_parts(scores, 3, lambda targets: top_scores(targets, 6, excluded=ExcludedRows([[0]] * 9))):
        assert torch.equal(found[:, :3], scores[:, 1:].sort(dim=1, descending=True).values)
        assert (found[:, 3:] == -torch.inf).all()


def test_several_draws_across_parts_agree_with_gumbel_top_k() -> None:
    """Compare how often each ordered pair is drawn with the definition, likely targets being in several blocks."""
    likely = [2, BLOCK_ROWS + 1, BLOCK_ROWS + 2, 3 * BLOCK_ROWS, 3 * BLOCK_ROWS + 50]
    logits = torch.tensor([1.0, 0.3, -0.4, 0.8, 0.0])
    scores = torch.full((1, 3 * BLOCK_ROWS + 60), -60.0)
    scores[0, likely] = logits
    batch, drawn = 700, []
    for step in range(6):
        keys = DrawKeys(seed=1, step=step, query_ids=np.arange(batch))
        drawn.append(
            on_parts(
                scores.expand(batch, -1), 2,
                lambda targets, keys=keys: draw_softmax(
                    targets, 2, scale=1.0, excluded=ExcludedRows([[]] * batch), keys=keys
                ),
            )[0].ids
        )  # fmt: skip
    places = torch.full((scores.shape[1],), -1)
    places[likely] = torch.arange(5)
    found = places[torch.cat(drawn)]
    noise = torch.rand(len(found), 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = (logits - torch.log(-torch.log(noise))).topk(2, dim=1).indices
    pairs = [torch.bincount(one[:, 0] * 5 + one[:, 1], minlength=25) for one in (found, expected)]
    table = torch.stack(pairs)[:, ~torch.eye(5, dtype=torch.bool).flatten()]
    assert chi2_contingency(table.numpy()).pvalue > 1e-3
