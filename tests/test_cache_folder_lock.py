"""One writer at a time, whatever happens to the others."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import pytest
from cache_helpers import build, make_plan, make_vectors, run_child

from hf_corrector.cache import CacheWriter
from hf_corrector.cache.folder_lock import locked
from hf_corrector.errors import CacheError


def try_to_write(path: Path) -> None:
    try:
        CacheWriter(path, make_plan())
    except CacheError as error:
        raise SystemExit(3 if "expected no other writer; got one at work (process" in str(error) else 4) from None


def test_a_second_writer_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, make_plan()) as writer:
        with pytest.raises(CacheError, match=rf"one at work \(process {os.getpid()} on .*Wait until it is done"):
            CacheWriter(tmp_path, make_plan())
        assert run_child(try_to_write, tmp_path) == 3
        writer.write_shard(0, make_vectors()[:4])
    assert run_child(try_to_write, tmp_path) == 0
    build(tmp_path, make_plan(), make_vectors())
    assert not (tmp_path / "LOCK").exists()


def test_a_writer_whose_lock_file_was_removed_meanwhile_does_not_believe_to_hold_it(tmp_path: Path) -> None:
    """Compete for the lock, which each holder removes: at no time may two hold it."""
    inside: list[int] = []
    overlaps: list[list[int]] = []
    held = [0] * 6

    def compete(number: int) -> None:
        end = time.monotonic() + 60
        while sum(held) <= 500 and time.monotonic() < end:
            with contextlib.suppress(CacheError), locked(tmp_path):
                inside.append(number)
                overlaps.append(list(inside)) if len(inside) > 1 else None
                held[number] += 1
                time.sleep(0.0001)
                inside.remove(number)

    threads = [threading.Thread(target=compete, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert overlaps == []
    assert sum(held) > 500


def test_a_forked_child_does_not_take_the_lock_away(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, make_plan()) as writer:
        pid = os.fork()
        if pid == 0:
            writer.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        with pytest.raises(CacheError, match="no other writer"):
            CacheWriter(tmp_path, make_plan())
