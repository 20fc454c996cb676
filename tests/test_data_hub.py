import json
from pathlib import Path

import datasets
import pytest

from hf_corrector.data.datasets import RetrievalData, load_retrieval_data, validate
from hf_corrector.data.retrieval import given_answers
from hf_corrector.errors import DataError


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_hub_folder(root: Path, files: dict[str, tuple[str, list[object]]]) -> Path:
    """Lay out ``config/split -> (config, records)`` as a data set repository does."""
    configs: dict[str, str] = {}
    for place, (config, records) in files.items():
        path = root / f"{place}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        entry = f"  - split: {path.stem}\n    path: {place}.jsonl\n"
        configs[config] = configs.get(config, f"- config_name: {config}\n  data_files:\n") + entry
    (root / "README.md").write_text("---\nconfigs:\n" + "".join(configs.values()) + "---\n")
    return root


def judgement(query: object, target: object, score: object = 1) -> dict[str, object]:
    return {"query-id": query, "corpus-id": target, "score": score}


TEXT_FILES = {
    "corpus/corpus": ("corpus", [{"_id": "d1", "title": "T", "text": "one"}, {"_id": "d2", "text": "two"}]),
    "queries/queries": ("queries", [{"_id": "1", "text": "first"}, {"_id": "2", "text": "second"}]),
}  # fmt: skip


@pytest.mark.parametrize("config", ["default", "qrels"])
def test_mteb_layout_is_read_with_numeric_ids_and_float_scores(tmp_path: Path, config: str, hub_cache: None) -> None:
    qrels = {"qrels/test": (config, [judgement(1, "d1", 1.0), judgement(2, "d2", 0.0)])}
    data = load_retrieval_data(write_hub_folder(tmp_path / "set", {**TEXT_FILES, **qrels}))
    assert data.corpus["text"][:] == ["T one", "two"]
    assert data.train is None and data.test is not None
    assert data.test[:]["positive_ids"] == [["d1"]]
    assert "test: judgements dropped for a grade of 0 or less: 1" in data.notes
    validate(data)


def test_beir_layout_takes_judgements_from_the_set_beside_it(tmp_path: Path, hub_cache: None) -> None:
    root = write_hub_folder(tmp_path / "set", TEXT_FILES)
    beside = tmp_path / "set-qrels"
    beside.mkdir()
    (beside / "train.tsv").write_text("query-id\tcorpus-id\tscore\n1\td1\t1\n")
    (beside / "validation.tsv").write_text("query-id\tcorpus-id\tscore\n2\td2\t1\n")
    data = load_retrieval_data(root)
    assert data.train is not None and data.train["query"][:] == ["first"]
    assert data.dev is not None and data.dev["query"][:] == ["second"]


def test_subset_and_splits_choose_configurations_and_splits(tmp_path: Path, hub_cache: None) -> None:
    german = {place: (f"de-{config}", records) for place, (config, records) in TEXT_FILES.items()}
    german["qrels/eval"] = ("de-qrels", [judgement("1", "d1")])
    root = write_hub_folder(tmp_path / "set", german)
    data = load_retrieval_data(root, subset="de", splits={"test": "eval"})
    assert data.test is not None and data.test["query"][:] == ["first"]
    with pytest.raises(DataError, match=r"Choose one with `subset`: \['de'\]"):
        load_retrieval_data(root)
    with pytest.raises(DataError, match=r"expected one of the splits \['eval'\]; got 'test'"):
        load_retrieval_data(root, subset="de", splits={"test": "test"})


def test_queries_published_in_several_splits_are_joined(tmp_path: Path, hub_cache: None) -> None:
    files = {
        "corpus/corpus": TEXT_FILES["corpus/corpus"],
        "queries/train": ("queries", [{"_id": "1", "text": "first"}]),
        "queries/test": ("queries", [{"_id": "2", "text": "second"}]),
        "qrels/train": ("qrels", [judgement("1", "d1")]),
        "qrels/test": ("qrels", [judgement("2", "d2")]),
    }
    data = load_retrieval_data(write_hub_folder(tmp_path / "set", files))
    assert {name: split["query"][:] for name, split in data.splits.items()} == {"train": ["first"], "test": ["second"]}


def test_answers_are_read_from_a_column_of_the_queries(tmp_path: Path, hub_cache: None) -> None:
    queries = [{"_id": "1", "text": "first", "answers": ["one", "1"]}, {"_id": "2", "text": "second", "answers": None}]
    files = {**TEXT_FILES, "queries/queries": ("queries", queries)}
    qrels = {"qrels/test": ("qrels", [judgement("1", "d1"), judgement("2", "d2")])}
    data = load_retrieval_data(write_hub_folder(tmp_path / "set", {**files, **qrels}))
    validate(data)
    assert data.test is not None and given_answers(data.test) == [["one", "1"], []]
    assert data.test["metadata"][:] == ["{}", "{}"]
    wrong = {**TEXT_FILES, "queries/queries": ("queries", [{"_id": "1", "text": "first", "answers": "one"}])}
    with pytest.raises(DataError, match=r"\(queries\), row 0: expected a list of texts in 'answers'; got 'one'"):
        load_retrieval_data(write_hub_folder(tmp_path / "wrong", {**wrong, **qrels}))


def test_hub_mistakes_are_refused_with_the_row(tmp_path: Path, hub_cache: None) -> None:
    def load(name: str, qrels: list[object]) -> RetrievalData:
        return load_retrieval_data(write_hub_folder(tmp_path / name, {**TEXT_FILES, "qrels/test": ("qrels", qrels)}))

    with pytest.raises(DataError, match=r"split test, row 1: .*got '9', which is not among the 2 query ids"):
        load("unknown", [judgement("1", "d1"), judgement("9", "d1")])
    with pytest.raises(DataError, match=r"split test, row 0: expected an integer score; got 0\.5"):
        load("half", [judgement("1", "d1", 0.5)])
    with pytest.raises(DataError, match=r"expected the columns .*got \['anchor', 'positive'\].*from_pairs"):
        load("pairs", [{"anchor": "a", "positive": "b"}])


def test_sets_of_another_shape_are_refused_with_a_cure(tmp_path: Path, hub_cache: None) -> None:
    pairs = write_hub_folder(tmp_path / "pairs", {"train": ("default", [{"anchor": "a", "positive": "b"}])})
    with pytest.raises(DataError, match=r"expected a configuration 'corpus'; .*\['default'\].*from_pairs"):
        load_retrieval_data(pairs)
    with pytest.raises(DataError, match=r"expected judgements in a configuration qrels or default, or in .*set-qrels"):
        load_retrieval_data(write_hub_folder(tmp_path / "set", TEXT_FILES))
