"""Targets drawn by chance alone."""

from __future__ import annotations

import numpy as np

from hf_corrector.sampling.exclusions import ExcludedRows
from hf_corrector.sampling.keys import ROUNDING, SHUFFLE, SKIPPED, UNIFORM_TARGETS, DrawKeys, IntArray


def draw_uniform(num_targets: int, k: int, *, excluded: ExcludedRows, keys: DrawKeys) -> IntArray:
    """Draw k distinct targets per query uniformly.

    Args:
        num_targets: Number of targets.
        k: Draws per query.
        excluded: Known positives are never drawn; a ceiling of scores is not looked at.
        keys: What the draws are keyed by.

    Returns:
        Rows, ``(batch, k)`` int64; −1 where a query has fewer targets left.
    """
    drawn = np.full((len(keys.query_ids), k), -1, dtype=np.int64)
    free = [num_targets - int(np.searchsorted(rows, num_targets)) for rows in excluded.per_query]
    wanted = 4 * k + 16
    uniforms = keys.uniforms(wanted, stream=UNIFORM_TARGETS)
    proposals = np.minimum((uniforms * num_targets).astype(np.int64), num_targets - 1)
    for row, banned in enumerate(excluded.per_query):
        seen = set(banned.tolist())
        fresh = [one for one in dict.fromkeys(proposals[row].tolist()) if one not in seen][:k]
        if len(fresh) < min(k, free[row]):
            # So few targets are left that rejection is a bad idea: shuffle them all with further keyed numbers.
            rest = np.setdiff1d(np.arange(num_targets), np.asarray([*seen, *fresh], dtype=np.int64))
            one_query = keys.of(slice(row, row + 1))
            fresh += rest[np.argsort(one_query.uniforms(len(rest), stream=SHUFFLE)[0], kind="stable")].tolist()
        fresh = fresh[:k]
        drawn[row, : len(fresh)] = fresh
    return drawn


def uniform_counts(k: int, fraction: float, keys: DrawKeys) -> IntArray:
    """Decide how many of each query's k negatives are drawn uniformly.

    ``k × fraction`` is rounded up or down at random, keyed by the query, so that the mean over queries is exact.

    Returns:
        Counts between 0 and k, ``(batch,)`` int64.
    """
    return np.floor(k * fraction + keys.uniforms(1, stream=ROUNDING)[:, 0]).astype(np.int64).clip(0, k)


def skipped_counts(count: int, share: float, keys: DrawKeys) -> IntArray:
    """Decide how many of each query's ``count`` highest targets lie in a pool that holds a share of all.

    ``count × share`` is rounded up or down at random, keyed by the query, so that the mean over queries is exact.

    Returns:
        Counts between 0 and ``count``, ``(batch,)`` int64.
    """
    return np.floor(count * share + keys.uniforms(1, stream=SKIPPED)[:, 0]).astype(np.int64).clip(0, count)


def draw_pool(num_targets: int, size: int, *, seed: int, step: int) -> IntArray:
    """Draw distinct targets uniformly, the same for all queries of a step.

    Returns:
        Rows in ascending order, ``(min(size, num_targets),)`` int64.
    """
    if size >= num_targets:
        return np.arange(num_targets, dtype=np.int64)
    generator = np.random.default_rng([seed, step])
    return np.sort(generator.choice(num_targets, size, replace=False, shuffle=False).astype(np.int64))
