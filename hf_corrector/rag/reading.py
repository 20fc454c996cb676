"""How likely a language model finds answers, with the activations of few prompts in memory at a time."""

from __future__ import annotations

import inspect

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_corrector.errors import ConfigurationError
from hf_corrector.rag.reader_inputs import IGNORED, ReaderBatch, by_length


def answer_log_likelihoods(
    generator: PreTrainedModel, batch: ReaderBatch, *, mini_batch_size: int | None = None
) -> torch.Tensor:  # fmt: skip
    """Return log P_LM(a|prompt), the sum over the answer's tokens, ``(n,)`` float32 under any autocast.

    Args:
        generator: A decoder or an encoder-decoder.
        batch: Prompts and answers.
        mini_batch_size: Read so many at a time and compute them again for the gradient, see
            :func:`~hf_corrector.models.chunked_embedding.embed_in_chunks`; all at once if not given.

    Raises:
        ConfigurationError: If ``mini_batch_size`` is less than 1.
    """
    if mini_batch_size is None:
        return _of_rows(generator, batch)
    if mini_batch_size < 1:
        raise ConfigurationError(
            "generator_mini_batch_size", expected="at least 1", got=str(mini_batch_size),
            cure="Leave it out, or raise it.",
        )  # fmt: skip
    lengths = batch.attention_mask.sum(dim=1) + (batch.labels != IGNORED).sum(dim=1)
    groups = by_length(lengths, mini_batch_size)
    found = []
    for rows in groups:
        part = batch.rows(rows)
        if torch.is_grad_enabled():
            # Random states and autocast are put back for the second pass, so dropout draws the same.
            found.append(checkpoint(_of_rows, generator, part, use_reentrant=False))
        else:
            found.append(_of_rows(generator, part))
    return torch.cat(found)[torch.argsort(torch.cat(groups))]


def _of_rows(generator: PreTrainedModel, batch: ReaderBatch) -> torch.Tensor:
    if batch.decoder_input_ids is not None:
        logits = generator(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, decoder_input_ids=batch.decoder_input_ids,
            use_cache=False,
        ).logits  # fmt: skip
        return _sum_of_tokens(logits, batch.labels)
    labels, places = batch.labels, (batch.labels != IGNORED).any(dim=0).nonzero()[:, 0]
    chosen = {}
    if "logits_to_keep" in inspect.signature(generator.forward).parameters:
        # Scores of the vocabulary are what takes the memory, and of a prompt's own words none is needed.
        chosen, labels = {"logits_to_keep": places}, labels[:, places]
    logits = generator(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **chosen
    ).logits  # fmt: skip
    return _sum_of_tokens(logits, labels)


def _sum_of_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )  # fmt: skip
        return -losses.reshape(labels.shape).sum(dim=1)


def reading_ops(generator: PreTrainedModel, prompt_tokens: float, answer_tokens: float) -> float:
    """Return the operations of weighing an answer after a prompt, in round numbers and without gradient."""
    weights = generator.num_parameters(exclude_embeddings=True)
    if not generator.config.is_encoder_decoder:
        return 2.0 * weights * (prompt_tokens + answer_tokens)
    encoder = generator.get_encoder().num_parameters(exclude_embeddings=True)
    return 2.0 * (encoder * prompt_tokens + (weights - encoder) * answer_tokens)
