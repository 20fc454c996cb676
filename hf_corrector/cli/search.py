"""``hf-corrector search``: search a cache."""

from __future__ import annotations

import argparse

from hf_corrector._progress import working
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
    side_of,
)
from hf_corrector.corrected_cache import check_comparable
from hf_corrector.corrected_retriever import BACKENDS, DIRECTIONS, CorrectedRetriever, RetrieverOptions
from hf_corrector.data.retrieval import column, texts_hash
from hf_corrector.errors import CacheMismatchError, ConfigurationError
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.records import FittedTargets

EXAMPLES = """\
  hf-corrector search --cache out/cache --model out --corrector out/corrector --query "read a file line by line"
  hf-corrector search --cache cache --data my_beir_folder --model intfloat/e5-base-v2 --query "first" --query "second"
  hf-corrector search --cache cache --model out --corrector h --backend faiss:IVF512,Flat --nprobe 16 --query "first"
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    flags = parser("search", "Find the targets of a cache that are nearest to queries.", EXAMPLES)
    flags.add_argument("--cache", required=True, metavar="CACHE", help="folder of the cache")
    text = "folder or Hub id of a corrector, if the vectors are older; of targets or of queries ('upgrade --direction')"
    flags.add_argument("--corrector", metavar="H", help=text)
    flags.add_argument("--query", required=True, action="append", metavar="TEXT", help="may be given several times")
    flags.add_argument("--top_k", type=int, default=5, help="targets per query")
    flags.add_argument("--data", metavar="DIR", help=f"show texts from here: {DATA_HELP.split(';')[0]}, or 'stdlib'")
    flags.add_argument("--quiet", action="store_true", help="no signs of progress")
    _add_backend_arguments(flags)
    add_model_arguments(flags)
    add_device_argument(flags)
    arguments = flags.parse_args(argv)
    if arguments.top_k < 1 or any(not query.strip() for query in arguments.query):
        raise ConfigurationError(
            "search", expected="--top_k of at least 1 and queries with words in them",
            got=f"{arguments.top_k} and {arguments.query}", cure="Say what to search for, and how many to show.",
        )  # fmt: skip
    progress = quieten(quiet=arguments.quiet)
    cache = TargetCache.open(arguments.cache)
    texts = None if arguments.data is None else _texts(arguments.data, cache, progress=progress)
    model = EncoderChoice.of(arguments).load(arguments.device, progress=progress)
    corrector, fitted = load_corrector(arguments.corrector, cache, model, directions=DIRECTIONS)
    if corrector is None:
        _check_own(cache, model)
        corrector = CorrectorModel(CorrectorConfig(kind="identity", input_dim=cache.dim))
    retriever = _retriever(arguments, cache, corrector, fitted)
    with working(f"search {len(cache):,} targets", shown=progress):
        found = retriever.search(model.encode_query(arguments.query), min(arguments.top_k, len(cache)))
    for query, rows, scores in zip(arguments.query, found.rows.tolist(), found.scores.tolist(), strict=True):
        print(f"\n{query}")
        for place, (row, score) in enumerate(zip(rows, scores, strict=True), start=1):
            excerpt = "" if texts is None else "  " + " ".join(texts[row].split())[:80]
            print(f"{place:3d}. {score:.4f}  {cache.ids[row]}{excerpt}")
    return 0


def _add_backend_arguments(flags: argparse.ArgumentParser) -> None:
    flags.add_argument(
        "--backend", default="exact", metavar="HOW",
        help="exact (default), folded, two_stage, or faiss:FACTORY as in faiss:IVF512,Flat",
    )  # fmt: skip
    flags.add_argument("--shortlist", type=int, help="two_stage and faiss: candidates that the corrector judges")
    flags.add_argument("--certify", action="store_true", help="two_stage: prove results exact")
    flags.add_argument("--nprobe", type=int, help="faiss: lists looked into")
    flags.add_argument("--ef_search", type=int, help="faiss: length of the queue of HNSW")
    flags.add_argument("--k_factor", type=int, help="faiss: how many times more RFlat takes from its compressed part")


def _retriever(
    arguments: argparse.Namespace, cache: TargetCache, corrector: CorrectorModel, fitted: FittedTargets | None
) -> CorrectedRetriever:
    backend, _, factory = arguments.backend.partition(":")
    if backend not in BACKENDS or (backend == "faiss") != bool(factory):
        raise ConfigurationError(
            "--backend", expected=f"one of {BACKENDS}, and a factory after 'faiss:' only", got=arguments.backend,
            cure="For example --backend exact, or --backend faiss:HNSW32.",
        )  # fmt: skip
    parameters = None
    if backend == "faiss":
        from hf_corrector.index.faiss import FaissParameters  # loads a large library

        parameters = FaissParameters(arguments.nprobe, arguments.ef_search, arguments.k_factor)
    # One search is not worth a snapshot.
    options = RetrieverOptions(
        snapshot="none", shortlist=arguments.shortlist, certify=arguments.certify, factory=factory or None,
        parameters=parameters, device=arguments.device, fitted=fitted,
        direction=corrector.config.direction if fitted is None else fitted.direction,
    )  # fmt: skip
    side = side_of(cache, corrector, fitted)
    return CorrectedRetriever(cache, corrector, side=side, backend=backend, options=options)


def _check_own(cache: TargetCache, model: DualEncoderModel) -> None:
    try:
        if check_comparable(cache, model.fingerprint("target")):
            print(f"note: the vectors of {cache.path} are corrected, not re-encoded")
    except CacheMismatchError as error:
        raise CacheMismatchError(
            error.where, expected=error.expected, got=error.got,
            cure="Give the --corrector between the two, or the encoder the cache was made with as --model.",
        ) from error  # fmt: skip


def _texts(name: str, cache: TargetCache, *, progress: bool) -> list[str]:
    corpus = load_data(name, progress=progress).corpus
    if texts_hash(corpus) != cache.texts_hash:
        raise CacheMismatchError(
            str(cache.path), expected="a cache of the targets in --data", got="other ids or texts",
            cure="Name the data the cache was made from, or leave --data out to see ids only.",
        )  # fmt: skip
    texts: list[str] = column(corpus, "text")
    return texts
