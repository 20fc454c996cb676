"""A small upgrade that pays: the old encoder is the new one behind a linear map that spoils its rankings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel

WORDS = [
    "list", "remove", "count", "copy", "show", "find", "sort", "print", "compress", "change", "replace", "download",
    "files", "folder", "archive", "words", "lines", "process", "port", "drop", "duplicates", "file", "number", "name",
    "all", "old", "last", "ten", "dates", "links", "page",
]  # fmt: skip
TARGETS, QUERIES = 400, 120


def sentence(generator: torch.Generator, length: int = 7) -> str:
    return " ".join(WORDS[one] for one in torch.randint(len(WORDS), (length,), generator=generator).tolist())


def make_data(*, targets: int = TARGETS, queries: int = QUERIES, site_in: str = "queries") -> RetrievalData:
    """Make targets of random words, and queries that repeat most words of one."""
    generator = torch.Generator().manual_seed(0)
    texts = [sentence(generator) for _ in range(targets)]
    corpus = Dataset.from_dict({
        "id": [f"t{row}" for row in range(targets)], "text": texts,
        "metadata": [json.dumps({"site": "ab"[row % 2], "date": f"{2020 + row % 2}-05-01"}) for row in range(targets)],
    })  # fmt: skip

    def split(first: int, name: str) -> Dataset:
        rows = list(range(first, first + queries))
        return Dataset.from_dict({
            "query_id": [f"{name}{row}" for row in rows],
            "query": [" ".join([*texts[row].split()[:-1], WORDS[row % len(WORDS)]]) for row in rows],
            "positive_ids": [[f"t{row}"] for row in rows], "positive_grades": [[1.0]] * queries,
            "metadata": [
                json.dumps({"site": "xy"[row % 2] if row % 20 else "rare"}) if site_in == "queries" else "{}"
                for row in rows
            ],
        })  # fmt: skip

    return RetrievalData(corpus=corpus, train=split(queries, "q"), dev=None, test=split(0, "p"))


def new_encoder(tiny_encoder: str, *, dim: int = 32) -> DualEncoderModel:
    """Return the new encoder, whose projection is the identity or an orthogonal map to fewer dimensions."""
    return projected(tiny_encoder, torch.eye(32)[:dim])


def old_encoder(tiny_encoder: str, *, strength: float = 12.0, seed: int = 0) -> DualEncoderModel:
    """Return the old encoder: some directions count too much, and all are turned a little."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator))
    scales = torch.ones(32)
    scales[:3] = strength
    skew = 0.1 * torch.randn(32, 32, generator=generator)
    turned = torch.linalg.matrix_exp(skew - skew.T)
    return projected(tiny_encoder, turned @ basis @ torch.diag(scales) @ basis.T)


def projected(tiny_encoder: str, weight: torch.Tensor) -> DualEncoderModel:
    model = DualEncoderModel.from_encoder(tiny_encoder, projection_dim=len(weight))
    with torch.no_grad():
        model.projection.weight.copy_(weight)
        model.projection.bias.zero_()
    return model


def cache_of(model: DualEncoderModel, data: RetrievalData, path: Path, **settings: Any) -> TargetCache:
    return build_cache(model, data.corpus, path, options=EncodeOptions(progress=False, **settings)).cache
