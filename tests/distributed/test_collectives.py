from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from process_helpers import outcomes_on_ranks, run_on_ranks

from hf_corrector import _distributed
from hf_corrector.errors import ConfigurationError, DistributedError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(3).to(dtype)


# ------------------------------------------------------------------------------ one process


def test_alone_everything_is_the_identity() -> None:
    rows = seeded(3, 2, seed=0).requires_grad_()
    assert (_distributed.rank(), _distributed.world_size(), _distributed.is_main()) == (0, 1, True)
    (own,) = _distributed.all_gather_rows(rows)
    assert torch.equal(own, rows) and not own.requires_grad
    assert _distributed.gather_columns(rows) is rows
    assert _distributed.broadcast_object({"a": 1}) == {"a": 1}
    assert _distributed.all_gather_object(7) == [7]
    assert _distributed.on_main("anything", lambda: 5) == 5
    _distributed.broadcast_tensors([rows])
    _distributed.barrier()
    with pytest.raises(ConfigurationError):
        _distributed.agree("anything", ConfigurationError("x", expected="a", got="b", cure="c"))


def test_errors_of_one_process_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^gloo is a word here$"), _distributed.naming_failures("this"):
        raise RuntimeError("gloo is a word here")


# ------------------------------------------------------------------------------ gathering


def gather_every_type(sizes: list[int]) -> None:
    own = sizes[_distributed.rank()]
    for dtype in DTYPES:
        for shape in ((), (3,), (2, 3)):
            local = seeded(own, *shape, seed=_distributed.rank(), dtype=dtype)
            gathered = _distributed.all_gather_rows(local)
            expected = [seeded(size, *shape, seed=rank, dtype=dtype) for rank, size in enumerate(sizes)]
            assert [part.dtype for part in gathered] == [dtype] * len(sizes)
            assert [part.shape for part in gathered] == [part.shape for part in expected]
            assert all(torch.equal(part, one) for part, one in zip(gathered, expected, strict=True))


@pytest.mark.parametrize("sizes", [[4], [5, 2], [0, 3], [0, 0], [3, 0, 1, 2]])
def test_rows_of_all_types_and_numbers_arrive_bit_for_bit(sizes: list[int]) -> None:
    run_on_ranks(gather_every_type, len(sizes), sizes)


def gather_odd_bits() -> None:
    bits = torch.tensor([[0x7FC00001, -0x80000000, 1, 0x7F800000]], dtype=torch.int32)  # a NaN's payload, -0, denormal
    strided = bits.view(torch.float32).expand(5, 4)
    for part in _distributed.all_gather_rows(strided):
        assert torch.equal(part.view(torch.int32), bits.expand(5, 4))


def test_not_even_the_bits_of_nan_change() -> None:
    run_on_ranks(gather_odd_bits, 2)


def gather_in_pieces() -> None:
    many = 40_000 if _distributed.rank() else 55_001  # of 2 KiB: two pieces of 64 MiB from two processes
    local = torch.arange(many, dtype=torch.int64)[:, None].expand(many, 256)
    first, second = _distributed.all_gather_rows(local)
    assert torch.equal(first[:, 0], torch.arange(55_001)) and torch.equal(second[:, -1], torch.arange(40_000))


def test_many_rows_travel_in_pieces() -> None:
    run_on_ranks(gather_in_pieces, 2)


# ------------------------------------------------------------------------------ gradient


def loss_of(rank: int, columns: torch.Tensor) -> torch.Tensor:
    weights = seeded(*columns.shape, seed=100 + rank)
    return (columns.float() * weights).sum() + columns.float().square().sum() * (rank + 1) + columns.float()[0, 0].exp()


def gradients_of_gathered(sizes: list[int], dtype: torch.dtype) -> torch.Tensor:
    rank = _distributed.rank()
    local = seeded(sizes[rank], 3, seed=rank, dtype=dtype).requires_grad_()
    columns = _distributed.gather_columns(local)
    expected = torch.cat([seeded(size, 3, seed=one, dtype=dtype) for one, size in enumerate(sizes)])
    assert columns.dtype == dtype and torch.equal(columns, expected)
    loss_of(rank, columns).backward()
    assert local.grad is not None and local.grad.dtype == dtype
    return local.grad


@pytest.mark.parametrize("sizes", [[4], [4, 4], [3, 1], [2, 0, 1, 2]])
def test_gradient_of_gathered_columns_is_that_of_one_process(sizes: list[int]) -> None:
    gradients = run_on_ranks(gradients_of_gathered, len(sizes), sizes, torch.float32)
    whole = torch.cat([seeded(size, 3, seed=rank) for rank, size in enumerate(sizes)]).requires_grad_()
    torch.stack([loss_of(rank, whole) for rank in range(len(sizes))]).sum().backward()
    assert whole.grad is not None
    torch.testing.assert_close(torch.cat(gradients), whole.grad, rtol=1e-6, atol=1e-5)


def test_gradients_of_half_precision_are_summed_in_float32() -> None:
    gradients = torch.cat(run_on_ranks(gradients_of_gathered, 2, [3, 2], torch.bfloat16))
    whole = torch.cat([seeded(size, 3, seed=rank, dtype=torch.bfloat16) for rank, size in enumerate([3, 2])])
    parts = []
    for rank in range(2):
        leaf = whole.clone().requires_grad_()
        loss_of(rank, leaf).backward()
        assert leaf.grad is not None
        parts.append(leaf.grad.float())
    assert torch.equal(gradients, (parts[0] + parts[1]).to(torch.bfloat16))


# ------------------------------------------------------------------------------ broadcasting


def broadcast_every_type(source: int) -> None:
    mine = _distributed.rank() == source
    tensors = [seeded(4, 3, seed=9 if mine else 1, dtype=dtype) for dtype in DTYPES]
    strided = seeded(4, 6, seed=9 if mine else 1)
    others = [strided[:, ::2], torch.tensor(4.5 if mine else 0.0), torch.empty(0), torch.nn.Parameter(tensors[0] + 1)]
    _distributed.broadcast_tensors([*tensors, *others], source=source)
    for dtype, tensor in zip(DTYPES, tensors, strict=True):
        assert torch.equal(tensor, seeded(4, 3, seed=9, dtype=dtype))
    assert torch.equal(strided[:, ::2], seeded(4, 6, seed=9)[:, ::2])
    assert mine or torch.equal(strided[:, 1::2], seeded(4, 6, seed=1)[:, 1::2])
    assert others[1].item() == 4.5 and torch.equal(others[3], seeded(4, 3, seed=9) + 1)
    assert _distributed.broadcast_object({"from": _distributed.rank()}, source=source) == {"from": source}


@pytest.mark.parametrize(("count", "source"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_tensors_of_all_types_become_those_of_the_source(count: int, source: int) -> None:
    run_on_ranks(broadcast_every_type, count, source)


def own_rank_and_all() -> tuple[int, bool, list[int]]:
    _distributed.barrier()
    return _distributed.rank(), _distributed.is_main(), _distributed.all_gather_object(_distributed.rank() ** 2)


def test_every_process_knows_its_rank_and_what_the_others_say() -> None:
    assert run_on_ranks(own_rank_and_all, 3) == [(0, True, [0, 1, 4]), (1, False, [0, 1, 4]), (2, False, [0, 1, 4])]


# ------------------------------------------------------------------------------ one for all, all for one


def main_alone() -> tuple[int, int]:
    called = []

    def work() -> int:
        called.append(1)
        return 42

    return _distributed.on_main("counting", work), len(called)


def test_main_works_and_all_have_its_result() -> None:
    assert run_on_ranks(main_alone, 2) == [(42, 1), (42, 0)]


def main_is_slow() -> str:
    # The group gives up after two seconds of silence, the work takes four.
    return _distributed.on_main("sleeping", lambda: [time.sleep(4), "rested"][1], heartbeat=0.5)


def test_waiting_for_main_never_times_out_while_it_works() -> None:
    outcomes = outcomes_on_ranks(main_is_slow, 2, group_timeout=2)
    assert [outcome.result for outcome in outcomes] == ["rested"] * 2, outcomes


def main_raises(kind: str) -> None:
    def work() -> None:
        if kind == "ours":
            raise ConfigurationError("here", expected="this", got="that", cure="Do it.")
        raise OSError("disk full")

    _distributed.on_main("writing", work)


def test_what_main_raises_is_raised_everywhere() -> None:
    mine, theirs = outcomes_on_ranks(main_raises, 2, "ours")
    assert type(mine.error) is type(theirs.error) is ConfigurationError
    assert str(mine.error) == str(theirs.error) == "here: expected this; got that. Do it."
    mine, theirs = outcomes_on_ranks(main_raises, 2, "another")
    assert isinstance(mine.error, OSError) and isinstance(theirs.error, DistributedError)
    assert theirs.error.where == "rank 1 of 2, writing" and "disk full" in theirs.error.got


def second_disagrees() -> None:
    error = ConfigurationError("b", expected="x", got="y", cure="z.") if _distributed.rank() == 1 else None
    _distributed.agree("opening the cache", error)


def test_no_process_goes_on_if_one_has_failed() -> None:
    first, second, third = (outcome.error for outcome in outcomes_on_ranks(second_disagrees, 3))
    assert isinstance(second, ConfigurationError)
    assert isinstance(first, DistributedError) and isinstance(third, DistributedError)
    assert first.where == "rank 0 of 3, opening the cache" and "rank 1: b: expected x" in third.got


# ------------------------------------------------------------------------------ death of a process


def second_dies(exchange: str) -> None:
    _distributed.barrier()
    if _distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with _distributed.naming_failures("training step 7"):
        if exchange == "gradients":
            model = torch.nn.Linear(2, 1)
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.detach())
        elif exchange == "columns":
            _distributed.gather_columns(torch.ones(2, 2))
        elif exchange == "values":
            _distributed.broadcast_object(1, source=1)
        else:
            _distributed.broadcast_tensors([torch.ones(3)], source=1)


@pytest.mark.parametrize("exchange", ["gradients", "columns", "values", "tensors"])
def test_death_of_a_process_ends_the_others_naming_rank_and_phase(exchange: str) -> None:
    start = time.monotonic()
    survivor, dead = outcomes_on_ranks(second_dies, 2, exchange, timeout=40)
    assert time.monotonic() - start < 30
    assert dead.exit_code == -signal.SIGKILL and survivor.exit_code == 1
    assert isinstance(survivor.error, DistributedError), survivor
    assert survivor.error.where.startswith("rank 0 of 2, training step 7")


def main_dies_while_others_wait() -> None:
    _distributed.on_main("tokenising", lambda: [time.sleep(1), os.kill(os.getpid(), signal.SIGKILL)], heartbeat=0.2)


def test_death_of_main_ends_those_who_wait_for_it() -> None:
    dead, waiting = outcomes_on_ranks(main_dies_while_others_wait, 2)
    assert dead.exit_code == -signal.SIGKILL
    assert isinstance(waiting.error, DistributedError) and waiting.error.where.startswith("rank 1 of 2, tokenising")


def waiting_dies_while_main_works() -> None:
    _distributed.barrier()
    if _distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _distributed.on_main("tokenising", lambda: time.sleep(2), heartbeat=0.2)


def test_death_of_one_who_waits_ends_main() -> None:
    main, _ = outcomes_on_ranks(waiting_dies_while_main_works, 2)
    assert isinstance(main.error, DistributedError) and main.error.where.startswith("rank 0 of 2, tokenising")


def second_sleeps() -> None:
    _distributed.barrier()
    if _distributed.rank() == 1:
        time.sleep(8)
    _distributed.gather_columns(torch.ones(2, 2))


def test_a_process_that_hangs_ends_the_others_after_the_timeout() -> None:
    start = time.monotonic()
    waiting, _ = outcomes_on_ranks(second_sleeps, 2, group_timeout=3)
    assert isinstance(waiting.error, DistributedError) and time.monotonic() - start < 30
    assert "Timed out" in waiting.error.got


def wrong_shape() -> None:
    with _distributed.naming_failures("multiplying"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_errors_that_are_nobody_elses_fault_keep_their_class() -> None:
    for outcome in outcomes_on_ranks(wrong_shape, 2):
        assert type(outcome.error) is RuntimeError
