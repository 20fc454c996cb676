"""Training on answers alone: what is read, learnt, counted, saved, resumed and refused."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rag_helpers import generator_of, question_data, rag_of, rag_trainer

from hf_corrector.encoding import EncodeOptions, build_cache, encode_rows
from hf_corrector.errors import CheckpointError, ConfigurationError, DataError
from hf_corrector.models import DualEncoderModel
from hf_corrector.rag.default_reader import cross_attention_names
from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel
from hf_corrector.rag.objectives import OBJECTIVES
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.rag.rag_trainer import RetrievalAugmentedTrainer
from hf_corrector.training.scan_setup import scan_task
from hf_corrector.training.step_log import StepLog

SGD = {"optim": "sgd", "learning_rate": 0.01}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.clone() for name, one in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    """Return the parts of which some weight has changed."""
    after = model.state_dict()
    return {name.split(".")[0] for name, one in before.items() if not torch.equal(one, after[name])}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_what_it_says_and_counts_its_passes(
    tiny_encoder: str, tmp_path: Path, objective: str
) -> None:
    trainer = rag_trainer(rag_of(tiny_encoder, learn_scale=True), tmp_path, objective=objective)
    before = {name: one for name, one in weights(trainer.rag).items() if "corrector" not in name}
    trainer.train()
    frozen = objective == "generator_only"
    assert changed(before, trainer.rag) == ({"generator"} if frozen else {"generator", "retriever", "log_scale"})
    cost = trainer.cost
    assert cost["initial_target_passes"] == 48 and cost["query_passes"] == 16
    assert cost["reader_passes"] == 16 * (4 if objective == "leave_one_out" else 3)
    assert (cost["train_target_passes"] > 16) == (cost["probe_target_passes"] > 0) == (not frozen)
    first = trainer.state.log_history[0]
    if not frozen:
        # At step 0 the cache holds what training encodes.
        assert first["cosine_stale_fresh"] == pytest.approx(1.0, abs=1e-6)
        assert first["residual_uniform"] == pytest.approx(0.0, abs=1e-6)
    assert trainer.encoder.config.scale == pytest.approx(trainer.rag.scale_now, abs=0.05)
    shares = {name: one for name, one in trainer.state.log_history[1].items() if name.startswith("share_")}
    assert set(shares) == {"share_encode", "share_sampling", "share_read", "share_corrector"}
    assert min(shares.values()) > 0 and sum(shares.values()) < 1
    assert all(f"``{name}``" in str(StepLog.__doc__) for name in shares)


def test_learning_rates_of_parts_are_their_own(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = rag_trainer(
        rag_of(tiny_encoder, learn_scale=True), tmp_path, generator_learning_rate=7e-3, weight_decay=0.1
    )
    trainer.create_optimizer()
    groups, reader = trainer.optimizer.param_groups, set(map(id, trainer.rag.generator.parameters()))
    assert groups[0]["lr"] == 1e-3 and not {id(one) for one in groups[0]["params"]} & reader
    for group in groups:
        of_reader = {id(one) in reader for one in group["params"]}
        assert len(of_reader) == 1 and group["lr"] == (7e-3 if of_reader.pop() else 1e-3)
    (scale,) = [group for group in groups if any(one is trainer.rag.log_scale for one in group["params"])]
    assert scale["weight_decay"] == 0.0 and len(scale["params"]) == 1
    counted = sum(len(group["params"]) for group in groups)
    assert counted == sum(one.requires_grad for one in trainer.rag.parameters())


def test_new_cross_attention_has_a_learning_rate_of_its_own(tiny_encoder: str, tmp_path: Path) -> None:
    rates = {"cross_attention_learning_rate": 5e-3, "learning_rate": 1e-5}
    for reader_rate in (7e-4, None):
        trainer = rag_trainer(
            rag_of(tiny_encoder, "bert2bert"), tmp_path, generator_learning_rate=reader_rate, weight_decay=0.1, **rates
        )  # fmt: skip
        trainer.create_optimizer()
        found = {id(one): group for group in trainer.optimizer.param_groups for one in group["params"]}
        names = cross_attention_names(trainer.rag.generator)
        trained = {name: one for name, one in trainer.rag.generator.named_parameters() if one.requires_grad}
        assert names and names < set(trained)
        for name, one in trained.items():
            assert found[id(one)]["lr"] == (5e-3 if name in names else 1e-5 if reader_rate is None else reader_rate)
            assert (found[id(one)]["weight_decay"] == 0.0) == (name.endswith("bias") or "LayerNorm" in name)
        assert all(found[id(one)]["lr"] == 1e-5 for one in trainer.encoder.parameters() if one.requires_grad)
        assert len(found) == sum(one.requires_grad for one in trainer.rag.parameters())
    # A subclass of no kind is needed for the first step to move them by their own rate.
    before = weights(trainer.rag.generator)
    trainer.args.max_steps = 1
    trainer.train()
    moved = {
        name: float((one - before[name]).abs().max()) for name, one in trainer.rag.generator.state_dict().items()
        if name in trained
    }  # fmt: skip
    assert max(moved[name] for name in moved.keys() - names) < 2e-5
    assert max(moved[name] for name in names) == pytest.approx(5e-3, rel=0.2)


def test_a_learning_rate_of_layers_that_are_not_trained_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    frozen = rag_of(tiny_encoder, "bert2bert")
    frozen.generator.decoder.requires_grad_(False)
    models = {"GPT2": rag_of(tiny_encoder, "gpt2"), "T5": rag_of(tiny_encoder, "t5"), "EncoderDecoder": frozen}
    for name, model in models.items():
        with pytest.raises(ConfigurationError, match=rf"got {name}\w+, which has none to train"):
            rag_trainer(model, tmp_path / "out", cross_attention_learning_rate=1e-3)
    assert not (tmp_path / "out").exists()


def test_a_given_optimizer_keeps_its_groups_with_or_without_a_schedule(tiny_encoder: str, tmp_path: Path) -> None:
    for scheduled in (True, False):
        model = rag_of(tiny_encoder, learn_scale=True)
        optimizer = torch.optim.SGD([
            {"params": list(model.retriever.parameters()), "lr": 2e-3},
            {"params": [*model.generator.parameters(), model.log_scale], "lr": 1e-2},
        ])  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step) if scheduled else None
        before, groups = weights(model), [[id(one) for one in group["params"]] for group in optimizer.param_groups]
        trainer = rag_trainer(model, tmp_path, max_steps=2, optimizers=(optimizer, schedule))
        trainer.train()
        assert [[id(one) for one in group["params"]] for group in optimizer.param_groups] == groups
        assert [group["initial_lr"] for group in optimizer.param_groups] == [2e-3, 1e-2]
        if scheduled:
            assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 2.5e-3]
        assert changed(before, model) == {"retriever", "generator", "log_scale"}


def test_rates_of_parts_beside_a_given_optimizer_are_refused(tiny_encoder: str, tmp_path: Path) -> None:
    model = rag_of(tiny_encoder, "bert2bert")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for name in ("generator_learning_rate", "cross_attention_learning_rate"):
        with pytest.raises(ConfigurationError, match=f"{name}: expected None with an optimiser"):
            rag_trainer(model, tmp_path / "out", optimizers=(optimizer, None), **{name: 1e-3})
    assert not (tmp_path / "out").exists()


def test_the_choice_of_a_scan_knows_what_reading_costs(tiny_encoder: str, tmp_path: Path) -> None:
    """By hand: every weight but embeddings multiplies every token it sees, twice forward and four times backward."""
    for kind in ("gpt2", "t5"):
        ops = {}
        for objective in ("marginal", "leave_one_out"):
            trainer = rag_trainer(rag_of(tiny_encoder, kind), tmp_path / kind, objective=objective, scan="auto")
            trainer.prepare()
            ops[objective] = trainer.source.further_ops
        reader, style = trainer.rag.generator, trainer.rag.reader
        weights = {name: one.numel() for name, one in reader.named_parameters()}
        embedded = {"transformer.wte.weight", "transformer.wpe.weight", "shared.weight"}
        embedded |= {name for name in weights if "relative_attention_bias" in name}
        first = {name for name in weights if name.startswith("encoder.")} if kind == "t5" else set()
        asked, answered, passage = (
            sum(map(len, tokens)) / len(tokens) for tokens in (
                style.questions(trainer.train_dataset["query"]),
                style.answers([one[0] for one in trainer.train_dataset["answers"]]),
                style.passages(trainer.targets["text"]),
            )
        )  # fmt: skip
        expected = {"marginal": 0.0, "leave_one_out": 0.0}
        for name, count in weights.items():
            for passages, objective, factor in ((1, "marginal", 18), (3, "leave_one_out", 6), (2, "leave_one_out", 6)):
                prompt = asked + passages * passage
                seen = prompt + answered if kind == "gpt2" else prompt if name in first else answered
                expected[objective] += (name not in embedded) * 4 * factor * count * seen
        assert ops["marginal"] == pytest.approx(expected["marginal"], rel=1e-6)
        assert ops["leave_one_out"] == pytest.approx(expected["leave_one_out"], rel=1e-6)
        trainer.train()
        alone = scan_task(trainer.encoder, trainer.args, trainer.live_cache, mean_tokens=9.0, further_ops=0.0)
        share = float(re.search(r"about ([\d.]+)% of a step", trainer.scan_said).group(1)) / 100
        assert 0 < share < alone.share(trainer.source.plan)


def resumable(encoder: str, out: Path, **changes: Any) -> RetrievalAugmentedTrainer:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5, "passages": "softmax", **changes}
    return rag_trainer(rag_of(encoder, dropout=0.1, learn_scale=True), out, **settings)


@pytest.mark.parametrize(
    "changes",
    [
        {"corrector_kind": "residual_mlp", "generator_mini_batch_size": 5, "mini_batch_size": 3},
        {"staleness": "refresh", "refresh_steps": "3", "gradient_accumulation_steps": 2, "objective": "emdr2"},
    ],
    ids=["corrector, chunks", "refresh, accumulated"],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tiny_encoder: str, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole = resumable(tiny_encoder, tmp_path, **changes)
    whole.train()
    expected, cost = weights(whole.rag), dict(whole.cost)
    again = resumable(tiny_encoder, tmp_path, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = weights(again.rag)
    assert [name for name, one in expected.items() if not torch.equal(one, found[name])] == []
    assert again.cost["reader_passes"] == cost["reader_passes"]
    losses = [[one["loss"] for one in run.state.log_history if "loss" in one] for run in (whole, again)]
    assert losses[0] == losses[1]
    other = resumable(tiny_encoder, tmp_path, **{**changes, "num_passages": 2})
    with pytest.raises(CheckpointError, match="num_passages"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_encoding_probes_is_no_time_of_the_corrector(
    tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        time.sleep(0.2)
        return encode_rows(*args, **kwargs)

    trainer = rag_trainer(rag_of(tiny_encoder), tmp_path, max_steps=2, uniform_fraction=1.0)
    trainer.prepare()
    monkeypatch.setattr("hf_corrector.rag.rag_trainer.encode_rows", slow)
    trainer.train()
    spent = trainer.step_log.total_seconds
    assert trainer.cost["probe_target_passes"] > 0
    assert spent["encode"] > 0.4 > spent["corrector"]


def test_accumulated_batches_are_one_large_batch(tiny_encoder: str, tmp_path: Path) -> None:
    found = []
    for name, changes in {
        "large": {"per_device_train_batch_size": 8},
        "small": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    }.items():
        trainer = rag_trainer(rag_of(tiny_encoder), tmp_path / name, **SGD, max_steps=2, **changes)
        trainer.train()
        found.append((trainer.state.log_history[0]["loss"], weights(trainer.rag)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, one in found[0][1].items():
        if "corrector" not in name:
            assert torch.allclose(one, found[1][1][name], atol=1e-5), name


def test_a_fixed_retriever_reads_the_cache_it_is_given(tiny_encoder: str, tmp_path: Path) -> None:
    targets, train, _ = question_data()
    older = DualEncoderModel.from_encoder(tiny_encoder)
    with torch.no_grad():
        for one in older.parameters():
            one += 0.05 * torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    cache = build_cache(older, targets, tmp_path / "older", options=EncodeOptions(progress=False)).cache
    args = RetrievalAugmentedTrainingArguments(
        str(tmp_path / "out"), objective="generator_only", staleness="ignore", num_passages=3, max_steps=2,
        report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = RetrievalAugmentedTrainer(
        rag_of(tiny_encoder), args, train_dataset=train, targets=targets, target_cache=cache
    )
    trainer.train()
    assert trainer.cost["initial_target_passes"] == 0
    queries = trainer.encoder.encode_query(train["query"][:4])
    wanted = (queries @ cache.read(0, 48).float().T).topk(3).indices
    assert trainer.nearest_passages()(queries).candidates.ids.tolist() == wanted.tolist()


def test_a_closed_book_needs_neither_cache_nor_passages(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = rag_trainer(rag_of(tiny_encoder, "t5"), tmp_path, objective="generator_only", num_passages=0)
    trainer.train()
    assert trainer.live_cache is None and trainer.cost["reader_passes"] == 16
    assert set(trainer.evaluate()) >= {"eval_answer_log_likelihood"}


def test_reranking_and_frozen_targets_train_too(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = rag_trainer(rag_of(tiny_encoder), tmp_path / "r", staleness="rerank", rerank_candidates=5, max_steps=2)
    trainer.train()
    assert trainer.cost["rerank_target_passes"] > 0 and trainer.cost["probe_target_passes"] == 0
    generator, tokenizer = generator_of("t5")
    retriever = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True)
    model = RetrievalAugmentedModel.from_parts(retriever, generator, tokenizer, answer_max_length=16)
    frozen = rag_trainer(model, tmp_path / "f", train_targets=False, staleness="ignore", max_steps=2)
    before = {name: one for name, one in weights(model.retriever).items() if name.startswith("separate")}
    queries = weights(model.retriever.encoder)
    frozen.train()
    assert frozen.cost["train_target_passes"] == 0
    assert changed(before, model.retriever) == set() and changed(queries, model.retriever.encoder)


def test_adapters_are_trained_saved_and_loaded(tiny_encoder: str, tmp_path: Path) -> None:
    generator, tokenizer = generator_of("gpt2")
    reader = get_peft_model(generator, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    model = RetrievalAugmentedModel.from_parts(
        DualEncoderModel.from_encoder(tiny_encoder), reader, tokenizer, answer_max_length=16
    )
    trainer = rag_trainer(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    before = weights(model.generator)
    trainer.train()
    names = {name for name, one in model.generator.state_dict().items() if not torch.equal(one, before[name])}
    assert names and all("lora_" in name for name in names)
    trainer.save_model()
    loaded = RetrievalAugmentedModel.from_pretrained(str(tmp_path))
    for name, one in model.state_dict().items():
        assert torch.equal(one, loaded.state_dict()[name]), name
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_bfloat16_trains_and_evaluates(tiny_encoder: str, tmp_path: Path) -> None:
    losses, likelihoods = [], []
    for half in (True, False):
        # The learning rate moves nothing, so that both are judged with the same weights.
        trainer = rag_trainer(
            rag_of(tiny_encoder, "llama"), tmp_path / str(half), bf16=half, max_steps=1, learning_rate=0.0
        )
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        likelihoods.append(trainer.evaluate()["eval_answer_log_likelihood"])
    for half, whole in (losses, likelihoods):
        assert half != whole and half == pytest.approx(whole, rel=0.02)


def test_held_out_positives_are_not_fitted_on(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = rag_trainer(rag_of(tiny_encoder), tmp_path, uniform_fraction=1.0, max_steps=6)
    test = question_data()[2]
    with pytest.raises(DataError, match="positive_ids"):
        trainer.hold_out(test.remove_columns("positive_ids"))
    trainer.hold_out(test)
    trainer.train()
    rows = set(trainer.fitted_rows.tolist())
    assert rows and not rows & set(range(36, 48))


# ---------------------------------------------------------------------- what is refused


def without(row: int, **changes: Any) -> Dataset:
    rows = question_data()[1].to_list()
    return Dataset.from_list([{**one, **(changes if number == row else {})} for number, one in enumerate(rows)])


@pytest.mark.parametrize(
    ("train", "error"),
    [
        (without(3, answers=[]), "train_dataset, row 3"),
        (without(4, answers=[" "]), "train_dataset, row 4"),
        (without(5, query=""), "train_dataset, row 5"),
        (without(6, query_id="q0"), "'q0' again"),
        (
            without(7, answers=["a very long answer, which nobody would ever read to its end"]),
            "train_dataset, row 7, answer to 'q7': expected at most 16 tokens",
        ),
        (question_data()[1].remove_columns("answers"), "Add the column 'answers'"),
        (question_data()[1].map(lambda row: {"answers": row["answers"][0]}), "a list of strings"),
    ],
)
def test_questions_that_cannot_be_trained_on_are_refused_before_any_work(
    tiny_encoder: str, tmp_path: Path, train: Dataset, error: str
) -> None:
    args = RetrievalAugmentedTrainingArguments(str(tmp_path / "out"), report_to=[])
    with pytest.raises(DataError, match=error):
        RetrievalAugmentedTrainer(rag_of(tiny_encoder), args, train_dataset=train, targets=question_data()[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (
            {"answers": ["a very long answer, which nobody would ever read to its end"]},
            "answer to 'q2': expected at most",
        ),
        ({"answers": []}, "expected a query_id of its own, a query, and answers"),
        ({"positive_ids": ["nowhere"]}, "expected positive_ids of the corpus; got 'nowhere'"),
    ],
)
def test_questions_that_cannot_be_evaluated_on_are_refused_before_any_work(
    tiny_encoder: str, tmp_path: Path, changes: dict[str, Any], error: str
) -> None:
    wrong, model = without(2, **changes), rag_of(tiny_encoder)
    for name, splits in {"eval_dataset": wrong, "dev": {"other": question_data()[2], "dev": wrong}}.items():
        with pytest.raises(DataError, match=f"{name}, row 2.*{error}"):
            rag_trainer(model, tmp_path / "out", evaluation=splits)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"objective": "rag"}, "objective: expected one of"),
        ({"passages": "uniform"}, "passages: expected one of"),
        ({"objective": "generator_only", "staleness": "corrector"}, "staleness: expected 'ignore'"),
        ({"objective": "leave_one_out", "num_passages": 1}, "num_passages: expected at least 2"),
        ({"num_passages": 0}, "num_passages: expected at least 1"),
        ({"staleness": "rerank", "rerank_candidates": 2}, "rerank_candidates"),
        ({"generator_mini_batch_size": 0}, "generator_mini_batch_size"),
        ({"cross_attention_learning_rate": -1e-3}, "cross_attention_learning_rate: expected at least 0"),
        ({"objective_temperature": 0.0}, "objective_temperature"),
        ({"staleness": "refresh"}, "refresh_steps"),
        ({"drift_bound": 0.1, "objective": "generator_only"}, "drift_bound"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: expected 0"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path: Path, changes: dict[str, Any], error: str) -> None:
    settings = {"staleness": "ignore"} if changes.get("objective") == "generator_only" else {}
    with pytest.raises(ConfigurationError, match=error):
        RetrievalAugmentedTrainingArguments(str(tmp_path), report_to=[], **{**settings, **changes})


def test_other_models_and_arguments_are_refused(tiny_encoder: str, tmp_path: Path) -> None:
    targets, train, _ = question_data()
    args = RetrievalAugmentedTrainingArguments(str(tmp_path), report_to=[])
    model = rag_of(tiny_encoder)
    with pytest.raises(ConfigurationError, match="a RetrievalAugmentedModel"):
        RetrievalAugmentedTrainer(model.retriever, args, train_dataset=train, targets=targets)
    with pytest.raises(ConfigurationError, match="a RetrievalAugmentedModel"):
        wrapped = get_peft_model(model, LoraConfig(target_modules=["query"]))
        RetrievalAugmentedTrainer(wrapped, args, train_dataset=train, targets=targets)
    with pytest.raises(ConfigurationError, match="targets to read"):
        RetrievalAugmentedTrainer(rag_of(tiny_encoder), args, train_dataset=train)
