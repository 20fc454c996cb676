from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_corrector.training.pair_window import PairWindow


def rows_of(*rows: int) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def fresh_of(*values: float, dim: int = 2) -> torch.Tensor:
    return torch.tensor(values)[:, None].expand(-1, dim).contiguous()


def contents(window: PairWindow) -> tuple[list[int], list[float], list[int]]:
    found = window.pairs()
    return found.rows.tolist(), found.fresh[:, 0].tolist(), found.steps.tolist()


def test_latest_re_encoding_of_each_target_is_kept_in_order_of_rows() -> None:
    window = PairWindow(10, 2)
    window.add(rows_of(7, 3, 7), fresh_of(0.1, 0.2, 0.3), step=0)
    window.add(rows_of(3, 1), fresh_of(0.5, 0.25), step=1)
    rows, fresh, steps = contents(window)
    assert (rows, steps) == ([1, 3, 7], [1, 1, 0])
    assert fresh == pytest.approx([0.25, 0.5, 0.3])
    assert len(window) == 5


def test_pairs_leave_after_so_many_steps() -> None:
    window = PairWindow(3, 2)
    for step in range(6):
        window.add(rows_of(step, 100), fresh_of(step, step), step=step)
    assert contents(window) == ([3, 4, 5, 100], [3.0, 4.0, 5.0, 5.0], [3, 4, 5, 5])


def test_window_of_one_step_holds_that_step() -> None:
    window = PairWindow(1, 2)
    window.add(rows_of(1), fresh_of(1.0), step=4)
    window.add(rows_of(2), fresh_of(2.0), step=4)
    assert contents(window)[0] == [1, 2]
    window.add(rows_of(3), fresh_of(3.0), step=5)
    assert contents(window)[0] == [3]


def test_steps_without_pairs_still_let_old_ones_leave() -> None:
    window = PairWindow(2, 2)
    window.add(rows_of(1), fresh_of(1.0), step=0)
    window.add(rows_of(), torch.zeros(0, 2), step=5)
    assert contents(window) == ([], [], [])


def test_empty_window_gives_empty_pairs_of_the_right_size() -> None:
    found = PairWindow(5, 3).pairs()
    assert (found.rows.shape, found.fresh.shape, found.steps.shape) == ((0,), (0, 3), (0,))
    assert found.rows.dtype == torch.int64


def test_pairs_are_float32_and_without_gradient() -> None:
    window = PairWindow(5, 2)
    window.add(rows_of(1), fresh_of(1.0).bfloat16().requires_grad_(True), step=0)
    assert window.pairs().fresh.dtype == torch.float32
    assert not window.pairs().fresh.requires_grad


def test_clearing_forgets_everything() -> None:
    window = PairWindow(5, 2)
    window.add(rows_of(1), fresh_of(1.0), step=0)
    window.clear()
    assert contents(window) == ([], [], [])
    assert len(window) == 0


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_window_goes_on_from_a_file_as_if_never_interrupted(steps: int, tmp_path: Path) -> None:
    window = PairWindow(3, 2)
    for step in range(steps):
        window.add(rows_of(step, step + 1), fresh_of(step, -step), step=step)
    save_file(window.state(), tmp_path / "window.safetensors")
    restored = PairWindow(3, 2)
    restored.load_state(load_file(tmp_path / "window.safetensors"))
    for step in range(steps, steps + 5):
        assert contents(restored) == contents(window)
        assert len(restored) == len(window)
        for one in (window, restored):
            one.add(rows_of(step, 2), fresh_of(step, -step), step=step)
