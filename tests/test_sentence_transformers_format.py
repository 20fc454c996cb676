"""A sentence-transformers model read here makes the vectors that package makes itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_helpers import HIDDEN, TEXTS, save_bert, save_encoder, save_llama, save_t5, wordpiece_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)
from torch.nn import Identity
from transformers import AutoModel

from hf_corrector.errors import ConfigurationError
from hf_corrector.models import DualEncoderModel
from hf_corrector.models.sentence_transformers_format import read_settings

LONG = [*TEXTS, " ".join(TEXTS)]
CONFIG, TRANSFORMER_CONFIG = "config_sentence_transformers.json", "sentence_bert_config.json"


def save(path: Path, *modules: torch.nn.Module, **settings: Any) -> str:
    SentenceTransformer(modules=list(modules), device="cpu", **settings).save_pretrained(str(path))
    return str(path)


def edit(path: str, file: str, **changes: Any) -> None:
    """Change a saved configuration, as older releases or other tools would have written it."""
    content = json.loads((Path(path) / file).read_text())
    content.update(changes)
    (Path(path) / file).write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def assert_equal_vectors(path: str, **settings: Any) -> DualEncoderModel:
    theirs, ours = SentenceTransformer(path, device="cpu"), DualEncoderModel.from_sentence_transformer(path, **settings)
    assert torch.allclose(ours.encode_query(LONG), torch.tensor(theirs.encode_query(LONG)), atol=1e-5)
    assert torch.allclose(ours.encode_target(LONG), torch.tensor(theirs.encode_document(LONG)), atol=1e-5)
    return ours


# ---------------------------------------------------------------------- what is repeated


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("mode", ["cls", "mean", "lasttoken", "weightedmean"])
def test_every_pooling_gives_the_same_vectors(tiny_encoder: str, mode: str, normalized: bool, tmp_path: Path) -> None:
    ending = [Normalize()] if normalized else []
    model = assert_equal_vectors(save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, mode), *ending))
    assert model.config.normalize is normalized


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_layer_becomes_the_projection(tiny_encoder: str, bias: bool, normalized: bool, tmp_path: Path) -> None:
    dense = Dense(HIDDEN, 9, bias=bias, activation_function=Identity())
    ending = [Normalize()] if normalized else []
    model = assert_equal_vectors(save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"), dense, *ending))
    assert model.config.projection_dim == model.config.embedding_dim == 9


def test_both_towers_get_the_dense_layer(tiny_encoder: str, tmp_path: Path) -> None:
    dense = Dense(HIDDEN, 9, activation_function=Identity())
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"), dense)
    assert assert_equal_vectors(path, separate_towers=True).target_projection is not None


def test_prompts_of_each_role_are_taken_over(tiny_encoder: str, tmp_path: Path) -> None:
    prompts = {"query": "ask: ", "document": "page: "}
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"), Normalize(), prompts=prompts)
    model = assert_equal_vectors(path)
    assert (model.config.query_prompt, model.config.target_prompt) == ("ask: ", "page: ")


@pytest.mark.parametrize("name", ["passage", "corpus"])
def test_targets_take_the_prompt_that_is_meant_for_them_under_any_of_its_names(
    tiny_encoder: str, name: str, tmp_path: Path
) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"))
    edit(path, CONFIG, prompts={"query": "ask: ", name: "page: "})
    theirs = SentenceTransformer(path, device="cpu").encode(TEXTS, prompt_name=name)
    ours = DualEncoderModel.from_sentence_transformer(path).encode_target(TEXTS)
    assert torch.allclose(ours, torch.tensor(theirs), atol=1e-5)


def test_default_prompt_stands_in_for_roles_that_have_none(tiny_encoder: str, tmp_path: Path) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"))
    edit(path, CONFIG, prompts={"any": "say: "}, default_prompt_name="any")
    theirs = torch.tensor(SentenceTransformer(path, device="cpu").encode(TEXTS))
    ours = DualEncoderModel.from_sentence_transformer(path)
    assert torch.allclose(ours.encode_query(TEXTS), theirs, atol=1e-5)
    assert torch.allclose(ours.encode_target(TEXTS), theirs, atol=1e-5)


@pytest.mark.parametrize("prompts", [None, {}, {"query": None, "document": None}])
def test_absent_prompts_are_empty(tiny_encoder: str, prompts: Any, tmp_path: Path) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"))
    edit(path, CONFIG, prompts=prompts)
    model = DualEncoderModel.from_sentence_transformer(path)
    assert (model.config.query_prompt, model.config.target_prompt) == ("", "")


def test_maximum_length_is_taken_over(tiny_encoder: str, tmp_path: Path) -> None:
    path = save(tmp_path, Transformer(tiny_encoder, max_seq_length=7), Pooling(HIDDEN, "mean"))
    assert assert_equal_vectors(path).config.query_max_length == 7


@pytest.mark.parametrize("file", [TRANSFORMER_CONFIG, "sentence_roberta_config.json"])
def test_maximum_length_is_read_where_older_releases_wrote_it(tiny_encoder: str, file: str, tmp_path: Path) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"))
    (tmp_path / TRANSFORMER_CONFIG).unlink()
    (tmp_path / file).write_text(json.dumps({"max_seq_length": 8, "do_lower_case": False}))
    assert assert_equal_vectors(path).config.target_max_length == 8


def test_lengths_of_each_role_are_taken_over(tiny_encoder: str, tmp_path: Path) -> None:
    transformer = Transformer(tiny_encoder, query_length=4)
    path = save(tmp_path / "query", transformer, Pooling(HIDDEN, "mean"))
    model = assert_equal_vectors(path)
    assert (model.config.query_max_length, model.config.target_max_length) == (4, 64)
    both = Transformer(tiny_encoder, max_seq_length=20, query_length=5, document_length=6)
    model = assert_equal_vectors(save(tmp_path / "both", both, Pooling(HIDDEN, "mean")))
    assert (model.config.query_max_length, model.config.target_max_length) == (5, 6)


@pytest.mark.parametrize("length", [10**30, "absent"])
def test_tokenizer_without_a_limit_is_cut_where_the_positions_end(
    tiny_encoder: str, length: Any, tmp_path: Path
) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"))
    edit(path, "tokenizer_config.json", model_max_length=length)
    assert assert_equal_vectors(path).config.query_max_length == 64


def test_longer_inputs_than_the_default_for_plain_encoders_are_kept(tiny_encoder: str, tmp_path: Path) -> None:
    config = AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False).config
    config.max_position_embeddings = 1000
    tokenizer = wordpiece_tokenizer()
    tokenizer.model_max_length = 900
    encoder = save_encoder(tmp_path / "encoder", AutoModel.from_config(config, add_pooling_layer=False), tokenizer)
    assert DualEncoderModel.from_encoder(encoder).config.query_max_length == 512
    path = save(tmp_path / "model", Transformer(encoder), Pooling(HIDDEN, "mean"))
    assert DualEncoderModel.from_sentence_transformer(path).config.query_max_length == 900


def test_lower_casing_that_is_part_of_the_tokenizer_is_repeated(tmp_path: Path) -> None:
    encoder = save_bert(tmp_path / "encoder", lowercase=False)
    path = save(tmp_path / "model", Transformer(encoder, do_lower_case=True), Pooling(HIDDEN, "mean"))
    shouted = [text.upper() for text in TEXTS]
    theirs = torch.tensor(SentenceTransformer(path, device="cpu").encode(shouted))
    assert torch.allclose(DualEncoderModel.from_sentence_transformer(path).encode_query(shouted), theirs, atol=1e-5)


def test_transformer_in_a_folder_of_its_own_is_found(tiny_encoder: str, tmp_path: Path) -> None:
    path = save(tmp_path, Transformer(tiny_encoder, max_seq_length=9), Pooling(HIDDEN, "mean"))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "0_Transformer").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", TRANSFORMER_CONFIG):
        (tmp_path / file).rename(tmp_path / "0_Transformer" / file)
    assert assert_equal_vectors(path).config.query_max_length == 9


def test_pooling_written_by_older_releases_is_understood(tiny_encoder: str, tmp_path: Path) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"))
    old = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(old))
    assert assert_equal_vectors(path).config.pooling == "cls"


@pytest.mark.parametrize(("encoder", "mode"), [(save_t5, "mean"), (save_llama, "lasttoken")])
def test_other_architectures_give_the_same_vectors(encoder: Callable[[Path], str], mode: str, tmp_path: Path) -> None:
    assert_equal_vectors(
        save(tmp_path / "model", Transformer(encoder(tmp_path / "encoder")), Pooling(HIDDEN, mode), Normalize())
    )


def test_read_model_is_saved_and_loaded_with_the_same_vectors(tiny_encoder: str, tmp_path: Path) -> None:
    dense = Dense(HIDDEN, 9, activation_function=Identity())
    path = save(tmp_path / "theirs", Transformer(tiny_encoder), Pooling(HIDDEN, "cls"), dense, prompts={"query": "q: "})
    model = DualEncoderModel.from_sentence_transformer(path)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(
        DualEncoderModel.from_pretrained(tmp_path / "ours").encode_query(TEXTS), model.encode_query(TEXTS)
    )


def test_settings_of_the_caller_win(tiny_encoder: str, tmp_path: Path) -> None:
    dense = Dense(HIDDEN, 9, activation_function=Identity())
    path = save(tmp_path, Transformer(tiny_encoder, max_seq_length=7), Pooling(HIDDEN, "mean"), dense)
    model = DualEncoderModel.from_sentence_transformer(
        path, pooling="cls", normalize=True, query_max_length=11, projection_dim=5
    )
    found = model.config
    assert (found.pooling, found.normalize, found.query_max_length, found.target_max_length) == ("cls", True, 11, 7)
    assert found.embedding_dim == 5


def test_from_encoder_takes_the_settings_over_too(tiny_encoder: str, tmp_path: Path) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "cls"))
    assert DualEncoderModel.from_encoder(path).config.pooling == "cls"
    assert DualEncoderModel.from_encoder(path).config.normalize is False


# ---------------------------------------------------------------------- what is refused


def test_plain_transformer_is_not_taken_for_one(tiny_encoder: str) -> None:
    assert read_settings(tiny_encoder) is None
    with pytest.raises(ConfigurationError, match=r"modules\.json"):
        DualEncoderModel.from_sentence_transformer(tiny_encoder)


@pytest.mark.parametrize(
    "endings",
    [
        [Pooling(HIDDEN, "max")],
        [Pooling(HIDDEN, ("mean", "cls"))],
        [Pooling(HIDDEN, "mean", include_prompt=False)],
        [Pooling(HIDDEN, "mean"), Dense(HIDDEN, 9)],
        [Pooling(HIDDEN, "mean"), Dense(HIDDEN, HIDDEN, activation_function=Identity(), use_residual=True)],
        [Pooling(HIDDEN, "mean"), Normalize(), Dense(HIDDEN, 9, activation_function=Identity())],
        [Pooling(HIDDEN, "mean"), Dense(HIDDEN, 9, activation_function=Identity()), Dense(9, 9)],
        [Normalize(module_input_name="token_embeddings"), Pooling(HIDDEN, "mean")],
        [Pooling(HIDDEN, "mean"), Normalize(module_input_name="token_embeddings")],
        [Pooling(HIDDEN, "mean"), LayerNorm(HIDDEN)],
        [Pooling(HIDDEN, "mean"), Dropout()],
    ],
    ids=[
        "max", "two poolings", "prompt left out", "tanh", "residual", "normalised before dense", "two dense",
        "token states normalised before", "token states normalised after", "layer norm", "dropout",
    ],
)  # fmt: skip
def test_modules_that_cannot_be_repeated_are_refused(
    tiny_encoder: str, endings: list[torch.nn.Module], tmp_path: Path
) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), *endings)
    with pytest.raises(ConfigurationError, match="sentence-transformers model"):
        DualEncoderModel.from_sentence_transformer(path)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (CONFIG, {"truncate_dim": 8}),
        (TRANSFORMER_CONFIG, {"do_lower_case": True}),
        (TRANSFORMER_CONFIG, {"query_expansion": {"strategy": "fixed", "length": 8}}),
        (TRANSFORMER_CONFIG, {"processing_kwargs": {"text": {"padding": "max_length"}}}),
        (TRANSFORMER_CONFIG, {"modality_config": {"message": {"method": "forward", "method_output_name": "x"}}}),
    ],
    ids=["truncated vectors", "lower-casing", "query expansion", "processing", "chat messages"],
)
def test_settings_that_cannot_be_repeated_are_refused(
    tiny_encoder: str, file: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"))
    edit(path, file, **changes)
    with pytest.raises(ConfigurationError, match="sentence-transformers model"):
        DualEncoderModel.from_sentence_transformer(path)


def test_module_of_another_package_is_refused_though_it_has_a_known_name(tiny_encoder: str, tmp_path: Path) -> None:
    path = save(tmp_path, Transformer(tiny_encoder), Pooling(HIDDEN, "mean"))
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules[0]["type"] = "custom_model.Transformer"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigurationError, match=r"custom_model\.Transformer"):
        DualEncoderModel.from_sentence_transformer(path)
