"""Weights in shards over two processes (FSDP2) against the same run in one: the same targets, losses and files.

accelerate turns FSDP on for accelerators only, so it is told that these processes have some; all that follows is real,
torch's ``fully_shard`` with its gathers and scatters by gloo included. On GPUs it has not been run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from process_helpers import run_on_ranks

from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.models import DualEncoderModel
from hf_corrector.models.whole_weights import in_shards
from test_training_on_ranks import ATTENTION, WORDS, trainer_of, vectors_of

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    names = [f"{WORDS[n % 13]} {WORDS[n // 13 % 13]} {n}" for n in range(300)]
    rows = [{"anchor": f"how to {name}", "positive": name} for name in names]
    return from_pairs(Dataset.from_list(rows), dev_fraction=0.05, test_fraction=0.05)


def use_shards() -> None:
    """Have this process put models in shards."""
    os.environ.update(SETTINGS)
    original = PartialState.__init__

    def pretend(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend  # type: ignore[method-assign]


def train(
    encoder: str, data: RetrievalData, out: Path, changes: dict[str, Any], sharded: bool, checkpoint: str | None = None
) -> dict[str, Any]:
    if sharded:
        use_shards()
    trainer = trainer_of(encoder, data, out, changes)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert in_shards(trainer.encoder) == sharded
    trainer.save_model()
    online = None if trainer.live_cache is None else trainer.live_cache.online
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "norms": [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry],
        "rows": None if online is None else online.window.state()["window_rows"],
        "weights": {name: one.clone() for name, one in trainer.encoder.whole().state_dict().items()},
        "quality": trainer.evaluate()["eval_mrr@10"],
        "cost": dict(trainer.cost),
        "vectors": vectors_of(trainer.encoder),
        "own": sum(one.numel() for one in local_parts(trainer.encoder)),
    }  # fmt: skip
    if trainer.live_cache is not None:
        report = trainer.judge(data.test, old_model=DualEncoderModel.from_encoder(encoder))
        found["judged"] = {name: float(one) for name, one in report.recovery.items()} if hasattr(report, "recovery") else 0
    return found


def local_parts(model: torch.nn.Module) -> list[torch.Tensor]:
    return [one.to_local() if hasattr(one, "to_local") else one for one in model.parameters()]  # type: ignore[operator]


VARIANTS: dict[str, dict[str, Any]] = {
    "corrector": {"logging_steps": 1},
    "refresh": {"staleness": "refresh", "refresh_steps": "2"},
    "rerank": {"staleness": "rerank", "rerank_candidates": 10},
    "mini-batches, accumulated": {"mini_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2},
    "adapter": {"adapted": ATTENTION},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_with_shards_train_as_one_without(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, name: str
) -> None:
    changes = VARIANTS[name]
    (alone,) = run_on_ranks(train, 1, tiny_encoder, data, tmp_path / "1", changes, False, timeout=180)
    results = run_on_ranks(train, 2, tiny_encoder, data, tmp_path / "2", changes, True, timeout=180)
    for found in results:
        assert found["losses"] == pytest.approx(alone["losses"], rel=2e-4)
        assert found["norms"] == pytest.approx(alone["norms"], rel=2e-3)
        assert found["cost"] == alone["cost"]
        assert found["own"] < 0.7 * alone["own"]
    if alone["rows"] is not None:
        assert torch.equal(results[0]["rows"], alone["rows"])
    (loaded,) = run_on_ranks(reload, 1, tmp_path / "2")
    assert torch.equal(loaded, results[0]["vectors"])
    assert torch.equal(loaded, results[1]["vectors"])


def reload(folder: Path) -> torch.Tensor:
    return vectors_of(DualEncoderModel.from_pretrained(folder))
