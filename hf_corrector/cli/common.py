"""What several commands share: parsers, models and data by name, and the record of a run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from huggingface_hub.utils.tqdm import disable_progress_bars
from transformers.utils import logging

from hf_corrector._extras import demo_encoder
from hf_corrector._progress import working
from hf_corrector.cache.side_store import open_side, side_details
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_cache import side_kind
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import RetrievalData, texts_hash
from hf_corrector.data.stdlib import standard_library_data
from hf_corrector.encoding import EncodeOptions
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError, InputError
from hf_corrector.models.configuration_dual_encoder import POOLINGS, DualEncoderConfig
from hf_corrector.models.hub_files import CORRECTOR_FILES, checked
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.sentence_transformers_format import read_repository_json
from hf_corrector.records import RECORD_FILE, FittedTargets
from hf_corrector.side_features import SideFeatures
from hf_corrector.training.checks import check_made_by

STDLIB = "stdlib"
DATA_HELP = "BEIR folder or Hub data set; by default 'stdlib', made from Python's own standard library"
NO_EXAMPLES_HELP = "write no texts of queries and targets into run.json"
DTYPES = ("float32", "bfloat16", "float16")


def parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Make a command's parser; ``examples`` are shown as they are."""
    return argparse.ArgumentParser(
        prog=f"hf-corrector {command}", description=description, epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add(flags: argparse.ArgumentParser, name: str, **settings: Any) -> None:
    """Add an argument under both spellings; settings are handed to argparse whole."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    flags.add_argument(*spellings, dest=name, **settings)


@dataclass
class EncoderChoice:
    """Which encoder a command uses, and what of it to change; the same arguments for every command."""

    model: str | None = field(
        default=None, metadata={"help": "folder or Hub id of the encoder; by default the demo's MiniLM"}
    )
    revision: str | None = field(default=None, metadata={"help": "Hub revision of the encoder"})
    num_layers: int | None = field(default=None, metadata={"help": "keep only the encoder's first so many layers"})
    max_length: int | None = field(default=None, metadata={"help": "cut queries and targets to so many tokens"})
    pooling: str | None = field(
        default=None, metadata={"help": "how token states become a vector", "choices": POOLINGS}
    )
    query_prompt: str | None = field(default=None, metadata={"help": "text put before every query"})
    target_prompt: str | None = field(default=None, metadata={"help": "text put before every target"})

    def load(self, device: str | None = None, *, progress: bool = False) -> DualEncoderModel:
        """Load a saved dual encoder as it is, or make one from any encoder.

        Raises:
            ConfigurationError: If settings are given for a saved dual encoder, which has its own.
        """
        with working("load the encoder", shown=progress):
            return self._load(device)

    def _load(self, device: str | None) -> DualEncoderModel:
        name = str(demo_encoder()) if self.model is None else self.model
        settings: dict[str, Any] = {
            "pooling": self.pooling, "query_prompt": self.query_prompt, "target_prompt": self.target_prompt,
            "query_max_length": self.max_length, "target_max_length": self.max_length,
        }  # fmt: skip
        given = {key: value for key, value in settings.items() if value is not None}
        if not is_dual_encoder(name, self.revision):
            plain = DualEncoderModel.from_encoder(
                name, revision=self.revision, num_hidden_layers=self.num_layers, **given
            )
            return plain if device is None else on_device(plain, device)
        if self.num_layers is not None:
            given["num_layers"] = self.num_layers
        if given:
            raise ConfigurationError(
                name, expected="no settings for a saved dual encoder, which has its own", got=str(sorted(given)),
                cure="Leave them out, or name the encoder it was made from.",
            )  # fmt: skip
        saved = DualEncoderModel.from_pretrained(name, revision=self.revision or "main")
        return saved if device is None else on_device(saved, device)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> EncoderChoice:
        """Take the choice out of parsed arguments."""
        return cls(**{item.name: getattr(arguments, item.name) for item in dataclasses.fields(EncoderChoice)})


def on_device(model: DualEncoderModel, device: str) -> DualEncoderModel:
    """Move a model and return it."""
    cast(torch.nn.Module, model).to(device)
    return model


def encode_queries(model: DualEncoderModel, queries: list[str], options: EncodeOptions) -> torch.Tensor:
    """Encode queries, ``(n, dim)`` float32."""
    return model.encode_query(queries, compute_dtype=options.compute_dtype, show_progress_bar=options.progress)


def add_device_argument(target: argparse.ArgumentParser) -> None:
    """Add the argument that says where to compute."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    target.add_argument("--device", default=best, help=f"where to compute; here {best!r} by default")


def load_corrector(
    name: str | None, cache: TargetCache, model: DualEncoderModel, *, directions: tuple[str, ...] = ("targets",)
) -> tuple[CorrectorModel | None, FittedTargets | None]:
    """Load a corrector and what was noted beside it when it was fitted.

    Raises:
        CacheMismatchError: If the note says it belongs to another cache or another encoder.
        ConfigurationError: If it works in none of the ``directions``.
    """
    if name is None:
        return None, None
    corrector, fitted = corrector_of_cache(name, cache, directions=directions)
    if corrector.config.fresh_encoder is not None:
        corrector.check_encoders(name, fresh=model.fingerprint("target"))
    if fitted is not None and fitted.encoder != model.fingerprint("target").digest:
        raise CacheMismatchError(
            name, expected=f"a corrector for queries of {model.config.name_or_path}",
            got="one fitted to another encoder", cure="Name the encoder it was trained with as --model.",
        )  # fmt: skip
    return corrector, fitted


def corrector_of_cache(
    name: str, cache: TargetCache, *, directions: tuple[str, ...] = ("targets",)
) -> tuple[CorrectorModel, FittedTargets | None]:
    """Load a corrector with its note, whose rows are those of the cache as it is now.

    A corrector stays right when rows are added and deleted, as all vectors of a cache come from one encoder; the rows
    it was fitted on are found again by their ids. Where their ids were not noted, nothing is known of them any more.
    The same holds of another cache by the encoder it was fitted to.

    Raises:
        CacheMismatchError: If it leads from vectors of another encoder, or the cache holds corrected vectors already.
        ConfigurationError: If it works in none of the ``directions``.
    """
    corrector = CorrectorModel.from_pretrained(name)
    fitted = FittedTargets.load(checked(name, CORRECTOR_FILES, {}).folder)
    direction = corrector.config.direction if fitted is None else fitted.direction
    if direction not in directions:
        raise ConfigurationError(
            name, expected="a corrector of targets", got="one that maps new queries to the old index",
            cure="Leave the cache as it is and search it with 'hf-corrector search --corrector'; or fit a corrector of "
            "targets with 'hf-corrector upgrade --direction targets'.",
        )  # fmt: skip
    if cache.fingerprint.corrected_from is not None:
        raise CacheMismatchError(
            str(cache.path), expected="vectors an encoder made", got="vectors that are corrected already",
            cure="Leave --corrector out, or name the cache they came from.",
        )  # fmt: skip
    if fitted is None or fitted.cache == cache.manifest.checksum:
        return corrector, fitted
    if fitted.cache not in cache.manifest.lineage:
        if corrector.config.stale_encoder is None:
            raise CacheMismatchError(
                name, expected="the corrector of this cache", got=f"one that was fitted to another than {cache.path}",
                cure="Name the cache it was fitted to; after a refresh that is the newest cache-NNNN of the run.",
            )  # fmt: skip
        corrector.check_encoders(name, stale=cache.fingerprint)
    if fitted.ids is None:
        return corrector, None
    rows = cache.ids.find(fitted.ids)
    kept = tuple(sorted(int(row) for row in rows if row >= 0))
    ids = tuple(cache.ids[row] for row in kept)
    return corrector, dataclasses.replace(fitted, cache=cache.manifest.checksum, rows=kept, ids=ids)


def is_dual_encoder(name: str, revision: str | None = None) -> bool:
    """Say whether a folder or Hub repository holds a saved dual encoder rather than an encoder to make one from."""
    config = read_repository_json(name, "config.json", revision)
    return config is not None and config.get("model_type") == DualEncoderConfig.model_type


def add_model_arguments(target: argparse.ArgumentParser) -> None:
    """Add the arguments of :class:`EncoderChoice`."""
    for item in dataclasses.fields(EncoderChoice):
        kind = int if item.name in ("num_layers", "max_length") else str
        target.add_argument(
            f"--{item.name}", type=kind, choices=item.metadata.get("choices"), help=item.metadata["help"]
        )


def add_data_argument(target: argparse.ArgumentParser) -> None:
    """Add the argument that says which data."""
    target.add_argument("--data", metavar="DIR", default=STDLIB, help=DATA_HELP)


def load_data(name: str, *, progress: bool = False) -> RetrievalData:
    """Load the data an argument names; what loading found odd goes to the terminal."""
    if name == STDLIB:
        print("reading Python's standard library ...", flush=True)
    with working("read the data", shown=progress):
        data = standard_library_data() if name == STDLIB else load_retrieval_data(name)
    for note in data.notes:
        print(f"note: {note}")
    return data


def judged_split(data: RetrievalData) -> Any:
    """Return the split to judge on: test if there is one, else dev.

    Raises:
        DataError: If there is neither.
    """
    split = data.test if data.test is not None else data.dev
    if split is None:
        raise DataError(
            "data", expected="judgements to evaluate on", got="neither a test nor a dev split",
            cure="Add qrels/test.tsv.",
        )  # fmt: skip
    return split


def new_output_folder(name: str) -> Path:
    """Return an output folder that holds no run yet.

    Raises:
        InputError: If it is a file or holds the record of a run, which is not overwritten.
    """
    folder = Path(name)
    if folder.is_file() or (folder / RECORD_FILE).exists():
        raise InputError(
            name, expected="a new output folder", got="a file" if folder.is_file() else f"one with {RECORD_FILE}",
            cure="Name another --output_dir, or remove that one.",
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def quieten(*, quiet: bool) -> bool:
    """Leave transformers' reports to its own users, errors still show; say whether to show progress.

    Progress is drawn on a terminal only: in a file its bars would be thousands of lines.
    """
    progress = not quiet and sys.stderr.isatty()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not progress:
        datasets.disable_progress_bars()
        disable_progress_bars()
    return progress


def load_old_model(arguments: argparse.Namespace, model: DualEncoderModel, cache: TargetCache) -> DualEncoderModel:
    """Load the encoder a cache was made with; a plain one gets the settings of the encoder that came of it.

    Raises:
        CacheMismatchError: If another encoder made the cache.
    """
    name, config = arguments.old_model, model.config
    if is_dual_encoder(name):
        old = DualEncoderModel.from_pretrained(name)
    else:
        old = DualEncoderModel.from_encoder(
            name, num_hidden_layers=config.encoder.get_text_config().num_hidden_layers, pooling=config.pooling,
            query_prompt=config.query_prompt, target_prompt=config.target_prompt, normalize=config.normalize,
            query_max_length=config.query_max_length, target_max_length=config.target_max_length,
        )  # fmt: skip
    check_made_by(cache, old)
    return on_device(old, arguments.device)


def check_same_targets(cache: TargetCache, data: RetrievalData) -> None:
    """Refuse a cache of other targets than those of the data.

    Raises:
        CacheMismatchError: If ids, texts or their order differ.
    """
    if texts_hash(data.corpus) != cache.texts_hash:
        raise CacheMismatchError(
            str(cache.path), expected="a cache of the targets in --data", got="other ids or texts",
            cure="Name the data the cache was made from.",
        )  # fmt: skip


def side_of(cache: TargetCache, corrector: CorrectorModel, fitted: FittedTargets | None) -> SideFeatures | None:
    """Open the side features that a corrector reads; None for one that reads none.

    Where either side does not know what its features were made with, only their kind and size are compared.

    Raises:
        CacheMismatchError: If the cache does not hold them, or holds others than the corrector was fitted with.
    """
    kind = side_kind(corrector)
    if kind is None:
        return None
    wanted, found = None if fitted is None else fitted.side_details, side_details(cache, kind)
    # The name of the file a matrix was read from says nothing of what is in it.
    if kind != "matrix" and wanted and found and wanted != found:
        raise CacheMismatchError(
            str(cache.path), expected=f"side features {kind!r} made with {wanted}, as the corrector was fitted with",
            got=f"those made with {found}",
            cure="Store those the corrector was fitted with by save_side(), or fit it again with those of the cache.",
        )  # fmt: skip
    return open_side(cache, kind)
