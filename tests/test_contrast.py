"""What a batch is contrasted with: labels, weights, teachers, given vectors, columns of other processes."""

import pytest
import torch
from model_helpers import HIDDEN, TEXTS
from torch.nn.functional import cross_entropy, kl_div, log_softmax, normalize, softmax

from hf_corrector.batching import pad_tokens
from hf_corrector.errors import ConfigurationError
from hf_corrector.models import DualEncoderModel, SampledTargets

SCALE = 20.0


def padded(model: DualEncoderModel, texts: list[str], role: str = "target") -> dict[str, torch.Tensor]:
    return pad_tokens(model.tokenize(texts, role), model.pad_token_id(role))


def logits_of(output: object) -> torch.Tensor:
    return SCALE * output.query_embeddings @ output.target_embeddings.T


def everything(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool)


def some_vectors(count: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_given_vectors_are_the_columns_and_only_queries_get_a_gradient(tiny_encoder: str) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True).train()
    vectors, labels = some_vectors(9).requires_grad_(), torch.tensor([4, 0, 8])
    sampled = SampledTargets(None, everything(3, 9), labels=labels, vectors=vectors)
    output = model(padded(model, TEXTS[:3], "query"), None, lambda queries: sampled)
    assert torch.equal(output.target_embeddings, vectors)
    assert torch.allclose(output.loss, cross_entropy(logits_of(output), labels))
    output.loss.backward()
    assert vectors.grad is None
    assert {name.split(".")[0] for name, one in model.named_parameters() if one.grad is not None} == {"encoder"}


def test_vectors_beside_targets_to_encode_are_refused(tiny_model: DualEncoderModel) -> None:
    with pytest.raises(ConfigurationError, match="vectors"):
        SampledTargets(padded(tiny_model, TEXTS[:1]), everything(1, 2), vectors=some_vectors(2))
    with pytest.raises(ConfigurationError, match="vectors"):
        SampledTargets(None, everything(1, 2), vectors=some_vectors(2), gather=torch.clone)


def test_forward_needs_positives_or_vectors(tiny_model: DualEncoderModel) -> None:
    queries = padded(tiny_model, TEXTS[:2], "query")
    for candidate_fn in (None, lambda found: SampledTargets(None, everything(2, 2))):
        with pytest.raises(ConfigurationError, match="positives"):
            tiny_model(queries, None, candidate_fn)


def test_columns_may_be_gathered_and_labels_point_into_them(tiny_model: DualEncoderModel) -> None:
    """As another process would: its columns first, then the own ones."""
    others, labels = some_vectors(4), torch.tensor([4, 5, 6])

    def candidate_fn(queries: torch.Tensor) -> SampledTargets:
        return SampledTargets(
            padded(tiny_model, TEXTS[6:8]), everything(3, 9), labels=labels,
            gather=lambda own: torch.cat([others, own]),
        )  # fmt: skip

    tiny_model.train()
    output = tiny_model(padded(tiny_model, TEXTS[:3], "query"), padded(tiny_model, TEXTS[3:6]), candidate_fn)
    expected = torch.cat([others, tiny_model.encode_target(TEXTS[3:8])])
    assert torch.allclose(output.target_embeddings, expected, atol=2e-6)
    assert torch.allclose(output.loss, cross_entropy(logits_of(output), labels))
    output.target_embeddings.retain_grad()
    output.loss.backward()
    assert (output.target_embeddings.grad[4:].abs().sum(dim=1) > 0).all()


def test_label_weights_spread_the_positive_over_several_columns(tiny_model: DualEncoderModel) -> None:
    weights = torch.tensor([[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]])
    sampled = SampledTargets(padded(tiny_model, TEXTS[4:5]), everything(2, 3), label_weights=weights)
    output = tiny_model(padded(tiny_model, TEXTS[:2], "query"), padded(tiny_model, TEXTS[2:4]), lambda queries: sampled)
    assert torch.allclose(output.loss, cross_entropy(logits_of(output), weights), atol=1e-6)


def test_distillation_adds_the_weighted_divergence_from_the_teacher(tiny_model: DualEncoderModel) -> None:
    teacher = torch.tensor([[3.0, 1.0, float("nan")], [0.5, 2.0, 1.0]])
    queries, positives = padded(tiny_model, TEXTS[:2], "query"), padded(tiny_model, TEXTS[2:4])
    sampled = SampledTargets(padded(tiny_model, TEXTS[4:5]), everything(2, 3), teacher_scores=teacher)
    plain = tiny_model(queries, positives, lambda found: sampled)
    taught = tiny_model(
        queries, positives, lambda found: sampled, distillation_weight=0.5, distillation_temperature=2.0
    )
    logits = logits_of(plain)
    divergences = [
        4 * kl_div(log_softmax(logits[row, :seen] / 2, 0), softmax(teacher[row, :seen] / 2, 0), reduction="sum")
        for row, seen in ((0, 2), (1, 3))
    ]
    assert torch.allclose(taught.loss, plain.loss + 0.5 * torch.stack(divergences).mean(), atol=1e-5)
    assert torch.allclose(plain.loss, cross_entropy(logits, torch.arange(2)), atol=1e-6)


def test_without_a_teacher_a_distillation_weight_changes_nothing(tiny_model: DualEncoderModel) -> None:
    tokens = padded(tiny_model, TEXTS[:3])
    assert torch.equal(tiny_model(tokens, tokens, distillation_weight=2.0).loss, tiny_model(tokens, tokens).loss)
