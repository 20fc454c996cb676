"""What several commands share: parsers, models and data by name, and the record of a run."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_corrector._extras import demo_encoder
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.data.stdlib import standard_library_data
from hf_corrector.errors import DataError, InputError
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.records import RECORD_FILE

STDLIB = "stdlib"
DATA_HELP = "BEIR folder or Hub data set; by default 'stdlib', made from Python's own standard library"
DTYPES = ("float32", "bfloat16", "float16")


def parser(command: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Make a command's parser; ``examples`` are shown as they are."""
    return argparse.ArgumentParser(
        prog=f"hf-corrector {command}", description=description, epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def add_model_arguments(target: argparse.ArgumentParser) -> None:
    """Add the arguments that say which encoder."""
    target.add_argument("--model", metavar="M", help="folder or Hub id of the encoder; by default the demo's MiniLM")
    target.add_argument("--revision", help="Hub revision of the encoder")
    target.add_argument("--num_layers", type=int, metavar="N", help="keep only the encoder's first N layers")
    target.add_argument("--max_length", type=int, metavar="N", help="cut queries and targets to N tokens")


def add_data_argument(target: argparse.ArgumentParser) -> None:
    """Add the argument that says which data."""
    target.add_argument("--data", metavar="DIR", default=STDLIB, help=DATA_HELP)


def load_model(arguments: argparse.Namespace) -> DualEncoderModel:
    """Load the encoder an argument names: a saved dual encoder, or any encoder to make one from."""
    name = str(demo_encoder()) if arguments.model is None else arguments.model
    config_file = Path(name) / "config.json"
    if config_file.is_file() and DualEncoderConfig.model_type in config_file.read_text(encoding="utf-8"):
        return DualEncoderModel.from_pretrained(name)
    settings = {}
    if arguments.max_length is not None:
        settings = {"query_max_length": arguments.max_length, "target_max_length": arguments.max_length}
    return DualEncoderModel.from_encoder(
        name, revision=arguments.revision, num_hidden_layers=arguments.num_layers, **settings
    )


def load_data(name: str) -> RetrievalData:
    """Load the data an argument names; what loading found odd goes to the terminal."""
    if name == STDLIB:
        print("reading Python's standard library ...", flush=True)
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


def plain_arguments(values: Any) -> dict[str, Any]:
    """Return arguments as JSON values, for a run's record."""
    given = dataclasses.asdict(values) if dataclasses.is_dataclass(values) else vars(values)  # type: ignore[arg-type]
    return {name: value if _is_plain(value) else str(value) for name, value in sorted(given.items())}


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return value is None or isinstance(value, bool | int | str)


def quieten() -> None:
    """Leave transformers' reports to its own users; errors still show."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
