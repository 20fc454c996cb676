"""``hf-corrector apply``: write the corrected vectors of a whole cache into another one."""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from hf_corrector._files import parse_json
from hf_corrector.cache.target_cache import TargetCache
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
    plain_arguments,
    quieten,
    side_of,
)
from hf_corrector.corrected_cache import DEFAULT_SHARD_ROWS, ApplyOptions, write_corrected
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.errors import ConfigurationError, DataError, InputError
from hf_corrector.records import COSTS, EncoderFingerprint, FittedTargets, RunRecord

EXAMPLES = """\
  hf-corrector apply --corrector out/corrector --cache out/cache --output_dir corrected
  hf-corrector apply --corrector h --cache cache --model intfloat/e5-base-v2 --output_dir corrected \\
      --cache_dtype bfloat16
  hf-corrector apply --corrector upgraded/corrector --cache cache --model new-model --data my_beir_folder \\
      --reembed upgraded/reembed_first.jsonl --output_dir corrected
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    arguments = _flags().parse_args(argv)
    progress = quieten(quiet=arguments.quiet)
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
    flags.add_argument("--cache", required=True, metavar="CACHE", help="cache made by the old encoder; only read")
    flags.add_argument("--output_dir", required=True, metavar="NEW", help="folder of the corrected cache")
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
