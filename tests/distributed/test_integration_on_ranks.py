"""The loss for sentence-transformers' trainer in two processes, which it does not share its targets out to."""

from __future__ import annotations

from pathlib import Path

from process_helpers import outcomes_on_ranks
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from upgrade_helpers import make_data

from hf_corrector.cache import TargetCache
from hf_corrector.errors import ConfigurationError
from hf_corrector.integrations.sentence_transformers import CorrectedNegativesLoss, cache_targets


def model_of(encoder: str) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(encoder), Pooling(32, "mean")], device="cpu")


def make_the_loss(encoder: str, folder: Path) -> int:
    loss = CorrectedNegativesLoss(model_of(encoder), TargetCache.open(folder), make_data(targets=20, queries=10).corpus)
    return len(loss.cache)


def test_the_loss_is_for_one_process(tiny_encoder: str, tmp_path: Path) -> None:
    cache_targets(model_of(tiny_encoder), make_data(targets=20, queries=10).corpus, tmp_path / "cache")
    (alone,) = outcomes_on_ranks(make_the_loss, 1, tiny_encoder, tmp_path / "cache")
    assert (alone.exit_code, alone.result) == (0, 20)
    for outcome in outcomes_on_ranks(make_the_loss, 2, tiny_encoder, tmp_path / "cache"):
        assert isinstance(outcome.error, ConfigurationError)
        assert (outcome.error.expected, outcome.error.got) == ("one process", "2")
