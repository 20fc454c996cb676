import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from hf_corrector.data.collators import PairCollator, PairDataset, PairExample, pad_tokens
from hf_corrector.data.tokens import TokenStore
from hf_corrector.errors import DataError

POSITIVES = [{2: 1.0, 0: 2.0}, {1: 1.0}]
BuildStore = Callable[[str, list[list[int]]], TokenStore]


@pytest.fixture
def build_store(tmp_path: Path) -> BuildStore:
    def build(name: str, token_lists: list[list[int]]) -> TokenStore:
        rows = [str(row) for row in range(len(token_lists))]
        return TokenStore.build(tmp_path / name, rows, lambda texts: [token_lists[int(row)] for row in texts], key=name)

    return build


@pytest.fixture
def pairs(build_store: BuildStore) -> PairDataset:
    queries = build_store("queries", [[11, 12], [13]])
    targets = build_store("targets", [[21], [22, 23, 24], [25, 26]])
    return PairDataset(POSITIVES, queries, targets)


def test_padding_goes_right_and_to_the_longest() -> None:
    padded = pad_tokens([[5, 6, 7], [8], []], 9)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert {tensor.dtype for tensor in padded.values()} == {torch.int64}


def test_padding_masks_by_length_even_where_the_padding_id_is_a_token() -> None:
    assert pad_tokens([[0, 0], [0]], 0)["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_padding_is_at_least_one_column_wide() -> None:
    assert pad_tokens([[]], 3)["input_ids"].tolist() == [[3]]
    assert pad_tokens([], 3)["input_ids"].shape == (0, 1)


def test_every_judgement_is_one_example_queries_first_then_target_rows(pairs: PairDataset) -> None:
    assert len(pairs) == 3
    assert [(item["query_row"], item["target_row"]) for item in map(pairs.__getitem__, range(3))] == [
        (0, 0), (0, 2), (1, 1),
    ]  # fmt: skip
    assert pairs.grades.tolist() == [2.0, 1.0, 1.0]
    assert pairs[1] == {"query_tokens": [11, 12], "query_row": 0, "target_row": 2, "target_tokens": [25, 26]}


def test_one_example_per_query_is_its_best_positive_of_the_lowest_row(build_store: BuildStore) -> None:
    queries = build_store("queries", [[11], [12], [13], [14]])
    targets = build_store("targets", [[21], [22], [23], [24]])
    positives = [{3: 1.0, 2: 2.0, 1: 2.0}, {0: 0.5}, {}, {3: 1.0, 0: 1.0}]
    best = PairDataset(positives, queries, targets, one_example_per_query=True)
    assert best.query_rows.tolist() == [0, 1, 3]
    assert best.target_rows.tolist() == [1, 0, 0]
    assert best.grades.tolist() == [2.0, 0.5, 1.0]
    assert best[2] == {"query_tokens": [14], "query_row": 3, "target_row": 0, "target_tokens": [21]}
    assert len(PairDataset(positives, queries, targets)) == 6


def test_collator_pads_queries_and_targets_apart(pairs: PairDataset) -> None:
    batch = PairCollator(pad_token_id=0, target_pad_token_id=1)([pairs[0], pairs[2]])
    assert batch["queries"]["input_ids"].tolist() == [[11, 12], [13, 0]]
    assert batch["queries"]["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["positives"]["input_ids"].tolist() == [[21, 1, 1], [22, 23, 24]]
    assert batch["query_rows"].tolist() == [0, 1] and batch["positive_rows"].tolist() == [0, 1]
    assert batch["query_rows"].dtype == batch["positive_rows"].dtype == torch.int64


def test_collator_uses_one_padding_id_for_both_by_default(pairs: PairDataset) -> None:
    batch = PairCollator(7)([pairs[0], pairs[2]])
    assert batch["queries"]["input_ids"][1, 1] == 7 and batch["positives"]["input_ids"][0, 1] == 7


def test_data_set_survives_pickling(pairs: PairDataset) -> None:
    copy = pickle.loads(pickle.dumps(pairs))
    assert [copy[index] for index in range(3)] == [pairs[index] for index in range(3)]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_yield_the_same_batches(pairs: PairDataset, context: str) -> None:
    def batches(workers: int) -> list[list[list[int]]]:
        loader: DataLoader[PairExample] = DataLoader(
            pairs, batch_size=2, collate_fn=PairCollator(0), num_workers=workers,
            multiprocessing_context=context if workers else None,
        )  # fmt: skip
        return [batch["positives"]["input_ids"].tolist() for batch in loader]

    assert batches(1) == batches(0)


def test_stores_that_do_not_fit_are_refused(build_store: BuildStore) -> None:
    queries, targets = build_store("queries", [[1], [2]]), build_store("targets", [[1], [2]])
    with pytest.raises(DataError, match="queries: expected tokens of 1 queries; got 2"):
        PairDataset([{0: 1.0}], queries, targets)
    with pytest.raises(DataError, match="judgements on the 2 rows of the targets; got rows 0 to 2"):
        PairDataset(POSITIVES, queries, targets)
    with pytest.raises(DataError, match="got no judgement"):
        PairDataset([{}, {}], queries, targets)
