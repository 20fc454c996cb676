"""``hf-corrector plan`` from end to end on a tiny encoder."""

import json
from pathlib import Path

import pytest
import torch
from model_helpers import TEXTS

from hf_corrector.cli.main import main
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.records import RunRecord

TARGETS = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beir")
    words = sorted({word for text in TEXTS for word in text.split()})
    targets = [
        {"_id": f"t{n}", "title": "", "text": f"{words[n % len(words)]} {words[7 * n % len(words)]} {n}"}
        for n in range(TARGETS)
    ]
    queries = [{"_id": f"q{n}", "text": f"how to {words[n % len(words)]} {n}"} for n in range(TARGETS)]
    for name, rows in (("corpus", targets), ("queries", queries)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "qrels").mkdir()
    for split, rows in (("train", range(40)), ("test", range(40, TARGETS))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\tt{n}\t1" for n in rows)]
        (root / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def upgraded(folder: Path, tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A cache, and an encoder that has moved on from the one that made it."""
    root = tmp_path_factory.mktemp("upgrade")
    embed = ["embed", "--data", str(folder), "--model", tiny_encoder, "--output_dir", str(root / "cache"), "--quiet"]
    assert main(embed) == 0
    model = DualEncoderModel.from_encoder(tiny_encoder)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(root / "new")
    return str(root / "cache"), str(root / "new")


def planned(upgraded: tuple[str, str], folder: Path, out: Path, *more: str) -> list[str]:
    return ["plan", "--cache", upgraded[0], "--model", upgraded[1], "--data", str(folder), "--probe", "60",
            "--output_dir", str(out), *more]  # fmt: skip


def test_plan_answers_and_spends_the_probe_alone(
    upgraded: tuple[str, str], folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = [
        {"step": n, "cosine_stale_fresh": 1 - 0.001 * n, "cosine_corrected_fresh": 0.99} for n in (10, 20, 30, 40)
    ]
    run = RunRecord(command="train", seed=0, arguments={}, history=history).save(tmp_path / "run").parent
    out, traffic = tmp_path / "planned", tmp_path / "traffic.tsv"
    traffic.write_text("t7\t1000000\nt8\t3\n")
    more = ["--old_model", tiny_encoder, "--seconds_per_pass", "0.5", "--price_per_hour", "2", "--records", str(run),
            "--min_cosine", "0.2", "--worst_first", "--traffic", str(traffic)]  # fmt: skip
    assert main(planned(upgraded, folder, out, *more)) == 0
    shown = capsys.readouterr().out
    assert "expected recovery" in shown and "affine + tokens" in shown and "keeps a mean cosine of 0.2" in shown
    record = json.loads((out / "run.json").read_text())
    assert record["cost"]["probe_target_passes"] == 60 and record["cost"]["query_passes"] == 160
    assert sum(record["cost"].values()) == 220
    plan = record["evaluation"]["plan"]
    assert plan["verdict"] in ("correct", "re-embed", "keep the old model")
    assert record["evaluation"]["sentence"] in shown
    assert set(plan["quality"]) == {"old", "stale", "corrected", "fresh"}
    order = [json.loads(line)["id"] for line in (out / "worst_first.jsonl").read_text().splitlines()]
    assert len(order) == len(set(order)) == TARGETS - 60
    first = [one for one in ("t7", "t8") if one in order]
    assert order[: len(first)] == first


def test_plan_without_side_features_or_judgements_of_the_old_model(
    upgraded: tuple[str, str], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "planned"
    more = ["--side", "none", "--families", "affine", "mean_shift", "--max_pairs", "60"]
    assert main(planned(upgraded, folder, out, *more)) == 0
    plan = json.loads((out / "run.json").read_text())["evaluation"]["plan"]
    assert [one["name"] for one in plan["families"]] == ["affine", "mean_shift"]
    assert plan["pairs"] == 60 and "old" not in plan["quality"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--probe", "10"], "at least 40 targets"),
        (["--min_recovery", "1.5"], "between 0 and 1"),
        (["--traffic", "{tmp}/bad.tsv"], "line 1"),
        (["--records", "{tmp}/none"], "none"),
    ],
)
def test_mistakes_are_explained(
    more: list[str], words: str, upgraded: tuple[str, str], folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "bad.tsv").write_text("t7 often\n")
    filled = [one.format(tmp=tmp_path) for one in more]
    assert main(planned(upgraded, folder, tmp_path / "out", *filled)) == 1
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown
    assert not (tmp_path / "out" / "run.json").exists()


def test_planning_with_the_encoder_of_the_cache_finds_nothing_to_do(
    upgraded: tuple[str, str], folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = planned((upgraded[0], tiny_encoder), folder, tmp_path / "out")
    assert main(arguments) == 1
    assert "Nothing has drifted" in capsys.readouterr().err
