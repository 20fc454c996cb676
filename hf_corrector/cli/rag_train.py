"""``hf-corrector rag-train``: train a retriever and a reader on answers, and judge what correction recovers."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from hf_corrector._distributed import exit_together, is_main, on_main
from hf_corrector.answers import LANGUAGES
from hf_corrector.cli.common import (
    STDLIB,
    EncoderChoice,
    judged_split,
    new_output_folder,
    quieten,
)
from hf_corrector.cli.judged_training import train_and_record
from hf_corrector.cli.questions import QUESTIONS_HELP, load_questions, reader_of, some_questions
from hf_corrector.cli.training_flags import parse_training_flags
from hf_corrector.data.retrieval import RetrievalData
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.evaluation import ReadingJudgement, judge_trained, reading_options
from hf_corrector.rag.question_data import tokenize_answers
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.rag.rag_trainer import RetrievalAugmentedTrainer
from hf_corrector.training.run_record import RunContext, plain_arguments

EXAMPLES = """\
examples:
  hf-corrector rag-train --max_steps 300 --output_dir out-rag
  hf-corrector rag-train --data my_squad_folder --model intfloat/e5-base-v2 --reader HuggingFaceTB/SmolLM2-135M \\
      --staleness corrector --num_passages 8 --generator_mini_batch_size 16 --bf16 --max_steps 1000 --output_dir out-rag
"""
# Of the default reader, whose cross-attention is new to its task: found by training it on gold targets.
DEFAULT_READER_RATE, CROSS_ATTENTION_FACTOR = 1e-4, 5.0
# A name stands at the beginning of its source. One answer of SQuAD in 600 has more than 32 tokens, none has 64.
STDLIB_LENGTHS = {"reader_max_length": 80, "answer_max_length": 32}
OTHER_LENGTHS = {"answer_max_length": 64}


@dataclass
class WhatToRead(EncoderChoice):
    """Retriever, reader and data, for the command line; ``--model`` is the retriever's encoder."""

    data: str = field(default=STDLIB, metadata={"help": QUESTIONS_HELP})
    reader: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of a decoder or an encoder-decoder; by default an encoder-decoder that starts "
            "from MiniLM and, if not told otherwise, learns at 1e-4, its cross-attention at five times that"
        },
    )
    reader_layers: int | None = field(
        default=None, metadata={"help": "of the default reader, keep only MiniLM's first so many layers"}
    )
    reader_max_length: int | None = field(
        default=None,
        metadata={
            "help": "tokens of question and passage for the reader; by default 80 for 'stdlib', where names stand at "
            "the beginning, else what it can read, up to 512"
        },
    )
    answer_max_length: int | None = field(
        default=None,
        metadata={"help": "tokens of an answer, which is never cut; by default 32 for 'stdlib', else 64"},
    )
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "what the reader is given, with one {question} and one {passage}; by default what fits a decoder "
            "or an encoder-decoder"
        },
    )
    learn_scale: bool = field(
        default=False, metadata={"help": "learn the inverse temperature of the distribution over passages too"}
    )
    language: str = field(default="en", metadata={"help": "how answers are compared", "choices": LANGUAGES})
    judged_questions: int = field(
        default=200, metadata={"help": "judge on so many questions, drawn once for all; 0 for all of them"}
    )
    quiet: bool = field(default=False, metadata={"help": "no progress bars"})

    def compose(self) -> RetrievalAugmentedModel:
        """Load retriever and reader and put them together.

        Raises:
            ConfigurationError: If settings do not fit them.
        """
        settings: dict[str, Any] = dict(STDLIB_LENGTHS if self.data == STDLIB else OTHER_LENGTHS)
        given = {
            "reader_max_length": self.reader_max_length, "answer_max_length": self.answer_max_length,
            "prompt": self.prompt, "learn_scale": self.learn_scale,
        }  # fmt: skip
        settings.update({name: value for name, value in given.items() if value is not None})
        reader, tokenizer = reader_of(self.reader, self.reader_layers)
        return RetrievalAugmentedModel.from_parts(self.load(), reader, tokenizer, **settings)


def run(argv: list[str]) -> int:
    """Run the command."""
    what, args = parse_training_flags(
        "rag-train", (WhatToRead, RetrievalAugmentedTrainingArguments), argv,
        description="Train a retriever and a language model that reads what it finds, on questions and answers alone, "
        "with passages from a corrected cache; then judge on the test split.",
        examples=EXAMPLES,
    )  # fmt: skip
    if what.judged_questions < 0 or args.num_passages < 1:
        raise ConfigurationError(
            "rag-train", expected="--judged_questions of 0 or more and --num_passages of at least 1",
            got=f"{what.judged_questions} and {args.num_passages}",
            cure="0 judged questions are all; a reader without passages is for RetrievalAugmentedTrainer.",
        )  # fmt: skip
    judgement = train_and_judge(what, args)
    if is_main():
        print(f"{judgement.table()}\n\nwritten to {args.output_dir}")
    exit_together(0)
    return 0


def train_and_judge(what: WhatToRead, args: RetrievalAugmentedTrainingArguments) -> ReadingJudgement:
    """Train, save, judge on the test split and write ``run.json`` and model card.

    Raises:
        HFCorrectorError: If arguments or data do not fit together, before any work is done; see also
            :func:`train_and_record`.
    """
    started, progress = time.time(), quieten(quiet=what.quiet or bool(args.disable_tqdm)) and is_main()
    args.disable_tqdm = not progress
    out = on_main("making the output folder", lambda: new_output_folder(str(args.output_dir)))
    data = load_questions(what.data)
    split = some_questions(judged_split(data), what.judged_questions)
    trainer = _trainer(what, args, data, split)
    asked = {**plain_arguments(what), "judged_split": "dev" if data.test is None else "test"}
    trainer.run_context = RunContext("rag-train", asked)
    trainer.hold_out(split)

    options = reading_options(args, language=what.language)

    def judge() -> ReadingJudgement:
        return judge_trained(trainer, split, options=options)

    return train_and_record(trainer, judge, out, started=started)


def _trainer(
    what: WhatToRead, args: RetrievalAugmentedTrainingArguments, data: RetrievalData, split: Dataset
) -> RetrievalAugmentedTrainer:
    if data.train is None:
        raise DataError(
            what.data, expected="a train split", got="none", cure="Add qrels/train.tsv, or name other data."
        )
    model = what.compose()
    # Those of training and of its evaluation are checked by the trainer, these would be when all the work is done.
    tokenize_answers(model.reader, split, "judged questions")
    if what.reader is None:
        rate = DEFAULT_READER_RATE if args.generator_learning_rate is None else args.generator_learning_rate
        args.generator_learning_rate = rate
        if args.cross_attention_learning_rate is None:
            args.cross_attention_learning_rate = CROSS_ATTENTION_FACTOR * rate
    return RetrievalAugmentedTrainer(
        model, args, train_dataset=data.train, targets=data.corpus, eval_dataset=data.dev
    )  # fmt: skip
