"""``hf-corrector upgrade --new_sample``: the same decision where only vectors are at hand."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hf_corrector.cli.common import add, new_output_folder, parser, quieten
from hf_corrector.corrected_arrays import ARRAY_SUFFIX, load_array
from hf_corrector.data.folder import read_qrels
from hf_corrector.encoding import EncodeOptions
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.verdict import Thresholds
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.index_upgrade.vector_inputs import JudgedVectors
from hf_corrector.index_upgrade.vector_upgrade import FIRST_ROWS_FILE, VectorUpgradeReport, upgrade_vectors
from hf_corrector.metrics import DEFAULT_METRICS
from hf_corrector.models.configuration_corrector import KINDS
from hf_corrector.models.hub_files import CORRECTOR_FOLDER

EXAMPLES = """\
  hf-corrector upgrade --old vectors.npy --new_sample sample.npy --sample_rows rows.npy --output_dir upgraded
  hf-corrector upgrade --old vectors.npy --new_sample sample.npy --sample_ids sample.txt --ids ids.txt \\
      --queries q.npy --query_ids queries.txt --qrels qrels.tsv --old_queries old_q.npy --output_dir upgraded

exit status: 0 go, 3 no-go, 4 re-embed a part first; 1 a problem that was explained, 2 wrong usage.
Then:            hf-corrector apply --corrector upgraded/corrector --cache vectors.npy --output_dir corrected.npy \\
                     --fresh sample.npy --fresh_rows rows.npy
For status 4:    reembed_first.npy in OUT holds rows, worst first; embed these with the new encoder as well.
"""
_FLAGS = ("--new_sample", "--new-sample")


def is_asked_for(argv: list[str]) -> bool:
    """Say whether arguments of ``upgrade`` are about vectors alone."""
    return any(word.split("=", 1)[0] in _FLAGS for word in argv)


def run(argv: list[str]) -> int:
    """Run the command; returns 0 for a go, 3 for a no-go, 4 for re-embedding a part first."""
    # Whoever asks what --new_sample means gives it no file.
    arguments = _flags().parse_args([word for word in argv if word not in _FLAGS] if "--help" in argv else argv)
    progress = quieten(quiet=arguments.quiet)
    options = UpgradeOptions(
        kinds=UpgradeOptions().kinds if arguments.kinds is None else tuple(arguments.kinds),
        judging=JudgeOptions(
            metrics=tuple(dict.fromkeys((arguments.metric, *DEFAULT_METRICS))), primary=arguments.metric,
            seed=arguments.seed,
        ),
        thresholds=Thresholds(
            min_recovery=arguments.min_recovery, min_retention=arguments.min_retention,
            non_inferiority=arguments.non_inferiority,
        ),
        encoding=EncodeOptions(progress=progress), seconds_per_pass=arguments.seconds_per_pass,
        price_per_hour=arguments.price_per_hour, seed=arguments.seed,
    )  # fmt: skip
    ids = None if arguments.ids is None else read_ids(Path(arguments.ids))
    rows, queries = _sampled_rows(arguments, ids), _queries(arguments, ids)
    out = new_output_folder(arguments.output_dir)
    report = upgrade_vectors(
        arguments.old, arguments.new_sample, rows, queries=queries, kind=arguments.kind, options=options
    )
    report.save(out)
    print(f"{report.table()}\n\n{report.verdict}\n\nwritten to {out}")
    print(_next_step(arguments, report))
    return report.decision.exit_code


def _next_step(arguments: argparse.Namespace, report: VectorUpgradeReport) -> str:
    """Say what to run next; nothing for a no-go."""
    out = Path(arguments.output_dir)
    step = f"hf-corrector apply --corrector {out / CORRECTOR_FOLDER} --cache {arguments.old} --output_dir CORRECTED.npy"
    match report.decision.decision:
        case "no-go":
            return ""
        case "go":
            rows = "" if arguments.sample_rows is None else f" --fresh_rows {arguments.sample_rows}"
            return f"next: {step} --fresh {arguments.new_sample}{rows}" if rows else f"next: {step}"
        case _:
            first = f"embed the rows in {out / FIRST_ROWS_FILE} with the new encoder"
            return f"next: {first}, then {step} --fresh FRESH.npy --fresh_rows {out / FIRST_ROWS_FILE}"


def _sampled_rows(arguments: argparse.Namespace, ids: list[str] | None) -> npt.NDArray[np.int64] | None:
    if arguments.sample_ids is not None:
        if ids is None or arguments.sample_rows is not None:
            raise ConfigurationError(
                "--sample_ids", expected="--ids beside it, and no --sample_rows",
                got="no --ids" if ids is None else "both", cure="Give the ids of all old vectors as --ids.",
            )  # fmt: skip
        return _rows_of(read_ids(Path(arguments.sample_ids)), ids, where=arguments.sample_ids)
    return None if arguments.sample_rows is None else read_rows(Path(arguments.sample_rows))


def read_rows(path: Path) -> npt.NDArray[np.int64]:
    """Read row numbers from an ``.npy`` file of integers, or from a text with one a line.

    Raises:
        DataError: If it holds something else; names the line.
    """
    if path.suffix == ARRAY_SUFFIX:
        found = load_array(path)
        if found.ndim != 1 or not np.issubdtype(found.dtype, np.integer):
            raise DataError(
                str(path), expected="integers of shape (n,)", got=f"{found.dtype} of shape {found.shape}",
                cure="Write the row of each vector with numpy.save.",
            )  # fmt: skip
        return np.asarray(found, dtype=np.int64)
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not (line.strip().isascii() and line.strip().isdigit()):
            raise DataError(
                f"{path}, line {number}", expected="a row number", got=repr(line[:40]), cure="Write one a line."
            )
        rows.append(int(line))
    return np.asarray(rows, dtype=np.int64)


def read_ids(path: Path) -> list[str]:
    """Read one id a line.

    Raises:
        DataError: If one is empty or stands there twice; names the line.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line or line in seen:
            got = "none" if not line else f"{line[:40]!r} again"
            raise DataError(f"{path}, line {number}", expected="an id of its own", got=got, cure="List each id once.")
        seen.add(line)
    return lines


def _rows_of(wanted: list[str], ids: list[str], *, where: str) -> npt.NDArray[np.int64]:
    place = {one: row for row, one in enumerate(ids)}
    missing = [one for one in wanted if one not in place]
    if missing:
        raise DataError(
            where, expected="ids among those known", got=f"{missing[0]!r}, and {len(missing) - 1} others",
            cure="Give the ids of all old vectors as --ids, and those of all queries as --query_ids.",
        )  # fmt: skip
    return np.asarray([place[one] for one in wanted], dtype=np.int64)


def _queries(arguments: argparse.Namespace, ids: list[str] | None) -> JudgedVectors | None:
    if (arguments.queries is None) != (arguments.qrels is None):
        raise ConfigurationError(
            "--queries and --qrels", expected="both or neither", got="one of them", cure="Give the other one as well."
        )
    if arguments.queries is None:
        return None
    count = len(load_array(arguments.queries))
    names = [str(row) for row in range(count)] if arguments.query_ids is None else read_ids(Path(arguments.query_ids))
    if len(names) != count:
        raise DataError(
            arguments.query_ids, expected=f"an id for each of {count} queries", got=str(len(names)),
            cure="Give the ids in the order of --queries.",
        )  # fmt: skip
    judged = [judgement for _, judgement in read_qrels(Path(arguments.qrels)).items]
    queries = _rows_of([one.query_id for one in judged], names, where=arguments.qrels)
    if ids is not None:
        targets = _rows_of([one.target_id for one in judged], ids, where=arguments.qrels)
    else:
        targets = _rows_of(
            [one.target_id for one in judged], [str(row) for row in range(_count(arguments.old))], where=arguments.qrels
        )
    relevant: list[dict[int, float]] = [{} for _ in names]
    for query, target, one in zip(queries.tolist(), targets.tolist(), judged, strict=True):
        relevant[query][target] = float(one.grade)
    return JudgedVectors(arguments.queries, relevant, arguments.old_queries)


def _count(old: str) -> int:
    if Path(old).is_dir():
        raise ConfigurationError(
            "--qrels", expected="--ids, where the old vectors are a cache", got="none",
            cure="Write the ids of the cache one a line and give them as --ids.",
        )  # fmt: skip
    return len(load_array(old))


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "upgrade",
        "Decide what to do about old vectors where both encoders are out of reach: from all old vectors and new ones "
        "of some targets. Without judged queries the decision rests on the neighbours of these targets. Words of an "
        "argument may be joined by _ or by -.",
        EXAMPLES,
    )
    add(flags, "old", required=True, metavar="V", help="all old vectors: an .npy file, or a cache")
    add(flags, "new_sample", required=True, metavar="S", help="new vectors of some targets, an .npy file")
    text = "row of each among the old vectors, an .npy file of integers or one a line; needed unless all are there"
    add(flags, "sample_rows", metavar="R", help=text)
    add(flags, "sample_ids", metavar="IDS", help="instead of rows their ids, one a line")
    add(flags, "ids", metavar="IDS", help="ids of all old vectors, one a line")
    add(flags, "queries", metavar="Q", help="judged queries by the new encoder, an .npy file")
    add(flags, "query_ids", metavar="IDS", help="their ids, one a line; by default their row numbers")
    text = "lines of query id, target id and grade, separated by tabs; ids of targets by default are row numbers"
    add(flags, "qrels", metavar="TSV", help=text)
    add(flags, "old_queries", metavar="Q", help="the same queries by the old encoder, to judge keeping it")
    add(flags, "output_dir", required=True, metavar="OUT", help="folder for corrector and run.json")
    add(flags, "kinds", nargs="+", choices=KINDS, metavar="K", help="kinds of corrector to compare; all by default")
    add(flags, "kind", choices=("auto", *KINDS), default="auto", help="kind of corrector to adopt")
    add(flags, "metric", default="mrr@10", help="the metric that decides, with judged queries (mrr@10)")
    rules = Thresholds()
    text = f"lower bound of recovery for a go ({rules.min_recovery})"
    add(flags, "min_recovery", type=float, default=rules.min_recovery, metavar="R", help=text)
    text = f"lower bound of corrected / fresh, where old and new vectors differ in size ({rules.min_retention})"
    add(flags, "min_retention", type=float, default=rules.min_retention, metavar="R", help=text)
    text = f"how much worse than the old model may be at most ({rules.non_inferiority})"
    add(flags, "non_inferiority", type=float, default=rules.non_inferiority, metavar="D", help=text)
    add(flags, "seconds_per_pass", type=float, metavar="S", help="seconds an embedding takes you")
    add(flags, "price_per_hour", type=float, metavar="P", help="price of an hour of that")
    add(flags, "seed", type=int, default=0, help="seed of all random choices")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    return flags
