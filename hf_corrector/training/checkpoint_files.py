"""The folders of checkpoints: which are whole, what belongs to them, and which are removed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_corrector._files import fsync_directory, read_json, write_json
from hf_corrector.errors import CheckpointError

COMPLETE_MARKER = "COMPLETE"
_REMOVED = ".removed-"
logger = logging.get_logger(__name__)


def newest_complete_checkpoint(output_dir: Path) -> Path | None:
    """Return the checkpoint with the highest step that was written to its end; incomplete ones are reported."""
    found = {}
    for step, folder in _checkpoints(output_dir).items():
        if (folder / COMPLETE_MARKER).exists():
            found[step] = folder
        else:
            logger.warning(f"{folder} was not written to its end and is passed over.")
    return found[max(found)] if found else None


def _checkpoints(output_dir: Path) -> dict[int, Path]:
    named = {one: one.name.rsplit("-", 1)[-1] for one in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return {int(number): folder for folder, number in named.items() if number.isdigit() and folder.is_dir()}


def flush_folder(folder: Path) -> None:
    """Flush all files of a folder to the disk; transformers only writes them."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        elif file.is_dir():
            fsync_directory(file)


def remove_folder(folder: Path) -> None:
    """Delete a folder under another name, so that a kill in the middle leaves no half of it that looks whole."""
    for left in folder.parent.glob(f"{_REMOVED}*"):
        shutil.rmtree(left, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_name(f"{_REMOVED}{folder.name}")), ignore_errors=True)


def remove_old_checkpoints(output_dir: Path, newest: Path, *, limit: int | None, best: str | None) -> None:
    """Delete checkpoints until so many are left: first those not written to their end, then the oldest.

    Args:
        output_dir: The run's folder.
        newest: The one just completed, which stays.
        limit: How many may be left; None or 0 for all.
        best: Another that stays.
    """
    if not limit or limit < 0:
        return
    found = list(_checkpoints(output_dir).values())
    kept = {newest.resolve(), *([] if best is None else [Path(best).resolve()])}
    others = [one for one in found if one.resolve() not in kept]
    # Not by step: a run that starts again in the folder of an earlier one has lower steps, and is the newer.
    others.sort(key=lambda one: ((one / COMPLETE_MARKER).exists(), one.stat().st_mtime))
    for folder in others[: max(0, len(found) - limit)]:
        remove_folder(folder)


def mark_complete(folder: Path, *, step: int, only_model: bool) -> None:
    """Write last into a checkpoint that it is whole and which files belong to it."""
    files = sorted(one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())
    write_json(folder / COMPLETE_MARKER, {"global_step": step, "save_only_model": only_model, "files": files})


def check_complete(folder: Path, *, sharded: bool, processes: int) -> None:
    """Refuse a checkpoint that a run cannot be resumed from, instead of going on with a new optimiser.

    Args:
        folder: The checkpoint.
        sharded: Whether the run that is to go on has its weights in shards.
        processes: How many it has; with others than before it goes on, but not bit for bit, and says so.

    Raises:
        CheckpointError: If it was not written to its end, lacks a file, or was saved without the optimiser's state.
    """
    marker = folder / COMPLETE_MARKER
    if not folder.is_dir():
        raise CheckpointError(
            str(folder), expected="the folder of a checkpoint", got="no folder",
            cure="Correct the path, or say True for the newest one in output_dir.",
        )  # fmt: skip
    if not marker.exists():
        raise CheckpointError(
            str(folder), expected=f"the file {COMPLETE_MARKER}, written last", got="none",
            cure="Resume from an older checkpoint; this one was not written to its end.",
        )  # fmt: skip
    # Earlier versions listed no files.
    written: dict[str, Any] = read_json(marker) if marker.stat().st_size else {}
    if written.get("save_only_model"):
        raise CheckpointError(
            str(folder), expected="a checkpoint with the states of optimiser and random numbers",
            got="one of a run with save_only_model=True",
            cure="Load its model with from_pretrained and start a new run; leave save_only_model out to be able to "
            "resume the next.",
        )  # fmt: skip
    own, other = (OPTIMIZER_NAME_BIN, OPTIMIZER_NAME) if sharded else (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN)
    if (folder / other).exists() and not (folder / own).exists():
        raise CheckpointError(
            str(folder), expected=f"{own}, the optimiser of a run {'with' if sharded else 'without'} FSDP", got=other,
            cure="Resume by the launcher and configuration the run was started with.",
        )  # fmt: skip
    needed = [TRAINER_STATE_NAME, own, SCHEDULER_NAME, *written.get("files", ())]
    missing = [name for name in dict.fromkeys(needed) if not (folder / name).exists()]
    if not any(folder.glob("rng_state*.pth")):
        missing.append("rng_state.pth")
    states = len(list(folder.glob("rng_state*.pth")))
    if states and states != processes:
        logger.warning(
            f"{folder} was written by {states} processes, and {processes} go on from it: the same targets are drawn, "
            "but dropout is not the same, and sums are rounded in another order."
        )
    if missing:
        raise CheckpointError(
            str(folder), expected="all files the checkpoint was written with", got=f"no {', no '.join(missing)}",
            cure="Put back what is missing, or resume from another checkpoint.",
        )  # fmt: skip
