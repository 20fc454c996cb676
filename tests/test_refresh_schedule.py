import pytest

from hf_corrector.errors import ConfigurationError
from hf_corrector.training.refresh_schedule import RefreshSchedule


def due_steps(text: str | int, until: int = 50) -> list[int]:
    schedule = RefreshSchedule.parse(text)
    return [step for step in range(until) if schedule.due(step)]


@pytest.mark.parametrize("text", ["never", "Never ", "none", "", "0", "-1", 0, -1])
def test_never(text: str | int) -> None:
    assert due_steps(text) == []
    assert RefreshSchedule.parse(text).phases == ()


@pytest.mark.parametrize("text", ["20", 20, " 20 ", "020"])
def test_every_so_many_steps_but_not_before_the_first(text: str | int) -> None:
    assert due_steps(text) == [20, 40]


def test_every_step() -> None:
    assert due_steps("1", until=4) == [1, 2, 3]


def test_phases_with_their_own_intervals() -> None:
    assert due_steps("0-10:4,10-30:10,40-42:1") == [4, 8, 10, 20, 40, 41]


def test_end_of_a_phase_belongs_to_the_next() -> None:
    assert due_steps("0-8:4") == [4]
    assert due_steps("0-8:4, 8-12:2") == [4, 8, 10]


def test_gaps_between_phases_are_without_refresh() -> None:
    assert due_steps("5-11:5,30-31:10") == [5, 10, 30]


@pytest.mark.parametrize(
    "text",
    [
        "often", "-5", "1.5", "00-", "0-10", "0-10:0", "0-10:-1", "10-10:1", "10-5:1", "0-10:4;", "0-10:4,", "a-b:c",
        "0-inf:5", "²", "00", "-1-5:2", -2,
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_words(text: str | int) -> None:
    with pytest.raises(ConfigurationError, match="refresh_steps"):
        RefreshSchedule.parse(text)
