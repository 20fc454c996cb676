"""LangChain's own standard tests of retrievers and embeddings, and what is particular to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integration_helpers import QUERY, WORDS, expected_order, run_example, text_search

from hf_corrector.integrations.text_search import TextSearch
from hf_corrector.models import DualEncoderModel

pytest.importorskip("langchain_tests", reason="needs hf-corrector[dev]: langchain-core and langchain-tests")

from langchain_core.embeddings import Embeddings
from langchain_tests.integration_tests import RetrieversIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests
from pydantic import ValidationError

from hf_corrector.integrations.langchain import CorrectedLangChainRetriever, DualEncoderEmbeddings


@pytest.fixture(scope="module")
def search(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> TextSearch:
    return text_search(tiny_encoder, tmp_path_factory.mktemp("langchain"))


class TestCorrectedLangChainRetriever(RetrieversIntegrationTests):
    @pytest.fixture(autouse=True)
    def take(self, search: TextSearch) -> None:
        self.search = search

    @property
    def retriever_constructor(self) -> type[CorrectedLangChainRetriever]:
        return CorrectedLangChainRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"search": self.search, "k": 2}

    @property
    def retriever_query_example(self) -> str:
        return QUERY


class TestDualEncoderEmbeddings(EmbeddingsUnitTests):
    @pytest.fixture(autouse=True)
    def take(self, search: TextSearch) -> None:
        self.encoder = search.model

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return DualEncoderEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"model": self.encoder}


def test_documents_are_those_that_correction_finds(search: TextSearch) -> None:
    documents = CorrectedLangChainRetriever(search=search, k=3).invoke(QUERY)
    assert [one.id for one in documents] == expected_order(search, QUERY)[:3]
    for document, found in zip(documents, search.search(QUERY, 3), strict=True):
        assert document.page_content == found.text
        assert document.metadata == {"number": int(str(document.id)[1:]), "score": found.score}


def test_less_than_one_document_cannot_be_asked_for(search: TextSearch) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        CorrectedLangChainRetriever(search=search, k=0)


def test_embeddings_tell_queries_from_documents(tiny_encoder: str) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, query_prompt="find: ")
    embeddings = DualEncoderEmbeddings(model)
    assert embeddings.embed_query(QUERY) == model.encode_query(QUERY).tolist()
    assert embeddings.embed_documents(WORDS) == model.encode_target(WORDS).tolist()
    assert embeddings.embed_query(WORDS[0]) != embeddings.embed_documents(WORDS[:1])[0]


def test_the_example_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run_example("langchain_retriever.py")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Wait until the event is set." and len([one for one in lines if one.startswith("  ")]) == 6
