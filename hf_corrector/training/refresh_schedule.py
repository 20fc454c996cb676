"""When the cache of target embeddings is made anew during training."""

from __future__ import annotations

from dataclasses import dataclass

from hf_corrector.errors import ConfigurationError


@dataclass(frozen=True)
class RefreshSchedule:
    """Steps at which the cache is refreshed.

    Attributes:
        phases: ``(first step, end step, every)``; within first ≤ step < end a refresh is due at multiples of ``every``.
    """

    phases: tuple[tuple[int, float, int], ...]

    @classmethod
    def parse(cls, text: str | int) -> RefreshSchedule:
        """Read a schedule.

        Args:
            text: A number of steps; −1, 0 or ``"never"``; or phases as Atlas writes them,
                ``"0-1000:500,1000-10000:1000"``.

        Raises:
            ConfigurationError: If it is none of these.
        """
        words = str(text).strip().lower()
        if words in ("never", "-1", "0", "none", ""):
            return cls(())
        if words.isdecimal() and int(words) > 0:
            return cls(((0, float("inf"), int(words)),))
        phases = []
        for part in words.split(","):
            try:
                span, every = part.split(":")
                first, end = span.split("-")
                phase = (int(first), float(int(end)), int(every))
            except ValueError:
                raise _unreadable(text) from None
            if not 0 <= phase[0] < phase[1] or phase[2] < 1:
                raise _unreadable(text)
            phases.append(phase)
        return cls(tuple(phases))

    def due(self, step: int) -> bool:
        """Say whether the cache is to be refreshed after ``step`` optimiser steps; never before the first one."""
        return step > 0 and any(first <= step < end and step % every == 0 for first, end, every in self.phases)


def _unreadable(text: str | int) -> ConfigurationError:
    return ConfigurationError(
        "refresh_steps", expected="a number of steps, 'never', or phases like '0-1000:500,1000-10000:1000'",
        got=repr(text), cure="Write it in one of these forms.",
    )  # fmt: skip
