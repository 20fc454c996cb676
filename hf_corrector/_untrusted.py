"""What is checked of a folder of models before anything in it is opened, wherever it came from.

Only safetensors, JSON and the text files of tokenizers are ever opened. Pickles beside them are passed over, code is
never run, and what could mislead a reader is refused: links out of the folder, JSON that says a thing twice, and
headers that are too large or do not describe their file.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_corrector._files import parse_json, read_json, safe_child
from hf_corrector.errors import InputError

MAX_HEADER_BYTES = 100 * 10**6
_REFUSE = "Do not open this folder; get it again from where it came."


def inside(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Return the paths of the files in a folder that fit a pattern, relative to it, in order.

    Raises:
        InputError: If one of them is a link that leads out of the folder.
    """
    wanted = list(patterns)
    depths = {pattern.count("/") for pattern in wanted}
    files = [path for depth in sorted(depths) for path in folder.glob("/".join(["*"] * (depth + 1)))]
    names = {path.relative_to(folder).as_posix(): path for path in files if not path.is_dir()}
    # A star stands for no slash: patterns are of one depth each.
    fitting = [
        name for name in names
        if any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in wanted)
    ]  # fmt: skip
    for name in fitting:
        check_link(folder, names[name])
    return sorted(fitting)


def check_link(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of a folder; those of the Hub's local cache lead into that cache.

    Raises:
        InputError: Naming both ends.
    """
    real, home = path.resolve(), folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed += [home.parent.parent / "blobs", Path(constants.HF_HUB_CACHE).resolve()]
    if not any(real.is_relative_to(one) for one in allowed):
        raise InputError(
            str(path), expected=f"a file inside of {folder}", got=f"a link to {real}",
            cure="Put the file itself there, if it belongs to the model.",
        )  # fmt: skip


def check_files(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Check every file of a folder that fits a pattern, each by its kind; returns their names.

    Raises:
        InputError: If one cannot be trusted; names it and says why.
    """
    names = inside(folder, patterns)
    for name in names:
        path = folder / name
        if name.endswith(".safetensors.index.json"):
            _check_index(path)
        elif name.endswith(".json"):
            read_json(path)
        elif name.endswith(".safetensors"):
            check_safetensors(path)
    return names


def check_safetensors(path: Path) -> None:
    """Check that the header of a file of tensors says everything once, and that its tensors tile the rest of the file.

    Raises:
        InputError: If it does not.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _refused(path, f"a header of at most {min(MAX_HEADER_BYTES, max(size - 8, 0))} bytes", f"{length}")
        header = parse_json(handle.read(length), where=f"header of {path}")
    if not isinstance(header, dict):
        raise _refused(path, "a header that is an object", type(header).__name__)
    spans = sorted(_span(path, name, entry) for name, entry in header.items() if name != "__metadata__")
    ends = [0, *(stop for _, stop in spans)]
    starts = [*(start for start, _ in spans), size - 8 - length]
    if ends != starts:
        raise _refused(path, f"tensors that tile {size - 8 - length} bytes", "gaps, overlaps or more than there is")


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    match entry:
        case {"data_offsets": [int(start), int(stop)]} if 0 <= start <= stop:
            return start, stop
    raise _refused(path, f"two ascending offsets for {name!r}", repr(entry)[:80])


def _check_index(path: Path) -> None:
    """Check which files the parts of a model are looked for in."""
    index = read_json(path)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not all(isinstance(one, str) for one in named.values()):
        raise _refused(path, "a weight_map from names to files", repr(named)[:80])
    for name in sorted(set(named.values())):
        safe_child(path.parent, name)
        if not name.endswith(".safetensors"):
            raise _refused(path, "files named *.safetensors", repr(name))


def _refused(path: Path, expected: str, got: str) -> InputError:
    return InputError(str(path), expected=expected, got=got, cure=_REFUSE)
