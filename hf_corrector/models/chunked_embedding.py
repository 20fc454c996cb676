"""Encoding many texts with the activations of few of them in memory at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.text_encoding import Tokens


def embed_in_chunks(embed: Callable[[Tokens], torch.Tensor], tokens: Tokens, mini_batch_size: int) -> torch.Tensor:
    """Embed texts chunk by chunk and keep no activations: the backward pass computes each chunk's again.

    Gradients are those of embedding all texts at once, for one more forward pass, with the memory of one chunk, as in
    GradCache (arXiv 2101.06983), but inside of a single forward and backward of the model, which wrappers that
    synchronise gradients, scale losses or shard weights need to see. Texts are sorted by length and every chunk is cut
    to its longest, so that less padding is computed.

    Args:
        embed: Turns tokens into embeddings, ``(n, dim)``.
        tokens: ``input_ids`` and ``attention_mask``, each ``(n, length)``.
        mini_batch_size: Texts of a chunk.

    Returns:
        Embeddings in the order of the texts, ``(n, dim)``.

    Raises:
        ConfigurationError: If ``mini_batch_size`` is less than 1.
    """
    if mini_batch_size < 1:
        raise ConfigurationError(
            "mini_batch_size", expected="at least 1", got=str(mini_batch_size), cure="Leave it out, or raise it."
        )
    mask = tokens["attention_mask"]
    # Only what is right of a text's last token goes: cutting on the left would change positions.
    ends = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(dim=1).clamp(min=1)
    order = torch.argsort(ends, descending=True, stable=True)
    widths = ends[order][::mini_batch_size].tolist()

    def embed_tensors(ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        return embed({"input_ids": ids, "attention_mask": kept})

    chunks = [
        # Random states and autocast are put back for the second pass, so dropout draws the same.
        checkpoint(embed_tensors, tokens["input_ids"][rows, :width], mask[rows, :width], use_reentrant=False)
        for rows, width in zip(order.split(mini_batch_size), widths, strict=True)
    ]
    return torch.cat(chunks)[torch.argsort(order)]
