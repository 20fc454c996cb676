import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_helpers import HIDDEN, TEXTS, save_bert, save_encoder, save_gpt2, save_llama, save_t5, wordpiece_tokenizer
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoConfig, AutoModel, BartConfig, BartModel, BertConfig, BertForMaskedLM

from hf_corrector.batching import pad_tokens
from hf_corrector.errors import ConfigurationError, InputError
from hf_corrector.models import (
    CorrectorConfig,
    CorrectorModel,
    DualEncoderConfig,
    DualEncoderModel,
    DualEncoderOutput,
    SampledTargets,
)
from hf_corrector.models.towers import longest_input, pool

POOLINGS = ("cls", "mean", "last", "weighted_mean")


def build(path: str, **settings: object) -> DualEncoderModel:
    return DualEncoderModel.from_encoder(path, **settings)


def with_corrector(model: DualEncoderModel, kind: str = "affine") -> DualEncoderModel:
    model.corrector = CorrectorModel(CorrectorConfig(kind=kind, input_dim=model.config.embedding_dim))
    model.config.corrector = model.corrector.config
    with torch.no_grad():
        for tensor in model.corrector.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    return model


def padded(model: DualEncoderModel, texts: list[str], role: str = "target") -> dict[str, torch.Tensor]:
    return pad_tokens(model.tokenize(texts, role), model.pad_token_id(role))


def states_of(model: DualEncoderModel, text: str) -> torch.Tensor:
    """Return the token states of one unpadded text, ``(length, dim)``."""
    with torch.no_grad():
        return model.encoder(**padded(model, [text])).last_hidden_state[0]


@pytest.fixture(scope="module")
def other_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another tiny BERT, with other weights and a tokenizer that keeps capitals."""
    return save_bert(tmp_path_factory.mktemp("other") / "encoder", seed=5, lowercase=False)


# ---------------------------------------------------------------------- vectors


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_the_pooled_states_of_the_unpadded_text(tiny_encoder: str, pooling: str, normalized: bool) -> None:
    model = build(tiny_encoder, pooling=pooling, normalize=normalized)
    found = model.encode_target(TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        states = states_of(model, text)
        weights = torch.arange(1, len(states) + 1, dtype=torch.float32)
        expected = {
            "cls": states[0], "mean": states.mean(dim=0), "last": states[-1],
            "weighted_mean": (states * weights[:, None]).sum(dim=0) / weights.sum(),
        }[pooling]  # fmt: skip
        expected = normalize(expected, dim=0) if normalized else expected
        assert torch.allclose(vector, expected, atol=2e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_looks_at_real_tokens_on_whichever_side_the_padding_is(pooling: str) -> None:
    states = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.full((1, 2, 4), 1e4)
    alone = pool(states, torch.ones(1, 3, dtype=torch.int64), pooling)
    right = pool(torch.cat([states, noise], dim=1), torch.tensor([[1, 1, 1, 0, 0]]), pooling)
    left = pool(torch.cat([noise, states], dim=1), torch.tensor([[0, 0, 1, 1, 1]]), pooling)
    assert torch.allclose(right, alone, atol=1e-6)
    assert torch.allclose(left, alone, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_half_precision_states_gives_float32(pooling: str) -> None:
    states = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    assert torch.equal(pool(states, mask, pooling), pool(states.float(), mask, pooling))
    assert pool(states, mask, pooling).dtype == torch.float32


def test_order_and_company_of_texts_do_not_matter(tiny_model: DualEncoderModel) -> None:
    together = tiny_model.encode_target(TEXTS)
    tokens = tiny_model.tokenize(TEXTS, "target")
    assert torch.allclose(tiny_model.encode_tokens(tokens, "target", token_budget=20), together, atol=2e-6)
    assert torch.allclose(tiny_model.encode_target(TEXTS[::-1]).flip(0), together, atol=2e-6)
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.allclose(tiny_model.encode_target(text), vector, atol=2e-6)
    assert len(torch.unique(together, dim=0)) == len(TEXTS)


def test_one_text_is_not_tokenized_letter_by_letter(tiny_model: DualEncoderModel) -> None:
    with pytest.raises(InputError, match="tokenize: expected a list of texts; got 'files'"):
        tiny_model.tokenize("files", "query")


def test_single_text_gives_one_vector_and_none_gives_none(tiny_model: DualEncoderModel) -> None:
    assert tiny_model.encode_query("list all files").shape == (HIDDEN,)
    assert tiny_model.encode_query(["list all files"]).shape == (1, HIDDEN)
    assert tiny_model.encode_query([]).shape == (0, HIDDEN)


def test_prompt_is_put_before_every_text_of_its_role(tiny_encoder: str) -> None:
    plain = build(tiny_encoder)
    prompted = build(tiny_encoder, query_prompt="ask: ", target_prompt="answer: ")
    assert torch.equal(prompted.encode_query(TEXTS), plain.encode_query(["ask: " + text for text in TEXTS]))
    assert torch.equal(prompted.encode_target(TEXTS), plain.encode_target(["answer: " + text for text in TEXTS]))
    assert not torch.allclose(prompted.encode_query(TEXTS), plain.encode_query(TEXTS), atol=1e-2)
    assert not torch.allclose(prompted.encode_query(TEXTS), prompted.encode_target(TEXTS), atol=1e-2)


def test_texts_are_cut_to_the_maximum_length_of_their_role(tiny_encoder: str) -> None:
    model = build(tiny_encoder, query_max_length=4, target_max_length=6)
    assert max(len(tokens) for tokens in model.tokenize(TEXTS, "query")) == 4
    assert max(len(tokens) for tokens in model.tokenize(TEXTS, "target")) == 6
    assert all(tokens[0] == 2 and tokens[-1] == 3 for tokens in model.tokenize(TEXTS, "query"))


def test_text_without_tokens_is_refused(tmp_path: Path) -> None:
    model = build(save_gpt2(tmp_path / "gpt2"))
    with pytest.raises(InputError, match="text 1"):
        model.encode_query(["list", ""])


def test_projection_is_a_linear_layer_between_pooling_and_normalisation(tiny_encoder: str) -> None:
    model = build(tiny_encoder, projection_dim=7)
    pooled = build(tiny_encoder, normalize=False).encode_target(TEXTS)
    assert model.config.embedding_dim == 7
    assert torch.allclose(model.encode_target(TEXTS), normalize(model.projection(pooled).detach(), dim=1), atol=1e-6)


def test_encoding_restores_the_training_mode_and_uses_none(tiny_encoder: str) -> None:
    model = build(tiny_encoder, encoder_dropout=0.5)
    expected = model.encode_query(TEXTS)
    model.train()
    assert torch.equal(model.encode_query(TEXTS), expected)
    assert model.training
    assert model.encoder.training


def test_encoded_vectors_may_be_used_in_training(tiny_model: DualEncoderModel) -> None:
    torch.nn.Linear(HIDDEN, 2)(tiny_model.encode_query(TEXTS)).sum().backward()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_arithmetic_gives_float32_vectors_near_the_exact_ones(
    tiny_model: DualEncoderModel, dtype: str
) -> None:
    exact, half = tiny_model.encode_target(TEXTS), tiny_model.encode_target(TEXTS, compute_dtype=dtype)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert (half * exact).sum(dim=1).min() > 0.99


@pytest.mark.parametrize("projection_dim", [None, 7])
def test_model_of_half_precision_weights_encodes(tiny_encoder: str, projection_dim: int | None) -> None:
    model = build(tiny_encoder, projection_dim=projection_dim)
    exact = model.encode_target(TEXTS)
    half = model.to(torch.bfloat16).encode_target(TEXTS)
    assert half.dtype == torch.float32
    assert (half * exact).sum(dim=1).min() > 0.99


# ---------------------------------------------------------------------- training and cache agree


@pytest.mark.parametrize("projection_dim", [None, 7])
def test_re_encoding_in_training_mode_equals_the_cached_row(tiny_encoder: str, projection_dim: int | None) -> None:
    model = build(tiny_encoder, projection_dim=projection_dim)
    rows = model.encode_target(TEXTS)
    model.train()
    again = model.embed(padded(model, TEXTS), "target")
    assert again.requires_grad
    assert torch.allclose((rows * again).sum(dim=1), torch.ones(len(TEXTS)), atol=1e-6)


def test_dropout_is_off_by_default_and_comes_back_when_asked_for(tiny_encoder: str) -> None:
    assert AutoConfig.from_pretrained(tiny_encoder).hidden_dropout_prob == 0.1
    model = build(tiny_encoder)
    assert model.config.encoder.hidden_dropout_prob == model.config.encoder.attention_probs_dropout_prob == 0.0
    noisy = build(tiny_encoder, encoder_dropout=0.3)
    assert noisy.config.encoder.hidden_dropout_prob == 0.3
    rows = noisy.encode_target(TEXTS)
    again = noisy.train().embed(padded(noisy, TEXTS), "target")
    assert (rows * again).sum(dim=1).min() < 0.99


def test_forward_computes_the_in_batch_softmax_loss(tiny_model: DualEncoderModel) -> None:
    tiny_model.train()
    queries, positives = padded(tiny_model, TEXTS[:4], "query"), padded(tiny_model, TEXTS[4:8])
    output = tiny_model(queries, positives)
    scores = output.query_embeddings @ output.target_embeddings.T
    assert torch.allclose(output.loss, cross_entropy(20.0 * scores, torch.arange(4)))
    assert torch.allclose(output.query_embeddings, tiny_model.encode_query(TEXTS[:4]), atol=1e-6)
    assert torch.allclose(output.target_embeddings, tiny_model.encode_target(TEXTS[4:8]), atol=1e-6)


def sampled_step(model: DualEncoderModel, *, log_proposal: torch.Tensor | None = None) -> DualEncoderOutput:
    queries, positives, extra = padded(model, TEXTS[:3], "query"), padded(model, TEXTS[3:6]), padded(model, TEXTS[6:10])
    allowed = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    seen: list[torch.Tensor] = []

    def candidates(query_embeddings: torch.Tensor) -> SampledTargets:
        seen.append(query_embeddings)
        return SampledTargets(extra, allowed, log_proposal)

    output = model(queries, positives, candidates)
    assert len(seen) == 1
    assert not seen[0].requires_grad
    assert torch.equal(seen[0], output.query_embeddings)
    logits = 20.0 * output.query_embeddings @ output.target_embeddings.T
    own = torch.eye(3, 7, dtype=torch.bool)
    if log_proposal is not None:
        logits = torch.where(own, logits, logits - log_proposal)
    logits = logits.masked_fill(~(allowed | own), float("-inf"))
    assert torch.allclose(output.loss, cross_entropy(logits, torch.arange(3)), atol=1e-6)
    return output


def test_forward_contrasts_each_query_with_its_positive_and_its_allowed_targets(tiny_model: DualEncoderModel) -> None:
    output = sampled_step(tiny_model.train())
    assert torch.allclose(output.target_embeddings, tiny_model.encode_target(TEXTS[3:10]), atol=1e-6)
    sampled_step(tiny_model, log_proposal=torch.randn(3, 7, generator=torch.Generator().manual_seed(2)))


def test_forward_sends_gradient_into_queries_positives_and_sampled_targets(tiny_model: DualEncoderModel) -> None:
    output = sampled_step(tiny_model.train())
    output.query_embeddings.retain_grad()
    output.target_embeddings.retain_grad()
    output.loss.backward()
    assert output.query_embeddings.grad.abs().sum(dim=1).min() > 0
    assert (output.target_embeddings.grad.abs().sum(dim=1) > 0)[:3].all()
    assert (output.target_embeddings.grad.abs().sum(dim=1) > 0)[3:].any()


def test_forward_without_further_targets_still_asks_which_columns_count(tiny_model: DualEncoderModel) -> None:
    tokens = padded(tiny_model, TEXTS[:3])
    alone = tiny_model(tokens, tokens, lambda queries: SampledTargets(None, torch.eye(3, dtype=torch.bool)))
    assert alone.loss.item() == 0.0


def test_scores_and_loss_stay_float32_under_autocast(tiny_encoder: str) -> None:
    model = build(tiny_encoder, projection_dim=7).train()
    tokens = padded(model, TEXTS[:4])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(tokens, tokens)
    assert output.query_embeddings.dtype == output.target_embeddings.dtype == output.loss.dtype == torch.float32
    scores = output.query_embeddings @ output.target_embeddings.T
    assert torch.allclose(output.loss, cross_entropy(20.0 * scores, torch.arange(4)), atol=1e-6)
    assert torch.allclose(output.query_embeddings.norm(dim=1), torch.ones(4), atol=1e-6)


def test_every_weight_of_a_tower_gets_a_gradient(tiny_model: DualEncoderModel) -> None:
    tokens = padded(tiny_model, TEXTS[:4])
    tiny_model.train()(tokens, tokens).loss.backward()
    assert [name for name, one in tiny_model.named_parameters() if one.grad is None] == []


# ---------------------------------------------------------------------- towers


def test_towers_are_shared_by_default(tiny_model: DualEncoderModel) -> None:
    assert tiny_model.target_encoder is tiny_model.encoder
    assert torch.equal(tiny_model.encode_query(TEXTS), tiny_model.encode_target(TEXTS))


def test_separate_towers_start_equal_and_learn_apart(tiny_encoder: str) -> None:
    model = build(tiny_encoder, separate_towers=True, projection_dim=5)
    assert model.target_encoder is not model.encoder
    with torch.no_grad():
        model.target_projection.load_state_dict(model.projection.state_dict())
    assert torch.equal(model.encode_query(TEXTS), model.encode_target(TEXTS))
    before = model.encode_query(TEXTS)
    with torch.no_grad():
        model.separate_target_encoder.embeddings.word_embeddings.weight.mul_(2)
    assert torch.equal(model.encode_query(TEXTS), before)
    assert not torch.allclose(model.encode_target(TEXTS), before, atol=1e-3)


def test_two_encoders_keep_their_own_weights_and_tokenizers(tiny_encoder: str, other_encoder: str) -> None:
    model = build(tiny_encoder, target_name=other_encoder)
    assert torch.equal(model.encode_query(TEXTS), build(tiny_encoder).encode_query(TEXTS))
    capitals = ["List All Files", *TEXTS]
    assert torch.equal(model.encode_target(capitals), build(other_encoder).encode_target(capitals))
    assert model.tokenize(["List"], "query") != model.tokenize(["List"], "target")


def test_each_tower_brings_its_own_longest_input(tiny_encoder: str, tmp_path: Path) -> None:
    config = BertConfig.from_pretrained(tiny_encoder, max_position_embeddings=16)
    short = save_encoder(tmp_path / "short", AutoModel.from_config(config), wordpiece_tokenizer())
    model = build(tiny_encoder, target_name=short)
    assert (model.config.query_max_length, model.config.target_max_length) == (64, 16)
    assert model.encode_target("word " * 50).shape == (HIDDEN,)


def test_longest_input_is_what_tokenizer_and_positions_allow(tiny_encoder: str) -> None:
    config, tokenizer = AutoConfig.from_pretrained(tiny_encoder), wordpiece_tokenizer()
    assert longest_input(config, tokenizer) == 64
    tokenizer.model_max_length = 20
    assert longest_input(config, tokenizer) == 20
    tokenizer.model_max_length = 10**30
    assert longest_input(config, tokenizer) == 64
    config.max_position_embeddings = -1
    assert longest_input(config, tokenizer) == 2**31 - 1


def test_first_layers_alone_make_a_smaller_tower(tiny_encoder: str) -> None:
    model = build(tiny_encoder, num_hidden_layers=1)
    assert model.config.encoder.num_hidden_layers == len(model.encoder.encoder.layer) == 1
    assert not torch.allclose(model.encode_query(TEXTS), build(tiny_encoder).encode_query(TEXTS), atol=1e-2)
    for layers in (0, 3):
        with pytest.raises(ConfigurationError, match="num_hidden_layers"):
            build(tiny_encoder, num_hidden_layers=layers)


@pytest.mark.parametrize(("save", "pooling"), [(save_gpt2, "last"), (save_llama, "last"), (save_t5, "mean")])
def test_decoders_and_encoders_of_seq2seq_models_are_towers(
    save: Callable[[Path], str], pooling: str, tmp_path: Path
) -> None:
    model = build(save(tmp_path / "encoder"), pooling=pooling)
    vectors = model.encode_target(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert torch.allclose(model.encode_target(text), vector, atol=2e-6)
    model.train()
    tokens = padded(model, TEXTS[:4])
    model(tokens, tokens).loss.backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(DualEncoderModel.from_pretrained(tmp_path / "saved").encode_target(TEXTS), vectors)


def test_checkpoint_with_a_language_modelling_head_is_a_tower(tiny_encoder: str, tmp_path: Path) -> None:
    head = BertForMaskedLM(AutoConfig.from_pretrained(tiny_encoder))
    head.bert.load_state_dict(AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False).state_dict())
    model = build(save_encoder(tmp_path / "mlm", head, wordpiece_tokenizer()))
    assert torch.equal(model.encode_query(TEXTS), build(tiny_encoder).encode_query(TEXTS))


def test_architecture_that_yields_no_token_states_by_itself_is_refused(tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=240, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
        decoder_attention_heads=1, encoder_ffn_dim=8, decoder_ffn_dim=8,
    )  # fmt: skip
    path = save_encoder(tmp_path / "bart", BartModel(config), wordpiece_tokenizer())
    with pytest.raises(ConfigurationError, match="bart"):
        build(path)


# ---------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("settings", [
    {}, {"pooling": "cls", "normalize": False, "query_prompt": "q: ", "target_max_length": 5},
    {"projection_dim": 7}, {"separate_towers": True, "projection_dim": 7}, {"num_hidden_layers": 1},
])  # fmt: skip
def test_saved_and_loaded_model_makes_the_same_vectors_bit_for_bit(
    tiny_encoder: str, settings: dict[str, object], tmp_path: Path
) -> None:
    model = build(tiny_encoder, **settings)
    model.save_pretrained(tmp_path)
    loaded = DualEncoderModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode_query(TEXTS), model.encode_query(TEXTS))
    assert torch.equal(loaded.encode_target(TEXTS), model.encode_target(TEXTS))
    for role in ("query", "target"):
        assert loaded.fingerprint(role).digest == model.fingerprint(role).digest
    assert not loaded.training


def test_model_of_two_encoders_is_saved_with_both_tokenizers(
    tiny_encoder: str, other_encoder: str, tmp_path: Path
) -> None:
    model = build(tiny_encoder, target_name=other_encoder)
    model.save_pretrained(tmp_path)
    loaded = DualEncoderModel.from_pretrained(tmp_path)
    capitals = ["List All Files", *TEXTS]
    assert torch.equal(loaded.encode_query(capitals), model.encode_query(capitals))
    assert torch.equal(loaded.encode_target(capitals), model.encode_target(capitals))


@pytest.mark.parametrize("kind", ["identity", "mean_shift", "affine", "residual_mlp"])
def test_corrector_is_saved_inside_and_by_itself(tiny_model: DualEncoderModel, kind: str, tmp_path: Path) -> None:
    model = with_corrector(tiny_model, kind)
    model.save_pretrained(tmp_path)
    stale = model.encode_target(TEXTS)
    expected = model.corrector(stale)
    assert torch.equal(DualEncoderModel.from_pretrained(tmp_path).corrector(stale), expected)
    assert torch.equal(CorrectorModel.from_pretrained(tmp_path / "corrector")(stale), expected)


def test_auto_classes_know_the_dual_encoder(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DualEncoderConfig)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert isinstance(loaded, DualEncoderModel)
    assert torch.equal(loaded.encode_query(TEXTS), tiny_model.encode_query(TEXTS))


def test_loading_in_half_precision_leaves_the_corrector_in_float32(
    tiny_model: DualEncoderModel, tmp_path: Path
) -> None:
    model = with_corrector(tiny_model)
    model.save_pretrained(tmp_path)
    loaded = DualEncoderModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.encoder.dtype == torch.bfloat16
    assert torch.equal(loaded.corrector.weight, model.corrector.weight)
    assert torch.equal(model.to(torch.bfloat16).corrector.weight, loaded.corrector.weight)


def drop_a_weight(folder: Path) -> str:
    """Remove one tensor of the last layer from a checkpoint and return its name."""
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in sorted(weights) if "layer.1" in key)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return name


def test_encoder_checkpoint_with_missing_weights_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "broken")
    name = drop_a_weight(tmp_path / "broken")
    with pytest.raises(ConfigurationError, match=name):
        build(str(tmp_path / "broken"))


def test_dual_encoder_checkpoint_with_missing_weights_is_refused(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    name = drop_a_weight(tmp_path)
    with pytest.raises(ConfigurationError, match=name):
        DualEncoderModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{"poolling": "mean"}, {"encoder": None}, {"corrector": None}, {"dtype": "x"}])
def test_unknown_settings_are_refused(tiny_encoder: str, settings: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(settings))):
        build(tiny_encoder, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pooling", "max"), ("scale", 0.0), ("scale", -1.0), ("scale", float("nan")), ("query_max_length", 0),
        ("target_max_length", 0), ("projection_dim", 0), ("encoder_dropout", -0.1), ("encoder_dropout", 1.0),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(tiny_encoder: str, name: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=name):
        build(tiny_encoder, **{name: value})


def test_model_without_tokenizer_says_so(tiny_model: DualEncoderModel) -> None:
    bare = DualEncoderModel(tiny_model.config)
    with pytest.raises(ConfigurationError, match="tokenizer"):
        bare.encode_query("a")


def test_everything_that_changes_a_vector_is_in_the_saved_configuration(tiny_encoder: str, tmp_path: Path) -> None:
    settings = {
        "pooling": "last", "normalize": False, "query_prompt": "q: ", "target_prompt": "t: ", "query_max_length": 7,
        "target_max_length": 9, "projection_dim": 5, "scale": 3.0, "encoder_dropout": 0.2,
    }  # fmt: skip
    build(tiny_encoder, **settings).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in settings} == settings


# ---------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_prompt": "passage: "}, "prompt"), ({"target_max_length": 9}, "max_length"),
        ({"pooling": "cls"}, "pooling"), ({"normalize": False}, "normalize"), ({"num_hidden_layers": 1}, "weights"),
        ({"projection_dim": 4}, "weights"),
    ],
)  # fmt: skip
def test_fingerprint_changes_with_what_changes_the_vectors(
    tiny_encoder: str, settings: dict[str, object], named: str
) -> None:
    plain, changed = build(tiny_encoder).fingerprint("target"), build(tiny_encoder, **settings).fingerprint("target")
    assert changed.digest != plain.digest
    assert [one.split(":")[0] for one in changed.differences(plain)] == [named]


def test_fingerprint_changes_with_a_single_bit_of_a_weight(tiny_model: DualEncoderModel) -> None:
    before = tiny_model.fingerprint("target")
    weight = tiny_model.encoder.encoder.layer[1].output.dense.weight
    with torch.no_grad():
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(9.0))
    assert [one.split(":")[0] for one in tiny_model.fingerprint("target").differences(before)] == ["weights"]


def test_fingerprint_changes_with_tokenizer_role_and_arithmetic(tiny_encoder: str, other_encoder: str) -> None:
    model = build(tiny_encoder)
    before = model.fingerprint("target")
    assert model.fingerprint("query").differences(before) == ["role: 'query' / 'target'"]
    half = model.fingerprint("target", compute_dtype="bfloat16")
    assert half.differences(before) == ["compute_dtype: 'bfloat16' / 'float32'"]
    model.target_tokenizer = build(other_encoder).tokenizer
    assert [one.split(":")[0] for one in model.fingerprint("target").differences(before)] == ["tokenizer"]


def test_fingerprint_changes_with_the_side_that_is_cut_off(tiny_encoder: str) -> None:
    model = build(tiny_encoder, target_max_length=5)
    before, vectors = model.fingerprint("target"), model.encode_target(TEXTS)
    model.target_tokenizer.truncation_side = "left"
    assert not torch.allclose(model.encode_target(TEXTS), vectors, atol=1e-3)
    assert model.fingerprint("target").digest != before.digest


def test_fingerprint_does_not_change_with_name_use_scale_dropout_or_corrector(
    tiny_encoder: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "renamed")
    before = build(tiny_encoder).fingerprint("target")
    model = build(str(tmp_path / "renamed"), scale=5.0, encoder_dropout=0.1, query_prompt="only for queries")
    model.encode_target(TEXTS)
    model.tokenizer(TEXTS, padding=True, truncation=True, max_length=7)
    with_corrector(model).train()
    found = model.fingerprint("target")
    assert found.name != before.name
    assert found.digest == before.digest
    assert found.differences(before) == []


def test_fingerprint_of_one_tower_ignores_the_other(tiny_encoder: str) -> None:
    model = build(tiny_encoder, separate_towers=True)
    query, target = model.fingerprint("query"), model.fingerprint("target")
    with torch.no_grad():
        model.encoder.embeddings.word_embeddings.weight.mul_(2)
    assert model.fingerprint("target").digest == target.digest
    assert model.fingerprint("query").digest != query.digest
