"""What a run can be resumed from: the whole checkpoint of the same run, and nothing else."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from rag_helpers import rag_of, rag_trainer

from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.errors import CheckpointError
from hf_corrector.models import DualEncoderModel
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.cache_trainer import CacheTrainer
from hf_corrector.training.checkpoint_files import COMPLETE_MARKER
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer

COLOURS = ("red", "green", "blue", "black", "white", "grey")
THINGS = ("cat", "dog", "house", "tree", "river", "stone")
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "seed": 3, "max_steps": 4, "use_cpu": True}


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    rows = [{"anchor": f"find the {one} {two}", "positive": f"the {two} is {one}"} for one, two in pairs]
    return from_pairs(Dataset.from_list(rows), dev_fraction=0.2, test_fraction=0.2)


def trainer_of(encoder: str, data: RetrievalData, out: Path, **changes: Any) -> DualEncoderTrainer:
    settings = {
        "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": [], "disable_tqdm": True,
        "corrector_warmup_steps": 1, "corrector_update_steps": 2, **SAVING, **changes,
    }  # fmt: skip
    model = DualEncoderModel.from_encoder(encoder, separate_towers=not settings.get("train_targets", True))
    args = DualEncoderTrainingArguments(str(out), **settings)
    return DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus)


def refusal(trainer: CacheTrainer, checkpoint: Path) -> str:
    """Return why a run does not go on from a checkpoint, having cost no pass of the encoder."""
    with pytest.raises(CheckpointError) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert sum(trainer.cost.values()) == 0
    return str(caught.value)


@pytest.fixture(scope="module")
def written(tiny_encoder: str, data: RetrievalData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a corrector, and with targets held out."""
    out = tmp_path_factory.mktemp("run")
    trainer = trainer_of(tiny_encoder, data, out)
    trainer.hold_out(data.dev)
    trainer.train()
    return out


# ---------------------------------------------------------------------- whole checkpoints


OF_A_RUN = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize(
    ("name", "listed"), [*((one, True) for one in (*OF_A_RUN, "config.json")), *((one, False) for one in OF_A_RUN)]
)
def test_a_checkpoint_that_lacks_a_file_is_refused_by_its_name(
    tiny_encoder: str, data: RetrievalData, written: Path, tmp_path: Path, name: str, listed: bool
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(written / "checkpoint-2", checkpoint)
    (checkpoint / name).unlink()
    if not listed:
        (checkpoint / COMPLETE_MARKER).write_bytes(b"")
    message = refusal(trainer_of(tiny_encoder, data, tmp_path), checkpoint)
    assert f"got no {name}" in message and "Put back" in message


def test_a_checkpoint_of_an_earlier_version_that_has_all_files_is_resumed(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer_of(tiny_encoder, data, tmp_path).train()
    (tmp_path / "checkpoint-2" / COMPLETE_MARKER).write_bytes(b"")
    again = trainer_of(tiny_encoder, data, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


def test_other_numbers_of_processes_are_told_that_they_cannot_repeat_all(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer_of(tiny_encoder, data, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / COMPLETE_MARKER).write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="hf_corrector"):
        trainer_of(tiny_encoder, data, tmp_path).train(resume_from_checkpoint=str(checkpoint))
        assert "go on from it" not in caplog.text
        (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
        shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
        trainer_of(tiny_encoder, data, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    assert "written by 2 processes, and 1 go on" in caplog.text


def test_a_checkpoint_of_the_model_alone_is_not_resumed_even_beside_an_older_optimiser(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer_of(tiny_encoder, data, tmp_path).train()
    trainer_of(tiny_encoder, data, tmp_path, save_only_model=True).train()
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").exists()
    shutil.rmtree(tmp_path / "checkpoint-4")
    trainer = trainer_of(tiny_encoder, data, tmp_path, save_only_model=True)
    with pytest.raises(CheckpointError, match=r"save_only_model=True.*from_pretrained"):
        trainer.train(resume_from_checkpoint=True)
    assert DualEncoderModel.from_pretrained(str(tmp_path / "checkpoint-2")).encode_query(["a"]).shape == (1, 32)


# ---------------------------------------------------------------------- the same arguments


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 4},
        {"per_device_train_batch_size": 8},
        {"gradient_accumulation_steps": 2},
        {"num_negatives": 2},
        {"negatives": "top_k"},
        {"share_negatives": False},
        {"staleness": "ignore"},
        {"corrector_hidden_dim": 8},
        {"corrector_activation": "relu"},
        {"corrector_window": 77},
        {"scan": "amortised"},
        {"uniform_fraction": 0.5},
        {"train_targets": False, "staleness": "ignore"},
        {"optim": "sgd"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_other_arguments_are_refused_with_both_values_before_any_work(
    tiny_encoder: str, data: RetrievalData, written: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    original = trainer_of(tiny_encoder, data, tmp_path).args.to_dict()
    trainer = trainer_of(tiny_encoder, data, tmp_path, **changes)
    message = refusal(trainer, written / "checkpoint-2")
    expected, got = message.split("; got ")
    for name in changes:
        assert name in expected and name in got
        assert str(original[name]) in expected and str(trainer.args.to_dict()[name]) in got
    assert "Resume with the same arguments" in got


def test_steps_schedule_logging_saving_and_memory_may_change(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer_of(tiny_encoder, data, tmp_path).train()
    changes = {
        "max_steps": 6, "logging_steps": 2, "save_steps": 3, "save_total_limit": 2, "lr_scheduler_type": "constant",
        "learning_rate": 1e-4, "mini_batch_size": 2, "token_budget": 512,
    }  # fmt: skip
    again = trainer_of(tiny_encoder, data, tmp_path, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 6


@pytest.mark.parametrize("then", [{}, {"staleness": "ignore"}], ids=["softmax and corrector", "softmax"])
def test_a_run_without_a_cache_is_not_resumed_as_one_that_needs_its_first(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, then: dict[str, Any]
) -> None:
    without = {"negatives": "in_batch", "staleness": "ignore"}
    trainer_of(tiny_encoder, data, tmp_path, **without).train()
    assert not (tmp_path / "cache").exists()
    message = refusal(trainer_of(tiny_encoder, data, tmp_path, **then), tmp_path / "checkpoint-2")
    assert "negatives='in_batch'" in message and "negatives='softmax'" in message
    again = trainer_of(tiny_encoder, data, tmp_path, **without)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4


CLOSED = {"objective": "generator_only", "num_passages": 0, "staleness": "ignore"}


@pytest.mark.parametrize(
    ("first", "then", "model", "named"),
    [
        (CLOSED, {}, {}, "objective='generator_only'"),
        ({}, CLOSED, {}, "num_passages=0"),
        ({}, {}, {"learn_scale": True}, "learn_scale=True"),
        ({}, {}, {"kind": "llama"}, "reader='LlamaForCausalLM'"),
        ({}, {"reader_weight": 0.5}, {}, "reader_weight=0.5"),
    ],
    ids=["closed, open", "open, closed", "scale", "reader", "weight"],
)
def test_readers_are_resumed_as_they_were(
    tiny_encoder: str, tmp_path: Path, first: dict[str, Any], then: dict[str, Any], model: dict[str, Any], named: str
) -> None:
    rag_trainer(rag_of(tiny_encoder, "gpt2"), tmp_path, **{**SAVING, "max_steps": 2, **first}).train()
    other = rag_of(tiny_encoder, model.pop("kind", "gpt2"), **model)
    assert named in refusal(rag_trainer(other, tmp_path, **{**SAVING, **then}), tmp_path / "checkpoint-2")


# ---------------------------------------------------------------------- the same targets held out


def test_targets_that_were_held_out_still_are(
    tiny_encoder: str, data: RetrievalData, written: Path, tmp_path: Path
) -> None:
    forgotten = trainer_of(tiny_encoder, data, tmp_path)
    message = refusal(forgotten, written / "checkpoint-2")
    assert "10 targets held out" in message and "got 0" in message and "trainer.hold_out(split)" in message
    other = trainer_of(tiny_encoder, data, tmp_path)
    other.hold_out(data.train.select(range(10)))
    assert "got 10 others" in refusal(other, written / "checkpoint-2")
    trainer_of(tiny_encoder, data, tmp_path / "none").train()
    late = trainer_of(tiny_encoder, data, tmp_path)
    late.hold_out(data.dev)
    assert "expected 0 targets" in refusal(late, tmp_path / "none" / "checkpoint-2")
