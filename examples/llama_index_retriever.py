"""Use an old index from LlamaIndex with the queries of a new encoder; runs offline.

pip install 'hf-corrector[demo,llama-index]', then python examples/llama_index_retriever.py.
"""

import sysconfig
import tempfile
from pathlib import Path

import torch

from hf_corrector import (
    CorrectedRetriever,
    CorrectorConfig,
    CorrectorModel,
    DualEncoderModel,
    build_cache,
    fit_corrector,
)
from hf_corrector._extras import demo_encoder
from hf_corrector.data.stdlib import python_source_data
from hf_corrector.integrations.llama_index import CorrectedLlamaIndexRetriever
from hf_corrector.integrations.text_search import TextSearch

QUESTIONS = ["Wait until the event is set.", "Run blocking code in a thread of its own."]


def main() -> None:
    """Build an old index, correct it towards a new encoder and ask LlamaIndex' retriever."""
    # A part of the embedded default. Two depths of MiniLM stand for the old and the new encoder.
    data = python_source_data(Path(sysconfig.get_path("stdlib")) / "asyncio")
    encoder = str(demo_encoder())
    old = DualEncoderModel.from_encoder(encoder, num_hidden_layers=4, target_max_length=64)
    new = DualEncoderModel.from_encoder(encoder, target_max_length=64)
    with tempfile.TemporaryDirectory() as folder:
        cache = build_cache(old, data.corpus, Path(folder) / "old_cache").cache

        # Every other target is encoded anew, to learn where the new encoder puts what the old one knew.
        rows = torch.arange(0, len(cache), 2)
        fresh = new.encode_target([data.corpus["text"][int(row)] for row in rows])
        corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=cache.dim))
        fit_corrector(corrector, cache.gather(rows), fresh, target_rows=rows)

        search = TextSearch(new, CorrectedRetriever(cache, corrector), data.corpus)
        retriever = CorrectedLlamaIndexRetriever(search, similarity_top_k=3)
        for question in QUESTIONS:
            print(f"\n{question}")
            for node in retriever.retrieve(question):
                print(f"  {node.score:.3f}  {node.node_id}")


if __name__ == "__main__":
    main()
