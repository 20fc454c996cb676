import time

import pytest

from hf_corrector.training.step_log import StepLog


def test_means_are_weighted_by_their_counts() -> None:
    log = StepLog()
    log.observe("error", 1.0)
    log.observe("error", 4.0, count=3)
    log.observe("cosine", 0.5)
    assert log.drain() == {"error": 3.25, "cosine": 0.5}


def test_draining_forgets_and_nothing_observed_is_nothing_logged() -> None:
    log = StepLog()
    log.observe("error", 1.0)
    log.drain()
    log.observe("none", 0.0, count=0)
    assert log.drain() == {}


def test_phases_are_shares_of_the_step_and_add_up_over_the_run() -> None:
    log = StepLog()
    for _ in range(2):
        with log.phase("step"):
            with log.phase("sample"):
                time.sleep(0.01)
            time.sleep(0.01)
    shares = log.drain()
    assert set(shares) == {"share_sample"}
    assert 0.2 < shares["share_sample"] < 0.8
    assert log.drain() == {}
    assert log.total_seconds["sample"] == pytest.approx(shares["share_sample"] * log.total_seconds["step"])
    with log.phase("step"):
        pass
    assert log.total_seconds["step"] >= 0.04


def test_a_phase_is_timed_without_those_in_it_and_the_step_whole() -> None:
    log = StepLog()
    with log.phase("step"):
        with log.phase("encode"):
            time.sleep(0.01)
            with log.phase("sampling"):
                time.sleep(0.05)
        with log.phase("corrector"), log.phase("encode"):
            time.sleep(0.02)
    spent, shares = dict(log.total_seconds), log.drain()
    assert spent["sampling"] >= 0.05 and spent["encode"] >= 0.03 and spent["corrector"] < 0.02
    parts = spent["sampling"] + spent["encode"] + spent["corrector"]
    # What a step does between its phases is what lacks to the whole.
    assert parts <= spent["step"] and spent["encode"] < spent["step"] - 0.05
    assert sum(shares.values()) == pytest.approx(parts / spent["step"])


def test_phase_that_fails_is_timed_too() -> None:
    log = StepLog()
    with pytest.raises(RuntimeError, match="stop"), log.phase("step"):
        raise RuntimeError("stop")
    assert "step" in log.total_seconds
    with pytest.raises(RuntimeError, match="stop"), log.phase("step"), log.phase("encode"):
        raise RuntimeError("stop")
    with log.phase("sampling"):
        time.sleep(0.01)
    assert log.total_seconds["sampling"] >= 0.01
