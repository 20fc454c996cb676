"""Facts about the processes of a run and the few exchanges between them; nothing else asks torch.distributed.

In one process every function here is the identity. Exchanges move bytes, so they keep the bits of any type, and every
process must call them in the same order. A failure of one ends in :class:`DistributedError` on all others.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_corrector.errors import DistributedError, HFCorrectorError

_T = TypeVar("_T")
# Rows travel in pieces, as a group that only knows accelerators holds the pieces of all processes on each of them.
_PIECE_BYTES = 64 * 2**20
# Errors of a backend that is not of a class of its own (gloo, torch 2.6-2.13) are told by what they say.
_BACKEND_WORDS = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe", "processgroup")


def rank() -> int:
    """Return the number of this process, 0 where it is alone."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """Return the number of processes that work together, 1 where none do."""
    return dist.get_world_size() if _initialised() else 1


def is_main() -> bool:
    """Say whether this is the process that writes files and speaks."""
    return rank() == 0


def join_processes() -> None:
    """Join the other processes, if a launcher has started several and nothing has joined them yet."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _initialised():
        from accelerate import PartialState

        with naming_failures("joining the other processes"):
            PartialState(cpu=not torch.cuda.is_available())


def leave_processes() -> None:
    """Take leave of the other processes at the end of a program, all at once."""
    if _initialised():
        barrier()
        dist.destroy_process_group()


def exit_together(code: int) -> None:
    """End a program of several processes; return in a program of one.

    With gloo (torch 2.13) about one in ten processes that end in the usual way aborts while its threads are taken down,
    after all its work is done, and its launcher then reports a failed run. So nothing is taken down.
    """
    if world_size() > 1:
        leave_processes()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def barrier() -> None:
    """Wait until every process is here."""
    # As an exchange of nothing: barriers of some backends guess a device, and warn about it.
    all_gather_object(None)


def all_gather_rows(local: torch.Tensor) -> list[torch.Tensor]:
    """Return the rows of every process, in rank order, without gradient.

    Args:
        local: Rows of this process ``(n_r, …)``; the number may differ between processes and be zero, the rest of the
            shape and the type may not.

    Returns:
        One tensor ``(n_r, …)`` per process with its exact bits, on ``local.device``.

    Raises:
        DistributedError: If another process is gone.
    """
    if world_size() == 1:
        return [local.detach()]
    with naming_failures("gathering rows"):
        counts = _gather_counts(len(local))
        row_bytes = math.prod(local.shape[1:]) * local.element_size()
        step = max(1, _PIECE_BYTES // max(1, row_bytes * len(counts)))
        gathered = [local.new_empty((count, *local.shape[1:])) for count in counts]
        for start in range(0, max(counts), step):
            _gather_piece(local.detach(), gathered, start=start, rows=min(step, max(counts) - start))
    return gathered


def _gather_counts(own: int) -> list[int]:
    device = _transport(torch.device("cpu"))
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([own], dtype=torch.int64, device=device))
    return [int(count) for count in counts]


def _gather_piece(local: torch.Tensor, gathered: list[torch.Tensor], *, start: int, rows: int) -> None:
    """Exchange rows ``start`` to ``start + rows`` of every process, padded to the same number."""
    own = local[start : start + rows]
    padded = own.new_zeros((rows, *own.shape[1:]))
    padded[: len(own)] = own
    sent = _as_bytes(padded).to(_transport(local.device))
    received = [torch.empty_like(sent) for _ in gathered]
    dist.all_gather(received, sent)
    for target, piece in zip(gathered, received, strict=True):
        kept = target[start : start + rows]
        kept.copy_(piece.to(local.device).view(local.dtype).reshape(padded.shape)[: len(kept)])


def gather_columns(local: torch.Tensor) -> torch.Tensor:
    """Put the rows of all processes under each other, with gradient.

    The gradient of a row is the sum, in float32, of what every process's loss says about it, as if one process had
    computed the sum of all losses. A wrapper that averages gradients over processes divides by their number.

    Args:
        local: Rows of this process ``(n_r, dim)``; the number may differ between processes and be zero.

    Returns:
        Rows in rank order ``(Σ n_r, dim)`` with their exact bits.

    Raises:
        DistributedError: If another process is gone.
    """
    if world_size() == 1:
        return local
    gathered: torch.Tensor = _GatherColumns.apply(local)  # type: ignore[no-untyped-call]
    return gathered


class _GatherColumns(torch.autograd.Function):
    """Concatenation over processes; upstream's own gathers want equal numbers of rows or NCCL."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        parts = all_gather_rows(local)
        ctx.start = sum(len(part) for part in parts[: rank()])
        ctx.rows = len(local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient,) = gradients
        with naming_failures("summing gradients of gathered rows"):
            # A copy: the gradient may be shared with others, and the sum is written in place.
            total = gradient.to(_transport(gradient.device), torch.float32, copy=True).contiguous()
            dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.rows].to(gradient.device, gradient.dtype)


def broadcast_tensors(tensors: Sequence[torch.Tensor], source: int = 0) -> None:
    """Overwrite tensors, in place, by those of one process; shapes and types must be the same everywhere.

    Raises:
        DistributedError: If another process is gone.
    """
    if world_size() == 1:
        return
    with naming_failures("broadcasting tensors"), torch.no_grad():
        for tensor in tensors:
            # A copy, as the bytes of a leaf or of a strided view cannot be written through.
            buffer = _as_bytes(tensor.detach()).to(_transport(tensor.device), copy=True)
            dist.broadcast(buffer, src=source)
            if rank() != source:
                tensor.copy_(buffer.to(tensor.device).view(tensor.dtype).reshape(tensor.shape))


def broadcast_object(value: _T, source: int = 0) -> _T:
    """Return the value of one process; it must survive pickling.

    Raises:
        DistributedError: If another process is gone.
    """
    if world_size() == 1:
        return value
    values = [value]
    with naming_failures("broadcasting a value"):
        dist.broadcast_object_list(values, src=source, device=_transport(torch.device("cpu")))
    return values[0]


def all_gather_object(value: _T) -> list[_T]:
    """Return the small values of all processes, in rank order.

    Raises:
        DistributedError: If another process is gone.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    with naming_failures("gathering values"):
        dist.all_gather_object(values, value)
    return values


def on_main(what: str, work: Callable[[], _T], *, heartbeat: float = 20.0) -> _T:
    """Let the main process do something, however long it takes, and return its result everywhere.

    Args:
        what: Its name in error messages, for instance ``"tokenising targets"``.
        work: Done by rank 0 alone; must not exchange anything itself. Its result must survive pickling.
        heartbeat: Seconds after which the others are told, again and again, that rank 0 is still at it; far below the
            backend's timeout, so that long work does not look like death.

    Raises:
        HFCorrectorError: The one ``work`` has raised, on every process.
        DistributedError: On the others, if ``work`` has raised anything else, or if the main process is gone.
    """
    if world_size() == 1:
        return work()
    with naming_failures(what):
        if not is_main():
            awaited: _T = _await_main(what)
            return awaited
        try:
            with _heartbeat(heartbeat):
                result = work()
        except BaseException as error:  # told to the others and raised again
            broadcast_object(("failed", error if isinstance(error, HFCorrectorError) else repr(error)))
            raise
        broadcast_object(("done", result))
        return result


def _await_main(what: str) -> Any:
    state, value = "working", None
    while state == "working":
        state, value = broadcast_object((state, value))
    if state == "done":
        return value
    if isinstance(value, HFCorrectorError):
        raise value
    cure = "Look at the output of rank 0."
    raise DistributedError(_place(what), expected="rank 0 to do this", got=f"its failure: {value}", cure=cure)


@contextmanager
def _heartbeat(seconds: float) -> Iterator[None]:
    """Tell waiting processes from time to time that the main one is alive."""
    done, failures = threading.Event(), list[Exception]()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def beat() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)
            while not done.wait(seconds):
                broadcast_object(("working", None))
        except DistributedError as error:
            failures.append(error)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]


def agree(what: str, error: Exception | None) -> None:
    """Fail on every process if one has failed, so that none waits for another that has given up.

    Args:
        what: What was done, for the message.
        error: What happened here; None if all is well.

    Raises:
        Exception: ``error`` itself where there is one.
        DistributedError: Elsewhere; names the ranks that failed, and the first one's error.
    """
    with naming_failures(what):
        errors = all_gather_object(None if error is None else str(error))
    if error is not None:
        raise error
    failed = [number for number, one in enumerate(errors) if one is not None]
    if failed:
        raise DistributedError(
            _place(what), expected=f"all {world_size()} processes to do this",
            got=f"a failure of rank {', '.join(map(str, failed))}: {errors[failed[0]]}", cure="Cure that one.",
        )  # fmt: skip


@contextmanager
def naming_failures(what: str | Callable[[], str]) -> Iterator[None]:
    """Turn the errors a backend raises when another process is gone or late into one that says so.

    Args:
        what: What this process was doing, for instance ``"training step 7"``, or what says so once it matters.

    Raises:
        DistributedError: Names this rank, what it was doing, the backend's words and the cure. Errors that have nothing
            to do with other processes pass through as they are.
    """
    try:
        yield
    except DistributedError as error:
        what = what if isinstance(what, str) else what()
        inner = error.where.removeprefix(_place(""))
        where = _place(what if inner == what else f"{what}, {inner}")
        raise DistributedError(where, expected=error.expected, got=error.got, cure=error.cure) from error
    except RuntimeError as error:
        if world_size() == 1 or not _from_backend(error):
            raise
        what = what if isinstance(what, str) else what()
        words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DistributedError(
            _place(what), expected=f"an answer of all {world_size()} processes", got=f"{type(error).__name__}: {words}",
            cure="Look for the first error of another rank (killed for memory, perhaps), then start the same command "
            "again: it goes on from the last complete checkpoint or shard.",
        ) from error  # fmt: skip


def _from_backend(error: RuntimeError) -> bool:
    message = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in message for word in _BACKEND_WORDS)


def _place(what: str) -> str:
    return f"rank {rank()} of {world_size()}, {what}"


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def _transport(device: torch.device) -> torch.device:
    """Return where tensors must be to travel: their own device if the group serves it, else one it does serve."""
    served = [pair.split(":")[0] for pair in dist.get_backend_config().split(",")]
    if device.type in served:
        return device
    if "cpu" in served:
        return torch.device("cpu")
    return torch.device(served[0], torch.get_device_module(served[0]).current_device())


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a tensor, ``(bytes,)`` uint8."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
