"""What commands that train have in common once their trainer stands: train, save, judge, record and publish."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from hf_corrector._distributed import is_main, on_main
from hf_corrector.training.publishing import PublishingTrainer

Judgement = TypeVar("Judgement")


def train_and_record(
    trainer: PublishingTrainer,
    judge: Callable[[], Judgement],
    out: Path,
    *,
    started: float,
    examples: Callable[[Judgement], dict[str, Any]] | None = None,
) -> Judgement:
    """Train, save the model, judge it and write ``run.json`` and the cards; push them where the arguments say so.

    Args:
        trainer: With its context set and the judged queries held out.
        judge: Measures what has been trained.
        out: Output folder of the run.
        started: When the command began, by ``time.time()``.
        examples: What of the judgement goes into the record as examples.

    Returns:
        What was measured.

    Raises:
        HFCorrectorError: If something does not fit. Arguments and data have been checked when the trainer was made;
            adapters, and the checkpoint to resume from, are here, before any work. A cache of another encoder is found
            out before targets are encoded.
    """
    trainer.check_start(trainer.args.resume_from_checkpoint)
    prepared = time.time()
    trainer.prepare()
    measured = 0
    if trainer.live_cache is None:
        # The judgement compares with a cache even where training needs none: its cost is not training's.
        trainer.build_cache()
        measured, trainer.cost["initial_target_passes"] = trainer.cost["initial_target_passes"], 0
    trained = time.time()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()
    if trainer.scan_said and is_main():
        print(trainer.scan_said, flush=True)
    judged = time.time()
    judgement = judge()
    timing = {
        "load": prepared - started, "prepare": trained - prepared, "train": judged - trained,
        "judge": time.time() - judged, "total": time.time() - started,
    }  # fmt: skip
    trainer.run_context = replace(trainer.run_context, timing=timing, measured=measured)
    shown = {} if examples is None else examples(judgement)
    on_main("writing run.json", lambda: replace(trainer.run_record(), examples=shown).save(out))
    trainer.write_cards(out)
    if trainer.args.push_to_hub:
        # What was pushed when the model was saved had not been judged; only the card is sent again.
        trainer.push_to_hub("Judgement in the model card")
    return judgement
