"""From tokens of questions, passages and answers to what a reader reads, without touching a text or a model.

A prompt is put together from tokens: the template's words, the question and the passages are tokenised each by
themselves, once, so that a step tokenises nothing. Where a prompt is too long, passages are cut at their end, each to
the same length, and only when nothing is left of them the question; answers are never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_corrector.batching import pad_tokens
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.rag.configuration_rag import RetrievalAugmentedConfig

IGNORED = -100


@dataclass(frozen=True)
class ReaderBatch:
    """Prompts and answers of a reader, padded on the right.

    Attributes:
        input_ids: Prompts; of a decoder prompts and answers. ``(n, length)`` int64.
        attention_mask: 1 for real tokens, ``(n, length)``.
        labels: The next token at every place the reader is to predict one, −100 elsewhere: ``(n, answer)`` for an
            encoder-decoder, ``(n, length)`` for a decoder, where it belongs to the output at that place.
        decoder_input_ids: What an encoder-decoder's decoder reads, ``(n, answer)``; None for a decoder.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    decoder_input_ids: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, chosen: torch.Tensor) -> ReaderBatch:
        """Return some rows, cut on the right to the longest of them."""
        width = int(self.attention_mask[chosen].sum(dim=1).max())
        answer = width
        if self.decoder_input_ids is not None:
            answer = int((self.labels[chosen] != IGNORED).sum(dim=1).max())
        decoder = None if self.decoder_input_ids is None else self.decoder_input_ids[chosen, :answer]
        return ReaderBatch(
            self.input_ids[chosen, :width], self.attention_mask[chosen, :width], self.labels[chosen, :answer], decoder
        )

    def to(self, device: torch.device | str) -> ReaderBatch:
        """Return the same on a device."""
        decoder = None if self.decoder_input_ids is None else self.decoder_input_ids.to(device)
        return ReaderBatch(
            self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), decoder
        )  # fmt: skip


@dataclass(frozen=True)
class ReaderFormat:
    """How a reader is prompted, in tokens.

    Attributes:
        opening: Before the first of question and passage.
        between: Between them.
        closing: After the second.
        question_first: Whether the question comes first.
        separator: Between passages.
        pad: What short rows are padded with; it is masked, so any token would do.
        end: The token that ends an answer.
        start: The token an encoder-decoder's answers start from; None for a decoder.
        prompt_room: Tokens of a prompt, at most.
        answer_room: Tokens of an answer, its end included, at most.
    """

    opening: tuple[int, ...]
    between: tuple[int, ...]
    closing: tuple[int, ...]
    question_first: bool
    separator: tuple[int, ...]
    pad: int
    end: int
    start: int | None
    prompt_room: int
    answer_room: int

    @property
    def field_room(self) -> int:
        """Tokens of question and passages together, at most."""
        return self.prompt_room - len(self.opening) - len(self.between) - len(self.closing)

    def prompt(self, question: Sequence[int], passages: Sequence[Sequence[int]]) -> list[int]:
        """Put a question and some passages, or none, into the template, cutting passages first and answers never."""
        question = list(question)[: self.field_room]
        room = self.field_room - len(question) - len(self.separator) * max(0, len(passages) - 1)
        lengths = _shares([len(one) for one in passages], max(room, 0))
        joined: list[int] = []
        for number, (passage, length) in enumerate(zip(passages, lengths, strict=True)):
            joined += [*(self.separator if number else ()), *passage[:length]]
        joined = joined[: self.field_room - len(question)]
        first, second = (question, joined) if self.question_first else (joined, question)
        return [*self.opening, *first, *self.between, *second, *self.closing]

    def batch(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> ReaderBatch:
        """Pad prompts and their answers, and say which tokens the reader is to predict."""
        if self.start is None:
            return self._decoder_batch(prompts, answers)
        labels = pad_tokens(answers, 0)
        padded = pad_tokens(prompts, self.pad)
        shifted = pad_tokens([[self.start, *answer[:-1]] for answer in answers], self.pad)
        return ReaderBatch(
            padded["input_ids"], padded["attention_mask"],
            labels["input_ids"].masked_fill(labels["attention_mask"] == 0, IGNORED), shifted["input_ids"],
        )  # fmt: skip

    def _decoder_batch(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> ReaderBatch:
        # The answer's last token is predicted but not read.
        rows = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
        padded = pad_tokens(rows, self.pad)
        labels = torch.full_like(padded["input_ids"], IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            labels[row, len(prompt) - 1 : len(prompt) - 1 + len(answer)] = torch.tensor(answer, dtype=torch.int64)
        return ReaderBatch(padded["input_ids"], padded["attention_mask"], labels, None)


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """Cut lengths to one limit, the highest under which their sum fits into the room; the longest get the rest."""
    if sum(lengths) <= room:
        return list(lengths)
    left, shares = room, [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda one: (lengths[one], one))
    for done, one in enumerate(order):
        shares[one] = min(lengths[one], left // (len(lengths) - done))
        left -= shares[one]
    return shares


class ReaderTokenizer:
    """A reader's tokenizer, as the configuration of a retrieval-augmented model uses it.

    Args:
        tokenizer: The reader's.
        config: Prompt, lengths and special tokens.

    Attributes:
        format: How prompts are put together.

    Raises:
        ConfigurationError: If the template leaves no room for a question and a passage.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: RetrievalAugmentedConfig) -> None:
        self.tokenizer, self._config = tokenizer, config
        self.format = self._make_format()
        if self.format.field_room < 2:
            raise ConfigurationError(
                "RetrievalAugmentedConfig.reader_max_length", expected="room for a question and a passage",
                got=f"{self.format.field_room} tokens beside the prompt's own words and the answer",
                cure="Raise reader_max_length, or lower answer_max_length.",
            )  # fmt: skip

    def _make_format(self) -> ReaderFormat:
        config, encoder_decoder = self._config, bool(self._config.generator.is_encoder_decoder)
        question_first = config.prompt.index("{question}") < config.prompt.index("{passage}")
        words = config.prompt.replace("{question}", "{passage}").split("{passage}")
        opening, between, closing = self._plain(words)
        before, after = self._special_tokens()
        if not encoder_decoder:
            # A prompt is followed by its answer: what ends a text must not stand between them.
            after = []
        pad, end = self.tokenizer.pad_token_id, int(config.answer_end_token_id or 0)
        room = config.reader_max_length if encoder_decoder else config.reader_max_length - config.answer_max_length
        return ReaderFormat(
            (*before, *opening), tuple(between), (*closing, *after), question_first,
            tuple(self._plain([config.passage_separator])[0]), end if pad is None else int(pad), end,
            config.decoder_start_token_id if encoder_decoder else None, room, config.answer_max_length,
        )  # fmt: skip

    def _plain(self, texts: Sequence[str], *, most: int | None = None) -> list[list[int]]:
        if not len(texts):
            return []
        found: list[list[int]] = self.tokenizer(
            list(texts), add_special_tokens=False, truncation=most is not None, max_length=most, padding=False,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )["input_ids"]  # fmt: skip
        return found

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Return the tokens the tokenizer puts before and after a text."""
        text = "a"
        inner: list[int] = self._plain([text])[0]
        outer: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        for start in range(len(outer) - len(inner) + 1):
            if outer[start : start + len(inner)] == inner:
                return outer[:start], outer[start + len(inner) :]
        return [], []

    def questions(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise questions, as many tokens as fit into a prompt."""
        return self._plain(texts, most=self.format.field_room)

    def passages(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise passages, as many tokens as fit into a prompt."""
        return self._plain(texts, most=self.format.field_room)

    def answers(self, texts: Sequence[str], *, name: Callable[[int], str] = "answer {}".format) -> list[list[int]]:
        """Tokenise answers, their end included.

        Args:
            texts: The answers.
            name: What errors call the answer of a number.

        Raises:
            DataError: If one is empty, has no token that says something, or is longer than ``answer_max_length``.
        """
        *found, blank = self._ended([*texts, ""])
        for number, (text, tokens) in enumerate(zip(texts, found, strict=True)):
            if not text.strip():
                raise DataError(
                    name(number), expected="text", got=repr(text), cure="Leave out questions without answers."
                )
            if tokens == blank:
                # Trained on, it would teach the reader to say nothing.
                raise DataError(
                    name(number), expected="text the reader's tokenizer has tokens for",
                    got=f"{text[:60]!r}, all of which it drops", cure="Correct the answer, or leave the question out.",
                )  # fmt: skip
            if len(tokens) > self.format.answer_room:
                raise DataError(
                    name(number), expected=f"at most {self.format.answer_room} tokens, its end included",
                    got=f"{len(tokens)} tokens: {text[:60]!r}",
                    cure="Raise answer_max_length (answers are never cut), or leave the question out.",
                )  # fmt: skip
        return found

    def _ended(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise what is written after a prompt, from after the token it starts from to its end."""
        prefixed = [self._config.answer_prefix + text for text in texts]
        found: list[list[int]]
        if self.format.start is None:
            found = self._plain(prefixed)
        else:
            found = self.tokenizer(text_target=prefixed, verbose=False, padding=False)["input_ids"]
        for tokens in found:
            if tokens and tokens[0] == self.format.start:
                # Decoders start from it anyway.
                del tokens[0]
            if not tokens or tokens[-1] != self.format.end:
                tokens.append(self.format.end)
        return found

    def decode(self, tokens: Sequence[Sequence[int]]) -> list[str]:
        """Return the texts of answers, without special tokens and outer spaces."""
        texts: list[str] = self.tokenizer.batch_decode([list(one) for one in tokens], skip_special_tokens=True)
        return [text.strip().removeprefix(self._config.answer_prefix.strip()).strip() for text in texts]


def by_length(lengths: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Return positions in groups of similar length, longest first, ``size`` at most in each."""
    order = torch.argsort(lengths, descending=True, stable=True)
    return list(order.split(size))


def unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    """Return token lists of a padded batch."""
    kept, lengths = ids.cpu().numpy(), mask.cpu().sum(dim=1).tolist()
    return [np.asarray(row[:length]).tolist() for row, length in zip(kept, lengths, strict=True)]


def resolved(config: RetrievalAugmentedConfig, tokenizer: PreTrainedTokenizerBase) -> RetrievalAugmentedConfig:
    """Fill in the tokens answers start from and end with, from the reader's configuration and tokenizer.

    Raises:
        ConfigurationError: If neither knows them.
    """
    if config.answer_end_token_id is None:
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if end is None:
            raise ConfigurationError(
                "reader tokenizer", expected="a token that ends an answer", got="neither eos_token nor sep_token",
                cure="Set tokenizer.eos_token, or pass answer_end_token_id.",
            )  # fmt: skip
        config.answer_end_token_id = int(end)
    if config.generator.is_encoder_decoder and config.decoder_start_token_id is None:
        start = config.generator.decoder_start_token_id
        if start is None:
            raise ConfigurationError(
                "reader", expected="a decoder_start_token_id", got="None in its configuration",
                cure="Set generator.config.decoder_start_token_id (of BERT-like ones the tokenizer's cls_token_id), or "
                "pass decoder_start_token_id.",
            )  # fmt: skip
        config.decoder_start_token_id = int(start)
    return config
