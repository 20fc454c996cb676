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
    words = "--items 800 --users 900 --sample 300 --steps 400 --more_steps 300"
    report, judgement = load("recommendation").main(words.split())
    said = capsys.readouterr().out
    assert report.verdict in said and "corrected − stale" in said
    assert list(judgement.per_query) == ["old", "stale", "corrected", "fresh"]
    assert judgement.queries == 450 > judgement.clean_queries > 100
    assert report.stale_cosine is not None and report.cosine.low > report.stale_cosine.high
    means = {name: found["recall@20"].estimate for name, found in judgement.means.items()}
    assert means["stale"] < means["corrected"]
