"""``hf-corrector train``: train a dual encoder and judge what correction recovers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from hf_corrector._distributed import exit_together, is_main, on_main
from hf_corrector.cli.common import (
    DATA_HELP,
    NO_EXAMPLES_HELP,
    STDLIB,
    EncoderChoice,
    judged_split,
    load_data,
    new_output_folder,
    quieten,
)
from hf_corrector.cli.judged_training import train_and_record
from hf_corrector.cli.training_flags import parse_training_flags
from hf_corrector.data.retrieval import RetrievalData, positives_as_rows
from hf_corrector.errors import DataError
from hf_corrector.evaluation.evaluator import JudgeOptions
from hf_corrector.evaluation.examples import judged_examples
from hf_corrector.evaluation.staleness import StalenessReport
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer
from hf_corrector.training.run_record import RunContext, plain_arguments

EXAMPLES = """\
examples:
  hf-corrector train --data my_beir_folder --model intfloat/e5-base-v2 --staleness corrector --max_steps 1000 \\
      --output_dir out --seed 1
  hf-corrector train --staleness refresh --refresh_steps 100 --max_steps 300 --output_dir out-refresh --bf16
"""


@dataclass
class WhatToTrain(EncoderChoice):
    """Encoder and data, for the command line."""

    data: str = field(default=STDLIB, metadata={"help": DATA_HELP})
    quiet: bool = field(default=False, metadata={"help": "no progress bars"})
    no_examples: bool = field(default=False, metadata={"help": NO_EXAMPLES_HELP})


def run(argv: list[str]) -> int:
    """Run the command."""
    what, args = parse_training_flags(
        "train", (WhatToTrain, DualEncoderTrainingArguments), argv,
        description="Train a dual encoder with hard negatives from a corrected cache, then judge on the test split.",
        examples=EXAMPLES,
    )  # fmt: skip
    report = train_and_judge(what, args)
    if is_main():
        print(f"{report.table()}\n\n{report.judgement.sentence()}\n\nwritten to {args.output_dir}")
    exit_together(0)
    return 0


def train_and_judge(
    what: WhatToTrain, args: DualEncoderTrainingArguments, *, command: str = "train"
) -> StalenessReport:
    """Train, save, judge on the test split and write ``run.json``.

    Raises:
        HFCorrectorError: If arguments or data do not fit together, before any work is done; see also
            :func:`train_and_record`.
    """
    started, progress = time.time(), quieten(quiet=what.quiet or bool(args.disable_tqdm)) and is_main()
    args.disable_tqdm = not progress
    out = on_main("making the output folder", lambda: new_output_folder(str(args.output_dir)))
    data = load_data(what.data, progress=progress)
    split = judged_split(data)
    if data.train is None:
        raise DataError(
            what.data, expected="a train split", got="none", cure="Add qrels/train.tsv, or name other data."
        )
    trainer = DualEncoderTrainer(
        what.load(progress=progress), args, train_dataset=data.train, targets=data.corpus, eval_dataset=data.dev
    )
    trainer.run_context = RunContext(
        command, {**plain_arguments(what), "judged_split": "dev" if data.test is None else "test"}
    )
    trainer.hold_out(split)

    def judge() -> StalenessReport:
        options = JudgeOptions(seed=args.seed, device=args.device, progress=progress)
        return trainer.judge(split, old_model=what.load(progress=progress), options=options)

    def examples(report: StalenessReport) -> dict[str, Any]:
        return _examples(report, data, what, seed=args.seed)

    return train_and_record(trainer, judge, out, started=started, examples=examples)


def _examples(report: StalenessReport, data: RetrievalData, what: WhatToTrain, *, seed: int) -> dict[str, Any]:
    if what.no_examples:
        return {}
    split = judged_split(data)
    relevant = positives_as_rows(split, data.corpus)
    return judged_examples(report.judgement, relevant, split=split, corpus=data.corpus, seed=seed)
