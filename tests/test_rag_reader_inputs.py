"""Prompts, answers and labels in tokens: what is cut, what never is, what is predicted."""

from __future__ import annotations

import pytest
import torch
from model_helpers import byte_bpe_tokenizer
from rag_helpers import KINDS, generator_of, rag_of

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.rag.reader_inputs import IGNORED, ReaderFormat

DECODER = ReaderFormat(
    opening=(1,), between=(2, 2), closing=(3,), question_first=False, separator=(9,), pad=0, end=7, start=None,
    prompt_room=14, answer_room=4,
)  # fmt: skip


def test_a_prompt_holds_question_and_passages_in_the_order_of_the_template() -> None:
    assert DECODER.prompt([20, 21], [[30, 31], [40]]) == [1, 30, 31, 9, 40, 2, 2, 20, 21, 3]
    assert DECODER.prompt([20], []) == [1, 2, 2, 20, 3]


def test_passages_are_cut_first_each_to_the_same_length_then_the_question() -> None:
    long = [list(range(100, 120)), [50], list(range(200, 220))]
    prompt = DECODER.prompt([20, 21], long)
    assert len(prompt) == 14
    assert prompt == [1, 100, 101, 9, 50, 9, 200, 201, 202, 2, 2, 20, 21, 3]
    assert DECODER.prompt(list(range(60, 90)), long) == [1, 2, 2, *range(60, 70), 3]


def test_a_decoder_predicts_the_answer_and_nothing_else() -> None:
    batch = DECODER.batch([[1, 2, 3], [1]], [[5, 6, 7], [8, 7]])
    assert batch.input_ids.tolist() == [[1, 2, 3, 5, 6], [1, 8, 0, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 5, 6, 7], [8, 7, IGNORED, IGNORED, IGNORED]]
    assert batch.decoder_input_ids is None


@pytest.mark.parametrize("kind", KINDS)
def test_answers_end_and_come_back_as_texts(tiny_encoder: str, kind: str) -> None:
    reader = rag_of(tiny_encoder, kind).reader
    tokens = reader.answers(["list files", "who"])
    assert all(one[-1] == reader.format.end and reader.format.end not in one[:-1] for one in tokens)
    if reader.format.start is not None:
        assert all(one[0] != reader.format.start for one in tokens)
    prompt = reader.format.prompt(reader.questions(["who is"])[0], reader.passages(["disk space"]))
    if reader.format.start is None:
        assert reader.format.end not in prompt


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_long_passages_never_push_an_answer_out(tiny_encoder: str, kind: str) -> None:
    model = rag_of(tiny_encoder, kind, reader_max_length=48, answer_max_length=20)
    style, answer = model.reader.format, model.reader.answers(["sort lines by number"])[0]
    prompt = style.prompt(model.reader.questions(["how"])[0], model.reader.passages(["word " * 500]))
    batch = style.batch([prompt], [answer])
    assert len(prompt) == style.prompt_room
    assert batch.labels[batch.labels != IGNORED].tolist() == answer
    assert batch.input_ids.shape[1] <= 48


def test_answers_too_long_or_empty_are_refused_by_number(tiny_encoder: str) -> None:
    reader = rag_of(tiny_encoder, answer_max_length=4).reader
    with pytest.raises(DataError, match="answer 1: expected at most 4 tokens"):
        reader.answers(["a", "print the last ten lines of it"])
    with pytest.raises(DataError, match="answer 0: expected text"):
        reader.answers([" "])


def test_answers_the_tokenizer_drops_are_refused_as_they_would_teach_silence(tiny_encoder: str) -> None:
    with pytest.raises(
        DataError, match=r"answer 1: expected text the reader's tokenizer has tokens for; got '\\u200b'"
    ):
        rag_of(tiny_encoder, "bert2bert").reader.answers(["list", "\u200b"])
    # Of bytes nothing is dropped.
    assert len(rag_of(tiny_encoder, "gpt2").reader.answers(["\u200b"])[0]) > 1


def test_templates_and_lengths_that_cannot_work_are_refused(tiny_encoder: str) -> None:
    with pytest.raises(ConfigurationError, match=r"one \{question\} and one \{passage\}"):
        rag_of(tiny_encoder, prompt="{question}?")
    with pytest.raises(ConfigurationError, match="answer_max_length"):
        rag_of(tiny_encoder, answer_max_length=600)
    with pytest.raises(ConfigurationError, match="room for a question"):
        rag_of(tiny_encoder, prompt="{passage}" + " many words" * 20 + "{question}", reader_max_length=40)
    with pytest.raises(ConfigurationError, match="at most the reader's 128 positions"):
        rag_of(tiny_encoder, reader_max_length=400)
    with pytest.raises(ConfigurationError, match="answer_lenght"):
        rag_of(tiny_encoder, answer_lenght=3)


def test_tokens_that_start_and_end_answers_must_be_known(tiny_encoder: str) -> None:
    from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
    from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel

    retriever = DualEncoderModel.from_encoder(tiny_encoder)
    generator, _ = generator_of("gpt2")
    tokenizer = byte_bpe_tokenizer(end_token=False)
    tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match="a token that ends an answer"):
        RetrievalAugmentedModel.from_parts(retriever, generator, tokenizer)
    generator, tokenizer = generator_of("bert2bert")
    generator.config.decoder_start_token_id = None
    with pytest.raises(ConfigurationError, match="decoder_start_token_id"):
        RetrievalAugmentedModel.from_parts(retriever, generator, tokenizer)


def test_padding_is_any_token_where_the_tokenizer_has_none(tiny_encoder: str) -> None:
    model = rag_of(tiny_encoder, "gpt2")
    assert model.reader_tokenizer.pad_token_id is None
    assert model.reader.format.pad == model.reader.format.end
    batch = model.reader.format.batch([[5, 6, 7], [5]], [[8, 1], [9, 1]])
    assert torch.equal(batch.attention_mask.sum(dim=1), torch.tensor([4, 2]))
