"""A run over several processes against the same run in one: the same targets drawn, the same losses."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from process_helpers import outcomes_on_ranks, run_on_ranks

from hf_corrector import _distributed
from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.errors import DistributedError
from hf_corrector.models import DualEncoderModel
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer
from hf_corrector.training.target_choice import Choice

WORDS = ("list", "remove", "count", "copy", "show", "find", "sort", "print", "files", "folder", "lines", "disk", "page")
GLOBAL_BATCH = 8
# More than one block of targets, so that two processes each hold some and the others of four none.
TARGETS = 4300
ATTENTION = ["query", "value"]


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    """Judged pairs over a corpus of more than a block, made once for all processes."""
    numbers = range(TARGETS)
    names = [f"{WORDS[n % 13]} {WORDS[n // 13 % 13]} {WORDS[n // 169 % 13]} {n}" for n in numbers]
    rows = [{"anchor": f"how to {name}", "positive": name} for name in names]
    return from_pairs(Dataset.from_list(rows), dev_fraction=0.01, test_fraction=0.01)


def trainer_of(encoder: str, data: RetrievalData, out: Path, changes: dict[str, Any]) -> DualEncoderTrainer:
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": GLOBAL_BATCH // _distributed.world_size(), "num_negatives": 3,
        "learning_rate": 0.02, "optim": "sgd", "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "corrector_warmup_steps": 1, "corrector_update_steps": 2, "seed": 3, "use_cpu": True,
        "scan": "full", "disable_tqdm": True,
    }  # fmt: skip
    adapted = changes.get("adapted")
    settings.update({name: value for name, value in changes.items() if name != "adapted"})
    args = DualEncoderTrainingArguments(str(out), **settings)
    model: Any = DualEncoderModel.from_encoder(encoder, separate_towers=not args.train_targets)
    if adapted is not None:
        torch.manual_seed(13)
        model = get_peft_model(model, LoraConfig(target_modules=adapted))
    trainer = DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus, eval_dataset=data.dev)
    trainer.hold_out(data.test)
    return trainer


def note_drawn_rows(trainer: DualEncoderTrainer) -> list[list[int]]:
    """Return what will hold the targets of every batch of all processes, in the order of its columns."""
    trainer.prepare()
    noted, choose = list[list[int]](), trainer._chooser.choose

    def noting(*args: Any, **kwargs: Any) -> Choice:
        choice = choose(*args, **kwargs)
        noted.append(choice.contrast.rows.tolist())
        return choice

    trainer._chooser.choose = noting  # type: ignore[method-assign]
    return noted


def train(encoder: str, data: RetrievalData, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Train with ``changes`` to the arguments, ``adapted`` naming the layers that get a LoRA.

    Returns what must not depend on the number of processes, and the vectors of the first texts after it.
    """
    trainer = trainer_of(encoder, data, out, changes)
    drawn = note_drawn_rows(trainer)
    trainer.train()
    trainer.save_model()
    online = None if trainer.live_cache is None else trainer.live_cache.online
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "drawn": drawn,
        "rows": None if online is None else online.window.state()["window_rows"],
        "weights": {name: tensor.clone() for name, tensor in trainer.encoder.state_dict().items()},
        "quality": trainer.evaluate()["eval_mrr@10"],
        "cost": dict(trainer.cost), "vectors": vectors_of(trainer.encoder),
    }  # fmt: skip


def vectors_of(model: DualEncoderModel) -> torch.Tensor:
    return torch.cat([model.encode_query(list(WORDS)), model.encode_target(list(WORDS))])


VARIANTS: dict[str, dict[str, Any]] = {
    "affine": {},
    "kernel and tokens": {"corrector_kind": "kernel", "corrector_side": "tokens"},
    "network, amortised": {"corrector_kind": "residual_mlp", "scan": "amortised", "scan_refresh_steps": 2},
    "pooled": {"scan": "pooled", "scan_pool": 500},
    "shortlist, accumulated": {"scan": "shortlist", "gradient_accumulation_steps": 2, "max_steps": 2},
    "top_k, refreshed": {"negatives": "top_k", "staleness": "refresh", "refresh_steps": "2"},
    "rerank, own negatives": {"staleness": "rerank", "rerank_candidates": 10, "share_negatives": False},
    "mini-batches": {"mini_batch_size": 3},
    "queries alone": {"train_targets": False, "staleness": "ignore"},
    "filtered": {"relative_margin": 0.05, "range_min": 2},
    "adapter, accumulated mini-batches": {
        "adapted": ATTENTION,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "mini_batch_size": 3,
    },
    "adapter of queries alone": {
        "adapted": r"encoder\..*\.(query|value)",
        "train_targets": False,
        "staleness": "ignore",
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_and_four_processes_train_as_one(tiny_encoder: str, data: RetrievalData, tmp_path: Path, name: str) -> None:
    changes = VARIANTS[name]
    (alone,) = run_on_ranks(train, 1, tiny_encoder, data, tmp_path / "1", changes, timeout=180)
    for count in (2, 4):
        results = run_on_ranks(train, count, tiny_encoder, data, tmp_path / str(count), changes, timeout=180)
        assert results[0]["losses"] == pytest.approx(alone["losses"], rel=2e-4)
        if alone["rows"] is not None:
            assert torch.equal(results[0]["rows"], alone["rows"])
        for found in results:
            assert found["drawn"] == alone["drawn"]
            assert found["cost"] == alone["cost"]
            assert found["quality"] == pytest.approx(alone["quality"], abs=0.05)
            for key, expected in alone["weights"].items():
                # Sums of gradients are rounded in another order; plain descent does not blow that up as Adam does.
                assert torch.allclose(found["weights"][key].float(), expected.float(), atol=2e-4, rtol=1e-3), key
                assert torch.equal(found["weights"][key], results[0]["weights"][key]), key


def reload(folder: Path) -> torch.Tensor:
    return vectors_of(DualEncoderModel.from_pretrained(folder))


def test_an_adapter_that_two_processes_trained_has_the_same_vectors_in_another_process(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    changes = {"adapted": ATTENTION, "save_strategy": "steps", "save_steps": 2}
    first, second = run_on_ranks(train, 2, tiny_encoder, data, tmp_path, changes, timeout=180)
    assert torch.equal(first["vectors"], second["vectors"])
    for folder in (tmp_path, tmp_path / "checkpoint-4"):
        assert not (folder / "model.safetensors").exists()
        (loaded,) = run_on_ranks(reload, 1, folder)
        assert torch.equal(loaded, first["vectors"])


def test_bfloat16_on_several_processes_differs_from_one_by_its_rounding_alone(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    """Gradients are products over other rows, rounded to 8 bits; what is drawn follows them step by step."""
    changes = {"bf16": True, "learning_rate": 0.002}
    (alone,) = run_on_ranks(train, 1, tiny_encoder, data, tmp_path / "1", changes, timeout=180)
    for count in (2, 4):
        results = run_on_ranks(train, count, tiny_encoder, data, tmp_path / str(count), changes, timeout=180)
        assert results[0]["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-3)
        assert results[0]["losses"] == pytest.approx(alone["losses"], rel=0.02)
        for name, weight in results[0]["weights"].items():
            assert all(torch.equal(weight, other["weights"][name]) for other in results), name


def die_in_the_third_step(encoder: str, data: RetrievalData, out: Path) -> None:
    trainer = trainer_of(encoder, data, out, {"max_steps": 50})
    if _distributed.rank() == 1:
        original = trainer.after_step

        def after_step(step: int) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            original(step)

        trainer.after_step = after_step  # type: ignore[method-assign]
    trainer.train()


def test_the_death_of_a_process_ends_the_job_with_an_error_that_names_the_step(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    outcomes = outcomes_on_ranks(die_in_the_third_step, 2, tiny_encoder, data, tmp_path, timeout=120)
    assert outcomes[1].exit_code == -signal.SIGKILL
    assert outcomes[0].exit_code not in (0, None)
    assert isinstance(outcomes[0].error, DistributedError)
    assert "training after step" in str(outcomes[0].error)


def resume(
    encoder: str, data: RetrievalData, out: Path, changes: dict[str, Any], checkpoint: str | None
) -> dict[str, torch.Tensor]:
    trainer = trainer_of(encoder, data, out, {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, **changes})
    trainer.train(resume_from_checkpoint=checkpoint)
    return {name: tensor.clone() for name, tensor in trainer.encoder.state_dict().items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scan": "amortised"},
        {"corrector_kind": "residual_mlp", "scan": "amortised"},
        {"adapted": ATTENTION, "gradient_accumulation_steps": 2},
        {"bf16": True},
    ],
    ids=["affine", "amortised", "network", "adapter", "bfloat16"],
)
def test_a_resumed_run_of_two_processes_equals_the_uninterrupted_one_bit_for_bit(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = run_on_ranks(resume, 2, tiny_encoder, data, tmp_path, changes, None, timeout=180)
    again = run_on_ranks(resume, 2, tiny_encoder, data, tmp_path, changes, str(tmp_path / "checkpoint-2"), timeout=180)
    for first, second in zip(whole, again, strict=True):
        assert [name for name in first if not torch.equal(first[name], second[name])] == []
        assert all(bool(torch.isfinite(one).all()) for one in first.values())
