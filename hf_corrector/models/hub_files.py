"""Which files a model consists of, on the Hub and in a folder: nothing else is sent, downloaded for it or opened."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from transformers import PreTrainedConfig

from hf_corrector._files import read_json
from hf_corrector._hub import PushOptions, Upload, fetch, push
from hf_corrector._untrusted import check_files, inside
from hf_corrector.errors import ConfigurationError, InputError
from hf_corrector.models.foreign_configs import check_config
from hf_corrector.records import FITTED_FILE, shareable

CARD_FILE = "README.md"
# Stands in a card for where the model can be loaded from, until it is pushed there.
PLACEHOLDER = "PATH_OR_HUB_ID"
CORRECTOR_FOLDER = "corrector"
QUERY_TOKENIZER_FOLDER = "query_tokenizer"
TARGET_TOKENIZER_FOLDER = "target_tokenizer"
READER_TOKENIZER_FOLDER = "reader_tokenizer"
GENERATION_FILE = "generation_config.json"
UPGRADE_FILE = "upgrade.json"
BASE_FILE = "base_model.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
# How a from_pretrained of transformers is told to open nothing else, to run no code, and to say what was missing.
SAFELY = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
_WHERE = ("revision", "cache_dir", "token", "local_files_only")
_CONFIG = ("config.json", GENERATION_FILE)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
_ADAPTER = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, BASE_FILE)
# Where a configuration says what it was loaded from; the second is that of an adapter.
_NAMES = ("_name_or_path", "base_model_name_or_path")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip
CORRECTOR_FILES = ("config.json", "model.safetensors", FITTED_FILE, UPGRADE_FILE)
DUAL_ENCODER_FILES = (
    *_CONFIG, *_WEIGHTS, *_ADAPTER, *_TOKENIZER,
    *(f"{TARGET_TOKENIZER_FOLDER}/{name}" for name in _TOKENIZER),
    *(f"{CORRECTOR_FOLDER}/{name}" for name in CORRECTOR_FILES),
)  # fmt: skip
RETRIEVAL_AUGMENTED_FILES = (
    *_CONFIG, *_WEIGHTS,
    *(f"{folder}/{name}" for folder in (QUERY_TOKENIZER_FOLDER, TARGET_TOKENIZER_FOLDER, READER_TOKENIZER_FOLDER)
      for name in _TOKENIZER),
    *(f"{CORRECTOR_FOLDER}/{name}" for name in CORRECTOR_FILES),
)  # fmt: skip


@dataclass(frozen=True)
class CheckedModel:
    """A model whose files were looked at.

    Attributes:
        folder: Where they lie on this machine.
        loading: By which arguments transformers loads each of its parts from where it came: those that were given, and
            for a repository the commit that was looked at.
        subfolder: Folder of the model inside of both; empty for the root.
    """

    folder: Path
    loading: dict[str, Any]
    subfolder: str = ""

    @property
    def place(self) -> Path:
        """Where the model lies on this machine."""
        return self.folder / self.subfolder

    def part(self, name: str) -> str:
        """Return the subfolder of a part of the model."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def check_config(self, config_class: type[PreTrainedConfig]) -> None:
        """Refuse a configuration that leads to code or pickles (InputError)."""
        check_config(config_class.from_pretrained(self.place), str(self.place / "config.json"))

    def refuse_adapter(self) -> None:
        """Refuse an adapter beside a whole model, which transformers would put on it (InputError)."""
        path = self.place / ADAPTER_CONFIG_FILE
        if path.exists():
            raise InputError(
                str(path), expected="a whole model alone", got="an adapter beside it", cure="Take the adapter away."
            )


def checked(name: str, patterns: tuple[str, ...], loading: Mapping[str, Any], *, subfolder: str = "") -> CheckedModel:
    """Look at the files of a folder or repository before they are opened, and for an adapter transformers would open.

    Args:
        name: Folder or Hub id.
        patterns: Which files it may consist of.
        loading: Arguments of a ``from_pretrained``, of which ``revision``, ``token``, ``cache_dir`` and
            ``local_files_only`` say where a repository's files come from.
        subfolder: Folder inside of it.

    Raises:
        InputError: If a file cannot be trusted; names it.
        HubError: If there is no such folder, and the Hub has no such repository or cannot be reached.
    """
    subfolder = subfolder.strip("/")
    where = {key: loading[key] for key in _WHERE if loading.get(key) is not None}
    wanted = [f"{subfolder}/{one}" if subfolder else one for one in dict.fromkeys((*patterns, ADAPTER_CONFIG_FILE))]
    if Path(name).is_dir():
        folder = Path(name)
    else:
        folder = fetch(name, wanted, **where)
        where["revision"] = folder.name
    check_files(folder, wanted)
    return CheckedModel(folder, where, subfolder)


@dataclass(frozen=True)
class Card:
    """A model card to push.

    Attributes:
        text: The card.
        replaces: Whether it takes the place of one in the folder or the repository.
    """

    text: str
    replaces: bool = False


def push_folder(
    folder: Path, repo_id: str, patterns: tuple[str, ...], *, options: PushOptions | None = None,
    card: Card | None = None,
) -> str:  # fmt: skip
    """Push the files of a model that lies in a folder, and its card.

    Args:
        folder: Holds the model.
        repo_id: The repository.
        patterns: Which files belong to it.
        options: How to push.
        card: A card; by default the folder's own.

    Returns:
        Address of the commit.

    Raises:
        ConfigurationError: If it is an adapter of a model that lies on this machine alone.
        InputError: If a file of it cannot be trusted, or is a link out of the folder.
        HubError: If the Hub cannot be reached or refuses.
    """
    files: dict[str, Path | bytes] = {name: folder / name for name in check_files(folder, patterns)}
    for name in files:
        if PurePath(name).name in (FITTED_FILE, UPGRADE_FILE):
            files[name] = _shareable_note(read_json(folder / name))
        elif PurePath(name).name == "config.json":
            files[name] = _as_json(_without_paths(read_json(folder / name)))
        elif name == BASE_FILE:
            _check_base(folder / name)
    own = inside(folder, (CARD_FILE,))
    if own and (card is None or not card.replaces):
        card = Card((folder / CARD_FILE).read_text(encoding="utf-8"), replaces=True)
    if card is not None:
        files[CARD_FILE] = card.text.replace(PLACEHOLDER, repo_id).encode()
    kept = (CARD_FILE,) if card is not None and not card.replaces else ()
    return push(Upload(files, "Upload model", owned=patterns, kept=kept), repo_id, options=options)


def _shareable_note(note: Any) -> bytes:
    """Return a note beside a corrector without the paths of this machine, which nothing is compared by."""
    if isinstance(note, dict):
        named = {key: note[key] for key in ("encoder_fingerprint", "leads_to") if isinstance(note.get(key), dict)}
        note = {**note, **{key: shareable(value) for key, value in named.items()}}
    return _as_json(note)


def _without_paths(config: Any) -> Any:
    """Return a configuration whose parts do not say where on this machine they were loaded from."""
    if not isinstance(config, dict):
        return config
    named = {key: config[key] for key in _NAMES if isinstance(config.get(key), str) and Path(config[key]).is_dir()}
    local = {key: PurePath(name).name for key, name in named.items()}
    return {**{key: _without_paths(value) for key, value in config.items()}, **local}


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _check_base(path: Path) -> None:
    """Refuse an adapter whose base nobody else has: what came from the Hub is noted with its commit."""
    note = read_json(path)
    origin = note.get("origin") if isinstance(note, dict) else None
    sources = origin.get("sources", []) if isinstance(origin, dict) else []
    for source in sources:
        if isinstance(source, dict) and source.get("revision") is None:
            raise ConfigurationError(
                str(path), expected="an adapter of a model of the Hub", got=f"one of {source.get('name')!r}",
                cure="Push the model under it first and train the adapter on that; or merge them and push the whole.",
            )  # fmt: skip


def push_saved(
    save: Callable[[str], None], repo_id: str, patterns: tuple[str, ...], *, options: PushOptions, card: Card
) -> str:
    """Push a model from memory; see :func:`push_folder`."""
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        return push_folder(Path(folder), repo_id, patterns, options=options, card=card)
