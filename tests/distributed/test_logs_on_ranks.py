"""Of several processes only the first writes logs, and it writes what one process would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from process_helpers import run_on_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training_logs import logged, trained

from hf_corrector import _distributed

CLOCK = ("share_", "epoch")


def train(encoder: str, out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    batch = 8 // _distributed.world_size()
    # Six steps: the seventh batch is not full, and two processes fill theirs up.
    trainer = trained(
        encoder, out, report_to=["tensorboard"], per_device_train_batch_size=batch, max_steps=6, learning_rate=1e-4,
        optim="sgd",
    )  # fmt: skip
    return logged(trainer), [type(one).__name__ for one in trainer.callback_handler.callbacks]


def test_only_the_first_process_writes_and_writes_what_one_alone_would(tiny_encoder: str, tmp_path: Path) -> None:
    ((alone, _),) = run_on_ranks(train, 1, tiny_encoder, tmp_path / "1", timeout=120)
    (first, callbacks), (_, others) = run_on_ranks(train, 2, tiny_encoder, tmp_path / "2", timeout=120)
    assert "TensorBoardCallback" in callbacks and callbacks == others
    (file,) = (tmp_path / "2").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    assert len(first) == len(alone) == 6
    for mine, expected in zip(first, alone, strict=True):
        assert mine.keys() == expected.keys()
        for name in expected.keys() - {"grad_norm"}:
            if not name.startswith(CLOCK):
                # An estimate from few targets, near zero here: the rounding of sums in another order shows in it.
                rounding = 5e-4 if name == "sampling_tv" else 2e-5
                assert mine[name] == pytest.approx(expected[name], rel=2e-3, abs=rounding), name
    for name in ("loss", "pair_age", "snapshot_age", "passes_query", "sampling_tv"):
        values = [one.value for one in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in first if name in entry], rel=1e-6)
