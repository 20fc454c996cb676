"""Numbers as a report writes them."""

from __future__ import annotations

from hf_corrector.report.nodes import Level


def number(value: float) -> str:
    """Write with three digits after the point, large and tiny ones with three that count; no minus before zero."""
    if value and not 0.001 <= abs(value) < 10_000:
        return f"{value:.3g}"
    return f"{round(value, 3) + 0.0:.3f}"


def spread(level: Level) -> str:
    """Write an estimate with its interval, if it has one."""
    if level.low is None or level.high is None:
        return number(level.estimate)
    return f"{number(level.estimate)} [{number(level.low)}, {number(level.high)}]"


def percent(level: Level) -> str:
    """Write a ratio in per cent."""
    if level.low is None or level.high is None:
        return f"{100 * level.estimate:.0f} %"
    return f"{100 * level.estimate:.0f} % [{100 * level.low:.0f}, {100 * level.high:.0f}]"
