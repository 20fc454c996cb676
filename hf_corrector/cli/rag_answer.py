"""``hf-corrector rag-answer``: answer questions with a trained retriever and reader, and say from which passages."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.common import add_device_argument, check_same_targets, load_corrector, parser, quieten, side_of
from hf_corrector.cli.questions import QUESTIONS_HELP, load_questions
from hf_corrector.corrected_cache import check_comparable
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.retrieval import RetrievalData, column
from hf_corrector.errors import CacheMismatchError, ConfigurationError
from hf_corrector.index.base import RowVectors, TensorVectors
from hf_corrector.models.modeling_dual_encoder import CORRECTOR_FOLDER
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.generation import METHODS, AnsweredQuestion, GenerationOptions
from hf_corrector.rag.passages import NearestPassages
from hf_corrector.records import RECORD_FILE, RunRecord

EXAMPLES = """\
  hf-corrector rag-answer --model out-rag --question "Wait until the event is set."
  hf-corrector rag-answer --model out-rag --question "first" --question "second" --method fast --num_passages 4
  hf-corrector rag-answer --model out-rag --encode --data my_squad_folder --question "When did the oil crisis begin?"
"""
SHOWN_PASSAGES = 2


def run(argv: list[str]) -> int:
    """Run the command."""
    arguments = _parse(argv)
    folder = Path(arguments.model)
    if not (folder / RECORD_FILE).is_file():
        raise ConfigurationError(
            "--model", expected=f"the folder of a run of rag-train, with its {RECORD_FILE}", got=arguments.model,
            cure="Name the --output_dir of that run.",
        )  # fmt: skip
    given = RunRecord.load(folder)
    if given.command != "rag-train":
        raise ConfigurationError(
            "--model", expected="a run of rag-train", got=f"one of {given.command!r}",
            cure="Name the --output_dir of a rag-train run.",
        )  # fmt: skip
    progress = quieten(quiet=arguments.quiet)
    data = load_questions(str(given.arguments["data"]) if arguments.data is None else arguments.data)
    model = RetrievalAugmentedModel.from_pretrained(arguments.model)
    model.to(arguments.device)
    view = _fresh(model, data, progress=progress) if arguments.encode else _corrected(model, data, arguments, given)
    texts = column(data.corpus, "text")
    k = arguments.num_passages or max(1, int(given.arguments["num_passages"]))
    find = NearestPassages(view, model.reader.passages(texts), k=k, device=arguments.device)
    options = GenerationOptions(method=arguments.method, num_beams=arguments.num_beams)
    ids = column(data.corpus, "id")
    for question, found in zip(
        arguments.question, model.generate(arguments.question, find, options=options), strict=True
    ):
        _show(question, found, ids, texts, top_k=arguments.top_k)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    flags = parser("rag-answer", "Answer questions, with the passages the answers come from.", EXAMPLES)
    flags.add_argument("--model", required=True, metavar="OUT", help="folder of a run of rag-train")
    flags.add_argument("--question", required=True, action="append", metavar="TEXT", help="may be given several times")
    flags.add_argument("--top_k", type=int, default=3, help="answers per question")
    flags.add_argument("--num_passages", type=int, help="passages read per question; by default as in training")
    flags.add_argument(
        "--method", default="thorough", choices=METHODS,
        help="thorough: answer from each passage alone and weigh every answer under all; fast: from all at once",
    )  # fmt: skip
    flags.add_argument("--num_beams", type=int, default=1, help="beams of the search for an answer")
    flags.add_argument("--cache", metavar="CACHE", help="cache to search; by default the run's newest")
    flags.add_argument("--encode", action="store_true", help="encode all targets now instead of reading a cache")
    flags.add_argument("--data", metavar="DIR", help=f"by default that of the run; {QUESTIONS_HELP.split(';')[0]}")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    add_device_argument(flags)
    arguments = flags.parse_args(argv)
    numbers = (arguments.top_k, arguments.num_beams, 1 if arguments.num_passages is None else arguments.num_passages)
    if min(numbers) < 1 or any(not question.strip() for question in arguments.question):
        raise ConfigurationError(
            "rag-answer", expected="--top_k, --num_beams and --num_passages of at least 1 and questions with words",
            got=f"{numbers} and {arguments.question}", cure="Say what to answer, and how much to show.",
        )  # fmt: skip
    if arguments.encode and arguments.cache is not None:
        raise ConfigurationError(
            "rag-answer", expected="--cache or --encode", got="both", cure="Leave one of them out."
        )
    return arguments


def _fresh(model: RetrievalAugmentedModel, data: RetrievalData, *, progress: bool) -> RowVectors:
    return TensorVectors(model.retriever.encode_target(column(data.corpus, "text"), show_progress_bar=progress))


def _corrected(
    model: RetrievalAugmentedModel, data: RetrievalData, arguments: argparse.Namespace, given: RunRecord
) -> RowVectors:
    """Open the run's cache, seen through its corrector if it has one."""
    folder = Path(arguments.model)
    path = Path(given.arguments["cache_dir"] or folder / "cache")
    path = max(folder.glob("cache-[0-9][0-9][0-9][0-9]"), default=path)
    cache = TargetCache.open(path if arguments.cache is None else arguments.cache)
    check_same_targets(cache, data)
    name = folder / CORRECTOR_FOLDER
    corrector, fitted = load_corrector(str(name) if name.is_dir() else None, cache, model.retriever)
    if corrector is None:
        _check_own(cache, model)
        return cache
    side = side_of(cache, corrector, fitted)
    return CorrectedTargets(cache, corrector.to(arguments.device), side=side, device=arguments.device)


def _check_own(cache: TargetCache, model: RetrievalAugmentedModel) -> None:
    try:
        check_comparable(cache, model.retriever.fingerprint("target"))
    except CacheMismatchError as error:
        raise CacheMismatchError(
            error.where, expected=error.expected, got=error.got,
            cure="Its vectors are older than the retriever: add --encode to encode all targets now.",
        ) from error  # fmt: skip


def _show(question: str, found: AnsweredQuestion, ids: list[str], texts: list[str], *, top_k: int) -> None:
    print(f"\n{question}")
    for place, answer in enumerate(found.answers[:top_k], start=1):
        print(f"{place:3d}. {math.exp(answer.log_prob):.4f}  {answer.text or '(nothing)'}")
        ranked = sorted(zip(answer.passage_log_probs, found.rows, strict=True), key=lambda one: (-one[0], one[1]))
        for log_prob, row in ranked[:SHOWN_PASSAGES]:
            print(f"       {math.exp(log_prob):.2f} from {ids[row]}  {' '.join(texts[row].split())[:70]}")
