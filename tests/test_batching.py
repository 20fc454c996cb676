import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_corrector.batching import pad_tokens, token_budget_batches


@given(st.lists(st.integers(0, 300), max_size=60), st.integers(1, 500))
def test_every_text_is_in_exactly_one_batch_and_no_batch_of_several_exceeds_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = token_budget_batches(lengths, budget)
    assert sorted(np.concatenate([*batches, np.zeros(0, dtype=np.int64)]).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) >= 1
        assert len(batch) == 1 or len(batch) * max(lengths[one] for one in batch) <= budget


def test_longest_texts_come_first_and_equal_ones_in_order() -> None:
    batches = token_budget_batches([3, 9, 3, 9, 1], 18)
    assert [batch.tolist() for batch in batches] == [[1, 3], [0, 2, 4]]


def test_batches_are_as_large_as_the_budget_allows() -> None:
    assert [len(batch) for batch in token_budget_batches([4] * 10, 12)] == [3, 3, 3, 1]


def test_text_longer_than_the_budget_is_encoded_by_itself() -> None:
    assert [batch.tolist() for batch in token_budget_batches([2, 100, 2], 10)] == [[1], [0, 2]]


def test_no_texts_make_no_batches() -> None:
    assert token_budget_batches([], 10) == []


def test_tokens_are_padded_on_the_right_under_a_mask() -> None:
    padded = pad_tokens([[5, 6, 7], [8], []], 99)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 99, 99], [99, 99, 99]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert padded["input_ids"].dtype == padded["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("token_lists", [[], [[]], [[], []]])
def test_padding_is_at_least_one_column_wide(token_lists: list[list[int]]) -> None:
    padded = pad_tokens(token_lists, 0)
    assert padded["input_ids"].shape == padded["attention_mask"].shape == (len(token_lists), 1)
