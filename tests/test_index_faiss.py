"""Indexes by factory string against exact search, and what is written of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_corrector.errors import ConfigurationError, DataError, InputError
from hf_corrector.index.base import TensorVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.index.faiss import DESCRIPTION_FILE, INDEX_FILE, FaissIndex, FaissParameters
from hf_corrector.index.scan import ScanIndex

# Codes of four bits have 16 centroids, so that faiss is content with few training vectors.
FACTORIES = {
    "Flat": FaissParameters(),
    "IVF16,Flat": FaissParameters(nprobe=16),
    "HNSW32": FaissParameters(ef_search=400),
    "IVF16,PQ8x4fs,RFlat": FaissParameters(nprobe=16, k_factor=100),
    "PQ8x4fs,RFlat": FaissParameters(k_factor=100),
    "IVF16_HNSW8,Flat": FaissParameters(nprobe=16, ef_search=64),
}
APPROXIMATE = ["IVF16,PQ8x4", "SQ8", "IVF16,SQbf16"]


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors, dim=1)


TARGETS, QUERIES = TensorVectors(unit(1000, 16, 0)), unit(20, 16, 1)


def recall(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found[:, :, None] == expected[:, None, :]).any(dim=1).float().mean())


@pytest.mark.parametrize("factory", FACTORIES)
def test_thorough_search_finds_what_exact_search_finds(factory: str) -> None:
    index = FaissIndex.build(TARGETS, factory, parameters=FACTORIES[factory])
    found, expected = index.search(QUERIES, 10), ExactIndex(TARGETS).search(QUERIES, 10)
    assert (len(index), index.dim) == (1000, 16)
    assert torch.equal(found.rows, expected.rows)
    torch.testing.assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("factory", APPROXIMATE)
def test_compressed_indexes_find_some(factory: str) -> None:
    found = FaissIndex.build(TARGETS, factory).search(QUERIES, 10, parameters=FaissParameters(
        nprobe=16 if "IVF" in factory else None))  # fmt: skip
    assert recall(found.rows, ExactIndex(TARGETS).search(QUERIES, 10).rows) > 0.3
    assert bool((found.scores.diff(dim=1) <= 0).all())


def test_fewer_lists_find_less() -> None:
    index, expected = FaissIndex.build(TARGETS, "IVF16,Flat"), ExactIndex(TARGETS).search(QUERIES, 10)
    few = recall(index.search(QUERIES, 10, parameters=FaissParameters(nprobe=1)).rows, expected.rows)
    many = recall(index.search(QUERIES, 10, parameters=FaissParameters(nprobe=8)).rows, expected.rows)
    assert few < many <= 1


def test_ties_inside_a_result_go_to_the_smaller_row() -> None:
    twins = TensorVectors(TARGETS.tensor[:40].repeat(3, 1))
    found = FaissIndex.build(twins, "Flat").search(QUERIES, 120)
    assert torch.equal(found.rows % 40, ExactIndex(twins).search(QUERIES, 120).rows % 40)
    assert bool(((found.scores.diff(dim=1) < 0) | (found.rows.diff(dim=1) > 0)).all())


def test_missing_rows_are_padded() -> None:
    few = TensorVectors(TARGETS.tensor[:3])
    found = FaissIndex.build(few, "Flat").search(QUERIES, 5)
    assert found.rows[:, 3:].tolist() == [[-1, -1]] * 20
    assert bool((found.scores[:, 3:] == float("-inf")).all())
    one_list = FaissIndex.build(TARGETS, "IVF16,Flat").search(QUERIES, 500, parameters=FaissParameters(nprobe=1))
    assert bool(((one_list.rows >= 0).sum(dim=1) < 500).all()) and one_list.rows.shape == (20, 500)
    assert FaissIndex.build(few, "Flat").search(QUERIES[:0], 5).rows.shape == (0, 5)


@pytest.mark.parametrize("factory", ["Flat", "HNSW32"])
def test_excluded_rows_are_never_returned(factory: str) -> None:
    excluded = [np.arange(50 * query) for query in range(20)]
    index = FaissIndex.build(TARGETS, factory, parameters=FACTORIES[factory])
    found = index.search(QUERIES, 7, excluded=excluded)
    assert torch.equal(found.rows, ExactIndex(TARGETS).search(QUERIES, 7, excluded=excluded).rows)


def test_stored_half_precision_and_the_chunks_of_a_cache_are_read() -> None:
    half = TensorVectors(TARGETS.tensor.bfloat16())
    found = FaissIndex.build(half, "Flat").search(QUERIES, 10)
    assert torch.equal(found.rows, ScanIndex(half).search(QUERIES, 10).rows)


def test_building_again_gives_the_same_index() -> None:
    first, second = (
        FaissIndex.build(TARGETS, "IVF16,PQ8x4fs", train_rows=800, seed=3).search(QUERIES, 10) for _ in range(2)
    )
    assert torch.equal(first.rows, second.rows) and torch.equal(first.scores, second.scores)


@pytest.mark.parametrize("factory", ["Flat", "IVF16,PQ8x4fs,RFlat", "HNSW32"])
def test_saved_and_loaded_it_finds_the_same(factory: str, tmp_path: Path) -> None:
    index = FaissIndex.build(TARGETS, factory, parameters=FACTORIES[factory], source="0123abcd")
    index.save(tmp_path / "index")
    loaded = FaissIndex.load(tmp_path / "index", trust_index=True, source="0123abcd")
    before, after = index.search(QUERIES, 10), loaded.search(QUERIES, 10)
    assert torch.equal(before.rows, after.rows) and torch.equal(before.scores, after.scores)
    assert loaded.description.factory == factory and loaded.description.source == "0123abcd"
    assert loaded.description.parameters == FACTORIES[factory]


def test_an_index_gives_its_rows_back() -> None:
    torch.testing.assert_close(FaissIndex.build(TARGETS, "Flat").read(5, 9), TARGETS.tensor[5:9])


def test_a_file_is_read_only_by_those_who_trust_it(tmp_path: Path) -> None:
    FaissIndex.build(TARGETS, "Flat").save(tmp_path)
    with pytest.raises(ConfigurationError, match=r"can be attacked.*Build the index again"):
        FaissIndex.load(tmp_path)


def test_an_index_of_other_vectors_is_refused(tmp_path: Path) -> None:
    FaissIndex.build(TARGETS, "Flat", source="one").save(tmp_path)
    with pytest.raises(InputError, match="an index of two; got one of one"):
        FaissIndex.load(tmp_path, trust_index=True, source="two")


@pytest.mark.parametrize("name", [INDEX_FILE, DESCRIPTION_FILE])
def test_damage_is_noticed_before_faiss_reads_the_file(name: str, tmp_path: Path) -> None:
    FaissIndex.build(TARGETS, "Flat", source="aaaa").save(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    place = content.find(b"aaaa") if name == DESCRIPTION_FILE else len(content) // 2
    content[place] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="seal" if name == DESCRIPTION_FILE else "hash"):
        FaissIndex.load(tmp_path, trust_index=True)


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"no {DESCRIPTION_FILE}"):
        FaissIndex.load(tmp_path, trust_index=True)
    FaissIndex.build(TARGETS, "Flat").save(tmp_path)
    (tmp_path / INDEX_FILE).unlink()
    with pytest.raises(InputError, match=f"no {INDEX_FILE}"):
        FaissIndex.load(tmp_path, trust_index=True)
    (tmp_path / DESCRIPTION_FILE).write_text(json.dumps([1]))
    (tmp_path / INDEX_FILE).write_bytes(b"")
    with pytest.raises(InputError, match="seal"):
        FaissIndex.load(tmp_path, trust_index=True)


def test_what_faiss_refuses_is_said_plainly() -> None:
    with pytest.raises(ConfigurationError, match=r"'nonsense'.*could not parse"):
        FaissIndex.build(TARGETS, "nonsense")
    with pytest.raises(ConfigurationError, match="an index with nprobe"):
        FaissIndex.build(TARGETS, "Flat", parameters=FaissParameters(nprobe=3))
    with pytest.raises(ConfigurationError, match="nprobe >= 1"):
        FaissIndex.build(TARGETS, "IVF16,Flat", parameters=FaissParameters(nprobe=0))
    with pytest.raises(ConfigurationError, match="numbers its rows itself"):
        FaissIndex.build(TARGETS, "IDMap,Flat")
    with pytest.raises(ConfigurationError, match="train it on"):
        FaissIndex.build(TensorVectors(TARGETS.tensor[:5]), "IVF16,Flat")
    with pytest.raises(ConfigurationError, match="0 targets"):
        FaissIndex.build(TensorVectors(torch.empty(0, 4)), "Flat")


def test_queries_that_do_not_fit_are_refused() -> None:
    index = FaissIndex.build(TARGETS, "Flat")
    with pytest.raises(DataError, match="query vectors"):
        index.search(unit(2, 5, 0), 3)
    with pytest.raises(ConfigurationError, match="k >= 1"):
        index.search(QUERIES, 0)
    with pytest.raises(DataError, match="rows from 0 to 999"):
        index.search(QUERIES[:1], 3, excluded=[np.array([1000])])
    broken = TARGETS.tensor.clone()
    broken[77, 3] = float("inf")
    with pytest.raises(DataError, match="target 77"):
        FaissIndex.build(TensorVectors(broken), "Flat")
