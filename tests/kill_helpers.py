"""Training runs in processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from forking import forking_context
from peft import LoraConfig, get_peft_model
from rag_helpers import rag_of, rag_trainer
from transformers.utils import logging as library_logging

from hf_corrector import _distributed
from hf_corrector._files import hash_strings
from hf_corrector.data.pairs import from_pairs
from hf_corrector.models.contrast import SampledTargets
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.rag.passages import RetrievedTargets
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.cache_trainer import CacheTrainer
from hf_corrector.training.checkpoint_files import COMPLETE_MARKER
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer

COLOURS = ("red", "green", "blue", "black", "white", "grey", "pink")
THINGS = ("cat", "dog", "house", "tree", "river", "stone", "bird", "fish")
RESULT, DRAWN, EVENTS = "result.pt", "drawn", "events.json"
# What depends on the clock, on how much was done before a kill (a finished cache is not paid for twice), or on where
# the process that ended the run has started.
NEVER_EQUAL = ("share_", "train_", "passes_initial_target", "passes_refresh_target", "epoch_time")


@dataclass(frozen=True)
class Run:
    """A run that can be started again and again in the same folder.

    With ``reader``, it trains a retriever with one. With ``die_before``, a stage and a number, it kills itself before
    so many operations on files of that stage.
    """

    encoder: str
    out: Path
    changes: dict[str, Any] = field(default_factory=dict)
    adapter: bool = False
    reader: bool = False
    die_before: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)

    def checkpoints(self, *, complete: bool) -> set[Path]:
        """Return the checkpoints that have, or have not, been written to their end."""
        found = self.out.glob("checkpoint-*")
        return {one for one in found if (one / COMPLETE_MARKER).exists() == complete}


def trainer_of(run: Run) -> CacheTrainer:
    settings: dict[str, Any] = {
        "max_steps": 11, "per_device_train_batch_size": 8 // _distributed.world_size(),
        "learning_rate": 5e-3, "logging_steps": 1, "report_to": [], "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 2, "disable_tqdm": True, "use_cpu": True, "corrector_warmup_steps": 2,
        "corrector_update_steps": 2, "corrector_window": 50, "seed": 5, "scan": "full", **run.changes,
    }  # fmt: skip
    if run.reader:
        return rag_trainer(rag_of(run.encoder, "gpt2", dropout=0.1, learn_scale=True), run.out, **settings)
    args = DualEncoderTrainingArguments(str(run.out), **{"num_negatives": 2, **settings})
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    rows = [{"anchor": f"find the {one} {two}", "positive": f"the {two} is {one}"} for one, two in pairs]
    data = from_pairs(Dataset.from_list(rows), dev_fraction=0.1, test_fraction=0.1)
    model: Any = DualEncoderModel.from_encoder(run.encoder)
    if run.adapter:
        torch.manual_seed(11)
        model = get_peft_model(model, LoraConfig(target_modules=["query", "value"], lora_dropout=0.1))
    return DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus)


def train(run: Run) -> None:
    """Train, from the newest complete checkpoint if there is one, and leave the result beside the checkpoints."""
    library_logging.set_verbosity_warning()
    seen = count_file_operations(run)
    trainer, rank = trainer_of(run), _distributed.rank()
    with (run.out / f"{DRAWN}-{rank}-{os.getpid()}").open("w", buffering=1) as drawn:
        note_what_is_drawn(trainer, lambda line: drawn.write(line + "\n"))
        trainer.train(resume_from_checkpoint=True if run.checkpoints(complete=True) else None)
    if _distributed.is_main():
        state = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        online = None if trainer.live_cache is None else trainer.live_cache.online
        result = {
            "weights": state, "history": trainer.state.log_history, "cost": dict(trainer.cost),
            "window": {} if online is None else online.state(),
        }  # fmt: skip
        torch.save(result, run.out / RESULT)
        (run.out / EVENTS).write_text(json.dumps(seen))


def count_file_operations(run: Run) -> dict[str, int]:
    """Count what this process does to the files of a run from now on, by stage, and let it die where it is to."""
    seen: dict[str, int] = {}

    def hook(event: str, args: tuple[Any, ...]) -> None:
        stage = _stage_of(event, args, str(run.out))
        if stage is not None:
            if run.die_before == (stage, seen.get(stage, 0)):
                os.kill(os.getpid(), signal.SIGKILL)
            seen[stage] = seen.get(stage, 0) + 1

    sys.addaudithook(hook)
    return seen


def _stage_of(event: str, args: tuple[Any, ...], out: str) -> str | None:
    if event in ("os.remove", "os.rmdir") and args[1] != -1:
        return "removing"  # relative to an open folder, as trees are removed
    if event not in ("open", "os.mkdir", "os.rename", "os.remove") or not isinstance(args[0], str | os.PathLike):
        return None
    below = os.fspath(args[0])[len(out) + 1 :] if os.fspath(args[0]).startswith(out) else ""
    stages = {"checkpoint-": "checkpoint", "cache-": "refresh", "tokens": "start", "cache/": "start"}
    return next((stage for start, stage in stages.items() if below.startswith(start)), None)


def note_what_is_drawn(trainer: CacheTrainer, write: Callable[[str], Any]) -> None:
    """Write step, batch within the step, and a digest of the targets the model is to encode, to contrast or to read."""
    counts: dict[int, int] = {}

    def before(model: torch.nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        choose = inputs["candidate_fn"]

        def noted(queries: torch.Tensor) -> SampledTargets | RetrievedTargets:
            part: SampledTargets | RetrievedTargets = choose(queries)
            step = trainer.state.global_step
            counts[step] = counts.get(step, -1) + 1
            tokens = [] if part.tokens is None else part.tokens["input_ids"].tolist()
            used = part.allowed if isinstance(part, SampledTargets) else part.candidates.ids
            digest = hash_strings([str(tokens), str(used.tolist()), str(queries.tolist())])
            write(f"{step} {counts[step]} {digest}")
            return part

        return args, {**inputs, "candidate_fn": noted}

    trainer.model.register_forward_pre_hook(before, with_kwargs=True)


def drawn_in(run: Run) -> dict[str, set[str]]:
    """Return every digest that any process of a run has noted, by rank, step and batch; last lines may be cut off."""
    found: dict[str, set[str]] = {}
    for path in run.out.glob(f"{DRAWN}-*"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                step, batch, digest = line.split()
                found.setdefault(f"{path.name.split('-')[1]} {step} {batch}", set()).add(digest)
    return found


def differences(run: Run, whole: Run) -> list[str]:
    """Name what differs between a run that was killed and one that was not."""
    first, second = (torch.load(one.out / RESULT, weights_only=True) for one in (run, whole))
    found = []
    for part in ("weights", "window"):
        keys = first[part].keys() ^ second[part].keys()
        found += [f"{part}: {key}" for key in sorted(keys)]
        found += [key for key, value in first[part].items() if key not in keys and not _same(value, second[part][key])]
    histories = [_comparable(one["history"]) for one in (first, second)]
    if histories[0] != histories[1]:
        found += [f"logs: {one} / {two}" for one, two in zip(*histories, strict=False) if one != two] or [
            "logs: length"
        ]
    drawn, expected = drawn_in(run), drawn_in(whole)
    found += [f"drawn in {key}" for key in expected if drawn.get(key, set()) != expected[key]]
    return found


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first.nan_to_num(-7.0), second.nan_to_num(-7.0))


def _comparable(history: list[dict[str, Any]]) -> list[str]:
    return [
        json.dumps({name: value for name, value in entry.items() if not name.startswith(NEVER_EQUAL)}, sort_keys=True)
        for entry in history
    ]


# ---------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Ended:
    """How a process ended, when, and what it printed."""

    exit_code: int
    seconds: float
    output: str


def train_apart(run: Run, *, kill: Callable[[], None] | None = None) -> Ended:
    """Train in a process of its own to the end, or until ``kill`` returns: then it gets SIGKILL."""
    process = forking_context().Process(target=_run_child, args=(run,))
    process.start()
    started = time.monotonic()
    if kill is None:
        process.join(90)
    else:
        kill()
    process.kill()
    process.join()
    code, output = process.exitcode, run.out / "output"
    assert code is not None
    # It may have been killed before it wrote its first word.
    return Ended(code, time.monotonic() - started, output.read_text() if output.exists() else "")


def _run_child(run: Run) -> None:
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with (run.out / "output").open("w", buffering=1) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        with redirect_stdout(stream), redirect_stderr(stream):
            train(run)
