from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from hf_corrector.cache.side_store import open_side, side_details
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.main import COMMANDS, main
from hf_corrector.models import CorrectorModel, DualEncoderModel
from hf_corrector.models.adapters import dual_encoder_of

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
    assert record["verdict"]["sentence"] and record["evaluation"]["primary"] == "mrr@10"
    assert [one["chosen"] for one in record["examples"]["shown"]][:3] == ["drawn at random"] * 3
    assert record["versions"]["transformers"] and record["timing"]["train"] > 0
    assert (trained / "corrector" / "model.safetensors").is_file()


def test_a_run_is_not_written_over_another(trained: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "run.json").read_bytes()
    assert main(["train", "--data", str(folder), "--max_steps", "1", "--output_dir", str(trained)]) == 1
    assert "a new output folder" in capsys.readouterr().err
    assert (trained / "run.json").read_bytes() == before


def test_an_adapter_that_could_not_be_trained_further_is_refused_before_any_target_is_encoded(
    folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = DualEncoderModel.from_encoder(tiny_encoder)
    dual_encoder_of(get_peft_model(base, LoraConfig(target_modules=["query"]))).save_pretrained(tmp_path / "adapter")
    command = ["train", "--data", str(folder), "--model", str(tmp_path / "adapter"), "--max_steps", "1"]
    command += ["--staleness", "corrector", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    assert main([*command, "--disable_tqdm", "true"]) == 1
    assert "is_trainable=True" in capsys.readouterr().err
    assert not (tmp_path / "out" / "cache").exists() and not (tmp_path / "out" / "tokens").exists()


@pytest.mark.parametrize(
    ("checkpoint", "error"),
    [("true", "a complete checkpoint"), ("{}/checkpoint-4", "COMPLETE"), ("{}/nowhere", "got no folder")],
)
def test_that_there_is_no_checkpoint_is_said_before_any_target_is_encoded(
    folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: str, error: str
) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    command = ["train", "--data", str(folder), "--model", tiny_encoder, "--staleness", "corrector", "--max_steps", "1"]
    command += ["--output_dir", str(tmp_path), "--report_to", "none", "--disable_tqdm", "true"]
    assert main([*command, "--resume_from_checkpoint", checkpoint.format(tmp_path)]) == 1
    assert error in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "tokens").exists()


def test_a_run_that_was_cut_off_goes_on_from_its_last_checkpoint(
    folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "train", "--data", str(folder), "--model", tiny_encoder, "--max_steps", "6", "--output_dir", str(tmp_path),
        "--save_strategy", "steps", "--save_steps", "2", "--per_device_train_batch_size", "8", "--report_to", "none",
        "--corrector_warmup_steps", "1", "--corrector_update_steps", "2", "--use_cpu", "true", "--quiet",
    ]  # fmt: skip
    assert main([*command, "--resume_from_checkpoint", "True"]) == 1
    assert "a complete checkpoint" in capsys.readouterr().err
    assert main(command) == 0
    whole = {one: (tmp_path / one).read_bytes() for one in ("model.safetensors", "corrector/model.safetensors")}
    cost = json.loads((tmp_path / "run.json").read_text())["cost"]
    # As if killed between its fourth step and the fifth.
    shutil.rmtree(tmp_path / "checkpoint-6")
    for name in ("run.json", *whole):
        (tmp_path / name).unlink()
    assert main([*command, "--resume_from_checkpoint", "True"]) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["cost"] == cost
    assert {one: (tmp_path / one).read_bytes() for one in whole} == whole
    shutil.rmtree(tmp_path / "checkpoint-6")
    (tmp_path / "run.json").unlink()
    assert main([*command, "--resume_from_checkpoint", "True", "--num_negatives", "2"]) == 1
    assert "num_negatives=1; got num_negatives=2" in capsys.readouterr().err


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
        "--quiet", "--seed", "3", "--no_examples",
    ]  # fmt: skip
    assert main(arguments) == 0
    again, first = (json.loads((one / "run.json").read_text()) for one in (out, trained))
    assert again["examples"] == {} and again["verdict"]["sentence"]
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
    assert "a corrector fitted to the stale encoder" in capsys.readouterr().err
    assert main(["search", "--cache", str(trained / "cache"), "--model", tiny_encoder, *corrector]) == 1
    assert "to another encoder" in capsys.readouterr().err
    assert main(["search", "--cache", cache, "--model", str(trained), "--corrector", str(trained), "--query", "a"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def write_corpus(folder: Path, targets: dict[str, str]) -> None:
    lines = [json.dumps({"_id": name, "title": "", "text": text}) + "\n" for name, text in targets.items()]
    (folder / "corpus.jsonl").write_text("".join(lines))


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Path:
    """The folder of 60 targets with one added and one changed."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    targets = {f"t{n}": f"{WORDS[n % 12]} the files number {n}" for n in range(60)}
    targets |= {"t1": "something else", "new": "an added target"}
    write_corpus(copy, targets)
    return copy


def test_embed_update_follows_the_corpus_and_keeps_the_corrector(
    trained: Path, folder: Path, tiny_encoder: str, changed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    cache, corrector = str(run / "cache"), str(run / "corrector")
    update = ["embed", "--data", str(changed), "--model", tiny_encoder, "--output_dir", cache, "--update", "--quiet"]
    assert main(update) == 0
    assert "2 targets encoded, 1 deleted" in capsys.readouterr().out
    assert main(["verify", cache, "--quiet"]) == 0
    arguments = ["evaluate", "--cache", cache, "--model", str(run), "--corrector", corrector, "--quiet", "--data"]
    assert main([*arguments, str(changed), "--output_dir", str(tmp_path / "judged")]) == 0
    assert main([*arguments, str(folder), "--output_dir", str(tmp_path / "x")]) == 1
    judged, before = (json.loads((one / "run.json").read_text()) for one in (tmp_path / "judged", trained))
    clean = judged["evaluation"]["clean_queries"]
    assert clean == before["evaluation"]["clean_queries"]  # its rows were found again by their ids
    # A note without ids knows nothing of the rows of an edited cache.
    note = json.loads((run / "corrector" / "fitted_targets.json").read_text())
    (run / "corrector" / "fitted_targets.json").write_text(json.dumps({**note, "ids": None}))
    capsys.readouterr()
    assert main([*arguments, str(changed), "--output_dir", str(tmp_path / "again")]) == 0
    assert "nothing says which of these targets" in capsys.readouterr().out


def test_embed_stores_a_matrix_of_side_features(
    folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = np.arange(120, dtype=np.float32).reshape(60, 2)
    np.save(tmp_path / "good.npy", matrix)
    save_file({"side": torch.from_numpy(matrix)}, tmp_path / "good.safetensors")
    np.save(tmp_path / "short.npy", matrix[:5])
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    cache = str(tmp_path / "cache")
    embed = ["embed", "--data", str(folder), "--model", tiny_encoder, "--output_dir", cache, "--quiet", "--side"]
    for name, words in (("short.npy", "each of 60 targets"), ("objects.npy", "numpy.save"), ("none.npy", "none.npy")):
        assert main([*embed, str(tmp_path / name)]) == 1
        assert words in capsys.readouterr().err
    assert not Path(cache).exists()
    for name in ("good.npy", "good.safetensors"):
        assert main([*embed, str(tmp_path / name)]) == 0
        stored = open_side(TargetCache.open(cache), "matrix", verify="full")
        assert np.array_equal(stored.read(0, 60).numpy(), matrix)


def test_apply_writes_a_cache_that_the_new_encoder_searches_and_no_one_takes_for_fresh(
    trained: Path, folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrector, new = str(trained / "corrector"), str(tmp_path / "new")
    apply = ["apply", "--corrector", corrector, "--cache", str(trained / "cache"), "--output_dir", new, "--quiet"]
    assert main(apply) == 0
    assert "60 targets corrected, 0 re-encoded" in capsys.readouterr().out
    assert main(apply) == 0
    old, corrected = TargetCache.open(trained / "cache"), TargetCache.open(new, verify="full")
    expected = CorrectorModel.from_pretrained(corrector).correct(old.read(0, 60))
    assert torch.allclose(corrected.read(0, 60), expected, atol=1e-6)
    record = json.loads((Path(new) / "run.json").read_text())
    assert record["command"] == "apply" and len(record["manifests"]) == 2

    def search(*more: str) -> tuple[int, str]:
        status = main(["search", "--query", "sort the files", "--top_k", "5", *more])
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    status, direct = search("--cache", new, "--model", str(trained))
    assert status == 0 and "corrected, not re-encoded" in direct
    _, on_the_fly = search("--cache", str(trained / "cache"), "--model", str(trained), "--corrector", corrector)
    lines = re.compile(r"^ +\d\. .*$", flags=re.MULTILINE)
    assert lines.findall(direct) == lines.findall(on_the_fly) != []
    for more, words in (
        (["--model", tiny_encoder], "weights"),
        (["--model", str(trained), "--corrector", corrector], "corrected already"),
    ):
        status, shown = search("--cache", new, *more)
        assert status == 1 and words in shown
    assert main(["embed", "--data", str(folder), "--model", str(trained), "--output_dir", new, "--update"]) == 1
    assert "corrected_from" in capsys.readouterr().err


def test_evaluate_judges_a_corrected_cache_as_what_it_is(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new, out = str(tmp_path / "new"), tmp_path / "judged"
    corrector = ["--corrector", str(trained / "corrector"), "--cache", str(trained / "cache"), "--model", str(trained)]
    assert main(["apply", *corrector, "--output_dir", new, "--quiet"]) == 0
    arguments = ["--cache", new, "--model", str(trained), "--data", str(folder), "--quiet", "--seed", "3"]
    assert main(["evaluate", *arguments, "--output_dir", str(out)]) == 0
    assert "corrected, not re-encoded" in capsys.readouterr().out
    judged, before = (json.loads((one / "run.json").read_text())["evaluation"] for one in (out, trained))
    assert judged["clean_queries"] == before["clean_queries"]
    assert judged["all_queries"]["stale"] == pytest.approx(before["all_queries"]["corrected"], abs=1e-6)


def test_side_features_of_another_tokenizer_are_refused(
    folder: Path, tiny_encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    train = [
        "train", "--data", str(folder), "--model", tiny_encoder, "--staleness", "corrector", "--max_steps", "4",
        "--output_dir", str(out), "--per_device_train_batch_size", "8", "--disable_tqdm", "true",
        "--corrector_warmup_steps", "2", "--report_to", "none", "--corrector_kind", "affine",
        "--corrector_side", "tokens",
    ]  # fmt: skip
    assert main(train) == 0
    file = out / "corrector" / "fitted_targets.json"
    note = json.loads(file.read_text())
    assert note["side_details"] == side_details(TargetCache.open(out / "cache"), "tokens") != {}
    apply = ["apply", "--corrector", str(out / "corrector"), "--cache", str(out / "cache"), "--quiet", "--output_dir"]
    file.write_text(json.dumps({**note, "side_details": {**note["side_details"], "prompt": "passage: "}}))
    assert main([*apply, str(tmp_path / "new")]) == 1
    shown = capsys.readouterr().err
    assert "'passage: '" in shown and "'prompt': ''" in shown
    for number, known in enumerate((note["side_details"], None)):
        file.write_text(json.dumps({**note, "side_details": known}))
        assert main([*apply, str(tmp_path / f"new{number}")]) == 0


def test_apply_needs_to_know_the_encoder(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrector = tmp_path / "corrector"
    shutil.copytree(trained / "corrector", corrector)
    apply = ["apply", "--corrector", str(corrector), "--cache", str(trained / "cache"), "--quiet"]
    note = json.loads((corrector / "fitted_targets.json").read_text())
    damaged = {**note["encoder_fingerprint"], "prompt": "x"}
    for changes, words in (
        ({"encoder_fingerprint": None}, "--model"), ({"encoder_fingerprint": damaged}, "the fingerprint of"),
    ):  # fmt: skip
        (corrector / "fitted_targets.json").write_text(json.dumps({**note, **changes}))
        assert main([*apply, "--output_dir", str(tmp_path / "new")]) == 1
        assert words in capsys.readouterr().err
    (corrector / "fitted_targets.json").write_text(json.dumps({**note, "encoder_fingerprint": None}))
    assert main([*apply, "--output_dir", str(tmp_path / "new"), "--model", str(trained)]) == 0


def test_a_corrector_fits_other_caches_of_its_encoder_if_it_says_which_that_is(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrector = tmp_path / "corrector"
    shutil.copytree(trained / "corrector", corrector)
    note = json.loads((corrector / "fitted_targets.json").read_text())
    (corrector / "fitted_targets.json").write_text(json.dumps({**note, "cache": "0" * 16}))
    apply = ["apply", "--corrector", str(corrector), "--cache", str(trained / "cache"), "--quiet", "--output_dir"]
    assert main([*apply, str(tmp_path / "new")]) == 0
    config = json.loads((corrector / "config.json").read_text())
    (corrector / "config.json").write_text(json.dumps({**config, "stale_encoder": None}))
    assert main([*apply, str(tmp_path / "newer")]) == 1
    assert "the corrector of this cache" in capsys.readouterr().err


def test_no_secret_reaches_the_record() -> None:
    from hf_corrector.training.arguments import DualEncoderTrainingArguments
    from hf_corrector.training.run_record import plain_arguments

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
