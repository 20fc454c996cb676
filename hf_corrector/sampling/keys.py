"""Random numbers that are functions of (seed, step, query), whoever asks for them and whenever."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# What a number is drawn for; two purposes never share one.
FIRST_OF_BLOCK, NEXT_OF_BLOCK, WITHIN_BLOCK, UNIFORM_TARGETS, SHUFFLE, ROUNDING, LISTED, SKIPPED = range(1, 9)


@dataclass(frozen=True)
class DrawKeys:
    """What random draws are keyed by.

    Attributes:
        seed: Seed of the run.
        step: Number of the draw within the run; two draws with equal keys are equal.
        query_ids: Stable number of each query, ``(batch,)`` int64.
    """

    seed: int
    step: int
    query_ids: IntArray

    def uniforms(self, count: int, *, stream: int, first: int = 0) -> npt.NDArray[np.float64]:
        """Return numbers ``first`` to ``first + count`` of a stream, in [0, 1), ``(batch, count)``.

        Streams are independent of each other.
        """
        return self.numbers(np.arange(first, first + count, dtype=np.int64)[None, :], stream=stream)

    def numbers(self, positions: IntArray, *, stream: int) -> npt.NDArray[np.float64]:
        """Return chosen numbers of a stream, in [0, 1).

        The generator is SplitMix64's finaliser (Steele, Lea, Flood 2014) chained over the key's parts.

        Args:
            positions: Which numbers, ``(batch or 1, count)``.
            stream: What they are drawn for.

        Returns:
            ``(batch, count)``.
        """
        with np.errstate(over="ignore"):
            state = _mix(np.asarray(self.seed, dtype=np.int64).astype(np.uint64))
            state = _mix(state ^ np.asarray(self.step, dtype=np.int64).astype(np.uint64))
            state = _mix(state ^ np.uint64(stream))
            rows = _mix(state ^ self.query_ids.astype(np.int64).astype(np.uint64))
            bits = _mix(rows[:, None] ^ _mix((positions + 1).astype(np.uint64)))
        return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def of(self, queries: slice | IntArray) -> DrawKeys:
        """Return the keys of some of the queries."""
        return DrawKeys(self.seed, self.step, self.query_ids[queries])


def _mix(values: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    mixed = np.asarray(values, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), dtype=np.uint64)
