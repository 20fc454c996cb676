"""A small corpus, its cache by one encoder and a corrector to another, ready to be searched by text."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import torch
from datasets import Dataset

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_retriever import CorrectedRetriever
from hf_corrector.encoding import build_cache
from hf_corrector.integrations.text_search import TextSearch
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = ["list all files", "remove the old archive", "count the words", "copy a folder", "disk space", "sort lines"]
CORPUS = Dataset.from_dict(
    {
        "id": [f"t{row}" for row in range(len(WORDS))],
        "text": WORDS,
        "metadata": [json.dumps({"number": row}) for row in range(len(WORDS))],
    }
)
QUERY = "how to copy a folder"


def affine_corrector(dim: int) -> CorrectorModel:
    """Make a corrector that turns the order of targets around for many queries."""
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=dim))
    corrector.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    return corrector


def text_search(encoder: str, folder: Path, *, corrected: bool = True) -> TextSearch:
    """Build a cache of the corpus and search it, through a corrector or as it is."""
    model = DualEncoderModel.from_encoder(encoder)
    cache: TargetCache = build_cache(model, CORPUS, folder / "cache").cache
    return TextSearch(
        model, CorrectedRetriever(cache, affine_corrector(cache.dim)) if corrected else cache, CORPUS
    )  # fmt: skip


def expected_order(search: TextSearch, query: str) -> list[str]:
    """Return ids by falling inner product of the query with every corrected row."""
    vectors = search.retriever.vectors.gather(torch.arange(len(WORDS)))
    scores = search.retriever.corrector.correct(vectors) @ search.model.encode_query(query)
    return [f"t{row}" for row in scores.argsort(descending=True).tolist()]


def run_example(name: str) -> None:
    """Run a script of the folder examples as if from the command line."""
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
