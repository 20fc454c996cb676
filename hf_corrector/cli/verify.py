"""``hf-corrector verify``: check every byte of a cache."""

from __future__ import annotations

from hf_corrector._progress import working
from hf_corrector.cache.overlay import Overlay
from hf_corrector.cache.side_store import verify_sides
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.common import parser, quieten

EXAMPLES = """\
  hf-corrector verify cache
  hf-corrector verify out/cache --quiet && echo intact
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    flags = parser("verify", "Check manifest, checksums, vectors, ids, side features and overlay of a cache.", EXAMPLES)
    flags.add_argument("cache", metavar="CACHE", help="folder of the cache")
    flags.add_argument("--quiet", action="store_true", help="no progress bar")
    arguments = flags.parse_args(argv)
    progress, cache = quieten(quiet=arguments.quiet), TargetCache.open(arguments.cache)
    cache.verify(progress=progress)
    with working("verify side features and overlay", shown=progress):
        verify_sides(cache)
        Overlay.open(cache)
    print(f"{cache!r}: intact")
    return 0
