from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model

from hf_corrector.cache.side_store import open_side, save_side, side_details
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.retrieval import RetrievalData, column
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.errors import CacheMismatchError, CheckpointError, ConfigurationError, DataError
from hf_corrector.models import CorrectorModel, DualEncoderModel
from hf_corrector.side_features import DenseSide, TokenCounts
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.checkpoint_files import COMPLETE_MARKER, newest_complete_checkpoint
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer

COLOURS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")
THINGS = ("cat", "dog", "house", "tree", "river", "stone", "bird", "fish", "road", "boat")


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    rows = [
        {"anchor": f"find the {colour} {thing}", "positive": f"the {thing} is {colour} and number {number}"}
        for number, (colour, thing) in enumerate((c, t) for c in COLOURS for t in THINGS)
    ]
    return from_pairs(Dataset.from_list(rows), dev_fraction=0.2, test_fraction=0.2)


def arguments(out: Path, **changes: object) -> DualEncoderTrainingArguments:
    settings: dict[str, object] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "corrector_warmup_steps": 2, "corrector_update_steps": 2,
        "seed": 3,
    }  # fmt: skip
    return DualEncoderTrainingArguments(str(out), **{**settings, **changes})


def trainer_for(encoder: str, data: RetrievalData, out: Path, **changes: object) -> DualEncoderTrainer:
    model = DualEncoderModel.from_encoder(encoder)
    return DualEncoderTrainer(
        model, arguments(out, **changes), train_dataset=data.train, targets=data.corpus, eval_dataset=data.dev
    )


def weights(model: DualEncoderModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_the_words_of_the_readme_work(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    import hf_corrector as hc

    model = hc.DualEncoderModel.from_encoder(tiny_encoder)
    args = hc.DualEncoderTrainingArguments(
        str(tmp_path / "out"), negatives="softmax", staleness="corrector", max_steps=3, report_to=[], disable_tqdm=True
    )
    trainer = hc.DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus, eval_dataset=data.dev)
    trainer.train()
    trainer.save_model()
    h = hc.CorrectorModel.from_pretrained(str(tmp_path / "out" / "corrector"))
    stale = TargetCache.open(tmp_path / "out" / "cache").read(0, 5).numpy()
    fresh = h.correct(stale)
    assert isinstance(fresh, np.ndarray) and fresh.shape == stale.shape and fresh.dtype == np.float32


@pytest.mark.parametrize("negatives", ["softmax", "top_k", "uniform", "in_batch"])
@pytest.mark.parametrize("staleness", ["corrector", "ignore"])
def test_every_combination_trains_and_counts_its_passes(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, negatives: str, staleness: str
) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, negatives=negatives, staleness=staleness)
    before = weights(trainer.model)
    trainer.train()
    after = weights(trainer.model)
    assert any(not torch.equal(before[name], after[name]) for name in before if name in after)
    cost = trainer.cost
    needs_cache = staleness == "corrector" or negatives in ("softmax", "top_k")
    assert cost["initial_target_passes"] == (len(data.corpus) if needs_cache else 0)
    assert cost["query_passes"] == 6 * 4
    positives, sampled = 6 * 4, 0 if negatives == "in_batch" else 6 * 4
    assert positives <= cost["train_target_passes"] <= positives + sampled
    assert cost["refresh_target_passes"] == cost["final_target_passes"] == 0


def test_at_step_zero_the_cache_holds_what_training_encodes(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, learning_rate=0.0)
    trainer.train()
    logged = [entry["cosine_stale_fresh"] for entry in trainer.state.log_history if "cosine_stale_fresh" in entry]
    assert logged == pytest.approx([1.0] * 6, abs=1e-6)


def test_logs_tell_drift_residual_and_shares_of_time(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, uniform_fraction=1.0)
    trainer.train()
    entry = trainer.state.log_history[3]
    for name in (
        "cosine_stale_fresh", "cosine_corrected_fresh", "residual_uniform", "share_sampling", "share_corrector",
    ):  # fmt: skip
        assert np.isfinite(entry[name]), name
    assert 0 < entry["share_sampling"] + entry["share_corrector"] < 1


@pytest.mark.parametrize("kind", ["mean_shift", "affine", "residual_mlp"])
def test_the_corrector_brings_stale_targets_nearer_to_fresh_ones(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, kind: str
) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, corrector_kind=kind, max_steps=40, corrector_window=40)
    trainer.train()
    report = trainer.judge(data.test)
    assert report.cosines["corrected"] > report.cosines["stale"]
    assert trainer.model.corrector is not None and int(trainer.model.corrector.fitted_pairs) > 10


def test_the_encoders_optimiser_never_touches_the_corrector(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer = trainer_for(
        tiny_encoder, data, tmp_path, corrector_kind="residual_mlp", corrector_learning_rate=0.0, weight_decay=0.1
    )
    trainer.prepare()
    assert trainer.model.corrector is not None
    before = {name: tensor.clone() for name, tensor in trainer.model.corrector.named_parameters()}
    trainer.train()
    for name, tensor in trainer.model.corrector.named_parameters():
        assert torch.equal(tensor, before[name]) and tensor.grad is None and not tensor.requires_grad


def test_an_identity_corrector_trains_like_no_corrector_bit_for_bit(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    with_identity = trainer_for(tiny_encoder, data, tmp_path / "a", corrector_kind="identity")
    without = trainer_for(tiny_encoder, data, tmp_path / "b", staleness="ignore")
    with_identity.train()
    without.train()
    first, second = weights(with_identity.model), weights(without.model)
    assert_same({name: first[name] for name in second}, second)


def test_corrector_and_refresh_start_the_corrector_again(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, refresh_steps="4", max_steps=6, learning_rate=0.0)
    trainer.train()
    assert trainer.cost["refresh_target_passes"] == len(data.corpus)
    assert trainer.live_cache is not None
    assert trainer.live_cache.cache.manifest.generation == 1 and trainer.live_cache.first.manifest.generation == 0
    # Weights never moved, so the refreshed cache holds the same vectors and its pairs say "identity".
    first, second = trainer.live_cache.first.read(0, 20), trainer.live_cache.cache.read(0, 20)
    assert torch.equal(first, second)


def test_refreshed_targets_are_those_of_the_current_weights(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, staleness="refresh", refresh_steps="3", max_steps=5)
    trainer.train()
    cache = trainer.refresh_cache()
    expected = trainer.model.encode_target(column(data.corpus, "text"))
    assert torch.allclose(cache.read(0, len(cache)), expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"corrector_kind": "affine"},
        {"corrector_kind": "residual_mlp"},
        {"corrector_kind": "kernel", "corrector_side": "tokens", "corrector_update_steps": 2},
        {"corrector_kind": "residual_mlp", "corrector_side": "word_embeddings", "corrector_update_steps": 2},
        {"corrector_kind": "affine", "corrector_side": "tokens", "refresh_steps": "3", "corrector_update_steps": 1},
        {"staleness": "refresh", "refresh_steps": "3"},
        {"corrector_kind": "affine", "refresh_steps": "3", "gradient_accumulation_steps": 2},
        {"negatives": "uniform", "staleness": "ignore"},
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, changes: dict[str, object]
) -> None:
    whole = trainer_for(tiny_encoder, data, tmp_path / "whole", max_steps=8, **changes)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 8, **changes}
    interrupted = trainer_for(tiny_encoder, data, tmp_path / "parts", **saving)
    interrupted.train()
    resumed = trainer_for(tiny_encoder, data, tmp_path / "parts", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    assert_same(weights(resumed.model), weights(whole.model))
    # A refresh that the interrupted run had finished is found again and not paid for twice.
    spent_again = resumed.cost["refresh_target_passes"]
    assert spent_again <= whole.cost["refresh_target_passes"]
    assert {**resumed.cost, "refresh_target_passes": 0} == {**whole.cost, "refresh_target_passes": 0}
    assert resumed.fitted_rows.tolist() == whole.fitted_rows.tolist()


def test_true_resumes_from_the_newest_complete_checkpoint(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer_for(tiny_encoder, data, tmp_path, **saving).train()
    (tmp_path / "checkpoint-6" / COMPLETE_MARKER).unlink()
    assert newest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    resumed = trainer_for(tiny_encoder, data, tmp_path, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    with pytest.raises(CheckpointError, match="COMPLETE"):
        (tmp_path / "checkpoint-4" / COMPLETE_MARKER).unlink()
        trainer_for(tiny_encoder, data, tmp_path, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_checkpoint_whose_cache_is_gone_or_replaced_is_refused(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_for(tiny_encoder, data, tmp_path, **saving).train()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(CheckpointError, match="no such folder"):
        trainer_for(tiny_encoder, data, tmp_path, **saving).train(resume_from_checkpoint=True)
    model = DualEncoderModel.from_encoder(tiny_encoder, pooling="cls")
    build_cache(model, data.corpus, tmp_path / "cache")
    with pytest.raises(CheckpointError, match="another cache"):
        trainer_for(tiny_encoder, data, tmp_path, **saving).train(resume_from_checkpoint=True)


def test_checkpoints_are_only_deleted_once_the_new_one_is_complete(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer_for(tiny_encoder, data, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1).train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert (tmp_path / "checkpoint-6" / COMPLETE_MARKER).exists()


def test_a_saved_run_loads_with_the_same_vectors(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = DualEncoderModel.from_pretrained(str(tmp_path))
    texts = column(data.corpus, "text")[:7]
    assert torch.equal(loaded.encode_target(texts), trainer.model.encode_target(texts))
    stale = trainer.live_cache.cache.read(0, 9)
    alone = CorrectorModel.from_pretrained(str(tmp_path / "corrector"))
    assert torch.equal(alone.correct(stale), trainer.model.corrector.correct(stale))
    assert torch.equal(loaded.corrector.correct(stale), alone.correct(stale))
    seen = json.loads((tmp_path / "corrector" / "fitted_targets.json").read_text())
    assert seen["rows"] == trainer.fitted_rows.tolist() and len(seen["rows"]) > 4


def test_a_cache_of_the_same_encoder_is_used_again_and_that_of_another_refused(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    first = trainer_for(tiny_encoder, data, tmp_path)
    first.prepare()
    again = trainer_for(tiny_encoder, data, tmp_path)
    again.prepare()
    assert again.cost["initial_target_passes"] == 0
    model = DualEncoderModel.from_encoder(tiny_encoder, target_prompt="passage: ")
    other = DualEncoderTrainer(
        model,
        arguments(tmp_path / "b", cache_dir=str(tmp_path / "cache")),
        train_dataset=data.train,
        targets=data.corpus,
    )
    with pytest.raises(CacheMismatchError, match="prompt"):
        other.prepare()


def test_side_features_of_the_users_own_come_with_the_cache_given(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder)
    cache = build_cache(model, data.corpus, tmp_path / "cache", options=EncodeOptions(progress=False)).cache
    own = {"corrector_kind": "affine", "corrector_side": "matrix", "corrector_update_steps": 2}
    with pytest.raises(ConfigurationError, match="target_cache"):
        trainer_for(tiny_encoder, data, tmp_path / "none", **own)
    save_side(cache, DenseSide(torch.randn(len(cache), 3, generator=torch.Generator().manual_seed(0))))
    trainer = DualEncoderTrainer(
        DualEncoderModel.from_encoder(tiny_encoder), arguments(tmp_path / "out", **own), train_dataset=data.train,
        targets=data.corpus, target_cache=TargetCache.open(tmp_path / "cache"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    loaded = CorrectorModel.from_pretrained(str(tmp_path / "out" / "corrector"))
    side, stale = open_side(cache, "matrix"), cache.read(0, len(cache))
    assert torch.equal(loaded.correct(stale, side), trainer.model.corrector.correct(stale, side))
    assert loaded.side_weight.abs().sum() > 0


@pytest.mark.parametrize("side", ["matrix", "tokens", "word_embeddings"])
def test_a_refresh_keeps_the_side_features_the_corrector_reads(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, side: str
) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder)
    cache = build_cache(model, data.corpus, tmp_path / "cache", options=EncodeOptions(progress=False)).cache
    lists, words = model.tokenize(column(data.corpus, "text"), "target"), model.target_vocabulary
    save_side(cache, TokenCounts.from_lists(lists, vocabulary=words, bigram_buckets=8), details={"tokenizer": "mine"})
    save_side(cache, DenseSide(torch.ones(len(cache), 3)))
    own = {"corrector_kind": "affine", "corrector_side": side, "corrector_update_steps": 1, "refresh_steps": "3"}
    trainer = DualEncoderTrainer(
        model, arguments(tmp_path / "out", **own), train_dataset=data.train, targets=data.corpus, target_cache=cache
    )
    trainer.train()
    assert trainer.live_cache is not None and trainer.live_cache.cache.manifest.generation == 1
    before, after = open_side(cache, side), open_side(trainer.live_cache.cache, side)
    rows = np.arange(len(cache))
    assert torch.equal(before.gather(rows).to_dense(), after.gather(rows).to_dense())
    assert side_details(trainer.live_cache.cache, side) == side_details(cache, side)


def test_an_older_cache_may_be_given(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    old = DualEncoderModel.from_encoder(tiny_encoder, pooling="cls")
    cache = build_cache(old, data.corpus, tmp_path / "old").cache
    model = DualEncoderModel.from_encoder(tiny_encoder)
    trainer = DualEncoderTrainer(
        model, arguments(tmp_path / "out"), train_dataset=data.train, targets=data.corpus, target_cache=cache
    )
    trainer.train()
    assert trainer.cost["initial_target_passes"] == 0
    other = data.corpus.select(range(10))
    with pytest.raises(CacheMismatchError, match="other ids or texts"):
        DualEncoderTrainer(model, arguments(tmp_path / "x"), targets=other, target_cache=cache)


def test_judgement_knows_the_old_model_and_clean_queries(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, max_steps=4)
    trainer.train()
    report = trainer.judge(data.test, old_model=DualEncoderModel.from_encoder(tiny_encoder))
    found = report.to_dict()
    assert {"old", "stale", "corrected", "fresh"} <= found.keys()
    seen = set(trainer.fitted_rows.tolist())
    row_of = {one: row for row, one in enumerate(column(data.corpus, "id"))}
    expected = sum(not any(row_of[one] in seen for one in ids) for ids in column(data.test, "positive_ids"))
    assert found["clean_queries"] == expected
    assert trainer.cost["final_target_passes"] == len(data.corpus)
    with pytest.raises(CacheMismatchError, match="weights"):
        trainer.judge(data.test, old_model=trainer.model)


def test_held_out_positives_are_never_fitted_on_so_every_query_is_clean(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    for kind in ("affine", "residual_mlp"):
        trainer = trainer_for(tiny_encoder, data, tmp_path / kind, max_steps=20, corrector_kind=kind)
        trainer.hold_out(data.test, data.dev)
        trainer.train()
        ids = column(data.corpus, "id")
        seen = {ids[row] for row in trainer.fitted_rows.tolist()}
        held_out = {one for split in (data.test, data.dev) for known in column(split, "positive_ids") for one in known}
        assert len(seen) > 10 and not seen & held_out
        assert trainer.judge(data.test).judgement.clean_queries == len(data.test)
        with pytest.raises(ConfigurationError, match="before prepare"):
            trainer.hold_out(data.test)


def test_copies_of_held_out_positives_are_held_out_too(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    positive = data.dev[0]["positive_ids"][0]
    row = column(data.corpus, "id").index(positive)
    copy = {**data.corpus[row], "id": "copy", "text": "  " + data.corpus[row]["text"].upper()}
    corpus = Dataset.from_list([*data.corpus, copy], features=data.corpus.features)
    trainer = trainer_for(tiny_encoder, dataclasses.replace(data, corpus=corpus), tmp_path)
    trainer.hold_out(data.dev)
    assert {row, len(corpus) - 1} <= set(trainer._held_out.tolist())


def test_evaluate_reports_what_training_would_search(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, eval_strategy="steps", eval_steps=3)
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_mrr@10", "eval_recall@10", "eval_recall@100", "eval_ndcg@10", "eval_success@10"} <= metrics.keys()
    assert sum("eval_mrr@10" in entry for entry in trainer.state.log_history) == 3
    several = trainer.evaluate({"dev": data.dev, "test": data.test})
    assert "eval_dev_mrr@10" in several and "eval_test_mrr@10" in several
    assert trainer.cost["final_target_passes"] == 0
    with pytest.raises(ConfigurationError, match=r"evaluate: expected a split, or the name .*; got 'dev'"):
        trainer.evaluate("dev")
    trainer.eval_dataset = {"dev": data.dev}
    assert trainer.evaluate("dev")["eval_mrr@10"] == several["eval_dev_mrr@10"]
    with pytest.raises(ConfigurationError, match="predict: expected evaluate"):
        trainer.predict(data.test)


def test_pairs_in_sentence_transformers_columns_need_no_targets(tiny_encoder: str, tmp_path: Path) -> None:
    rows = [{"question": f"what is {thing}", "answer": f"a {thing} of {n}"} for n, thing in enumerate(THINGS)]
    model = DualEncoderModel.from_encoder(tiny_encoder)
    trainer = DualEncoderTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert len(trainer.targets) == len(THINGS)


def test_separate_towers_and_bf16_train(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    first = []
    for half in (False, True):
        torch.manual_seed(0)  # projections are drawn
        model = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True, projection_dim=8)
        args = arguments(
            tmp_path / str(half), bf16=half, share_negatives=False, num_negatives=3, sampling_correction=True,
            negatives="uniform", logging_steps=1,
        )  # fmt: skip
        trainer = DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus)
        trainer.train()
        first.append(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))
    assert trainer.live_cache.cache.dim == 8
    assert trainer.live_cache.cache.fingerprint.compute_dtype == "bfloat16"
    assert first[1] != first[0] and first[1] == pytest.approx(first[0], rel=0.02)
    assert all(np.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_bad_arguments_are_refused_before_any_work(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder)
    with pytest.raises(ConfigurationError, match="a DualEncoderModel"):
        DualEncoderTrainer(model.encoder, arguments(tmp_path), train_dataset=data.train, targets=data.corpus)
    with pytest.raises(ConfigurationError, match="targets"):
        DualEncoderTrainer(model, arguments(tmp_path), eval_dataset=data.dev)
    with pytest.raises(DataError):
        DualEncoderTrainer(model, arguments(tmp_path), train_dataset=data.train, targets=data.corpus.select(range(3)))
    with pytest.raises(ConfigurationError, match="train_dataset"):
        DualEncoderTrainer(model, arguments(tmp_path), targets=data.corpus).train()
    no_cache = trainer_for(tiny_encoder, data, tmp_path / "n", negatives="in_batch", staleness="ignore")
    with pytest.raises(ConfigurationError, match="build_cache"):
        no_cache.judge(data.test)


def test_a_run_is_a_function_of_its_seed(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    states = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        trainer = trainer_for(tiny_encoder, data, tmp_path / str(number), corrector_kind="residual_mlp", seed=seed)
        trainer.train()
        states.append(weights(trainer.model))
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["corrector.hidden.weight"], states[2]["corrector.hidden.weight"])


@pytest.mark.parametrize("changes", [{}, {"corrector_kind": "residual_mlp"}, {"refresh_steps": "10"}])
def test_the_best_model_comes_back_with_the_corrector_that_belongs_to_it(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, changes: dict[str, object]
) -> None:
    trainer = trainer_for(
        tiny_encoder, data, tmp_path, max_steps=24, eval_strategy="steps", eval_steps=6, save_strategy="steps",
        save_steps=6, load_best_model_at_end=True, learning_rate=3e-3, corrector_window=12, **changes,
    )  # fmt: skip
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert trainer.args.metric_for_best_model == "mrr@10" and best.name.startswith("checkpoint-")
    saved = DualEncoderModel.from_pretrained(str(best))
    texts = column(data.corpus, "text")[:5]
    assert torch.equal(trainer.model.encode_target(texts), saved.encode_target(texts))
    report = trainer.judge(data.test)
    assert report.cosines["corrected"] >= report.cosines["stale"] - 1e-3


def test_a_corrector_left_from_an_earlier_run_starts_again_on_a_new_cache(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    first = trainer_for(tiny_encoder, data, tmp_path / "a")
    first.train()
    first.save_model()
    model = DualEncoderModel.from_pretrained(str(tmp_path / "a"))
    second = DualEncoderTrainer(model, arguments(tmp_path / "b"), train_dataset=data.train, targets=data.corpus)
    second.prepare()
    stale = second.live_cache.cache.read(0, 10)
    assert torch.allclose(second.live_cache.corrected.read(0, 10), stale, atol=1e-6)
    third = DualEncoderTrainer(
        model, arguments(tmp_path / "c", staleness="ignore"), train_dataset=data.train, targets=data.corpus
    )
    third.train()
    third.save_model()
    assert not (tmp_path / "c" / "corrector").exists()


def test_a_moved_run_resumes_and_other_arguments_are_refused(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_for(tiny_encoder, data, tmp_path / "a", **saving).train()
    (tmp_path / "a").rename(tmp_path / "b")
    moved = trainer_for(tiny_encoder, data, tmp_path / "b", **saving)
    moved.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    assert moved.state.global_step == 6
    other = trainer_for(tiny_encoder, data, tmp_path / "b", corrector_kind="mean_shift", **saving)
    with pytest.raises(CheckpointError, match="mean_shift"):
        other.train(resume_from_checkpoint=True)


def test_refreshed_caches_nothing_names_are_removed(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    trainer = trainer_for(
        tiny_encoder, data, tmp_path, staleness="refresh", refresh_steps="2", max_steps=9, save_strategy="steps",
        save_steps=5,
    )  # fmt: skip
    trainer.train()
    # Step 5's checkpoint names the cache of step 4; the current one is that of step 8.
    assert sorted(folder.name for folder in tmp_path.glob("cache-*")) == ["cache-0002", "cache-0004"]
    assert (tmp_path / "cache").is_dir()


def test_training_again_forgets_the_pairs_of_the_first_time(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, corrector_window=3)
    trainer.train()
    trainer.train()
    steps = trainer.live_cache.online.window.pairs().steps
    assert steps.min() >= 3 and len(trainer.live_cache.online.window) <= 3 * 8


def test_columns_that_say_nothing_new_may_be_left_out(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder)
    bare = data.train.remove_columns(["positive_grades", "metadata"])
    targets = data.corpus.remove_columns(["metadata"])
    DualEncoderTrainer(model, arguments(tmp_path, max_steps=1), train_dataset=bare, targets=targets).train()
    with pytest.raises(DataError, match="eval_dataset"):
        DualEncoderTrainer(model, arguments(tmp_path), targets=targets, eval_dataset=data.dev.select([]))


# ---------------------------------------------------------------------- several positives, given negatives, a teacher


def graded_data() -> RetrievalData:
    """Eight queries with two positives of different grades, two given negatives and a teacher's scores."""
    corpus = [f"the {thing} is {colour}" for colour in COLOURS for thing in THINGS]
    ids = [f"t{row}" for row in range(len(corpus))]
    train = {
        "query_id": [f"q{n}" for n in range(8)],
        "query": [f"find {corpus[9 * n]}" for n in range(8)],
        "positive_ids": [[ids[9 * n], ids[9 * n + 1]] for n in range(8)],
        "positive_grades": [[2.0, 1.0]] * 8,
        "negative_ids": [[ids[9 * n + 2], ids[9 * n + 3]] for n in range(8)],
        "positive_scores": [[9.0, 7.0]] * 8,
        "negative_scores": [[2.0, 1.0]] * 8,
    }
    targets = Dataset.from_dict({"id": ids, "text": corpus})
    return RetrievalData(corpus=targets, train=Dataset.from_dict(train), dev=None, test=None)


@pytest.mark.parametrize(
    ("changes", "targets_a_step"),
    [
        ({"negatives": "in_batch"}, 4),
        ({"negatives": "in_batch", "given_negatives": 2}, 12),
        ({"negatives": "in_batch", "several_positives": True}, 8),
        ({"negatives": "in_batch", "several_positives": True, "given_negatives": 1, "distillation_weight": 0.5}, 12),
    ],
)
def test_what_the_data_give_is_encoded_and_trained_on(
    tiny_encoder: str, tmp_path: Path, changes: dict[str, Any], targets_a_step: int
) -> None:
    trainer = trainer_for(tiny_encoder, graded_data(), tmp_path, max_steps=1, staleness="ignore", **changes)
    trainer.train()
    assert trainer.cost["train_target_passes"] == targets_a_step
    assert np.isfinite(trainer.state.log_history[0]["loss"])


@pytest.mark.parametrize("name", ["given_negatives", "distillation_weight"])
def test_what_the_data_do_not_give_is_not_trained_on(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: .*column"):
        trainer_for(tiny_encoder, data, tmp_path, **{name: 1})


def test_distillation_pulls_scores_towards_the_teachers(tiny_encoder: str, tmp_path: Path) -> None:
    changes = {
        "negatives": "in_batch", "staleness": "ignore", "several_positives": True, "given_negatives": 2,
        "distillation_weight": 1.0, "distillation_temperature": 2.0, "max_steps": 40, "per_device_train_batch_size": 8,
    }  # fmt: skip
    data = graded_data()
    trainer = trainer_for(tiny_encoder, data, tmp_path, **changes)
    queries, targets = column(data.train, "query"), column(data.corpus, "text")

    def gap() -> float:
        scores = trainer.encoder.encode_query(queries) @ trainer.encoder.encode_target(targets).T
        return float(np.mean([float(scores[n, 9 * n] - scores[n, 9 * n + 3]) for n in range(8)]))

    before = gap()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert gap() > before + 0.05


# ---------------------------------------------------------------------- alarms


@pytest.mark.parametrize(("action", "refreshed"), [("log", False), ("refit", False), ("refresh", True)])
def test_a_crossed_bound_is_logged_and_acted_on(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, action: str, refreshed: bool
) -> None:
    trainer = trainer_for(
        tiny_encoder, data, tmp_path, max_steps=25, drift_bound=1e-4, drift_action=action, num_negatives=8,
        uniform_fraction=0.5, learning_rate=5e-3, corrector_update_steps=1000,
    )  # fmt: skip
    trainer.train()
    assert sum(entry.get("drift_alarms", 0) for entry in trainer.state.log_history) >= 1
    assert (trainer.cost["refresh_target_passes"] > 0) is refreshed
    assert bool(len(trainer.fitted_rows)) is not refreshed or action != "refit"


def test_no_alarm_is_raised_while_nothing_drifts(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    trainer = trainer_for(
        tiny_encoder, data, tmp_path, max_steps=25, learning_rate=0.0, drift_bound=0.01, drift_action="refresh",
        num_negatives=8, uniform_fraction=0.5,
    )  # fmt: skip
    trainer.train()
    assert trainer.cost["refresh_target_passes"] == 0
    assert all("drift_alarms" not in entry for entry in trainer.state.log_history)


# ---------------------------------------------------------------------- adapters, queries alone, memory


def adapted(encoder: str) -> PeftModel:
    model = DualEncoderModel.from_encoder(encoder)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"]))


def test_an_adapter_is_trained_with_its_corrector_and_resumed_and_reloaded(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "learning_rate": 1e-2}

    def trainer() -> DualEncoderTrainer:
        return DualEncoderTrainer(
            adapted(tiny_encoder), arguments(tmp_path, **settings), train_dataset=data.train, targets=data.corpus
        )

    whole = trainer()
    base = {name: one.clone() for name, one in whole.encoder.state_dict().items() if "lora" not in name}
    whole.train()
    again = trainer()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(weights(again.encoder), weights(whole.encoder))
    changed = [
        name for name, one in whole.encoder.state_dict().items() if name in base and not torch.equal(one, base[name])
    ]
    assert changed and all(name.startswith("corrector") for name in changed)
    whole.save_model()
    reloaded = DualEncoderModel.from_pretrained(str(tmp_path))
    assert torch.equal(reloaded.encode_query(["find the red cat"]), whole.encoder.encode_query(["find the red cat"]))
    assert reloaded.corrector is not None and whole.encoder.corrector is not None
    assert_same(reloaded.corrector.state_dict(), whole.encoder.corrector.state_dict())


def test_queries_alone_are_trained_on_cached_targets_that_never_move(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True)
    args = arguments(tmp_path, train_targets=False, staleness="ignore", num_negatives=3, max_steps=60)
    trainer = DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus, eval_dataset=data.dev)
    before = weights(model)
    trainer.train()
    moved = {name.split(".")[0] for name, one in weights(model).items() if not torch.equal(one, before[name])}
    assert moved == {"encoder"}
    assert trainer.cost["train_target_passes"] == 0 and trainer.cost["query_passes"] > 200
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-15:]) < np.mean(losses[:15])


def test_queries_alone_need_a_tower_of_their_own(tiny_encoder: str, data: RetrievalData, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="separate_towers=True"):
        trainer_for(tiny_encoder, data, tmp_path, train_targets=False, staleness="ignore")


@pytest.mark.parametrize("negatives", ["softmax", "top_k"])
def test_reranking_encodes_candidates_and_counts_them(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path, negatives: str
) -> None:
    trainer = trainer_for(tiny_encoder, data, tmp_path, staleness="rerank", rerank_candidates=6, negatives=negatives)
    trainer.train()
    assert 6 * 6 <= trainer.cost["rerank_target_passes"] <= 6 * 4 * 6
    assert trainer.cost["train_target_passes"] <= 6 * 8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"fp16": True}, "GPU"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "got DeepSpeed.*ddp.yaml"),
        ({"fsdp": True}, "FSDP: expected several accelerators.*got CPUs"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp_version: 2"),
        ({"staleness": "rerank", "negatives": "uniform"}, "ignore"),
        ({"train_targets": False}, "do not go stale"),
        ({"absolute_margin": 0.1, "negatives": "uniform"}, "softmax"),
        ({"drift_bound": 0.1, "drift_action": "refit", "staleness": "ignore"}, "corrector"),
        ({"scan": "quick"}, "full"),
        ({"mini_batch_size": 0}, "at least 1"),
        ({"label_smoothing_factor": 0.1}, "no smoothed labels"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        arguments(tmp_path, **changes)


def test_the_launcher_of_deepspeed_is_refused_before_its_package_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigurationError, match=r"got DeepSpeed.*ddp.yaml"):
        arguments(tmp_path)


def test_a_resumed_run_outlives_the_checkpoint_it_came_from(
    tiny_encoder: str, data: RetrievalData, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "corrector_kind": "kernel", "corrector_side": "tokens"}
    trainer_for(tiny_encoder, data, tmp_path, max_steps=2, **settings).train()
    resumed = trainer_for(tiny_encoder, data, tmp_path, max_steps=8, save_total_limit=1, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert not (tmp_path / "checkpoint-2").exists()
    resumed.save_model()
    assert resumed.evaluate()["eval_mrr@10"] >= 0
