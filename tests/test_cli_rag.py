"""``hf-corrector rag-train`` and ``rag-answer``: what they print, write and refuse, on tiny models."""

from __future__ import annotations

import json
import re
import runpy
import sysconfig
from pathlib import Path

import pytest
from rag_helpers import generator_of, question_data

from hf_corrector.cli.main import main
from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel
from hf_corrector.records import FITTED_FILE

TARGETS, TRAIN, TEST = question_data()
EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_rag.py"


def write_folder(root: Path, *, answered: bool = True) -> str:
    (root / "qrels").mkdir(parents=True)
    targets = [{"_id": one["id"], "text": one["text"]} for one in TARGETS]
    questions = [
        {"_id": one["query_id"], "text": one["query"], **({"answers": one["answers"]} if answered else {})}
        for one in [*TRAIN, *TEST]
    ]
    for name, rows in (("corpus", targets), ("queries", questions)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, split in (("train", TRAIN), ("test", TEST)):
        lines = ["query-id\tcorpus-id\tscore", *(f"{one['query_id']}\t{one['positive_ids'][0]}\t1" for one in split)]
        (root / "qrels" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    return str(root)


@pytest.fixture(scope="module")
def places(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("rag")
    reader, tokenizer = generator_of("t5")
    reader.save_pretrained(root / "reader")
    tokenizer.save_pretrained(root / "reader")
    return {
        "data": write_folder(root / "data"), "model": tiny_encoder, "reader": str(root / "reader"),
        "root": str(root),
    }  # fmt: skip


def train(places: dict[str, str], out: str, *more: str) -> int:
    given = [f"--{name}={places[name]}" for name in ("data", "model", "reader")]
    return main([
        "rag-train", *given, f"--output_dir={out}", "--max_steps=4", "--num_passages=2", "--seed=3", "--use_cpu=true",
        "--per_device_train_batch_size=4", "--learning_rate=1e-2", "--corrector_warmup_steps=1", "--report_to=none",
        "--disable_tqdm=true", "--answer_max_length=6", "--judged_questions=5", *more,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def trained(places: dict[str, str]) -> Path:
    out = Path(places["root"]) / "out"
    assert train(places, str(out)) == 0
    return out


def test_rag_train_writes_a_whole_record(trained: Path, places: dict[str, str]) -> None:
    record = json.loads((trained / "run.json").read_text())
    assert record["command"] == "rag-train" and record["arguments"]["data"] == places["data"]
    for condition in ("stale", "corrected", "fresh"):
        found = record["evaluation"][condition]
        assert found["answer_log_likelihood"] < 0
        assert all(0 <= found[name] <= 1 for name in ("exact_match", "f1", "gold_recall@10", "attribution"))
    assert record["evaluation"]["clean_questions"] == record["evaluation"]["questions"] == 5
    gap = record["evaluation"]["differences"]["corrected-stale"]["answer_log_likelihood"]
    assert gap["low"] <= gap["estimate"] <= gap["high"]
    cost = record["cost"]
    assert cost["initial_target_passes"] == cost["final_target_passes"] == len(TARGETS)
    assert cost["query_passes"] == 16 + 7 * 5 and cost["train_target_passes"] > 0
    # Training reads 32; under each of three conditions every passage is weighed, written from and weighed again.
    assert cost["reader_passes"] >= 32 + 3 * 5 * 2 * 3
    assert record["timing"]["judge"] > 0 and len(record["manifests"]) == 2 and record["history"]
    assert (trained / "corrector" / FITTED_FILE).is_file()


def test_rag_answer_prints_answers_with_passages_and_probabilities(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = TEST["query"][0]
    for more in ([], ["--method", "fast"], ["--encode", "--num_passages", "3", "--num_beams", "2"]):
        arguments = ["rag-answer", "--model", str(trained), "--question", question, "--question", "what is red"]
        assert main([*arguments, "--device", "cpu", "--top_k", "1", *more]) == 0
        shown = capsys.readouterr().out
        assert f"\n{question}\n" in shown and "\nwhat is red\n" in shown
        assert len(re.findall(r"^  1\. [01]\.\d{4}  \S", shown, flags=re.MULTILINE)) == 2
        assert len(re.findall(r"^       [01]\.\d\d from t\d+  the \S+ number", shown, flags=re.MULTILINE)) == 4


def test_a_stale_cache_without_a_corrector_needs_its_targets_encoded(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "ignored")
    assert train(places, out, "--staleness=ignore") == 0
    record = json.loads((tmp_path / "ignored" / "run.json").read_text())
    assert record["evaluation"]["corrected"] == record["evaluation"]["stale"]
    capsys.readouterr()
    answer = ["rag-answer", "--model", out, "--question", "which colour has cat 0", "--device", "cpu"]
    assert main(answer) == 1
    assert "add --encode to encode all targets now" in capsys.readouterr().err
    assert main([*answer, "--encode"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--answer_max_length=2"], "Raise answer_max_length"),
        (["--reader_layers=1"], "expected none with --reader"),
        (["--num_passages=0", "--objective=generator_only", "--staleness=ignore"], "--num_passages of at least 1"),
        (["--judged_questions=-1"], "--judged_questions of 0 or more"),
        (["--objective=leave_one_out", "--num_passages=1"], "num_passages: expected at least 2"),
        (["--language=de"], "invalid choice"),
        (["--prompt=what?"], "expected one {question} and one {passage}"),
    ],
)
def test_rag_train_refuses_before_any_work(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    try:
        assert train(places, str(tmp_path / "out"), *more) == 1
    except SystemExit as stopped:
        assert stopped.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "cache").exists() and not (tmp_path / "out" / "tokens").exists()


def test_a_dev_split_that_cannot_be_evaluated_is_refused_before_any_work(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, long = Path(write_folder(tmp_path / "data")), "an answer which nobody would ever read to its end"
    with (data / "queries.jsonl").open("a") as queries:
        queries.write(json.dumps({"_id": "d0", "text": "which colour has dog 1", "answers": [long]}) + "\n")
    (data / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nd0\tt1\t1\n")
    assert train({**places, "data": str(data)}, str(tmp_path / "out")) == 1
    shown = capsys.readouterr().err
    assert "eval_dataset, row 0, answer to 'd0': expected at most 6 tokens" in shown
    assert not (tmp_path / "out" / "cache").exists() and not (tmp_path / "out" / "tokens").exists()


def test_data_without_answers_and_runs_of_other_commands_are_refused(
    places: dict[str, str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = {**places, "data": write_folder(tmp_path / "bare", answered=False)}
    assert train(bare, str(tmp_path / "out")) == 1
    assert "expected queries with answers; got none that has any" in capsys.readouterr().err
    assert main(["rag-train", "--max_steps=1"]) == 1
    assert "expected --output_dir OUT" in capsys.readouterr().err
    assert train(places, str(trained)) == 1
    assert "a new output folder" in capsys.readouterr().err
    assert main(["rag-answer", "--model", str(tmp_path), "--question", "x"]) == 1
    assert "expected the folder of a run of rag-train" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    record = json.loads((trained / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "command": "train"}))
    assert main(["rag-answer", "--model", str(other), "--question", "x"]) == 1
    assert "expected a run of rag-train; got one of 'train'" in capsys.readouterr().err
    for wrong in (["--question", " "], ["--question", "x", "--top_k", "0"]):
        assert main(["rag-answer", "--model", str(trained), *wrong]) == 1
        assert "questions with words" in capsys.readouterr().err
    assert main(["rag-answer", "--model", str(trained), "--question", "x", "--encode", "--cache", "c"]) == 1
    assert "expected --cache or --encode; got both" in capsys.readouterr().err


def test_prompt_and_scale_are_those_of_the_flags(places: dict[str, str], tmp_path: Path) -> None:
    out, prompt = tmp_path / "out", "{passage} so {question}"
    assert train(places, str(out), f"--prompt={prompt}", "--learn_scale", "--judged_questions=1", "--max_steps=2") == 0
    arguments = json.loads((out / "run.json").read_text())["arguments"]
    assert arguments["reader_prompt"] == prompt
    model = RetrievalAugmentedModel.from_pretrained(str(out))
    assert model.config.prompt == prompt and model.log_scale is not None


@pytest.mark.slow
def test_the_example_runs_with_the_default_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = Path(sysconfig.get_path("stdlib")) / "asyncio"
    runpy.run_path(str(EXAMPLE))["main"](str(tmp_path / "out"), sources=str(sources), max_steps=2, layers=1, judged=2)
    shown = capsys.readouterr().out
    assert "clean of" in shown and "right would be " in shown


def test_the_command_trains_the_default_reader(places: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main([
        "rag-train", f"--data={places['data']}", f"--model={places['model']}", "--reader_layers=1", "--max_steps=1",
        "--num_passages=1", "--per_device_train_batch_size=2", f"--output_dir={out}", "--use_cpu=true",
        "--report_to=none", "--disable_tqdm=true", "--judged_questions=2", "--corrector_warmup_steps=0",
    ]) == 0  # fmt: skip
    arguments = json.loads((out / "run.json").read_text())["arguments"]
    assert arguments["generator_learning_rate"] == 1e-4
    assert arguments["cross_attention_learning_rate"] == pytest.approx(5e-4)
