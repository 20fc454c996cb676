"""Given negatives, a teacher's scores and answers in splits: checked; the first two read as rows."""

import pickle
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset, Features, LargeList, List, Value

from hf_corrector.data.datasets import RetrievalData, validate
from hf_corrector.data.judgements import given_negatives_as_rows, teacher_scores_as_rows
from hf_corrector.data.retrieval import TARGET_FEATURES, with_optional_columns
from hf_corrector.errors import DataError

CORPUS = Dataset.from_dict(
    {"id": ["a", "b", "c", "d"], "text": ["A", "B", "C", "D"], "metadata": ["{}"] * 4}, features=TARGET_FEATURES
)


def split(**columns: list[Any]) -> Dataset:
    return with_optional_columns(
        Dataset.from_dict(
            {"query_id": ["q1", "q2"], "query": ["one?", "two?"], "positive_ids": [["a", "b"], ["c"]], **columns}
        )
    )


def data(**columns: list[Any]) -> RetrievalData:
    return RetrievalData(corpus=CORPUS, train=split(**columns), dev=None, test=None)


def test_given_negatives_are_rows_in_the_order_of_their_lists() -> None:
    negatives = given_negatives_as_rows(split(negative_ids=[["d", "c"], []]), CORPUS)
    assert len(negatives) == 2 and negatives[0] == [3, 2] and negatives[1] == negatives[-1] == []
    assert negatives[:] == list(negatives) == [[3, 2], []]
    assert negatives.rows.tolist() == [3, 2] and negatives.offsets.tolist() == [0, 2, 2]
    assert pickle.loads(pickle.dumps(negatives))[:] == negatives[:]
    with pytest.raises(IndexError):
        negatives[2]


def test_teacher_scores_are_by_row_for_positives_and_negatives() -> None:
    scored = split(negative_ids=[["d", "c"], ["a"]], positive_scores=[[3.0, None], []], negative_scores=[[1, -2], None])
    scores = teacher_scores_as_rows(scored, CORPUS)
    assert scores[:] == list(scores) == [{0: 3.0, 3: 1.0, 2: -2.0}, {}]
    assert len(scores) == 2 and scores[-2] == scores[0]
    assert pickle.loads(pickle.dumps(scores))[:] == scores[:]


def test_splits_without_the_columns_have_nothing_to_say() -> None:
    assert given_negatives_as_rows(split(), CORPUS)[:] == [[], []]
    assert teacher_scores_as_rows(split(), CORPUS)[:] == [{}, {}]
    assert teacher_scores_as_rows(split(negative_ids=[["d"], ["d"]]), CORPUS)[:] == [{}, {}]
    assert given_negatives_as_rows(split().select([]), CORPUS)[:] == []


def test_unknown_ids_are_refused_where_rows_are_asked_for() -> None:
    with pytest.raises(DataError, match="split, row 1: expected negative_ids of the corpus; got 'x'"):
        given_negatives_as_rows(split(negative_ids=[[], ["x"]]), CORPUS)
    with pytest.raises(DataError, match="split, row 0: expected negative_ids of the corpus; got 'x'"):
        teacher_scores_as_rows(split(negative_ids=[["x"], []], negative_scores=[[1.0], []]), CORPUS)


@pytest.mark.parametrize(
    "columns",
    [
        {"negative_ids": [["d", "c"], []]},
        {"negative_ids": [[], []]},
        {"negative_ids": [None, None]},
        {"negative_ids": [["d"], None], "positive_scores": [[], []], "negative_scores": [[1], []]},
        {"negative_ids": [["d"], ["a"]], "positive_scores": [[1.0, None], []], "negative_scores": [[None], [0.5]]},
        {"positive_scores": [[1.0, 2.0], [3.0]]},
        {"answers": [["one", "1"], []]},
        {"answers": [None, ["two"]]},
        {"answers": [[], []]},
    ],
)
def test_optional_columns_may_be_empty_or_absent(columns: dict[str, list[Any]]) -> None:
    validate(data(**columns))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"negative_ids": [["d"], ["c"]]}, "train, row 1: expected negative_ids that are not positive_ids; got 'c' in"),
        (
            {"negative_ids": [["x"], []]},
            "train, row 0: expected negative_ids of the corpus; got 'x'.* from the negatives",
        ),
        ({"negative_ids": [[None], []]}, "train, row 0: expected negative_ids of the corpus; got None"),
        ({"negative_ids": [["d", "d"], []]}, "train, row 0: expected distinct negative_ids"),
        ({"negative_ids": ["d", "d"]}, "train, column 'negative_ids': expected List"),
        ({"negative_ids": [[1], [2]]}, "train, column 'negative_ids': expected List"),
        (
            {"positive_scores": [[1.0], [1.0]]},
            "row 0: expected as many positive_scores as positive_ids, or none; got 1 for 2",
        ),
        ({"negative_ids": [["d"], []], "negative_scores": [[1.0, 2.0], []]}, "row 0: .*negative_scores.* got 2 for 1"),
        (
            {"negative_scores": [[], [1.0]]},
            "row 1: expected as many negative_scores as negative_ids, or none; got 1 for 0",
        ),
        ({"positive_scores": [[], [float("nan")]]}, "row 1: expected finite positive_scores; got nan"),
        ({"positive_scores": [[1.0, float("inf")], []]}, "row 0: expected finite positive_scores; got inf"),
        ({"positive_scores": [["1", "2"], []]}, "column 'positive_scores': expected List"),
        ({"answers": ["one", "two"]}, "train, column 'answers': expected List"),
        ({"answers": [[1], [2]]}, "train, column 'answers': expected List"),
        ({"answers": [["one"], ["two", " "]]}, "train, row 1: expected text in every one of the answers; got ' '"),
        ({"answers": [[None], ["two"]]}, "train, row 0: expected text in every one of the answers; got None"),
    ],
)
def test_columns_that_contradict_each_other_are_refused_with_the_row(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        validate(data(**columns))
    assert caught.value.cure


def test_large_lists_and_small_floats_are_columns_too() -> None:
    plain = split(negative_ids=[["d"], []], negative_scores=[[0.5], []])
    features = Features(
        {
            **plain.features,
            "negative_ids": LargeList(Value("large_string")),
            "negative_scores": List(Value("float32")),
        }
    )
    large = plain.cast(features)
    validate(replace(data(), train=large))
    assert given_negatives_as_rows(large, CORPUS)[:] == [[3], []]
    assert teacher_scores_as_rows(large, CORPUS)[:] == [{3: 0.5}, {}]
