"""LlamaIndex' retriever interface over a corrected cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration_helpers import QUERY, WORDS, expected_order, run_example, text_search

from hf_corrector.errors import ConfigurationError
from hf_corrector.integrations.text_search import TextSearch

pytest.importorskip("llama_index.core", reason="needs hf-corrector[llama-index]")

from llama_index.core.schema import QueryBundle

from hf_corrector.integrations.llama_index import CorrectedLlamaIndexRetriever


@pytest.fixture(scope="module")
def search(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> TextSearch:
    return text_search(tiny_encoder, tmp_path_factory.mktemp("llama-index"))


def test_nodes_are_those_that_correction_finds(search: TextSearch) -> None:
    nodes = CorrectedLlamaIndexRetriever(search, similarity_top_k=3).retrieve(QUERY)
    assert [one.node_id for one in nodes] == expected_order(search, QUERY)[:3]
    for node, found in zip(nodes, search.search(QUERY, 3), strict=True):
        assert (node.text, node.score, node.metadata) == (found.text, found.score, found.metadata)


async def test_nodes_come_asynchronously_too(search: TextSearch) -> None:
    retriever = CorrectedLlamaIndexRetriever(search)
    nodes = await retriever.aretrieve(QUERY)
    assert [one.node_id for one in nodes] == expected_order(search, QUERY)[:4]


def test_a_query_may_bring_its_embedding(search: TextSearch) -> None:
    retriever = CorrectedLlamaIndexRetriever(search, similarity_top_k=2)
    bundle = QueryBundle("other words", embedding=search.model.encode_query(WORDS[4]).tolist())
    assert [one.node_id for one in retriever.retrieve(bundle)] == expected_order(search, WORDS[4])[:2]


def test_less_than_one_node_cannot_be_asked_for(search: TextSearch) -> None:
    with pytest.raises(ConfigurationError, match="expected at least 1; got 0"):
        CorrectedLlamaIndexRetriever(search, similarity_top_k=0)


def test_the_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_example("llama_index_retriever.py")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Wait until the event is set." and len([one for one in lines if one.startswith("  ")]) == 6
