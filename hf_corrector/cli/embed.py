"""``hf-corrector embed``: encode a corpus into a cache."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from hf_corrector._distributed import exit_together, is_main, join_processes, on_main
from hf_corrector.cache.side_store import save_side
from hf_corrector.cli.common import (
    DTYPES,
    EncoderChoice,
    add_data_argument,
    add_device_argument,
    add_model_arguments,
    load_data,
    parser,
    quieten,
)
from hf_corrector.encoding import DEFAULT_SHARD_ROWS, CacheBuild, EncodeOptions, build_cache, update_cache
from hf_corrector.errors import DataError, InputError
from hf_corrector.records import COSTS, RECORD_FILE, RunRecord
from hf_corrector.side_features import DenseSide
from hf_corrector.training.run_record import plain_arguments

EXAMPLES = """\
  hf-corrector embed --data my_beir_folder --model intfloat/e5-base-v2 --output_dir cache
  hf-corrector embed --output_dir cache --compute_dtype bfloat16    # standard library, MiniLM
  hf-corrector embed --data my_beir_folder --model intfloat/e5-base-v2 --output_dir cache --update
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    arguments = _flags().parse_args(argv)
    join_processes()
    progress = quieten(quiet=arguments.quiet) and is_main()
    options = EncodeOptions(
        cache_dtype=arguments.cache_dtype, compute_dtype=arguments.compute_dtype,
        token_budget=arguments.token_budget, shard_rows=arguments.shard_rows, progress=progress,
    )  # fmt: skip
    side = None if arguments.side is None else _read_matrix(Path(arguments.side))
    data = load_data(arguments.data, progress=progress)
    model = EncoderChoice.of(arguments).load(arguments.device, progress=progress)
    if side is not None and len(side) != len(data.corpus):
        raise DataError(
            arguments.side, expected=f"a row for each of {len(data.corpus)} targets", got=f"{len(side)} rows",
            cure="Make one row for every target of --data, in its order.",
        )  # fmt: skip
    started, path = time.time(), Path(arguments.output_dir)
    if arguments.update:
        built = update_cache(model, data.corpus, path, options=options, trust_ids=arguments.trust_ids)
    else:
        built = build_cache(model, data.corpus, path, options=options)
    if side is not None:
        details = {"file": Path(arguments.side).name}
        on_main("storing side features", lambda: save_side(built.cache, side, details=details))
    seconds = time.time() - started
    if is_main():
        _record(arguments, built, seconds)
        gone = f", {built.deleted:,} deleted" if arguments.update else ""
        print(f"{built.cache!r}: {built.encoded:,} targets encoded{gone} in {seconds:.1f} s")
    exit_together(0)
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "embed", "Encode a corpus into a cache. A build that was killed is taken up where it stopped.", EXAMPLES
    )
    add_data_argument(flags)
    add_model_arguments(flags)
    add_device_argument(flags)
    flags.add_argument("--output_dir", required=True, metavar="CACHE", help="folder of the cache")
    flags.add_argument("--cache_dtype", choices=DTYPES, default="float32", help="type of the stored vectors")
    flags.add_argument("--compute_dtype", choices=DTYPES, default="float32", help="arithmetic of the encoder")
    flags.add_argument("--token_budget", type=int, default=4096, help="tokens per batch")
    flags.add_argument("--shard_rows", type=int, default=DEFAULT_SHARD_ROWS, help="vectors per file")
    flags.add_argument("--update", action="store_true", help="bring a cache up to date: encode only what has changed")
    flags.add_argument("--trust_ids", action="store_true", help="update: equal ids mean equal texts, for old caches")
    flags.add_argument("--side", metavar="FILE", help="matrix of side features to store: .npy or .safetensors")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    return flags


def _record(arguments: argparse.Namespace, built: CacheBuild, seconds: float) -> None:
    """Write what making the cache took; one that was only opened is left as it is."""
    if not built.encoded and not built.deleted:
        return
    path, before = built.cache.path, 0
    if arguments.update and (path / RECORD_FILE).exists():
        before = RunRecord.load(path).cost.get("initial_target_passes", 0)
    record = RunRecord(
        command="embed", seed=0, arguments=plain_arguments(arguments),
        cost={**dict.fromkeys(COSTS, 0), "initial_target_passes": before + built.encoded},
        timing={"encode_targets": seconds}, manifests=[built.cache.manifest.to_dict()],
    )  # fmt: skip
    record.save(path)


def _read_matrix(path: Path) -> DenseSide:
    """Read a matrix of numbers; pickled objects are refused.

    Raises:
        InputError: If the file holds none.
    """
    try:
        if path.suffix == ".npy":
            # Private, as torch warns of arrays it could not write to.
            return DenseSide(torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False)))
        tensors = list(load_file(path).values())
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(
            str(path), expected="a matrix of floating numbers in .npy or .safetensors", got=str(error),
            cure="Save it with numpy.save() or safetensors.torch.save_file().",
        ) from error  # fmt: skip
    if len(tensors) != 1:
        raise InputError(str(path), expected="one tensor", got=str(len(tensors)), cure="Save the matrix alone.")
    return DenseSide(tensors[0])
