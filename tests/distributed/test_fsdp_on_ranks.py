"""Weights in shards over two processes (FSDP2) against the same run in one: the same targets, losses and files.

accelerate turns FSDP on for accelerators only, so it is told that these processes have some; all that follows is real,
torch's ``fully_shard`` with its gathers and scatters by gloo included. It has not been run on GPUs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import Dataset
from process_helpers import run_on_ranks
from test_training_on_ranks import ATTENTION, WORDS, note_drawn_rows, trainer_of, vectors_of
from torch.distributed.fsdp import fully_shard

from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.errors import CheckpointError, ConfigurationError
from hf_corrector.models import DualEncoderModel
from hf_corrector.models.whole_weights import in_shards
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.training.arguments import DualEncoderTrainingArguments

CONFIG = Path(__file__).parents[2] / "examples" / "accelerate" / "fsdp2.yaml"
VARIANTS: dict[str, dict[str, Any]] = {
    "corrector": {},
    "kernel and tokens, refreshed": {"corrector_kind": "kernel", "corrector_side": "tokens", "refresh_steps": "2"},
    # Of all correctors this one alone has parameters, which must lie in no shard.
    "network": {"corrector_kind": "residual_mlp"},
    "refresh": {"staleness": "refresh", "refresh_steps": "2"},
    "rerank, accumulated mini-batches": {
        "staleness": "rerank",
        "rerank_candidates": 10,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "mini_batch_size": 3,
    },
    "queries alone": {"train_targets": False, "staleness": "ignore"},
    "adapter": {"adapted": ATTENTION},
}


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    names = [f"{WORDS[n % 13]} {WORDS[n // 13 % 13]} {n}" for n in range(300)]
    rows = [{"anchor": f"how to {name}", "positive": name} for name in names]
    return from_pairs(Dataset.from_list(rows), dev_fraction=0.05, test_fraction=0.05)


def use_shards() -> None:
    """Have this process do what ``accelerate launch`` with the example's configuration does where there are GPUs."""
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIG), "train.py"])
    launched = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    os.environ.update({name: value for name, value in launched.items() if "FSDP" in name or "PRECISION" in name})
    original = PartialState.__init__

    def pretend(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = pretend  # type: ignore[method-assign]


def train(encoder: str, data: RetrievalData, out: Path, changes: dict[str, Any], sharded: bool) -> dict[str, Any]:
    """Train and judge; return what must not depend on processes and shards, and what lies in this process."""
    if sharded:
        use_shards()
    trainer = trainer_of(encoder, data, out, changes)
    drawn = note_drawn_rows(trainer)
    trainer.train()
    trainer.save_model()
    assert in_shards(trainer.encoder) == sharded
    corrector = trainer.encoder.corrector
    assert corrector is None or not in_shards(corrector)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    live = trainer.live_cache
    own = [getattr(weight, "_local_tensor", weight) for weight in trainer.encoder.parameters()]
    return {
        "losses": [entry["loss"] for entry in logged],
        "norms": [entry["grad_norm"] for entry in logged],
        "drawn": drawn,
        "rows": None if live is None or live.online is None else live.online.window.state()["window_rows"],
        "cosine": None if live is None else trainer.judge(data.test).cosines["corrected"],
        "quality": trainer.evaluate()["eval_mrr@10"],
        "cost": dict(trainer.cost),
        "vectors": vectors_of(trainer.encoder),
        "own": sum(one.numel() for one in own),
    }


def reload(folder: Path) -> torch.Tensor:
    return vectors_of(DualEncoderModel.from_pretrained(folder))


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_with_shards_train_as_one_without(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, name: str
) -> None:
    changes = VARIANTS[name]
    (alone,) = run_on_ranks(train, 1, tiny_encoder, data, tmp_path / "1", changes, False, timeout=180)
    results = run_on_ranks(train, 2, tiny_encoder, data, tmp_path / "2", changes, True, timeout=180)
    if alone["rows"] is not None:
        assert torch.equal(results[0]["rows"], alone["rows"])
    for found in results:
        assert found["drawn"] == alone["drawn"]
        assert found["own"] < 0.7 * alone["own"]
        assert found["losses"] == pytest.approx(alone["losses"], rel=2e-4)
        assert found["norms"] == pytest.approx(alone["norms"], rel=2e-3)
        assert found["cosine"] == (None if alone["cosine"] is None else pytest.approx(alone["cosine"], abs=1e-4))
        assert found["quality"] == pytest.approx(alone["quality"], abs=0.05)
        assert found["cost"] == alone["cost"]
        assert torch.allclose(found["vectors"], alone["vectors"], atol=1e-3)
    assert files_of(tmp_path / "2") == files_of(tmp_path / "1")
    if "adapted" not in changes:
        architectures = json.loads((tmp_path / "2" / "config.json").read_text())["architectures"]
        assert architectures == ["DualEncoderModel"]
    (loaded,) = run_on_ranks(reload, 1, tmp_path / "2")
    assert all(torch.equal(loaded, found["vectors"]) for found in results)


def test_bfloat16_with_shards_is_that_of_ddp(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    """Weights are gathered in float32 and rounded by autocast, so the same processes compute the same."""
    replicas = run_on_ranks(train, 2, tiny_encoder, data, tmp_path / "ddp", {"bf16": True}, False, timeout=180)
    shards = run_on_ranks(train, 2, tiny_encoder, data, tmp_path / "fsdp", {"bf16": True}, True, timeout=180)
    assert shards[0]["losses"] == pytest.approx(replicas[0]["losses"], rel=1e-4)
    assert torch.equal(shards[0]["rows"], replicas[0]["rows"])


def resume(
    encoder: str, data: RetrievalData, out: Path, changes: dict[str, Any], checkpoint: str | None
) -> dict[str, Any]:
    use_shards()
    # With Adam, whose states are in shards too.
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "optim": "adamw_torch", **changes}
    trainer = trainer_of(encoder, data, out, settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    if checkpoint is not None:
        with pytest.raises(ConfigurationError, match="in shards"):
            trainer.train(resume_from_checkpoint=checkpoint)
    online = None if trainer.live_cache is None else trainer.live_cache.online
    return {
        "weights": dict(trainer.encoder.whole().state_dict()),
        "rows": None if online is None else online.window.state()["window_rows"],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


@pytest.mark.parametrize("changes", [{}, {"adapted": ATTENTION}], ids=["whole", "adapter"])
def test_a_resumed_run_with_shards_equals_the_uninterrupted_one_bit_for_bit(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = run_on_ranks(resume, 2, tiny_encoder, data, tmp_path, changes, None, timeout=180)
    again = run_on_ranks(resume, 2, tiny_encoder, data, tmp_path, changes, str(tmp_path / "checkpoint-2"), timeout=180)
    assert (tmp_path / "checkpoint-2" / "COMPLETE").exists()
    assert not list((tmp_path / "checkpoint-2").glob("pytorch_model*"))
    assert torch.equal(whole[0]["rows"], again[0]["rows"])
    for first, second in zip(whole, again, strict=True):
        assert [name for name, one in first["weights"].items() if not torch.equal(one, second["weights"][name])] == []
        assert first["losses"] == second["losses"]


@pytest.mark.parametrize("sharded", [True, False])
def test_a_checkpoint_of_the_other_kind_is_refused(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, sharded: bool
) -> None:
    run_on_ranks(train, 2, tiny_encoder, data, tmp_path, {"save_strategy": "steps", "max_steps": 1}, not sharded)
    (message, _) = run_on_ranks(resume_otherwise, 2, tiny_encoder, data, tmp_path, sharded)
    assert f"run {'with' if sharded else 'without'} FSDP" in message


def resume_otherwise(encoder: str, data: RetrievalData, out: Path, sharded: bool) -> str:
    if sharded:
        use_shards()
    with pytest.raises(CheckpointError) as caught:
        trainer_of(encoder, data, out, {}).train(resume_from_checkpoint=str(out / "checkpoint-1"))
    return str(caught.value)


REFUSED: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({"FSDP_VERSION": "1"}, {}, "fsdp_version: 2"),
    ({}, {"torch_compile": True}, "torch_compile"),
    ({"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}, {}, "FULL_STATE_DICT"),
    ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading"),
    ({"FSDP_OFFLOAD_PARAMS": "true"}, {}, "fsdp_offload_params"),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "mini_batch_size"),
    ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, {}, "TRANSFORMER_BASED_WRAP"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "mixed_precision"),
    ({}, {"fp16": True}, "bf16=True"),
    ({}, {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, "best_model_checkpoint"),
]


def messages(out: Path) -> list[str]:
    use_shards()
    found, before = [], dict(os.environ)
    for environment, changes, _ in REFUSED:
        os.environ.update(environment)
        found.append(message_of(DualEncoderTrainingArguments, out, changes))
        os.environ.clear()
        os.environ.update(before)
    return [*found, message_of(RetrievalAugmentedTrainingArguments, out, {})]


def message_of(kind: type, out: Path, changes: dict[str, Any]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        kind(str(out), use_cpu=True, report_to=[], **changes)
    return str(caught.value)


def test_settings_of_fsdp_that_cannot_work_are_refused_before_any_work(tmp_path: Path) -> None:
    (found,) = run_on_ranks(messages, 1, tmp_path)
    for message, expected in zip(found, [*(one[2] for one in REFUSED), "reader"], strict=True):
        assert expected in message


def foreign_shards(encoder: str, out: Path) -> list[str]:
    model, found = DualEncoderModel.from_encoder(encoder), []
    fully_shard(model)
    for act in (
        lambda: model.encode_query("one"), lambda: model.save_pretrained(str(out)),
        lambda: model.save_as_sentence_transformer(out),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError) as caught:
            act()
        found.append(str(caught.value))
    return found


def test_models_in_shards_of_other_origin_neither_encode_nor_save_parts(tiny_encoder: str, tmp_path: Path) -> None:
    (found,) = run_on_ranks(foreign_shards, 1, tiny_encoder, tmp_path)
    for message, expected in zip(found, ("other origin", "save_model", "save_model"), strict=True):
        assert expected in message
    assert not list(tmp_path.iterdir())
