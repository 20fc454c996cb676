"""Which queries a record shows, and how much of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_corrector.evaluation.evaluator import SHOWN, Judgement, JudgeOptions, judge
from hf_corrector.evaluation.examples import (
    EXTREME,
    ID_CHARS,
    QUERY_CHARS,
    RANDOM,
    TEXT_CHARS,
    judged_examples,
)
from hf_corrector.index.base import TensorVectors

QUERIES, TARGETS = 40, 60
CORPUS = Dataset.from_dict({
    "id": [f"t{row}" + "x" * 200 for row in range(TARGETS)],
    "text": [f"text {row}\n" + "word " * 5000 for row in range(TARGETS)], "metadata": ["{}"] * TARGETS,
})  # fmt: skip
SPLIT = Dataset.from_dict({"query": [f"query {row} " + "long " * 500 for row in range(QUERIES)]})
RELEVANT = [{row: 1.0} for row in range(QUERIES)]


def judged(*, clean: bool = True, without: str = "") -> Judgement:
    """Judge an index that correction helps for some queries and harms for others."""
    generator = torch.Generator().manual_seed(3)
    fresh = torch.nn.functional.normalize(torch.randn(TARGETS, 12, generator=generator), dim=1)
    noise = [torch.randn(TARGETS, 12, generator=generator) for _ in range(2)]
    conditions = {
        "stale": (fresh[:QUERIES], TensorVectors(fresh + 0.5 * noise[0])),
        "corrected": (fresh[:QUERIES], TensorVectors(fresh + 0.45 * noise[1])),
        "fresh": (fresh[:QUERIES], TensorVectors(fresh)),
    }
    conditions.pop(without, None)
    mask = np.arange(QUERIES) % 4 > 0 if clean else np.zeros(QUERIES, dtype=np.bool_)
    return judge(conditions, RELEVANT, clean=mask, options=JudgeOptions(resamples=20))


def test_examples_are_drawn_at_random_then_the_worst_then_the_best() -> None:
    judgement = judged()
    found = judged_examples(judgement, RELEVANT, split=SPLIT, corpus=CORPUS, seed=7)
    values = {name: judgement.per_query[name]["mrr@10"] for name in ("stale", "corrected")}
    gains = (values["corrected"] - values["stale"])[judgement.clean]
    assert found["queries"] == int(judgement.clean.sum()) == 30
    assert found["helped"] == int((gains > 0).sum()) > EXTREME
    assert found["harmed"] == int((gains < 0).sum()) > EXTREME
    assert [one["chosen"] for one in found["shown"]] == (
        ["drawn at random"] * RANDOM + ["harmed most"] * EXTREME + ["helped most"] * EXTREME
    )
    queries = [int(one["query"].split()[1]) for one in found["shown"]]
    assert len(set(queries)) == len(queries) and all(judgement.clean[one] for one in queries)
    left = [one for one in np.flatnonzero(judgement.clean) if one not in queries[:RANDOM]]
    change = values["corrected"] - values["stale"]
    assert sorted(change[queries[RANDOM:-EXTREME]]) == sorted(np.sort(change[left])[:EXTREME])
    assert sorted(change[queries[-EXTREME:]]) == sorted(np.sort(change[left])[-EXTREME:])
    for one, query in zip(found["shown"], queries, strict=True):
        assert one["values"]["stale"] == values["stale"][query]
        assert one["relevant_count"] == 1 and one["relevant"][0]["id"].startswith(f"t{query}x")
        first = one["results"]["fresh"][0]
        assert first["relevant"] and first["id"].startswith(f"t{query}x")


def test_the_draw_follows_the_seed() -> None:
    def queries(seed: int) -> list[str]:
        found = judged_examples(judged(), RELEVANT, split=SPLIT, corpus=CORPUS, seed=seed)
        return [one["query"] for one in found["shown"]]

    assert queries(1) == queries(1) != queries(2)


def test_examples_are_small_whatever_the_texts() -> None:
    found = judged_examples(judged(), RELEVANT, split=SPLIT, corpus=CORPUS, seed=0)
    for one in found["shown"]:
        assert len(one["query"]) == QUERY_CHARS and one["query"].endswith("…")
        for results in one["results"].values():
            assert len(results) == SHOWN
            for result in results:
                assert len(result["text"]) == TEXT_CHARS and "\n" not in result["text"]
                assert len(result["id"]) == ID_CHARS


def test_without_clean_queries_the_rule_says_so() -> None:
    found = judged_examples(judged(clean=False), RELEVANT, split=SPLIT, corpus=CORPUS, seed=0)
    assert "none is clean" in found["rule"] and found["queries"] == QUERIES


@pytest.mark.parametrize(("without", "against"), [("stale", "fresh"), ("corrected", None)])
def test_examples_compare_with_what_there_is(without: str, against: str | None) -> None:
    found = judged_examples(judged(without=without), RELEVANT, split=SPLIT, corpus=CORPUS, seed=0)
    assert found.get("against") == against
