"""What the benchmarks share: where the data is, and a head that says what was run on what."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

import torch

from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.models import DualEncoderModel
from hf_corrector.records import collect_versions, describe_machine
from hf_corrector.scans import fast_in_bfloat16
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer


def data_folder(given: str | None, name: str) -> Path:
    """Return the BEIR folder ``name`` under the folder given or named by HF_CORRECTOR_DATA, or leave with a reason."""
    root = given or os.environ.get("HF_CORRECTOR_DATA")
    if root is None or not (Path(root) / name / "corpus.jsonl").is_file():
        sys.exit(f"skipped: needs the BEIR folder {name!r}; give its parent with --data or HF_CORRECTOR_DATA")
    return Path(root) / name


def print_head(title: str, arguments: Namespace) -> None:
    """Print what is needed to run it again."""
    versions = ", ".join(f"{name} {version}" for name, version in collect_versions().items())
    hidden = {"data", "output_dir", "model"}
    shown = " ".join(f"{key}={value}" for key, value in sorted(vars(arguments).items()) if key not in hidden)
    print(f"# {title}\narguments: {shown}\nversions: {versions}")
    print(
        f"machine: {describe_machine()}, {torch.get_num_threads()} threads, bfloat16 in hardware: {half_is_fast()}\n",
        flush=True,
    )


def half_is_fast() -> bool:
    """Say whether encoders should run in bfloat16 autocast here: processors without it emulate it, very slowly."""
    return fast_in_bfloat16("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype() -> str:
    """Return the arithmetic in which caches are to be encoded here."""
    return "bfloat16" if half_is_fast() else "float32"


def fine_tune(
    model: DualEncoderModel,
    data: RetrievalData,
    folder: Path,
    *,
    steps: int,
    seed: int,
    learning_rate: float = 5e-5,
) -> None:
    """Train an encoder in place with in-batch negatives, 32 pairs a step, in bfloat16 autocast where that is fast."""
    args = DualEncoderTrainingArguments(
        str(folder), max_steps=steps, learning_rate=learning_rate, seed=seed, bf16=half_is_fast(), negatives="in_batch",
        staleness="ignore", logging_steps=50, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus).train()
    model.eval()
