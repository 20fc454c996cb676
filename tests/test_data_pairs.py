import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from hf_corrector.data.datasets import RetrievalData, from_pairs, positives_as_rows, validate
from hf_corrector.data.judgements import given_negatives_as_rows
from hf_corrector.errors import ConfigurationError, DataError


def pairs_dataset(rows: int = 200) -> Dataset:
    return Dataset.from_dict(
        {
            "question": [f"question number {row % 150}" for row in range(rows)],
            "answer": [f"answer {row % 90}" for row in range(rows)],
            "wrong": [f"wrong {row % 70}" for row in range(rows)],
        }
    )


def all_queries(data: RetrievalData) -> list[str]:
    return [query for split in data.splits.values() for query in split["query"]]


def test_pairs_become_distinct_queries_and_targets() -> None:
    data = from_pairs(pairs_dataset(), dev_fraction=0.1, test_fraction=0.2)
    validate(data)
    assert sorted(data.corpus["text"]) == sorted({f"answer {n}" for n in range(90)} | {f"wrong {n}" for n in range(70)})
    assert sorted(all_queries(data)) == sorted(f"question number {n}" for n in range(150))
    sizes = {name: len(split) for name, split in data.splits.items()}
    assert 5 <= sizes["dev"] <= 30 and 15 <= sizes["test"] <= 45


def test_equal_queries_collect_their_positives() -> None:
    data = from_pairs(
        Dataset.from_dict({"b": ["who?", "who? ", "what?"], "a": ["she", "he", "she"]}), dev_fraction=0, test_fraction=0
    )
    assert data.train is not None and data.dev is None and data.test is None
    assert positives_as_rows(data.train, data.corpus) == [{0: 1.0, 1: 1.0}, {0: 1.0}]


def test_split_of_a_query_depends_on_its_text_and_the_seed_only() -> None:
    def split_of(data: RetrievalData) -> dict[str, str]:
        return {query: name for name, split in data.splits.items() for query in split["query"]}

    few, many = split_of(from_pairs(pairs_dataset(100))), split_of(from_pairs(pairs_dataset(200)))
    assert all(many[query] == name for query, name in few.items())
    shuffled = split_of(from_pairs(pairs_dataset(200).shuffle(seed=3)))
    assert shuffled == many
    assert split_of(from_pairs(pairs_dataset(200), seed=7)) != many


def test_queries_that_differ_in_case_and_spacing_share_a_split() -> None:
    texts = [f"Question {n}" for n in range(60)]
    variants = [f"  question   {n} " for n in range(60)]
    pairs = Dataset.from_dict({"a": texts + variants, "b": ["x"] * 120})
    for split in from_pairs(pairs, dev_fraction=0.3, test_fraction=0.3).splits.values():
        normalised = [" ".join(query.split()).lower() for query in split["query"]]
        assert all(normalised.count(query) == 2 for query in normalised)


def test_labels_of_zero_make_negatives() -> None:
    pairs = Dataset.from_dict({"label": [1, 0, 0], "a": ["q", "q", "r"], "b": ["yes", "no", "never"]})
    data = from_pairs(pairs, dev_fraction=0, test_fraction=0)
    assert data.corpus["text"][:] == ["yes", "no", "never"]
    assert data.train is not None and positives_as_rows(data.train, data.corpus) == [{0: 1.0}]
    assert data.notes == ("queries dropped for want of a positive target: 1",)
    assert given_negatives_as_rows(data.train, data.corpus)[:] == [[1]]


def test_negatives_of_a_row_become_given_negatives_of_its_query() -> None:
    rows = {
        "anchor": ["q", "r", "q"],
        "positive": ["x", "y", "z"],
        "negative_1": ["a", "b", "x"],
        "negative_2": ["b", "a", "b"],
    }
    data = from_pairs(Dataset.from_dict(rows), dev_fraction=0, test_fraction=0)
    validate(data)
    assert data.corpus["text"][:] == ["x", "a", "b", "y", "z"] and data.train is not None
    assert positives_as_rows(data.train, data.corpus) == [{0: 1.0, 4: 1.0}, {3: 1.0}]
    assert given_negatives_as_rows(data.train, data.corpus)[:] == [[1, 2], [2, 1]]
    assert data.notes == ("given negatives dropped because they answer the same query: 1",)


def test_pairs_without_negatives_have_no_column_of_them() -> None:
    data = from_pairs(Dataset.from_dict({"a": ["q"], "b": ["x"]}), dev_fraction=0, test_fraction=0)
    assert data.train is not None
    assert data.train.column_names == ["query_id", "query", "positive_ids", "positive_grades", "metadata"]


def test_every_split_keeps_the_negatives_of_its_queries() -> None:
    data = from_pairs(pairs_dataset(), dev_fraction=0.2, test_fraction=0.2)
    validate(data)
    for split in data.splits.values():
        text_of = dict(zip(data.corpus["id"], data.corpus["text"], strict=True))
        assert all(text_of[one].startswith("wrong") for ids in split["negative_ids"] for one in ids)
        assert all(ids for ids in split["negative_ids"])


def test_missing_negatives_are_left_out() -> None:
    pairs = Dataset.from_dict({"a": ["q", "r"], "b": ["x", "y"], "negative_1": [None, "z"], "negative_2": ["", " "]})
    assert from_pairs(pairs, dev_fraction=0, test_fraction=0).corpus["text"][:] == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": ["x"]}, "expected query, positive"),
        ({"a": ["x"], "b": ["y"], "label": [0.7]}, r"row 0: expected 0 or 1 in 'label'; got 0\.7"),
        ({"a": ["x"], "b": ["y"], "label": [2]}, "expected 0 or 1 in 'label'; got 2"),
        ({"a": ["x"], "b": ["y"], "label": [None]}, "expected 0 or 1 in 'label'; got None"),
        ({"a": ["x"], "b": ["y"], "c": ["z"], "score": [1]}, "expected query, positive"),
        ({"a": ["x"], "b": ["y"], "label": [1], "score": [1]}, "expected query, positive"),
        ({"a": ["x"], "b": [["y", "z"]]}, "column 'b': expected strings"),
        ({"a": ["x"], "b": [3]}, "column 'b': expected strings"),
        ({"id": ["1"], "a": ["x"], "b": ["y"]}, r"Drop \['id'\] with remove_columns"),
        ({"query_id": ["1"], "positive_id": ["2"]}, r"where ids stand for texts"),
        ({"a": ["x"], "b": ["y"], "dataset_name": ["z"]}, r"Drop \['dataset_name'\]"),
        ({"a": ["x", " "], "b": ["y", "y"]}, "row 1: expected text in 'a'; got none"),
        ({"a": ["x", "y"], "b": ["y", None]}, "row 1: expected text in 'b'; got none"),
    ],
)
def test_columns_that_are_no_pairs_are_refused(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_pairs(Dataset.from_dict(columns), dev_fraction=0, test_fraction=0)


def test_named_classes_are_refused_because_their_order_says_nothing() -> None:
    features = Features({"a": Value("string"), "b": Value("string"), "label": ClassLabel(names=["same", "other"])})
    pairs = Dataset.from_dict({"a": ["x"], "b": ["y"], "label": [0]}, features=features)
    with pytest.raises(DataError, match=r"the classes \['same', 'other'\]"):
        from_pairs(pairs)


def test_fractions_and_containers_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="sum is below 1"):
        from_pairs(pairs_dataset(), dev_fraction=0.5, test_fraction=0.5)
    with pytest.raises(ConfigurationError, match="numbers from 0"):
        from_pairs(pairs_dataset(), dev_fraction=-0.1)
    with pytest.raises(ConfigurationError, match="got nan"):
        from_pairs(pairs_dataset(), dev_fraction=float("nan"))
    with pytest.raises(DataError, match="got DatasetDict"):
        from_pairs(DatasetDict({"train": pairs_dataset()}))
    with pytest.raises(DataError, match="expected queries to train on"):
        from_pairs(pairs_dataset().select([]))
