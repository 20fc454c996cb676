"""The flags of commands that train: every field of their dataclasses, transformers' own included."""

from __future__ import annotations

import argparse
from typing import Any, cast

from transformers import HfArgumentParser

from hf_corrector.errors import ConfigurationError, HFCorrectorError


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and the examples as they are written."""


def parse_training_flags(
    command: str, kinds: tuple[type[Any], type[Any]], argv: list[str], *, description: str, examples: str
) -> tuple[Any, Any]:
    """Return what is to be trained and the training arguments.

    Args:
        command: The command's name.
        kinds: The dataclasses of the two.
        argv: The words given.
        description: What the command does; that it takes transformers' arguments is added.
        examples: Shown as they are.

    Raises:
        ConfigurationError: If transformers refuses the arguments, or ``--output_dir`` is not among them.
    """
    flags = HfArgumentParser(
        cast(Any, list(kinds)), formatter_class=_HelpFormatter, prog=f"hf-corrector {command}",
        description=f"{description} Every argument of transformers' TrainingArguments is one here.", epilog=examples,
    )  # fmt: skip
    try:
        what, args = flags.parse_args_into_dataclasses(argv)
    except ValueError as error:
        if isinstance(error, HFCorrectorError):
            raise
        raise ConfigurationError(
            command, expected="arguments transformers accepts", got=str(error), cure="Change them as it says."
        ) from error
    if not any(word.split("=")[0] in ("--output_dir", "--output-dir") for word in argv):
        raise ConfigurationError(command, expected="--output_dir OUT", got="none", cure="Say where the run goes.")
    return what, args
