"""What the benchmarks share: where the data is, and a head that says what was run on what."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from pathlib import Path

import torch

from hf_corrector.records import collect_versions, describe_machine


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
    print(f"machine: {describe_machine()}, {torch.get_num_threads()} threads\n", flush=True)
