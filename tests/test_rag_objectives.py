"""Each objective against its equation in float64, and the marginal against transformers' own RAG."""

from __future__ import annotations

import pytest
import torch
from transformers import BartConfig, DPRConfig, RagConfig, RagSequenceForGeneration

from hf_corrector.errors import ConfigurationError
from hf_corrector.rag.objectives import (
    JointReading,
    LossParts,
    Objective,
    emdr2,
    generator_only,
    leave_one_out,
    log_softmax_over,
    marginal,
    marginal_log_likelihood,
    perplexity_distillation,
)
from hf_corrector.rag.reader_inputs import IGNORED, ReaderBatch
from hf_corrector.rag.reading import answer_log_likelihoods

MASK = torch.tensor([[True, True, True], [True, False, True], [False, True, True]])
SCALE, TEMPERATURE, WEIGHT = 7.0, 2.0, 0.5


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores, likelihoods = torch.randn(2, 3, 3, generator=generator)
    return scores.requires_grad_(), (4 * likelihoods - 20).requires_grad_()


def prior_of(row: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(SCALE * row[kept].double())
    return weights / weights.sum()


def losses(name: str, scores: torch.Tensor, likelihoods: torch.Tensor, mask: torch.Tensor) -> LossParts:
    log_prior = log_softmax_over(scores, mask, SCALE)
    match name:
        case "marginal":
            return marginal(log_prior, likelihoods, mask)
        case "generator_only":
            return generator_only(log_prior, likelihoods, mask)
        case "emdr2":
            return emdr2(log_prior, likelihoods, mask, reader_weight=WEIGHT)
        case "perplexity_distillation":
            return perplexity_distillation(
                log_prior, likelihoods, mask, temperature=TEMPERATURE, reader_weight=WEIGHT
            )  # fmt: skip
    joint = JointReading(likelihoods.mean(dim=1), likelihoods)
    return leave_one_out(log_prior, joint, mask, temperature=TEMPERATURE, reader_weight=WEIGHT)


def reference(name: str, row: torch.Tensor, likelihoods: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the loss of one query, as its equation is written."""
    prior, found = prior_of(row, kept), likelihoods[kept].double()
    marginal_loss = -torch.log((prior * found.exp()).sum())
    reader = -(prior * found).sum()
    teacher = torch.exp(found / TEMPERATURE) / torch.exp(found / TEMPERATURE).sum()
    if name in ("marginal", "generator_only"):
        return marginal_loss
    if name == "emdr2":
        return marginal_loss + WEIGHT * reader
    if name == "leave_one_out":
        whole = likelihoods.double().mean()
        helped = torch.exp((whole - found) / TEMPERATURE)
        teacher, reader = helped / helped.sum(), -whole
    return (teacher * torch.log(teacher / prior)).sum() + WEIGHT * reader


NAMES = ["marginal", "generator_only", "emdr2", "perplexity_distillation", "leave_one_out"]


@pytest.mark.parametrize("name", NAMES)
def test_each_objective_is_its_equation(name: str) -> None:
    scores, likelihoods = inputs()
    found = losses(name, scores, likelihoods, MASK).loss
    assert found.dtype == torch.float32
    for query in range(3):
        wanted = reference(name, scores[query], likelihoods[query], MASK[query])
        assert found[query].item() == pytest.approx(wanted.item(), rel=1e-5), query


@pytest.mark.parametrize("name", NAMES)
def test_gradients_stop_where_the_objective_says(name: str) -> None:
    scores, likelihoods = inputs()
    losses(name, scores, likelihoods, MASK).loss.sum().backward()
    assert (scores.grad is not None) == (name != "generator_only")
    assert likelihoods.grad is not None and likelihoods.grad.isfinite().all()
    if scores.grad is not None:
        assert scores.grad.isfinite().all() and scores.grad.abs().sum() > 0
        assert (scores.grad[~MASK] == 0).all()
    if name != "leave_one_out":
        assert (likelihoods.grad[~MASK] == 0).all()


def test_the_retriever_of_emdr2_gets_the_gradient_of_the_marginal_and_the_reader_does_not() -> None:
    found = {}
    for name in ("marginal", "emdr2"):
        scores, likelihoods = inputs()
        losses(name, scores, likelihoods, MASK).loss.sum().backward()
        found[name] = (scores.grad, likelihoods.grad)
    assert torch.allclose(found["marginal"][0], found["emdr2"][0], atol=1e-6)
    prior = log_softmax_over(inputs()[0], MASK, SCALE).exp()
    assert torch.allclose(found["emdr2"][1], -WEIGHT * prior, atol=1e-6)


def test_everything_is_computed_in_float32_under_autocast() -> None:
    scores, likelihoods = inputs()
    plain = losses("marginal", scores, likelihoods, MASK).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = losses("marginal", scores, likelihoods, MASK).loss
    assert torch.equal(plain, under)


def test_leaving_out_the_only_passage_is_refused() -> None:
    scores, likelihoods = inputs()
    with pytest.raises(ConfigurationError, match="at least two passages"):
        losses("leave_one_out", scores, likelihoods, torch.tensor([[True, False, False]] * 3))


@pytest.mark.parametrize("wrong", [{"name": "rag"}, {"temperature": 0.0}, {"reader_weight": -1.0}])
def test_objectives_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="objective"):
        Objective(**wrong)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rag() -> RagSequenceForGeneration:
    """A tiny real RAG of transformers: a BART reads what a DPR would find."""
    torch.manual_seed(0)
    bart = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, init_std=0.5,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    dpr = DPRConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    return RagSequenceForGeneration(RagConfig.from_question_encoder_generator_configs(dpr, bart, n_docs=3)).eval()


@pytest.mark.parametrize("length", [2, 4])
def test_the_marginal_is_that_of_transformers_where_it_keeps_the_prior(
    rag: RagSequenceForGeneration, length: int
) -> None:
    """Answers of two tokens and more; of one, transformers 5.23 adds the prior to a token that is padding."""
    generator = torch.Generator().manual_seed(2)
    contexts = torch.randint(3, 50, (6, 7), generator=generator)
    scores = torch.randn(2, 3, generator=generator)
    targets = torch.randint(3, 50, (2, 1 + length), generator=generator)
    targets[:, 0] = 2
    with torch.no_grad():
        theirs = rag(
            context_input_ids=contexts, context_attention_mask=torch.ones_like(contexts), doc_scores=scores,
            decoder_input_ids=targets, labels=targets, n_docs=3, reduce_loss=False,
        ).loss  # fmt: skip
        each = targets.repeat_interleave(3, dim=0)
        batch = ReaderBatch(contexts, torch.ones_like(contexts), each[:, 1:], each[:, :-1])
        likelihoods = answer_log_likelihoods(rag.rag.generator, batch).view(2, 3)
        mask = torch.ones(2, 3, dtype=torch.bool)
        ours = -marginal_log_likelihood(log_softmax_over(scores, mask, 1.0), likelihoods, mask)
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_transformers_loses_the_prior_of_answers_of_one_token(rag: RagSequenceForGeneration) -> None:
    """If this fails, upstream has mended it, and the test above can take answers of one token too."""
    logits = torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(3))
    targets = torch.tensor([[2, 7]])
    losses = [rag.get_nll(logits, torch.tensor([scores]), targets, n_docs=3) for scores in ([0.0, 0, 0], [9.0, 0, 0])]
    assert torch.equal(losses[0], losses[1])


def test_ignored_labels_count_nothing() -> None:
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORED
