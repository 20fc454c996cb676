"""Model cards say what the record says, name what is missing, and print code that runs."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hub_stand_in import Hub
from huggingface_hub import ModelCard
from upgrade_helpers import cache_of, make_data, new_encoder, old_encoder

from hf_corrector import CardFacts, FittedCorrector, PushOptions, RunRecord, UpgradeOptions, UpgradeReport, upgrade
from hf_corrector.cache import TargetCache
from hf_corrector.cards import MISSING, card_of_corrector, card_of_dual_encoder, card_of_run
from hf_corrector.cli.main import main
from hf_corrector.encoding import EncodeOptions
from hf_corrector.errors import InputError
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.records import shareable

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FACTS = CardFacts("apache-2.0", ("someone/words",), ("en",))


@pytest.fixture(scope="module")
def workplace(report: UpgradeReport, old_cache: TargetCache) -> Path:
    """A folder with old_cache and, saved as an upgrade saves it, ``upgraded``."""
    return report.save(old_cache.path.parent / "upgraded").parent


@pytest.fixture(scope="module")
def old_cache(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> TargetCache:
    return cache_of(old_encoder(tiny_encoder), make_data(), tmp_path_factory.mktemp("workplace") / "old_cache")


@pytest.fixture(scope="module")
def report(tiny_encoder: str, old_cache: TargetCache) -> UpgradeReport:
    quiet = EncodeOptions(progress=False)
    options = UpgradeOptions(
        kinds=("affine",), slice_by=("site",), encoding=quiet, judging=JudgeOptions(resamples=200, progress=False),
        data_name="/home/me/words",
    )  # fmt: skip
    return upgrade(
        old_cache, new_encoder(tiny_encoder), make_data(), num_pairs=100, old_model=old_encoder(tiny_encoder),
        side=None, options=options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def record(workplace: Path) -> RunRecord:
    return RunRecord.load(workplace / "upgraded")


@pytest.fixture(scope="module")
def card(record: RunRecord) -> str:
    return card_of_run(record, FACTS)


def metadata(card: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


def python_blocks(card: str) -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_a_card_is_a_function_of_its_record(record: RunRecord, workplace: Path, tmp_path: Path) -> None:
    record.save(tmp_path)
    assert card_of_run(RunRecord.load(tmp_path), FACTS) == card_of_run(record, FACTS)
    saved = (workplace / "upgraded" / "corrector" / "README.md").read_text()
    assert saved == card_of_run(record)


def test_the_metadata_is_what_the_hub_reads(card: str, record: RunRecord) -> None:
    found = metadata(card)
    assert found["library_name"] == "hf_corrector" and found["pipeline_tag"] == "feature-extraction"
    assert {"target-corrector", "embedding-adapter", "feature-extraction"} <= set(found["tags"])
    assert (found["license"], found["datasets"], found["language"]) == ("apache-2.0", ["someone/words"], ["en"])
    (result,) = found["model-index"][0]["results"]
    assert result["dataset"] == {"name": "words", "type": "words", "split": "test"}
    by_type = {one["type"]: one for one in result["metrics"]}
    interval = record.evaluation["intervals"]["corrected"]["mrr@10"]
    assert by_type["mrr@10"]["value"] == interval["estimate"]
    assert by_type["mrr@10"]["args"] == {"low": interval["low"], "high": interval["high"], "interval": "95 %"}
    assert ModelCard(card).data.eval_results is not None
    assert "base_model" not in found, "encoders in folders are none of the Hub's"


def test_encoders_of_the_hub_are_the_base_models(record: RunRecord) -> None:
    encoders = {
        "stale_encoder": {**record.corrector["stale_encoder"], "name": "a/old", "revision": COMMIT},
        "fresh_encoder": {**record.corrector["fresh_encoder"], "name": "b/new", "revision": COMMIT},
    }
    known = card_of_run(replace(record, corrector={**record.corrector, **encoders}))
    assert metadata(known)["base_model"] == ["a/old", "b/new"]
    assert metadata(known)["base_model_relation"] == "adapter"
    assert "# Corrector from a/old to b/new" in known and f"`{COMMIT}`" in known
    named = card_of_run(record, CardFacts(stale_name="a/old", fresh_name="my-own"))
    assert metadata(named)["base_model"] == ["a/old"] and "# Corrector from a/old to my-own" in named


def test_every_fact_of_the_record_is_in_the_text(card: str, record: RunRecord) -> None:
    assert f"> {record.verdict['sentence']}" in card
    for row in record.rows:
        mean = row["metrics"]["mrr@10"]
        written = f"{mean['estimate']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
        assert any(row["label"] in line and written in line for line in card.splitlines())
    for check in record.verdict["checks"]:
        assert check["rule"] in card and check["found"].replace("|", "\\|") in card
    worst = record.verdict["worst_slice"]["slice"]
    assert f"`{worst}` fares worst" in card
    assert all(one["slice"] in card for one in record.verdict["slices"])
    assert "100" in card and record.manifests[0]["texts_hash"] in card and record.machine in card
    assert record.corrector["stale_encoder"]["weights"][:12] in card
    assert record.corrector["fresh_encoder"]["weights"][:12] in card
    assert "Licence of these weights: apache-2.0" in card and "US 2025/0363376" in card


def test_no_path_of_this_machine_is_in_it(card: str, workplace: Path, tiny_encoder: str) -> None:
    assert str(workplace) not in card and str(Path(tiny_encoder).parent) not in card and "/home/me" not in card


def test_what_is_missing_is_printed_as_missing(record: RunRecord) -> None:
    bare = card_of_run(RunRecord("upgrade", 0, {}, corrector=record.corrector, machine=""))
    for section in ("Results", "Cost", "Data", "How it was made"):
        text = bare.split(f"## {section}\n")[1].split("\n## ")[0]
        assert MISSING in text, section
    assert f"Licence of these weights: {MISSING}" in bare and "model-index" not in bare
    nothing = card_of_run(RunRecord("upgrade", 0, {}))
    assert "an unnamed encoder" in nothing and nothing.count(MISSING) > 10


def test_the_card_of_a_trained_encoder_names_what_it_was_trained_from(record: RunRecord) -> None:
    """Of a run without a corrector the cache says it; its quality is that of targets it encodes itself."""
    made_by = {**record.manifests[0]["fingerprint"], "name": "a/old", "revision": COMMIT}
    manifests = [{**record.manifests[0], "fingerprint": made_by}]
    card = card_of_run(replace(record, command="train", corrector={}, manifests=manifests, rows=[]), of_encoder=True)
    assert "# Dual encoder trained from a/old" in card and "DualEncoderModel.from_pretrained" in card
    assert (metadata(card)["base_model"], metadata(card)["base_model_relation"]) == (["a/old"], "finetune")
    (result,) = metadata(card)["model-index"][0]["results"]
    values = {one["name"]: one["value"] for one in result["metrics"]}
    assert values["MRR@10, full re-embed"] == record.evaluation["intervals"]["fresh"]["mrr@10"]["estimate"]
    assert "| stale index |" in card and "| recovery, corrected |" in card and 'subfolder="corrector"' not in card


def test_cards_without_a_record_say_so(record: RunRecord) -> None:
    for card in (card_of_corrector(record.corrector), card_of_dual_encoder(record.corrector), card_of_dual_encoder({})):
        assert "No record of a run came with these weights" in card and "## Results" not in card
        assert metadata(card)["library_name"] == "hf_corrector"


def test_bars_and_line_ends_do_not_break_a_table(record: RunRecord) -> None:
    rows = [{**record.rows[0], "label": "a | b\nc"}]
    assert "| a \\| b c |" in card_of_run(replace(record, rows=rows))


def test_the_snippets_run_as_printed(
    workplace: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the Hub, in a folder with an old_cache, by the card that was pushed."""
    shutil.copytree(workplace / "old_cache", tmp_path / "old_cache")
    monkeypatch.chdir(tmp_path)
    command = ["push", str(workplace / "upgraded"), "someone/old-to-new", "--quiet", "--license", "mit"]
    assert main(command) == 0
    pushed = hub.model("someone/old-to-new").files()
    assert set(pushed) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "fitted_targets.json", "upgrade.json",
    }  # fmt: skip
    card = pushed["README.md"].decode()
    assert metadata(card)["license"] == "mit" and "PATH_OR_HUB_ID" not in card
    blocks = list(python_blocks(card))
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["corrected"].shape == (4, 32)  # type: ignore[attr-defined]
    assert (tmp_path / "new_cache" / "manifest.json").is_file()


def test_a_report_pushes_itself(report: UpgradeReport, hub: Hub) -> None:
    report.push_to_hub("someone/report", facts=FACTS, options=PushOptions(progress=False))
    card = hub.model("someone/report").files()["README.md"].decode()
    assert card == card_of_run(report.record, FACTS).replace("PATH_OR_HUB_ID", "someone/report")
    loaded, fitted = FittedCorrector.load("someone/report").fitted, report.corrector.fitted
    assert fitted.encoder_fingerprint is not None
    assert loaded == replace(fitted, encoder_fingerprint=shareable(fitted.encoder_fingerprint))


@pytest.mark.parametrize("settings", [{}, {"direction": "queries"}, {"side": "matrix", "side_dim": 3}], ids=str)
def test_the_snippets_of_a_corrector_without_a_record_run_too(settings: dict[str, object], hub: Hub) -> None:
    model = CorrectorModel(CorrectorConfig(kind="affine", input_dim=4, output_dim=3, **settings))
    model.push_to_hub("someone/bare", options=PushOptions(progress=False))
    (block,) = python_blocks(hub.model("someone/bare").files()["README.md"].decode())
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["corrector"], CorrectorModel)


def test_one_script_writes_the_cards_of_runs(workplace: Path, record: RunRecord, tmp_path: Path) -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "make_model_cards.py"))
    facts = {"license": "mit", "stale_name": "a/old", "repo_id": "me/h"}
    (tmp_path / "facts.json").write_text(json.dumps({"upgraded": facts}))
    command = [str(workplace / "upgraded"), "--output_dir", str(tmp_path / "cards")]
    assert script["main"]([*command, "--facts", str(tmp_path / "facts.json")]) == 0
    expected = card_of_run(record, CardFacts(license="mit", stale_name="a/old")).replace("PATH_OR_HUB_ID", "me/h")
    assert (tmp_path / "cards" / "upgraded.md").read_text() == expected
    (tmp_path / "facts.json").write_text(json.dumps({"upgraded": {"licence": "mit"}}))
    with pytest.raises(InputError, match="licence"):
        script["main"]([*command, "--facts", str(tmp_path / "facts.json")])


def test_a_card_that_someone_wrote_stays(workplace: Path, hub: Hub, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(workplace / "upgraded" / "corrector", tmp_path / "mine"))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nLoad me from PATH_OR_HUB_ID.\n")
    assert main(["push", str(folder), "someone/mine", "--quiet"]) == 0
    card = hub.model("someone/mine").files()["README.md"].decode()
    assert card == "---\nlicense: mit\n---\n\nLoad me from someone/mine.\n"
    (folder / "README.md").unlink()
    assert main(["push", str(folder), "someone/mine", "--quiet"]) == 0
    assert hub.model("someone/mine").files()["README.md"].decode() == card
