"""LlamaIndex: a retriever that searches stale vectors as if they were corrected; needs the extra ``llama-index``."""

from __future__ import annotations

import torch

from hf_corrector._extras import missing_extra
from hf_corrector.errors import ConfigurationError
from hf_corrector.integrations.text_search import TextSearch

try:
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.callbacks.base import CallbackManager
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
except ImportError as error:
    raise missing_extra("LlamaIndex' retriever", package="llama-index-core", extra="llama-index") from error


class CorrectedLlamaIndexRetriever(BaseRetriever):
    """Retrieve nodes for a query, each with the id, text and metadata of its target, and its score.

    A query that brings its embedding is searched by that, which must be one of the same encoder.

    Args:
        search: Encoder, vectors, corrector and texts.
        similarity_top_k: How many nodes to return.
        callback_manager: LlamaIndex' own.

    Raises:
        ConfigurationError: If ``similarity_top_k`` is below 1.
    """

    def __init__(
        self, search: TextSearch, *, similarity_top_k: int = 4, callback_manager: CallbackManager | None = None
    ) -> None:
        if similarity_top_k < 1:
            raise ConfigurationError(
                "similarity_top_k", expected="at least 1", got=str(similarity_top_k), cure="Raise it."
            )
        super().__init__(callback_manager=callback_manager)
        self.search, self.similarity_top_k = search, similarity_top_k

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        if query_bundle.embedding is None:
            found = self.search.search(query_bundle.query_str, self.similarity_top_k)
        else:
            found = self.search.search_vector(torch.tensor(query_bundle.embedding), self.similarity_top_k)
        return [
            NodeWithScore(node=TextNode(id_=one.id, text=one.text, metadata=one.metadata), score=one.score)
            for one in found
        ]
