"""Runs of two processes, one or both of which are killed at any instant, against a run that was left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cache_helpers import folder_in_memory
from kill_helpers import Run, differences, train
from process_helpers import Outcome, outcomes_on_ranks

from hf_corrector import _distributed

VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # the arguments, and which processes are killed
    "affine, both": ({}, (0, 1)),
    "accumulated and refreshed, the main one": ({"gradient_accumulation_steps": 2, "refresh_steps": "3"}, (0,)),
    "network, amortised, logged later, the other one": (
        {"corrector_kind": "residual_mlp", "scan": "amortised", "scan_refresh_steps": 3, "logging_steps": 3}, (1,),
    ),
    "adapter, both": ({}, (0, 1)),
    "adapter, accumulated, in bfloat16, the main one": ({"gradient_accumulation_steps": 2, "bf16": True}, (0,)),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with folder_in_memory(tmp_path) as path:
        yield path


def train_and_die(run: Run, victims: tuple[int, ...], seconds: float) -> float:
    """Train and return how long it took; a process among the victims is killed after so many seconds."""
    started, parent, killer = time.monotonic(), os.getpid(), 0
    if _distributed.rank() in victims:
        killer = os.fork()
        if not killer:
            time.sleep(seconds)
            os.kill(parent, signal.SIGKILL)
            os._exit(0)
    train(run)
    if killer:
        os.kill(killer, signal.SIGKILL)
    return time.monotonic() - started


def on_two(run: Run, victims: tuple[int, ...] = (), seconds: float = 0.0) -> list[Outcome]:
    return outcomes_on_ranks(train_and_die, 2, run, victims, seconds, timeout=100)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_of_two_processes_killed_at_a_random_moment_ends_as_if_it_had_not_been(
    tiny_encoder: str, folder: Path, name: str
) -> None:
    changes, victims = VARIANTS[name]
    draw = random.Random(name)

    def new_run(kind: str) -> Run:
        return Run(tiny_encoder, folder / kind, changes, adapter=name.startswith("adapter"))

    whole = new_run("whole")
    length = max(outcome.result for outcome in on_two(whole))
    for attempt in range(6):
        run = new_run(f"killed-{attempt}")
        outcomes = on_two(run, victims, draw.uniform(0.3, 0.95) * length)
        ended = [outcome.exit_code for outcome in outcomes]
        if 0 not in ended:
            assert {ended[one] for one in victims} == {-signal.SIGKILL}
            resumable, unfinished = run.checkpoints(complete=True), run.checkpoints(complete=False)
            outcomes = on_two(run)
            for one in unfinished if resumable else ():
                assert f"{one} was not written to its end" in outcomes[0].output
        assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].output
        assert differences(run, whole) == []
        if 0 not in ended:
            return
    raise AssertionError("the run is too short for this machine")
