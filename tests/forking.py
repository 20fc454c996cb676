"""Where the processes of tests are forked from: one server that has imported everything and has no threads."""

from __future__ import annotations

import functools
import multiprocessing
import os
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def search_path() -> str:
    """Return a PYTHONPATH by which a new process finds the helpers of the tests and the package as it stands here."""
    return os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])


@functools.cache
def forking_context() -> ForkServerContext:
    """Start the server, of which a session has only one, and return the context whose processes it forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not tell the server where this process looks for modules, and skips those it does not find.
        patch.setenv("PYTHONPATH", search_path())
        forkserver.ensure_running()
    return context
