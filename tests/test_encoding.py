from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from model_helpers import HIDDEN, TEXTS

from hf_corrector.cache import TargetCache
from hf_corrector.cache.row_files import hash_texts
from hf_corrector.cache.side_store import open_side, save_side, side_details, stored_sides
from hf_corrector.data.retrieval import texts_hash
from hf_corrector.encoding import (
    TOKENS_FOLDER,
    CacheBuild,
    EncodeOptions,
    build_cache,
    encode_rows,
    join_counts,
    tokenize_texts,
    update_cache,
)
from hf_corrector.errors import CacheMismatchError, DataError
from hf_corrector.models import DualEncoderModel
from hf_corrector.side_features import DenseSide, TokenCounts

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")


def corpus(texts: list[str] = TEXTS) -> Dataset:
    ids = [f"target-{number}" for number in range(len(texts))]
    return Dataset.from_dict({"id": ids, "text": texts, "metadata": ["{}"] * len(texts)})


def options(**changes: Any) -> EncodeOptions:
    return EncodeOptions(**{"shard_rows": 5, "progress": False, **changes})


def build(model: DualEncoderModel, path: Path, **changes: Any) -> CacheBuild:
    return build_cache(model, corpus(), path, options=options(**changes))


def count_texts(model: DualEncoderModel, *, stop_after: int | None = None) -> list[int]:
    """Count the texts the tower encodes from now on, batch by batch, and perhaps interrupt it."""
    seen: list[int] = []

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if stop_after is not None and sum(seen) >= stop_after:
            raise KeyboardInterrupt
        seen.append(len(kwargs["input_ids"]))

    model.encoder.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def test_rows_are_the_vectors_of_the_targets_in_their_order(tiny_encoder: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, target_prompt="page: ", target_max_length=9, projection_dim=7)
    built = build(model, tmp_path)
    assert built.encoded == len(built.cache) == len(TEXTS)
    assert list(built.cache.ids) == corpus()["id"][:]
    assert built.cache.dim == 7
    assert torch.allclose(built.cache.read(0, len(TEXTS)), model.encode_target(TEXTS), atol=1e-6)


def test_cache_says_who_made_it_from_what(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    built = build_cache(tiny_model, corpus(), tmp_path, options=options(), generation=3)
    assert built.cache.fingerprint == tiny_model.fingerprint("target")
    assert built.cache.texts_hash == texts_hash(corpus())
    assert built.cache.manifest.generation == 3
    assert TargetCache.open(tmp_path, expected=tiny_model.fingerprint("target"), verify="full").dim == HIDDEN


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_are_stored_in_the_type_asked_for(tiny_model: DualEncoderModel, dtype: str, tmp_path: Path) -> None:
    cache = build(tiny_model, tmp_path, cache_dtype=dtype).cache
    assert cache.dtype == getattr(torch, dtype)
    assert torch.allclose(cache.gather(torch.arange(16)), tiny_model.encode_target(TEXTS), atol=5e-3)


def test_arithmetic_of_the_encoder_is_part_of_the_fingerprint(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    cache = build(tiny_model, tmp_path, compute_dtype="bfloat16").cache
    assert cache.fingerprint.compute_dtype == "bfloat16"
    half = tiny_model.encode_target(TEXTS, compute_dtype="bfloat16")
    assert ((cache.read(0, 16) * half).sum(dim=1) > 0.999).all()
    assert not torch.equal(cache.read(0, 16), tiny_model.encode_target(TEXTS))


def test_size_of_batches_and_shards_does_not_change_the_vectors(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    one = build(tiny_model, tmp_path / "one", shard_rows=100).cache
    other = build(tiny_model, tmp_path / "other", shard_rows=3, token_budget=15).cache
    assert torch.allclose(one.read(0, 16), other.read(0, 16), atol=1e-6)


def test_finished_cache_is_opened_without_encoding(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    build(tiny_model, tmp_path)
    seen = count_texts(tiny_model)
    again = build(tiny_model, tmp_path)
    assert (again.encoded, seen) == (0, [])
    assert len(again.cache) == len(TEXTS)


@pytest.mark.parametrize(("stop_after", "left"), [(1, 16), (7, 11), (12, 6)])
def test_interrupted_build_goes_on_without_encoding_finished_shards_again(
    tiny_encoder: str, stop_after: int, left: int, tmp_path: Path
) -> None:
    interrupted = DualEncoderModel.from_encoder(tiny_encoder)
    count_texts(interrupted, stop_after=stop_after)
    with pytest.raises(KeyboardInterrupt):
        build(interrupted, tmp_path / "cache", token_budget=10)
    model = DualEncoderModel.from_encoder(tiny_encoder)
    seen = count_texts(model)
    resumed = build(model, tmp_path / "cache", token_budget=10)
    assert resumed.encoded == sum(seen) == left
    whole = build(model, tmp_path / "whole", token_budget=10).cache
    assert torch.equal(resumed.cache.read(0, 16), whole.read(0, 16))


def test_cache_of_another_encoder_is_refused_naming_both(tiny_encoder: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder)
    build(model, tmp_path)
    other = DualEncoderModel.from_encoder(tiny_encoder, pooling="cls", target_prompt="page: ")
    with pytest.raises(CacheMismatchError) as caught:
        build(other, tmp_path)
    for named in ("pooling: 'cls' / 'mean'", "prompt: 'page: ' / ''"):
        assert named in str(caught.value)
    with pytest.raises(CacheMismatchError) as caught:
        TargetCache.open(tmp_path, expected=other.fingerprint("target"))
    assert "pooling" in str(caught.value)


def test_cache_of_other_texts_is_refused(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    build(tiny_model, tmp_path)
    changed = corpus([*TEXTS[:-1], "another text"])
    with pytest.raises(CacheMismatchError):
        build_cache(tiny_model, changed, tmp_path, options=options())


def test_part_of_a_cache_of_another_encoder_is_not_gone_on_with(tiny_encoder: str, tmp_path: Path) -> None:
    interrupted = DualEncoderModel.from_encoder(tiny_encoder)
    count_texts(interrupted, stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        build(interrupted, tmp_path, token_budget=10)
    changed = DualEncoderModel.from_encoder(tiny_encoder)
    with torch.no_grad():
        changed.encoder.embeddings.LayerNorm.bias += 0.1
    with pytest.raises(CacheMismatchError, match="weights"):
        build(changed, tmp_path, token_budget=10)


def test_tokens_are_those_of_the_model_and_made_once(tiny_encoder: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, query_prompt="ask: ", query_max_length=6)
    store = tokenize_texts(model, TEXTS, "query", tmp_path, progress=False)
    assert store.tokens(range(len(TEXTS))) == model.tokenize(TEXTS, "query")
    files = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    tokenize_texts(model, TEXTS, "query", tmp_path, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("changes", [{"query_prompt": "find: "}, {"query_max_length": 5}])
def test_tokens_made_with_other_settings_are_refused(
    tiny_encoder: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    tokenize_texts(DualEncoderModel.from_encoder(tiny_encoder), TEXTS, "query", tmp_path, progress=False)
    with pytest.raises(CacheMismatchError):
        tokenize_texts(DualEncoderModel.from_encoder(tiny_encoder, **changes), TEXTS, "query", tmp_path, progress=False)


def test_given_tokens_are_used_and_none_are_made(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    tokens = tokenize_texts(tiny_model, TEXTS, "target", tmp_path / "tokens", progress=False)
    cache = build_cache(tiny_model, corpus(), tmp_path / "cache", tokens=tokens, options=options()).cache
    assert torch.allclose(cache.read(0, 16), tiny_model.encode_target(TEXTS), atol=1e-6)
    assert not (tmp_path / "cache" / TOKENS_FOLDER).exists()


@pytest.mark.parametrize("wrong", ["texts", "prompt", "role"])
def test_given_tokens_of_other_texts_or_settings_are_refused(tiny_encoder: str, wrong: str, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, query_prompt="ask: ")
    other = DualEncoderModel.from_encoder(tiny_encoder, target_prompt="page: ") if wrong == "prompt" else model
    texts = TEXTS[::-1] if wrong == "texts" else TEXTS
    tokens = tokenize_texts(other, texts, "query" if wrong == "role" else "target", tmp_path / "tokens", progress=False)
    with pytest.raises(CacheMismatchError, match="tokens"):
        build_cache(model, corpus(), tmp_path / "cache", tokens=tokens, options=options())


def test_some_rows_are_encoded_in_the_order_asked_for(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    tokens = tokenize_texts(tiny_model, TEXTS, "target", tmp_path, progress=False)
    found = encode_rows(tiny_model, tokens, np.array([9, 2, 9]), options=options())
    assert torch.allclose(found, tiny_model.encode_target([TEXTS[9], TEXTS[2], TEXTS[9]]), atol=1e-6)
    assert torch.equal(found[0], found[2])


def test_a_cache_knows_the_tokens_and_the_text_of_every_row(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    cache = build(tiny_model, tmp_path).cache
    found = open_side(cache, "tokens", verify="full")
    vocabulary = tiny_model.config.encoder.vocab_size
    expected = TokenCounts.from_lists(tiny_model.tokenize(TEXTS, "target"), vocabulary=vocabulary)
    assert isinstance(found, TokenCounts) and (found.vocabulary, found.width) == (vocabulary, expected.width)
    assert torch.equal(found.read(0, 16).to_dense(), expected.read(0, 16).to_dense())
    assert side_details(cache, "tokens")["tokenizer"] == tiny_model.fingerprint("target").tokenizer
    assert cache.text_hashes is not None and cache.text_hashes.tolist() == hash_texts(TEXTS).tolist()


def test_token_counts_are_left_out_if_not_wanted_and_added_by_a_later_call(
    tiny_model: DualEncoderModel, tmp_path: Path
) -> None:
    cache = build(tiny_model, tmp_path, token_counts=False).cache
    assert stored_sides(cache) == ()
    again = build(tiny_model, tmp_path)
    assert again.encoded == 0 and stored_sides(again.cache) == ("tokens",)


# ------------------------------------------------------------------------------ updates


def other_corpus(changes: dict[str, str | None], added: dict[str, str], *, first: str | None = None) -> Dataset:
    """Return the corpus with texts changed, targets (None) gone, and new ones after the target ``first``."""
    ids: list[str] = []
    texts: list[str] = []
    for name, text in zip(corpus()["id"][:], TEXTS, strict=True):
        now = changes.get(name, text)
        if now is not None:
            ids, texts = [*ids, name], [*texts, now]
        if name == (first or f"target-{len(TEXTS) - 1}"):
            ids, texts = [*ids, *added], [*texts, *added.values()]
    return Dataset.from_dict({"id": ids, "text": texts, "metadata": ["{}"] * len(ids)})


def update(model: DualEncoderModel, path: Path, now: Dataset, **changes: Any) -> CacheBuild:
    trust_ids = changes.pop("trust_ids", False)
    return update_cache(model, now, path, options=options(**changes), trust_ids=trust_ids)


@pytest.mark.parametrize("first", [None, "target-4"])
def test_an_update_encodes_only_what_is_new_or_changed(
    tiny_model: DualEncoderModel, first: str | None, tmp_path: Path
) -> None:
    build(tiny_model, tmp_path / "cache")
    shards = {path.name: path.stat().st_ino for path in (tmp_path / "cache").glob("emb-*")}
    now = other_corpus({"target-3": None, "target-7": "disk space is low"}, {"x": "ping", "y": "list"}, first=first)
    seen = count_texts(tiny_model)
    updated = update(tiny_model, tmp_path / "cache", now, shard_rows=2)
    assert (updated.encoded, updated.deleted, sum(seen)) == (3, 2, 3)
    whole = build_cache(tiny_model, now, tmp_path / "whole", options=options()).cache
    assert list(updated.cache.ids) == list(whole.ids) == now["id"][:]
    assert torch.allclose(updated.cache.read(0, 17), whole.read(0, 17), atol=1e-6)
    assert updated.cache.texts_hash == whole.texts_hash == texts_hash(now)
    assert {name: (tmp_path / "cache" / name).stat().st_ino for name in shards} == shards
    mine, theirs = (open_side(one, "tokens", verify="full").read(0, 17).to_dense() for one in (updated.cache, whole))
    assert torch.equal(mine, theirs)
    updated.cache.verify()


def test_an_update_with_nothing_to_do_does_nothing(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    cache = build(tiny_model, tmp_path).cache
    seen = count_texts(tiny_model)
    again = update(tiny_model, tmp_path, corpus())
    assert (again.encoded, again.deleted, seen) == (0, 0, [])
    assert again.cache.manifest == cache.manifest
    now = other_corpus({"target-0": None}, {})
    assert update(tiny_model, tmp_path, now).deleted == 1
    built = build_cache(tiny_model, now, tmp_path, options=options())
    assert built.encoded == 0 and seen == []  # a build recognises the updated cache


def test_kept_targets_in_another_order_are_refused_naming_two(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    cache = build(tiny_model, tmp_path).cache
    order = [0, 1, 3, 2, *range(4, 16)]
    with pytest.raises(DataError, match="old order; got 'target-3' before 'target-2'"):
        update(tiny_model, tmp_path, corpus().select(order))
    assert TargetCache.open(tmp_path).manifest == cache.manifest


def test_an_update_by_another_encoder_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    build(DualEncoderModel.from_encoder(tiny_encoder), tmp_path)
    other = DualEncoderModel.from_encoder(tiny_encoder, target_prompt="page: ")
    with pytest.raises(CacheMismatchError, match="prompt"):
        update(other, tmp_path, other_corpus({}, {"x": "ping"}))


def test_a_cache_without_texts_is_updated_only_where_nothing_is_guessed(
    tiny_model: DualEncoderModel, tmp_path: Path
) -> None:
    fingerprint, vectors = tiny_model.fingerprint("target"), tiny_model.encode_target(TEXTS)
    TargetCache.from_arrays(tmp_path, vectors, corpus()["id"][:], fingerprint=fingerprint)
    now = other_corpus({}, {"x": "ping"})
    with pytest.raises(CacheMismatchError, match="--trust_ids"):
        update(tiny_model, tmp_path, now)
    updated = update(tiny_model, tmp_path, now, trust_ids=True)
    assert updated.encoded == 1 and updated.cache.text_hashes is not None
    later = other_corpus({"target-2": "changed"}, {"x": "ping"})
    assert update(tiny_model, tmp_path, later).encoded == 1  # it knows the texts now


def test_an_interrupted_update_leaves_the_old_cache_and_is_gone_on_with(tiny_encoder: str, tmp_path: Path) -> None:
    first = DualEncoderModel.from_encoder(tiny_encoder)
    old = build(first, tmp_path).cache
    now = other_corpus({"target-0": None}, {f"new-{text}": text for text in TEXTS})
    interrupted = DualEncoderModel.from_encoder(tiny_encoder)
    count_texts(interrupted, stop_after=7)
    with pytest.raises(KeyboardInterrupt):
        update(interrupted, tmp_path, now, token_budget=10)
    assert TargetCache.open(tmp_path, verify="full").manifest == old.manifest
    resumed = update(DualEncoderModel.from_encoder(tiny_encoder), tmp_path, now, token_budget=10)
    assert (resumed.encoded, resumed.deleted, len(resumed.cache)) == (11, 1, 31)


def test_counts_of_blocks_are_those_of_the_whole() -> None:
    lists = [[row % 7, row % 3, row % 7] if row % 4 else [] for row in range(20)]
    whole = TokenCounts.from_lists(lists, vocabulary=9, bigram_buckets=4)
    cuts = zip((0, 4, 5, 13), (4, 5, 13, 20), strict=True)
    joined = join_counts([TokenCounts.from_lists(lists[a:b], vocabulary=9, bigram_buckets=4) for a, b in cuts])
    assert (joined.width, joined.vocabulary) == (whole.width, whole.vocabulary)
    for one, other in ((joined.offsets, whole.offsets), (joined.columns, whole.columns), (joined.counts, whole.counts)):
        assert np.array_equal(one, other) and one.dtype == other.dtype


def test_an_update_drops_tokens_that_another_tokenizer_counted(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    cache = build(tiny_model, tmp_path).cache
    counts = open_side(cache, "tokens")
    save_side(cache, counts, details={"tokenizer": "another"})
    assert stored_sides(update(tiny_model, tmp_path, other_corpus({}, {"x": "ping"})).cache) == ()


def test_an_update_drops_side_features_it_cannot_know(tiny_model: DualEncoderModel, tmp_path: Path) -> None:
    cache = build(tiny_model, tmp_path).cache
    save_side(cache, DenseSide(torch.ones(16, 2)))
    updated = update(tiny_model, tmp_path, other_corpus({}, {"x": "ping"}))
    assert stored_sides(updated.cache) == ("tokens",)
