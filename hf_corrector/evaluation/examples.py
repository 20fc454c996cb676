"""A few judged queries with their results, so that whoever reads a record sees what correction did, harm included.

Which queries are shown is no matter of taste: a few are drawn at random, then those that correction harmed most and
those it helped most. How many were harmed and helped in all stands beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from hf_corrector.data.retrieval import column
from hf_corrector.evaluation.evaluator import SHOWN, Judgement
from hf_corrector.metrics import FloatArray, IntArray, Relevant

RANDOM, EXTREME = 3, 2
CONDITIONS = ("old", "stale", "corrected", "fresh")
# A record is read by people: whatever is longer is cut and ends in "…".
QUERY_CHARS, TEXT_CHARS, ID_CHARS = 240, 160, 120
RELEVANT_SHOWN = 3
_LEAST = 1e-9  # differences of a metric below this are rounding


def judged_examples(
    judgement: Judgement, relevant: Relevant, *, split: Dataset, corpus: Dataset, seed: int
) -> dict[str, Any]:
    """Return example queries as JSON values, at most ``RANDOM + 2 * EXTREME`` of them.

    Args:
        judgement: What was measured, ``corrected`` and something to compare it with among it.
        relevant: For each query its relevant rows of the corpus and their grades.
        split: The judged queries, in the order of the judgement.
        corpus: The targets whose rows the judgement's rankings name.
        seed: Seed of the draw.

    Returns:
        The rule in words, how many queries were helped and harmed, and the queries; empty where nothing was corrected.
    """
    against = next((name for name in ("stale", "old", "fresh") if name in judgement.ranked), None)
    if against is None or "corrected" not in judgement.ranked:
        return {}
    values = {name: judgement.per_query[name][judgement.primary] for name in CONDITIONS if name in judgement.ranked}
    clean = bool(judgement.clean.any())
    pool = np.flatnonzero(judgement.clean) if clean else np.arange(judgement.queries)
    gains = (values["corrected"] - values[against])[pool]
    chosen = _chosen(gains, seed)
    queries = [(why, int(pool[place])) for why, place in chosen]
    return {
        "rule": f"{RANDOM} {'clean queries' if clean else 'queries (none is clean)'} drawn at random with seed {seed}; "
        f"then, of the others, up to {EXTREME} that correction harmed most against {against} and up to {EXTREME} that "
        "it helped most, ties as drawn",
        "metric": judgement.primary, "against": against, "queries": len(pool),
        "helped": int((gains > _LEAST).sum()), "harmed": int((gains < -_LEAST).sum()),
        "shown": [
            {"chosen": why, **_shown(judgement, relevant[query], values, query=query, data=(split, corpus))}
            for why, query in queries
        ],
    }  # fmt: skip


def _chosen(gains: FloatArray, seed: int) -> list[tuple[str, int]]:
    """Return why and which: places within ``gains``."""
    order = np.random.default_rng([seed, 5]).permutation(len(gains))
    drawn, rest = order[:RANDOM].tolist(), order[RANDOM:]
    ascending = rest[np.argsort(gains[rest], kind="stable")]
    descending = rest[np.argsort(-gains[rest], kind="stable")]
    harmed = [one for one in ascending[:EXTREME].tolist() if gains[one] < -_LEAST]
    helped = [one for one in descending[:EXTREME].tolist() if gains[one] > _LEAST]
    named = (("drawn at random", drawn), ("harmed most", harmed), ("helped most", helped))
    return [(why, place) for why, places in named for place in places]


def _shown(
    judgement: Judgement, known: Mapping[int, float], values: Mapping[str, FloatArray], *, query: int,
    data: tuple[Dataset, Dataset],
) -> dict[str, Any]:  # fmt: skip
    """Return one query, what answers it and what each condition found."""
    split, corpus = data
    answers = [row for row, grade in known.items() if grade > 0]

    def targets(rows: IntArray | list[int]) -> list[dict[str, Any]]:
        found = [int(row) for row in rows if row >= 0]
        part = corpus.select(found)
        return [
            {"id": _cut(name, ID_CHARS), "text": _cut(text, TEXT_CHARS), "relevant": known.get(row, 0) > 0}
            for row, name, text in zip(found, column(part, "id"), column(part, "text"), strict=True)
        ]

    return {
        "query": _cut(column(split.select([query]), "query")[0], QUERY_CHARS),
        "relevant": targets(answers[:RELEVANT_SHOWN]), "relevant_count": len(answers),
        "values": {name: float(column_[query]) for name, column_ in values.items()},
        "results": {name: targets(judgement.ranked[name][query][:SHOWN]) for name in values},
    }  # fmt: skip


def _cut(text: str, length: int) -> str:
    """Put a text on one line of at most ``length`` characters."""
    # Only so much is looked at, as a target may be a book.
    line = " ".join(text[: 4 * length].split())
    return line if len(line) <= length and len(text) <= 4 * length else line[: length - 1] + "…"
