"""A corrector behind its encoder, as a sentence-transformers model, makes the vectors the corrector makes here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import ROWS, random_corrector, random_vectors, run_where_not_installed
from model_helpers import TEXTS, save_bert
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from torch.nn import functional as F
from upgrade_helpers import cache_of, make_data, new_encoder, old_encoder

from hf_corrector.errors import ConfigurationError
from hf_corrector.exports.dense_layers import dense_layers
from hf_corrector.exports.sentence_transformer import save_as_sentence_transformer
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.index_upgrade.upgrading import upgrade
from hf_corrector.models import CorrectorModel, DualEncoderModel

KINDS = ("mean_shift", "procrustes", "affine", "low_rank", "residual_mlp")
CASES: list[tuple[str, int, dict[str, Any]]] = [
    *((kind, 32, {}) for kind in KINDS),
    *((kind, size, {}) for kind in KINDS[1:] for size in (20, 40)),
    *(("residual_mlp", 32, {"activation": name}) for name in ("relu", "gelu", "silu")),
    *((kind, 32, {"normalize_output": False}) for kind in ("affine", "residual_mlp")),
]


def behind_encoder(model: SentenceTransformer, vectors: torch.Tensor) -> torch.Tensor:
    """Send vectors through what stands behind the pooling and the normalisation of the encoder."""
    features = {"sentence_embedding": vectors}
    for module in list(model.children())[3:]:
        features = module(features)
    return features["sentence_embedding"].detach()


@pytest.mark.parametrize(("kind", "dim_out", "settings"), CASES, ids=[f"{k}-{d}-{s}" for k, d, s in CASES])
def test_stock_modules_correct_as_the_corrector_does(
    kind: str, dim_out: int, settings: dict[str, Any], tiny_model: DualEncoderModel, tmp_path: Path
) -> None:
    corrector = random_corrector(kind, 32, dim_out, **settings)
    path = save_as_sentence_transformer(corrector, tmp_path / "st", tiny_model)
    theirs = SentenceTransformer(str(path), device="cpu")
    stale = random_vectors(ROWS, 32)
    assert (behind_encoder(theirs, stale) - corrector.correct(stale)).abs().max() <= 1e-5
    wanted = corrector.correct(tiny_model.encode_target(TEXTS))
    assert torch.allclose(torch.tensor(theirs.encode_document(TEXTS)), wanted, atol=1e-5)
    layers = [module for module in theirs.children() if isinstance(module, Dense)]
    assert len(layers) == (2 if kind == "residual_mlp" else 1)
    assert isinstance(list(theirs.children())[-1], Normalize) == corrector.config.normalize_output


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_skip_connection_passes_through_every_activation(activation: str) -> None:
    for dim_out in (32, 20, 40):
        corrector = random_corrector("residual_mlp", 32, dim_out, activation=activation, normalize_output=False)
        stale = 30 * random_vectors(1000, 32)
        first, second = dense_layers(corrector)
        inside = getattr(F, activation)(F.linear(stale, first.weight, first.bias))
        wanted = corrector.correct(stale)
        assert (F.linear(inside, second.weight, second.bias) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert len(first.weight) == 2 * min(32, dim_out) + 40


def test_identity_leaves_the_encoder_as_it_is(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    path = save_as_sentence_transformer(random_corrector("identity", 32), tmp_path / "st", tiny_model)
    found = SentenceTransformer(str(path), device="cpu").encode_document(TEXTS)
    assert torch.allclose(torch.tensor(found), tiny_model.encode_target(TEXTS), atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("kernel", {}, "kernel"),
        ("affine", {"side": "matrix", "side_dim": 3}, "side features 'matrix'"),
        ("residual_mlp", {"side": "tokens", "side_dim": 9}, "side features 'tokens'"),
    ],
)  # fmt: skip
def test_what_cannot_be_repeated_exactly_is_refused_with_what_to_use(
    kind: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        save_as_sentence_transformer(random_corrector(kind, 32, **settings), tmp_path / "st", "no such encoder")
    assert "save_for_numpy" in str(caught.value) and not (tmp_path / "st").exists()


def sentence_transformer(encoder: str, **settings: Any) -> SentenceTransformer:
    modules = [Transformer(encoder, max_seq_length=12), Pooling(32, "mean"), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu", **settings)


def test_any_sentence_transformers_model_may_stand_before_it(tiny_encoder: str, tmp_path: Path) -> None:
    base = sentence_transformer(tiny_encoder, prompts={"query": "ask: ", "passage": "page: "})
    base.save_pretrained(str(tmp_path / "base"))
    corrector = random_corrector("residual_mlp", 32)
    wanted = corrector.correct(torch.tensor(base.encode(TEXTS, prompt="page: ")))
    for number, given in enumerate((base, str(tmp_path / "base"), tmp_path / "base")):
        path = save_as_sentence_transformer(corrector, tmp_path / str(number), given)
        found = SentenceTransformer(str(path), device="cpu").encode_document(TEXTS)
        assert torch.allclose(torch.tensor(found), wanted, atol=1e-5)


def test_model_in_half_precision_is_written_in_float32_and_left_as_it_was(tiny_encoder: str, tmp_path: Path) -> None:
    base = sentence_transformer(tiny_encoder).bfloat16()
    path = save_as_sentence_transformer(random_corrector("affine", 32), tmp_path / "st", base)
    assert base.dtype == torch.bfloat16
    theirs = SentenceTransformer(str(path), device="cpu")
    wanted = random_corrector("affine", 32).correct(torch.tensor(base.float().encode(TEXTS)))
    assert torch.allclose(torch.tensor(theirs.encode(TEXTS)), wanted, atol=1e-5)


@pytest.mark.parametrize("separate", [False, True])
def test_queries_of_the_new_and_documents_of_the_old_encoder_meet(separate: bool, tmp_path: Path) -> None:
    old = DualEncoderModel.from_encoder(
        save_bert(tmp_path / "old"), target_prompt="page: ", target_max_length=7, separate_towers=separate
    )
    new = DualEncoderModel.from_encoder(save_bert(tmp_path / "new", seed=2), query_prompt="ask: ", projection_dim=20)
    new.save_pretrained(tmp_path / "saved")
    corrector = random_corrector("residual_mlp", 32, 20)
    path = save_as_sentence_transformer(corrector, tmp_path / "st", old, query_model=str(tmp_path / "saved"))
    theirs = SentenceTransformer(str(path), device="cpu")
    assert torch.allclose(torch.tensor(theirs.encode_query(TEXTS)), new.encode_query(TEXTS), atol=1e-5)
    wanted = corrector.correct(old.encode_target(TEXTS))
    assert torch.allclose(torch.tensor(theirs.encode_document(TEXTS)), wanted, atol=1e-5)
    assert theirs.get_embedding_dimension() == 20


def test_mapped_queries_search_documents_of_the_old_encoder(tmp_path: Path) -> None:
    old = DualEncoderModel.from_encoder(save_bert(tmp_path / "old"))
    old.save_as_sentence_transformer(tmp_path / "old-st")
    new = DualEncoderModel.from_encoder(save_bert(tmp_path / "new", seed=2), projection_dim=20)
    corrector = random_corrector("affine", 20, 32)
    path = save_as_sentence_transformer(corrector, tmp_path / "st", new, document_model=tmp_path / "old-st")
    theirs = SentenceTransformer(str(path), device="cpu")
    wanted = corrector.correct(new.encode_query(TEXTS))
    assert torch.allclose(torch.tensor(theirs.encode_query(TEXTS)), wanted, atol=1e-5)
    assert torch.allclose(torch.tensor(theirs.encode_document(TEXTS)), old.encode_target(TEXTS), atol=1e-5)


def test_route_of_a_router_is_taken_out(tiny_encoder: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, save_bert(tmp_path / "other", seed=4))
    model.save_as_sentence_transformer(tmp_path / "base")
    corrector = random_corrector("affine", 32)
    path = save_as_sentence_transformer(corrector, tmp_path / "st", tmp_path / "base")
    found = SentenceTransformer(str(path), device="cpu").encode_document(TEXTS)
    assert torch.allclose(torch.tensor(found), corrector.correct(model.encode_target(TEXTS)), atol=1e-5)


def test_folder_loads_where_this_package_is_not_installed(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    corrector = random_corrector("residual_mlp", 32)
    save_as_sentence_transformer(corrector, tmp_path / "st", tiny_model, query_model=tiny_model)
    script = """
import json, numpy, sys
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("st", device="cpu", trust_remote_code=False)
texts = json.load(open("texts.json"))
numpy.savez("found.npz", queries=model.encode_query(texts), documents=model.encode_document(texts))
print(any(name.startswith("hf_corrector") for name in sys.modules))
"""
    (tmp_path / "texts.json").write_text(str(TEXTS).replace("'", '"'))
    assert run_where_not_installed(script, cwd=tmp_path) == "False\n"
    found = np.load(tmp_path / "found.npz")
    assert np.abs(found["queries"] - tiny_model.encode_query(TEXTS).numpy()).max() <= 1e-5
    wanted = corrector.correct(tiny_model.encode_target(TEXTS)).numpy()
    assert np.abs(found["documents"] - wanted).max() <= 1e-5


def test_other_sizes_and_contradictions_are_refused(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    path = tmp_path / "st"
    with pytest.raises(ConfigurationError, match="vectors of size 20, which the corrector reads"):
        save_as_sentence_transformer(random_corrector("affine", 20), path, tiny_model)
    with pytest.raises(ConfigurationError, match="vectors of size 20, which the corrector makes"):
        save_as_sentence_transformer(random_corrector("affine", 32, 20), path, tiny_model, query_model=tiny_model)
    with pytest.raises(ConfigurationError, match="got both"):
        save_as_sentence_transformer(
            random_corrector("affine", 32), path, tiny_model, query_model=tiny_model, document_model=tiny_model
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ConfigurationError, match="new or empty"):
        save_as_sentence_transformer(random_corrector("affine", 32), tmp_path / "full", tiny_model)


def test_model_that_cuts_its_vectors_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    base = sentence_transformer(tiny_encoder, truncate_dim=8)
    with pytest.raises(ConfigurationError, match="cuts them to 8"):
        save_as_sentence_transformer(random_corrector("affine", 8), tmp_path / "st", base)


@pytest.fixture(scope="module", params=["targets", "queries"])
def upgraded(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    folder, data = tmp_path_factory.mktemp("upgrade"), make_data(targets=120, queries=40)
    old, new = old_encoder(tiny_encoder), new_encoder(tiny_encoder)
    options = UpgradeOptions(kinds=("affine",))
    cache = cache_of(old, data, folder / "cache")
    report = upgrade(cache, new, data, num_pairs=60, kind="affine", side=None, direction=request.param, options=options)
    return report.corrector, old, new


def test_upgrade_exports_what_it_has_fitted(upgraded: Any, tmp_path: Path) -> None:
    corrector, old, new = upgraded
    path = corrector.save_as_sentence_transformer(tmp_path / "st", old, new)
    theirs = SentenceTransformer(str(path), device="cpu")
    queries, documents = new.encode_query(TEXTS), old.encode_target(TEXTS)
    if corrector.direction == "targets":
        documents = corrector.model.correct(documents)
    else:
        queries = corrector.model.correct(queries)
    assert torch.allclose(torch.tensor(theirs.encode_query(TEXTS)), queries, atol=1e-5)
    assert torch.allclose(torch.tensor(theirs.encode_document(TEXTS)), documents, atol=1e-5)
    with pytest.raises(ConfigurationError, match="the encoder the corrector was fitted to"):
        corrector.save_as_sentence_transformer(tmp_path / "other", old, old)


def test_upgrade_of_queries_asks_for_their_encoder(upgraded: Any, tmp_path: Path) -> None:
    corrector, old, _ = upgraded
    if corrector.direction == "queries":
        with pytest.raises(ConfigurationError, match="Give new_model"):
            corrector.save_as_sentence_transformer(tmp_path / "st", old)
    else:
        assert isinstance(corrector.model, CorrectorModel)
        found = SentenceTransformer(str(corrector.save_as_sentence_transformer(tmp_path / "st", old)), device="cpu")
        wanted = corrector.model.correct(old.encode_target(TEXTS))
        assert torch.allclose(torch.tensor(found.encode_document(TEXTS)), wanted, atol=1e-5)
