import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_corrector.data.tokens import TokenStore, token_store_key
from hf_corrector.errors import CacheCorruptedError, CacheIncompleteError, CacheMismatchError, DataError

KEY = token_store_key(tokenizer="letters", prompt="", max_length=32, texts_hash="t")


def letters(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def make_texts(count: int) -> list[str]:
    return ["ab" * (number % 7) + str(number) for number in range(count)]


def test_store_returns_what_was_tokenised_across_batches(tmp_path: Path) -> None:
    texts = make_texts(2345)
    store = TokenStore.build(tmp_path / "store", texts, letters, key=KEY)
    assert len(store) == 2345
    assert store.tokens(range(2345)) == letters(texts)
    assert store.lengths.dtype == np.int32
    assert store.lengths.tolist() == [len(text) for text in texts]


def test_opened_store_equals_the_built_one(tmp_path: Path) -> None:
    built = TokenStore.build(tmp_path / "store", make_texts(50), letters, key=KEY, progress=True)
    opened = TokenStore.open(tmp_path / "store", key=KEY)
    assert opened.tokens(range(50)) == built.tokens(range(50))
    assert opened.lengths.tolist() == built.lengths.tolist()


def test_rows_come_in_the_order_asked_for_and_may_repeat(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "store", ["a", "bc", "d"], letters, key=KEY)
    assert store.tokens([2, 0, 2]) == [[100], [97], [100]]
    assert store.tokens(np.array([1])) == [[98, 99]]
    assert store.tokens([]) == []


@pytest.mark.parametrize("row", [-1, 3])
def test_rows_outside_the_store_are_refused(tmp_path: Path, row: int) -> None:
    store = TokenStore.build(tmp_path / "store", ["a", "b", "c"], letters, key=KEY)
    with pytest.raises(DataError, match="expected rows from 0 to 2"):
        store.tokens([0, row])


def test_tokenizer_gets_a_thousand_plain_strings_at_a_time(tmp_path: Path) -> None:
    sizes: list[int] = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        sizes.append(len(texts))
        return letters(texts)

    column = Dataset.from_dict({"text": make_texts(2001)})["text"]
    store = TokenStore.build(tmp_path / "store", column, tokenize, key=KEY)
    assert sizes == [1000, 1000, 1]
    assert store.tokens([2000]) == letters(make_texts(2001)[-1:])


def test_texts_without_tokens_are_kept_as_empty_lists(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "mixed", ["", "a", ""], letters, key=KEY)
    assert store.tokens([0, 1, 2]) == [[], [97], []]
    assert TokenStore.build(tmp_path / "empty", ["", ""], letters, key=KEY).tokens([1]) == [[]]


def test_arrays_are_memory_mapped_and_read_only(tmp_path: Path) -> None:
    TokenStore.build(tmp_path / "store", make_texts(10), letters, key=KEY)
    for name, dtype in (("tokens.npy", "int32"), ("offsets.npy", "int64")):
        array = np.load(tmp_path / "store" / name, mmap_mode="r", allow_pickle=False)
        assert isinstance(array, np.memmap) and array.dtype == dtype


def test_key_depends_on_every_part() -> None:
    parts: dict[str, str] = {"tokenizer": "a", "prompt": "b", "texts_hash": "c"}
    keys = {token_store_key(**parts, max_length=length) for length in (1, 2)}
    keys |= {token_store_key(**{**parts, name: "x"}, max_length=1) for name in parts}
    assert len(keys) == 5


def test_another_key_is_refused_naming_both(tmp_path: Path) -> None:
    TokenStore.build(tmp_path / "store", ["a"], letters, key=KEY)
    with pytest.raises(CacheMismatchError, match=f"expected tokens with the key other; got the key {KEY}"):
        TokenStore.open(tmp_path / "store", key="other")
    with pytest.raises(CacheMismatchError):
        TokenStore.open_or_build(tmp_path / "store", ["a"], letters, key="other")
    assert TokenStore.open(tmp_path / "store", key=KEY).tokens([0]) == [[97]]


def test_open_or_build_tokenises_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def tokenize(texts: list[str]) -> list[list[int]]:
        calls.append(len(texts))
        return letters(texts)

    for _ in range(2):
        store = TokenStore.open_or_build(tmp_path / "deep" / "store", ["a", "b"], tokenize, key=KEY)
        assert store.tokens([1]) == [[98]]
    assert calls == [2]


def test_missing_store_is_incomplete(tmp_path: Path) -> None:
    with pytest.raises(CacheIncompleteError, match=r"got no store\.json"):
        TokenStore.open(tmp_path / "nothing", key=KEY)


def test_failed_rebuild_leaves_no_store_and_no_temporary_file(tmp_path: Path) -> None:
    TokenStore.build(tmp_path / "store", make_texts(1500), letters, key=KEY)

    def fail_late(texts: list[str]) -> list[list[int]]:
        if len(texts) < 1000:
            raise RuntimeError("out of memory")
        return letters(texts)

    with pytest.raises(RuntimeError):
        TokenStore.build(tmp_path / "store", make_texts(1500), fail_late, key=KEY)
    with pytest.raises(CacheIncompleteError):
        TokenStore.open(tmp_path / "store", key=KEY)
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["offsets.npy", "tokens.npy"]
    rebuilt = TokenStore.open_or_build(tmp_path / "store", ["a"], letters, key=KEY)
    assert rebuilt.tokens([0]) == [[97]]


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def change_manifest(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        manifest = path.with_name("store.json")
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **changes}))

    return change


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip_last_byte, "expected the checksum"), (cut, "bytes; got"), (Path.unlink, "got no file")],
)
def test_damaged_files_are_found_on_opening(
    tmp_path: Path, name: str, damage: Callable[[Path], None], message: str
) -> None:
    TokenStore.build(tmp_path / "store", make_texts(20), letters, key=KEY)
    damage(tmp_path / "store" / name)
    with pytest.raises(CacheCorruptedError, match=message) as caught:
        TokenStore.open_or_build(tmp_path / "store", make_texts(20), letters, key=KEY)
    assert name in caught.value.where


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (change_manifest(tokens=3), CacheCorruptedError),
        (change_manifest(texts=3), CacheCorruptedError),
        (change_manifest(extra=1), CacheCorruptedError),
        (change_manifest(format_version=2), CacheMismatchError),
        (lambda path: path.with_name("store.json").write_text("{"), CacheCorruptedError),
    ],
)
def test_damaged_manifests_are_found_on_opening(
    tmp_path: Path, damage: Callable[[Path], None], error: type[Exception]
) -> None:
    TokenStore.build(tmp_path / "store", make_texts(20), letters, key=KEY)
    damage(tmp_path / "store" / "tokens.npy")
    with pytest.raises(error):
        TokenStore.open(tmp_path / "store", key=KEY)


def test_checking_sizes_only_skips_the_checksum(tmp_path: Path) -> None:
    TokenStore.build(tmp_path / "store", make_texts(20), letters, key=KEY)
    flip_last_byte(tmp_path / "store" / "tokens.npy")
    assert len(TokenStore.open(tmp_path / "store", key=KEY, verify="sizes")) == 20


@pytest.mark.parametrize(
    ("tokenize", "message"),
    [
        (lambda texts: letters(texts)[1:], "texts 0 to 1: expected 2 token lists; got 1"),
        (lambda texts: [[-1] for _ in texts], r"expected token ids from 0 to 2\*\*31 - 1; got -1 to -1"),
        (lambda texts: [[2**31] for _ in texts], "expected token ids"),
    ],
)
def test_wrong_tokenizers_are_refused(
    tmp_path: Path, tokenize: Callable[[list[str]], list[list[int]]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        TokenStore.build(tmp_path / "store", ["a", "b"], tokenize, key=KEY)


def test_no_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected at least one text"):
        TokenStore.build(tmp_path / "store", [], letters, key=KEY)


def test_pickled_store_carries_its_path_and_no_tokens(tmp_path: Path) -> None:
    store = TokenStore.build(tmp_path / "store", make_texts(5000), letters, key=KEY)
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert pickle.loads(data).tokens([4999]) == store.tokens([4999])
