"""The manifest: nothing that differs from what was written is believed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cache_helpers import FINGERPRINT, build, make_plan, make_vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_corrector._files import xxh3
from hf_corrector.cache import CacheManifest, TargetCache
from hf_corrector.cache.manifest import check_fingerprint
from hf_corrector.cache.sealed import seal, unseal
from hf_corrector.errors import CacheCorruptedError, CacheError, CacheIncompleteError, CacheMismatchError

BLOCK = "0" * 16


def entry(file: str, rows: int, row0: int, size: int) -> dict[str, Any]:
    return {
        "file": file, "rows": rows, "row0": row0, "bytes": size, "header_xxh3": BLOCK, "block_bytes": 262144,
        "block_xxh3": BLOCK,
    }  # fmt: skip


def manifest_dict() -> dict[str, Any]:
    return {
        "format_version": 1, "generation": 0, "rows": 6, "dim": 4, "dtype": "float32",
        "fingerprint": FINGERPRINT.to_dict(), "texts_hash": "t", "ids_hash": "i", "shard_rows": 4, "created": 1,
        "writer_version": "0",
        "shards": [entry("emb-0.safetensors", 4, 0, 4096 + 64), entry("emb-1.safetensors", 2, 4, 4096 + 32)],
        "ids": entry("ids.safetensors", 6, 0, 4096 + 56 + 60),
    }  # fmt: skip


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return the manifest with the value at a path such as ``shards.0.file`` replaced."""
    whole = json.loads(json.dumps(manifest_dict()))
    inner = whole
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in parents:
        inner = inner[part]
    inner[last] = value
    return dict(whole)


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "manifest.json").write_bytes(seal(content))
    return folder


def test_a_manifest_survives_saving_and_loading(tmp_path: Path) -> None:
    manifest = CacheManifest.from_dict(manifest_dict())
    manifest.save(tmp_path)
    assert CacheManifest.load(tmp_path) == manifest
    assert [item.name for item in tmp_path.iterdir()] == ["manifest.json"]
    assert manifest.to_dict() == manifest_dict()


def test_a_manifest_keeps_any_string_of_the_encoder(tmp_path: Path) -> None:
    odd = replace(FINGERPRINT, prompt='日本 "\\\n\u2028', name="folder\udcff")
    replace(CacheManifest.from_dict(manifest_dict()), fingerprint=odd).save(tmp_path)
    assert CacheManifest.load(tmp_path).fingerprint == odd


def test_every_single_flipped_bit_is_noticed() -> None:
    sealed = seal(manifest_dict())
    for place in range(len(sealed)):
        for bit in range(8):
            damaged = bytearray(sealed)
            damaged[place] ^= 1 << bit
            with pytest.raises(CacheCorruptedError, match="manifest"):
                unseal(bytes(damaged), where="manifest.json")


def test_every_truncation_and_extension_is_noticed() -> None:
    sealed = seal(manifest_dict())
    for length in range(len(sealed)):
        with pytest.raises(CacheCorruptedError):
            unseal(sealed[:length], where="manifest.json")
    for tail in (b"\n", b" ", b"{}", b"\0", sealed):
        with pytest.raises(CacheCorruptedError):
            unseal(sealed + tail, where="manifest.json")


@pytest.mark.parametrize(
    "sealed",
    [b"", b"[]", b"null", b"{}", b'{"checksum": 1}', b'{"a":' * 900 + b"1" + b"}" * 900, b'{"a": 1e999}', b"\xff" * 9],
)
def test_bytes_that_were_never_sealed_are_refused(sealed: bytes) -> None:
    with pytest.raises(CacheCorruptedError, match="Restore the file"):
        unseal(sealed, where="manifest.json")


def test_a_correct_checksum_does_not_excuse_a_duplicate_key(tmp_path: Path) -> None:
    sealed = seal(manifest_dict()).replace(b'  "rows": 6,', b'  "rows": 6,\n  "rows": 6,', 1)
    (tmp_path / "manifest.json").write_bytes(sealed)
    with pytest.raises(CacheCorruptedError, match=r"manifest.json.*without duplicate keys.*\['rows'\]"):
        CacheManifest.load(tmp_path)


def test_another_format_version_is_refused_as_such(tmp_path: Path) -> None:
    with pytest.raises(
        CacheError, match=r"format_version 1 or 2; got format_version 3\. Open it with the version"
    ) as caught:
        CacheManifest.load(write(tmp_path, changed("format_version", 3)))
    assert not isinstance(caught.value, CacheCorruptedError)


@pytest.mark.parametrize(
    "name", ["../emb.safetensors", "/emb.safetensors", "a/b.safetensors", "a\\b", "..", "", "a\0b"]
)
@pytest.mark.parametrize("place", ["shards.1.file", "ids.file"])
def test_file_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, place: str, name: str) -> None:
    with pytest.raises(CacheError, match=r"plain file names.*Do not open this folder"):
        CacheManifest.load(write(tmp_path, changed(place, name)))


@pytest.mark.parametrize("name", ["weights.pt", "emb.pkl", "emb.npy", "LOCK"])
def test_only_safetensors_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CacheCorruptedError, match=r"\*\.safetensors"):
        CacheManifest.load(write(tmp_path, changed("shards.0.file", name)))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("rows", 7, "shards that tile 7 rows"),
        ("rows", 0, "rows of 1 or more"),
        ("rows", True, "rows to be of type int; got bool"),
        ("rows", "6", "rows to be of type int; got str"),
        ("rows", 6.0, "rows to be of type int; got float"),
        ("dim", -4, "dim of 1 or more"),
        ("dim", 10**30, "bytes in emb-0.safetensors"),
        ("dtype", "float64", "a dtype out of"),
        ("generation", -1, "a generation of 0 or more"),
        ("shard_rows", 0, "shard_rows of 1 or more"),
        ("shards", {}, "shards to be of type list"),
        ("shards", [], "shards that tile 6 rows"),
        ("shards.0", None, "an object"),
        ("shards.0.rows", 3, "shards that tile"),
        ("shards.0.rows", 0, "rows in emb-0.safetensors"),
        ("shards.1.row0", 3, "shards that tile"),
        ("shards.1.file", "emb-0.safetensors", "every file named once"),
        ("shards.0.bytes", 4096 + 63, "4160 bytes in emb-0.safetensors; got 4159"),
        ("shards.0.bytes", 10**30, "16 hexadecimal digits for each"),
        ("shards.0.block_xxh3", BLOCK * 2, "each of the 1 blocks"),
        ("shards.0.block_xxh3", BLOCK[1:], "each of the 1 blocks"),
        ("shards.0.block_bytes", 0, "blocks of 4096 bytes to 1 GiB"),
        ("shards.0.block_bytes", 2**40, "blocks of 4096 bytes to 1 GiB"),
        ("shards.0.block_bytes", 8192, "one block length"),
        ("ids.rows", 5, "6 ids"),
        ("ids.bytes", 4100, "6 ids in"),
        ("fingerprint.normalize", "no", "true or false"),
        ("fingerprint", {"name": "x"}, "missing"),
        ("fingerprint", 3, "fingerprint to be of type dict"),
        ("surprise", 1, r"unknown \['surprise'\]"),
    ],
)
def test_contradictions_are_refused_even_with_a_correct_checksum(
    tmp_path: Path, place: str, value: Any, message: str
) -> None:
    with pytest.raises(CacheCorruptedError, match=message):
        CacheManifest.load(write(tmp_path, changed(place, value)))


PLACES = [
    *manifest_dict(),
    *(f"{part}.{key}" for part in ("shards.0", "ids", "fingerprint") for key in entry("", 0, 0, 0)),
]
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)


@given(place=st.sampled_from(PLACES), value=JSON_VALUES)
@settings(max_examples=300, deadline=None)
def test_no_content_whatever_escapes_as_another_exception(place: str, value: Any) -> None:
    try:
        CacheManifest.from_dict(unseal(seal(changed(place, value)), where="the file"), where="the file")
    except CacheError as error:
        assert str(error).startswith("the file: expected ")


def test_a_missing_folder_is_told_from_an_empty_one_and_from_an_unfinished_build(tmp_path: Path) -> None:
    with pytest.raises(CacheIncompleteError, match=r"nowhere: expected a finished cache.*no such folder"):
        TargetCache.open(tmp_path / "nowhere")
    with pytest.raises(CacheIncompleteError, match="a folder without one"):
        TargetCache.open(tmp_path)


def test_encoders_that_differ_are_both_named_with_the_fields(tmp_path: Path) -> None:
    build(tmp_path / "cache", make_plan(), make_vectors())
    other = replace(FINGERPRINT, name="other/encoder", prompt="", max_length=64, revision=None)
    with pytest.raises(CacheMismatchError) as caught:
        TargetCache.open(tmp_path / "cache", expected=other)
    message = str(caught.value)
    assert "expected vectors of the target encoder 'other/encoder'; got vectors of the target encoder" in message
    assert "'some/encoder' at revision abc" in message
    assert "prompt: '' / 'passage: '" in message
    assert "max_length: 64 / 128" in message
    assert "pooling" not in message


def test_the_name_of_an_encoder_alone_is_no_difference() -> None:
    other = replace(FINGERPRINT, name="a/copy", revision="another")
    check_fingerprint("cache", expected=other, got=FINGERPRINT)


def test_the_checksum_of_a_manifest_is_that_of_its_file_in_either_format(tmp_path: Path) -> None:
    """A corrector notes it: reading a manifest of an earlier version must not give it another."""
    build(tmp_path, make_plan(), make_vectors())
    plain = CacheManifest.load(tmp_path)
    assert not {"texts", "places", "ancestors"} & json.loads((tmp_path / "manifest.json").read_text()).keys()
    for manifest in (plain, replace(plain, ancestors=("a" * 16,))):
        manifest.save(tmp_path)
        loaded = CacheManifest.load(tmp_path)
        assert loaded == manifest
        assert loaded.checksum == xxh3((tmp_path / "manifest.json").read_bytes())
