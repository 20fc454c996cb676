"""How an upgrade is tried and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from hf_corrector.encoding import EncodeOptions
from hf_corrector.errors import ConfigurationError
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.verdict import Thresholds
from hf_corrector.metrics import parse_metric
from hf_corrector.models.configuration_corrector import KINDS
from hf_corrector.side_features import SIDES

DIRECTIONS = ("targets", "queries")
# Up to so many targets all of them are re-encoded for the judgement; it takes minutes.
FULL_UP_TO = 20_000
DEFAULT_JUDGED = 10_000


@dataclass(frozen=True)
class UpgradeOptions:
    """What :func:`~hf_corrector.index_upgrade.upgrading.upgrade` does besides its arguments.

    Attributes:
        output_dir: Folder for re-encoded targets, kept as soon as they are there: a run that was killed does not encode
            them again. None keeps them in memory until :meth:`UpgradeReport.save`.
        data_name: What the record and the model card call the data; by default the name they were given by.
        split: Judged queries: ``"test"``, ``"dev"`` or ``"train"``; by default test if there is one, else dev.
        judge_targets: Judge on the positives of the judged queries and so many random other targets, or ``"full"`` for
            the whole corpus. By default full up to 20,000 targets, and 10,000 others beyond.
        judge_queries: Judge on so many queries, drawn at random; by default on all of the split.
        kinds: Kinds of corrector to compare; by default all.
        slice_by: Metadata fields of queries or targets whose slices must not be harmed.
        query_log: Queries and how often each was asked, for ``pairs="traffic"``; by default those of the train split.
        reembed_by_traffic: Where a part is to be re-embedded first, order it by predicted error × (1 + traffic) instead
            of by predicted error alone; needs ``pairs="traffic"``. It serves what is asked for most, but in our
            measurements it took away what the order by error gains in score error over a random one.
        rerank_depth: Targets re-encoded per query in the row that reranks.
        duplicate_cosine: See :class:`~hf_corrector.pair_choice.Limits`.
        seconds_per_pass: Seconds one encoder pass takes where the corpus would be re-encoded; measured here by default.
        price_per_hour: Price of an hour of that machine, in any currency.
        thresholds: Rules of the verdict.
        judging: Metrics, resamples and working memory.
        encoding: Arithmetic and batches of the encoders.
        device: Where encoders that are given by name compute; a GPU if there is one.
        seed: Seed of all random choices.
        examples: Whether the record gets a few judged queries with their results, which are texts of the data.
    """

    output_dir: str | Path | None = None
    data_name: str | None = None
    split: str | None = None
    judge_targets: int | Literal["full"] | None = None
    judge_queries: int | None = None
    kinds: tuple[str, ...] = tuple(kind for kind in KINDS if kind != "identity")
    slice_by: tuple[str, ...] = ()
    query_log: Mapping[str, float] | None = None
    reembed_by_traffic: bool = False
    rerank_depth: int = 100
    duplicate_cosine: float | None = 0.999
    seconds_per_pass: float | None = None
    price_per_hour: float | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    judging: JudgeOptions = field(default_factory=JudgeOptions)
    encoding: EncodeOptions = field(default_factory=lambda: EncodeOptions(progress=False))
    device: str | None = None
    seed: int = 0
    examples: bool = True

    def __post_init__(self) -> None:
        """Refuse values out of range (ConfigurationError)."""
        for name in ("judge_targets", "judge_queries", "rerank_depth", "seconds_per_pass", "price_per_hour"):
            value = {**vars(self)}[name]
            if value is not None and value != "full" and not (isinstance(value, int | float) and value > 0):
                raise ConfigurationError(name, expected="a number above 0", got=repr(value), cure="Correct it.")
        for metric in self.judging.metrics:
            parse_metric(metric)
        if self.judging.primary not in self.judging.metrics:
            raise ConfigurationError(
                "judging", expected=f"the primary metric among {list(self.judging.metrics)}",
                got=repr(self.judging.primary), cure="Add it to metrics.",
            )  # fmt: skip
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise ConfigurationError(
                "kinds", expected=f"one or more of {KINDS}", got=str(self.kinds), cure="Leave it out to compare all."
            )

    @property
    def computing_device(self) -> str:
        """Where encoders given by name compute."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Wanted:
    """The arguments of an upgrade, checked.

    Attributes:
        num_pairs: Targets to re-encode as fitting pairs.
        kind: ``"auto"`` or the kind of corrector to adopt.
        side: ``"auto"``, None or a kind of side features.
        pairs: How pairs are chosen.
        direction: ``"targets"`` or ``"queries"``.
    """

    num_pairs: int
    kind: str
    side: str | None
    pairs: str
    direction: str

    def __post_init__(self) -> None:
        """Refuse unknown names (ConfigurationError)."""
        choices = {
            "kind": (self.kind, ("auto", *KINDS)),
            "side": (self.side, (None, "auto", *[side for side in SIDES if side != "matrix"])),
            "direction": (self.direction, DIRECTIONS),
        }
        for name, (value, known) in choices.items():
            if value not in known:
                raise ConfigurationError(name, expected=f"one of {known}", got=repr(value), cure="Choose one of them.")
        if self.direction == "queries" and self.side not in (None, "auto"):
            raise ConfigurationError(
                "side", expected="none in the direction 'queries': side features are of targets", got=repr(self.side),
                cure="Leave it out.",
            )  # fmt: skip
