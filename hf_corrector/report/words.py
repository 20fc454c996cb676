"""Numbers as a report writes them."""

from __future__ import annotations

from hf_corrector.report.nodes import Level


def number(value: float) -> str:
    """Write with three digits after the point, and no minus before zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def logged(value: float) -> str:
    """Write a number of any size: very large and very small ones with three digits that count."""
    return number(value) if not value or 0.001 <= abs(value) < 10_000 else f"{value:.3g}"


def spread(level: Level) -> str:
    """Write an estimate with its interval, if it has one."""
    if level.low is None or level.high is None:
        return number(level.estimate)
    return f"{number(level.estimate)} [{number(level.low)}, {number(level.high)}]"


def percent(level: Level) -> str:
    """Write a ratio in per cent, with its interval if it has one."""
    if level.low is None or level.high is None:
        return f"{_hundredths(level.estimate)} %"
    return f"{_hundredths(level.estimate)} % [{_hundredths(level.low)}, {_hundredths(level.high)}]"


def _hundredths(ratio: float) -> str:
    return f"{round(100 * ratio) + 0:,}"
