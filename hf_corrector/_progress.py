"""A sign of life for work whose steps cannot be counted; what can be counted has a bar of tqdm's own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

_SECONDS_BETWEEN = 0.25


@contextmanager
def working(what: str, *, shown: bool) -> Iterator[None]:
    """Show what is being done and for how long, while it is being done; nothing in the first second.

    Args:
        what: What is being done, for instance ``"fit correctors"``.
        shown: Whether to show anything.
    """
    if not shown:
        yield
        return
    with tqdm(desc=what, bar_format="{desc} … {elapsed}", delay=1.0, mininterval=0.0, miniters=0, leave=False) as bar:
        done = threading.Event()

        def tick() -> None:
            while not done.wait(_SECONDS_BETWEEN):
                bar.update(0)

        ticking = threading.Thread(target=tick, name="progress", daemon=True)
        ticking.start()
        try:
            yield
        finally:
            done.set()
            ticking.join()
