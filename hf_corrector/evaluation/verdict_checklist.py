"""A staged adoption, with thresholds taken from the intervals of the run that is adopted."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hf_corrector.evaluation.verdict import Evidence, Verdict
from hf_corrector.evaluation.verdict_words import number, spread
from hf_corrector.metrics import FloatArray, Interval, metric_name

# Two-sided 5 % error, four times in five: 1.96 + 0.84.
_DETECTION = 2.8
PROBE_TARGETS = 200


@dataclass(frozen=True)
class Watched:
    """What was measured on targets the corrector has not seen.

    Attributes:
        cosines: Cosine of each corrected vector to its fresh one, ``(n,)``.
        overlap: Mean share of the ten best targets that the corrected index shares with the fresh one.
    """

    cosines: FloatArray
    overlap: float

    def probe_interval(self, targets: int = PROBE_TARGETS, *, seed: int = 0) -> Interval:
        """Return the mean cosine, and between which means of so many targets 99 % of healthy probes lie."""
        generator = np.random.default_rng(seed)
        drawn = generator.choice(self.cosines, size=(1000, targets)).mean(axis=1)
        low, high = np.percentile(drawn, (0.5, 99.5))
        return Interval(float(self.cosines.mean()), float(low), float(high))


def queries_to_detect(evidence: Evidence, *, share: float = 0.5) -> int | None:
    """Return how many queries show a change of ``share`` of the gain over the status quo, four times in five.

    None where there is no gain to lose.
    """
    against = next((name for name in ("old", "stale") if name in evidence.per_query), None)
    if against is None:
        return None
    per_query = (evidence.per_query["corrected"] - evidence.per_query[against])[evidence.clean]
    gain, noise = float(per_query.mean()), float(per_query.std())
    if gain <= 0:
        return None
    return max(1, math.ceil((_DETECTION * noise / (share * gain)) ** 2))


def checklist(verdict: Verdict, evidence: Evidence, watched: Watched) -> str:
    """Write the stages from shadow to switch, each with this run's own numbers.

    Args:
        verdict: What was decided.
        evidence: What it rests on.
        watched: What to watch afterwards.

    Returns:
        A numbered list; for a no-go only what to do instead.
    """
    if verdict.decision == "no-go":
        return (
            "Nothing to adopt. The old index was not touched; fitting pairs and fresh vectors are kept for another try."
        )
    level = evidence.bootstrap().mean("corrected")
    metric = metric_name(evidence.metric)
    queries = evidence.direction == "queries"
    first = _first_stage(verdict, queries=queries)
    stages = [
        first,
        f"Shadow: answer live queries from both, show only the old answers. Expect {metric} {spread(level)} on judged "
        f"queries, and {100 * watched.overlap:.0f} % of the ten best targets in common with a full re-embedding. Stop "
        f"if {metric} falls below {number(level.low)}.",
        _canary(evidence),
        "Switch: point the alias to the new index" + (" and its query map" if queries else "")
        + "; keep the old model and the old cache until two probes in a row were healthy. Going back is pointing the "
        "alias back.",
        _probe(watched),
        *_slices(verdict),
        "From now on embed new and changed targets with the "
        + ("old" if queries else "new") + " model; never put vectors of both into one index unaligned.",
    ]  # fmt: skip
    return "\n".join(f"{place}. {text}" for place, text in enumerate(stages, start=1))


def _first_stage(verdict: Verdict, *, queries: bool) -> str:
    if queries:
        return "Prepare: put the corrector behind the new query encoder; the index stays as it is."
    if verdict.decision == "re-embed first":
        share = 100 * (verdict.reembed_share or 0)
        return (
            f"Prepare: write the corrected vectors beside the old ones, with the {share:.0f} % of targets listed in "
            "reembed_first.jsonl re-encoded by the new model (hf-corrector apply --reembed does both)."
        )
    return "Prepare: write the corrected vectors beside the old ones; the old cache is only read."


def _canary(evidence: Evidence) -> str:
    needed = queries_to_detect(evidence)
    text = "Canary: send 5 % of the traffic to it"
    if needed is None:
        return f"{text} until its click or answer rate can be told from the old one's."
    gain = evidence.bootstrap().difference("corrected", "old" if "old" in evidence.per_query else "stale")
    return (
        f"{text} until {needed:,} queries were judged, which is what it takes to notice that half of the gain "
        f"({spread(gain)}) is missing. Stop if the gain's interval lies below {number(gain.low)}."
    )


def _probe(watched: Watched) -> str:
    probe = watched.probe_interval()
    return (
        f"Watch drift: re-encode {PROBE_TARGETS} random targets a week and compare them with their corrected vectors. "
        f"This run's mean cosine is {probe.estimate:.3f}; a mean below {probe.low:.3f} has a chance of 1 in 200 while "
        "all is well: fit again on fresh pairs, or re-embed."
    )


def _slices(verdict: Verdict) -> list[str]:
    worst = verdict.worst_slice
    if worst is None:
        return []
    looked = sum(row.judged for row in verdict.slices)
    small = len(verdict.slices) - looked
    text = (
        f"Watch {worst.name}, which fares worst: {spread(worst.difference)} against {worst.against} on {worst.queries} "
        f"queries. {looked} slice{'s were' if looked != 1 else ' was'} looked at; with that many, about "
        f"{0.025 * looked:.1f} would seem harmed by chance alone (widened for all of them: {spread(worst.adjusted)})."
    )
    few = f" {small} {'have' if small != 1 else 'has'} too few queries to judge: collect judgements." if small else ""
    return [text + few]
