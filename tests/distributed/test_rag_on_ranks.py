"""Retrieval-augmented training over two processes against the same run in one: same passages, losses and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from process_helpers import run_on_ranks
from rag_helpers import rag_of, rag_trainer

from hf_corrector import _distributed
from hf_corrector.models import DualEncoderModel
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.default_reader import default_reader

GLOBAL_BATCH = 4


def train(encoder: str, out: Path, changes: dict[str, Any], checkpoint: str | None = None) -> dict[str, Any]:
    """Train, and return what must not depend on the number of processes."""
    settings = {
        "per_device_train_batch_size": GLOBAL_BATCH // _distributed.world_size(), "optim": "sgd",
        "learning_rate": 0.01, "generator_learning_rate": 0.02, "max_steps": 3, **changes,
    }  # fmt: skip
    trainer = rag_trainer(rag_of(encoder, "gpt2", learn_scale=True), out, **settings)
    trainer.train(resume_from_checkpoint=checkpoint)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    online = None if trainer.live_cache is None else trainer.live_cache.online
    return {
        "losses": [entry["loss"] for entry in logs],
        "likelihoods": [entry.get("answer_log_likelihood", 0.0) for entry in logs],
        "rows": None if online is None else online.window.state()["window_rows"],
        "weights": {name: one.clone() for name, one in trainer.rag.state_dict().items()},
        "quality": trainer.evaluate()["eval_answer_log_likelihood"],
        "cost": dict(trainer.cost),
    }


def train_and_train_a_reloaded_one(encoder: str, out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Train, and then train a default reader that was loaded: every weight that asks for a gradient must get one."""
    found, folder = train(encoder, out, changes), out / "saved"
    reader, tokenizer = default_reader(encoder)
    made = RetrievalAugmentedModel.from_parts(DualEncoderModel.from_encoder(encoder), reader, tokenizer)
    _distributed.on_main("saving the model", lambda: made.save_pretrained(str(folder)))
    loaded = RetrievalAugmentedModel.from_pretrained(str(folder))
    trainer = rag_trainer(
        loaded, out / "again", per_device_train_batch_size=2, max_steps=2, ddp_find_unused_parameters=False,
        cross_attention_learning_rate=5e-3,
    )  # fmt: skip
    trainer.train()
    moved = {name for name, one in made.state_dict().items() if not torch.equal(one, loaded.state_dict()[name])}
    return {**found, "moved": moved}


VARIANTS: dict[str, dict[str, Any]] = {
    "marginal, drawn": {"passages": "softmax", "uniform_fraction": 0.5},
    "leave one out, in chunks, accumulated": {
        "objective": "leave_one_out", "generator_mini_batch_size": 3, "mini_batch_size": 2,
        "gradient_accumulation_steps": 2, "max_steps": 2,
    },
    "emdr2, refreshed": {"objective": "emdr2", "staleness": "refresh", "refresh_steps": "2"},
    "distilled": {"objective": "perplexity_distillation", "max_steps": 2},
    "reader alone": {"objective": "generator_only"},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_as_one(tiny_encoder: str, tmp_path: Path, name: str) -> None:
    changes = VARIANTS[name]
    (alone,) = run_on_ranks(train, 1, tiny_encoder, tmp_path / "1", changes, timeout=180)
    results = run_on_ranks(train, 2, tiny_encoder, tmp_path / "2", changes, timeout=180)
    assert results[0]["losses"] == pytest.approx(alone["losses"], rel=2e-4)
    assert results[0]["likelihoods"] == pytest.approx(alone["likelihoods"], rel=2e-4)
    if alone["rows"] is not None:
        assert torch.equal(results[0]["rows"], alone["rows"])
    for found in results:
        own = {key: value for key, value in found["cost"].items() if key != "train_target_passes"}
        assert own == {key: value for key, value in alone["cost"].items() if key in own}
        # A target that questions of two processes read is encoded by both.
        assert found["cost"]["train_target_passes"] >= alone["cost"]["train_target_passes"]
        assert found["quality"] == pytest.approx(alone["quality"], rel=1e-3)
        for key, expected in alone["weights"].items():
            if "corrector" not in key:
                assert torch.allclose(found["weights"][key], expected, atol=2e-4, rtol=1e-3), key
            assert torch.equal(found["weights"][key], results[0]["weights"][key]), key


def test_two_processes_in_bfloat16_take_the_step_of_one(tiny_encoder: str, tmp_path: Path) -> None:
    changes = {"bf16": True, "max_steps": 1}
    (whole,) = run_on_ranks(train, 1, tiny_encoder, tmp_path / "whole", {"max_steps": 1}, timeout=180)
    (alone,) = run_on_ranks(train, 1, tiny_encoder, tmp_path / "1", changes, timeout=180)
    results = run_on_ranks(train, 2, tiny_encoder, tmp_path / "2", changes, timeout=180)
    for name in ("losses", "likelihoods"):
        assert alone[name] != whole[name]
        for reference in (alone, whole):
            assert results[0][name] == pytest.approx(reference[name], rel=0.02)
    assert all(torch.equal(one, results[1]["weights"][key]) for key, one in results[0]["weights"].items())
    before, stepped, apart = rag_of(tiny_encoder, "gpt2", learn_scale=True).state_dict(), 0.0, 0.0
    for key, one in before.items():
        stepped += float((alone["weights"][key] - one).square().sum())
        apart += float((results[0]["weights"][key] - alone["weights"][key]).square().sum())
    # Squares: the two steps differ by a tenth of their length at most.
    assert 0 < apart < 0.01 * stepped


def test_a_resumed_run_of_two_processes_equals_the_uninterrupted_one_bit_for_bit(
    tiny_encoder: str, tmp_path: Path
) -> None:
    changes = {"save_strategy": "steps", "save_steps": 1, "passages": "softmax"}
    whole = run_on_ranks(train_and_train_a_reloaded_one, 2, tiny_encoder, tmp_path, changes, timeout=180)
    again = run_on_ranks(train, 2, tiny_encoder, tmp_path, changes, str(tmp_path / "checkpoint-1"), timeout=180)
    for first, second in zip(whole, again, strict=True):
        assert [
            name for name, one in first["weights"].items() if not torch.equal(one, second["weights"][name])
        ] == []  # fmt: skip
    for one in whole:
        assert {name.split(".")[0] for name in one["moved"]} == {"retriever", "generator"}
        assert not any("pooler" in name for name in one["moved"])
