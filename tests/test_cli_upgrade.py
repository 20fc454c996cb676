"""``hf-corrector upgrade``: what it prints, writes and answers by its exit status."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from upgrade_helpers import cache_of, make_data, new_encoder, old_encoder

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.main import main
from hf_corrector.cli.upgrade import read_query_log
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.errors import DataError
from hf_corrector.index.exact import ExactIndex
from hf_corrector.index_upgrade.fitted_corrector import FittedCorrector
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel


@pytest.fixture(scope="module")
def place(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, both encoders and the cache of each."""
    root, data = tmp_path_factory.mktemp("upgrade"), make_data()
    write_folder(root / "data", data)
    for name, model in (("old", old_encoder(tiny_encoder)), ("new", new_encoder(tiny_encoder))):
        model.save_pretrained(str(root / name))
        cache_of(model, data, root / f"{name}_cache")
    return root


def write_folder(folder: Path, data: RetrievalData) -> None:
    (folder / "qrels").mkdir(parents=True)
    lines = [{"_id": row["id"], "text": row["text"], "metadata": json.loads(row["metadata"])} for row in data.corpus]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    queries = []
    for name, split in data.splits.items():
        queries += [
            {"_id": row["query_id"], "text": row["query"], "metadata": json.loads(row["metadata"])} for row in split
        ]
        judged = [f"{row['query_id']}\t{row['positive_ids'][0]}\t1" for row in split]
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    (folder / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))


def call(place: Path, out: Path, *more: str, old: str = "old", new: str = "new") -> int:
    return main([
        "upgrade", "--old_cache", str(place / f"{old}_cache"), "--new_model", str(place / new), "--data",
        str(place / "data"), "--pairs", "150", "--output_dir", str(out), "--quiet", "--kinds", "mean_shift", "affine",
        *more,
    ])  # fmt: skip


def test_go_is_status_0_and_everything_is_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    status = call(
        place, out, "--old-model", str(place / "old"), "--slice_by", "site", "--slice-by", "date",
        "--seconds-per-pass", "0.01", "--price-per-hour", "2", "--pairs-by", "diverse", "--side", "none",
    )  # fmt: skip
    assert status == 0
    shown = capsys.readouterr().out
    for words in (
        "old model kept",
        "full re-embed",
        "a query",
        "price",
        "Go: correct the index",
        "1. Prepare",
        "Shadow",
    ):
        assert words in shown, words
    record = json.loads((out / "run.json").read_text())
    assert record["command"] == "upgrade" and record["verdict"]["decision"] == "go"
    assert record["verdict"]["sentence"] in shown
    texts = set((place / "data" / "queries.jsonl").read_text().splitlines())
    for one in record["examples"]["shown"]:
        assert any(json.loads(line)["text"] == one["query"] for line in texts)
        assert one["results"].keys() == {"old", "stale", "corrected", "fresh"}
        found = one["results"]["fresh"]
        first = next((rank for rank, result in enumerate(found, start=1) if result["relevant"]), None)
        assert first is None or one["values"]["fresh"] == pytest.approx(1 / first)
    assert {row["method"] for row in record["rows"]} >= {"old", "stale", "affine", "corrected", "fresh", "rerank"}
    assert record["verdict"]["worst_slice"]["slice"].startswith(("site=", "date="))
    pairs = json.loads((out / "pairs.json").read_text())
    assert len(pairs["ids"]) == 150 and pairs["method"] == "diverse"
    written = FittedCorrector.load(out / "corrector").apply(place / "old_cache", tmp_path / "new_cache")
    assert len(written) == 400
    assert call(place, out) == 1
    assert "a new output folder" in capsys.readouterr().err


def test_no_go_is_status_3(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(place, tmp_path / "out", "--side", "none", "--old_model", str(place / "new"), old="new", new="old") == 3
    shown = capsys.readouterr().out
    assert "keeping the old model is better" in shown and "Nothing to adopt" in shown


def test_reembed_first_is_status_4(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    more = ["--pairs", "20", "--min-recovery", "0.94", "--kind", "affine", "--side", "none"]
    assert call(place, out, *more) == 4
    shown = capsys.readouterr().out
    assert "next: hf-corrector apply --corrector" in shown
    assert f"--reembed {out / 'reembed_first.jsonl'}" in shown
    listed = [json.loads(line) for line in (out / "reembed_first.jsonl").read_text().splitlines()]
    words = shown[shown.index("next: hf-corrector ") + len("next: hf-corrector ") :].splitlines()[0].split()
    words[words.index("CORRECTED")] = str(tmp_path / "corrected")
    assert main([*words, "--quiet"]) == 0
    old, new, made = (
        TargetCache.open(path) for path in (place / "old_cache", place / "new_cache", tmp_path / "corrected")
    )
    rows = old.rows_of(listed)
    torch.testing.assert_close(made.gather(rows), new.gather(rows), atol=1e-5, rtol=0)
    others = np.setdiff1d(np.arange(len(old)), rows)
    corrector = CorrectorModel.from_pretrained(str(out / "corrector"))
    torch.testing.assert_close(made.gather(others), corrector.correct(old.gather(others)), atol=1e-5, rtol=0)
    assert not (tmp_path / "corrected-reembedded").exists()


def test_queries_direction_leaves_the_index_alone(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--direction", "queries", "--judge_targets", "100", "--judge_queries", "60"]
    assert call(place, tmp_path / "out", *more) == 0
    shown = capsys.readouterr().out
    assert "judged on 160 of 400 targets" in shown and "60 clean queries" in shown
    assert "next: hf-corrector search --corrector" in shown
    corrector = FittedCorrector.load(tmp_path / "out" / "corrector")
    assert corrector.direction == corrector.fitted.direction == "queries"


def test_a_corrector_of_queries_searches_the_old_cache_and_is_refused_for_targets(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(place, tmp_path / "out", "--direction", "queries", "--judge_targets", "100", "--judge_queries", "60")
    folder, new = tmp_path / "out" / "corrector", tmp_path / "new"
    both = ["--corrector", str(folder), "--cache", str(place / "old_cache"), "--output_dir", str(new), "--quiet"]
    model = ["--model", str(place / "new")]
    for command in (
        ["apply", *both],
        ["apply", *both, *model],
        ["evaluate", *both, *model, "--data", str(place / "data")],
    ):
        capsys.readouterr()
        assert main(command) == 1
        shown = capsys.readouterr().err
        assert "maps new queries" in shown and "hf-corrector search" in shown and not (new / "manifest.json").exists()
    search = ["search", *both[:4], "--query", "list files", "--top_k", "3", "--model"]
    assert main([*search, str(place / "new")]) == 0
    query = DualEncoderModel.from_pretrained(str(place / "new")).encode_query(["list files"])
    cache = TargetCache.open(place / "old_cache")
    expected = ExactIndex(cache).search(FittedCorrector.load(folder).map_queries(query), 3).rows[0].tolist()
    found = re.findall(r"^ +\d\. .*  (t\d+)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert found == [cache.ids[row] for row in expected]
    assert main([*search, str(place / "old")]) == 1
    assert "another encoder" in capsys.readouterr().err


def test_query_log_is_read_with_counts(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.tsv"
    log.write_text("list files\t3\ncount words\nlist files\t2\n\n")
    assert read_query_log(log) == {"list files": 5.0, "count words": 1.0}
    more = ["--pairs_by", "traffic", "--query_log", str(log), "--side", "none", "--reembed-by-traffic"]
    assert call(place, tmp_path / "out", *more) in (0, 4)
    assert json.loads((tmp_path / "out" / "pairs.json").read_text())["weights"] is not None
    log.write_text("list files\tmany\n")
    with pytest.raises(DataError, match=r"log\.tsv, line 1"):
        read_query_log(log)
    assert call(place, tmp_path / "other", *more) == 1
    assert "how often it was asked" in capsys.readouterr().err
    log.write_text("\n")
    with pytest.raises(DataError, match="one query a line"):
        read_query_log(log)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--pairs", "5000"], "at most 280 pairs"),
        (["--slice_by", "nothing"], "slice_by 'nothing'"),
        (["--judge_targets", "some"], "judge_targets"),
        (["--metric", "bleu"], "bleu"),
        (["--min_recovery", "7"], "thresholds"),
        (["--old_model", "{place}/new"], "weights"),
        (["--price_per_hour", "0"], "price_per_hour"),
        (["--reembed_by_traffic"], "reembed_by_traffic"),
    ],
)
def test_mistakes_are_explained_and_leave_no_record(
    more: list[str], words: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(place, tmp_path / "out", *(one.format(place=place) for one in more)) == 1
    shown = capsys.readouterr().err
    assert words in shown and "Traceback" not in shown
    assert not (tmp_path / "out" / "run.json").exists()
