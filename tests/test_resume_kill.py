"""A training run may be killed at any instant: resumed, it ends in the same bits as one that never was."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_helpers import folder_in_memory
from kill_helpers import EVENTS, RESULT, Ended, Run, differences, drawn_in, train_apart

from hf_corrector.training.checkpoint_files import COMPLETE_MARKER, remove_folder, remove_old_checkpoints

VARIANTS: dict[str, dict[str, Any]] = {
    "affine": {},
    "kernel and tokens": {"corrector_kind": "kernel", "corrector_side": "tokens"},
    "network, amortised": {"corrector_kind": "residual_mlp", "scan": "amortised", "scan_refresh_steps": 3},
    "refreshed": {"staleness": "refresh", "refresh_steps": "3"},
    "refreshed and corrected, accumulated": {"refresh_steps": "5", "gradient_accumulation_steps": 2},
    "reranked, pooled": {"staleness": "rerank", "rerank_candidates": 6, "scan": "pooled", "scan_pool": 20},
    "logged later, shortlist": {"logging_steps": 5, "save_steps": 3, "scan": "shortlist", "scan_shortlist": 10},
    # An epoch has six batches, the second step of each only two of them.
    "partly accumulated": {"gradient_accumulation_steps": 4, "save_steps": 1},
    "adapter": {"mini_batch_size": 3},
    "reader, drawn passages": {"max_steps": 7, "passages": "softmax", "generator_mini_batch_size": 9},
}
KILLS = 3  # of every variant, wherever they fall


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as path:
        yield path


def killed(run: Run, kill: Callable[[], None]) -> Ended:
    """Start or resume a run and kill it; what was complete before must be so after, or be replaced by newer ones."""
    before, incomplete = run.checkpoints(complete=True), run.checkpoints(complete=False)
    ended = train_apart(run, kill=kill)
    assert ended.exit_code in (0, -9), ended.output
    after = run.checkpoints(complete=True)
    assert max(map(step_of, after), default=0) >= max(map(step_of, before), default=0)
    if ended.exit_code == 0:
        # A third is left by a kill between the last one's completion and the removal of the oldest.
        assert len(after) in (2, 3)
        check_reports(ended, incomplete if before else set())
    return ended


def finished(run: Run) -> Ended:
    incomplete = run.checkpoints(complete=False) if run.checkpoints(complete=True) else set()
    ended = train_apart(run)
    assert ended.exit_code == 0, ended.output
    check_reports(ended, incomplete)
    return ended


def check_reports(ended: Ended, incomplete: set[Path]) -> None:
    for one in incomplete:
        assert f"{one} was not written to its end" in ended.output


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[-1])


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tiny_encoder: str, folder: Path, name: str) -> None:
    def new_run(kind: str) -> Run:
        return Run(
            tiny_encoder, folder / kind, VARIANTS[name], adapter=name == "adapter", reader=name.startswith("reader")
        )  # fmt: skip

    whole, kills, draw = new_run("whole"), 0, random.Random(name)
    length = finished(whole).seconds
    for attempt in range(12):
        run = new_run(f"killed-{attempt}")
        for _ in range(KILLS):
            seconds = draw.uniform(0.05, 1.0) * length
            ended = killed(run, lambda seconds=seconds: time.sleep(seconds))
            if ended.exit_code == 0:
                break
            kills += 1
        else:
            finished(run)
        assert differences(run, whole) == []
        if kills >= KILLS:
            return
    raise AssertionError(f"{kills} kills: the run is too short for this machine")


def test_a_run_killed_before_operations_on_its_files_ends_as_if_it_had_not_been(
    tiny_encoder: str, folder: Path
) -> None:
    changes = {"refresh_steps": "3", "save_steps": 4, "corrector_side": "tokens", "save_total_limit": 1}
    whole = Run(tiny_encoder, folder / "whole", changes)
    finished(whole)
    counts, draw = json.loads((whole.out / EVENTS).read_text()), random.Random(3)
    assert set(counts) == {"start", "checkpoint", "refresh", "removing"}
    for stage, count in counts.items():
        assert count > 10
        for number in draw.sample(range(count), 1 if stage == "start" else 3):
            run = Run(tiny_encoder, folder / f"{stage}-{number}", changes)
            dying = train_apart(replace(run, die_before=(stage, number)))
            assert dying.exit_code == -9
            # Nothing that is half deleted has the name of something whole.
            assert len(list(run.out.glob(".removed-*"))) == (stage == "removing")
            finished(run)
            assert differences(run, whole) == [], f"killed before {stage} {number}"
            assert [one.name for one in run.out.glob("checkpoint-*")] == ["checkpoint-11"]


def test_a_run_killed_after_its_last_checkpoint_does_no_further_step(tiny_encoder: str, folder: Path) -> None:
    run = Run(tiny_encoder, folder / "run", {"max_steps": 4, "logging_steps": 3})
    finished(run)
    first = torch.load(run.out / RESULT, weights_only=True)
    finished(run)
    again = torch.load(run.out / RESULT, weights_only=True)
    assert [name for name, one in first["weights"].items() if not torch.equal(one, again["weights"][name])] == []
    assert {key.split()[1] for key in drawn_in(run)} == {"0", "1", "2", "3"}


def test_old_checkpoints_are_removed_unfinished_ones_first_and_never_the_newest_or_best(tmp_path: Path) -> None:
    for age, step in enumerate((40, 2, 4, 6, 8)):  # the first is of an earlier, longer run
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if step != 6:
            (folder / COMPLETE_MARKER).touch()
        os.utime(folder, (age, age))
    newest, best = tmp_path / "checkpoint-8", str(tmp_path / "checkpoint-2")

    def left(limit: int | None) -> set[int]:
        remove_old_checkpoints(tmp_path, newest, limit=limit, best=best)
        return {step_of(one) for one in tmp_path.iterdir()}

    assert left(None) == left(0) == left(5) == {40, 2, 4, 6, 8}
    assert left(4) == {40, 2, 4, 8}
    assert left(3) == {2, 4, 8}
    assert left(1) == {2, 8}


def test_a_folder_whose_removal_was_cut_short_is_gone_after_the_next_removal(tmp_path: Path) -> None:
    for name in ("cache-0001/part", "cache-0002/part", ".removed-cache-0001/part"):
        (tmp_path / name).mkdir(parents=True)
    remove_folder(tmp_path / "cache-0001")
    assert [one.name for one in tmp_path.iterdir()] == ["cache-0002"]
    remove_folder(tmp_path / "cache-0001")
    assert [one.name for one in tmp_path.iterdir()] == ["cache-0002"]
