"""An upgrade on vectors alone: what it decides, what it refuses, and that nothing judged was fitted to."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cli.main import main
from hf_corrector.corrected_arrays import load_array
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.index_upgrade.vector_bench import VectorBench
from hf_corrector.index_upgrade.vector_inputs import JudgedVectors, load_vectors
from hf_corrector.index_upgrade.vector_upgrade import fresh_array, upgrade_vectors
from hf_corrector.models import CorrectorModel
from hf_corrector.numpy_corrector import NumpyCorrector
from hf_corrector.records import EncoderFingerprint

TARGETS, SAMPLE, DIM = 1200, 500, 24
OPTIONS = UpgradeOptions(kinds=("mean_shift", "affine"), judging=JudgeOptions(resamples=500))


def vectors(*, dim_old: int = DIM, noise: float = 0.02, seed: int = 0) -> dict[str, np.ndarray]:
    """Make vectors of two encoders, the old one a spoilt and turned view of the new one, and queries near targets."""
    generator = torch.Generator().manual_seed(seed)
    new = F.normalize(torch.randn(TARGETS, DIM, generator=generator), dim=1)
    queries = F.normalize(new[:200] + 0.2 * torch.randn(200, DIM, generator=generator), dim=1)
    turn = torch.randn(DIM, dim_old, generator=generator) / DIM**0.5
    if dim_old == DIM:
        turn = torch.eye(DIM) + 0.5 * turn

    def spoilt(one: torch.Tensor, noise: float = noise) -> np.ndarray:
        moved = F.normalize(one @ turn + 0.1, dim=1)
        return F.normalize(moved + noise * torch.randn(moved.shape, generator=generator), dim=1).numpy()

    rows = np.concatenate(
        [np.arange(200), 200 + np.random.default_rng(seed).permutation(TARGETS - 200)[: SAMPLE - 200]]
    )
    return {
        "old": spoilt(new), "new": new.numpy(), "rows": rows, "sample": new.numpy()[rows], "queries": queries.numpy(),
        "old_queries": spoilt(queries, 0.2),
    }  # fmt: skip


@pytest.fixture(scope="module")
def made() -> dict[str, np.ndarray]:
    return vectors()


RELEVANT = [{row: 1.0} for row in range(200)]


def test_neighbours_decide_where_there_are_no_queries(made: dict[str, np.ndarray], tmp_path: Path) -> None:
    report = upgrade_vectors(made["old"], made["sample"], made["rows"], options=OPTIONS)
    assert report.go and "no judged query" in report.verdict and "neighbourhoods" in report.verdict
    means = {name: found["recall@10"].estimate for name, found in report.judgement.means.items()}
    assert means["fresh"] == 1.0 and means["stale"] < means["mean_shift"] < means["affine"] == means["corrected"] < 1.0
    assert report.corrector.config.kind == "affine" and report.corrector.config.normalize_output
    assert 0.9 < report.cosine.low < report.cosine.estimate < report.cosine.high < 1.0
    assert report.stale_cosine is not None and report.stale_cosine.high < report.cosine.low
    assert report.record.cost["pair_target_passes"] == SAMPLE
    path = report.apply(tmp_path / "corrected.npy")
    corrected, left = np.load(path), np.setdiff1d(np.arange(TARGETS), made["rows"])
    assert np.array_equal(corrected[made["rows"]], made["sample"])
    assert np.abs(corrected[left] - report.corrector.correct(made["old"][left])).max() < 1e-6
    closeness = (corrected * made["new"]).sum(axis=1)[left]
    assert closeness.mean() > (made["old"] * made["new"]).sum(axis=1)[left].mean() + 0.05
    assert abs(closeness.mean() - report.cosine.estimate) < 0.01  # what was left out of a fit is like what was not seen


def test_judged_queries_give_the_usual_verdict(made: dict[str, np.ndarray]) -> None:
    queries = JudgedVectors(made["queries"], RELEVANT, made["old_queries"])
    report = upgrade_vectors(made["old"], made["sample"], made["rows"], queries=queries, options=OPTIONS)
    assert list(report.judgement.per_query) == ["old", "stale", "mean_shift", "affine", "corrected", "fresh"]
    assert report.go and "200 clean queries" in report.verdict and "judged query" not in report.verdict
    assert {check.rule for check in report.decision.checks} >= {"not worse than the old model"}
    assert "old model kept" in report.table() and "200 clean queries,\nsearched among" in report.table()


def test_queries_nothing_in_the_sample_answers_are_left_out(made: dict[str, np.ndarray]) -> None:
    absent = int(np.setdiff1d(np.arange(TARGETS), made["rows"])[0])
    relevant = [{absent: 1.0} if row < 50 else known for row, known in enumerate(RELEVANT)]
    queries = JudgedVectors(made["queries"], relevant)
    report = upgrade_vectors(made["old"], made["sample"], made["rows"], queries=queries, options=OPTIONS)
    assert report.judgement.queries == 150 and "150 clean queries of 200" in report.head
    with pytest.raises(DataError, match="answer judged queries"):
        nothing = JudgedVectors(made["queries"], [{absent: 1.0}] * 200)
        upgrade_vectors(made["old"], made["sample"], made["rows"], queries=nothing, options=OPTIONS)


def test_judged_targets_are_corrected_by_fits_that_have_not_seen_them(made: dict[str, np.ndarray]) -> None:
    """Old vectors that say nothing of the new ones: a fit that has seen a pair would seem to find it all the same."""
    noise = np.random.default_rng(0).normal(size=(TARGETS, 400)).astype(np.float32)
    options = UpgradeOptions(kinds=("affine",), judging=JudgeOptions(resamples=200))
    report = upgrade_vectors(noise, made["sample"], made["rows"], options=options)
    assert report.judgement.means["corrected"]["recall@10"].high < 0.06  # 10 of 499 by chance: 0.02
    assert not report.go and abs(report.cosine.estimate) < 0.1


def test_own_row_is_no_neighbour(made: dict[str, np.ndarray]) -> None:
    inputs = load_vectors(made["old"], made["sample"], made["rows"], None)
    bench = VectorBench.of(inputs, JudgeOptions(), seed=0)
    for row, known in zip(bench.own, bench.relevant, strict=True):
        scores = made["sample"][np.argsort(made["rows"])] @ made["sample"][np.argsort(made["rows"])][row]
        scores[row] = -np.inf
        assert set(known) == set(np.argsort(-scores)[:10].tolist())
    assert (bench.rows(inputs.stale) != bench.own[:, None]).all()


def test_sizes_may_differ_and_nothing_depends_on_the_order_of_the_sample(made: dict[str, np.ndarray]) -> None:
    other = vectors(dim_old=32)
    options = UpgradeOptions(kinds=("affine", "mean_shift"), judging=JudgeOptions(resamples=200))
    report = upgrade_vectors(other["old"], other["sample"], other["rows"], options=options)
    assert "stale" not in report.judgement.per_query and "no map between vectors of different size" in report.table()
    turned = upgrade_vectors(other["old"], other["sample"][::-1], other["rows"][::-1], options=options)
    assert turned.judgement.means == report.judgement.means
    whole = upgrade_vectors(made["old"][:100], made["new"][:100], options=options)
    assert whole.fitted.rows == tuple(range(100))


def test_part_that_correction_serves_worst_is_named(made: dict[str, np.ndarray], tmp_path: Path) -> None:
    """Of a quarter of the targets the old vectors say little."""
    old, rng = made["old"].copy(), np.random.default_rng(0)
    worst = np.flatnonzero(made["new"][:, 0] > 0.13)
    old[worst] = 0.2 * old[worst] + rng.normal(size=old[worst].shape).astype(np.float32) * 0.2
    report = upgrade_vectors(old, made["sample"], made["rows"], options=OPTIONS)
    assert report.decision.decision == "re-embed first" and report.decision.exit_code == 4
    first = report.reembed_first
    assert len(first) and not np.isin(first, made["rows"]).any()
    assert np.isin(first, worst).mean() > 2 * len(worst) / TARGETS
    report.save(tmp_path / "out")
    assert np.array_equal(np.load(tmp_path / "out" / "reembed_first.npy"), first)
    more = fresh_array(made["new"][first], first)
    mixed = np.load(report.apply(tmp_path / "mixed.npy", fresh=more))
    known = np.concatenate([made["rows"], first])
    assert np.array_equal(mixed[known], made["new"][known])


def test_cache_of_vectors_is_taken_and_its_ids_noted(made: dict[str, np.ndarray], tmp_path: Path) -> None:
    fingerprint = EncoderFingerprint.of_precomputed("service-v1", normalize=True)
    ids = [f"t{row}" for row in range(TARGETS)]
    cache = TargetCache.from_arrays(tmp_path / "cache", made["old"], ids, fingerprint=fingerprint)
    report = upgrade_vectors(tmp_path / "cache", made["sample"], made["rows"], kind="affine", options=OPTIONS)
    report.save(tmp_path / "out")
    assert report.fitted.ids is not None and set(report.fitted.ids) == {f"t{row}" for row in made["rows"]}
    apply = ["apply", "--corrector", str(tmp_path / "out" / "corrector"), "--cache", str(cache.path), "--quiet"]
    assert main([*apply, "--output_dir", str(tmp_path / "new")]) == 0
    assert main([*apply, "--output_dir", str(tmp_path / "new.npy")]) == 0
    wanted = report.corrector.correct(made["old"])
    assert np.abs(np.load(tmp_path / "new.npy") - wanted).max() < 1e-6
    corrected = TargetCache.open(tmp_path / "new")
    assert np.abs(corrected.read(0, TARGETS).numpy() - wanted).max() < 1e-6
    with pytest.raises(CacheMismatchError, match="corrected ones"):
        upgrade_vectors(corrected, made["sample"], made["rows"], options=OPTIONS)


# ---------------------------------------------------------------------- what is refused


def broken(array: np.ndarray, row: int, value: float) -> np.ndarray:
    changed = array.copy()
    changed[row] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"old": lambda made: broken(made["old"], 7, np.nan)}, "old vectors, row 7.*NaN"),
        ({"old": lambda made: broken(made["old"], 7, 0.0)}, "old vectors, row 7.*norm of 0"),
        ({"sample": lambda made: broken(made["sample"], 3, np.inf)}, "new_sample, row 3.*infinite"),
        ({"sample": lambda made: made["sample"].astype(np.int64)}, "new_sample: expected floats"),
        ({"sample": lambda made: made["sample"][0]}, r"new_sample: expected floats.*shape \(24,\)"),
        ({"old": lambda made: made["old"][:0]}, "at least one vector"),
        ({"rows": lambda made: made["rows"][:-1]}, "500 different integers"),
        ({"rows": lambda made: np.zeros(SAMPLE, np.int64)}, "1 different"),
        ({"rows": lambda made: made["rows"] + TARGETS}, f"rows from 0 to {TARGETS - 1}"),
        ({"rows": lambda made: made["rows"].astype(float)}, "integers"),
        ({"rows": lambda made: None}, "Give the row of each new vector"),
        ({"sample": lambda made: made["sample"][:9], "rows": lambda made: made["rows"][:9]}, "at least 20"),
    ],
)
def test_vectors_that_cannot_be_are_refused_before_work(
    made: dict[str, np.ndarray], changes: dict[str, Any], message: str
) -> None:
    given = {**made, **{name: change(made) for name, change in changes.items()}}
    with pytest.raises(DataError, match=message):
        upgrade_vectors(given["old"], given["sample"], given["rows"], options=OPTIONS)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (lambda made: JudgedVectors(made["queries"][:, :5], RELEVANT), "queries: expected vectors of size 24"),
        (lambda made: JudgedVectors(made["queries"], RELEVANT[:9]), "queries: expected floats"),
        (lambda made: JudgedVectors(made["queries"], RELEVANT, made["queries"][:, :5]), "old queries"),
        (lambda made: JudgedVectors(made["queries"], [{TARGETS: 1.0}] * 200), "judgements of query 0"),
    ],
)
def test_queries_that_do_not_fit_are_refused(made: dict[str, np.ndarray], queries: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        upgrade_vectors(made["old"], made["sample"], made["rows"], queries=queries(made), options=OPTIONS)


def test_unknown_kind_is_refused(made: dict[str, np.ndarray]) -> None:
    with pytest.raises(ConfigurationError, match="kind"):
        upgrade_vectors(made["old"], made["sample"], made["rows"], kind="spline", options=OPTIONS)


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_pickles_are_never_opened(made: dict[str, np.ndarray], tmp_path: Path) -> None:
    mark, objects, plain, many = (tmp_path / name for name in ("mark", "objects.npy", "plain.npy", "many.npz"))
    np.save(objects, np.array([Evil(mark)], dtype=object), allow_pickle=True)
    plain.write_bytes(pickle.dumps(Evil(mark)))
    np.savez(many, made["old"])
    for path in (objects, plain, many):
        with pytest.raises(DataError, match=path.name):
            upgrade_vectors(path, made["sample"], made["rows"], options=OPTIONS)
    assert not mark.exists()


# ---------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def place(made: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for name, array in made.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "ids.txt").write_text("".join(f"t{row}\n" for row in range(TARGETS)))
    (folder / "sample_ids.txt").write_text("".join(f"t{row}\n" for row in made["rows"]))
    (folder / "rows.txt").write_text("".join(f"{row}\n" for row in made["rows"]))
    (folder / "query_ids.txt").write_text("".join(f"q{row}\n" for row in range(200)))
    head = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels.tsv").write_text(head + "".join(f"q{row}\tt{row}\t1\n" for row in range(200)))
    (folder / "qrels_rows.tsv").write_text("".join(f"{row}\t{row}\t1\n" for row in range(200)))
    return folder


def call(place: Path, out: Path, *more: str) -> int:
    fixed = ["--old", str(place / "old.npy"), "--new-sample", str(place / "sample.npy"), "--output_dir", str(out)]
    words = [str(place / word) if "." in word and not word.startswith("-") else word for word in more]
    return main(["upgrade", *fixed, "--kinds", "mean_shift", "affine", *words])


def test_command_decides_and_apply_writes_vectors(
    place: Path, made: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(place, tmp_path / "out", "--sample-rows", "rows.npy") == 0
    said = capsys.readouterr().out
    assert "Go: correct the index" in said and "no judged query" in said and "next: hf-corrector apply" in said
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["arguments"]["judged_by"] == "neighbours" and record["verdict"]["decision"] == "go"
    corrector, target = str(tmp_path / "out" / "corrector"), str(tmp_path / "corrected.npy")
    words = ["apply", "--corrector", corrector, "--cache", str(place / "old.npy"), "--output_dir", target, "--quiet"]
    fresh = ["--fresh", str(place / "sample.npy"), "--fresh_rows", str(place / "rows.txt")]
    assert main([*words, *fresh]) == 0
    assert "500 embedded anew" in (said := capsys.readouterr().out) and "note:" not in said
    corrected = np.load(target)
    assert np.array_equal(corrected[made["rows"]], made["sample"])
    left = np.setdiff1d(np.arange(TARGETS), made["rows"])
    wanted = NumpyCorrector.load(corrector).correct(made["old"][left])
    assert np.abs(corrected[left] - wanted).max() <= 1e-5
    assert main(words) == 1 and "a new .npy file" in capsys.readouterr().err
    part = tmp_path / "part.npy"
    np.save(part, made["old"][:50].astype(np.float64))
    words = ["apply", "--corrector", corrector, "--cache", str(part), "--output_dir", str(tmp_path / "half.npy")]
    assert main([*words, "--cache_dtype", "float16", "--quiet"]) == 0
    assert "must come from the same old encoder" in capsys.readouterr().out
    half = np.load(tmp_path / "half.npy")
    assert half.dtype == np.float16
    model = CorrectorModel.from_pretrained(corrector)
    assert np.abs(half - model.correct(made["old"][:50])).max() < 1e-3


@pytest.mark.parametrize(
    "words",
    [
        ("--sample_rows", "rows.txt", "--qrels", "qrels_rows.tsv"),
        ("--sample_ids", "sample_ids.txt", "--ids", "ids.txt", "--query_ids", "query_ids.txt", "--qrels", "qrels.tsv",
         "--old_queries", "old_queries.npy"),
    ],
    ids=["rows", "ids"],
)  # fmt: skip
def test_command_takes_judged_queries_by_row_or_id(
    place: Path, words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(place, tmp_path / "out", *words, "--queries", "queries.npy") == 0
    said = capsys.readouterr().out
    assert "200 clean queries" in said and ("old model kept  " in said) == ("--old_queries" in words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sample_rows", "rows.txt", "--queries", "queries.npy"), "--queries and --qrels"),
        (("--sample_ids", "sample_ids.txt"), "--ids"),
        (("--sample_rows", "ids.txt"), "line 1: expected a row number"),
        (("--sample_rows", "old.npy"), "expected integers"),
        (("--sample_rows", "rows.npy", "--queries", "queries.npy", "--qrels", "qrels.tsv"), "got 'q0'"),
    ],
)
def test_command_explains_what_is_missing(
    place: Path, words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(place, tmp_path / "out", *words) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_of_the_command_for_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--new_sample", "--help"], ["--new-sample", "--help"]):
        with pytest.raises(SystemExit) as stopped:
            main(["upgrade", *words])
        assert stopped.value.code == 0 and "--old_queries" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got no such file\. Check the name"):
        load_array(tmp_path / "missing.npy")
