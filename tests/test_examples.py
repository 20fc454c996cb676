"""Examples run as they are, with smaller settings."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recommendation(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--items", "500", "--users", "500", "--sample", "200", "--steps", "150", "--more_steps", "80"]
    report, judgement = load("recommendation").main(words)
    said = capsys.readouterr().out
    assert report.verdict in said and "corrected − stale" in said
    assert list(judgement.per_query) == ["old", "stale", "corrected", "fresh"]
    assert judgement.queries == 250 > judgement.clean_queries > 50
    means = {name: found["recall@20"].estimate for name, found in judgement.means.items()}
    assert means["stale"] < means["corrected"]
