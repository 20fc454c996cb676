"""The order in which modules may import each other, read as data and held to by walking every import."""

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_corrector

PACKAGE = Path(hf_corrector.__file__).parent
ROOT = PACKAGE.parent

# A module imports only units before its own, or modules of its own folder. Units of one line are islands, or parts of
# one level: the modules of an island never import another island, all other units of a line may import those before.
ORDER = """
ground      version errors _files _distributed _extras _hub _untrusted _progress records numpy_corrector
pure        batching metrics answers sampling losses learning_curves side_features fitting pair_choice drift_detection
text        cards
islands     models cache index data
bridges     shared_writing encoding corrected_targets overlaid_targets corrected_cache corrected_arrays exports
retrieval   affine_view search_strategies corrected_retriever
drawing     scans candidate_sampling
judgement   evaluation
training    training planning adaptation
upgrade     index_upgrade
reading     rag
side        report
leaves      cli integrations
"""
LEVELS = {line.split()[0]: line.split()[1:] for line in ORDER.strip().splitlines()}
UNITS = [unit for units in LEVELS.values() for unit in units]
ISLANDS, LEAVES = LEVELS["islands"], LEVELS["leaves"]


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit_of(path: Path) -> str:
    """Return the folder or the module directly below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_names(path: Path, root: Path = ROOT) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import of a file, wherever it stands, as if written absolutely."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, one.name) for one in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            start = ".".join(part for part in (base, node.module or "") if part)
            # "from hf_corrector import cli" imports the module hf_corrector.cli.
            yield from ((node.lineno, f"{start}.{one.name}") for one in node.names)


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name, without the package's own, of every import of this package."""
    for line, name in imported_names(path):
        if name == "hf_corrector" or name.startswith("hf_corrector."):
            yield line, name.removeprefix("hf_corrector").removeprefix(".")


def allowed_units(unit: str) -> set[str]:
    """Return the units a module of this unit may import."""
    before = set(UNITS[: UNITS.index(unit)])
    return {unit, *(before - set(ISLANDS) if unit in ISLANDS else before)}


def test_every_module_has_its_place_in_the_order() -> None:
    assert {unit_of(path) for path in modules()} <= set(UNITS)
    assert len(set(UNITS)) == len(UNITS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_what_stands_before_it(path: Path) -> None:
    allowed = allowed_units(unit_of(path))
    wrong = [f"line {line}: {name}" for line, name in own_imports(path) if name.split(".")[0] not in allowed]
    assert wrong == []


def test_reports_know_records_alone() -> None:
    allowed = {"errors", "version", "_files", "_extras", "records", "metrics", "report"}
    found = {name.split(".")[0] for path in modules() if unit_of(path) == "report" for _, name in own_imports(path)}
    assert found <= allowed
    readers = {unit_of(path) for path in modules() for _, name in own_imports(path) if name.split(".")[0] == "report"}
    assert readers == {"report", "cli"}


def test_nobody_imports_the_leaves_or_the_package_itself() -> None:
    wrong = []
    for path in [*modules(), PACKAGE / "__init__.py"]:
        for line, name in own_imports(path):
            unit = name.split(".")[0]
            if unit not in UNITS or (unit in LEAVES and unit_of(path) != unit):
                wrong.append(f"{path.relative_to(ROOT)}, line {line}: {name or 'the package'}")
    assert wrong == []


def test_corrector_model_is_its_map_and_nothing_else() -> None:
    """Of this package it needs its configuration, and the base class that reads and writes folders."""
    found = {name for _, name in own_imports(PACKAGE / "models" / "modeling_corrector.py")}
    assert found == {"models.configuration_corrector.CorrectorConfig", "models.stored_corrector.StoredCorrector"}
    assert list(own_imports(PACKAGE / "models" / "configuration_corrector.py")) == []


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """Keep the walk above honest: in functions, under TYPE_CHECKING, relative, of the root."""
    source = (
        "import hf_corrector\nfrom hf_corrector import cli\nif TYPE_CHECKING:\n    import hf_corrector.data.tokens\n"
        "def f():\n    from ..models import towers\n    from . import exact\n    from .exact import ExactIndex as E\n"
    )
    copy = tmp_path / "hf_corrector" / "index" / "base.py"
    copy.parent.mkdir(parents=True)
    copy.write_text(source)
    names = [name for _, name in imported_names(copy, tmp_path)]
    assert names == [
        "hf_corrector", "hf_corrector.cli", "hf_corrector.data.tokens", "hf_corrector.models.towers",
        "hf_corrector.index.exact", "hf_corrector.index.exact.ExactIndex",
    ]  # fmt: skip


@pytest.mark.slow
def test_wheel_holds_every_module_the_template_of_cards_and_the_type_marker(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    shutil.copytree(PACKAGE, copy / "hf_corrector", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist")]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("hf_corrector/")}
    ours = {path.relative_to(copy).as_posix() for path in (copy / "hf_corrector").rglob("*") if path.is_file()}
    assert {"hf_corrector/py.typed", "hf_corrector/cards/card.md.jinja"} <= packed
    assert packed == ours
