"""What a run logs: every number under its documented name, as it really is, to whatever report_to names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.pairs import from_pairs
from hf_corrector.index.base import TensorVectors
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.sampling import DrawKeys, ExcludedRows
from hf_corrector.scans import BlockScan, ScanPlan
from hf_corrector.training.ages import Ages
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer
from hf_corrector.training.step_log import StepLog

OF_TRANSFORMERS = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
SHARES = {"share_encode", "share_sampling", "share_corrector"}
MEANS = {"cosine_stale_fresh", "cosine_corrected_fresh", "residual_uniform", "sampling_tv", "negatives_per_query"}


def trained(encoder: str, out: Path, **changes: Any) -> DualEncoderTrainer:
    settings: dict[str, Any] = {
        "max_steps": 7, "per_device_train_batch_size": 8, "num_negatives": 2, "learning_rate": 1e-3,
        "logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "corrector_warmup_steps": 0, "corrector_update_steps": 3, "uniform_fraction": 0.5, "scan": "amortised",
        "scan_refresh_steps": 4, "seed": 2,
    }  # fmt: skip
    rows = [{"anchor": f"where is file {n}", "positive": f"in folder {n} of {n % 7}"} for n in range(60)]
    data = from_pairs(Dataset.from_list(rows), dev_fraction=0.1, test_fraction=0.1)
    args = DualEncoderTrainingArguments(str(out), **{**settings, **changes})
    model = DualEncoderModel.from_encoder(encoder)
    trainer = DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus)
    trainer.train()
    return trainer


def logged(trainer: DualEncoderTrainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_every_step_logs_all_documented_names_as_numbers(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = trained(tiny_encoder, tmp_path)
    entries, passes = logged(trainer), {f"passes_{name.removesuffix('_passes')}" for name in trainer.cost}
    assert len(entries) == 7
    for number, entry in enumerate(entries):
        own = set(entry) - OF_TRANSFORMERS
        fitted = {"pair_age"} if number >= 2 else set()
        assert own == MEANS | passes | fitted | SHARES | {"snapshot_age"}
        assert all(isinstance(value, int | float) and np.isfinite(value) for value in entry.values())
        assert all(f"``{name}``" in str(StepLog.__doc__) for name in own - passes)
        assert all(entry[name] > 0 for name in SHARES) and sum(entry[name] for name in SHARES) < 1
    for name, count in trainer.cost.items():
        counts = [entry[f"passes_{name.removesuffix('_passes')}"] for entry in entries]
        assert counts[-1] == count
        assert counts == sorted(counts)
    assert entries[0]["passes_initial_target"] == len(trainer.targets)
    assert entries[0]["passes_query"] == 8


def mean_step(trainer: DualEncoderTrainer, *, before: int) -> float:
    """Return the mean over targets of the last step, below ``before``, in which each was encoded."""
    assert trainer.live_cache is not None and trainer.live_cache.online is not None
    window, latest = trainer.live_cache.online.window.state(), dict[int, int]()
    rows = window["window_rows"].split(window["window_counts"].tolist())
    for step, own in zip(window["window_steps"].tolist(), rows, strict=True):
        if step < before:
            latest.update(dict.fromkeys(own.tolist(), step))
    return float(np.mean(list(latest.values())))


def test_age_of_the_pairs_is_that_of_those_the_corrector_was_solved_for(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = trained(tiny_encoder, tmp_path, corrector_update_steps=4)
    ages, step = [entry.get("pair_age") for entry in logged(trainer)], mean_step(trainer, before=4)
    assert ages[:3] == [None, None, None]
    assert ages[3:] == pytest.approx([4 - step, 5 - step, 6 - step, 7 - step])


def test_age_of_the_pairs_is_that_of_those_a_network_descends_on(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = trained(tiny_encoder, tmp_path, corrector_kind="residual_mlp", corrector_window=5)
    entries = logged(trainer)
    assert entries[0]["pair_age"] == 1
    assert entries[-1]["pair_age"] == pytest.approx(7 - mean_step(trainer, before=7))


def test_age_of_a_snapshot_is_that_of_its_rows() -> None:
    """Correct by shifts that say when: the rows of the scan then tell their own ages."""
    rows, plan = 3 * 4096 + 100, ScanPlan("amortised", refresh_steps=5)
    corrector = CorrectorModel(CorrectorConfig(kind="mean_shift", input_dim=2, normalize_output=False))
    targets = CorrectedTargets(TensorVectors(torch.zeros(rows, 2)), corrector, snapshot_bytes=0)
    scan, ages = BlockScan(targets, plan), Ages(rows)
    ages.note_scan(plan)
    look = torch.tensor([[1.0, 0.0]])
    for step in range(14):
        corrector.load_parameters({"shift": torch.tensor([float(step), 0.0])})
        if step == 9:
            scan.renew()
            ages.renew()
        keys = DrawKeys(seed=0, step=step, query_ids=np.zeros(1, dtype=np.int64))
        found = scan.top(look, rows, excluded=ExcludedRows([[]]), keys=keys)
        assert ages.of_snapshot() == pytest.approx(float((step - found.scores).mean()))
        corrector.load_parameters({"shift": torch.tensor([float(step + 1), 0.0])})
        scan.advance()
        ages.advance()


def test_what_does_not_exist_is_not_logged(tiny_encoder: str, tmp_path: Path) -> None:
    full = logged(trained(tiny_encoder, tmp_path / "full", scan="full"))
    assert not any("snapshot_age" in entry for entry in full)
    bare = logged(trained(tiny_encoder, tmp_path / "bare", staleness="ignore", negatives="in_batch"))
    names = set().union(*bare)
    assert not names & (MEANS - {"negatives_per_query"} | {"pair_age", "snapshot_age", "share_corrector"})
    assert bare[-1]["passes_train_target"] == bare[-1]["passes_query"] > 0


def test_a_refresh_shows_its_passes_and_forgets_the_pairs(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = trained(tiny_encoder, tmp_path, refresh_steps="4", max_steps=6)
    entries = logged(trainer)
    size = len(trainer.targets)
    assert [entry["passes_refresh_target"] for entry in entries] == [0, 0, 0, size, size, size]
    assert ["pair_age" in entry for entry in entries] == [False, False, True, False, False, True]
    assert entries[3]["share_refresh"] > 0


def test_logging_by_epoch_shows_the_same_names(tiny_encoder: str, tmp_path: Path) -> None:
    by_step = logged(trained(tiny_encoder, tmp_path / "a"))[-1]
    by_epoch = logged(trained(tiny_encoder, tmp_path / "b", logging_strategy="epoch"))[0]
    assert set(by_epoch) == set(by_step)


def test_tensorboard_gets_every_number_of_every_step(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = trained(tiny_encoder, tmp_path, report_to=["tensorboard"])
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    for name in set().union(*logged(trainer)) - {"step"}:
        expected = [(entry["step"], entry[name]) for entry in logged(trainer) if name in entry]
        found = [(one.step, one.value) for one in events.Scalars(f"train/{name}")]
        found = found[: len(expected)]  # the summary at the end tells the epoch once more
        assert [step for step, _ in found] == [step for step, _ in expected]
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"negatives": "in_batch", "staleness": "ignore"}, 7.0),
        ({"share_negatives": False}, 2.0),
        ({"max_score": -2.0, "share_negatives": False}, 0.0),
        ({"negatives": "in_batch", "staleness": "ignore", "per_device_train_batch_size": 1}, 0.0),
    ],
    ids=["shared", "own", "all filtered", "one by one"],
)
def test_negatives_of_a_query_are_counted_and_a_run_without_any_is_told_once(
    tiny_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], expected: float
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_corrector"):
        entries = logged(trained(tiny_encoder, tmp_path, uniform_fraction=0.0, max_steps=3, **changes))
    assert [entry["negatives_per_query"] for entry in entries] == [expected] * 3
    assert all((entry["loss"] == 0) == (expected == 0) for entry in entries)
    assert caplog.text.count("trains on nothing") == (expected == 0)


@pytest.mark.parametrize(("budget", "chosen"), [(1.0, "full"), (0.0, "amortised")])
def test_an_automatic_choice_that_is_not_all_targets_as_they_are_is_warned_of_once(
    tiny_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, budget: float,
    chosen: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("hf_corrector.scans.choice.UNNOTICED_SECONDS", 0.0)
    with caplog.at_level(logging.WARNING, logger="hf_corrector"):
        trainer = trained(tiny_encoder, tmp_path, scan="auto", scan_budget=budget, max_steps=3)
    assert f"chose '{chosen}'" in trainer.scan_said
    assert caplog.text.count(trainer.scan_said) == (chosen != "full")
    assert trainer.run_record().arguments["scan_chosen"] == trainer.scan_said
