"""``hf-corrector apply``: write the corrected vectors of a whole cache into another one."""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.common import (
    DTYPES,
    EncoderChoice,
    add_device_argument,
    add_model_arguments,
    corrector_of_cache,
    load_corrector,
    parser,
    plain_arguments,
    quieten,
    side_of,
)
from hf_corrector.corrected_cache import DEFAULT_SHARD_ROWS, ApplyOptions, write_corrected
from hf_corrector.errors import ConfigurationError, InputError
from hf_corrector.records import COSTS, EncoderFingerprint, FittedTargets, RunRecord

EXAMPLES = """\
  hf-corrector apply --corrector out/corrector --cache out/cache --output_dir corrected
  hf-corrector apply --corrector h --cache cache --model intfloat/e5-base-v2 --output_dir corrected \\
      --cache_dtype bfloat16
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    arguments = _flags().parse_args(argv)
    quieten()
    cache, started = TargetCache.open(arguments.cache), time.time()
    corrector, fitted = corrector_of_cache(arguments.corrector, cache)
    corrected = write_corrected(
        corrector, cache, Path(arguments.output_dir), encoder=_encoder(arguments, cache, fitted),
        side=side_of(cache, corrector, fitted),
        options=ApplyOptions(
            cache_dtype=arguments.cache_dtype, device=arguments.device, shard_rows=arguments.shard_rows,
            progress=not arguments.quiet,
        ),
    )  # fmt: skip
    if fitted is not None:
        # So that queries can be told clean from the corrected cache alone, whose rows are the same.
        replace(fitted, ids=tuple(cache.ids[row] for row in fitted.rows)).save(corrected.path)
    seconds = time.time() - started
    RunRecord(
        command="apply", seed=0, arguments=plain_arguments(arguments), cost=dict.fromkeys(COSTS, 0),
        timing={"correct_targets": seconds}, manifests=[cache.manifest.to_dict(), corrected.manifest.to_dict()],
    ).save(corrected.path)  # fmt: skip
    print(f"{corrected!r}: {len(corrected):,} targets corrected, not re-encoded, in {seconds:.1f} s")
    return 0


def _flags() -> argparse.ArgumentParser:
    flags = parser(
        "apply",
        "Correct all vectors of a cache into a new one. A run that was killed is taken up where it stopped. "
        "Encodes nothing: where 'upgrade' listed targets in reembed_first.jsonl, re-encode those ids with the new "
        "model yourself, and write them over the corrected vectors in the index you serve from before you switch.",
        EXAMPLES,
    )
    flags.add_argument("--corrector", required=True, metavar="H", help="folder or Hub id of the corrector")
    flags.add_argument("--cache", required=True, metavar="CACHE", help="cache made by the old encoder; only read")
    flags.add_argument("--output_dir", required=True, metavar="NEW", help="folder of the corrected cache")
    flags.add_argument("--cache_dtype", choices=DTYPES, help="type of the stored vectors; by default as they are")
    flags.add_argument("--shard_rows", type=int, default=DEFAULT_SHARD_ROWS, help="vectors per file")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_model_arguments(flags)
    add_device_argument(flags)
    return flags


def _encoder(arguments: argparse.Namespace, cache: TargetCache, fitted: FittedTargets | None) -> EncoderFingerprint:
    """Return the encoder the corrector leads to: from its note, or from the model that is named."""
    if arguments.model is not None:
        model = EncoderChoice.of(arguments).load()
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
