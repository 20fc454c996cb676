"""``hf-corrector embed``: encode a corpus into a cache."""

from __future__ import annotations

import time
from pathlib import Path

from hf_corrector.cli.common import (
    DTYPES,
    EncoderChoice,
    add_data_argument,
    add_device_argument,
    add_model_arguments,
    load_data,
    parser,
    plain_arguments,
    quieten,
)
from hf_corrector.encoding import DEFAULT_SHARD_ROWS, EncodeOptions, build_cache
from hf_corrector.records import COSTS, RunRecord

EXAMPLES = """\
  hf-corrector embed --data my_beir_folder --model intfloat/e5-base-v2 --output_dir cache
  hf-corrector embed --output_dir cache --compute_dtype bfloat16    # standard library, MiniLM
"""


def run(argv: list[str]) -> int:
    """Run the command."""
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
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = flags.parse_args(argv)
    quieten()
    options = EncodeOptions(
        cache_dtype=arguments.cache_dtype, compute_dtype=arguments.compute_dtype,
        token_budget=arguments.token_budget, shard_rows=arguments.shard_rows, progress=not arguments.quiet,
    )  # fmt: skip
    data, model = load_data(arguments.data), EncoderChoice.of(arguments).load(arguments.device)
    started = time.time()
    built = build_cache(model, data.corpus, Path(arguments.output_dir), options=options)
    seconds = time.time() - started
    record = RunRecord(
        command="embed", seed=0, arguments=plain_arguments(arguments),
        cost={**dict.fromkeys(COSTS, 0), "initial_target_passes": built.encoded}, timing={"encode_targets": seconds},
        manifests=[built.cache.manifest.to_dict()],
    )  # fmt: skip
    if built.encoded:
        # An open cache is left as it is: its record tells what making it took.
        record.save(built.cache.path)
    print(f"{built.cache!r}: {built.encoded:,} targets encoded in {seconds:.1f} s")
    return 0
