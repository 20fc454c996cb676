"""Training files of Tevatron and FlagEmbedding, written here in the shapes their documentation and examples have."""

import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hf_corrector.data.datasets import RetrievalData, load_retrieval_data, positives_as_rows, validate
from hf_corrector.data.judgements import given_negatives_as_rows, teacher_scores_as_rows
from hf_corrector.data.retrieval import given_answers
from hf_corrector.errors import ConfigurationError, DataError

FLAG = [
    {"query": "who sings?", "pos": ["She sings."], "neg": ["He dances.", "It rains."], "pos_scores": [98.1875],
     "neg_scores": [82.25, 80], "prompt": "Retrieve answers: ", "type": "normal"},
    {"query": "who dances?", "pos": [" He dances. "], "neg": ["She sings."], "pos_scores": [97.5],
     "neg_scores": [81.0], "prompt": "Retrieve answers: ", "type": "normal"},
]  # fmt: skip
PASSAGES = [
    {"query_id": "q1", "query": "who sings?", "answers": ["she"],
     "positive_passages": [{"docid": "d1", "title": "Song", "text": "She sings."}],
     "negative_passages": [{"docid": "d2", "title": "", "text": "He dances."}, {"docid": "d3", "text": "It rains."}]},
    {"query_id": "q2", "query": "who dances?",
     "positive_passages": [{"docid": "d2", "title": "", "text": "He dances."}], "negative_passages": []},
]  # fmt: skip
IDS = [
    {"query_id": "q1", "query_text": "who sings?", "query_image": None,
     "positive_document_ids": ["d1"], "negative_document_ids": ["d3", "d2"], "answers": ["she"]},
    {"query_id": "q2", "query_text": "who dances?", "query_image": None,
     "positive_document_ids": ["d2"], "negative_document_ids": []},
]  # fmt: skip
CORPUS = [
    {"docid": "d0", "text": "Nothing.", "image": None, "source": "stage"},
    {"docid": "d1", "title": "Song", "text": "She sings."},
    {"docid": "d2", "text": "He dances."},
    {"docid": "d3", "text": "It rains."},
]


def write(path: Path, records: Sequence[Any]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def texts(data: RetrievalData, ids: list[str]) -> list[str]:
    text_of = dict(zip(data.corpus["id"], data.corpus["text"], strict=True))
    return [text_of[target_id] for target_id in ids]


# --- FlagEmbedding ---


def test_flag_embedding_file_is_training_data_over_its_own_texts(tmp_path: Path) -> None:
    data = load_retrieval_data(write(tmp_path / "train.jsonl", FLAG))
    validate(data)
    assert data.corpus["text"][:] == ["She sings.", "He dances.", "It rains."]
    assert data.train is not None and data.dev is None and data.test is None
    assert data.train["query"][:] == ["who sings?", "who dances?"]
    assert texts(data, data.train[0]["positive_ids"]) == ["She sings."]
    assert texts(data, data.train[0]["negative_ids"]) == ["He dances.", "It rains."]
    assert given_negatives_as_rows(data.train, data.corpus)[:] == [[1, 2], [0]]
    assert teacher_scores_as_rows(data.train, data.corpus)[:] == [{0: 98.1875, 1: 82.25, 2: 80.0}, {1: 97.5, 0: 81.0}]


def test_prompt_and_type_become_metadata_and_the_prompt_is_noted(tmp_path: Path) -> None:
    data = load_retrieval_data(write(tmp_path / "train.jsonl", FLAG))
    assert data.train is not None
    assert json.loads(data.train[0]["metadata"]) == {"prompt": "Retrieve answers: ", "type": "normal"}
    note = "prompt of the queries, kept as metadata, to be given to the encoder: 'Retrieve answers: '"
    assert data.notes == ("train: read train.jsonl", note)


def test_several_prompts_are_refused_with_a_cure(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", [FLAG[0], {**FLAG[1], "prompt": "Find: "}])
    with pytest.raises(DataError, match=r"line 2: expected one prompt .* got 'Find: '.*query_prompt"):
        load_retrieval_data(path)


def test_negatives_scores_and_prompt_may_be_missing(tmp_path: Path) -> None:
    data = load_retrieval_data(str(write(tmp_path / "mine.jsonl", [{"query": "a?", "pos": ["A"]}])))
    assert data.train is not None
    assert data.train.column_names == ["query_id", "query", "positive_ids", "positive_grades", "metadata"]
    assert given_negatives_as_rows(data.train, data.corpus)[:] == [[]]
    assert teacher_scores_as_rows(data.train, data.corpus)[:] == [{}]


def test_lines_with_the_same_query_become_one_and_its_answers_are_no_negatives(tmp_path: Path) -> None:
    lines = [
        {"query": "a?", "pos": ["A"], "neg": ["B", "C", "C", " "], "neg_scores": [0.5, 0.25, 0.125, None]},
        {"query": "b?", "pos": ["B"], "neg": []},
        {"query": "a? ", "pos": ["B"], "neg": ["D"], "pos_scores": [0.75]},
    ]
    data = load_retrieval_data(write(tmp_path / "train.jsonl", lines))
    validate(data)
    assert data.train is not None and data.train["query"][:] == ["a?", "b?"]
    assert texts(data, data.train[0]["positive_ids"]) == ["A", "B"]
    assert texts(data, data.train[0]["negative_ids"]) == ["C", "D"]
    rows = {text: row for row, text in enumerate(data.corpus["text"])}
    scores = teacher_scores_as_rows(data.train, data.corpus)
    assert scores[0] == {rows["B"]: 0.5, rows["C"]: 0.25} and scores[1] == {}
    assert data.train[0]["negative_scores"] == [0.25, None] and data.train[1]["negative_scores"] == []
    assert "train: given negatives dropped because they answer the same query: 1" in data.notes


def test_queries_without_a_positive_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = [{"query": "c?", "pos": [], "neg": ["C"]}, {"query": "a?", "pos": ["A"]}]
    data = load_retrieval_data(write(tmp_path / "train.jsonl", lines))
    assert data.train is not None and data.train["query"][:] == ["a?"]
    assert "train: queries dropped for want of a positive target: 1" in data.notes


def test_data_meant_for_given_negatives_only_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "classification-no_in_batch_neg"
    folder.mkdir()
    data = load_retrieval_data(write(folder / "Banking77.jsonl", FLAG))
    assert (
        data.notes[-1] == "Banking77.jsonl: meant for training on given negatives only; drawn ones may be right answers"
    )


# --- Tevatron ---


def test_passages_keep_their_ids_titles_and_further_fields(tmp_path: Path) -> None:
    data = load_retrieval_data(write(tmp_path / "train.jsonl", PASSAGES))
    validate(data)
    assert data.corpus["id"][:] == ["d1", "d2", "d3"]
    assert data.corpus["text"][:] == ["Song She sings.", "He dances.", "It rains."]
    assert json.loads(data.corpus[0]["metadata"]) == {"title": "Song"}
    assert data.train is not None and data.train["query_id"][:] == ["q1", "q2"]
    assert data.train["metadata"][0] == "{}" and given_answers(data.train) == [["she"], []]
    assert data.train["negative_ids"][:] == [["d2", "d3"], []]
    assert positives_as_rows(data.train, data.corpus) == [{0: 1.0}, {1: 1.0}]
    assert "positive_scores" not in data.train.column_names


def test_scores_of_passages_are_the_teachers(tmp_path: Path) -> None:
    scored = json.loads(json.dumps(PASSAGES))
    scored[0]["positive_passages"][0]["score"] = 1
    scored[0]["negative_passages"][1]["score"] = 0.75
    data = load_retrieval_data(write(tmp_path / "train.jsonl", scored))
    validate(data)
    assert data.train is not None
    assert data.train["positive_scores"][:] == [[1.0], []]
    assert data.train["negative_scores"][:] == [[None, 0.75], []]
    assert teacher_scores_as_rows(data.train, data.corpus)[:] == [{0: 1.0, 2: 0.75}, {}]


def test_answers_of_all_lines_of_a_query_come_together_and_are_checked(tmp_path: Path) -> None:
    again = {**PASSAGES[0], "answers": ["the singer", "she"]}
    data = load_retrieval_data(write(tmp_path / "train.jsonl", [*PASSAGES, again]))
    assert data.train is not None and given_answers(data.train) == [["she", "the singer"], []]
    flag = load_retrieval_data(write(tmp_path / "flag.jsonl", [{"query": "a?", "pos": ["A"], "answers": ["A"]}]))
    validate(flag)
    assert flag.train is not None and given_answers(flag.train) == [["A"]]
    with pytest.raises(DataError, match=r"line 1: expected a list of texts in 'answers'; got 'she'"):
        load_retrieval_data(write(tmp_path / "train.jsonl", [{**PASSAGES[0], "answers": "she"}]))


def test_a_query_may_come_again_with_other_negatives_but_not_with_another_text(tmp_path: Path) -> None:
    mined = {**PASSAGES[1], "negative_passages": [{"docid": "d9", "text": "It snows."}]}
    data = load_retrieval_data(write(tmp_path / "train.jsonl", [*PASSAGES, mined]))
    assert data.train is not None and data.train["negative_ids"][:] == [["d2", "d3"], ["d9"]]
    path = write(tmp_path / "train.jsonl", [*PASSAGES, {**mined, "query": "who else?"}])
    with pytest.raises(DataError, match=r"line 3: expected one text for the query 'q2'; got 'who else\?' after"):
        load_retrieval_data(path)


def test_ids_are_looked_up_in_the_corpus_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", IDS)
    write(tmp_path / "corpus.jsonl", CORPUS)
    data = load_retrieval_data(tmp_path)
    validate(data)
    assert data.corpus["id"][:] == ["d0", "d1", "d2", "d3"]
    assert data.corpus["text"][:2] == ["Nothing.", "Song She sings."]
    assert json.loads(data.corpus[0]["metadata"]) == {"source": "stage"}
    assert data.train is not None and data.train["query"][:] == ["who sings?", "who dances?"]
    assert data.train["metadata"][0] == "{}" and given_answers(data.train) == [["she"], []]
    assert given_negatives_as_rows(data.train, data.corpus)[:] == [[3, 2], []]
    assert positives_as_rows(data.train, data.corpus) == [{1: 1.0}, {2: 1.0}]


def test_text_of_a_corpus_may_be_called_document_text_and_ids_may_be_numbers(tmp_path: Path) -> None:
    write(tmp_path / "corpus.jsonl", [{"docid": 7, "document_text": "seven", "document_image": None}])
    write(tmp_path / "train.jsonl", [{**IDS[0], "positive_document_ids": [7], "negative_document_ids": []}])
    data = load_retrieval_data(tmp_path)
    assert data.corpus[0] == {"id": "7", "text": "seven", "metadata": "{}"}
    assert data.train is not None and data.train[0]["positive_ids"] == ["7"]


def test_passages_join_the_corpus_file_beside_them(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PASSAGES)
    write(tmp_path / "corpus.jsonl", CORPUS[:3])
    assert load_retrieval_data(tmp_path).corpus["id"][:] == ["d0", "d1", "d2", "d3"]
    write(tmp_path / "corpus.jsonl", [*CORPUS[:2], {"docid": "d2", "text": "He sleeps."}])
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: expected one text for the target 'd2'"):
        load_retrieval_data(tmp_path)


def test_targets_without_text_stay_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "train.jsonl", IDS)
    write(tmp_path / "corpus.jsonl", [*CORPUS, {"docid": "d4", "text": None}])
    with caplog.at_level(logging.WARNING, logger="hf_corrector"):
        data = load_retrieval_data(tmp_path)
    note = f"corpus: targets without text: 1 of 5, the first at {tmp_path / 'corpus.jsonl'}, line 5"
    assert note in data.notes and note in caplog.text


# --- files and folders ---


def test_gzipped_files_are_read_and_damaged_ones_refused(tmp_path: Path) -> None:
    plain = load_retrieval_data(write(tmp_path / "train.jsonl", PASSAGES))
    path = write(tmp_path / "train.jsonl.gz", PASSAGES)
    packed = load_retrieval_data(path)
    assert packed.corpus[:] == plain.corpus[:] and packed.train is not None and plain.train is not None
    assert packed.train[:] == plain.train[:]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="expected a whole gzip file"):
        load_retrieval_data(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="expected a whole gzip file"):
        load_retrieval_data(path)


def test_names_of_files_decide_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "msmarco.jsonl", FLAG[:1])
    write(tmp_path / "msmarco-dev.jsonl", FLAG[1:])
    write(tmp_path / "nq.jsonl", [{**FLAG[0], "query": "what falls?", "pos": ["It rains."]}])
    write(tmp_path / "test.jsonl.gz", [{**FLAG[0], "query": "what is white?", "pos": ["Snow."]}])
    (tmp_path / "notes.txt").write_text("not read")
    (tmp_path / "dataset_infos.json").write_text("{}")
    data = load_retrieval_data(tmp_path)
    validate(data)
    assert {name: split["query"][:] for name, split in data.splits.items()} == {
        "train": ["who sings?", "what falls?"], "dev": ["who dances?"], "test": ["what is white?"],
    }  # fmt: skip
    assert data.notes[:3] == (
        "train: read msmarco.jsonl, nq.jsonl", "dev: read msmarco-dev.jsonl", "test: read test.jsonl.gz",
    )  # fmt: skip


def test_queries_of_train_that_are_judged_too_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PASSAGES)
    write(tmp_path / "dev.jsonl", PASSAGES[:1])
    assert load_retrieval_data(tmp_path).notes[-1] == "dev: queries that also occur in train, word for word: 1"


def test_splits_name_the_files_to_read(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", IDS[:1])
    write(tmp_path / "b.jsonl", IDS[1:])
    write(tmp_path / "c.jsonl", [{**IDS[0], "positive_document_ids": ["unknown"]}])
    write(tmp_path / "passages.jsonl", CORPUS)
    data = load_retrieval_data(tmp_path, splits={"train": "a.jsonl", "test": "b.jsonl"})
    assert {name: split["query_id"][:] for name, split in data.splits.items()} == {"train": ["q1"], "test": ["q2"]}
    assert len(data.corpus) == 4
    with pytest.raises(DataError, match=r"nowhere\.jsonl: expected the data of dev; got no such file"):
        load_retrieval_data(tmp_path, splits={"dev": "nowhere.jsonl"})
    with pytest.raises(ConfigurationError, match="a file of its own for each split"):
        load_retrieval_data(tmp_path, splits={"train": "a.jsonl", "dev": "a.jsonl"})
    with pytest.raises(ConfigurationError, match="'eval'"):
        load_retrieval_data(tmp_path, splits={"eval": "a.jsonl"})
    with pytest.raises(ConfigurationError, match="none for a single file"):
        load_retrieval_data(tmp_path / "a.jsonl", splits={"train": "a.jsonl"})
    with pytest.raises(ConfigurationError, match="no `revision` or `subset`"):
        load_retrieval_data(tmp_path / "a.jsonl", revision="main")


def test_a_folder_of_training_files_may_have_a_readme(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PASSAGES)
    (tmp_path / "README.md").write_text("# A downloaded repository\n")
    assert len(load_retrieval_data(tmp_path).corpus) == 3


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (
            {"question": "a?", "positive_ctxs": []},
            r"line 1: .*known form; got the keys \['positive_ctxs', 'question'\]",
        ),
        ({"question": "a?"}, r"Known are FlagEmbedding's query, pos.*Tevatron's query_id, query, positive_passages"),
        ({"_id": "1", "text": "a"}, r"For BEIR, pass the folder with corpus\.jsonl"),
        ({"query": [1, 2], "positives": [[3]], "negatives": [[4]]}, "Give texts: tokens of another package"),
        ({"query_id": "1", "query": "a", "docid": "2", "text": "b"}, "expected a line of a known form"),
        (["a", "b"], "expected a line of a known form; got list"),
        (CORPUS[0], "expected training data; got a corpus only"),
        (IDS[0], r"expected a corpus file with docid and text beside it.* Pass the folder that holds both"),
    ],
)
def test_files_of_no_known_form_are_refused_with_what_was_found(tmp_path: Path, first: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_retrieval_data(write(tmp_path / "data.jsonl", [first]))


def test_unknown_files_in_a_folder_of_known_ones_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PASSAGES)
    write(tmp_path / "pool.jsonl", [{"text": "a candidate"}])
    with pytest.raises(
        DataError, match=r"pool\.jsonl, line 1: expected a line of a known form; got the keys \['text'\]"
    ):
        load_retrieval_data(tmp_path)


def changed(line: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**line, **changes}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (changed(FLAG[0], query=" "), "expected text in 'query'; got none"),
        (changed(FLAG[0], query=["a", "b"]), "expected a string in 'query'"),
        (changed(FLAG[0], pos="She sings."), "expected a list in 'pos'; got 'She sings.'"),
        (changed(FLAG[0], pos=[3]), "expected strings in 'pos'; got 3"),
        (changed(FLAG[0], pos=[""]), "expected text in every pos; got none"),
        (changed(FLAG[0], neg=[None]), "expected strings in 'neg'; got None"),
        (changed(FLAG[0], neg=["\ud800"]), "expected valid Unicode in 'neg'"),
        (changed(FLAG[0], pos_scores=[1.0, 2.0]), r"as many pos_scores as texts in 'pos', or none; got 2 for 1"),
        (changed(FLAG[0], neg_scores=[1.0]), r"as many neg_scores as texts in 'neg', or none; got 1 for 2"),
        (changed(FLAG[0], pos_scores=["1"]), "expected finite numbers in 'pos_scores'; got '1'"),
        (changed(FLAG[0], pos_scores=[True]), "expected finite numbers in 'pos_scores'; got True"),
        (changed(FLAG[0], pos_scores=[float("nan")]), "NaN"),
        (changed(FLAG[0], prompt=["x"]), "expected strings in 'prompt'"),
        ({"query": "a?"}, "expected a list in 'pos'; got None"),
        (["who?"], "expected one object; got list"),
    ],
)
def test_wrong_lines_of_flag_embedding_are_refused_with_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "train.jsonl", [FLAG[1], line])
    with pytest.raises(DataError, match=message) as caught:
        load_retrieval_data(path)
    assert caught.value.where == f"{path}, line 2" and caught.value.cure


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (changed(PASSAGES[0], query_id=None), "expected a string in query_id; got None"),
        (changed(PASSAGES[0], query=None), "expected text in 'query'"),
        (changed(PASSAGES[0], positive_passages=["She sings."]), "expected an object with docid and text; got str"),
        (changed(PASSAGES[0], positive_passages=[{"text": "a"}]), "expected a string in docid; got None in"),
        (changed(PASSAGES[0], positive_passages=[{"docid": "d1"}]), "expected a string in 'text'; got None in"),
        (changed(PASSAGES[0], negative_passages=[{"docid": "d2", "text": "x"}]), "one text for the target 'd2'"),
        (changed(PASSAGES[0], positive_passages=[{"docid": "d8", "text": "x", "score": "y"}]), "numbers in 'score'"),
        (changed(PASSAGES[0], negative_passages=PASSAGES[0]["positive_passages"]),
         r"expected negatives that are not positives; got \['d1'\] in both"),
        ({"query_id": "q1", "query": "a?"}, "expected a list in 'positive_passages'; got None"),
    ],
)  # fmt: skip
def test_wrong_passages_are_refused_with_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "train.jsonl", [PASSAGES[1], line])
    with pytest.raises(DataError, match=message) as caught:
        load_retrieval_data(path)
    assert caught.value.where == f"{path}, line 2" and caught.value.cure


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (changed(IDS[0], positive_document_ids=["d9"]), "got 'd9', which is not among the 4 target ids"),
        (changed(IDS[0], negative_document_ids=["d8"]), "got 'd8', which is not among the 4 target ids"),
        (changed(IDS[0], negative_document_ids=["d1"]), r"got \['d1'\] in both"),
        (changed(IDS[0], negative_document_ids=[1.5]), "expected ids in 'negative_document_ids'; got 1.5"),
        (changed(IDS[0], query_text=None, query_image="bytes"), "expected text in 'query_text'"),
        (changed(IDS[0], query_id=True), "expected a string in query_id; got True"),
    ],
)
def test_wrong_ids_are_refused_with_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    write(tmp_path / "corpus.jsonl", CORPUS)
    path = write(tmp_path / "train.jsonl", [IDS[1], line])
    with pytest.raises(DataError, match=message) as caught:
        load_retrieval_data(tmp_path)
    assert caught.value.where == f"{path}, line 2" and caught.value.cure


def test_a_corpus_file_names_every_document_once(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", IDS)
    write(tmp_path / "corpus.jsonl", [*CORPUS, CORPUS[0]])
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 5: .*got 'd0' again"):
        load_retrieval_data(tmp_path)


def test_a_split_without_any_positive_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", PASSAGES)
    write(tmp_path / "dev.jsonl", [changed(PASSAGES[0], positive_passages=[])])
    with pytest.raises(DataError, match="dev: expected at least one query with a positive; got 1 without"):
        load_retrieval_data(tmp_path)


def test_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="got an empty file"):
        load_retrieval_data(write(tmp_path / "train.jsonl", []))
