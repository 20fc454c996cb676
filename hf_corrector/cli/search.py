"""``hf-corrector search``: search a cache."""

from __future__ import annotations

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.common import (
    DATA_HELP,
    EncoderChoice,
    add_device_argument,
    add_model_arguments,
    load_corrector,
    load_data,
    parser,
    quieten,
)
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.retrieval import column, texts_hash
from hf_corrector.errors import CacheMismatchError, ConfigurationError
from hf_corrector.index.exact import ExactIndex
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.training.checks import check_made_by

EXAMPLES = """\
  hf-corrector search --cache out/cache --model out --corrector out/corrector --query "read a file line by line"
  hf-corrector search --cache cache --data my_beir_folder --model intfloat/e5-base-v2 --query "first" --query "second"
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    flags = parser("search", "Find the targets of a cache that are nearest to queries.", EXAMPLES)
    flags.add_argument("--cache", required=True, metavar="CACHE", help="folder of the cache")
    flags.add_argument("--corrector", metavar="H", help="folder or Hub id of a corrector, if the vectors are older")
    flags.add_argument("--query", required=True, action="append", metavar="TEXT", help="may be given several times")
    flags.add_argument("--top_k", type=int, default=5, help="targets per query")
    flags.add_argument("--data", metavar="DIR", help=f"show texts from here: {DATA_HELP.split(';')[0]}, or 'stdlib'")
    add_model_arguments(flags)
    add_device_argument(flags)
    arguments = flags.parse_args(argv)
    if arguments.top_k < 1 or any(not query.strip() for query in arguments.query):
        raise ConfigurationError(
            "search", expected="--top_k of at least 1 and queries with words in them",
            got=f"{arguments.top_k} and {arguments.query}", cure="Say what to search for, and how many to show.",
        )  # fmt: skip
    quieten()
    cache = TargetCache.open(arguments.cache)
    texts = None if arguments.data is None else _texts(arguments.data, cache)
    model = EncoderChoice.of(arguments).load(arguments.device)
    corrector, _ = load_corrector(arguments.corrector, cache, model)
    if corrector is None:
        _check_own(cache, model)
    queries = model.encode_query(arguments.query)
    found = ExactIndex(CorrectedTargets(cache, corrector), device=arguments.device).search(
        queries, min(arguments.top_k, len(cache))
    )
    for query, rows, scores in zip(arguments.query, found.rows.tolist(), found.scores.tolist(), strict=True):
        print(f"\n{query}")
        for place, (row, score) in enumerate(zip(rows, scores, strict=True), start=1):
            excerpt = "" if texts is None else "  " + " ".join(texts[row].split())[:80]
            print(f"{place:3d}. {score:.4f}  {cache.ids[row]}{excerpt}")
    return 0


def _check_own(cache: TargetCache, model: DualEncoderModel) -> None:
    try:
        check_made_by(cache, model)
    except CacheMismatchError as error:
        raise CacheMismatchError(
            error.where, expected=error.expected, got=error.got,
            cure="Give the --corrector between the two, or the encoder the cache was made with as --model.",
        ) from error  # fmt: skip


def _texts(name: str, cache: TargetCache) -> list[str]:
    corpus = load_data(name).corpus
    if texts_hash(corpus) != cache.texts_hash:
        raise CacheMismatchError(
            str(cache.path), expected="a cache of the targets in --data", got="other ids or texts",
            cure="Name the data the cache was made from, or leave --data out to see ids only.",
        )  # fmt: skip
    texts: list[str] = column(corpus, "text")
    return texts
