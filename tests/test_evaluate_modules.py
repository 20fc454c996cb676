"""The metrics as modules of the evaluate library: loaded by import and by path, offline, equal to trec_eval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.evaluation.modules import module_path
from hf_corrector.evaluation.modules.base import RankingMetric
from hf_corrector.evaluation.modules.mrr_at_k.mrr_at_k import MrrAtK
from hf_corrector.evaluation.modules.ndcg_at_k.ndcg_at_k import NdcgAtK
from hf_corrector.evaluation.modules.recall_at_k.recall_at_k import RecallAtK
from hf_corrector.evaluation.modules.success_at_k.success_at_k import SuccessAtK

Runs = list[dict[str, float]]
Judgements = list[dict[str, int]]
MODULES = {"ndcg": NdcgAtK, "recall": RecallAtK, "success": SuccessAtK, "mrr": MrrAtK}


def make(kind: type[RankingMetric], folder: Path) -> RankingMetric:
    return kind(cache_dir=str(folder))


def random_runs(seed: int, *, ties: bool = False) -> tuple[Runs, Judgements]:
    generator = np.random.default_rng(seed)
    runs, judgements = [], []
    for _ in range(25):
        found = generator.choice(80, size=int(generator.integers(0, 60)), replace=False)
        scores = generator.integers(0, 6, size=len(found)) if ties else generator.permutation(len(found))
        runs.append({f"d{row}": float(score) for row, score in zip(found, scores, strict=True)})
        judged = generator.choice(80, size=int(generator.integers(1, 20)), replace=False)
        grades = [1, *generator.integers(0, 4, size=len(judged) - 1)]
        judgements.append({f"d{row}": int(grade) for row, grade in zip(judged, grades, strict=True)})
    return runs, judgements


def trec_eval(runs: Runs, judgements: Judgements, measure: str) -> float:
    """Return pytrec_eval's mean over all judged queries, those without results counting 0 as in trec_eval -c."""
    evaluator = pytrec_eval.RelevanceEvaluator({str(i): judged for i, judged in enumerate(judgements)}, {measure})
    results = evaluator.evaluate({str(i): run for i, run in enumerate(runs)})
    return sum(values[measure.replace(".", "_")] for values in results.values()) / len(runs)


def ranked(runs: Runs) -> list[list[str]]:
    return [sorted(run, key=lambda target: -run[target]) for run in runs]


@pytest.mark.parametrize(("label", "measure"), [("ndcg", "ndcg_cut"), ("recall", "recall"), ("success", "success")])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_trec_eval_at_every_cut_off(label: str, measure: str, seed: int, tmp_path: Path) -> None:
    runs, judgements = random_runs(seed)
    cuts = [1, 5, 10, 100]
    result = make(MODULES[label], tmp_path).compute(predictions=ranked(runs), references=judgements, k=cuts)
    assert list(result) == [f"{label}@{k}" for k in cuts]
    for k in cuts:
        assert result[f"{label}@{k}"] == pytest.approx(trec_eval(runs, judgements, f"{measure}.{k}"), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_runs_are_ranked_as_trec_eval_ranks_them(ties: bool, tmp_path: Path) -> None:
    runs, judgements = random_runs(3, ties=ties)
    mrr = make(MrrAtK, tmp_path).compute(predictions=runs, references=judgements, k=100)
    assert mrr["mrr@100"] == pytest.approx(trec_eval(runs, judgements, "recip_rank"), abs=1e-12)
    ndcg = make(NdcgAtK, tmp_path).compute(predictions=runs, references=judgements)
    assert ndcg["ndcg@10"] == pytest.approx(trec_eval(runs, judgements, "ndcg_cut.10"), abs=1e-12)


def test_both_forms_of_references_and_adding_one_by_one_agree(tmp_path: Path) -> None:
    runs, judgements = random_runs(4)
    records = [[{"id": target, "grade": grade} for target, grade in judged.items()] for judged in judgements]
    expected = make(NdcgAtK, tmp_path).compute(predictions=ranked(runs), references=judgements)
    assert make(NdcgAtK, tmp_path).compute(predictions=ranked(runs), references=records) == expected
    single = make(NdcgAtK, tmp_path)
    for ids, judged in zip(ranked(runs), judgements, strict=True):
        single.add(prediction=ids, reference=judged)
    assert single.compute(k=10) == expected
    batched = make(NdcgAtK, tmp_path)
    batched.add_batch(predictions=ranked(runs)[:10], references=judgements[:10])
    batched.add_batch(predictions=ranked(runs)[10:], references=records[10:])
    assert batched.compute() == expected


def test_a_query_without_results_or_relevant_targets_counts_zero(tmp_path: Path) -> None:
    result = make(SuccessAtK, tmp_path).compute(
        predictions=[["a"], [], ["a"], ["a"]], references=[{"a": 1}, {"a": 1}, {}, {"a": 0}]
    )
    assert result == {"success@10": 0.25}


def test_inputs_that_would_give_a_wrong_number_are_refused(tmp_path: Path) -> None:
    for predictions, references in (
        ([["a", "a"]], [{"a": 1}]),
        ([[1]], [{"1": 1}]),
        (["ab"], [{"a": 1}]),
        ([["a"]], [{1: 1}]),
        ([["a"]], [[{"id": "a", "grade": 1}, {"id": "a", "grade": 2}]]),
        ([["a"], ["b"]], [{"a": 1}]),
        ([["a"]], [{"a": float("nan")}]),
        ([], []),
    ):
        with pytest.raises(DataError):
            make(NdcgAtK, tmp_path).compute(predictions=predictions, references=references)
    with pytest.raises(ConfigurationError):
        make(NdcgAtK, tmp_path).compute(predictions=[["a"]], references=[{"a": 1}], k=0)


LOAD_ALL = """
import json, sys
import evaluate
runs, judgements = json.load(sys.stdin)
scores = {}
for path in sys.argv[1:]:
    scores |= evaluate.load(path).compute(predictions=runs, references=judgements, k=10)
print(json.dumps(scores))
"""


def test_all_load_by_path_without_network_and_equal_the_imported_ones(tmp_path: Path) -> None:
    runs, judgements = random_runs(5)
    expected: dict[str, float] = {}
    for kind in MODULES.values():
        expected |= make(kind, tmp_path).compute(predictions=ranked(runs), references=judgements)
    folders = [module_path(name) for name in ("ndcg_at_k", "recall_at_k", "success_at_k", "mrr_at_k")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_EVALUATE_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, *folders],
        input=json.dumps([ranked(runs), judgements]), capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
