"""From the text of a query to texts of targets: what retrievers of other frameworks are made of; needs none of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_cache import check_comparable
from hf_corrector.corrected_retriever import CorrectedRetriever
from hf_corrector.data.retrieval import column, texts_hash
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel


@dataclass(frozen=True)
class FoundTarget:
    """A target that was found.

    Attributes:
        id: Its id in the corpus.
        text: Its text.
        score: Inner product of query and corrected target.
        metadata: What the corpus says of it.
    """

    id: str
    text: str
    score: float
    metadata: dict[str, Any]


class TextSearch:
    """Search texts by text, through vectors that may be older than the encoder of the queries.

    Args:
        model: The encoder of the queries.
        retriever: Stale vectors and the corrector that leads to this encoder; or a cache of this encoder's own vectors.
        corpus: Columns ``id``, ``text`` and, if wanted, ``metadata`` (a JSON object as a string), one row per vector.

    Raises:
        CacheMismatchError: If cache, corrector, encoder and corpus do not belong together, so far as that is known.
        ConfigurationError: If the sizes of vectors, or the numbers of vectors and texts, differ.
    """

    def __init__(self, model: DualEncoderModel, retriever: CorrectedRetriever | TargetCache, corpus: Dataset) -> None:
        if isinstance(retriever, TargetCache):
            identity = CorrectorModel(CorrectorConfig(kind="identity", input_dim=retriever.dim))
            retriever = CorrectedRetriever(retriever, identity)
        _check_encoder(model, retriever)
        _check_corpus(retriever, corpus)
        self.model, self.retriever = model, retriever
        self._ids, self._texts = column(corpus, "id"), column(corpus, "text")
        self._metadata: Sequence[str | None] | None = None
        if "metadata" in corpus.column_names:
            self._metadata = column(corpus, "metadata")

    def search(self, query: str, k: int) -> list[FoundTarget]:
        """Find the ``k`` targets, or all if there are fewer, of highest corrected score; best first.

        Raises:
            ConfigurationError: If ``k`` is below 1.
            DataError: If the query has no words.
        """
        if not query.strip():
            raise DataError("query", expected="words", got=repr(query), cure="Say what to search for.")
        return self.search_vector(self.model.encode_query(query), k)

    def search_vector(self, query: torch.Tensor, k: int) -> list[FoundTarget]:
        """Find targets as :meth:`search` does, for a query's vector of the same encoder, ``(dim,)``.

        Raises:
            ConfigurationError: If ``k`` is below 1.
            DataError: If the vector has another size or is not finite.
        """
        found = self.retriever.search(query[None], min(k, len(self._ids)))
        pairs = zip(found.rows[0].tolist(), found.scores[0].tolist(), strict=True)
        return [self._target(row, score) for row, score in pairs if row >= 0]

    def _target(self, row: int, score: float) -> FoundTarget:
        about = "{}" if self._metadata is None else self._metadata[row]
        return FoundTarget(self._ids[row], self._texts[row], score, json.loads(about or "{}"))


def _check_encoder(model: DualEncoderModel, retriever: CorrectedRetriever) -> None:
    """Refuse queries of another encoder than the one corrected vectors are of."""
    fingerprint, fitted = model.fingerprint("target"), retriever.options.fitted
    if fitted is not None and fitted.encoder != fingerprint.digest:
        raise CacheMismatchError(
            "text search", expected=f"a corrector for queries of {model.config.name_or_path}",
            got="one fitted to another encoder", cure="Load the encoder the corrector leads to.",
        )  # fmt: skip
    # A corrector without such a note may lead anywhere; without a corrector, vectors are the encoder's own.
    if retriever.corrector.config.kind == "identity" and isinstance(retriever.vectors, TargetCache):
        check_comparable(retriever.vectors, fingerprint)
    if model.config.embedding_dim != retriever.query_dim:
        raise ConfigurationError(
            "text search", expected=f"an encoder with vectors of size {retriever.query_dim}",
            got=f"size {model.config.embedding_dim}", cure="Load the encoder the corrector leads to.",
        )  # fmt: skip


def _check_corpus(retriever: CorrectedRetriever, corpus: Dataset) -> None:
    missing = {"id", "text"} - set(corpus.column_names)
    if missing or len(corpus) != len(retriever.vectors):
        raise ConfigurationError(
            "corpus", expected=f"columns id and text, {len(retriever.vectors)} rows, one for each vector",
            got=f"columns {corpus.column_names}, {len(corpus)} rows",
            cure="Pass the corpus the vectors were made from.",
        )  # fmt: skip
    vectors = retriever.vectors
    if isinstance(vectors, TargetCache) and not _made_from(vectors, corpus):
        raise CacheMismatchError(
            str(vectors.path), expected="the texts of the cache, in its order", got="other ids or texts",
            cure="Pass the corpus the cache was made from.",
        )  # fmt: skip


def _made_from(cache: TargetCache, corpus: Dataset) -> bool:
    """Tell whether ids and texts are those of a cache; of one made from vectors alone only the ids are known."""
    if cache.texts_hash.startswith("vectors-"):
        return bool(list(cache.ids) == column(corpus, "id"))
    return texts_hash(corpus) == cache.texts_hash
