"""``upgrade_vectors``: an index upgrade where nothing but vectors is at hand, as of encoders behind an interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from hf_corrector._files import make_directory, write_json
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_arrays import ArrayOptions, FreshArray, check_vectors, write_corrected_array
from hf_corrector.errors import ConfigurationError
from hf_corrector.evaluation.evaluator import Judgement, compare
from hf_corrector.evaluation.verdict import Evidence, Verdict, decide
from hf_corrector.evaluation.verdict_words import spread
from hf_corrector.index_upgrade.conditions import ErrorPredictor
from hf_corrector.index_upgrade.fits import Choice, Fit, choose, fit_all
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.index_upgrade.report import Rates, UpgradeRow, upgrade_rows, upgrade_table
from hf_corrector.index_upgrade.vector_bench import (
    NEIGHBOURS,
    HeldOut,
    VectorBench,
    measure,
    partly_reembedded,
)
from hf_corrector.index_upgrade.vector_inputs import IntArray, JudgedVectors, Matrix, VectorInputs, load_vectors
from hf_corrector.metrics import FloatArray, Interval, paired_bootstrap
from hf_corrector.models.configuration_corrector import KINDS
from hf_corrector.models.hub_files import CORRECTOR_FOLDER
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.records import COSTS, FittedTargets, RunRecord
from hf_corrector.training.corrector_choice import ChoiceOptions

FIRST_ROWS_FILE = "reembed_first.npy"
DEFAULT_NAME = "new encoder, known by its vectors only"
_ROWS_AT_ONCE = 65_536


@dataclass(frozen=True, eq=False)
class VectorUpgradeReport:
    """What was found, and what to do.

    Attributes:
        decision: The decision, with every rule.
        rows: Every way to go on, in the order of the table.
        corrector: The chosen corrector, fitted to the whole sample.
        fitted: What it was fitted to, kept beside it.
        judgement: Quality of every condition, with intervals.
        cosine: Mean cosine of corrected and new vectors of targets a fit had not seen.
        stale_cosine: The same of old and new vectors; None where they differ in size.
        record: All of it as ``run.json``.
        reembed_first: Rows to embed anew first, worst first, ``(n,)``; empty unless that is the decision.
        inputs: What it started from.
        head: What was judged, in words.
        footer: Notes, one line each.
    """

    decision: Verdict
    rows: list[UpgradeRow]
    corrector: CorrectorModel
    fitted: FittedTargets
    judgement: Judgement
    cosine: Interval
    stale_cosine: Interval | None
    record: RunRecord
    reembed_first: IntArray = field(repr=False)
    inputs: VectorInputs = field(repr=False)
    head: str
    footer: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The decision in one sentence, and what it does not rest on in another."""
        return self.decision.sentence if self.inputs.queries is not None else f"{self.decision.sentence} {_UNJUDGED}"

    @property
    def go(self) -> bool:
        """Whether to apply the corrector as it is."""
        return self.decision.decision == "go"

    def table(self) -> str:
        """Return an aligned table for a terminal."""
        return upgrade_table(self.rows, self.judgement.primary, head=self.head, footer=self.footer)

    def apply(self, path: str | Path, *, dtype: str = "float32", fresh: FreshArray | None = None) -> Path:
        """Write corrected vectors of all targets into an ``.npy`` file; those of the sample are the new encoder's own.

        Args:
            path: A new file.
            dtype: ``"float32"`` or ``"float16"``.
            fresh: Further vectors of the new encoder, as of :attr:`reembed_first`; by default those of the sample.
        """
        inputs = self.inputs
        own = FreshArray(inputs.rows, inputs.fresh)
        taken = own if fresh is None else joined(own, fresh)
        return write_corrected_array(self.corrector, inputs.old, path, options=ArrayOptions(dtype, taken))

    def save(self, folder: str | Path) -> Path:
        """Write corrector, the rows to embed first and ``run.json`` into a folder, the record last."""
        path = Path(folder)
        make_directory(path)
        self.corrector.save_pretrained(str(path / CORRECTOR_FOLDER))
        self.fitted.save(path / CORRECTOR_FOLDER)
        write_json(path / "rows.json", self.inputs.rows.tolist())
        if len(self.reembed_first):
            np.save(path / FIRST_ROWS_FILE, self.reembed_first)
        self.record.save(path)
        return path


_UNJUDGED = (
    "It rests on the neighbours of targets, each corrected by a fit that had not seen it, and on no judged query: "
    "whether the new encoder answers better than the old one was not measured, and queries that lie apart from targets "
    "may lose more to a stale index than neighbours do. Judge some queries to be sure."
)


def joined(first: FreshArray, second: FreshArray) -> FreshArray:
    """Return the vectors of both; where both have a row, that of the second."""
    left = torch.from_numpy(~np.isin(first.rows, second.rows))
    return FreshArray(
        np.concatenate([first.rows[left.numpy()], second.rows]), torch.cat([first.vectors[left], second.vectors])
    )  # fmt: skip


def fresh_array(vectors: Matrix, rows: Sequence[int] | IntArray) -> FreshArray:
    """Check vectors of the new encoder for some rows.

    Raises:
        DataError: If they cannot be such, or are not as many as the rows.
    """
    places = np.asarray(rows, dtype=np.int64)
    return FreshArray(places, check_vectors("fresh vectors", vectors, rows=len(places)).gather(np.arange(len(places))))


def upgrade_vectors(
    old: Matrix | TargetCache,
    new_sample: Matrix,
    rows: Sequence[int] | IntArray | None = None,
    *,
    queries: JudgedVectors | None = None,
    kind: str = "auto",
    options: UpgradeOptions | None = None,
) -> VectorUpgradeReport:
    """Try an index upgrade on vectors alone: all old ones, and new ones of some of the targets.

    Neither encoder is needed, so both may be services. Each target of the sample is corrected by a fit that has not
    seen it (cross-validation), and these vectors are searched: by judged queries, where their vectors are given, for
    the same verdict as :func:`~hf_corrector.index_upgrade.upgrading.upgrade`; else by the new vectors of sampled
    targets, for how many of their ten nearest neighbours stay. The corrector is then fitted to the whole sample. All
    levels are those of the sample, where there are few targets to confuse: compare rows, not levels.

    Args:
        old: Vectors of all targets by the old encoder, ``(targets, dim_old)``: an array, a tensor, an ``.npy`` file, or
            a cache or its folder.
        new_sample: Vectors of some targets by the new encoder, ``(n, dim_new)``; drawn at random, some hundred at
            least, and those that answer the judged queries.
        rows: Which rows of ``old`` these are, ``(n,)``; may be left out where all are.
        queries: Judged queries; those that no target of the sample answers are left out.
        kind: Kind of corrector to adopt; ``"auto"`` decides by errors on pairs left out.
        options: Kinds, thresholds, judging, rates, seed and progress; the rest needs encoders and is not used.

    Returns:
        The report; if ``report.go``, then ``report.apply("corrected.npy")``.

    Raises:
        DataError: If vectors, rows and judgements do not fit together; names the row.
        ConfigurationError: If an argument cannot be used.
    """
    options = UpgradeOptions() if options is None else options
    if kind not in ("auto", *KINDS):
        raise ConfigurationError("kind", expected=f"one of {('auto', *KINDS)}", got=repr(kind), cure="Choose one.")
    inputs = load_vectors(old, new_sample, rows, queries)
    kinds = options.kinds if kind in ("auto", *options.kinds) else (*options.kinds, kind)
    fits, notes = fit_all(inputs.pairs, kinds, seed=options.seed, progress=options.encoding.progress)
    choice = choose(fits, ChoiceOptions(seed=options.seed), kind=kind, side=None)
    bench = VectorBench.of(inputs, options.judging, seed=options.seed)
    held_out = measure(inputs, bench, fits, choice, seed=options.seed)
    judgement = compare(held_out.per_query, clean=np.ones(len(bench.relevant), dtype=np.bool_), options=bench.options)
    predictor = ErrorPredictor.fit(choice.fit, seed=options.seed)
    evidence = _evidence(inputs, judgement, options)
    verdict = decide(evidence, options.thresholds, reembed=partly_reembedded(inputs, held_out, predictor))
    return _report(_Found(inputs, options, fits, choice, held_out, judgement, verdict), predictor, notes)


def _evidence(inputs: VectorInputs, judgement: Judgement, options: UpgradeOptions) -> Evidence:
    names = [name for name in ("old", "stale", "corrected", "fresh") if name in judgement.per_query]
    return Evidence(
        metric=judgement.primary,
        per_query={name: judgement.per_query[name][judgement.primary] for name in names},
        clean=np.ones(judgement.queries, dtype=np.bool_), passes=(len(inputs.rows), len(inputs.old)),
        resamples=options.judging.resamples, seed=options.judging.seed,
        counted="clean queries" if inputs.queries is not None else "targets' neighbourhoods",
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Found:
    """Everything a report is made of."""

    inputs: VectorInputs
    options: UpgradeOptions
    fits: list[Fit]
    choice: Choice
    held_out: HeldOut
    judgement: Judgement
    verdict: Verdict

    def cosine(self, vectors: torch.Tensor) -> Interval:
        """Return the mean cosine of the sample's vectors to the new ones, with an interval over targets."""
        values = F.cosine_similarity(vectors, self.inputs.fresh, dim=1).double().numpy()
        generator = np.random.default_rng([self.options.seed, 6])
        return paired_bootstrap({"cosine": values}, generator=generator, resamples=1000).mean("cosine")

    def head(self) -> str:
        """Say what was judged."""
        total, sample, judged = len(self.inputs.old), len(self.inputs.rows), self.inputs.queries
        where = f"among the {sample:,} sampled of {total:,} targets, each corrected by a fit without it"
        if judged is None:
            what = f"{self.judgement.queries:,} sampled targets' {NEIGHBOURS} nearest by the new encoder"
        else:
            few = len(judged.relevant) < judged.given
            what = f"{len(judged.relevant):,} clean queries"
            what += f" of {judged.given:,} (nothing in the sample answers the others)" if few else ""
        return f"{what},\nsearched {where}; means with 95 % intervals"

    def rows(self) -> list[UpgradeRow]:
        """Make the rows of the table."""
        sample, options = len(self.inputs.rows), self.options
        passes = dict.fromkeys(self.judgement.all_queries, (sample, 0))
        passes |= {"old": (0, 0), "stale": (0, 0), "fresh": (len(self.inputs.old), 0)}
        seconds = {fit.name: fit.seconds for fit in self.fits} | {"corrected": self.choice.fit.seconds}
        rates = Rates(options.seconds_per_pass, False, options.price_per_hour)
        return upgrade_rows(
            self.judgement, self.choice.fit.name, passes=passes, fit_seconds=seconds, rates=rates
        )  # fmt: skip

    def fitted(self) -> FittedTargets:
        """Note what the corrector was fitted to."""
        inputs, old = self.inputs, self.inputs.old
        leads_to, rows = inputs.leads_to(DEFAULT_NAME), tuple(inputs.rows.tolist())
        return FittedTargets(
            cache=inputs.checksum, encoder=leads_to.digest, rows=rows,
            ids=tuple(old.ids[row] for row in rows) if isinstance(old, TargetCache) else None,
            encoder_fingerprint=leads_to.to_dict(),
        )  # fmt: skip

    def record(self, rows: list[UpgradeRow], cosine: Interval, stale: Interval | None) -> RunRecord:
        """Make ``run.json``."""
        options, inputs = self.options, self.inputs
        arguments = {
            "targets": len(inputs.old), "sample": len(inputs.rows), "dim_old": inputs.stale.shape[1],
            "dim_new": inputs.fresh.shape[1], "judged_by": "neighbours" if inputs.queries is None else "queries",
            "kinds": list(options.kinds), "seconds_per_pass": options.seconds_per_pass,
            "price_per_hour": options.price_per_hour, "thresholds": asdict(options.thresholds),
        }  # fmt: skip
        more = {
            "losses_left_out": dict(self.choice.losses), "chosen": self.choice.fit.name,
            "cosine_left_out": cosine.to_dict(), "cosine_stale": None if stale is None else stale.to_dict(),
        }  # fmt: skip
        old = inputs.old
        return RunRecord(
            command="upgrade", seed=options.seed, arguments=arguments, evaluation={**self.judgement.to_dict(), **more},
            cost={**dict.fromkeys(COSTS, 0), "pair_target_passes": len(inputs.rows)},
            manifests=[old.manifest.to_dict()] if isinstance(old, TargetCache) else [],
            rows=[row.to_dict(self.judgement.primary) for row in rows], verdict=self.verdict.to_dict(),
        )  # fmt: skip


def _report(found: _Found, predictor: ErrorPredictor, notes: list[str]) -> VectorUpgradeReport:
    rows, inputs, cosine = found.rows(), found.inputs, found.cosine(found.held_out.corrected)
    stale = found.cosine(inputs.stale) if inputs.same_size else None
    footer = [
        found.choice.sentence,
        f"Cosine of corrected and new vectors of targets left out of the fit: {spread(cosine)}"
        + ("." if stale is None else f"; of old and new ones {spread(stale)}."),
        *notes,
    ]
    if not inputs.same_size:
        footer.append("Vectors differ in size, so new queries cannot search the old index as it is.")
    return VectorUpgradeReport(
        decision=found.verdict, rows=rows, corrector=found.choice.fit.model, fitted=found.fitted(),
        judgement=found.judgement, cosine=cosine, stale_cosine=stale, record=found.record(rows, cosine, stale),
        reembed_first=_worst_first(inputs, predictor, found.verdict.reembed_share), inputs=inputs, head=found.head(),
        footer=tuple(footer),
    )  # fmt: skip


def _worst_first(inputs: VectorInputs, predictor: ErrorPredictor, share: float | None) -> IntArray:
    """Return the rows correction is expected to serve worst, the sampled ones left out; none for a share of None."""
    if share is None:
        return np.zeros(0, dtype=np.int64)
    old, parts = inputs.old, list[FloatArray]()
    for start in range(0, len(old), _ROWS_AT_ONCE):
        parts.append(predictor.predict(old.read(start, min(start + _ROWS_AT_ONCE, len(old)))))
    order = np.argsort(-np.concatenate(parts), kind="stable")[: round(share * len(old))]
    return order[~np.isin(order, inputs.rows)]
