"""``hf-corrector push``: put what a folder holds on the Hub, and nothing else of the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_corrector._files import read_json
from hf_corrector._hub import PushOptions
from hf_corrector.cache.manifest import MANIFEST_FILE
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cards import (
    CardFacts,
    card_of_corrector,
    card_of_dual_encoder,
    card_of_reading_run,
    card_of_retrieval_augmented,
    card_of_run,
)
from hf_corrector.cli.common import parser, quieten
from hf_corrector.errors import ConfigurationError, InputError
from hf_corrector.models.configuration_corrector import CorrectorConfig
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig
from hf_corrector.models.hub_files import (
    ADAPTER_CONFIG_FILE,
    BASE_FILE,
    CARD_FILE,
    CORRECTOR_FILES,
    CORRECTOR_FOLDER,
    DUAL_ENCODER_FILES,
    RETRIEVAL_AUGMENTED_FILES,
    Card,
    push_folder,
)
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.rag import RetrievalAugmentedConfig
from hf_corrector.records import RECORD_FILE, RunRecord

EXAMPLES = """\
  hf-corrector push upgraded me/old-to-new-corrector --license apache-2.0
  hf-corrector push out me/my-encoder --private
  hf-corrector push out-rag me/my-retriever-and-reader --license apache-2.0
  hf-corrector push old_cache me/my-target-embeddings --create-pr
"""
# What each kind of model is known by in its configuration, and the files it consists of.
_MODELS = {
    "corrector": (CorrectorConfig.model_type, CORRECTOR_FILES),
    "dual encoder": (DualEncoderConfig.model_type, DUAL_ENCODER_FILES),
    "retriever and reader": (RetrievalAugmentedConfig.model_type, RETRIEVAL_AUGMENTED_FILES),
}


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        kind: One of those in ``_MODELS``, or ``"cache"``.
        folder: Where it lies.
    """

    kind: str
    folder: Path


def run(argv: list[str]) -> int:
    """Run the command."""
    flags = parser(
        "push",
        "Push a corrector, a dual encoder with tokenizers and corrector, a retriever with its reader, or a cache of "
        "target embeddings. What the folder is, is seen from its files; run.json, training state and pickles are never "
        "sent.",
        EXAMPLES,
    )
    flags.add_argument("path", metavar="PATH", help="output of an upgrade or a training run, a corrector, or a cache")
    flags.add_argument("repo_id", metavar="REPO_ID", help="made if there is none; a cache becomes a data set")
    flags.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    flags.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    flags.add_argument("--revision", metavar="BRANCH", help="branch to commit to, made if there is none")
    flags.add_argument("--commit-message", metavar="TEXT", help="first line of the commit")
    flags.add_argument("--license", metavar="ID", help="for the model card: licence of the weights")
    flags.add_argument("--dataset", action="append", metavar="ID", help="for the model card: Hub id of the data")
    flags.add_argument("--language", action="append", metavar="CODE", help="for the model card: language of the texts")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = flags.parse_args(argv)
    progress = quieten(quiet=arguments.quiet)
    options = PushOptions(
        arguments.private, arguments.create_pr, arguments.revision, arguments.commit_message,
        progress=progress,
    )  # fmt: skip
    facts = CardFacts(arguments.license, tuple(arguments.dataset or ()), tuple(arguments.language or ()))
    found = recognise(Path(arguments.path))
    if found.kind == "cache":
        if facts != CardFacts():
            raise ConfigurationError(
                "--license, --dataset, --language", expected="a model", got=f"a cache in {found.folder}",
                cure="Leave them out, and edit the card of the data set on the Hub.",
            )  # fmt: skip
        address = TargetCache.open(found.folder).push_to_hub(arguments.repo_id, options=options)
    else:
        patterns = _MODELS[found.kind][1]
        address = push_folder(found.folder, arguments.repo_id, patterns, options=options, card=_card(found, facts))
    print(f"pushed the {found.kind} in {found.folder}: {address}")
    return 0


def recognise(path: Path) -> Found:
    """Say what a folder holds.

    Raises:
        InputError: If it is nothing this package knows.
    """
    if (path / MANIFEST_FILE).is_file():
        return Found("cache", path)
    if (path / ADAPTER_CONFIG_FILE).is_file() and (path / BASE_FILE).is_file():
        return Found("dual encoder", path)
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        for kind, (model_type, _) in _MODELS.items():
            if isinstance(config, dict) and config.get("model_type") == model_type:
                return Found(kind, path)
    elif (path / RECORD_FILE).is_file() and (path / CORRECTOR_FOLDER / "config.json").is_file():
        return recognise(path / CORRECTOR_FOLDER)
    raise InputError(
        str(path), expected="a corrector, a dual encoder, a cache, or the output of 'upgrade', "
        "'train' or 'rag-train'",
        got="another folder" if path.is_dir() else "no folder", cure="Name the folder one of them was saved to.",
    )  # fmt: skip


def _card(found: Found, facts: CardFacts) -> Card:
    """Return a card for a folder that holds none, or one that says what facts given here say too.

    Raises:
        ConfigurationError: If there are facts, and no record of the run to write a card from.
    """
    folder = found.folder if found.kind == "corrector" else found.folder / CORRECTOR_FOLDER
    described = CorrectorModel.from_pretrained(str(folder)).describe() if folder.is_dir() else {}
    record = _record(found, described)
    if record is None and facts != CardFacts():
        raise ConfigurationError(
            "--license, --dataset, --language", expected=f"the {RECORD_FILE} of its run, to write a card from",
            got=f"none in {found.folder}", cure=f"Write them into {found.folder / CARD_FILE} yourself.",
        )  # fmt: skip
    match found.kind, record:
        case "corrector" | "dual encoder", RunRecord():
            text = card_of_run(record, facts, of_encoder=found.kind == "dual encoder")
        case _, RunRecord():
            text = card_of_reading_run(record, facts)
        case "corrector", _:
            text = card_of_corrector(described)
        case "dual encoder", _:
            text = card_of_dual_encoder(described)
        case _:
            reader = RetrievalAugmentedConfig.from_pretrained(found.folder).describe_reader()
            text = card_of_retrieval_augmented(reader, described)
    return Card(text, replaces=facts != CardFacts())


def _record(found: Found, described: dict[str, Any]) -> RunRecord | None:
    """Return the record of the run that made it: beside it, or of a corrector beside its folder."""
    folders = [found.folder, *([found.folder.absolute().parent] if found.kind == "corrector" else [])]
    for folder in folders:
        if (folder / RECORD_FILE).is_file():
            record = RunRecord.load(folder)
            # Of another run's corrector nothing is known from it.
            if record.corrector == described:
                return record
    return None
