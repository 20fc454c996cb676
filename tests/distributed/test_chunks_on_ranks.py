"""Chunked encoding under DDP: two processes have the gradients of one."""

from __future__ import annotations

import pytest
import torch
from process_helpers import run_on_ranks
from test_chunked_embedding import Gradients, assert_same, bert_without_dropout, halves
from torch.nn.parallel import DistributedDataParallel
from transformers import BertModel

from hf_corrector import _distributed
from hf_corrector.models import DualEncoderConfig, DualEncoderModel


def build_alike() -> DualEncoderModel:
    torch.manual_seed(0)
    config = DualEncoderConfig(encoder=bert_without_dropout(), projection_dim=7)
    return DualEncoderModel(config, BertModel(config.encoder, add_pooling_layer=False)).train()


def gradients_of_a_half() -> Gradients:
    """Do a chunked step on this process's half, the second time with what the first left behind."""
    model = DistributedDataParallel(build_alike())
    queries, targets = halves(slice(4 * _distributed.rank(), 4 * _distributed.rank() + 4))
    for _ in range(2):
        model.zero_grad()
        model(queries, targets, mini_batch_size=3).loss.backward()
    return {name: one.grad for name, one in model.module.named_parameters()}


@pytest.mark.usefixtures("one_thread")
def test_gradients_of_two_processes_are_those_of_one() -> None:
    model = build_alike()
    losses = [model(*halves(rows), mini_batch_size=3).loss for rows in (slice(0, 4), slice(4, 8))]
    torch.stack(losses).mean().backward()
    expected = {name: one.grad for name, one in model.named_parameters()}
    for found in run_on_ranks(gradients_of_a_half, 2):
        assert_same(found, expected, rtol=1e-6)
