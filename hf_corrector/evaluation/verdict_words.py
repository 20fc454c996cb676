"""Numbers as the verdict, its table and its checklist write them."""

from __future__ import annotations

from hf_corrector.metrics import Interval


def number(value: float) -> str:
    """Write with three digits, and no minus before zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def spread(interval: Interval) -> str:
    """Write an estimate with its interval."""
    return f"{number(interval.estimate)} [{number(interval.low)}, {number(interval.high)}]"


def percent(interval: Interval) -> str:
    """Write a ratio with its interval in per cent."""
    return f"{100 * interval.estimate:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def opposite(interval: Interval) -> Interval:
    """Return the interval of the difference the other way round."""
    return Interval(-interval.estimate, -interval.high, -interval.low)


def aligned(rows: list[list[str]]) -> list[str]:
    """Lay out rows in columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
