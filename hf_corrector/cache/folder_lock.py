"""One writer at a time: a file lock that the system gives back when its holder dies, however it dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from hf_corrector.errors import CacheError

LOCK_FILE = "LOCK"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's ``LOCK`` file.

    Raises:
        CacheError: If someone else, in this process or another, holds it; names the process.
    """
    path = folder / LOCK_FILE
    while True:
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - closed below, on every way out
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read() or "another process"
            handle.close()
            raise CacheError(
                str(folder), expected="no other writer", got=f"one at work ({holder})",
                cure="Wait until it is done; a cache is built by one process.",
            ) from None  # fmt: skip
        # The last holder removes the file, so the one locked here may no longer be the one with this name.
        if _same_file(handle.fileno(), path):
            break
        handle.close()
    owner = os.getpid()
    try:
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield
    finally:
        if os.getpid() == owner:  # a forked child that unwinds the stack must not take its parent's lock away
            path.unlink(missing_ok=True)
        handle.close()


class LockHolder:
    """What writes into a folder and holds its lock from construction until :meth:`close` or the end of a ``with``.

    A constructor takes the lock into an ``ExitStack`` of its own and leaves ``stack.pop_all()`` in ``_lock`` once
    nothing can go wrong any more; before, any exception gives the lock back.
    """

    _lock: ExitStack | None = None

    def __enter__(self) -> Self:
        """Return itself; the lock is held since construction."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the lock back; what is on the disk and unfinished stays for the next writer."""
        self.close()

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
