"""A dual encoder written for sentence-transformers makes the same vectors there, and comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import TEXTS, save_bert, save_gpt2, save_llama, save_t5
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer

from hf_corrector.errors import ConfigurationError
from hf_corrector.models import DualEncoderModel

LONG = [*TEXTS, " ".join(TEXTS)]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"pooling": "cls", "normalize": False, "query_prompt": "ask: ", "target_prompt": "page: "},
    {"pooling": "last", "projection_dim": 9},
    {"pooling": "weighted_mean", "projection_dim": 40, "normalize": False},
    {"query_max_length": 5, "target_max_length": 9},
    {"query_max_length": 6, "target_max_length": 6},
    {"separate_towers": True, "query_max_length": 5, "target_max_length": 9, "query_prompt": "ask: "},
    {"separate_towers": True, "projection_dim": 9, "pooling": "cls"},
]


def export(model: DualEncoderModel, path: Path) -> SentenceTransformer:
    return SentenceTransformer(str(model.save_as_sentence_transformer(path)), device="cpu")


def assert_same(model: DualEncoderModel, theirs: SentenceTransformer) -> None:
    assert torch.allclose(torch.tensor(theirs.encode_query(LONG)), model.encode_query(LONG), atol=1e-5)
    assert torch.allclose(torch.tensor(theirs.encode_document(LONG)), model.encode_target(LONG), atol=1e-5)


def moved_apart(model: DualEncoderModel) -> DualEncoderModel:
    """Give a separate target tower and projections weights of their own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for part in (model.separate_target_encoder, model.target_projection, model.projection):
            for weight in [] if part is None else part.parameters():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_vectors_are_the_same_and_stay_so_on_the_way_back(
    tiny_encoder: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = moved_apart(DualEncoderModel.from_encoder(tiny_encoder, **settings))
    assert_same(model, export(model, tmp_path / "st"))
    again = DualEncoderModel.from_sentence_transformer(str(tmp_path / "st"))
    assert torch.allclose(again.encode_query(LONG), model.encode_query(LONG), atol=1e-5)
    assert torch.allclose(again.encode_target(LONG), model.encode_target(LONG), atol=1e-5)
    wanted = {name: value for name, value in settings.items() if name != "separate_towers"}
    assert {name: getattr(again.config, name) for name in wanted} == wanted


@pytest.mark.parametrize("encoder", [save_gpt2, save_llama, save_t5])
def test_other_architectures_go_along(encoder: Callable[[Path], str], tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(encoder(tmp_path / "encoder"), pooling="mean")
    assert_same(model, export(model, tmp_path / "st"))
    assert model.tokenizer is not None and (model.tokenizer.pad_token is None) == (encoder is save_gpt2)


def test_two_different_encoders_become_two_routes(tiny_encoder: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, save_bert(tmp_path / "other", seed=5))
    assert_same(model, export(model, tmp_path / "st"))


def test_nothing_is_said_of_missing_weights(
    tiny_model: DualEncoderModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model.save_as_sentence_transformer(tmp_path / "st")
    SentenceTransformer(str(tmp_path / "st"), device="cpu")
    assert "MISSING" not in caplog.text
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "st").rglob("*.json"))


@pytest.mark.parametrize(("normalize", "name"), [(True, "cosine"), (False, "dot")])
def test_vectors_are_compared_as_they_were_trained(
    tiny_encoder: str, normalize: bool, name: str, tmp_path: Path
) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, normalize=normalize)
    assert export(model, tmp_path).similarity_fn_name == name


def test_model_itself_is_left_as_it_was(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    before = tiny_model.fingerprint("target")
    tiny_model.save_as_sentence_transformer(tmp_path)
    assert tiny_model.fingerprint("target") == before


def test_model_under_an_adapter_is_refused_until_it_is_merged(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_model, LoraConfig(target_modules=r"encoder.*query", init_lora_weights=False))
    with pytest.raises(ConfigurationError, match="merge_and_unload"):
        tiny_model.save_as_sentence_transformer(tmp_path / "st")
    merged = adapted.merge_and_unload()
    assert_same(merged, export(merged, tmp_path / "st"))


def test_folder_in_use_is_refused(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="new or empty"):
        tiny_model.save_as_sentence_transformer(tmp_path)


def test_router_with_other_routes_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True)
    path = model.save_as_sentence_transformer(tmp_path)
    file = path / "router_config.json"
    config = json.loads(file.read_text())
    config["structure"]["image"] = config["structure"].pop("query")
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigurationError, match="image"):
        DualEncoderModel.from_sentence_transformer(str(path))


def test_routes_that_pool_differently_are_refused(tiny_encoder: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True)
    path = model.save_as_sentence_transformer(tmp_path)
    file = path / "query_1_Pooling" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pooling_mode": "cls"}))
    with pytest.raises(ConfigurationError, match="pooling"):
        DualEncoderModel.from_sentence_transformer(str(path))
