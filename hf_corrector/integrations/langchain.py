"""LangChain: a retriever that searches stale vectors as if they were corrected, and the encoder as embeddings.

Needs the extra ``langchain``.
"""

from __future__ import annotations

from typing import Any

from hf_corrector._extras import missing_extra
from hf_corrector.integrations.text_search import TextSearch
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel

try:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.retrievers import BaseRetriever
    from pydantic import Field
except ImportError as error:
    raise missing_extra("LangChain's retriever", package="langchain-core", extra="langchain") from error


class CorrectedLangChainRetriever(BaseRetriever):
    """Retrieve documents for a query; ``invoke(query, k=3)`` asks for another number of them.

    Every :class:`Document` has the id of its target, its text, and its metadata with ``score`` added: inner product of
    query and corrected target.

    Args:
        search: Encoder, vectors, corrector and texts.
        k: How many documents to return.
    """

    search: TextSearch
    k: int = Field(default=4, ge=1)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, k: int | None = None
    ) -> list[Document]:
        found = self.search.search(query, self.k if k is None else k)
        return [
            Document(id=one.id, page_content=one.text, metadata={**one.metadata, "score": one.score}) for one in found
        ]


class DualEncoderEmbeddings(Embeddings):
    """A dual encoder as LangChain's embeddings: queries by its query side, documents by its target side.

    Args:
        model: The encoder.
    """

    def __init__(self, model: DualEncoderModel) -> None:
        self.model = model

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Encode targets."""
        vectors: Any = self.model.encode_target(texts).tolist()
        return list(vectors)

    def embed_query(self, text: str) -> list[float]:
        """Encode a query."""
        vector: Any = self.model.encode_query(text).tolist()
        return list(vector)
