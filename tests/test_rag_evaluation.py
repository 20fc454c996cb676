"""Judging a reader under stale, corrected and fresh targets: each metric by hand, clean questions, a trained run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rag_helpers import question_data, rag_of, rag_trainer

from hf_corrector.answers import contains_answer, exact_match, f1
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import TensorVectors
from hf_corrector.metrics import Interval
from hf_corrector.rag.evaluation import METRICS, ReadingOptions, compare_reading, judge_reading, judge_trained
from hf_corrector.rag.generation import GenerationOptions
from hf_corrector.rag.passages import NearestPassages, closed_book

TARGETS, _, TEST = question_data()
OPTIONS = ReadingOptions(num_passages=3, resamples=50, generation=GenerationOptions(batch_size=8))


@pytest.fixture(scope="module")
def model(tiny_encoder: str) -> Any:
    return rag_of(tiny_encoder, "bert2bert", answer_max_length=6)


@pytest.fixture(scope="module")
def views(model: Any) -> dict[str, TensorVectors]:
    fresh = model.retriever.encode_target(TARGETS["text"][:])
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))
    return {
        "stale": TensorVectors(fresh + 0.5 * noise), "corrected": TensorVectors(fresh + 0.1 * noise),
        "fresh": TensorVectors(fresh),
    }  # fmt: skip


def test_every_metric_is_what_it_says(model: Any, views: dict[str, TensorVectors]) -> None:
    judged = judge_reading(model, TEST, TARGETS, views, options=OPTIONS)
    assert judged.questions == judged.clean_questions == len(TEST) and judged.query_passes == 7 * len(TEST)
    texts, answers = TEST["query"][:], TEST["answers"][:]
    for name, view in views.items():
        find, found = (
            NearestPassages(view, model.reader.passages(TARGETS["text"][:]), k=3),
            judged.per_question[name],
        )
        weighed = model.answer_log_likelihoods(texts, [one[0] for one in answers], find)
        np.testing.assert_allclose(found["answer_log_likelihood"], weighed.marginal.numpy(), rtol=1e-5)
        per_token = float(weighed.marginal.sum() / weighed.answer_tokens.sum())
        assert found["answer_log_likelihood_per_token"].mean() == pytest.approx(per_token, rel=1e-5)
        written = model.generate(texts, find)
        for row, (one, known) in enumerate(zip(written, answers, strict=True)):
            assert found["exact_match"][row] == exact_match(one.best.text, known)
            assert found["f1"][row] == f1(one.best.text, known)
            passage = TARGETS["text"][one.passage_row]
            assert found["attribution"][row] == contains_answer(passage, [one.best.text])
        near = (model.retriever.encode_query(texts) @ view.tensor.T).topk(10).indices.tolist()
        gold = [int(ids[0][1:]) in own for ids, own in zip(TEST["positive_ids"], near, strict=True)]
        assert found["gold_recall@10"].tolist() == gold


@pytest.mark.parametrize(("k", "method"), [(3, "thorough"), (100, "thorough"), (3, "fast")])
def test_prompts_are_counted_as_the_reader_gets_them(
    model: Any, views: dict[str, TensorVectors], k: int, method: str
) -> None:
    """Against the rows of what goes into the reader, which for a written answer are those of its encoder."""
    seen, split = list[int](), TEST.select(range(4))
    encoder = model.generator.get_encoder()
    hook = encoder.register_forward_hook(
        lambda module, given, kept, out: seen.append(len(kept["input_ids"])), with_kwargs=True
    )
    options = ReadingOptions(num_passages=k, resamples=2, generation=GenerationOptions(method, batch_size=8))
    try:
        judged = judge_reading(model, split, TARGETS, {"stale": views["stale"], "closed": None}, options=options)
    finally:
        hook.remove()
    assert judged.reader_passes == sum(seen) >= 4 * (2 * min(k, len(TARGETS)) if method == "thorough" else k + 2)


def test_intervals_are_paired_over_clean_questions_only(model: Any, views: dict[str, TensorVectors]) -> None:
    gold = [int(ids[0][1:]) for ids in TEST["positive_ids"]]
    judged = judge_reading(
        model, TEST, TARGETS, {**views, "corrected": views["stale"]}, fitted_rows=np.array(gold[:5]), options=OPTIONS
    )
    assert judged.clean_questions == len(TEST) - 5
    assert all(one == Interval(0.0, 0.0, 0.0) for one in judged.differences["corrected-stale"].values())
    for name in views:
        values = judged.per_question[name]["answer_log_likelihood"]
        assert judged.means[name]["answer_log_likelihood"].estimate == pytest.approx(values[5:].mean())
        assert judged.all_questions[name]["answer_log_likelihood"] == pytest.approx(values.mean())
    gap = judged.differences["corrected-fresh"]["answer_log_likelihood"]
    assert gap.low <= gap.estimate <= gap.high and gap.low < gap.high
    written = json.loads(json.dumps(judged.to_dict(), allow_nan=False))
    assert set(written) >= {"stale", "corrected", "fresh", "clean_questions", "questions", "intervals", "differences"}
    assert set(written["fresh"]) == set(METRICS)
    lines = judged.table().splitlines()
    assert lines[0] == "7 clean of 12 questions; mean and 95 % interval" and lines[2].startswith("stale")


def test_where_no_question_is_clean_nothing_is_claimed(model: Any, views: dict[str, TensorVectors]) -> None:
    rows = np.arange(len(TARGETS))
    judged = judge_reading(model, TEST, TARGETS, {"stale": views["stale"]}, fitted_rows=rows, options=OPTIONS)
    assert judged.clean_questions == 0 and judged.means == {}
    assert set(judged.to_dict()["stale"].values()) == {None}
    assert "flatters" in judged.table().splitlines()[0] and len(judged.table().splitlines()) == 3


def test_closed_book_retrieves_nothing(model: Any) -> None:
    judged = judge_reading(model, TEST, TARGETS, {"closed": None}, options=OPTIONS)
    values = judged.per_question["closed"]
    assert not values["gold_recall@10"].any() and not values["attribution"].any()
    weighed = model.answer_log_likelihoods(TEST["query"][:], [one[0] for one in TEST["answers"]], closed_book)
    np.testing.assert_allclose(values["answer_log_likelihood"], weighed.marginal.numpy(), rtol=1e-5)


def test_recovery_is_of_known_values() -> None:
    values = {
        name: {metric: np.full(8, level) + np.arange(8) for metric in METRICS}
        for name, level in (("stale", 0.0), ("corrected", 3.0), ("fresh", 4.0))
    }
    judged = compare_reading(values, clean=np.ones(8, dtype=bool), options=OPTIONS)
    assert judged.recovery["corrected"]["f1"] == Interval(0.75, 0.75, 0.75)
    assert judged.differences["fresh-stale"]["f1"] == Interval(4.0, 4.0, 4.0)


def test_a_trained_run_is_judged_on_clean_questions_and_its_passes_counted(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = rag_trainer(rag_of(tiny_encoder, "bert2bert", answer_max_length=6), tmp_path / "out", max_steps=2)
    trainer.hold_out(TEST)
    trainer.train()
    before = dict(trainer.cost)
    judged = judge_trained(trainer, TEST, options=OPTIONS)
    assert list(judged.means) == ["stale", "corrected", "fresh"] and judged.clean_questions == len(TEST)
    spent = {name: trainer.cost[name] - before[name] for name in before if trainer.cost[name] != before[name]}
    assert spent == {
        "query_passes": 7 * len(TEST), "final_target_passes": len(TARGETS), "reader_passes": judged.reader_passes
    }  # fmt: skip
    assert judge_trained(trainer, TEST).means["stale"]["f1"].low >= 0
    reader_alone = {"objective": "generator_only", "num_passages": 0}
    closed = rag_trainer(rag_of(tiny_encoder, answer_max_length=6), tmp_path / "closed", **reader_alone)
    with pytest.raises(ConfigurationError, match="expected a cache"):
        judge_trained(closed, TEST)


def test_what_does_not_fit_is_refused_before_anything_is_read(model: Any, views: dict[str, TensorVectors]) -> None:
    with pytest.raises(ConfigurationError, match="expected a column positive_ids"):
        judge_reading(model, TEST.remove_columns("positive_ids"), TARGETS, views)
    with pytest.raises(DataError, match="answers"):
        judge_reading(model, TEST.remove_columns("answers"), TARGETS, views)
    with pytest.raises(ConfigurationError, match="of 47 vectors each"):
        judge_reading(model, TEST, TARGETS.select(range(47)), views)
    with pytest.raises(ConfigurationError, match="at least one"):
        judge_reading(model, TEST, TARGETS, {})
    long = TEST.map(lambda one: {"answers": ["list all files and remove the old archive of the disk"]})
    with pytest.raises(DataError, match="answer_max_length"):
        judge_reading(model, long, TARGETS, views)
    with pytest.raises(ConfigurationError, match="one of"):
        ReadingOptions(language="de")
    with pytest.raises(ConfigurationError, match="num_passages"):
        ReadingOptions(num_passages=0)
