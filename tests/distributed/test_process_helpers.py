"""The harness itself: it must show failures, never hide them."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from process_helpers import launch, outcomes_on_ranks, run_on_ranks

ROOT = Path(__file__).parents[2]
DYING = """
import os, signal, sys
import torch
from hf_corrector import _distributed

_distributed.join_processes()
_distributed.barrier()
if _distributed.rank() == 1 and sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
with _distributed.naming_failures("training step 3"):
    _distributed.gather_columns(torch.ones(2, 2))
sys.stdout.write(f"rank {_distributed.rank()} of {_distributed.world_size()} is done\\n")
_distributed.exit_together(0)
"""


def second_complains() -> int:
    if torch.distributed.get_rank() == 1:
        print("told on the error stream", file=sys.stderr)
        raise ValueError("nothing works")
    return 1


def first_sleeps() -> None:
    time.sleep(60 if torch.distributed.get_rank() == 0 else 0)


def first_is_killed() -> None:
    if torch.distributed.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)


def test_failures_of_a_child_are_shown_with_what_it_printed() -> None:
    with pytest.raises(AssertionError, match=r"rank 1: exit 1\n(?s:.*)told on the error stream(?s:.*)nothing works"):
        run_on_ranks(second_complains, 2)
    assert [type(outcome.error) for outcome in outcomes_on_ranks(second_complains, 2)] == [type(None), ValueError]
    with pytest.raises(AssertionError, match=f"rank 0: exit -{int(signal.SIGTERM)}"):
        run_on_ranks(first_is_killed, 2)


def test_children_that_hang_are_killed_and_named() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0\] still ran after 4 s"):
        run_on_ranks(first_sleeps, 2, timeout=4)
    assert time.monotonic() - start < 30


def was_preloaded() -> bool:
    return "preloaded" in sys.modules


def test_processes_are_forked_from_one_that_has_found_what_it_was_to_import() -> None:
    assert run_on_ranks(was_preloaded, 1) == [True]


BY_EXAMPLE = ("accelerate.commands.launch", "--config_file", str(ROOT / "examples" / "accelerate" / "ddp.yaml"))


@pytest.mark.parametrize(
    ("action", "launcher"), [("live", BY_EXAMPLE), ("die", ("torch.distributed.run",))], ids=["live", "die"]
)
def test_a_job_with_a_dead_process_ends_with_an_error(action: str, launcher: tuple[str, ...], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DYING)
    done = launch(script, 2, action, launcher=launcher)
    assert (done.returncode == 0) == (action == "live"), done.stderr
    assert done.stdout.count("of 2 is done") == (2 if action == "live" else 0)
