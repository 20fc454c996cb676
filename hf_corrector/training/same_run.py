"""Whether a run that is resumed is the run that was interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hf_corrector._files import xxh3
from hf_corrector.errors import CheckpointError

NOT_THERE = "<no such argument>"


def check_settings(folder: Path, *, written: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with other arguments than a checkpoint was written with.

    Args:
        folder: The checkpoint.
        written: Arguments by name, as read from it.
        now: The same of the run that is to go on.

    Raises:
        CheckpointError: Naming all that differ, with both values.
    """
    # As JSON has them. Earlier versions wrote fewer, and as text.
    found = json.loads(json.dumps(now, default=str))
    differ = [name for name in written if str(written[name]) != str(found.get(name, NOT_THERE))]
    if differ:
        first, second = (
            ", ".join(f"{name}={values.get(name, NOT_THERE)!r}" for name in differ) for values in (written, found)
        )
        raise CheckpointError(
            str(folder), expected=f"the arguments it was written with, {first}", got=second,
            cure="Resume with the same arguments, or train from the start in another output_dir.",
        )  # fmt: skip


def note_of_rows(rows: torch.Tensor | None) -> dict[str, Any]:
    """Return number and hash of the rows held out, ``(n,)`` int64, as a checkpoint keeps them."""
    if rows is None:
        return {"targets": 0, "hash": ""}
    return {"targets": len(rows), "hash": xxh3(rows.numpy().tobytes())}


def check_held_out(folder: Path, *, written: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to fit the corrector on targets that were held out until then.

    Args:
        folder: The checkpoint.
        written: What :func:`note_of_rows` had said.
        now: What it says now.

    Raises:
        CheckpointError: If other targets are held out now, or none.
    """
    if dict(written) == dict(now):
        return
    same = written["targets"] == now["targets"]
    raise CheckpointError(
        str(folder), expected=f"{written['targets']} targets held out from the corrector, as when it was written",
        got=f"{now['targets']}{' others' if same else ''}",
        cure="Call trainer.hold_out(split) as before, with the same splits and targets."
        if written["targets"] else "Leave trainer.hold_out(split) out, as before, or train from the start.",
    )  # fmt: skip
