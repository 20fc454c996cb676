"""``hf-corrector apply``: write the corrected vectors of a whole cache into another one."""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from hf_corrector._files import parse_json
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import hash_vectors
from hf_corrector.cli.common import (
    DTYPES,
    EncoderChoice,
    add_data_argument,
    add_device_argument,
    add_model_arguments,
    check_same_targets,
    corrector_of_cache,
    load_corrector,
    load_data,
    parser,
    quieten,
    side_of,
)
from hf_corrector.cli.upgrade_vectors import read_rows
from hf_corrector.corrected_arrays import (
    ARRAY_SUFFIX,
    ArrayOptions,
    check_vectors,
    load_array,
    write_corrected_array,
)
from hf_corrector.corrected_cache import DEFAULT_SHARD_ROWS, ApplyOptions, write_corrected
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.errors import ConfigurationError, DataError, InputError
from hf_corrector.index.base import TargetVectors
from hf_corrector.index_upgrade.vector_upgrade import fresh_array
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.records import COSTS, EncoderFingerprint, FittedTargets, RunRecord
from hf_corrector.training.run_record import plain_arguments

EXAMPLES = """\
  hf-corrector apply --corrector out/corrector --cache out/cache --output_dir corrected
  hf-corrector apply --corrector h --cache cache --model intfloat/e5-base-v2 --output_dir corrected \\
      --cache_dtype bfloat16
  hf-corrector apply --corrector upgraded/corrector --cache cache --model new-model --data my_beir_folder \\
      --reembed upgraded/reembed_first.jsonl --output_dir corrected
  hf-corrector apply --corrector upgraded/corrector --cache vectors.npy --output_dir corrected.npy \\
      --fresh sample.npy --fresh_rows rows.npy
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    arguments = _flags().parse_args(argv)
    progress = quieten(quiet=arguments.quiet)
    if ARRAY_SUFFIX in (Path(arguments.cache).suffix, Path(arguments.output_dir).suffix):
        return _apply_to_array(arguments, progress=progress)
    if arguments.fresh is not None:
        raise ConfigurationError(
            "--fresh", expected="an .npy file as --output_dir", got=arguments.output_dir,
            cure="Name one, or give --reembed for a cache.",
        )  # fmt: skip
    cache, started = TargetCache.open(arguments.cache), time.time()
    corrector, fitted = corrector_of_cache(arguments.corrector, cache)
    encoder, side = _encoder(arguments, cache, fitted, progress=progress), side_of(cache, corrector, fitted)
    reembedded, encoded = _reembedded(arguments, cache, progress=progress)  # only now: the dear part
    corrected = write_corrected(
        corrector, cache, Path(arguments.output_dir), encoder=encoder, side=side,
        options=ApplyOptions(
            cache_dtype=arguments.cache_dtype, device=arguments.device, shard_rows=arguments.shard_rows,
            reembedded=reembedded, progress=progress,
        ),
    )  # fmt: skip
    if reembedded is not None:
        shutil.rmtree(reembedded.path)  # all of it is in the new cache now
    if fitted is not None:
        # So that queries can be told clean from the corrected cache alone, whose rows are the same.
        replace(fitted, ids=tuple(cache.ids[row] for row in fitted.rows)).save(corrected.path)
    seconds = time.time() - started
    RunRecord(
        command="apply", seed=0, arguments=plain_arguments(arguments),
        cost={**dict.fromkeys(COSTS, 0), "refresh_target_passes": encoded},
        timing={"correct_targets": seconds}, manifests=[cache.manifest.to_dict(), corrected.manifest.to_dict()],
    ).save(corrected.path)  # fmt: skip
    kept = 0 if reembedded is None else len(reembedded)
    print(f"{corrected!r}: {len(corrected) - kept:,} targets corrected, {kept:,} re-encoded, in {seconds:.1f} s")
    return 0


def _apply_to_array(arguments: argparse.Namespace, *, progress: bool) -> int:
    """Write corrected vectors into an ``.npy`` file, from one or from a cache."""
    if arguments.reembed is not None or Path(arguments.output_dir).suffix != ARRAY_SUFFIX:
        raise ConfigurationError(
            "apply", expected="an .npy file as --output_dir, and no --reembed",
            got=f"--output_dir {arguments.output_dir}" + ("" if arguments.reembed is None else " and --reembed"),
            cure="Name an .npy file; give vectors that were embedded anew as --fresh and --fresh_rows.",
        )  # fmt: skip
    started, fresh = time.time(), None
    if (arguments.fresh is None) != (arguments.fresh_rows is None):
        raise ConfigurationError(
            "--fresh and --fresh_rows", expected="both or neither", got="one of them", cure="Give the other one too."
        )
    if arguments.fresh is not None:
        fresh = fresh_array(arguments.fresh, read_rows(Path(arguments.fresh_rows)))
    if Path(arguments.cache).suffix == ARRAY_SUFFIX:
        vectors: TargetVectors = check_vectors(arguments.cache, arguments.cache)
        corrector, side = _corrector_of_vectors(arguments), None
    else:
        vectors = cache = TargetCache.open(arguments.cache)
        corrector, fitted = corrector_of_cache(arguments.corrector, cache)
        side = side_of(cache, corrector, fitted)
    cast(torch.nn.Module, corrector).to(arguments.device)
    options = ArrayOptions(arguments.cache_dtype or "float32", fresh, progress)
    path = write_corrected_array(corrector, vectors, arguments.output_dir, side=side, options=options)
    kept = 0 if fresh is None else len(fresh.rows)
    seconds = time.time() - started
    print(f"{path}: {len(vectors) - kept:,} targets corrected, {kept:,} embedded anew, in {seconds:.1f} s")
    return 0


def _corrector_of_vectors(arguments: argparse.Namespace) -> CorrectorModel:
    """Load a corrector for vectors that do not say who made them."""
    name = arguments.corrector
    corrector, fitted = CorrectorModel.from_pretrained(name), FittedTargets.load(Path(name))
    if fitted is not None and fitted.direction != "targets":
        raise ConfigurationError(
            name, expected="a corrector of targets", got="one that maps queries",
            cure="Leave the vectors as they are.",
        )  # fmt: skip
    if fitted is not None and fitted.cache != f"vectors-{hash_vectors(load_array(arguments.cache))}":
        print("note: the corrector was fitted to other vectors; these must come from the same old encoder")
    return corrector


def _reembedded(
    arguments: argparse.Namespace, cache: TargetCache, *, progress: bool
) -> tuple[TargetCache | None, int]:  # fmt: skip
    """Encode the listed targets into a cache beside the new one; return it and the texts encoded by this call."""
    if arguments.reembed is None:
        return None, 0
    if arguments.model is None:
        raise ConfigurationError(
            "--reembed", expected="the new encoder and the data", got="no --model",
            cure="Name the new encoder as --model and the data of the cache as --data.",
        )  # fmt: skip
    rows = np.sort(cache.rows_of(_listed(Path(arguments.reembed))))
    data = load_data(arguments.data, progress=progress)
    check_same_targets(cache, data)
    out = Path(arguments.output_dir)
    options = EncodeOptions(token_counts=False, progress=progress)
    model = EncoderChoice.of(arguments).load(arguments.device, progress=progress)
    built = build_cache(model, data.corpus.select(rows), out.with_name(f"{out.name}-reembedded"), options=options)
    return built.cache, built.encoded


def _listed(path: Path) -> list[str]:
    """Read ids, a JSON string a line.

    Raises:
        DataError: If a line is none, an id stands there twice, or there is none; names the line.
    """
    ids = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        found = parse_json(line.encode(), where=f"{path}, line {number}")
        if not isinstance(found, str):
            raise DataError(
                f"{path}, line {number}", expected="an id in quotes", got=line[:40], cure="List one id a line."
            )
        ids.append(found)
    if not ids or len(set(ids)) != len(ids):
        raise DataError(str(path), expected="different ids", got=f"{len(ids)} lines", cure="List each id once.")
    return ids


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "apply",
        "Correct all vectors of a cache into a new one. A run that was killed is taken up where it stopped. "
        "Encodes nothing but what --reembed lists, as 'upgrade' does in reembed_first.jsonl.",
        EXAMPLES,
    )
    flags.add_argument("--corrector", required=True, metavar="H", help="folder or Hub id of the corrector")
    text = "cache made by the old encoder, or an .npy file of its vectors; only read"
    flags.add_argument("--cache", required=True, metavar="CACHE", help=text)
    text = "folder of the corrected cache, or an .npy file for the vectors alone"
    flags.add_argument("--output_dir", required=True, metavar="NEW", help=text)
    text = "for an .npy file: vectors the new encoder has made of some targets, taken instead of corrected ones"
    flags.add_argument("--fresh", metavar="F", help=text)
    flags.add_argument("--fresh_rows", metavar="R", help="their rows, an .npy file of integers or one a line")
    flags.add_argument("--cache_dtype", choices=DTYPES, help="type of the stored vectors; by default as they are")
    flags.add_argument("--reembed", metavar="LIST", help="re-encode these ids with --model, a JSON string a line")
    add_data_argument(flags)
    flags.add_argument("--shard_rows", type=int, default=DEFAULT_SHARD_ROWS, help="vectors per file")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_model_arguments(flags)
    add_device_argument(flags)
    return flags


def _encoder(
    arguments: argparse.Namespace, cache: TargetCache, fitted: FittedTargets | None, *, progress: bool
) -> EncoderFingerprint:  # fmt: skip
    """Return the encoder the corrector leads to: from its note, or from the model that is named."""
    if arguments.model is not None:
        model = EncoderChoice.of(arguments).load(progress=progress)
        load_corrector(arguments.corrector, cache, model)
        return model.fingerprint("target")
    if fitted is None or fitted.encoder_fingerprint is None:
        raise ConfigurationError(
            "apply", expected="the encoder the corrector leads to", got="a corrector that does not say",
            cure="Name it as --model.",
        )  # fmt: skip
    encoder = EncoderFingerprint.from_dict(fitted.encoder_fingerprint)
    if encoder.digest != fitted.encoder:
        raise InputError(
            arguments.corrector, expected=f"the fingerprint of the encoder {fitted.encoder}", got=encoder.digest,
            cure="Restore the folder of the corrector, or name the encoder as --model.",
        )  # fmt: skip
    return encoder
