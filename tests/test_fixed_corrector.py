"""A fitted corrector that a model brings to a run that fits none: used as it is, refused, or left out with a word."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from rag_helpers import question_data, rag_of

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.retrieval import with_optional_columns
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.errors import CacheMismatchError, CheckpointError, ConfigurationError
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.rag.rag_trainer import RetrievalAugmentedTrainer
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer

TARGETS, TRAIN, _ = question_data()
ALONE: dict[str, Any] = {"train_targets": False, "staleness": "ignore"}
COMMON: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True,
    "save_strategy": "no", "scan": "full",
}  # fmt: skip


@pytest.fixture
def cache(tiny_encoder: str, tmp_path: Path) -> TargetCache:
    """The targets as another encoder had them."""
    older = DualEncoderModel.from_encoder(tiny_encoder)
    with torch.no_grad():
        for one in older.parameters():
            one += 0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    return build_cache(older, TARGETS, tmp_path / "older", options=EncodeOptions(progress=False)).cache


def with_corrector(model: DualEncoderModel) -> DualEncoderModel:
    """Give a model a corrector that moves vectors far, as one counts that was fitted."""
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=32))
    weight = torch.randn(32, 32, generator=torch.Generator().manual_seed(2))
    corrector.load_parameters({"weight": weight, "fitted_pairs": torch.tensor(100)})
    model.corrector, model.config.corrector = corrector, corrector.config
    return model


def alone(encoder: str, out: Path, cache: TargetCache | None, **changes: Any) -> DualEncoderTrainer:
    settings = {**COMMON, **ALONE, **changes}
    model = DualEncoderModel.from_encoder(encoder, separate_towers=not settings["train_targets"])
    train = with_optional_columns(TRAIN)
    args = DualEncoderTrainingArguments(str(out), **settings)
    return DualEncoderTrainer(with_corrector(model), args, train_dataset=train, targets=TARGETS, target_cache=cache)


def choices_of(trainer: Any) -> list[Any]:
    trainer.prepare()
    noted, choose = list[Any](), trainer._chooser.choose

    def noting(*args: Any, **kwargs: Any) -> Any:
        noted.append(choose(*args, **kwargs))
        return noted[-1]

    trainer._chooser.choose = noting
    return noted


def test_queries_alone_are_trained_on_the_cache_through_the_corrector_which_stays(
    tiny_encoder: str, tmp_path: Path, cache: TargetCache
) -> None:
    trainer = alone(
        tiny_encoder, tmp_path / "out", cache, negatives="top_k", uniform_fraction=0.0, share_negatives=False,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    choices, corrector = choices_of(trainer), trainer.encoder.corrector
    assert corrector is not None
    before = {name: one.clone() for name, one in corrector.state_dict().items()}
    trainer.train()
    assert all(torch.equal(one, corrector.state_dict()[name]) for name, one in before.items())
    vectors = corrector(cache.read(0, len(cache)))
    for choice in choices:
        assert torch.allclose(choice.part.vectors, vectors[choice.contrast.rows], atol=1e-6)
        for query, known, drawn in zip(
            choice.queries, choice.excluded.per_query, choice.sampled.candidates.ids.tolist(), strict=True
        ):
            ranked = (vectors @ query).argsort(descending=True).tolist()
            assert drawn == [next(row for row in ranked if row not in known)]
    again = alone(tiny_encoder, tmp_path / "out", cache, negatives="top_k", uniform_fraction=0.0, share_negatives=False)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for name, one in trainer.encoder.state_dict().items():
        assert torch.equal(one, again.encoder.state_dict()[name]), name
    forgotten = alone(tiny_encoder, tmp_path / "out", None, negatives="top_k", uniform_fraction=0.0)
    with pytest.raises(CheckpointError, match=r"fixed_corrector=True.*fixed_corrector=False"):
        forgotten.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_a_reader_alone_reads_what_the_corrector_brings_near(
    tiny_encoder: str, tmp_path: Path, cache: TargetCache
) -> None:
    model = rag_of(tiny_encoder)
    with_corrector(model.retriever)
    args = RetrievalAugmentedTrainingArguments(
        str(tmp_path / "out"), objective="generator_only", staleness="ignore", num_passages=3, **COMMON
    )
    trainer = RetrievalAugmentedTrainer(model, args, train_dataset=TRAIN, targets=TARGETS, target_cache=cache)
    choices = choices_of(trainer)
    trainer.train()
    vectors = model.retriever.corrector(cache.read(0, len(cache)))
    for choice in choices:
        assert choice.part.candidates.ids.tolist() == (choice.queries @ vectors.T).topk(3).indices.tolist()
        assert torch.allclose(choice.part.vectors, vectors[choice.own_rows], atol=1e-6)
    queries = trainer.encoder.encode_query(TRAIN["query"][:4])
    assert trainer.nearest_passages()(queries).candidates.ids.tolist() == (queries @ vectors.T).topk(3).indices.tolist()


@pytest.mark.parametrize(
    "changes", [{"staleness": "ignore"}, {"staleness": "refresh", "refresh_steps": "5"}, {"staleness": "rerank"}]
)
def test_where_targets_are_trained_it_is_refused(
    tiny_encoder: str, tmp_path: Path, cache: TargetCache, changes: dict[str, str]
) -> None:
    with pytest.raises(ConfigurationError, match=r"'corrector' for a model with a fitted.*model.corrector = None"):
        alone(tiny_encoder, tmp_path / "out", cache, train_targets=True, **changes)


def test_a_corrector_of_another_cache_is_refused(tiny_encoder: str, tmp_path: Path, cache: TargetCache) -> None:
    model = with_corrector(DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True))
    assert model.corrector is not None
    fresh = model.fingerprint("target")
    model.corrector.note_encoders(stale=fresh, fresh=fresh)
    args = DualEncoderTrainingArguments(str(tmp_path / "out"), **COMMON, **ALONE)
    with pytest.raises(CacheMismatchError, match=r"model\.corrector"):
        DualEncoderTrainer(
            model, args, train_dataset=with_optional_columns(TRAIN), targets=TARGETS, target_cache=cache
        )  # fmt: skip


def test_without_an_older_cache_it_is_left_out_with_a_word(
    tiny_encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_corrector"):
        trainer = alone(tiny_encoder, tmp_path, None)
    assert trainer.encoder.corrector is None and caplog.text.count("corrector is left out") == 1
