"""Durable writes and strict reads."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cache_helpers import limit_file_size, run_child

from hf_corrector._files import (
    MAX_JSON_BYTES,
    atomic_write,
    hash_strings,
    make_directory,
    parse_json,
    read_json,
    safe_child,
    write_json,
    xxh3,
)
from hf_corrector.errors import InputError


def overwrite_on_a_full_disk(path: Path) -> None:
    limit_file_size(1000)
    try:
        atomic_write(path, lambda temporary: temporary.write_bytes(b"new" * 1000) and None)
    except OSError:
        raise SystemExit(3) from None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        temporary.write_text("half of the new con")
        raise RuntimeError("interrupted")

    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="interrupted"):
        atomic_write(path, fail)
    assert {item.name: item.read_text() for item in tmp_path.iterdir()} == {"file": "old"}


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    assert run_child(overwrite_on_a_full_disk, path) == 3
    assert {item.name: item.read_text() for item in tmp_path.iterdir()} == {"file": "old"}


def test_an_atomic_write_replaces_the_file_by_another_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with open(path) as reader:
        atomic_write(path, lambda temporary: temporary.write_text("new") and None)
        assert reader.read() == "old"
    assert path.read_text() == "new"


def traced_calls(folder: Path) -> list[str]:
    """Write a file in a traced process; return its calls that flush or rename, in order."""
    code = (
        "import sys; from pathlib import Path; from hf_corrector._files import make_directory, write_json\n"
        "make_directory(Path(sys.argv[1])); write_json(Path(sys.argv[1]) / 'a.json', {})"
    )
    trace = folder / "trace"
    command = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-y",
        "-e",
        "trace=fsync,fdatasync,rename,renameat,renameat2,mkdir",
        "-o",
        str(trace),
    ]
    subprocess.run([*command, sys.executable, "-c", code, str(folder / "new" / "inner")], check=True)
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines() if f"{folder}" in line]
    return [re.sub(r"\d+<", "<", call.replace(str(folder), "").rsplit(" = ", 1)[0]).rstrip() for call in calls]


@pytest.mark.skipif(shutil.which("strace") is None or platform.machine() != "x86_64", reason="needs strace on x86-64")
def test_data_are_flushed_before_the_name_appears_and_the_folder_after(tmp_path: Path) -> None:
    calls = [re.sub(r"\.\d+\.tmp", ".tmp", call) for call in traced_calls(tmp_path)]
    assert [call for call in calls if not call.startswith("mkdir")] == [
        "fsync(</new>)",
        "fsync(<>)",
        "fsync(</new/inner/a.json.tmp>)",
        'rename("/new/inner/a.json.tmp", "/new/inner/a.json")',
        "fsync(</new/inner>)",
    ]


def test_make_directory_creates_parents_and_accepts_an_existing_folder(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    make_directory(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_json_round_trip_keeps_text_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"größe": 1, "日本": [None, 1.5]})
    assert "größe" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"größe": 1, "日本": [None, 1.5]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', r"duplicate keys \['x'\]"),
        (b'{"a": NaN}', "the constant NaN"),
        (b'{"a": -Infinity}', "the constant -Infinity"),
        (b'{"a": ', "Expecting value"),
        (b"\xff\xfe", "can't decode"),
        (b"[" * 100_000, "recursion|nested|depth"),
        (b"1" * 100_000, "digits"),
    ],
)
def test_unsound_json_is_refused_with_its_place(text: bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"(?s)some.json.*({message})"):
        parse_json(text, where="some.json")


def test_many_duplicate_keys_are_refused_quickly() -> None:
    text = "{" + ", ".join(f'"{number}": 0, "{number}": 1' for number in range(50_000)) + "}"
    start = time.monotonic()
    with pytest.raises(InputError, match="duplicate keys"):
        parse_json(text.encode(), where="some.json")
    assert time.monotonic() - start < 5


def test_a_huge_json_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with open(path, "wb") as handle:
        handle.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(InputError, match=rf"huge.json: expected at most {MAX_JSON_BYTES} bytes"):
        read_json(path)


def test_a_pipe_in_place_of_a_json_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match="no regular file"):
        read_json(tmp_path / "pipe.json")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "a\0b", "C:a"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="plain file names"):
        safe_child(tmp_path, name)


def test_plain_names_are_joined(tmp_path: Path) -> None:
    assert safe_child(tmp_path, "..a.safetensors") == tmp_path / "..a.safetensors"


def test_hashes_know_order_and_boundaries() -> None:
    hashes = {hash_strings(strings) for strings in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], ["ab", "c", ""])}
    assert len(hashes) == 5
    assert hash_strings(iter(["ab", "c"])) == hash_strings(["ab", "c"])
    assert xxh3(b"") == "2d06800538d394c2"
