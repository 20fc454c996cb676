"""Searching texts by text, which needs no other framework; and the error where a framework is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from integration_helpers import CORPUS, QUERY, WORDS, affine_corrector, expected_order, text_search
from model_helpers import save_bert

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_retriever import CorrectedRetriever, RetrieverOptions
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.index.base import TensorVectors
from hf_corrector.integrations.text_search import TextSearch
from hf_corrector.models import DualEncoderModel
from hf_corrector.records import FittedTargets


@pytest.mark.parametrize("corrected", [True, False])
def test_targets_come_with_text_and_metadata_best_first(tiny_encoder: str, tmp_path: Path, corrected: bool) -> None:
    search = text_search(tiny_encoder, tmp_path, corrected=corrected)
    found = search.search(QUERY, 4)
    assert [one.id for one in found] == expected_order(search, QUERY)[:4]
    assert all(WORDS[one.metadata["number"]] == one.text and one.id == f"t{one.metadata['number']}" for one in found)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert search.search_vector(search.model.encode_query(QUERY), 4) == found
    assert len(search.search(QUERY, 99)) == len(WORDS)


def test_a_corpus_may_lack_metadata(tiny_encoder: str, tmp_path: Path) -> None:
    search = text_search(tiny_encoder, tmp_path)
    bare = TextSearch(search.model, search.retriever, CORPUS.remove_columns("metadata"))
    assert bare.search(QUERY, 1)[0].metadata == {}


def test_parts_that_do_not_belong_together_are_refused(tiny_encoder: str, tmp_path: Path) -> None:
    search = text_search(tiny_encoder, tmp_path)
    model, cache = search.model, search.retriever.vectors
    assert isinstance(cache, TargetCache)
    other = DualEncoderModel.from_encoder(save_bert(tmp_path / "other", seed=1))
    with pytest.raises(CacheMismatchError):
        TextSearch(other, cache, CORPUS)
    fitted = FittedTargets(cache.manifest.checksum, model.fingerprint("target").digest, ())
    noted = CorrectedRetriever(cache, affine_corrector(cache.dim), options=RetrieverOptions(fitted=fitted))
    TextSearch(model, noted, CORPUS)
    with pytest.raises(CacheMismatchError, match="fitted to another encoder"):
        TextSearch(other, noted, CORPUS)
    with pytest.raises(CacheMismatchError, match="got other ids or texts"):
        TextSearch(model, search.retriever, CORPUS.select([1, 0, 2, 3, 4, 5]))
    with pytest.raises(ConfigurationError, match=r"6 rows, one for each vector; got .* 5 rows"):
        TextSearch(model, search.retriever, CORPUS.select(range(5)))
    with pytest.raises(ConfigurationError, match="expected columns id and text"):
        TextSearch(model, search.retriever, CORPUS.remove_columns("id"))
    short = CorrectedRetriever(TensorVectors(torch.randn(6, 8)), affine_corrector(8))
    with pytest.raises(ConfigurationError, match="vectors of size 8; got size 32"):
        TextSearch(model, short, CORPUS)


def test_a_cache_made_from_vectors_is_known_by_its_ids(tiny_encoder: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder)
    vectors, fingerprint = model.encode_target(WORDS), model.fingerprint("target")
    cache = TargetCache.from_arrays(tmp_path / "cache", vectors, CORPUS["id"][:], fingerprint=fingerprint)
    assert TextSearch(model, cache, CORPUS).search(WORDS[2], 6)[0].id in CORPUS["id"]
    with pytest.raises(CacheMismatchError):
        TextSearch(model, cache, CORPUS.select([1, 0, 2, 3, 4, 5]))


def test_empty_queries_and_numbers_below_one_are_refused(tiny_encoder: str, tmp_path: Path) -> None:
    search = text_search(tiny_encoder, tmp_path)
    with pytest.raises(DataError, match="expected words; got '  '"):
        search.search("  ", 3)
    with pytest.raises(ConfigurationError):
        search.search(QUERY, 0)
