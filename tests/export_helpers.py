"""Correctors with random weights of every kind, and processes in which a package cannot be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from hf_corrector.models import CorrectorConfig, CorrectorModel

ROWS = 10_000
# Runs before the script and makes the packages named on the command line look as if they were not installed.
_BLOCKER = """
import sys
hidden = set({hidden!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
for name in hidden:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{{name}} can be imported")
"""


def random_corrector(kind: str, dim_in: int = 24, dim_out: int | None = None, **settings: Any) -> CorrectorModel:
    """Make a corrector all of whose weights move something."""
    generator = torch.Generator().manual_seed(7)
    sizes = {"input_dim": dim_in, "output_dim": dim_out, "hidden_dim": 40, "num_landmarks": 30, "landmark_rows": 30}
    model = CorrectorModel(CorrectorConfig(kind=kind, **{**sizes, **settings}))
    for name, value in model.state_dict().items():
        if value.is_floating_point() and name != "landmark_width":
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    return model


def random_vectors(rows: int = ROWS, dim: int = 24) -> torch.Tensor:
    vectors = torch.randn(rows, dim, generator=torch.Generator().manual_seed(3))
    return torch.nn.functional.normalize(vectors, dim=1)


def run_where_not_installed(script: str, *, cwd: Path) -> str:
    """Run a script in a process for which this package is not installed; return what it prints.

    The interpreter reads no ``.pth`` file (``-S``: no finder of an editable install runs) and neither folder nor
    environment of whoever starts it (``-I``); all other packages are where they are. The script fails where this
    package can be imported all the same, as after an install by copy.
    """
    head = f"import sys; sys.path += {[path for path in sys.path if path.endswith('site-packages')]!r}\n"
    absent = "import importlib.util; assert importlib.util.find_spec('hf_corrector') is None\n"
    return _printed([sys.executable, "-I", "-S", "-c", head + absent + script], cwd)


def run_without(packages: list[str], script: str, *, cwd: Path) -> str:
    """Run a script in a process of its own where some packages cannot be imported; return what it prints."""
    return _printed([sys.executable, "-c", _BLOCKER.format(hidden=packages) + script], cwd)


def _printed(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
