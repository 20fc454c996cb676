"""Run a function or a script in several processes that form a gloo group, with a hard limit of time.

A function must be one of a module's top level; rank and size are asked of torch.distributed, as in real runs:

    assert run_on_ranks(my_function, 4, argument) == [result_of_rank_0, …]
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from forking import forking_context, search_path


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit status (negative: the signal), what it returned or raised, what it printed."""

    exit_code: int
    result: Any
    error: Exception | None
    output: str


def run_on_ranks(function: Callable[..., Any], count: int, *args: Any, timeout: float = 60) -> list[Any]:
    """Return what the function returned in each of ``count`` processes; fail, with their output, if any did not."""
    outcomes = outcomes_on_ranks(function, count, *args, timeout=timeout)
    if any(outcome.exit_code for outcome in outcomes):
        raise AssertionError(_described(outcomes))
    return [outcome.result for outcome in outcomes]


def outcomes_on_ranks(
    function: Callable[..., Any], count: int, *args: Any, timeout: float = 60, group_timeout: float = 50
) -> list[Outcome]:
    """Return how the function ended in each of ``count`` processes; all are killed after ``timeout`` seconds."""
    context = forking_context()
    with tempfile.TemporaryDirectory() as folder:
        job = _Job(function, args, count=count, folder=Path(folder), group_timeout=group_timeout)
        processes = [context.Process(target=_run_rank, args=(job, rank), daemon=True) for rank in range(count)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        outcomes = [job.outcome(rank, process.exitcode) for rank, process in enumerate(processes)]
    if late:
        raise AssertionError(f"ranks {late} still ran after {timeout} s\n{_described(outcomes)}")
    return outcomes


@dataclass(frozen=True)
class _Job:
    function: Callable[..., Any]
    args: tuple[Any, ...]
    count: int
    folder: Path
    group_timeout: float

    def outcome(self, rank: int, exit_code: int | None) -> Outcome:
        printed, returned = self.folder / f"output-{rank}", self.folder / f"result-{rank}"
        output = printed.read_text(errors="replace") if printed.exists() else ""
        result, error = pickle.loads(returned.read_bytes()) if returned.exists() else (None, None)
        return Outcome(-99 if exit_code is None else exit_code, result, error, output)


def _run_rank(job: _Job, rank: int) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.count, "LOCAL_WORLD_SIZE": job.count}
    os.environ.update({name: str(value) for name, value in environment.items()})
    # Read by accelerate only; the group itself meets at a file, so that no port can be taken.
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"})
    torch.set_num_threads(1)
    with (job.folder / f"output-{rank}").open("w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        with redirect_stdout(stream), redirect_stderr(stream):
            error = _run_in_group(job, rank)
    sys.exit(0 if error is None else 1)


def _run_in_group(job: _Job, rank: int) -> Exception | None:
    result, error = None, None
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{job.folder / 'meeting'}", rank=rank, world_size=job.count,
            timeout=timedelta(seconds=job.group_timeout),
        )  # fmt: skip
        # A process that ends at once would break off the connections of others that are still being made.
        torch.distributed.barrier()
        result = job.function(*job.args)
        torch.distributed.destroy_process_group()
    except Exception as caught:  # every error of a child is the parent's to judge
        traceback.print_exc()
        error = caught
    (job.folder / f"result-{rank}").write_bytes(pickle.dumps((result, error)))
    return error


def _described(outcomes: Sequence[Outcome]) -> str:
    parts = [f"--- rank {rank}: exit {one.exit_code}\n{one.output[-4000:]}" for rank, one in enumerate(outcomes)]
    return "\n".join(parts)


def launch(
    script: Path, count: int, *args: str, launcher: Sequence[str] = ("torch.distributed.run",), timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """Run a script under ``torchrun``, or another launcher such as ``accelerate.commands.launch --config_file …``."""
    module, *options = launcher
    if module == "torch.distributed.run":
        options = ["--standalone", "--nproc_per_node", str(count), *options]
    else:
        options = ["--num_processes", str(count), "--main_process_port", "0", *options]
    return subprocess.run(
        [sys.executable, "-m", module, *options, str(script), *args], capture_output=True, text=True, timeout=timeout,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path()},
    )  # fmt: skip
