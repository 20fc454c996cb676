import ast
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from hf_corrector.data.anonymous_source import SourceFile, is_stub
from hf_corrector.data.datasets import RetrievalData, validate
from hf_corrector.data.retrieval import given_answers
from hf_corrector.data.stdlib import (
    python_source_data,
    python_source_questions,
    standard_library_data,
)
from hf_corrector.errors import DataError


def anonymous(text: str) -> dict[str, str]:
    source = SourceFile(text)
    return {".".join(item.path): source.anonymous(item.node) for item in source.documented()}


# --- cutting out definitions ---


def test_function_loses_its_docstring_and_its_name_also_where_it_calls_itself() -> None:
    text = 'def fact(n):\n    """Multiply."""\n    # fact of n\n    return n * fact(n - 1) if n else factor\n'
    assert anonymous(text) == {"fact": "def _(n):\n    # fact of n\n    return n * _(n - 1) if n else factor"}


def test_names_that_are_no_words_are_masked_in_strings_and_comments_too() -> None:
    text = 'def read_all(f):\n    "Read."\n    # read_all is slow, read_all_2 is not\n    raise E(f"read_all({f})")\n'
    assert anonymous(text)["read_all"] == 'def _(f):\n    # _ is slow, read_all_2 is not\n    raise E(f"_({f})")'


def test_method_is_dedented_and_its_super_call_masked() -> None:
    text = 'class A(B):\n    @slow\n    def run(self):\n        """Run."""\n        return super().run() + "\\n"\n'
    assert anonymous(text) == {"A.run": '@slow\ndef _(self):\n    return super()._() + "\\n"'}


def test_class_loses_the_docstrings_of_its_methods_but_keeps_their_names() -> None:
    text = (
        'class Box:\n    """A box."""\n\n    size = 1\n\n    def open(self):\n        """Open it."""\n'
        '    def copy(self):\n        "Copy."\n        return Box()\n'
    )
    found = anonymous(text)
    assert found["Box"] == (
        "class _:\n\n    size = 1\n\n    def open(self):\n        ...\n    def copy(self):\n        return _()"
    )
    assert found["Box.copy"] == "def _(self):\n    return Box()"


def test_definitions_inside_conditions_and_functions_are_found() -> None:
    text = (
        "if True:\n    async def a():\n        'A.'\n        await b\nelse:\n    def c():\n        'C.'\n"
        "        def d():\n            'D.'\n            return 1\n        return d\n"
    )
    assert anonymous(text)["a"] == "async def _():\n    await b"
    assert list(anonymous(text)) == ["a", "c", "c.d"]


def test_undocumented_source_keeps_its_name_and_loses_every_docstring() -> None:
    text = 'class A:\n    "An A."\n    @slow\n    def run(self):\n        """Run."""\n        return self.run()\n'
    source = SourceFile(text)
    found = {".".join(item.path): source.undocumented(item.node) for item in source.documented()}
    assert found["A.run"] == "@slow\ndef run(self):\n    return self.run()"
    assert found["A"] == "class A:\n    @slow\n    def run(self):\n        return self.run()"


def test_kinds_are_told_apart() -> None:
    text = "class A:\n 'A.'\n if x:\n  def m(self):\n   'M.'\n   match x:\n    case 1:\n     def f():\n      'F.'\n"
    assert [item.kind for item in SourceFile(text).documented()] == ["class", "method", "function"]


def test_positions_are_right_beyond_ascii_on_one_line_and_in_long_strings() -> None:
    assert anonymous("def é(ü='äö'): 'Dök.'; return é(ü)\n") == {"é": "def _(ü='äö'): ; return _(ü)"}
    text = 'class C:\n    def f(self):\n        """Doc."""\n        return """x\n  y\n        z"""\n'
    assert anonymous(text)["C.f"] == 'def _(self):\n    return """x\n  y\n    z"""'


@pytest.mark.parametrize(
    ("body", "stub"),
    [
        ("'Doc.'", True),
        ("'Doc.'\n    pass", True),
        ("'Doc.'\n    ...", True),
        ("'Doc.'\n    raise NotImplementedError", True),
        ("'Doc.'\n    raise NotImplementedError('x')", True),
        ("'Doc.'\n    raise ValueError", False),
        ("'Doc.'\n    return", False),
    ],
)
def test_stubs_are_bodies_that_do_nothing(body: str, stub: bool) -> None:
    (item,) = SourceFile(f"def f():\n    {body}\n").documented()
    assert is_stub(item.node) is stub


# --- data sets from a folder ---


def write_sources(root: Path, count: int = 60) -> Path:
    root.mkdir()
    for number in range(count):
        (root / f"m{number:02}.py").write_text(
            f'def name_{number}(x):\n    """Return {number} times the x.\n\n    More."""\n    return {number} * x\n'
        )
    return root


def queries_of(data: RetrievalData) -> dict[str, list[str]]:
    return {
        query: ids for split in data.splits.values()
        for query, ids in zip(split["query"][:], split["positive_ids"][:], strict=True)
    }  # fmt: skip


def test_query_is_the_first_paragraph_and_metadata_keep_the_name(tmp_path: Path) -> None:
    root = write_sources(tmp_path / "src")
    (root / "pkg").mkdir()
    (root / "pkg" / "__init__.py").write_text(
        "class Deep:\n    def go(self):\n"
        '        """\n        Walk down\n          the tree quickly.\n\n        No."""\n'
        "        go()\n"
    )
    data = python_source_data(root)
    validate(data)
    assert queries_of(data)["Walk down the tree quickly."] == ["pkg.Deep.go"]
    row = data.corpus["id"][:].index("pkg.Deep.go")
    assert data.corpus["text"][row] == "def _(self):\n    _()"
    assert json.loads(data.corpus["metadata"][row]) == {"module": "pkg", "kind": "method", "name": "go"}


def test_equal_targets_become_one_and_equal_queries_collect_targets(tmp_path: Path) -> None:
    root = write_sources(tmp_path / "src")
    (root / "a.py").write_text(
        "def one(x):\n    'Make the thing bigger now.'\n    return x + 1\n"
        "def two(x):\n    'Increase the thing by one.'\n    return x + 1\n"
        "def three(x):\n    'Increase the thing by one.'\n    return 1 + x\n"
    )
    data = python_source_data(root)
    found = queries_of(data)
    assert found["Make the thing bigger now."] == ["a.one"]
    assert found["Increase the thing by one."] == ["a.one", "a.three"]
    assert "a.two" not in data.corpus["id"][:]


def test_names_defined_twice_get_a_number(tmp_path: Path) -> None:
    root = write_sources(tmp_path / "src")
    (root / "a.py").write_text(
        "if x:\n    def f():\n        'Do it the first way.'\n        return 1\n"
        "else:\n    def f():\n        'Do it the other way.'\n        return 2\n"
    )
    ids = python_source_data(root).corpus["id"][:]
    assert "a.f" in ids and "a.f#2" in ids


def test_tests_stubs_and_short_docstrings_are_left_out(tmp_path: Path) -> None:
    root = write_sources(tmp_path / "src")
    body = '\n    """Return something of great use."""\n    return 77\n'
    for folder in ("tests", "site-packages"):
        (root / folder).mkdir()
        (root / folder / "a.py").write_text("def f():" + body)
    (root / "test_a.py").write_text("def f():" + body)
    (root / "b.py").write_text(
        'def f():\n    "Return it."\n    return 7\ndef g():\n    "Return nothing at all here."\n'
    )
    assert len(python_source_data(root).corpus) == 60


def test_files_that_cannot_be_parsed_are_counted_and_skipped(tmp_path: Path) -> None:
    root = write_sources(tmp_path / "src")
    (root / "bad.py").write_text("def f(:\n")
    (root / "null.py").write_bytes(b"x = 1\0\n")
    (root / "latin.py").write_bytes(b"x = '\xe9'\n")
    (root / "deep.py").write_text("x = " + "(" * 500 + ")" * 500 + "\n")
    (root / "escape.py").write_text("x = '\\d'\n")
    data = python_source_data(root)
    assert data.notes == ("files that could not be parsed: 4, the first bad.py",)


def test_declared_encodings_are_honoured(tmp_path: Path) -> None:
    root = write_sources(tmp_path / "src")
    source = "# -*- coding: latin-1 -*-\ndef f():\n    'Say caf\xe9 to all people.'\n    return 5\n"
    (root / "latin.py").write_bytes(source.encode("latin-1"))
    assert queries_of(python_source_data(root))["Say café to all people."] == ["latin.f"]


def test_adding_a_file_moves_no_other_query(tmp_path: Path) -> None:
    root = write_sources(tmp_path / "src")
    before = {name: set(split["query_id"]) for name, split in python_source_data(root).splits.items()}
    (root / "added.py").write_text("def f():\n    'Return the best of all.'\n    return best\n")
    after = {name: set(split["query_id"]) for name, split in python_source_data(root).splits.items()}
    assert all(before[name] <= after[name] for name in before)


def test_folders_without_enough_source_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected Python files with docstrings"):
        python_source_data(tmp_path)
    with pytest.raises(DataError, match="expected queries for"):
        python_source_data(write_sources(tmp_path / "src", 2))


def test_questions_ask_for_the_name_that_their_targets_keep(tmp_path: Path) -> None:
    root = write_sources(tmp_path / "src")
    (root / "a.py").write_text(
        "def one(x):\n    'Increase the thing a bit.'\n    return x + 1\n"
        "def two(x):\n    'Increase the thing a bit.'\n    return two(x) + 1\n"
        "def read_all(f):\n    'Read all of the file.'\n    return 7\n"
        "class Box:\n    'Holds whatever is put in.'\n    def __repr__(self):\n"
        "        'Return something to look at.'\n        return 8\n"
    )
    data = python_source_questions(root)
    validate(data)
    answers = {
        query: names for split in data.splits.values()
        for query, names in zip(split["query"][:], given_answers(split), strict=True)
    }  # fmt: skip
    assert answers["Return 7 times the x."] == ["name_7"]
    assert answers["Increase the thing a bit."] == ["one", "two"]
    assert answers["Holds whatever is put in."] == ["Box"]
    texts = dict(zip(data.corpus["id"], data.corpus["text"], strict=True))
    assert texts["a.two"] == "def two(x):\n    return two(x) + 1"
    assert texts["a.Box"] == "class Box:\n    def __repr__(self):\n        return 8"
    assert not {"a.read_all", "a.Box.__repr__"} & texts.keys()


# --- the standard library itself ---


@pytest.fixture(scope="module")
def library() -> RetrievalData:
    start = time.process_time()
    data = standard_library_data()
    assert time.process_time() - start < 30, "building the default data should take about 10 seconds"
    return data


def test_library_has_thousands_of_pairs_in_three_valid_splits(library: RetrievalData) -> None:
    validate(library)
    sizes = {name: len(split) for name, split in library.splits.items()}
    total = sum(sizes.values())
    assert total > 5000 and len(library.corpus) > 5000
    assert 0.75 < sizes["train"] / total < 0.85
    assert 0.03 < sizes["dev"] / total < 0.07
    assert 0.12 < sizes["test"] / total < 0.18


def test_library_queries_and_targets_are_distinct_and_stay_on_one_side(library: RetrievalData) -> None:
    texts = library.corpus["text"][:]
    assert len(set(texts)) == len(texts)
    queries = [query for split in library.splits.values() for query in split["query"]]
    assert len(set(queries)) == len(queries)
    targets = [{item for ids in split["positive_ids"] for item in ids} for split in library.splits.values()]
    assert sum(map(len, targets)) == len(set.union(*targets)) == len(texts)


def test_library_targets_are_python_without_names_or_docstrings(library: RetrievalData) -> None:
    for text in library.corpus["text"][::10]:
        (node,) = ast.parse(text).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        assert node.name == "_" and ast.get_docstring(node) is None


def test_library_knows_its_modules(library: RetrievalData) -> None:
    row = library.corpus["id"][:].index("json.decoder.JSONDecoder.decode")
    assert json.loads(library.corpus["metadata"][row]) == {"module": "json.decoder", "kind": "method", "name": "decode"}
    assert library.corpus["text"][row].startswith("def _(self, s, _w=WHITESPACE.match):\n    obj, end")
    modules = {json.loads(value)["module"].split(".")[0] for value in library.corpus["metadata"]}
    assert {"os", "heapq", "asyncio"} <= modules
    assert not {"test", "encodings", "pydoc_data"} & modules


def test_library_questions_are_answered_by_their_targets_and_not_by_themselves() -> None:
    # On a part of the library: the whole would take as long again as the data above.
    data = python_source_questions(Path(sysconfig.get_path("stdlib")) / "asyncio")
    validate(data)
    assert len(data.corpus) > 100 and set(data.splits) == {"train", "dev", "test"}
    texts = dict(zip(data.corpus["id"], data.corpus["text"], strict=True))
    for split in data.splits.values():
        for query, ids, answers in zip(split["query"], split["positive_ids"], given_answers(split), strict=True):
            assert answers and not any(name in query for name in answers)
            assert all(any(f" {name}" in texts[target] for name in answers) for target in ids)


def test_data_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "import sysconfig, pathlib\n"
        "from hf_corrector._files import hash_strings\n"
        "from hf_corrector.data.datasets import texts_hash\n"
        "from hf_corrector.data.stdlib import python_source_data\n"
        "data = python_source_data(pathlib.Path(sysconfig.get_path('stdlib')) / 'asyncio')\n"
        "print(texts_hash(data.corpus), hash_strings(str(split[:]) for split in data.splits.values()))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
