"""Progress is drawn on a terminal, and on nothing else; ``--quiet`` draws nothing anywhere."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from rag_helpers import generator_of
from transformers.utils import logging

from hf_corrector._progress import working
from hf_corrector.cli.main import COMMANDS, main
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel

WORDS = ["copy", "move", "list", "count", "sort", "find", "print", "replace", "delete", "join", "split", "merge"]
TARGETS = 120


class Stream(io.StringIO):
    """What a command draws on."""

    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture(scope="module")
def place(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a cache, an encoder that has moved on, and an upgrade between the two."""
    root = tmp_path_factory.mktemp("progress")
    data = root / "data"
    (data / "qrels").mkdir(parents=True)
    targets = [{"_id": f"t{n}", "title": "", "text": f"{WORDS[n % 12]} the files number {n}"} for n in range(TARGETS)]
    queries = [{"_id": f"q{n}", "text": f"how to {WORDS[n % 12]} {n}", "answers": [str(n)]} for n in range(TARGETS)]
    for name, rows in (("corpus", targets), ("queries", queries)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, numbers in (("train", range(40)), ("test", range(80, TARGETS))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\tt{n}\t1" for n in numbers)]
        (data / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    embed = ["embed", "--data", str(data), "--model", tiny_encoder, "--output_dir", str(root / "cache"), "--quiet"]
    assert main(embed) == 0
    model, generator = DualEncoderModel.from_encoder(tiny_encoder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(root / "new")
    assert main([*call("upgrade", root, tiny_encoder, root / "up"), "--quiet"]) in (0, 3, 4)
    for part in generator_of("t5"):
        part.save_pretrained(root / "reader")
    assert main([*reading_run(root, tiny_encoder, root / "read"), "--quiet"]) == 0
    return root


def call(command: str, place: Path, encoder: str, out: Path) -> list[str]:
    """Return a small run of a command."""
    data, cache, new = (str(place / name) for name in ("data", "cache", "new"))
    corrector, to = str(place / "up" / "corrector"), ["--output_dir", str(out)]
    return {
        "embed": ["embed", "--data", data, "--model", encoder, *to],
        "train": [
            "train", "--data", data, "--model", encoder, "--max_steps", "3", "--per_device_train_batch_size", "8",
            "--report_to", "none", "--save_strategy", "no", "--corrector_warmup_steps", "1", "--use_cpu", *to,
        ],
        "upgrade": [
            "upgrade", "--old_cache", cache, "--new_model", new, "--old_model", encoder, "--data", data, "--pairs",
            "40", "--kinds", "mean_shift", "--side", "none", *to,
        ],
        "plan": [
            "plan", "--cache", cache, "--model", new, "--data", data, "--probe", "40", "--families", "mean_shift",
            "--side", "none", *to,
        ],
        "evaluate": ["evaluate", "--cache", cache, "--model", new, "--data", data, "--corrector", corrector, *to],
        "apply": ["apply", "--cache", cache, "--corrector", corrector, *to],
        "search": ["search", "--cache", cache, "--model", encoder, "--data", data, "--query", "sort the files"],
        "verify": ["verify", cache],
        "report": ["report", str(place / "up"), "--output", str(out)],
        "push": ["push", str(place / "up"), "someone/up"],
        "rag-train": reading_run(place, encoder, out),
        "rag-answer": ["rag-answer", "--model", str(place / "read"), "--question", "how to sort 4"],
    }[command]  # fmt: skip


def reading_run(place: Path, encoder: str, out: Path) -> list[str]:
    return [
        "rag-train", "--data", str(place / "data"), "--model", encoder, "--reader", str(place / "reader"), "--use_cpu",
        "--max_steps", "2", "--per_device_train_batch_size", "4", "--num_passages", "2",
        "--corrector_warmup_steps", "1", "--report_to", "none", "--save_strategy", "no", "--answer_max_length", "16",
        "--output_dir", str(out),
    ]  # fmt: skip


# The demo is a training run with other defaults. Nothing that search and report do can be counted.
COUNTED = ("embed", "train", "rag-train", "upgrade", "plan", "evaluate", "apply", "verify")


def drawn(arguments: list[str], monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    stream = Stream(terminal=terminal)
    # As in a new process: commands set it to errors, by which transformers' arguments decide on bars of their own.
    logging.set_verbosity_warning()
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", stream)
        assert main(arguments) in (0, 3, 4), stream.getvalue()
    return stream.getvalue()


@pytest.mark.parametrize("command", COUNTED)
def test_bars_are_drawn_on_a_terminal(
    command: str, place: Path, tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "\r" in drawn(call(command, place, tiny_encoder, tmp_path / "out"), monkeypatch, terminal=True)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"demo"}))
def test_nothing_is_drawn_elsewhere_nor_where_quiet_is_asked_for(
    command: str, place: Path, tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = call(command, place, tiny_encoder, tmp_path / "out")
    assert drawn(arguments, monkeypatch, terminal=False) == ""
    quiet = [*call(command, place, tiny_encoder, tmp_path / "again"), "--quiet"]
    assert drawn(quiet, monkeypatch, terminal=True) == ""


def test_long_work_shows_itself_after_a_second_and_is_gone_when_done(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=True)
    monkeypatch.setattr(sys, "stderr", stream)
    with working("fit", shown=True):
        pass
    assert "fit" not in stream.getvalue()
    with working("fit", shown=True):
        time.sleep(1.6)
        assert "fit … 00:01" in stream.getvalue()
    # The last thing written takes the line away again.
    assert stream.getvalue().endswith("\r") and not stream.getvalue().rstrip("\r ").endswith("fit")
    before = stream.getvalue()
    with working("fit", shown=False):
        time.sleep(1.3)
    assert stream.getvalue() == before


def test_an_error_in_long_work_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Stream(terminal=True))
    with pytest.raises(KeyError, match="gone"), working("fit", shown=True):
        raise KeyError("gone")
