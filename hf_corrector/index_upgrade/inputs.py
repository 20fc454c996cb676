"""The two doors of an upgrade: names and folders, or objects; either way the same checked inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from huggingface_hub import try_to_load_from_cache

from hf_corrector.cache.manifest import check_fingerprint
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import (
    SPLITS,
    RetrievalData,
    column,
    positives_as_rows,
    texts_hash,
    validate,
    with_optional_columns,
)
from hf_corrector.errors import CacheMismatchError, ConfigurationError, DataError, HFCorrectorError
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.sentence_transformers_format import read_repository_json

Cache: TypeAlias = str | Path | TargetCache
Encoder: TypeAlias = str | Path | DualEncoderModel
Data: TypeAlias = str | Path | RetrievalData


@dataclass(frozen=True, eq=False)
class UpgradeInputs:
    """What an upgrade starts from.

    Attributes:
        cache: Vectors of the old encoder.
        model: The new encoder.
        old_model: The encoder that made the cache; None where it is not at hand.
        data: Targets, in the order of the cache, and queries.
        split: The split of the data that is judged on.
        judged: The queries to judge on: the split, or some of it.
        relevant: For each judged query its relevant target rows and grades.
        notes: What was found odd, one sentence each.
        data_name: What the data are called; None where that is not known.
    """

    cache: TargetCache
    model: DualEncoderModel
    old_model: DualEncoderModel | None
    data: RetrievalData
    split: Dataset
    judged: Dataset
    relevant: list[dict[int, float]]
    notes: tuple[str, ...]
    data_name: str | None = None

    @property
    def positives(self) -> npt.NDArray[np.int64]:
        """Rows that answer a judged query, ascending, ``(n,)``."""
        return np.unique(np.fromiter((row for known in self.relevant for row in known), dtype=np.int64))

    @property
    def split_name(self) -> str:
        """What the split that is judged on is called."""
        return next(name for name, one in self.data.splits.items() if one is self.split)

    @property
    def same_size(self) -> bool:
        """Whether vectors of both encoders have the same number of entries."""
        return self.cache.dim == int(self.model.config.embedding_dim)


def load_inputs(
    old_cache: Cache, new_model: Encoder, data: Data, *, old_model: Encoder | None, options: UpgradeOptions
) -> UpgradeInputs:
    """Open, load and check what the user gave.

    Without ``old_model`` the encoder that the cache names is used, where it is on this machine and made the cache.

    Raises:
        CacheMismatchError: If the cache is of other targets, or ``old_model`` did not make it.
        DataError: If there are no queries to judge on.
    """
    cache = old_cache if isinstance(old_cache, TargetCache) else TargetCache.open(old_cache)
    _check_own_vectors(cache)
    found = data if isinstance(data, RetrievalData) else load_retrieval_data(data)
    if isinstance(data, RetrievalData):
        found = _with_optional_columns(found)
        validate(found)
    _check_targets(cache, found.corpus)
    split = _split(found, options)
    judged = _judged(split, options)
    model = _load(new_model, options)
    notes = list(found.notes)
    if old_model is None:
        old, note = _recorded_encoder(cache, model, options)
        notes += note
    else:
        old = old_model if isinstance(old_model, DualEncoderModel) else _load_old(str(old_model), cache, model, options)
        _check_made_by(cache, old)
        notes += [] if isinstance(old_model, DualEncoderModel) else _assumed(str(old_model), old)
    relevant = positives_as_rows(judged, found.corpus)
    named = options.data_name or (None if isinstance(data, RetrievalData) else str(data))
    return UpgradeInputs(cache, model, old, found, split, judged, relevant, tuple(notes), named)


def encode_queries(model: DualEncoderModel, queries: list[str], options: UpgradeOptions) -> torch.Tensor:
    """Encode queries, ``(n, dim)`` float32."""
    encoding = options.encoding
    return model.encode_query(queries, compute_dtype=encoding.compute_dtype, show_progress_bar=encoding.progress)


def _with_optional_columns(data: RetrievalData) -> RetrievalData:
    corpus = with_optional_columns(data.corpus)
    return replace(data, corpus=corpus, **{name: with_optional_columns(one) for name, one in data.splits.items()})


def _check_own_vectors(cache: TargetCache) -> None:
    made_by = cache.fingerprint
    if made_by.corrected_from is not None or made_by.role != "target":
        raise CacheMismatchError(
            str(cache.path), expected="vectors of targets as an encoder made them",
            got="corrected ones" if made_by.role == "target" else f"vectors of role {made_by.role!r}",
            cure="Give the cache they were corrected from, whose errors do not add up; or re-embed.",
        )  # fmt: skip


def _check_targets(cache: TargetCache, corpus: Dataset) -> None:
    # Vectors that came without texts can only be matched by their ids.
    without_texts = cache.texts_hash.startswith("vectors-") and list(cache.ids) == column(corpus, "id")
    if not without_texts and cache.texts_hash != texts_hash(corpus):
        raise CacheMismatchError(
            str(cache.path), expected="a cache of the targets in the data, in their order", got="other ids or texts",
            cure="Give the data the cache was made from.",
        )  # fmt: skip


def _split(data: RetrievalData, options: UpgradeOptions) -> Dataset:
    splits = data.splits
    if options.split is not None and options.split not in splits:
        known = SPLITS if options.split not in SPLITS else tuple(splits)
        raise DataError("split", expected=f"one of {known}", got=repr(options.split), cure="Name a split the data has.")
    name = options.split or next((one for one in ("test", "dev") if one in splits), None)
    if name is None:
        raise DataError(
            "data", expected="judgements to decide by", got="neither a test nor a dev split",
            cure="Add qrels/test.tsv, or name another split.",
        )  # fmt: skip
    if len(splits[name]) == 0:
        raise DataError(name, expected="at least one query", got="none", cure="Add queries.")
    return splits[name]


def _judged(judged: Dataset, options: UpgradeOptions) -> Dataset:
    if options.judge_queries is not None and options.judge_queries < len(judged):
        chosen = np.random.default_rng(options.seed).permutation(len(judged))[: options.judge_queries]
        judged = judged.select(np.sort(chosen))
    return judged


def _load(name: Encoder, options: UpgradeOptions, **settings: Any) -> DualEncoderModel:
    """Load a saved dual encoder, or make one from any encoder; objects are taken as they are."""
    if isinstance(name, DualEncoderModel):
        return name
    if _is_dual_encoder(str(name)):
        model = DualEncoderModel.from_pretrained(str(name))
    else:
        model = DualEncoderModel.from_encoder(str(name), **settings)
    cast(torch.nn.Module, model).to(options.computing_device)
    return model


def _load_old(name: str, cache: TargetCache, model: DualEncoderModel, options: UpgradeOptions) -> DualEncoderModel:
    """Load the encoder of a cache; a plain one gets the cache's settings, and for queries the new encoder's."""
    made_by, config = cache.fingerprint, model.config
    settings = {
        "pooling": made_by.pooling, "target_prompt": made_by.prompt, "target_max_length": made_by.max_length,
        "normalize": made_by.normalize, "query_prompt": config.query_prompt,
        "query_max_length": config.query_max_length,
    }  # fmt: skip
    layers = config.encoder.get_text_config().num_hidden_layers
    tried: list[DualEncoderModel] = []
    for more in ({}, {"num_hidden_layers": layers}):
        old = _load(name, options, **settings, **more)
        if _differences(cache, old) == []:
            return old
        tried.append(old)
    return tried[0]


def _is_dual_encoder(name: str) -> bool:
    config = read_repository_json(name, "config.json", None)
    return config is not None and config.get("model_type") == DualEncoderConfig.model_type


def _assumed(name: str, old: DualEncoderModel) -> list[str]:
    """Say which settings for queries an encoder got that has none of its own, in one sentence."""
    if _is_dual_encoder(name):
        return []
    return [
        f"Queries of the old encoder {name!r} got the prompt {old.config.query_prompt!r} and were cut to "
        f"{old.config.query_max_length} tokens, as those of the new one; if it was searched otherwise, give it as a "
        "saved dual encoder with its own settings."
    ]


def _recorded_encoder(
    cache: TargetCache, model: DualEncoderModel, options: UpgradeOptions
) -> tuple[DualEncoderModel | None, list[str]]:
    """Load the encoder a cache names, if it is on this machine and made the cache, with a note on what was assumed.

    Else say why there is none.
    """
    name = cache.fingerprint.name
    hint = "so nothing is said about keeping it; give it as old_model"
    if not _differences(cache, model):
        return model, []
    if not Path(name).is_dir() and not _downloaded(name):
        return None, [f"The old encoder {name!r} is not on this machine, {hint}."]
    try:
        old = _load_old(name, cache, model, options)
        _check_made_by(cache, old)
    except (HFCorrectorError, OSError, ValueError) as error:
        return None, [f"{name!r} is not (any more) the encoder that made the cache, {hint} ({error})."]
    return old, _assumed(name, old)


def _downloaded(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no name of a repository
        return False


def _check_made_by(cache: TargetCache, model: DualEncoderModel) -> None:
    made_by = replace(model.fingerprint("target"), compute_dtype=cache.fingerprint.compute_dtype)
    check_fingerprint(str(cache.path), expected=made_by, got=cache.fingerprint)


def _differences(cache: TargetCache, model: DualEncoderModel) -> list[str]:
    made_by = replace(model.fingerprint("target"), compute_dtype=cache.fingerprint.compute_dtype)
    return made_by.differences(cache.fingerprint)


def check_pair_count(num_pairs: int) -> None:
    """Refuse a number of pairs nothing can be fitted on (ConfigurationError)."""
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, int) or num_pairs < 2:
        raise ConfigurationError(
            "num_pairs", expected="at least 2", got=repr(num_pairs), cure="Some hundreds are a start, 2,000 are good."
        )
