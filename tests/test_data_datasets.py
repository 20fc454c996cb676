import json
import logging
import os
from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from hf_corrector.data.datasets import (
    RetrievalData,
    load_retrieval_data,
    positives_as_rows,
    texts_hash,
    validate,
)
from hf_corrector.data.retrieval import given_answers
from hf_corrector.errors import ConfigurationError, DataError

CORPUS = [
    {"_id": "d1", "title": "Coffee", "text": "is brewed."},
    {"_id": "d2", "title": "", "text": " Tea is steeped. "},
    {"_id": "d3", "text": "Milk", "metadata": {"site": "dairy"}, "year": 2001},
]
QUERIES = [
    {"_id": "q1", "text": "How is coffee made?", "answers": ["brewed"], "metadata": {"site": "beans"}},
    {"_id": "q2", "text": "How is tea made?"},
    {"_id": "q3", "text": "What is white?"},
]
HEADER = "query-id\tcorpus-id\tscore\n"
QRELS = {"train": "q1\td1\t2\nq1\td3\t1\n", "dev": "q2\td2\t1\n", "test": "q3\td3\t1\nq3\td1\t0\n"}
REAL_SIZES = {
    "nl2bash": (10624, 9047, 1114, 1161),
    "stackexchange": (10410, 3281, 467, 930),
    "scifact": (5183, 710, 96, 300),
    "squad": (3648, 6980, 958, 10570),
    "jaquad": (11144, 28747, 2996, 3939),
}


def write_jsonl(path: Path, records: list[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    (root / "qrels").mkdir(parents=True)
    write_jsonl(root / "corpus.jsonl", CORPUS)
    write_jsonl(root / "queries.jsonl", QUERIES)
    for split, lines in QRELS.items():
        (root / "qrels" / f"{split}.tsv").write_text(HEADER + lines)
    return root


# --- BEIR folders ---


def test_folder_gives_the_columns_and_order_of_its_files(folder: Path) -> None:
    data = load_retrieval_data(folder)
    assert data.corpus["id"][:] == ["d1", "d2", "d3"]
    assert data.corpus["text"][:] == ["Coffee is brewed.", "Tea is steeped.", "Milk"]
    assert data.train is not None
    names = ["query_id", "query", "positive_ids", "positive_grades", "metadata", "answers"]
    assert data.train.column_names == names
    assert data.train[0]["positive_ids"] == ["d1", "d3"]
    assert data.train[0]["positive_grades"] == [2.0, 1.0]
    assert list(data.splits) == ["train", "dev", "test"]
    validate(data)


def test_further_fields_are_kept_as_metadata(folder: Path) -> None:
    data = load_retrieval_data(str(folder))
    assert [json.loads(value) for value in data.corpus["metadata"]] == [
        {"title": "Coffee"}, {}, {"site": "dairy", "year": 2001},
    ]  # fmt: skip
    assert data.train is not None
    assert json.loads(data.train[0]["metadata"]) == {"site": "beans"}


def test_answers_are_a_column_of_every_split_if_a_query_has_some(folder: Path) -> None:
    write_jsonl(folder / "queries.jsonl", [{**QUERIES[0], "answers": [" brewed ", "hot", "brewed"]}, *QUERIES[1:]])
    data = load_retrieval_data(folder)
    validate(data)
    assert [given_answers(split) for split in data.splits.values()] == [[["brewed", "hot"]], [[]], [[]]]
    write_jsonl(folder / "queries.jsonl", [{**QUERIES[0], "answers": []}, {**QUERIES[1], "answers": None}, QUERIES[2]])
    without = load_retrieval_data(folder)
    assert all("answers" not in split.column_names for split in without.splits.values())
    assert [given_answers(split) for split in without.splits.values()] == [[[]], [[]], [[]]]


def test_judgements_of_grade_zero_are_dropped_and_counted(folder: Path) -> None:
    (folder / "qrels" / "train.tsv").write_text(HEADER + "q1\td1\t1\nq2\td2\t0\nq2\td3\t-1\n")
    data = load_retrieval_data(folder)
    assert data.train is not None and data.test is not None
    assert data.train["query_id"][:] == ["q1"]
    assert data.test[0]["positive_ids"] == ["d3"]
    assert "train: judgements dropped for a grade of 0 or less: 2" in data.notes
    assert "train: queries dropped for want of a positive target: 1" in data.notes
    assert "test: judgements dropped for a grade of 0 or less: 1" in data.notes
    assert "negative_ids" not in data.test.column_names


def test_missing_splits_are_none(folder: Path) -> None:
    (folder / "qrels" / "train.tsv").unlink()
    (folder / "qrels" / "dev.tsv").unlink()
    data = load_retrieval_data(folder)
    assert data.train is None and data.dev is None and data.test is not None
    validate(data)


def test_validation_is_another_name_of_dev_unless_both_are_there(folder: Path) -> None:
    (folder / "qrels" / "validation.tsv").write_text(HEADER + "q3\td3\t1\n")
    with pytest.raises(DataError, match=r"\['dev', 'validation'\]"):
        load_retrieval_data(folder)
    (folder / "qrels" / "dev.tsv").unlink()
    data = load_retrieval_data(folder)
    assert data.dev is not None and data.dev["query_id"][:] == ["q3"]


def test_splits_argument_names_other_qrels_files(folder: Path) -> None:
    (folder / "alt").mkdir()
    (folder / "alt" / "other.tsv").write_text(HEADER + "q2\td1\t1\n")
    data = load_retrieval_data(folder, splits={"train": "qrels/train.tsv", "test": "alt/other.tsv"})
    assert data.dev is None and data.test is not None
    assert data.test["query_id"][:] == ["q2"]


def test_splits_argument_is_checked_before_anything_is_read(folder: Path) -> None:
    (folder / "corpus.jsonl").write_text("no JSON")
    with pytest.raises(ConfigurationError, match="'eval'"):
        load_retrieval_data(folder, splits={"eval": "qrels/test.tsv"})
    with pytest.raises(DataError, match=r"nowhere\.tsv: expected the judgements of test; got no such file"):
        load_retrieval_data(folder, splits={"test": "qrels/nowhere.tsv"})


def test_byte_order_mark_windows_line_ends_and_blank_lines_are_read(folder: Path) -> None:
    plain = load_retrieval_data(folder)
    for path in folder.rglob("*.*"):
        if path.is_file():
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n  \r\n")
    strange = load_retrieval_data(folder)
    assert texts_hash(strange.corpus) == texts_hash(plain.corpus)
    assert [split[:] for split in strange.splits.values()] == [split[:] for split in plain.splits.values()]


def test_line_separators_inside_texts_do_not_split_lines(folder: Path) -> None:
    records = [{**CORPUS[0], "text": "a\u2028b\x0cc\u0085d"}, *CORPUS[1:]]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "corpus.jsonl").write_text(lines, encoding="utf-8")
    assert load_retrieval_data(folder).corpus[0]["text"] == "Coffee a\u2028b\x0cc\u0085d"


def test_qrels_without_header_are_read(folder: Path) -> None:
    with_header = load_retrieval_data(folder)
    for split, lines in QRELS.items():
        (folder / "qrels" / f"{split}.tsv").write_text(lines)
    without = load_retrieval_data(folder)
    assert [split[:] for split in without.splits.values()] == [split[:] for split in with_header.splits.values()]


def test_integer_ids_in_json_match_qrels(folder: Path) -> None:
    write_jsonl(folder / "corpus.jsonl", [{"_id": 7, "text": "seven"}])
    write_jsonl(folder / "queries.jsonl", [{"_id": 1, "text": "one"}])
    for split in QRELS:
        (folder / "qrels" / f"{split}.tsv").write_text(HEADER + "1\t7\t1\n")
    assert load_retrieval_data(folder).corpus["id"][:] == ["7"]


def test_targets_without_text_stay_and_are_counted_in_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(folder / "corpus.jsonl", [*CORPUS, {"_id": "d4", "title": " ", "text": None}])
    with caplog.at_level(logging.WARNING, logger="hf_corrector"):
        data = load_retrieval_data(folder)
    note = "corpus: targets without text: 1 of 4, the first at line 4"
    assert len(data.corpus) == 4 and note in data.notes and note in caplog.text
    validate(data)


def test_queries_that_occur_in_train_too_are_noted(folder: Path) -> None:
    write_jsonl(folder / "queries.jsonl", [*QUERIES[:2], {"_id": "q3", "text": QUERIES[0]["text"]}])
    assert load_retrieval_data(folder).notes[-1] == "test: queries that also occur in train, word for word: 1"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qrels/test.tsv", HEADER + "q3\td3\t1\nq9\td1\t1\n", r"test\.tsv, line 3: .*query; got 'q9'.* Add the query"),
        ("qrels/test.tsv", HEADER + "q3\td9\t1\n", r"test\.tsv, line 2: .*target; got 'd9'.* Add the target"),
        ("qrels/test.tsv", HEADER + "q3\td3\t1.5\n", r"test\.tsv, line 2: expected an integer grade; got '1\.5'"),
        ("qrels/test.tsv", HEADER + "q3 d3 1\n", r"test\.tsv, line 2: expected three fields separated by tabs"),
        ("qrels/test.tsv", "q3 0 d3 1\n", r"test\.tsv, line 1: .*Drop the second column of a TREC qrels"),
        ("qrels/test.tsv", "qid\tdocid\trel\nq3\td3\t1\n", r"test\.tsv, line 1: expected the header query-id"),
        ("qrels/test.tsv", HEADER + "q3\td3\t1\nq3\td3\t2\n", r"line 3: expected one grade .* got 2 after 1"),
        ("qrels/test.tsv", HEADER, r"test\.tsv: expected judgements; got none"),
        ("qrels/test.tsv", HEADER + "q3\td3\t0\n", r"test\.tsv: expected at least one judgement with a grade above 0"),
        ("qrels/test.tsv", b"q3\td\xff\t1\n", r"test\.tsv, line 1: expected UTF-8"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n{"_id": "d2", \n', r"corpus\.jsonl, line 2: expected one object"),
        ("corpus.jsonl", '{"_id": "d1", "_id": "d2", "text": "a"}\n', r"line 1: .*duplicate keys \['_id'\]"),
        ("corpus.jsonl", '{"_id": "d1", "text": "a"}\n\n{"_id": "d1", "text": "b"}\n', r"line 3: .*got 'd1' again"),
        ("corpus.jsonl", '{"_id": "d1", "title": "a"}\n', r"line 1: expected a string in 'text'; got None in"),
        ("corpus.jsonl", '{"_id": "d1", "text": 5}\n', r"line 1: expected a string in 'text'; got 5"),
        ("corpus.jsonl", '{"text": "a"}\n', r"line 1: expected a string in _id; got None in \['text'\]"),
        ("corpus.jsonl", '["d1", "a"]\n', r"line 1: expected an object with _id and text; got list"),
        ("corpus.jsonl", b'{"_id": "d1", "text": "\xff"}\n', r"corpus\.jsonl, line 1: .*utf-8"),
        ("corpus.jsonl", '{"_id": "d1", "text": "\\ud800"}\n', r"line 1: expected valid Unicode in 'text'"),
        ("corpus.jsonl", "", r"corpus\.jsonl: expected at least one target; got none"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}\n{"_id": "q2", "text": "a"}\n{"_id": "q3", "text": "b"}\n',
         r"queries\.jsonl, line 1: expected text in a judged query; got none for 'q1'"),
        ("queries.jsonl", '{"_id": "q1", "text": "a", "answers": "b"}\n', r"line 1: expected a list of texts in"),
        ("queries.jsonl", '{"_id": "q1", "text": "a", "answers": {"text": ["b"]}}\n', r'line 1: .*the list "text"'),
        ("queries.jsonl", '{"_id": "q1", "text": "a", "answers": [1973]}\n', r"line 1: expected strings in 'answers'"),
        ("queries.jsonl", '{"_id": "q1", "text": "a", "answers": ["b", " "]}\n', r"line 1: expected text in every one"),
        ("queries.jsonl", '{"_id": "q1", "text": "a"}\n' * 2, r"queries\.jsonl, line 2: .*'q1' again"),
    ],
)  # fmt: skip
def test_broken_files_are_refused_with_file_and_line(
    folder: Path, file: str, content: str | bytes, message: str
) -> None:
    (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message) as caught:
        load_retrieval_data(folder)
    assert str(folder / file) in caught.value.where
    assert caught.value.cure


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"expected a file {name}"):
        load_retrieval_data(folder)


def test_folder_without_judgements_is_refused(folder: Path) -> None:
    for path in (folder / "qrels").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="expected judgements for train, dev or test"):
        load_retrieval_data(folder)


def test_paths_that_are_no_folder_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="For BEIR, pass the folder"):
        load_retrieval_data(str(folder / "corpus.jsonl"))
    with pytest.raises(DataError, match="got a file"):
        load_retrieval_data(str(folder / "qrels" / "test.tsv"))
    with pytest.raises(DataError, match="got no such folder"):
        load_retrieval_data("./somewhere/not/here")
    with pytest.raises(DataError, match="got no such folder"):
        load_retrieval_data(folder / "not-here")
    with pytest.raises(ConfigurationError, match="no `revision` or `subset`"):
        load_retrieval_data(folder, revision="main")


# --- data built by hand ---


def handmade(**changes: list[object]) -> RetrievalData:
    columns: dict[str, list[object]] = {
        "query_id": ["q1", "q2"], "query": ["first", "second"], "positive_ids": [["d1"], ["d2", "d1"]],
        "positive_grades": [[1], [2, 1]], "metadata": ["{}", "{}"],
    }  # fmt: skip
    corpus = Dataset.from_dict({"id": ["d1", "d2"], "text": ["one", ""], "metadata": ["{}", "{}"]})
    return RetrievalData(corpus=corpus, train=Dataset.from_dict({**columns, **changes}), dev=None, test=None)


def test_handmade_data_with_integer_grades_and_any_output_format_is_valid() -> None:
    data = handmade()
    assert data.train is not None
    shown = RetrievalData(
        corpus=data.corpus.with_format("torch"), train=data.train.with_format("numpy"), dev=None, test=None
    )
    for variant in (data, shown):
        validate(variant)
        assert variant.train is not None
        assert positives_as_rows(variant.train, variant.corpus) == [{0: 1.0}, {1: 2.0, 0: 1.0}]
        assert texts_hash(variant.corpus) == texts_hash(data.corpus)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_id": ["q1", "q1"]}, "train, row 1: expected a unique 'query_id'; got 'q1' again"),
        ({"query": ["first", "  "]}, "train, row 1: expected text in 'query'"),
        ({"positive_ids": [["d1"], ["d9", "d1"]]}, "train, row 1: .*got 'd9', which is not there"),
        ({"positive_ids": [["d1"], []], "positive_grades": [[1], []]}, "train, row 1: expected one or more"),
        ({"positive_grades": [[1], [1]]}, "train, row 1: .*as many positive_grades"),
        ({"positive_ids": [["d1"], ["d1", "d1"]]}, "train, row 1: expected one or more distinct"),
        ({"positive_grades": [[1], [1, 0]]}, "train, row 1: expected grades above 0; got 0"),
        ({"positive_grades": [[1.0], [1.0, float("nan")]]}, "train, row 1: expected grades above 0; got nan"),
        ({"positive_ids": ["d1", "d2"]}, "train, column 'positive_ids': expected List"),
        ({"query": [1, 2]}, "train, column 'query': expected Value"),
    ],
)
def test_handmade_mistakes_are_named_with_split_and_row(changes: dict[str, list[object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        validate(handmade(**changes))


def test_handmade_data_without_columns_targets_or_splits_is_refused() -> None:
    data = handmade()
    with pytest.raises(DataError, match="Add the column 'metadata'"):
        validate(RetrievalData(corpus=data.corpus.remove_columns("metadata"), train=data.train, dev=None, test=None))
    with pytest.raises(DataError, match="corpus: expected at least one target"):
        validate(RetrievalData(corpus=data.corpus.select([]), train=data.train, dev=None, test=None))
    with pytest.raises(DataError, match="expected a train, dev or test split"):
        validate(RetrievalData(corpus=data.corpus, train=None, dev=None, test=None))
    doubled = datasets.concatenate_datasets([data.corpus, data.corpus])
    with pytest.raises(DataError, match="corpus, row 2: expected a unique 'id'; got 'd1' again"):
        validate(RetrievalData(corpus=doubled, train=data.train, dev=None, test=None))


def test_positives_of_an_unknown_target_are_refused() -> None:
    data = handmade(positive_ids=[["d1"], ["d2", "gone"]])
    assert data.train is not None
    with pytest.raises(DataError, match=r"row 1: .*'gone'"):
        positives_as_rows(data.train, data.corpus)


def test_rows_follow_a_reordered_corpus() -> None:
    data = handmade()
    assert data.train is not None
    assert positives_as_rows(data.train, data.corpus.select([1, 0])) == [{1: 1.0}, {0: 2.0, 1: 1.0}]


def test_texts_hash_sees_ids_texts_and_order_but_no_metadata() -> None:
    def hash_of(ids: list[str], texts: list[str], metadata: str = "{}") -> str:
        return texts_hash(Dataset.from_dict({"id": ids, "text": texts, "metadata": [metadata] * len(ids)}))

    first = hash_of(["a", "b"], ["x", "y"])
    assert first == hash_of(["a", "b"], ["x", "y"], '{"k": 1}')
    others = {hash_of(["b", "a"], ["y", "x"]), hash_of(["a", "b"], ["y", "x"]), hash_of(["ax", "b"], ["", "y"])}
    assert len(others) == 3 and first not in others


# --- real sets ---


def real_folder(name: str) -> Path:
    root = os.environ.get("HF_CORRECTOR_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"HF_CORRECTOR_DATA names no folder with {name}/")
    return Path(root) / name


@pytest.mark.parametrize("name", list(REAL_SIZES))
def test_real_sets_load_with_the_published_sizes(name: str) -> None:
    data = load_retrieval_data(real_folder(name))
    validate(data)
    assert (len(data.corpus), *(len(split) for split in data.splits.values())) == REAL_SIZES[name]
    assert data.notes == ()
    assert data.test is not None
    answered = [len(answers) > 0 for split in data.splits.values() for answers in given_answers(split)]
    assert all(answered) if name in ("squad", "jaquad") else not any(answered)
    assert len(positives_as_rows(data.test, data.corpus)) == len(data.test)


def test_real_alternative_split_by_site_loads() -> None:
    folder = real_folder("stackexchange")
    data = load_retrieval_data(folder, splits={"train": "qrels/train.tsv", "test": "qrels_alt/test-ai.tsv"})
    assert data.dev is None and data.test is not None
    assert {json.loads(value)["site"] for value in data.test["metadata"]} == {"ai"}
