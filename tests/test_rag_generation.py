"""Answers and their passages, weighed as the equation says."""

from __future__ import annotations

import math

import pytest
import torch
from rag_helpers import ANSWERS, KINDS, PASSAGES, QUESTIONS, rag_of

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import TensorVectors
from hf_corrector.rag.generation import GenerationOptions
from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel
from hf_corrector.rag.passages import NearestPassages, closed_book


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tiny_encoder: str) -> RetrievalAugmentedModel:
    model: RetrievalAugmentedModel = rag_of(tiny_encoder, request.param, answer_max_length=6)
    return model


def nearest(model: RetrievalAugmentedModel, k: int = 3) -> NearestPassages:
    vectors = TensorVectors(model.retriever.encode_target(PASSAGES))
    return NearestPassages(vectors, model.reader.passages(PASSAGES), k=k)


def test_thorough_answers_are_weighed_under_all_passages(model: RetrievalAugmentedModel) -> None:
    answered = model.generate(QUESTIONS, nearest(model), options=GenerationOptions(batch_size=4))
    scores = model.retriever.encode_query(QUESTIONS) @ model.retriever.encode_target(PASSAGES).T
    for number, found in enumerate(answered):
        order = scores[number].topk(3)
        assert found.rows == tuple(order.indices.tolist())
        wanted = torch.log_softmax(model.retriever.config.scale * order.values, dim=0)
        assert found.log_prior == pytest.approx(wanted.tolist(), abs=1e-4)
        assert [one.log_prob for one in found.answers] == sorted((one.log_prob for one in found.answers), reverse=True)
        assert len({one.text for one in found.answers}) == len(found.answers) <= 3
        for one in found.answers:
            assert sum(math.exp(value) for value in one.passage_log_probs) == pytest.approx(1.0)
        best = max(range(3), key=lambda place: found.best.passage_log_probs[place])
        assert found.passage_row == found.rows[best]


def test_greedy_answers_are_the_readers_most_likely_tokens(model: RetrievalAugmentedModel) -> None:
    """Against a loop without padding or cache, one prompt at a time."""
    (found,) = model.generate(QUESTIONS[:1], nearest(model, 1))
    style, start = model.reader.format, model.reader.format.start
    prompt = style.prompt(model.reader.questions(QUESTIONS[:1])[0], model.reader.passages([PASSAGES[found.rows[0]]]))
    written: list[int] = []
    total = 0.0
    while len(written) < style.answer_room and style.end not in written:
        with torch.no_grad():
            if start is None:
                logits = model.generator(input_ids=torch.tensor([prompt + written])).logits[0, -1]
            else:
                decoder = torch.tensor([[start, *written]])
                logits = model.generator(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0, -1]
        log_probs = torch.log_softmax(logits.double(), dim=-1)
        written.append(int(log_probs.argmax()))
        total += float(log_probs.max())
    assert found.best.text == model.reader.decode([written])[0]
    assert found.best.log_prob == pytest.approx(total, rel=1e-4)
    assert found.log_prior == (0.0,)


def test_given_answers_are_weighed_as_the_equation_says(model: RetrievalAugmentedModel) -> None:
    if model.reader.format.answer_room < 16:
        model.config.answer_max_length, model._reader = 16, None
    model.train()
    found = model.answer_log_likelihoods(QUESTIONS, ANSWERS, nearest(model), options=GenerationOptions(batch_size=2))
    assert model.training
    model.eval()
    wanted = torch.log((found.log_prior.double().exp() * found.per_passage.double().exp()).sum(dim=1))
    assert torch.allclose(found.marginal.double(), wanted, atol=1e-4)
    for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        alone = model.answer_log_likelihoods([question], [answer], nearest(model))
        assert torch.allclose(found.marginal[number : number + 1], alone.marginal, atol=1e-3)
        assert torch.equal(found.rows[number : number + 1], alone.rows)
    assert found.answer_tokens.tolist() == [len(one) for one in model.reader.answers(ANSWERS)]


def test_fast_answers_come_from_one_prompt_with_all_passages(model: RetrievalAugmentedModel) -> None:
    answered = model.generate(QUESTIONS, nearest(model), options=GenerationOptions("fast", num_beams=2))
    assert [len(found.answers) for found in answered] == [1, 1, 1]
    for found in answered:
        assert found.best.passage_log_probs == found.log_prior and found.passage_row == found.rows[0]
        assert found.best.log_prob < 0


def test_closed_book_reads_the_question_alone(tiny_encoder: str) -> None:
    model = rag_of(tiny_encoder, "gpt2")
    found = model.answer_log_likelihoods(QUESTIONS, ANSWERS, closed_book)
    style, reader = model.reader.format, model.reader
    prompts = [style.prompt(question, []) for question in reader.questions(QUESTIONS)]
    with torch.no_grad():
        wanted = model.read(prompts, reader.answers(ANSWERS))
    assert torch.allclose(found.marginal, wanted, atol=1e-4)
    assert found.rows.tolist() == [[-1]] * 3 and found.log_prior.tolist() == [[0.0]] * 3


def test_long_passages_are_read_as_far_as_they_fit(tiny_encoder: str) -> None:
    model = rag_of(tiny_encoder, "gpt2", reader_max_length=40, answer_max_length=8)
    texts = ["word " * 300, "disk space " * 200]
    view = TensorVectors(model.retriever.encode_target(texts))
    find = NearestPassages(view, model.reader.passages(texts), k=5)
    for method in ("thorough", "fast"):
        (found,) = model.generate(["how " * 100], find, options=GenerationOptions(method))
        assert len(found.rows) == 2 and math.isfinite(found.best.log_prob)


def test_nothing_to_read_and_wrong_arguments_are_refused(tiny_encoder: str) -> None:
    model = rag_of(tiny_encoder, "gpt2")
    empty = NearestPassages(TensorVectors(torch.zeros(0, 32)), [], k=2)
    with pytest.raises(DataError, match="at least one retrieved target"):
        model.generate(QUESTIONS, empty)
    with pytest.raises(DataError, match="2 for 3"):
        model.answer_log_likelihoods(QUESTIONS, ANSWERS[:2], closed_book)
    with pytest.raises(ConfigurationError, match="k of at least 1"):
        NearestPassages(TensorVectors(torch.zeros(2, 32)), [[1], [2]], k=0)
    with pytest.raises(ConfigurationError, match="as many passages as vectors"):
        NearestPassages(TensorVectors(torch.zeros(2, 32)), [[1]], k=1)
    with pytest.raises(ConfigurationError, match="a method among"):
        GenerationOptions("quick")


def test_one_text_is_not_taken_for_a_list_of_letters(tiny_encoder: str) -> None:
    model = rag_of(tiny_encoder)
    with pytest.raises(DataError, match="questions: expected a list of texts; got one text"):
        model.generate("abc", nearest(model))
    with pytest.raises(DataError, match="answers: expected a list of texts"):
        model.answer_log_likelihoods(["a", "b"], "xy", nearest(model))


def test_a_readers_own_wishes_for_more_answers_do_not_break_ours(tiny_encoder: str) -> None:
    model = rag_of(tiny_encoder)
    plain = model.generate(QUESTIONS, nearest(model), options=GenerationOptions(num_beams=2))
    model.generator.generation_config.num_return_sequences = 2
    model.generator.generation_config.return_dict_in_generate = True
    assert model.generate(QUESTIONS, nearest(model), options=GenerationOptions(num_beams=2)) == plain
