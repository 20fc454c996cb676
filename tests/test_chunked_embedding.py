"""Chunked encoding equals encoding at once: loss, gradients, precision, with less memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import BERT, HIDDEN, POSITIONS, TEXTS, save_gpt2
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from hf_corrector.batching import pad_tokens
from hf_corrector.errors import ConfigurationError
from hf_corrector.models import DualEncoderModel, DualEncoderOutput, SampledTargets
from hf_corrector.models.chunked_embedding import embed_in_chunks

Gradients = dict[str, torch.Tensor]


def padded(model: DualEncoderModel, texts: list[str], role: str = "target") -> dict[str, torch.Tensor]:
    return pad_tokens(model.tokenize(texts, role), model.pad_token_id(role))


def step(model: DualEncoderModel, *, mini_batch_size: int | None, seed: int = 0) -> tuple[DualEncoderOutput, Gradients]:
    """Do one step on texts of many lengths, with sampled targets, and return its output and gradients."""
    torch.manual_seed(seed)
    queries, positives, extra = padded(model, TEXTS[:5], "query"), padded(model, TEXTS[5:10]), padded(model, TEXTS[10:])
    columns = 5 + len(TEXTS) - 10
    allowed = torch.rand(5, columns, generator=torch.Generator().manual_seed(1)) < 0.7
    model.zero_grad()
    output = model(queries, positives, lambda found: SampledTargets(extra, allowed), mini_batch_size=mini_batch_size)
    output.loss.backward()
    return output, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def flat(gradients: Gradients) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def assert_same(left: Gradients, right: Gradients, *, rtol: float = 5e-6) -> None:
    """Compare in norm, with the rounding of float32: five more columns of padding alone move a plain step by 4e-6.

    That nothing but rounding differs is what the test in float64 shows.
    """
    assert left.keys() == right.keys()
    assert (flat(left) - flat(right)).norm() <= rtol * flat(right).norm()


# ---------------------------------------------------------------------- the function


def test_chunks_are_sorted_by_length_cut_to_their_longest_and_put_back_in_order() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    ids = torch.arange(25).reshape(5, 5)
    seen = []

    def embed(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(tuple(tokens["input_ids"].shape))
        return (tokens["input_ids"] * tokens["attention_mask"]).sum(dim=1, keepdim=True).float()

    found = embed_in_chunks(embed, {"input_ids": ids, "attention_mask": mask}, 2)
    assert seen == [(2, 4), (2, 2), (1, 1)]
    assert torch.equal(found, (ids * mask).sum(dim=1, keepdim=True).float())


@pytest.mark.parametrize("size", [0, -1])
def test_chunks_without_texts_are_refused(tiny_model: DualEncoderModel, size: int) -> None:
    tokens = padded(tiny_model, TEXTS[:2])
    with pytest.raises(ConfigurationError, match="mini_batch_size"):
        tiny_model(tokens, tokens, mini_batch_size=size)


# ---------------------------------------------------------------------- the same step


@pytest.mark.parametrize("settings", [{}, {"separate_towers": True, "projection_dim": 7}, {"pooling": "cls"}])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_chunked_step_equals_the_plain_one(tiny_encoder: str, settings: dict[str, object], size: int) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, **settings).train()
    plain, gradients = step(model, mini_batch_size=None)
    chunked, again = step(model, mini_batch_size=size)
    assert torch.allclose(chunked.loss, plain.loss, atol=1e-6)
    assert torch.allclose(chunked.target_embeddings, plain.target_embeddings, atol=1e-6)
    assert_same(again, gradients)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_in_float64_gradients_are_exact(size: int) -> None:
    torch.manual_seed(0)
    tower = BertModel(bert_without_dropout(), add_pooling_layer=False).double().train()
    tokens = halves(slice(0, 8))[0]
    wanted = torch.randn(8, HIDDEN, dtype=torch.float64)

    def embed(chunk: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = chunk["attention_mask"].double()[..., None]
        return normalize((tower(**chunk).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1), dim=1)

    def gradients_of(embeddings: torch.Tensor) -> Gradients:
        tower.zero_grad()
        (20 * (embeddings * wanted).sum(dim=1)).logsumexp(dim=0).backward()
        return {name: one.grad.clone() for name, one in tower.named_parameters()}

    plain = gradients_of(embed(tokens))
    chunked = gradients_of(embed_in_chunks(embed, tokens, size))
    for name, expected in plain.items():
        assert torch.allclose(chunked[name], expected, atol=1e-12, rtol=1e-12), name


def test_chunked_step_of_a_causal_decoder_equals_the_plain_one(tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(save_gpt2(tmp_path / "gpt2"), pooling="last").train()
    plain, gradients = step(model, mini_batch_size=None)
    chunked, again = step(model, mini_batch_size=2)
    assert torch.allclose(chunked.loss, plain.loss, atol=1e-6)
    assert_same(again, gradients)


def test_chunked_step_equals_the_plain_one_under_autocast(tiny_model: DualEncoderModel) -> None:
    tiny_model.train()
    _, exact = step(tiny_model, mini_batch_size=None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, gradients = step(tiny_model, mini_batch_size=None)
        chunked, again = step(tiny_model, mini_batch_size=3)
    assert torch.allclose(chunked.loss, plain.loss, rtol=2e-2)
    off_plain, off_chunked = flat(gradients) - flat(exact), flat(again) - flat(exact)
    assert off_plain.norm() > 1e-4 * flat(exact).norm()
    assert off_chunked.norm() < 1.5 * off_plain.norm()


def test_chunked_step_with_dropout_is_reproducible(tiny_encoder: str) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, encoder_dropout=0.3).train()
    first, gradients = step(model, mini_batch_size=3)
    second, again = step(model, mini_batch_size=3)
    assert torch.equal(first.loss, second.loss)
    assert_same(again, gradients, rtol=0.0)
    assert not torch.allclose(step(model, mini_batch_size=3, seed=1)[0].loss, first.loss)


def test_dropout_of_a_chunk_is_drawn_again_for_its_gradient() -> None:
    """If the second pass drew other noise, the gradient would be of another function than the loss."""
    weight = torch.ones(6, requires_grad=True)

    def embed(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.dropout(weight[tokens["input_ids"][:, 0]], 0.5, training=True)[:, None]

    ids = torch.arange(6)[:, None]
    found = embed_in_chunks(embed, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 2)
    found.sum().backward()
    assert torch.equal(weight.grad, found[:, 0])
    assert set(found.flatten().tolist()) == {0.0, 2.0}


# ---------------------------------------------------------------------- memory


def saved_bytes(model: DualEncoderModel, tokens: dict[str, torch.Tensor], mini_batch_size: int | None) -> int:
    """Count the bytes of activations that wait for the backward pass when the forward pass is done."""
    parameters = {one.data_ptr() for one in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(tokens, tokens, mini_batch_size=mini_batch_size).loss
    loss.backward()
    return sum(kept.values())


def long_batch(model: DualEncoderModel) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 200, (64, POSITIONS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_chunks_keep_no_activations(tiny_model: DualEncoderModel) -> None:
    tiny_model.train()
    tokens = long_batch(tiny_model)
    plain, chunked = saved_bytes(tiny_model, tokens, None), saved_bytes(tiny_model, tokens, 4)
    assert chunked < plain / 20


def test_gradient_checkpointing_reaches_both_towers_and_works_inside_of_chunks(tiny_encoder: str) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True).train()
    tokens = long_batch(model)
    plain_bytes = saved_bytes(model, tokens, None)
    plain, gradients = step(model, mini_batch_size=None)
    model.activation_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.encoder.encoder.layer)
    assert all(layer.gradient_checkpointing for layer in model.separate_target_encoder.encoder.layer)
    assert saved_bytes(model, tokens, None) < plain_bytes / 3
    for size in (None, 3):
        checkpointed, again = step(model, mini_batch_size=size)
        assert torch.allclose(checkpointed.loss, plain.loss, atol=1e-6)
        assert_same(again, gradients)


# ---------------------------------------------------------------------- what the above compute with


def bert_without_dropout() -> BertConfig:
    return BertConfig(**{**BERT.to_dict(), "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})


def halves(rows: slice) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    lengths = torch.tensor([3, 9, 5, 14, 2, 7, 11, 4])
    ids = torch.randint(5, 200, (2, 8, 14), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(14) < lengths[:, None]).long()
    queries, targets = ({"input_ids": one[rows], "attention_mask": mask[rows]} for one in ids)
    return queries, targets
