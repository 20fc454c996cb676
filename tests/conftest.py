"""Encoders shared by all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hub_stand_in import Handler, Hub
from model_helpers import save_bert

from hf_corrector.models.modeling_dual_encoder import DualEncoderModel


def pytest_configure(config: pytest.Config) -> None:
    """Let a worker of several, and the processes it starts, compute with one thread: they share the cores."""
    if hasattr(config, "workerinput"):
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """Let what :func:`garbage_is_sought_among_new_objects` has set aside be collected when the session is over."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny BERT with random weights and a real fast tokenizer; do not write into it."""
    return save_bert(tmp_path_factory.mktemp("encoder") / "tiny-bert")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub on this machine, see hub_stand_in."""
    Handler.hub = Hub()
    yield Handler.hub
    Handler.hub = Hub()


@pytest.fixture
def tiny_model(tiny_encoder: str) -> DualEncoderModel:
    """A dual encoder of the tiny BERT, new for every test."""
    return DualEncoderModel.from_encoder(tiny_encoder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the other processes of a test do: sums over several are rounded in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def garbage_is_sought_among_new_objects() -> None:
    """Spare every collection, of which each training asks for several, what has been imported so far: it stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    """Find out which test leaves the session with another number of threads, which others would be compared under."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before, "this test has changed the number of threads of the session"
