"""``hf-corrector evaluate``: what a corrector recovers of a stale cache."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from hf_corrector._progress import working
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.common import (
    DTYPES,
    NO_EXAMPLES_HELP,
    EncoderChoice,
    add_data_argument,
    add_device_argument,
    add_model_arguments,
    check_same_targets,
    encode_queries,
    judged_split,
    load_corrector,
    load_data,
    load_old_model,
    new_output_folder,
    parser,
    quieten,
    side_of,
)
from hf_corrector.corrected_cache import check_comparable
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.retrieval import column, positives_as_rows
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.examples import judged_examples
from hf_corrector.evaluation.staleness import Conditions, measure_staleness
from hf_corrector.records import COSTS, FittedTargets, RunRecord
from hf_corrector.training.run_record import plain_arguments

EXAMPLES = """\
  hf-corrector evaluate --cache cache --model out --corrector out/corrector --data my_beir_folder --output_dir judged
  hf-corrector evaluate --cache out/cache --model out --old_model intfloat/e5-base-v2 --corrector out/corrector \\
      --data my_beir_folder --output_dir judged
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    arguments = _flags().parse_args(argv)
    progress = quieten(quiet=arguments.quiet)
    out, started = new_output_folder(arguments.output_dir), time.time()
    data, cache = load_data(arguments.data, progress=progress), TargetCache.open(arguments.cache)
    check_same_targets(cache, data)
    model, split = EncoderChoice.of(arguments).load(arguments.device, progress=progress), judged_split(data)
    corrector, fitted = load_corrector(arguments.corrector, cache, model)
    if corrector is None and cache.fingerprint.corrected_from is not None:
        check_comparable(cache, model.fingerprint("target"))
        fitted = FittedTargets.load(cache.path)
        print(f"note: the vectors of {cache.path} are corrected, not re-encoded; 'stale' is what they are worth")
    if corrector is not None and fitted is None:
        print(
            "note: nothing says which of these targets the corrector was fitted on, so all queries count as clean; "
            "if it was fitted on some, its numbers are too good"
        )
    side = None if corrector is None else side_of(cache, corrector, fitted)
    with working("load the old encoder", shown=progress):
        old = None if arguments.old_model is None else load_old_model(arguments, model, cache)
    options = EncodeOptions(compute_dtype=arguments.compute_dtype, progress=progress)
    fresh = build_cache(model, data.corpus, out / "fresh", options=options)
    relevant = positives_as_rows(split, data.corpus)
    report = measure_staleness(
        Conditions(
            queries=encode_queries(model, column(split, "query"), options), stale=cache,
            corrected=None if corrector is None else CorrectedTargets(cache, corrector, side=side),
            fresh=fresh.cache,
            old_queries=None if old is None else encode_queries(old, column(split, "query"), options), old=cache,
        ),
        relevant,
        fitted_rows=np.asarray([] if fitted is None else fitted.rows, dtype=np.int64), scale=model.config.scale,
        options=JudgeOptions(seed=arguments.seed, device=arguments.device, progress=progress),
    )  # fmt: skip
    examples: dict[str, Any] = {}
    if corrector is not None and not arguments.no_examples:
        examples = judged_examples(report.judgement, relevant, split=split, corpus=data.corpus, seed=arguments.seed)
    queries = len(split) * (1 if old is None else 2)
    RunRecord(
        command="evaluate", seed=arguments.seed, arguments=plain_arguments(arguments), evaluation=report.to_dict(),
        fidelity=report.fidelity_dict(),
        cost={**dict.fromkeys(COSTS, 0), "final_target_passes": fresh.encoded, "query_passes": queries},
        timing={"total": time.time() - started},
        manifests=[cache.manifest.to_dict(), fresh.cache.manifest.to_dict()],
        verdict={"sentence": report.judgement.sentence()}, examples=examples,
    ).save(out)  # fmt: skip
    print(f"{report.table()}\n\n{report.judgement.sentence()}")
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "evaluate", "Compare stale, corrected and fresh targets on the same queries; re-encodes the corpus.", EXAMPLES
    )
    flags.add_argument("--cache", required=True, metavar="CACHE", help="cache made by the old encoder")
    flags.add_argument("--corrector", metavar="H", help="folder or Hub id of the corrector")
    flags.add_argument("--old_model", metavar="M", help="encoder that made the cache, for the row 'old'")
    flags.add_argument("--output_dir", required=True, metavar="OUT", help="folder for run.json and the fresh cache")
    flags.add_argument("--compute_dtype", choices=DTYPES, default="float32", help="arithmetic of the encoder")
    flags.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    flags.add_argument("--no_examples", action="store_true", help=NO_EXAMPLES_HELP)
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_data_argument(flags)
    add_model_arguments(flags)
    add_device_argument(flags)
    return flags
