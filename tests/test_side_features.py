import numpy as np
import pytest
import torch

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.side_features import (
    DenseSide,
    TokenCounts,
    hash_bigrams,
    mean_word_embeddings,
    row_of_entries,
    take_rows,
    tfidf,
)

LISTS = [[3, 1, 3, 3], [], [5, 0], [3, 1]]


def counts(buckets: int = 8) -> TokenCounts:
    return TokenCounts.from_lists(LISTS, vocabulary=6, bigram_buckets=buckets)


def test_tokens_and_their_pairs_are_counted() -> None:
    dense = counts().read(0, 4).to_dense()
    assert dense.shape == (4, 14)
    assert dense[0, :6].tolist() == [0, 1, 0, 3, 0, 0]
    assert dense[1].sum() == 0
    assert dense[2, :6].tolist() == [1, 0, 0, 0, 0, 1]
    expected = torch.zeros(8)
    for bucket in hash_bigrams(np.array([3, 1, 3]), np.array([1, 3, 3]), buckets=8).tolist():
        expected[bucket] += 1
    assert dense[0, 6:].tolist() == expected.tolist()
    assert dense[:, 6:].sum() == 3 + 0 + 1 + 1  # no pair reaches from one target into the next


def test_pairs_of_tokens_can_be_left_out() -> None:
    assert counts(0).width == 6
    assert torch.equal(counts(0).read(0, 4).to_dense(), counts().read(0, 4).to_dense()[:, :6])


def test_columns_ascend_within_each_row() -> None:
    found = counts()
    for row in range(len(found)):
        columns = found.columns[found.offsets[row] : found.offsets[row + 1]]
        assert (np.diff(columns) > 0).all()


def test_hash_of_a_pair_is_the_same_everywhere_and_knows_its_order() -> None:
    # Part of the format of saved correctors: these numbers must never change.
    first, second = np.array([101, 7592, 0]), np.array([7592, 101, 30521])
    assert hash_bigrams(first, second, buckets=2**14).tolist() == HASHED


HASHED = [1785, 4279, 10812]


def test_gathered_rows_are_the_rows() -> None:
    rows = np.array([3, 0, 0, 1])
    assert torch.equal(counts().gather(rows).to_dense(), counts().read(0, 4).to_dense()[rows])
    assert torch.equal(
        take_rows(counts().read(0, 4), torch.from_numpy(rows)).to_dense(), counts().gather(rows).to_dense()
    )
    assert counts().gather(np.zeros(0, np.int64)).shape == (0, 14)


def test_many_targets_are_counted_as_few() -> None:
    lists = np.random.default_rng(0).integers(50, size=(40_000, 3)).tolist()
    found = TokenCounts.from_lists(lists, vocabulary=50, bigram_buckets=16)
    for row in (0, 16_383, 16_384, 39_999):
        alone = TokenCounts.from_lists([lists[row]], vocabulary=50, bigram_buckets=16)
        assert torch.equal(found.read(row, row + 1).to_dense(), alone.read(0, 1).to_dense())


@pytest.mark.parametrize("token", [-1, 6])
def test_token_outside_the_vocabulary_is_refused_and_its_target_named(token: int) -> None:
    with pytest.raises(DataError, match="target 2"):
        TokenCounts.from_lists([[1], [2], [3, token]], vocabulary=6)


def test_statistics_count_targets_and_rare_tokens_weigh_more() -> None:
    statistics = counts().statistics()
    assert statistics.frequency[:6].tolist() == [1, 2, 0, 2, 0, 1]
    assert statistics.targets == 4
    assert statistics.idf[0] > statistics.idf[3] > 0
    assert TokenCounts.from_lists([[1]] * 5, vocabulary=2, bigram_buckets=0).statistics().idf[1] == 0


def test_tokens_and_pairs_each_get_unit_length() -> None:
    statistics = counts().statistics()
    weighted = tfidf(counts().read(0, 4), statistics.idf, vocabulary=6).to_dense()
    lengths = torch.stack([weighted[:, :6].norm(dim=1), weighted[:, 6:].norm(dim=1)])
    torch.testing.assert_close(lengths, torch.tensor([[1.0, 0, 1, 1], [1, 0, 1, 1]]))
    raw = torch.tensor([(1 + np.log(1)) * statistics.idf[1], (1 + np.log(3)) * statistics.idf[3]])
    torch.testing.assert_close(weighted[0, [1, 3]], raw / raw.norm())


def test_mean_word_embeddings_are_the_means() -> None:
    table = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    means = mean_word_embeddings(counts(), table)
    assert means.kind == "word_embeddings"
    torch.testing.assert_close(means.matrix[0], table[[3, 1, 3, 3]].mean(dim=0))
    assert torch.equal(means.matrix[1], torch.zeros(3))
    with pytest.raises(ConfigurationError, match="6 tokens"):
        mean_word_embeddings(counts(), table[:5])


def test_rows_of_entries() -> None:
    assert row_of_entries(counts(0).read(0, 4)).tolist() == [0, 0, 2, 2, 3, 3]


def test_dense_side_features_are_read_as_float32_and_checked() -> None:
    side = DenseSide(torch.arange(6, dtype=torch.float64).reshape(3, 2))
    assert (len(side), side.width, side.kind) == (3, 2, "matrix")
    assert side.read(1, 3).dtype == torch.float32
    assert side.gather(np.array([2, 0])).tolist() == [[4, 5], [0, 1]]
    for wrong in (torch.arange(6).reshape(3, 2), torch.zeros(3)):
        with pytest.raises(ConfigurationError, match="side features"):
            DenseSide(wrong)
