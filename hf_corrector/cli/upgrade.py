"""``hf-corrector upgrade``: correct, keep or re-embed an old index, decided on this machine."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli import upgrade_vectors
from hf_corrector.cli.common import (
    DATA_HELP,
    DTYPES,
    NO_EXAMPLES_HELP,
    STDLIB,
    EncoderChoice,
    add,
    load_data,
    new_output_folder,
    parser,
    quieten,
)
from hf_corrector.encoding import EncodeOptions
from hf_corrector.errors import DataError
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.verdict import Thresholds
from hf_corrector.index_upgrade.options import DIRECTIONS, FULL_UP_TO, UpgradeOptions
from hf_corrector.index_upgrade.report import FIRST_FILE, UpgradeReport
from hf_corrector.index_upgrade.upgrading import upgrade
from hf_corrector.metrics import DEFAULT_METRICS
from hf_corrector.models.configuration_corrector import KINDS
from hf_corrector.models.hub_files import CORRECTOR_FOLDER
from hf_corrector.pair_choice import METHODS
from hf_corrector.side_features import SIDES

EXAMPLES = """\
  hf-corrector upgrade --old_cache cache --new_model my-finetuned-encoder --data my_beir_folder --pairs 2000 \\
      --output_dir upgraded
  hf-corrector upgrade --old_cache cache --new_model out --old_model intfloat/e5-base-v2 --data my_beir_folder \\
      --pairs 5000 --pairs_by diverse --judge_targets 20000 --slice_by site --seconds_per_pass 0.002 \\
      --price_per_hour 2.5 --output_dir upgraded

Where only vectors are at hand, as of encoders behind an interface (--new_sample --help says more):
  hf-corrector upgrade --old vectors.npy --new_sample sample.npy --sample_rows rows.npy --output_dir upgraded

exit status: 0 go, 3 no-go, 4 re-embed a part first; 1 a problem that was explained, 2 wrong usage.
Then, for a go:  hf-corrector apply --help    (or hf-corrector search --help with --direction queries)
For status 4:    reembed_first.jsonl in OUT names targets, an id a line, worst first; hf-corrector apply --reembed
                 re-encodes these and corrects the others.
"""


def run(argv: list[str]) -> int:
    """Run the command; returns 0 for a go, 3 for a no-go, 4 for re-embedding a part first."""
    if upgrade_vectors.is_asked_for(argv):
        return upgrade_vectors.run(argv)
    arguments = _flags().parse_args(argv)
    progress = quieten(quiet=arguments.quiet)
    options = _options(arguments, progress=progress)
    out = new_output_folder(arguments.output_dir)
    cache, data = TargetCache.open(arguments.old_cache), load_data(arguments.data, progress=progress)
    choice = {item.name: getattr(arguments, item.name) for item in dataclasses.fields(EncoderChoice)[1:]}
    new = EncoderChoice(model=arguments.new_model, **choice)
    model = new.load(arguments.device or options.computing_device, progress=progress)
    report = upgrade(
        cache, model, data, num_pairs=arguments.pairs, old_model=arguments.old_model,
        kind=arguments.kind, side=None if arguments.side == "none" else arguments.side, pairs=arguments.pairs_by,
        direction=arguments.direction, options=options,
    )  # fmt: skip
    report.save(out)
    print(f"{report.table()}\n\n{report.verdict}\n\n{report.checklist}\n\nwritten to {out}")
    print(_next_step(arguments, report))
    return report.decision.exit_code


def _next_step(arguments: argparse.Namespace, report: UpgradeReport) -> str:
    """Say what to run next; nothing for a no-go."""
    if report.decision.decision == "no-go":
        return ""
    corrector = f"--corrector {Path(arguments.output_dir) / CORRECTOR_FOLDER} --cache {arguments.old_cache}"
    if arguments.direction == "queries":
        return f"next: hf-corrector search {corrector} --model {arguments.new_model} --query TEXT"
    step = f"next: hf-corrector apply {corrector} --output_dir CORRECTED"
    if report.decision.decision == "go":
        return step
    listed = f"--reembed {Path(arguments.output_dir) / FIRST_FILE} --model {arguments.new_model}"
    return f"{step} {listed} --data {arguments.data}"


def _options(arguments: argparse.Namespace, *, progress: bool) -> UpgradeOptions:
    metrics = tuple(dict.fromkeys((arguments.metric, *DEFAULT_METRICS)))
    return UpgradeOptions(
        output_dir=arguments.output_dir, split=arguments.split, judge_targets=_count_or_full(arguments.judge_targets),
        judge_queries=arguments.judge_queries, slice_by=tuple(arguments.slice_by or ()),
        query_log=None if arguments.query_log is None else read_query_log(Path(arguments.query_log)),
        reembed_by_traffic=arguments.reembed_by_traffic, seconds_per_pass=arguments.seconds_per_pass,
        price_per_hour=arguments.price_per_hour,
        data_name=arguments.data,
        kinds=UpgradeOptions().kinds if arguments.kinds is None else tuple(arguments.kinds), thresholds=Thresholds(
            min_recovery=arguments.min_recovery, non_inferiority=arguments.non_inferiority,
            max_slice_loss=arguments.max_slice_loss,
        ),
        judging=JudgeOptions(metrics=metrics, primary=arguments.metric, seed=arguments.seed, progress=progress),
        encoding=EncodeOptions(compute_dtype=arguments.compute_dtype, progress=progress),
        device=arguments.device, seed=arguments.seed, examples=not arguments.no_examples,
    )  # fmt: skip


def read_query_log(path: Path) -> dict[str, float]:
    """Read one query a line, with how often it was asked after a tab; lines of the same query add up.

    Raises:
        DataError: If a count is no number, naming the line, or there are no queries.
    """
    log: dict[str, float] = {}
    with open(path, encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            query, tab, count = line.rstrip("\n").partition("\t")
            try:
                asked = float(count) if tab else 1.0
            except ValueError:
                asked = -1.0
            if not 0 <= asked < float("inf"):
                raise DataError(
                    f"{path.name}, line {number}", expected="a query, or a query, a tab and how often it was asked",
                    got=repr(line[:80]), cure="Correct the line.",
                )  # fmt: skip
            if query.strip():
                log[query] = log.get(query, 0.0) + asked
    if not sum(log.values()):
        raise DataError(str(path), expected="one query a line", got="none", cure="Give another --query_log.")
    return log


def _count_or_full(value: str | None) -> Any:
    return int(value) if value is not None and value.isdecimal() else value


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "upgrade",
        "Decide what to do about the vectors of an old encoder: correct them, keep the old model, or re-embed. "
        "Re-encodes a few targets, compares every way to go on over the same queries, and says which. "
        "Words of an argument may be joined by _ or by -.",
        EXAMPLES,
    )
    add(flags, "old_cache", required=True, metavar="C", help="cache made by the old encoder")
    add(flags, "new_model", required=True, metavar="B", help="folder or Hub id of the new encoder")
    add(flags, "data", metavar="DIR", default=STDLIB, help=DATA_HELP)
    add(flags, "output_dir", required=True, metavar="OUT", help="folder for corrector, fresh vectors and run.json")
    add(flags, "pairs", type=int, default=2000, metavar="N", help="targets to re-encode as fitting pairs (2000)")
    add(flags, "old_model", metavar="A", help="encoder that made the cache; by default the one the cache names")
    add(flags, "direction", choices=DIRECTIONS, default="targets", help="correct the index, or map new queries to it")
    add(flags, "pairs_by", choices=METHODS, default="random", help="how pairs are chosen")
    add(flags, "query_log", metavar="FILE", help="for --pairs_by traffic: a query a line, after a tab its count")
    text = "with --pairs_by traffic: order what to re-embed first by predicted error x traffic, not by error alone"
    add(flags, "reembed_by_traffic", action="store_true", help=text)
    text = "kinds of corrector to compare; all by default"
    add(flags, "kinds", nargs="+", choices=KINDS, metavar="K", help=text)
    add(flags, "kind", choices=("auto", *KINDS), default="auto", help="kind of corrector to adopt")
    sides = ("auto", "none", *(side for side in SIDES if side != "matrix"))
    add(flags, "side", choices=sides, default="auto", help="what the corrector reads of a target besides its vector")
    add(flags, "slice_by", action="append", metavar="F", help="metadata field whose slices must not lose; repeatable")
    add(flags, "split", choices=("test", "dev", "train"), help="queries to judge on; test if there is one")
    text = f"random targets to judge on beside the positives, or 'full'; full up to {FULL_UP_TO:,} targets"
    add(flags, "judge_targets", metavar="N", help=text)
    add(flags, "judge_queries", type=int, metavar="N", help="judge on so many random queries of the split")
    add(flags, "metric", default="mrr@10", help="the metric that decides (mrr@10)")
    rules = Thresholds()
    text = f"lower bound of recovery for a go ({rules.min_recovery})"
    add(flags, "min_recovery", type=float, default=rules.min_recovery, metavar="R", help=text)
    text = f"how much worse than the old model may be at most ({rules.non_inferiority})"
    add(flags, "non_inferiority", type=float, default=rules.non_inferiority, metavar="D", help=text)
    text = f"largest loss of a slice ({rules.max_slice_loss})"
    add(flags, "max_slice_loss", type=float, default=rules.max_slice_loss, metavar="D", help=text)
    add(flags, "seconds_per_pass", type=float, metavar="S", help="seconds an encoder pass takes you; else measured")
    add(flags, "price_per_hour", type=float, metavar="P", help="price of an hour of that machine")
    add(flags, "compute_dtype", choices=DTYPES, default="float32", help="arithmetic of the encoders")
    add(flags, "device", help="where to compute; a GPU if there is one")
    add(flags, "seed", type=int, default=0, help="seed of all random choices")
    add(flags, "no_examples", action="store_true", help=NO_EXAMPLES_HELP)
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    _add_encoder_arguments(flags)
    return flags


def _add_encoder_arguments(flags: argparse.ArgumentParser) -> None:
    """Add what of the new encoder to change, where it is none that was saved with its settings."""
    for item in dataclasses.fields(EncoderChoice)[1:]:
        kind = int if item.name in ("num_layers", "max_length") else str
        add(flags, item.name, type=kind, choices=item.metadata.get("choices"), help=item.metadata["help"])
