"""A folder that corrects vectors where there is neither torch nor this package."""

from __future__ import annotations

import shutil
from pathlib import Path

from hf_corrector import numpy_corrector
from hf_corrector.models.modeling_corrector import CorrectorModel

WORKER_FILE = "numpy_corrector.py"


def save_for_numpy(corrector: CorrectorModel, folder: str | Path) -> Path:
    """Write a corrector and beside it the one file that computes it with numpy and safetensors.

    The folder remains one of a corrector: ``CorrectorModel.from_pretrained`` reads it too. Every kind and all side
    features go along.

    Args:
        corrector: The corrector.
        folder: Created if need be.

    Returns:
        The folder.
    """
    path = Path(folder)
    corrector.save_pretrained(str(path))
    shutil.copyfile(Path(numpy_corrector.__file__), path / WORKER_FILE)
    return path
