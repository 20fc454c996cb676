from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_corrector.cli.main import COMMANDS, main

WORDS = ["copy", "move", "list", "count", "sort", "find", "print", "replace", "delete", "join", "split", "merge"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder of 60 targets."""
    root = tmp_path_factory.mktemp("beir")
    targets = [{"_id": f"t{n}", "title": "", "text": f"{WORDS[n % 12]} the files number {n}"} for n in range(60)]
    queries = [{"_id": f"q{n}", "text": f"how to {WORDS[n % 12]} {n}"} for n in range(60)]
    for name, rows in (("corpus", targets), ("queries", queries)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "qrels").mkdir()
    for split, rows in (("train", range(40)), ("dev", range(40, 50)), ("test", range(50, 60))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\tt{n}\t1" for n in rows)]
        (root / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="module")
def trained(folder: Path, tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    status = main(
        ["train", "--data", str(folder), "--model", tiny_encoder, "--staleness", "corrector", "--max_steps", "12",
         "--output_dir", str(out), "--seed", "3", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3",
         "--disable_tqdm", "true", "--corrector_warmup_steps", "2", "--report_to", "none"]
    )  # fmt: skip
    assert status == 0
    return out


def test_help_of_every_command_has_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        assert len(re.findall(rf"^  hf-corrector {command} ", shown, flags=re.MULTILINE)) >= 2, command


def test_train_writes_a_whole_record(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    for condition in ("stale", "corrected", "fresh", "old"):
        for metric in ("mrr@10", "recall@10", "recall@100", "ndcg@10", "success@10"):
            value = record["evaluation"]["all_queries"][condition][metric]
            assert 0 <= value <= 1
            assert metric in record["evaluation"][condition]
    assert isinstance(record["evaluation"]["clean_queries"], int)
    for condition in ("stale", "corrected"):
        assert {"tv", "hard_negative_recall@50", "cosine"} <= record["fidelity"][condition].keys()
    cost = record["cost"]
    assert cost["initial_target_passes"] == 60 and cost["final_target_passes"] == 60
    assert cost["refresh_target_passes"] == 0 and cost["train_target_passes"] > 0 and cost["query_passes"] > 0
    assert record["seed"] == 3 and record["arguments"]["max_steps"] == 12
    assert record["versions"]["transformers"] and record["timing"]["train"] > 0
    assert (trained / "corrector" / "model.safetensors").is_file()


def test_a_run_is_not_written_over_another(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "run.json").read_bytes()
    assert main(["train", "--data", str(folder), "--max_steps", "1", "--output_dir", str(trained)]) == 1
    assert "a new output folder" in capsys.readouterr().err
    assert (trained / "run.json").read_bytes() == before


def test_embed_then_verify_then_search(
    folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(tmp_path / "cache")
    embed = ["embed", "--data", str(folder), "--model", tiny_encoder, "--output_dir", cache, "--quiet"]
    assert main(embed) == 0
    assert "60 targets encoded" in capsys.readouterr().out
    assert main(embed) == 0
    assert "0 targets encoded" in capsys.readouterr().out
    assert main(["verify", cache, "--quiet"]) == 0
    assert "intact" in capsys.readouterr().out
    search = ["search", "--cache", cache, "--model", tiny_encoder, "--query", "sort the files", "--top_k", "3"]
    assert main([*search, "--data", str(folder)]) == 0
    found = capsys.readouterr().out
    assert len(re.findall(r"^ +\d\. ", found, flags=re.MULTILINE)) == 3 and "the files number" in found
    damaged = next(Path(cache).glob("emb-*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[5000] ^= 1
    damaged.write_bytes(content)
    assert main(["verify", cache, "--quiet"]) == 1
    assert damaged.name in capsys.readouterr().err


def test_evaluate_repeats_what_training_found(
    trained: Path, folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "judged"
    arguments = [
        "evaluate", "--cache", str(trained / "cache"), "--model", str(trained), "--corrector",
        str(trained / "corrector"), "--old_model", tiny_encoder, "--data", str(folder), "--output_dir", str(out),
        "--quiet", "--seed", "3",
    ]  # fmt: skip
    assert main(arguments) == 0
    again, first = (json.loads((one / "run.json").read_text()) for one in (out, trained))
    assert again["evaluation"]["clean_queries"] == first["evaluation"]["clean_queries"]
    for condition in ("stale", "corrected", "fresh", "old"):
        assert again["evaluation"]["all_queries"][condition] == pytest.approx(
            first["evaluation"]["all_queries"][condition], abs=1e-6
        )
    assert again["fidelity"]["corrected"]["tv"] == pytest.approx(first["fidelity"]["corrected"]["tv"], abs=1e-5)
    assert again["cost"]["final_target_passes"] == 60
    assert "MRR@10" in capsys.readouterr().out


def test_searching_with_another_encoder_is_refused_without_a_corrector(
    trained: Path, folder: Path, tiny_encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["search", "--cache", str(trained / "cache"), "--model", str(trained), "--query", "sort"]
    assert main(search) == 1
    refused = capsys.readouterr().err
    assert "weights" in refused and "--corrector" in refused
    assert main([*search, "--corrector", str(trained / "corrector")]) == 0


def test_a_corrector_of_other_vectors_is_refused(
    trained: Path, folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = str(tmp_path / "cache")
    assert main(["embed", "--data", str(folder), "--model", str(trained), "--output_dir", cache, "--quiet"]) == 0
    corrector = ["--corrector", str(trained / "corrector"), "--query", "sort"]
    assert main(["search", "--cache", cache, "--model", str(trained), *corrector]) == 1
    assert "the corrector of this cache" in capsys.readouterr().err
    assert main(["search", "--cache", str(trained / "cache"), "--model", tiny_encoder, *corrector]) == 1
    assert "to another encoder" in capsys.readouterr().err
    assert main(["search", "--cache", cache, "--model", str(trained), "--corrector", str(trained), "--query", "a"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_no_secret_reaches_the_record() -> None:
    from hf_corrector.cli.common import plain_arguments
    from hf_corrector.training.arguments import DualEncoderTrainingArguments

    written = plain_arguments(DualEncoderTrainingArguments("out", hub_token="hf_secret"))
    assert "hf_secret" not in json.dumps(written)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["verify", "{tmp}/nothing"], "nothing"),
        (["embed", "--data", "{tmp}/nothing", "--output_dir", "{tmp}/c"], "no such folder"),
        (["train", "--max_steps", "1"], "--output_dir"),
        (["embed", "--data", "{folder}", "--output_dir", "{tmp}/c", "--token_budget", "0"], "token_budget"),
        (["embed", "--data", "{folder}", "--model", "{encoder}", "--output_dir", "{tmp}/c", "--max_length", "999"],
         "positions"),
        (["search", "--cache", "{tmp}/c", "--query", "x", "--top_k", "0"], "--top_k"),
        (["search", "--cache", "{tmp}/c", "--query", " "], "queries with words"),
        (["train", "--output_dir", "{tmp}/o", "--staleness", "refresh"], "refresh_steps"),
        (["train", "--output_dir", "{tmp}/o", "--uniform_fraction", "2"], "uniform_fraction"),
        (["train", "--data", "{tmp}/empty", "--output_dir", "{tmp}/o", "--model", "{encoder}"], "qrels"),
        (["embed", "--data", "{folder}", "--model", "{tmp}/no-model", "--output_dir", "{tmp}/c"], "no-model"),
        (["train", "--output_dir", "{tmp}/o", "--eval_strategy", "steps", "--save_strategy", "epoch",
          "--load_best_model_at_end", "true"], "accept"),
    ],
)  # fmt: skip
def test_mistakes_are_explained_without_a_traceback(
    arguments: list[str], words: str, folder: Path, tiny_encoder: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "empty").mkdir()
    filled = [one.format(tmp=tmp_path, folder=folder, encoder=tiny_encoder) for one in arguments]
    assert main(filled) == 1
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown
    assert not (tmp_path / "o" / "run.json").exists() and not (tmp_path / "c").exists()


def test_the_installed_command_runs() -> None:
    command = Path(sys.executable).with_name("hf-corrector")
    shown = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in COMMANDS)
