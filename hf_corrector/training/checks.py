"""What is checked and set up before a run spends any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias, cast

import torch
from datasets import Dataset
from transformers.utils import logging

from hf_corrector.cache.manifest import check_fingerprint
from hf_corrector.cache.side_store import open_side
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.retrieval import (
    RetrievalData,
    column,
    positives_as_rows,
    texts_hash,
    validate,
    with_optional_columns,
)
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError
from hf_corrector.models.adapters import dual_encoder_of
from hf_corrector.models.configuration_corrector import CorrectorConfig
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.side_features import DEFAULT_BIGRAM_BUCKETS, TokenCounts
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.cache_arguments import CacheTrainingArguments

logger = logging.get_logger(__name__)
Splits: TypeAlias = Dataset | dict[str, Dataset] | None


def check_types(model: Any, args: Any) -> DualEncoderModel:
    """Refuse other models and arguments than this package's (ConfigurationError), and return the dual encoder."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigurationError(
            "DualEncoderTrainer", expected="a DualEncoderModel", got=type(model).__name__,
            cure="Make one with DualEncoderModel.from_encoder(...).",
        )  # fmt: skip
    encoder = dual_encoder_of(model)
    if not isinstance(args, DualEncoderTrainingArguments):
        raise ConfigurationError(
            "DualEncoderTrainer", expected="DualEncoderTrainingArguments", got=type(args).__name__,
            cure="Use DualEncoderTrainingArguments(output_dir, ...), which takes all of TrainingArguments' fields.",
        )  # fmt: skip
    return encoder


def check_data(train: Dataset | None, targets: Dataset | None, evaluation: Splits) -> tuple[Any, Dataset, Splits]:
    """Bring queries and targets into one form and check that they fit together.

    Args:
        train: Judged queries, or without ``targets`` pairs in sentence-transformers' columns.
        targets: All targets.
        evaluation: Judged queries, one split or several by name.

    Returns:
        The same three, with optional columns filled in.

    Raises:
        ConfigurationError: If there are no targets.
        DataError: If something is wrong with them, naming split and row.
    """
    if targets is None and train is not None:
        data = from_pairs(train, dev_fraction=0.0, test_fraction=0.0)
        train, targets = data.train, data.corpus
    if targets is None:
        raise ConfigurationError(
            "DualEncoderTrainer", expected="targets to search", got="None", cure="Pass data.corpus as `targets`."
        )
    targets = with_optional_columns(targets)
    train = None if train is None else with_optional_columns(train)
    named = evaluation if isinstance(evaluation, Mapping) else {"eval_dataset": evaluation}
    several = {name: with_optional_columns(split) for name, split in named.items() if split is not None}
    for name, split in {"train_dataset": train, **several}.items():
        if split is None:
            continue
        if len(split) == 0:
            raise DataError(name, expected="at least one query", got="none", cure="Leave it out, or give queries.")
        validate(RetrievalData(corpus=targets, train=split, dev=None, test=None), name=name)
    if evaluation is None or isinstance(evaluation, Mapping):
        return train, targets, None if evaluation is None else several
    return train, targets, several["eval_dataset"]


def check_given(train: Dataset | None, args: DualEncoderTrainingArguments) -> None:
    """Refuse arguments that train on what the data do not give (ConfigurationError)."""
    needed = {
        "given_negatives": (args.given_negatives, ("negative_ids",)),
        "distillation_weight": (args.distillation_weight, ("positive_scores", "negative_scores")),
    }
    for name, (value, columns) in needed.items():
        if train is not None and value and not set(columns) & set(train.column_names):
            raise ConfigurationError(
                name, expected=f"training queries with the column {' or '.join(columns)}",
                got=f"the columns {train.column_names}", cure=f"Leave {name} out, or add them.",
            )  # fmt: skip


def attach_corrector(model: DualEncoderModel, args: CacheTrainingArguments, cache: TargetCache | None = None) -> None:
    """Give the model the corrector the arguments ask for, keeping the one it has where it is of that form.

    A run that encodes no target keeps a fitted corrector as it is, to see the given cache through it.

    Args:
        model: The encoder.
        args: Arguments of the run.
        cache: The cache given to the run, which knows the width of a user's own side features.

    Raises:
        CacheError: If the cache holds no side features of the kind asked for.
        CacheMismatchError: If the fitted corrector leads from another encoder than the cache's, or to another.
        ConfigurationError: If a user's own side features are asked for without a cache that holds them, or a fitted
            corrector would be left out of reading a given cache.
    """
    if not args.uses_corrector:
        if not _keeps_fitted(model, args, cache):
            model.corrector = model.config.corrector = None
        return
    config = CorrectorConfig(
        kind=args.corrector_kind, input_dim=model.config.embedding_dim, hidden_dim=args.corrector_hidden_dim,
        activation=args.corrector_activation, normalize_output=model.config.normalize,
        **_side_settings(model, args.corrector_side, cache),
    )  # fmt: skip
    has = None if model.corrector is None else model.corrector.config
    compared = (
        "kind", "input_dim", "output_dim", "hidden_dim", "activation", "normalize_output", "side", "side_dim",
        "side_vocabulary",
    )  # fmt: skip
    if has is None or any(getattr(has, name) != getattr(config, name) for name in compared):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            model.corrector = CorrectorModel(config)
        model.config.corrector = config
    if model.corrector is not None:
        model.corrector.requires_grad_(False)


def _keeps_fitted(model: DualEncoderModel, args: CacheTrainingArguments, cache: TargetCache | None) -> bool:
    """Say whether a run that fits no corrector reads the given cache through the one that its model brings."""
    corrector = model.corrector
    if corrector is None or not int(corrector.fitted_pairs):
        return False
    if cache is None:
        logger.warning("The model's corrector is left out: a cache made of the model itself has nothing to correct.")
        return False
    if args.encodes_targets:
        raise ConfigurationError(
            "staleness", expected="'corrector' for a model with a fitted corrector and a target_cache",
            got=f"{args.staleness!r}, which would read the cache as it is",
            cure="Use staleness='corrector', or remove the corrector first: model.corrector = None.",
        )  # fmt: skip
    if corrector.config.stale_encoder is not None:
        corrector.check_encoders("model.corrector", stale=cache.fingerprint, fresh=model.fingerprint("target"))
    corrector.requires_grad_(False)
    return True


def rows_to_hold_out(splits: tuple[Dataset, ...], targets: Dataset) -> torch.Tensor:
    """Return the rows of all positives of some queries, and of targets with the same text, ascending, ``(n,)`` int64.

    Texts count as the same whatever their case and spaces: being fitted on a copy is being fitted on the original.
    """
    for number, split in enumerate(splits):
        if "positive_ids" not in split.column_names:
            raise DataError(
                f"hold_out, split {number}", expected="the column 'positive_ids'", got=f"{split.column_names}",
                cure="Hold out splits whose positives are known; of others nothing can be held out.",
            )  # fmt: skip
    judged = [with_optional_columns(split) for split in splits]
    rows = {row for split in judged for known in positives_as_rows(split, targets) for row in known}
    texts = [" ".join(text.lower().split()) for text in column(targets, "text")]
    wanted = {texts[row] for row in rows}
    return torch.tensor([row for row, text in enumerate(texts) if text in wanted], dtype=torch.int64)


def _side_settings(model: DualEncoderModel, side: str | None, cache: TargetCache | None) -> dict[str, Any]:
    """Return the corrector's settings for its side features."""
    if side is None:
        return {}
    if side == "word_embeddings":
        table = cast(torch.nn.Embedding, model.target_encoder.get_input_embeddings())
        return {"side": side, "side_dim": table.embedding_dim}
    if cache is not None:
        stored = open_side(cache, side)
        vocabulary = stored.vocabulary if isinstance(stored, TokenCounts) else None
        return {"side": side, "side_dim": stored.width, "side_vocabulary": vocabulary}
    if side == "matrix":
        raise ConfigurationError(
            "corrector_side", expected="a target_cache that holds the matrix", got="'matrix' without one",
            cure="Store it with save_side(cache, DenseSide(matrix)) and pass that cache as target_cache.",
        )  # fmt: skip
    vocabulary = model.target_vocabulary
    return {"side": side, "side_dim": vocabulary + DEFAULT_BIGRAM_BUCKETS, "side_vocabulary": vocabulary}


def check_given_cache(cache: TargetCache, targets: Dataset, model: DualEncoderModel) -> None:
    """Refuse a cache of other targets, of another size or of corrected vectors (CacheMismatchError)."""
    if cache.fingerprint.corrected_from is not None:
        raise CacheMismatchError(
            str(cache.path), expected="vectors an encoder made", got="corrected ones, which no encoder would repeat",
            cure="Pass the cache they came from.",
        )  # fmt: skip
    # Vectors that came without texts can only be matched by their ids.
    without_texts = cache.texts_hash.startswith("vectors-") and list(cache.ids) == column(targets, "id")
    if not without_texts and cache.texts_hash != texts_hash(targets):
        raise CacheMismatchError(
            str(cache.path), expected="a cache of these targets, in this order", got="other ids or texts",
            cure="Pass the corpus the cache was made from.",
        )  # fmt: skip
    if cache.dim != model.config.embedding_dim:
        raise CacheMismatchError(
            str(cache.path), expected=f"vectors of size {model.config.embedding_dim}", got=f"size {cache.dim}",
            cure="Train an encoder of the cache's size, or make a new cache.",
        )  # fmt: skip


def check_made_by(cache: TargetCache, model: DualEncoderModel) -> None:
    """Refuse an encoder that did not make a cache, whatever arithmetic it used (CacheMismatchError naming both)."""
    made_by = replace(model.fingerprint("target"), compute_dtype=cache.fingerprint.compute_dtype)
    check_fingerprint(str(cache.path), expected=made_by, got=cache.fingerprint)
