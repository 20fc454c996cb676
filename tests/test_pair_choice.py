"""Choosing fitting pairs: what is held out stays out, and each method chooses what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.pair_choice import METHODS, Limits, choose_pairs, traffic_of_searches


class Rows:
    """Vectors in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def gather(self, rows: torch.Tensor | np.ndarray) -> torch.Tensor:
        return self.tensor[torch.as_tensor(rows)]


def noise(rows: int, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def traffic_for(method: str, rows: int) -> np.ndarray | None:
    return np.arange(rows, dtype=np.float64) % 7 if method == "traffic" else None


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_distinct_sorted_repeatable_and_never_held_out(method: str) -> None:
    vectors, held_out = Rows(noise(500)), np.arange(0, 500, 3)
    limits = Limits(held_out=held_out, seed=5)
    first = choose_pairs(vectors, 120, method=method, traffic=traffic_for(method, 500), limits=limits)
    again = choose_pairs(vectors, 120, method=method, traffic=traffic_for(method, 500), limits=limits)
    assert len(first.rows) == 120 and (np.diff(first.rows) > 0).all()
    assert not np.isin(first.rows, held_out).any()
    np.testing.assert_array_equal(first.rows, again.rows)
    other = Limits(held_out=held_out, seed=6)
    assert (choose_pairs(vectors, 120, method=method, traffic=traffic_for(method, 500), limits=other).rows
            != first.rows).any()  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_held_out_rows_are_passed_over_but_similar_rows_are_not(method: str) -> None:
    tensor = noise(300)
    tensor[100:150] = 3 * tensor[:50]  # the same direction: a copy, whatever its length
    tensor[150:200] = tensor[:50] + 0.3 * noise(50, seed=1)
    limits = Limits(held_out=range(50))
    choice = choose_pairs(Rows(tensor), 200, method=method, traffic=traffic_for(method, 300), limits=limits)
    assert set(choice.rows) == {*range(50, 100), *range(150, 300)}
    assert choice.copies == 50
    allowed = Limits(held_out=range(50), duplicate_cosine=None)
    assert len(choose_pairs(Rows(tensor), 250, method=method, traffic=traffic_for(method, 300), limits=allowed).rows)


def test_too_few_rows_are_refused_naming_how_many_there_are() -> None:
    with pytest.raises(DataError, match="at most 60 pairs"):
        choose_pairs(Rows(noise(100)), 61, limits=Limits(held_out=range(40)))
    copied = noise(20).repeat(2, 1)
    with pytest.raises(DataError, match=r"at most 20 pairs.*copies"):
        choose_pairs(Rows(copied), 21, limits=Limits(held_out=range(10)))
    with pytest.raises(ConfigurationError, match="at least 2"):
        choose_pairs(Rows(noise(100)), 1)


def test_diverse_pairs_reach_small_clusters_that_random_ones_miss() -> None:
    centres = 10 * noise(20, seed=3)
    tensor = torch.cat([centres[0] + 0.1 * noise(2000, seed=4), centres[1:].repeat_interleave(3, 0)])
    tensor[2000:] += 0.1 * noise(57, seed=5)

    def clusters(method: str) -> int:
        rows = choose_pairs(Rows(tensor), 60, method=method, limits=Limits(seed=1)).rows
        return len({0 if row < 2000 else 1 + (row - 2000) // 3 for row in rows.tolist()})

    assert clusters("diverse") > 2 * clusters("random")


def test_traffic_is_chosen_in_proportion_and_weights_make_up_for_it() -> None:
    traffic = np.where(np.arange(1000) < 100, 9.0, 0.0)
    error = np.where(np.arange(1000) < 100, 1.0, 5.0)
    asked, estimates = [], []
    for seed in range(40):
        choice = choose_pairs(Rows(noise(1000)), 100, method="traffic", traffic=traffic, limits=Limits(seed=seed))
        assert choice.weights is not None and choice.weights.mean() == pytest.approx(1)
        asked.append((choice.rows < 100).mean())
        estimates.append(np.average(error[choice.rows], weights=choice.weights))
    assert 0.5 < np.mean(asked) < 0.9  # a hundred rows at a tenth of the places have nine tenths of the searches
    rates = 0.9 * traffic / traffic.sum() + 0.1 / 1000
    assert np.mean(estimates) == pytest.approx(np.average(error, weights=rates), rel=0.1)
    unweighted = choose_pairs(Rows(noise(1000)), 100, method="random")
    assert unweighted.weights is None


def test_traffic_counts_searches_that_return_a_row() -> None:
    found = np.array([[0, 2], [2, -1]])
    np.testing.assert_array_equal(traffic_of_searches(found, 4), [1, 0, 2, 0])
    np.testing.assert_array_equal(traffic_of_searches(found, 4, counts=[3, 10]), [3, 0, 13, 0])
    with pytest.raises(DataError, match="query log"):
        traffic_of_searches(found, 2)
    with pytest.raises(DataError, match="count"):
        traffic_of_searches(found, 4, counts=[1])


def test_wrong_arguments_are_explained() -> None:
    vectors = Rows(noise(50))
    with pytest.raises(ConfigurationError, match="method among"):
        choose_pairs(vectors, 5, method="best")
    with pytest.raises(ConfigurationError, match="without traffic"):
        choose_pairs(vectors, 5, method="traffic")
    with pytest.raises(DataError, match="for each of 50 rows"):
        choose_pairs(vectors, 5, method="traffic", traffic=np.ones(49))
    with pytest.raises(DataError, match="asked for"):
        choose_pairs(vectors, 5, method="traffic", traffic=np.eye(50)[3], limits=Limits(held_out=[3]))
    with pytest.raises(DataError, match="rows from 0 to 49"):
        choose_pairs(vectors, 5, limits=Limits(held_out=[50]))
