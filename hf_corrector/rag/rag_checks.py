"""What is checked before a run of retrieval-augmented training spends any work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset

from hf_corrector.data.retrieval import positives_as_rows, validate_corpus, with_optional_columns
from hf_corrector.errors import ConfigurationError
from hf_corrector.rag.default_reader import cross_attention_names
from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel
from hf_corrector.rag.question_data import check_questions, tokenize_answers
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.training.checks import Splits


def check_types(model: Any, args: Any) -> RetrievalAugmentedModel:
    """Refuse other models and arguments than this package's, and return the model without wrappers.

    Raises:
        ConfigurationError: Also if a learning rate is of layers that the reader has not, or does not train.
    """
    inner = (
        extract_model_from_parallel(model, keep_torch_compile=False) if isinstance(model, torch.nn.Module) else model
    )
    if not isinstance(inner, RetrievalAugmentedModel):
        raise ConfigurationError(
            "RetrievalAugmentedTrainer", expected="a RetrievalAugmentedModel", got=type(inner).__name__,
            cure="Make one with RetrievalAugmentedModel.from_parts(...); adapters of PEFT belong on its parts.",
        )  # fmt: skip
    if not isinstance(args, RetrievalAugmentedTrainingArguments):
        raise ConfigurationError(
            "RetrievalAugmentedTrainer", expected="RetrievalAugmentedTrainingArguments", got=type(args).__name__,
            cure="Use RetrievalAugmentedTrainingArguments(output_dir, ...).",
        )  # fmt: skip
    _check_cross_attention(inner.generator, args)
    return inner


def _check_cross_attention(reader: torch.nn.Module, args: RetrievalAugmentedTrainingArguments) -> None:
    if args.cross_attention_learning_rate is None:
        return
    attending = cross_attention_names(reader)
    if not any(weight.requires_grad for name, weight in reader.named_parameters() if name in attending):
        raise ConfigurationError(
            "cross_attention_learning_rate",
            expected="a reader that trains cross-attention which is new to its task, such as that of default_reader",
            got=f"{type(reader).__name__}, which has none to train",
            cure="Leave it out: generator_learning_rate is that of the whole reader.",
        )  # fmt: skip


def check_optimizer(optimizer: Any, args: RetrievalAugmentedTrainingArguments) -> None:
    """Refuse learning rates of parts beside an optimiser that was given and has rates already (ConfigurationError)."""
    for name in ("generator_learning_rate", "cross_attention_learning_rate"):
        if optimizer is not None and getattr(args, name) is not None:
            raise ConfigurationError(
                name, expected="None with an optimiser in `optimizers`, whose groups are left as they are",
                got=str(getattr(args, name)),
                cure="Give the reader's parameters a group with this rate, or leave the optimiser to the trainer.",
            )  # fmt: skip


def check_targets(targets: Dataset | None) -> Dataset:
    """Return the targets with their optional columns.

    Raises:
        ConfigurationError: If there are none.
        DataError: If something is wrong with them.
    """
    if targets is None:
        raise ConfigurationError(
            "RetrievalAugmentedTrainer", expected="targets to read", got="None", cure="Pass the corpus as `targets`."
        )
    targets = with_optional_columns(targets)
    validate_corpus(targets)
    return targets


def check_evaluation(
    model: RetrievalAugmentedModel, args: RetrievalAugmentedTrainingArguments, evaluation: Splits, targets: Dataset
) -> None:
    """Refuse now what an evaluation would refuse in the middle of training.

    Args:
        model: Retriever and reader.
        args: Arguments of the run.
        evaluation: Questions with answers, one split or several by name.
        targets: All targets.

    Raises:
        DataError: If a question has no answer, one that is too long for the reader, or a positive that is no target.
    """
    named = evaluation if isinstance(evaluation, Mapping) else {"eval_dataset": evaluation}
    for name, split in named.items():
        if split is None:
            continue
        check_questions(split, name)
        tokenize_answers(model.reader, split, name)
        if args.num_passages and "positive_ids" in split.column_names:
            positives_as_rows(with_optional_columns(split), targets, name=name)
