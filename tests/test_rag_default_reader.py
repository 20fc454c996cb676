"""The reader made of an encoder: whose weights it starts from, what it writes, and that it learns to read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import save_gpt2, save_t5, wordpiece_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertModel,
    EncoderDecoderModel,
)

from hf_corrector._extras import demo_encoder
from hf_corrector.errors import ConfigurationError
from hf_corrector.models import DualEncoderModel
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.default_reader import cross_attention_names, default_reader


def test_both_halves_start_from_the_encoder_and_the_rest_from_what_is_near(tiny_encoder: str) -> None:
    state = torch.get_rng_state()
    reader, _ = default_reader(tiny_encoder)
    assert torch.equal(torch.get_rng_state(), state)
    known = dict(AutoModel.from_pretrained(tiny_encoder).named_parameters())
    halves = {"encoder": dict(reader.encoder.named_parameters()), "decoder": dict(reader.decoder.named_parameters())}
    assert all(torch.equal(weight, known[name]) for name, weight in halves["encoder"].items() if "pooler" not in name)
    new = {name for name in halves["decoder"] if name.removeprefix("bert.") not in known}
    assert {name for name in new if "crossattention" not in name} == {
        "cls.predictions.bias", "cls.predictions.transform.dense.weight", "cls.predictions.transform.dense.bias",
        "cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias",
    }  # fmt: skip
    assert all(
        torch.equal(weight, known[name.removeprefix("bert.")])
        for name, weight in halves["decoder"].items() if name not in new
    )  # fmt: skip
    assert cross_attention_names(reader) == {f"decoder.{name}" for name in new if "crossattention" in name}
    for name in cross_attention_names(reader):
        itself = name.replace(".crossattention.", ".attention.")
        assert torch.equal(reader.get_parameter(name), reader.get_parameter(itself)), name
    dense = reader.decoder.cls.predictions.transform.dense
    assert torch.equal(dense.weight, torch.eye(len(dense.weight)))
    assert not dense.bias.any()
    other = default_reader(tiny_encoder, seed=1)[0]
    assert all(torch.equal(a, b) for a, b in zip(reader.decoder.parameters(), other.decoder.parameters(), strict=True))


def test_a_layer_before_the_vocabulary_that_the_encoder_brings_is_kept(tiny_encoder: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_encoder)
    written = BertForMaskedLM(config)
    written.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_encoder).save_pretrained(tmp_path)
    reader, _ = default_reader(str(tmp_path))
    known = written.cls.predictions.transform.dense.weight
    assert torch.equal(reader.decoder.cls.predictions.transform.dense.weight, known)


def test_fewer_layers_are_the_first_ones_of_both_halves(tiny_encoder: str) -> None:
    reader, _ = default_reader(tiny_encoder, num_hidden_layers=1)
    assert reader.config.encoder.num_hidden_layers == reader.config.decoder.num_hidden_layers == 1
    whole = AutoModel.from_pretrained(tiny_encoder)
    first = reader.decoder.bert.encoder.layer[0].attention.self.query.weight
    assert torch.equal(first, whole.encoder.layer[0].attention.self.query.weight)


def test_saved_and_loaded_it_is_the_same_with_its_tokenizer_and_special_tokens(
    tiny_encoder: str, tmp_path: Path
) -> None:
    reader, tokenizer = default_reader(tiny_encoder)
    reader.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, EncoderDecoderModel) and not info["missing_keys"] and not info["unexpected_keys"]
    inputs = tokenizer(["list all files", "ping"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    written = [one.generate(**inputs, max_new_tokens=4, do_sample=False) for one in (reader, loaded)]
    assert torch.equal(*written) and written[0].shape[1] <= 5
    again = AutoTokenizer.from_pretrained(tmp_path)
    for settings in (loaded.config, loaded.generation_config):
        assert (settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id) == (
            again.cls_token_id, again.sep_token_id, again.pad_token_id,
        )  # fmt: skip
    labels = torch.tensor([again("copy a folder")["input_ids"][1:]])
    shifted = loaded.prepare_decoder_input_ids_from_labels(labels)
    assert shifted[0, 0] == again.cls_token_id and torch.equal(shifted[0, 1:], labels[0, :-1])


def test_answers_are_written_as_they_are_read(tmp_path: Path) -> None:
    _, tokenizer = default_reader(num_hidden_layers=1)
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("read_all", "__init_subclass__", "_x", "1990-91", "don't", "12,000", "3.5 km", "a, b. c"):
            assert one.decode(one(text)["input_ids"], skip_special_tokens=True) == text


def test_it_learns_to_copy_what_it_reads(tiny_encoder: str) -> None:
    reader, tokenizer = default_reader(tiny_encoder)
    texts = ["list all files", "remove the old archive", "ping", "copy a folder", "disk space", "compress a folder"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    labels = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
    optimizer = torch.optim.Adam(reader.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = reader(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_a_pooler_stays_frozen_when_it_is_composed_and_when_it_is_loaded(tiny_encoder: str, tmp_path: Path) -> None:
    """No reader uses it: asking for gradients that never come, it would stop training over several processes."""
    reader, tokenizer = default_reader(tiny_encoder)
    reader.save_pretrained(tmp_path / "reader")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "reader")
    assert again.encoder.pooler.dense.weight.requires_grad, "loading forgets it"
    model = RetrievalAugmentedModel.from_parts(DualEncoderModel.from_encoder(tiny_encoder), again, tokenizer)
    model.save_pretrained(str(tmp_path / "model"))
    for one in (model, RetrievalAugmentedModel.from_pretrained(str(tmp_path / "model"))):
        assert {name for name, weight in one.named_parameters() if not weight.requires_grad} == {
            "generator.encoder.pooler.dense.weight", "generator.encoder.pooler.dense.bias",
        }  # fmt: skip


def test_the_demo_encoder_is_the_default() -> None:
    reader, tokenizer = default_reader(num_hidden_layers=2)
    words = AutoModel.from_pretrained(demo_encoder()).get_input_embeddings().weight
    assert torch.equal(reader.encoder.get_input_embeddings().weight, words)
    assert torch.equal(reader.get_output_embeddings().weight, words) and len(tokenizer) == 30522
    # The pooler is there to be read back, and not to be trained.
    assert {name for name, one in reader.named_parameters() if not one.requires_grad} == {
        "encoder.pooler.dense.weight", "encoder.pooler.dense.bias",
    }  # fmt: skip


def test_encoders_that_cannot_be_decoders_are_refused_before_any_weight_is_read(
    tiny_encoder: str, tmp_path: Path
) -> None:
    tiny = DistilBertConfig(vocab_size=99, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    DistilBertModel(tiny).save_pretrained(tmp_path / "distil")
    wordpiece_tokenizer().save_pretrained(tmp_path / "distil")
    for name in (str(tmp_path / "distil"), save_t5(tmp_path / "t5")):
        with pytest.raises(ConfigurationError, match="expected an encoder that can be a decoder"):
            default_reader(name)
    with pytest.raises(ConfigurationError, match="expected a fast tokenizer with tokens for start"):
        default_reader(save_gpt2(tmp_path / "gpt2"))
    with pytest.raises(ConfigurationError, match="expected 1 to 2; got 3"):
        default_reader(tiny_encoder, num_hidden_layers=3)
