from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from model_helpers import TEXTS
from process_helpers import Outcome, outcomes_on_ranks, run_on_ranks

from hf_corrector import _distributed
from hf_corrector.cache import TargetCache
from hf_corrector.cache.folder_lock import locked
from hf_corrector.cache.side_store import stored_sides
from hf_corrector.data.tokens import TokenStore
from hf_corrector.encoding import TOKENS_FOLDER, EncodeOptions, build_cache, encode_rows, tokenize_texts, update_cache
from hf_corrector.errors import CacheError, CacheMismatchError, ConfigurationError, DataError, DistributedError
from hf_corrector.models import DualEncoderModel
from hf_corrector.shared_writing import seen_by_all

MANY = [f"{text} and then {other}" for text in TEXTS for other in TEXTS[:7]]


def corpus(texts: list[str]) -> Dataset:
    ids = [f"target-{number}" for number in range(len(texts))]
    return Dataset.from_dict({"id": ids, "text": texts, "metadata": ["{}"] * len(texts)})


def options(**changes: Any) -> EncodeOptions:
    return EncodeOptions(**{"shard_rows": 40, "token_budget": 90, "progress": False, **changes})


def model_of(encoder: str, **changes: Any) -> DualEncoderModel:
    return DualEncoderModel.from_encoder(encoder, **changes)


def digests(folder: Path) -> dict[str, str]:
    """Hash the files of a cache that hold rows, ids, texts, token counts or tokens."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".safetensors", ".npy", ".bin"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def build(encoder: str, texts: list[str], folder: Path, changes: dict[str, Any]) -> tuple[int, str, int]:
    built = build_cache(model_of(encoder), corpus(texts), folder, options=options(**changes))
    built.cache.verify()
    return built.encoded, built.cache.manifest.checksum, len(built.cache.read(0, 1))


@pytest.mark.parametrize(
    ("texts", "changes"),
    [
        (MANY, {}),  # three shards
        (TEXTS[:5], {}),  # less than a shard
        (TEXTS[:1], {}),  # fewer texts than processes
        (MANY, {"cache_dtype": "bfloat16", "compute_dtype": "bfloat16", "shard_rows": 1000}),
    ],
    ids=["shards", "short", "single", "bfloat16"],
)
def test_caches_of_one_two_and_four_processes_are_the_same_bytes(
    tiny_encoder: str, texts: list[str], changes: dict[str, Any], tmp_path: Path
) -> None:
    found = {}
    for count in (1, 2, 4):
        results = run_on_ranks(build, count, tiny_encoder, texts, tmp_path / str(count), changes)
        assert {encoded for encoded, _, _ in results} == {len(texts)}
        assert len({checksum for _, checksum, _ in results}) == 1
        found[count] = digests(tmp_path / str(count))
        assert stored_sides(TargetCache.open(tmp_path / str(count), verify="full")) == ("tokens",)
    assert any(name.startswith("emb-") for name in found[1]) and found[1] == found[2] == found[4]


def encode_some(encoder: str, folder: Path, rows: list[int], role: str) -> torch.Tensor:
    model = model_of(encoder, query_prompt="ask: ")
    tokens = tokenize_texts(model, MANY, role, folder, progress=False)
    return encode_rows(model, tokens, np.array(rows, dtype=np.int64), role=role, options=options())


@pytest.mark.parametrize("rows", [[5, 3, 99, 3, 0, 41, 64, 2], [7], []], ids=len)
def test_every_process_has_all_rows_in_the_order_asked_for(tiny_encoder: str, rows: list[int], tmp_path: Path) -> None:
    (alone,) = run_on_ranks(encode_some, 1, tiny_encoder, tmp_path, rows, "query")
    assert alone.shape == (len(rows), 32)
    for count in (2, 4):
        for result in run_on_ranks(encode_some, count, tiny_encoder, tmp_path, rows, "query"):
            assert torch.equal(result, alone)


def build_until(encoder: str, folder: Path, victim: int, batches: int) -> int:
    """Build a cache, but kill one process after so many batches (never if there are fewer)."""
    model, seen = model_of(encoder), list[int]()

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(len(kwargs["input_ids"]))
        if _distributed.rank() == victim and len(seen) > batches:
            os.kill(os.getpid(), signal.SIGKILL)

    model.encoder.register_forward_pre_hook(hook, with_kwargs=True)
    build_cache(model, corpus(MANY), folder, options=options())
    return sum(seen)


def test_texts_are_dealt_evenly(tiny_encoder: str, tmp_path: Path) -> None:
    counts = run_on_ranks(build_until, 2, tiny_encoder, tmp_path, -1, 0)
    assert sum(counts) == len(MANY) and max(counts) < 0.65 * len(MANY)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_build_goes_on_at_the_first_unfinished_shard(tiny_encoder: str, victim: int, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_on_ranks(build_until, 1, tiny_encoder, whole, -1, 0)
    folder = tmp_path / "killed"
    outcomes = outcomes_on_ranks(build_until, 2, tiny_encoder, folder, victim, 6)
    assert outcomes[victim].exit_code == -signal.SIGKILL
    error = outcomes[1 - victim].error
    assert isinstance(error, DistributedError) and f"rank {1 - victim} of 2, building a cache" in error.where
    written = len(list(folder.glob("emb-*.safetensors")))
    assert 0 < written < 3 and not (folder / "manifest.json").exists()
    resumed = run_on_ranks(build_until, 4, tiny_encoder, folder, -1, 0)
    assert sum(resumed) == len(MANY) - 40 * written
    assert digests(folder) == digests(whole)


# ------------------------------------------------------------------------------ errors reach everybody


def errors_of(outcomes: list[Outcome], kind: type[Exception]) -> list[str]:
    assert [type(outcome.error) for outcome in outcomes] == [kind] * len(outcomes), outcomes
    return [str(outcome.error) for outcome in outcomes]


def build_locked(encoder: str, folder: Path) -> None:
    build_cache(model_of(encoder), corpus(TEXTS), folder, options=options())


def test_a_folder_someone_else_writes_into_is_refused_everywhere(tiny_encoder: str, tmp_path: Path) -> None:
    with locked(tmp_path):
        first, second = errors_of(outcomes_on_ranks(build_locked, 2, tiny_encoder, tmp_path), CacheError)
    assert first == second and "no other writer" in first


def test_a_cache_of_other_texts_is_refused_everywhere(tiny_encoder: str, tmp_path: Path) -> None:
    build_cache(model_of(tiny_encoder), corpus(MANY), tmp_path, options=options())
    first, second = errors_of(outcomes_on_ranks(build_locked, 2, tiny_encoder, tmp_path), CacheMismatchError)
    assert first == second


def build_with_nan(encoder: str, folder: Path) -> None:
    model = model_of(encoder)
    with torch.no_grad():
        model.encoder.embeddings.LayerNorm.bias.fill_(float("nan"))
    build_cache(model, corpus(TEXTS), folder, options=options())


def test_a_shard_that_cannot_be_written_is_an_error_everywhere(tiny_encoder: str, tmp_path: Path) -> None:
    first, second = errors_of(outcomes_on_ranks(build_with_nan, 2, tiny_encoder, tmp_path), DataError)
    assert first == second and "row 0" in first


def build_differently(encoder: str, folder: Path, what: str) -> None:
    odd = _distributed.rank() == 1
    model = model_of(encoder)
    if odd and what == "weights":
        with torch.no_grad():
            model.encoder.embeddings.LayerNorm.bias += 0.1
    build_cache(model, corpus(TEXTS[::-1] if odd and what == "texts" else TEXTS), folder, options=options())


@pytest.mark.parametrize("what", ["weights", "texts"])
def test_processes_that_disagree_are_refused(tiny_encoder: str, what: str, tmp_path: Path) -> None:
    for message in errors_of(outcomes_on_ranks(build_differently, 2, tiny_encoder, tmp_path, what), CacheMismatchError):
        assert "rank 1 than on rank 0" in message
    assert not list(tmp_path.iterdir())


def second_cannot_encode(encoder: str, folder: Path) -> None:
    model = model_of(encoder)
    tokens = tokenize_texts(model, TEXTS, "target", folder, progress=False)
    if _distributed.rank() == 1:
        model.encoder.register_forward_pre_hook(fail)
    encode_rows(model, tokens, np.arange(len(TEXTS)), options=options(token_budget=20))


def fail(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
    raise MemoryError("no room for activations")


def test_a_process_that_cannot_encode_ends_all(tiny_encoder: str, tmp_path: Path) -> None:
    first, second = outcomes_on_ranks(second_cannot_encode, 2, tiny_encoder, tmp_path)
    assert isinstance(second.error, MemoryError) and isinstance(first.error, DistributedError)
    assert "rank 1: no room for activations" in str(first.error)


def update_together(encoder: str, folder: Path) -> None:
    update_cache(model_of(encoder), corpus(MANY), folder, options=options())


def test_updates_are_the_work_of_one_process(tiny_encoder: str, tmp_path: Path) -> None:
    build_cache(model_of(tiny_encoder), corpus(TEXTS), tmp_path, options=options())
    errors_of(outcomes_on_ranks(update_together, 2, tiny_encoder, tmp_path), ConfigurationError)


# ------------------------------------------------------------------------------ folders that are not shared


def open_own_folder(parent: Path) -> int:
    """Let each process look into a folder of its own, as on machines without a common file system."""
    own = parent / f"machine-{_distributed.rank()}"

    def write() -> None:
        TokenStore.build(own, TEXTS, lambda texts: [[len(text)] for text in texts], key="k")

    _distributed.on_main("tokenising", write)
    return len(seen_by_all(own, lambda: TokenStore.open(own, key="k"), patience=1))


def test_a_folder_that_is_not_shared_is_named_by_who_does_not_see_it(tmp_path: Path) -> None:
    first, second = outcomes_on_ranks(open_own_folder, 2, tmp_path)
    assert isinstance(first.error, DistributedError) and isinstance(second.error, ConfigurationError)
    assert "machine-1: expected a folder that all processes share" in str(second.error)
    assert "failure of rank 1" in str(first.error) and "file system" in str(first.error)


def open_late(folder: Path) -> int:
    if _distributed.is_main():
        TokenStore.build(folder, TEXTS, lambda texts: [[len(text)] for text in texts], key="k")
    return len(seen_by_all(folder, lambda: TokenStore.open(folder, key="k"), patience=30))


def test_a_folder_that_shows_late_is_waited_for(tmp_path: Path) -> None:
    assert run_on_ranks(open_late, 2, tmp_path / "store") == [len(TEXTS)] * 2


def tokenize_together(encoder: str, folder: Path) -> tuple[list[list[int]], int]:
    store = tokenize_texts(model_of(encoder), TEXTS, "target", folder, progress=False)
    return store.tokens(range(len(TEXTS))), (folder / "tokens.npy").stat().st_ino


def test_all_processes_open_the_tokens_one_has_made(tiny_encoder: str, tmp_path: Path) -> None:
    first, second = run_on_ranks(tokenize_together, 2, tiny_encoder, tmp_path / TOKENS_FOLDER)
    assert first == second and first[0] == model_of(tiny_encoder).tokenize(TEXTS, "target")
