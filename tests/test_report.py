"""Reports: what stands on the page, that it asks nothing of the network, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_helpers import assert_asks_for_nothing, parsed
from upgrade_helpers import cache_of, make_data, new_encoder, old_encoder

from hf_corrector.cli.main import main
from hf_corrector.encoding import EncodeOptions
from hf_corrector.errors import InputError
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.index_upgrade.upgrading import upgrade
from hf_corrector.planning.plan import Goal, plan
from hf_corrector.planning.probe import Probe, ProbeSettings, probe_learning_curves, standard_families
from hf_corrector.records import RECORD_FILE, RunRecord
from hf_corrector.report import page as page_module
from hf_corrector.report.nodes import Level
from hf_corrector.report.page import render, write_report
from hf_corrector.report.reading import read_runs
from hf_corrector.report.words import spread

HOSTILE = [
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "'; DROP TABLE runs; --", "</style><b>",
    "$\\frac{1$",
    "{{ 7 * 7 }}", "a" * 5000, "\x00\x1b[31m\ud800", "日本語 עברית", "_hidden", "&lt;b&gt;", "url(http://x.example/a)",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of real runs by command: a training run, two upgrades and a plan."""
    root, data = tmp_path_factory.mktemp("runs"), make_data()
    folder = root / "data"
    (folder / "qrels").mkdir(parents=True)
    lines = [{"_id": row["id"], "text": row["text"]} for row in data.corpus.select(range(80))]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    queries = [{"_id": f"q{n}", "text": line["text"][:30]} for n, line in enumerate(lines)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))
    for name, numbers in (("train", range(40)), ("test", range(40, 80))):
        judged = [f"q{n}\t{lines[n]['_id']}\t1" for n in numbers]
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    train = [
        "train", "--data", str(folder), "--model", tiny_encoder, "--max_steps", "8", "--logging_steps", "2",
        "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--report_to", "none", "--save_strategy", "no",
        "--corrector_warmup_steps", "2", "--use_cpu", "--output_dir", str(root / "trained"), "--quiet",
    ]  # fmt: skip
    assert main(train) == 0
    new, old = new_encoder(tiny_encoder), old_encoder(tiny_encoder)
    cache = cache_of(old, data, root / "cache")
    options = UpgradeOptions(
        kinds=("mean_shift", "affine"), slice_by=("site",), judging=JudgeOptions(resamples=200),
        encoding=EncodeOptions(progress=False), device="cpu",
    )  # fmt: skip
    for pairs in (100, 200):
        upgrade(cache, new, data, num_pairs=pairs, old_model=old, side=None, options=options).save(root / f"up{pairs}")
    stale, texts = cache.read(0, 120), data.corpus["text"][:120]
    probe = Probe(stale, new.encode_target(list(texts)))
    curves = probe_learning_curves(probe, families=standard_families(["affine"]), settings=ProbeSettings())
    answer = plan(curves, probe=120, goal=Goal(targets=400))
    RunRecord(
        command="plan", seed=0, arguments={}, evaluation={"plan": answer.to_dict(), "sentence": answer.sentence()}
    ).save(root / "planned")
    return {name: root / name for name in ("trained", "up100", "up200", "planned")}


@pytest.fixture(scope="module")
def page(runs: dict[str, Path]) -> str:
    return render(read_runs(list(runs.values())))


def test_the_page_asks_nothing_of_the_network(page: str) -> None:
    assert_asks_for_nothing(page)
    assert "default-src 'none'" in next(one["content"] for one in parsed(page).all("meta") if "http-equiv" in one)


@pytest.mark.parametrize(
    "leak", ["<img src='//x.example/a'>", "<style>@import 'x.css';</style>", "<p style='background:url(x.png)'></p>",
             "<a href='https://x.example'>x</a>", "<script>fetch('x')</script>", "<p onclick='x()'></p>"],
)  # fmt: skip
def test_the_check_above_can_fail(page: str, leak: str) -> None:
    with pytest.raises(AssertionError):
        assert_asks_for_nothing(page.replace("</main>", f"{leak}</main>"))


def test_the_verdict_comes_first_and_in_the_words_of_the_record(page: str, runs: dict[str, Path]) -> None:
    reader = parsed(page)
    headings = [text for tag, text in reader.texts if tag == "h2"]
    assert headings[0] == "Verdict"
    top = reader.text[: reader.text.index("All runs at a glance")]
    for folder in runs.values():
        record = RunRecord.load(folder)
        sentence = record.verdict.get("sentence") or record.evaluation["sentence"]
        assert sentence in top and folder.name in top


def test_every_number_that_is_drawn_stands_in_a_table(page: str, runs: dict[str, Path]) -> None:
    cells = [text for tag, text in parsed(page).texts if tag == "td"]
    read = read_runs(list(runs.values()))
    for run in read:
        for one in run.conditions:
            assert spread(one.metrics[run.metric]) in cells
        for one in run.slices:
            assert f"{spread(one.difference)} against {one.against}" in cells
    trained = RunRecord.load(runs["trained"])
    logged = [entry for entry in trained.history if "loss" in entry]
    assert len(logged) == 4
    assert all(f"{entry['loss']:.3f}" in cells for entry in logged)
    for section in ("quality", "passes", "pairs", "drift", "slices"):
        start = page.index(f'<section id="{section}"')
        assert "<svg" in page[start : page.index("</section>", start)], section


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    RunRecord(command="embed", seed=0, arguments={}, cost={"initial_target_passes": 3}).save(tmp_path / "bare")
    page = render(read_runs([tmp_path / "bare"]))
    assert_asks_for_nothing(page)
    said = [text for tag, text in parsed(page).texts if tag == "p" and text.startswith("Missing:")]
    assert len(said) == 8  # the verdict and seven sections
    assert "<svg" not in page


def test_headings_tables_and_charts_can_be_read_aloud(page: str) -> None:
    reader = parsed(page)
    levels = [int(name[1]) for name, _ in reader.elements if re.fullmatch(r"h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all(one.get("scope") in ("row", "col", "rowgroup") for one in reader.all("th"))
    assert all(text.strip() for tag, text in reader.texts if tag == "th")
    assert len(reader.all("caption")) == len(reader.all("table")) > 8
    ids = {one["id"] for _, one in reader.elements if "id" in one}
    charts = reader.all("svg")
    assert len(charts) > 8
    for chart in charts:
        assert chart["role"] == "img" and set(chart["aria-labelledby"].split()) <= ids
    descriptions = [text for tag, text in reader.texts if tag == "desc"]
    assert len(descriptions) == len(charts) and all(re.search(r"\d", text) for text in descriptions)


def test_charts_take_every_colour_from_the_page(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    style = page[page.index("<style>") : page.index("</style>")]
    for drawing in drawings:
        assert not re.search(r"#[0-9a-fA-F]{3,8}\b(?=[;\"])", re.sub(r'(href|id)="[^"]*"', "", drawing))
        assert "font-family" not in drawing
        assert all(f"{variable}:" in style for variable in re.findall(r"var\((--[a-z0-9-]+)\)", drawing))


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_lines_stand_out_in_both_themes(page: str, theme: int) -> None:
    blocks = re.findall(r":root \{(.*?)\}", page, flags=re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", blocks[theme]))
    assert len(colours) == 16
    for behind in ("page", "raised"):
        for name, colour in colours.items():
            if name in ("page", "raised", "line"):
                continue
            low, high = sorted((luminance(colour), luminance(colours[behind])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, behind)


def test_print_is_light_and_nothing_is_cut_off() -> None:
    style = (Path(page_module.__file__).parent / "templates" / "style.css").read_text()
    assert "@media screen and (prefers-color-scheme: dark)" in style
    printed = style[style.index("@media print") :]
    rules = "overflow: visible; max-height: none; white-space: normal; table-layout: fixed; break-after: avoid"
    for rule in rules.split("; "):
        assert rule in printed


def test_the_same_records_give_the_same_page(page: str, runs: dict[str, Path]) -> None:
    assert render(read_runs(list(runs.values()))) == page


def spoilt(value: Any, number: Iterator[int]) -> Any:
    """Put hostile strings in place of every string and beside every key."""
    if isinstance(value, dict):
        return {key: spoilt(one, number) for key, one in value.items()}
    if isinstance(value, list):
        return [spoilt(one, number) for one in value]
    return HOSTILE[next(number) % len(HOSTILE)] if isinstance(value, str) else value


@pytest.mark.parametrize("kind", ["trained", "up100", "planned"])
def test_text_of_records_is_shown_and_never_obeyed(kind: str, runs: dict[str, Path], tmp_path: Path) -> None:
    record, count = RunRecord.load(runs[kind]), iter(range(10**6))
    hostile = replace(
        record, command=HOSTILE[0], machine=HOSTILE[1], versions=dict.fromkeys(HOSTILE, HOSTILE[0]),
        arguments={**record.arguments, **dict.fromkeys(HOSTILE, HOSTILE)}, cost=dict.fromkeys(HOSTILE, 1),
        rows=spoilt(record.rows, count), verdict=spoilt(record.verdict, count),
        examples=spoilt(record.examples, count), fidelity={text: {text: 0.5} for text in HOSTILE},
    )  # fmt: skip
    for target in (tmp_path / "<b>'\"&", tmp_path / "plain"):
        target.mkdir()
        # As a damaged or hostile program would write it: json escapes what UTF-8 cannot hold.
        (target / RECORD_FILE).write_text(json.dumps(vars(hostile)))
    path = write_report([tmp_path / "<b>'\"&", tmp_path / "plain"])
    page = path.read_text(encoding="utf-8")
    assert_asks_for_nothing(page)
    reader = parsed(page)
    assert {"b"} & {name for name, _ in reader.elements} == set()
    for text in HOSTILE:
        shown = text.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
        assert shown in reader.text, text[:40]
    assert "49" not in reader.text.split("{{ 7 * 7 }}")[0][-5:]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ({"colour": "red"}, "unknown ['colour']"),
        ({"evaluation": []}, "an object"),
        ({"evaluation": {"all_queries": {"stale": {"mrr@10": "high"}}, "primary": "mrr@10"}}, "mrr@10"),
        ({"history": [{"step": 1, "loss": "low"}]}, "loss"),
        ({"examples": {"rule": 1}}, "rule"),
        ({"verdict": {"checks": [{"rule": "x", "passed": 1, "found": "y"}]}}, "passed"),
        ({"rows": [{"method": "stale"}]}, "label"),
        ({"cost": {"query_passes": 1.5}}, "query_passes"),
        ({"cost": 3}, "cost"),
        ({"created": 1e300}, "created"),
        ({"timing": {"total": 10**400}}, "total"),
        ({"command": None}, "command"),
        ({"manifests": [{"rows": "many"}]}, "rows"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused_naming_the_place(damage: dict[str, Any], named: str, tmp_path: Path) -> None:
    whole = vars(RunRecord(command="train", seed=0, arguments={}))
    (tmp_path / RECORD_FILE).write_text(json.dumps({**whole, **damage}))
    with pytest.raises(InputError) as refused:
        read_runs([tmp_path])
    assert named in str(refused.value) and RECORD_FILE in str(refused.value)
    assert refused.value.cure


def test_what_is_no_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    for folders, named in (([], "none"), ([tmp_path], "no such file"), ([runs["up100"], runs["up100"]], "different")):
        with pytest.raises(InputError, match=named):
            read_runs(folders)
    (tmp_path / RECORD_FILE).write_text("{not json")
    with pytest.raises(InputError, match=RECORD_FILE):
        read_runs([tmp_path])


def test_runs_stand_side_by_side_and_differences_are_set_off(runs: dict[str, Path]) -> None:
    read = read_runs([runs["up100"], runs["up200"] / RECORD_FILE])
    page = render(read)
    table = page[page.index("<caption><span>Arguments") :]
    table = table[: table.index("</table>")]
    assert '<th scope="col">up100</th><th scope="col">up200</th>' in table
    assert (
        '<tr class="marked"><th scope="row">num_pairs</th><td class="short">100</td><td class="short">200</td></tr>'
        in table
    )
    assert '<tr><th scope="row">split</th>' in table
    measured = [point for run in read for point in run.points if point.method == "corrected"]
    assert [point.pairs for point in measured] == [100, 200] and not any(point.forecast for point in measured)


def test_a_long_run_gives_a_small_page(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 1 / step, "cosine_stale_fresh": 0.5} for step in range(1, 20_001)]
    RunRecord(command="train", seed=0, arguments={}, history=history).save(tmp_path / "long")
    page = render(read_runs([tmp_path / "long"]))
    assert len(page) < 200_000
    steps = [text for tag, text in parsed(page).texts if tag == "th" and text.isdecimal()]
    assert steps[0] == "1" and steps[-1] == "20000" and len(steps) < 70


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        RunRecord(command="embed", seed=0, arguments={}).save(tmp_path / name / "out")
    assert [run.label for run in read_runs([tmp_path / "a" / "out", tmp_path / "b" / "out"])] == ["a/out", "b/out"]


def test_the_worst_slice_and_the_examples_are_named(page: str, runs: dict[str, Path]) -> None:
    record = RunRecord.load(runs["up100"])
    text = parsed(page).text
    worst = record.verdict["worst_slice"]
    assert f"Worst in up100: {worst['slice']}, {spread(Level(**worst['difference']))}" in text
    assert record.examples["rule"] in text
    for one in record.examples["shown"]:
        assert one["query"] in text and one["chosen"] in text
        for results in one["results"].values():
            assert all(result["text"] in text for result in results)
    assert f"correction helped {record.examples['helped']} and harmed {record.examples['harmed']}" in text


def test_the_command_writes_beside_the_run_or_where_it_is_told(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs["planned"])]) == 0
    assert (runs["planned"] / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    out = tmp_path / "page.html"
    assert main(["report", str(runs["up100"]), str(runs["up200"]), "--output", str(out)]) == 0
    assert f"written to {out}" in capsys.readouterr().out and "up200" in out.read_text(encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 1
    shown = capsys.readouterr().err
    assert "expected the folder of a run" in shown and "Name the --output_dir" in shown


def test_what_the_page_on_reports_says_is_run(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, run in (("upgraded", "up100"), ("upgraded-500", "up100"), ("upgraded-2000", "up200")):
        RunRecord.load(runs[run]).save(tmp_path / name)
    said = (Path(__file__).parents[1] / "examples" / "report.md").read_text(encoding="utf-8")
    commands, code = (re.findall(rf"```{language}\n(.*?)```", said, flags=re.DOTALL) for language in ("bash", "python"))
    for line in commands[0].splitlines():
        assert main(shlex.split(line)[1:]) == 0
    assert (tmp_path / "upgraded" / "report.html").is_file()
    by_command = (tmp_path / "report.html").read_bytes()
    exec(compile(code[0], "report.md", "exec"), {})
    assert (tmp_path / "report.html").read_bytes() == by_command
