"""``hf-corrector plan``: from a small probe, what correction will recover, and what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_corrector._files import atomic_write
from hf_corrector._progress import working
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.common import (
    DTYPES,
    EncoderChoice,
    add_data_argument,
    add_device_argument,
    add_model_arguments,
    check_same_targets,
    encode_queries,
    load_data,
    load_old_model,
    new_output_folder,
    parser,
    quieten,
)
from hf_corrector.data.retrieval import RetrievalData, column, positives_as_rows
from hf_corrector.encoding import EncodeOptions
from hf_corrector.errors import ConfigurationError, DataError, InputError
from hf_corrector.evaluation.evaluator import clean_queries
from hf_corrector.index_upgrade.corpus_sides import CorpusSide
from hf_corrector.metrics import FloatArray
from hf_corrector.models.configuration_corrector import KINDS, SAME_SIZE_KINDS
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.planning.forecasts import squared_draws
from hf_corrector.planning.holding import holding_time
from hf_corrector.planning.judged import CorrectedBy, JudgedQueries, measure_quality
from hf_corrector.planning.plan import Goal, MeasuredQuality, Plan, plan
from hf_corrector.planning.probe import (
    SMALLEST_PROBE,
    FamilyCurve,
    Fit,
    Probe,
    ProbeSettings,
    probe_learning_curves,
    standard_families,
)
from hf_corrector.planning.rehearsal import rehearsed_exponent
from hf_corrector.planning.worst_first import ResidualPredictor, cross_fitted_residuals, worst_first
from hf_corrector.records import COSTS, RunRecord
from hf_corrector.training.run_record import plain_arguments

EXAMPLES = """\
  hf-corrector plan --cache cache --model my-finetuned-encoder --data my_beir_folder --probe 500 --output_dir planned
  hf-corrector plan --cache cache --model out --old_model intfloat/e5-base-v2 --data my_beir_folder \\
      --min_recovery 0.7 --seconds_per_pass 0.002 --price_per_hour 2.5 --records out --worst_first --output_dir planned
"""
SIDES = ("none", "tokens", "word_embeddings")
FAMILIES = ("mean_shift", "procrustes", "affine")
WORST_FIRST_FILE = "worst_first.jsonl"
# As many fix the queries' second moment; more would only cost passes.
MOST_QUERIES = 1_000


@dataclass(frozen=True, eq=False)
class Probed:
    """A probe with what it took.

    Attributes:
        probe: Stale and fresh vectors, queries and side features.
        rows: Probed rows, ``(n,)`` int64.
        side: Side features of all targets, or None.
        families: What was fitted, by name.
        seconds_per_pass: Measured.
    """

    probe: Probe
    rows: torch.Tensor
    side: CorpusSide | None
    families: dict[str, Fit]
    seconds_per_pass: float


def run(argv: list[str]) -> int:
    """Run the command."""
    arguments = _flags().parse_args(argv)
    _check(arguments)
    progress = quieten(quiet=arguments.quiet)
    out, started = new_output_folder(arguments.output_dir), time.time()
    data, cache = load_data(arguments.data, progress=progress), TargetCache.open(arguments.cache)
    check_same_targets(cache, data)
    model = EncoderChoice.of(arguments).load(arguments.device, progress=progress)
    records = [RunRecord.load(Path(folder)) for folder in arguments.records]
    traffic = None if arguments.traffic is None else read_traffic(Path(arguments.traffic), cache)
    split = data.test if data.test is not None else data.dev if data.dev is not None else data.train
    encoding = EncodeOptions(compute_dtype=arguments.compute_dtype, progress=progress)
    queries = encode_queries(model, column(split, "query")[:MOST_QUERIES], encoding)
    probed = _probe(arguments, data, cache, model, (queries, encoding))
    settings = ProbeSettings(seed=arguments.seed, progress=progress)
    curves = probe_learning_curves(probed.probe, families=probed.families, settings=settings)
    best = min(curves, key=lambda name: float(curves[name].score_ratios[:, -1].mean()))
    with working("judge and rehearse", shown=progress):
        quality, old_passes = _quality(arguments, data, cache, model, (probed, best, queries))
    goal = _goal(arguments, targets=len(cache), measured=probed.seconds_per_pass)
    answer = plan(curves, probe=len(probed.rows), goal=goal, quality=quality,
                  seed=arguments.seed)  # fmt: skip
    said = [answer.table(), "", answer.sentence(), answer.caution()]
    if records:
        said.append(_words_on_holding(records, arguments.min_cosine, answer, curves[answer.family]))
    if arguments.worst_first:
        with working("put targets in order", shown=progress):
            said.append(_write_worst_first(out, cache, probed, best, traffic))
    RunRecord(
        command="plan", seed=arguments.seed, arguments=plain_arguments(arguments),
        evaluation={"plan": answer.to_dict(), "sentence": answer.sentence()},
        cost={**dict.fromkeys(COSTS, 0), "probe_target_passes": len(probed.rows),
              "query_passes": len(queries) + old_passes},
        timing={"total": time.time() - started}, manifests=[cache.manifest.to_dict()],
    ).save(out)  # fmt: skip
    print("\n".join(said))
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "plan", "Forecast from a small probe of re-encoded targets what correction would recover of a stale index, "
        "with which family and how many pairs, or that it is better to re-embed or to keep the old model.", EXAMPLES,
    )  # fmt: skip
    flags.add_argument("--cache", required=True, metavar="OLD", help="cache made by the old encoder")
    flags.add_argument("--old_model", metavar="M", help="encoder that made the cache, to compare with keeping it")
    flags.add_argument("--output_dir", required=True, metavar="OUT", help="folder for run.json")
    flags.add_argument("--probe", type=int, default=500, metavar="N", help="targets to re-encode")
    flags.add_argument("--families", nargs="+", choices=KINDS, default=list(FAMILIES), help="kinds of corrector")
    flags.add_argument("--side", choices=SIDES, default="tokens", help="what a corrector reads of a target besides")
    flags.add_argument("--min_recovery", type=float, default=0.8, help="share of the loss that is to be recovered")
    flags.add_argument("--max_pairs", type=int, help="encoder passes that may be spent, the probe's included")
    flags.add_argument("--seconds_per_pass", type=float, metavar="S", help="seconds a target takes; else measured")
    flags.add_argument("--price_per_hour", type=float, metavar="P", help="price of an hour of that machine")
    flags.add_argument("--records", nargs="*", default=[], metavar="RUN", help="runs, for how long a corrector holds")
    flags.add_argument("--min_cosine", type=float, default=0.9, help="with --records: floor on corrected and fresh")
    flags.add_argument("--worst_first", action="store_true", help=f"write an order to re-embed in, {WORST_FIRST_FILE}")
    flags.add_argument("--traffic", metavar="FILE", help="weigh that order: an id a line, after a tab how often asked")
    flags.add_argument("--compute_dtype", choices=DTYPES, default="float32", help="arithmetic of the encoders")
    flags.add_argument("--seed", type=int, default=0, help="seed of the probe and of draws")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_data_argument(flags)
    add_model_arguments(flags)
    add_device_argument(flags)
    return flags


def _check(arguments: argparse.Namespace) -> None:
    """Refuse numbers out of range before any work."""
    _goal(arguments, targets=1, measured=None)
    if arguments.probe < SMALLEST_PROBE:
        raise ConfigurationError(
            "--probe", expected=f"at least {SMALLEST_PROBE} targets", got=str(arguments.probe),
            cure="Re-encode more; some hundred make useful forecasts.",
        )  # fmt: skip
    if not -1 <= arguments.min_cosine < 1:
        raise ConfigurationError(
            "--min_cosine", expected="from -1 to below 1", got=str(arguments.min_cosine), cure="Try 0.9."
        )


def _goal(arguments: argparse.Namespace, *, targets: int, measured: float | None) -> Goal:
    given = arguments.seconds_per_pass
    return Goal(
        targets=targets, min_recovery=arguments.min_recovery, max_pairs=arguments.max_pairs,
        seconds_per_pass=measured if given is None else given, price_per_hour=arguments.price_per_hour,
    )  # fmt: skip


def _probe(
    arguments: argparse.Namespace, data: RetrievalData, cache: TargetCache, model: DualEncoderModel,
    encoded: tuple[torch.Tensor, EncodeOptions],
) -> Probed:  # fmt: skip
    """Draw targets, re-encode them and time it."""
    queries, encoding = encoded
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = torch.randperm(len(cache), generator=generator)[: arguments.probe].sort().values
    started = time.perf_counter()
    texts = column(data.corpus.select(rows.tolist()), "text")
    fresh = model.encode_target(texts, compute_dtype=encoding.compute_dtype, show_progress_bar=encoding.progress)
    seconds = (time.perf_counter() - started) / max(len(rows), 1)
    side = None if arguments.side == "none" else CorpusSide(data.corpus, model, arguments.side)
    features = None if side is None else side.gather(rows)
    probe = Probe(cache.gather(rows), fresh, queries, features)
    usable = [kind for kind in arguments.families if cache.dim == fresh.shape[1] or kind not in SAME_SIZE_KINDS]
    families = standard_families(usable)
    if side is not None:
        reading = [kind for kind in usable if kind not in ("identity", "mean_shift")]
        vocabulary = side.vocabulary if arguments.side == "tokens" else None
        families |= standard_families(reading, side=arguments.side, side_vocabulary=vocabulary)
    return Probed(probe, rows, side, families, seconds)


def _quality(
    arguments: argparse.Namespace, data: RetrievalData, cache: TargetCache, model: DualEncoderModel,
    probing: tuple[Probed, str, torch.Tensor],
) -> tuple[MeasuredQuality | None, int]:  # fmt: skip
    """Measure on judged queries what needs no more targets encoded; returns old queries encoded beside it."""
    split, (probed, best, queries) = data.test if data.test is not None else data.dev, probing
    if split is None:
        return None, 0
    split = split.select(range(len(queries)))
    relevant = positives_as_rows(split, data.corpus)
    clean = np.flatnonzero(clean_queries(relevant, probed.rows.numpy()))
    if len(clean) < 2:
        return None, 0
    old_queries = None
    if arguments.old_model is not None:
        old = load_old_model(arguments, model, cache)
        old_queries = old.encode_query(column(split, "query"), compute_dtype=arguments.compute_dtype)[clean]
    probe = probed.probe
    correct = probed.families[best](probe.stale, probe.fresh, probe.side)
    corrected = CorrectedBy(cache, correct, probe.fresh.shape[1], probed.side)
    judged = JudgedQueries(queries[clean], old_queries, [relevant[one] for one in clean.tolist()])
    exponent = rehearsed_exponent(probe, judged, corrected=corrected, seed=arguments.seed)
    found = dataclasses.replace(measure_quality(best, judged, stale=cache, corrected=corrected), exponent=exponent)
    return found, 0 if old_queries is None else len(split)


def _words_on_holding(records: list[RunRecord], floor: float, answer: Plan, curve: FamilyCurve) -> str:
    """Say for how long a corrector fitted as planned keeps above a floor if training goes on as in the records."""
    cosine = 1.0 - float(np.median(squared_draws(curve, answer.pairs))) / 2.0
    start = max((int(entry.get("step", 0)) for record in records for entry in record.history), default=0)
    steps = holding_time(records, min_cosine=floor, fitted_at=start, fitted_cosine=cosine).steps
    return (
        f"If training goes on as in these runs, that corrector keeps a mean cosine of {floor:g} for "
        f"{steps.estimate:,.0f} [{steps.low:,.0f}, {steps.high:,.0f}] steps after step {start:,}."
    )


def _write_worst_first(out: Path, cache: TargetCache, probed: Probed, best: str, traffic: FloatArray | None) -> str:
    residuals = cross_fitted_residuals(probed.probe, probed.families[best])
    predictor = ResidualPredictor.fit(probed.probe.stale, residuals)
    predicted = predictor.predict(cache)
    order = worst_first(predicted, traffic, skipped=probed.rows.numpy())

    def write(path: Path) -> None:
        with open(path, "w", encoding="utf-8") as handle:
            for row in order.tolist():
                line = {"id": cache.ids[row], "predicted_residual": float(predicted[row])}
                handle.write(json.dumps(line, ensure_ascii=False) + "\n")

    atomic_write(out / WORST_FIRST_FILE, write)
    return (
        f"The order to re-embed in is in {out / WORST_FIRST_FILE}; it explains {predictor.explained:.0%} of how "
        "residuals differ."
    )


def read_traffic(path: Path, cache: TargetCache) -> FloatArray:
    """Read how often each target is asked for: an id a line, after a tab a number; targets not named have none.

    Raises:
        DataError: If a line has no number or names no target.
    """
    traffic = np.zeros(len(cache))
    ids, counts = [], []
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            name, _, count = line.rstrip("\n").partition("\t")
            try:
                value = float(count)
            except ValueError:
                value = -1.0
            if not 0 <= value < float("inf"):
                raise DataError(
                    f"{path.name}, line {number}", expected="an id, a tab and a number", got=repr(line[:80]),
                    cure="Correct the line.",
                )  # fmt: skip
            ids.append(name)
            counts.append(value)
    if not ids:
        raise InputError(str(path), expected="one id a line", got="none", cure="Give another --traffic.")
    np.add.at(traffic, cache.rows_of(ids), counts)
    return traffic
