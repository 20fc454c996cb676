"""What an upgrade found: the table, the costs, the sentence, and what of it is written to disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_corrector._files import atomic_write, make_directory, write_json, write_text
from hf_corrector._hub import PushOptions
from hf_corrector.cards import CardFacts, card_of_run
from hf_corrector.evaluation.evaluator import Judgement
from hf_corrector.evaluation.verdict import Verdict
from hf_corrector.evaluation.verdict_words import aligned, number, percent
from hf_corrector.index_upgrade.fitted_corrector import FittedCorrector
from hf_corrector.index_upgrade.fresh_targets import FreshTargets
from hf_corrector.metrics import Interval, Undefined, metric_name
from hf_corrector.models.hub_files import CARD_FILE, CORRECTOR_FOLDER
from hf_corrector.pair_choice import PairChoice
from hf_corrector.records import RunRecord

PAIRS_FILE, FIRST_FILE = "pairs.json", "reembed_first.jsonl"
_LABELS = {
    "old": "old model kept", "stale": "stale index", "partial": "partial re-embed, unaligned",
    "partial_aligned": "partial re-embed, rest corrected", "rerank": "over-retrieve and rerank",
    "fresh": "full re-embed",
}  # fmt: skip


@dataclass(frozen=True)
class UpgradeRow:
    """One way to go on.

    Attributes:
        method: Its name.
        label: What the table calls it.
        metrics: Means with 95 % intervals.
        recovery: Share of what the stale index loses that it wins back, of the primary metric; None for the ends.
        retention: Share of a full re-embedding's quality, of the primary metric.
        passes: Encoder passes over targets to adopt it for the whole corpus.
        passes_per_query: Encoder passes over targets that every search costs from then on.
        seconds: Seconds for the whole corpus: passes at the rate of this run or the one given, and fitting; None where
            no rate is known.
        price: What that costs; None without a price.
    """

    method: str
    label: str
    metrics: Mapping[str, Interval]
    recovery: Interval | Undefined | None
    retention: Interval | Undefined | None
    passes: int
    passes_per_query: int
    seconds: float | None
    price: float | None

    def to_dict(self, primary: str) -> dict[str, Any]:
        """Return JSON values."""
        interval = self.metrics.get(primary)
        return {
            "method": self.method, "label": self.label,
            "metrics": {name: value.to_dict() for name, value in self.metrics.items()},
            "interval": None if interval is None else [interval.low, interval.high],
            "recovery": None if self.recovery is None else self.recovery.to_dict(),
            "retention": None if self.retention is None else self.retention.to_dict(),
            "passes": self.passes, "passes_per_query": self.passes_per_query, "seconds": self.seconds,
            "gpu_hours": None if self.seconds is None else self.seconds / 3600, "price": self.price,
        }  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """What an encoder pass takes.

    Attributes:
        seconds_per_pass: Seconds; None where none was made and none given.
        measured: Whether that was measured in this run.
        price_per_hour: Price of an hour, or None.
    """

    seconds_per_pass: float | None
    measured: bool
    price_per_hour: float | None

    def seconds(self, passes: int) -> float | None:
        """Return what so many passes take; None where that is not known."""
        if passes == 0:
            return 0.0
        return None if self.seconds_per_pass is None else passes * self.seconds_per_pass

    def price(self, seconds: float | None) -> float | None:
        """Return what so many seconds cost; None where that is not known."""
        if self.price_per_hour is None or seconds is None:
            return None
        return seconds / 3600 * self.price_per_hour


def upgrade_rows(
    judgement: Judgement, chosen: str, *, passes: Mapping[str, tuple[int, int]], fit_seconds: Mapping[str, float],
    rates: Rates,
) -> list[UpgradeRow]:  # fmt: skip
    """Make the table's rows.

    Args:
        judgement: Quality of every condition.
        chosen: What the chosen corrector is called.
        passes: Passes over targets by condition: once for the whole corpus, and per query.
        fit_seconds: Seconds of fitting by condition.
        rates: What a pass takes and costs.
    """
    rows, primary = [], judgement.primary
    for method in judgement.all_queries:
        once, per_query = passes[method]
        encoding = rates.seconds(once)
        seconds = None if encoding is None else encoding + fit_seconds.get(method, 0.0)
        label = f"corrected: {chosen}" if method == "corrected" else _LABELS.get(method, method)
        rows.append(
            UpgradeRow(
                method, label, judgement.means.get(method, {}), judgement.recovery.get(method, {}).get(primary),
                judgement.retention.get(method, {}).get(primary), once, per_query, seconds, rates.price(seconds),
            )
        )  # fmt: skip
    return rows


@dataclass(frozen=True, eq=False)
class UpgradeReport:
    """What was found, and what to do.

    Attributes:
        decision: The decision, with every rule and slice.
        rows: Every way to go on, in the order of the table.
        corrector: The chosen corrector.
        judgement: Quality of every condition, with intervals.
        record: All of it as ``run.json``.
        checklist: How to adopt it, stage by stage.
        pairs: What it was fitted on.
        reembed_first: Rows to re-embed first, worst first, ``(n,)``; empty unless that is the decision.
        head: What was judged, in words.
        footer: Costs and notes, one line each.
        fresh: The re-encoded targets.
        ids: Ids of all targets.
    """

    decision: Verdict
    rows: list[UpgradeRow]
    corrector: FittedCorrector
    judgement: Judgement
    record: RunRecord
    checklist: str
    pairs: PairChoice
    reembed_first: npt.NDArray[np.int64] = field(repr=False)
    head: str
    footer: tuple[str, ...]
    fresh: FreshTargets = field(repr=False)
    ids: Any = field(repr=False)

    @property
    def verdict(self) -> str:
        """The decision in one sentence."""
        return self.decision.sentence

    @property
    def go(self) -> bool:
        """Whether to apply the corrector as it is."""
        return self.decision.decision == "go"

    def table(self) -> str:
        """Return an aligned table for a terminal."""
        return upgrade_table(self.rows, self.judgement.primary, head=self.head, footer=self.footer)

    def save(self, folder: str | Path) -> Path:
        """Write corrector, its model card, pairs, fresh vectors and ``run.json`` into a folder, the record last.

        Tokens the corrector reads that could not be stored with the cache are written with the corrector.

        Returns:
            The folder.
        """
        path = Path(folder)
        make_directory(path)
        self.fresh.keep_in(path)
        self.corrector.save(path / CORRECTOR_FOLDER)
        write_text(path / CORRECTOR_FOLDER / CARD_FILE, card_of_run(self.record))
        rows = self.pairs.rows.tolist()
        weights = None if self.pairs.weights is None else self.pairs.weights.tolist()
        write_json(path / PAIRS_FILE, {
            "method": self.pairs.method, "ids": [self.ids[row] for row in rows], "rows": rows, "weights": weights,
        })  # fmt: skip
        if len(self.reembed_first):
            atomic_write(path / FIRST_FILE, self._write_first)
        self.record.save(path)
        return path

    def push_to_hub(
        self, repo_id: str, *, options: PushOptions | None = None, facts: CardFacts | None = None, **settings: Any
    ) -> str:
        """Push the corrector with its model card; pairs, fresh vectors and ``run.json`` stay here.

        All but ``facts`` is as in :meth:`CorrectorModel.push_to_hub`.

        Args:
            repo_id: The repository.
            options: How to push.
            facts: What the card is to say that no run knows of itself: licence, data sets, languages.
            settings: Fields of :class:`PushOptions`, handed to it whole.
        """
        card = card_of_run(self.record, facts)
        return self.corrector.push_to_hub(repo_id, options=options, card=card, **settings)

    def _write_first(self, path: Path) -> None:
        with open(path, "w", encoding="utf-8") as handle:
            for row in self.reembed_first.tolist():
                handle.write(json.dumps(self.ids[row], ensure_ascii=False) + "\n")


def upgrade_table(rows: list[UpgradeRow], primary: str, *, head: str, footer: Sequence[str]) -> str:
    """Lay out rows for a terminal, with what was judged above and notes below."""
    priced = any(row.price is not None for row in rows)
    lines = [
        ["", metric_name(primary), "95 %", "recovery", "of fresh", "passes", "hours", *(["price"] if priced else [])]
    ]
    for row in rows:
        mean = row.metrics.get(primary)
        level = ["-", ""] if mean is None else [number(mean.estimate), f"[{number(mean.low)}, {number(mean.high)}]"]
        passes = f"{row.passes_per_query:,} a query" if row.passes_per_query else f"{row.passes:,}"
        once = "-" if row.seconds is None else f"{row.seconds / 3600:.3g}"
        hours = "" if row.passes_per_query else once
        price = [] if not priced else ["" if row.price is None or not hours else f"{row.price:.2f}"]
        lines.append([row.label, *level, _ratio(row.recovery), _ratio(row.retention), passes, hours, *price])
    return "\n".join([head, "", *aligned(lines), "", *footer])


def _ratio(value: Interval | Undefined | None) -> str:
    return percent(value) if isinstance(value, Interval) else "-" if isinstance(value, Undefined) else ""
