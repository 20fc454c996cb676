"""The model of retriever and reader: likelihoods one by one, where gradients go, chunks, adapters, saving."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from rag_helpers import ANSWERS, KINDS, PASSAGES, QUESTIONS, generator_of, rag_of, retrieved_of, step_inputs
from torch.nn import functional as F

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.rag.modeling_rag import MiniBatches, RetrievalAugmentedModel
from hf_corrector.rag.objectives import OBJECTIVES, Objective
from hf_corrector.rag.passages import RetrievedTargets

ROWS = [[0, 1, 2], [2, 3, -1], [5, 0, 7]]


@pytest.fixture(scope="module")
def models(tiny_encoder: str) -> dict[str, RetrievalAugmentedModel]:
    """One model of each kind of reader, with a scale to learn."""
    return {kind: rag_of(tiny_encoder, kind, learn_scale=True) for kind in KINDS}


def step(model: Any, *, fresh: bool = True, **options: Any) -> Any:
    model.zero_grad()
    outputs = model(**step_inputs(model), candidate_fn=lambda _: retrieved_of(model, ROWS, fresh=fresh), **options)
    outputs.loss.backward()
    return outputs


def norm_of(module: torch.nn.Module) -> float:
    return sum(float(one.grad.norm()) for one in module.parameters() if one.grad is not None)


# ---------------------------------------------------------------------- likelihoods


@torch.no_grad()
def one_by_one(model: RetrievalAugmentedModel, prompt: list[int], answer: list[int]) -> float:
    """Return log P_LM(a|prompt) without padding, mask or labels: the next token's probability, again and again."""
    total, start = 0.0, model.reader.format.start
    for number, token in enumerate(answer):
        if start is None:
            logits = model.generator(input_ids=torch.tensor([prompt + answer[:number]])).logits
        else:
            logits = model.generator(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[start, *answer[:number]]])
            ).logits
        total += float(F.log_softmax(logits[0, -1].double(), dim=-1)[token])
    return total


@pytest.mark.parametrize("kind", KINDS)
def test_padded_likelihoods_are_those_of_each_prompt_alone(models: Any, kind: str) -> None:
    model = models[kind]
    retrieved, reader = retrieved_of(model, ROWS), model.reader
    questions, answers = reader.questions(QUESTIONS), reader.answers(ANSWERS)
    found = model.read_each(retrieved, questions, answers).detach()
    for query, row in enumerate(ROWS):
        for column, target in enumerate(row):
            if target < 0:
                assert float(found[query, column]) == 0.0
                continue
            prompt = reader.format.prompt(questions[query], reader.passages([PASSAGES[target]]))
            assert float(found[query, column]) == pytest.approx(one_by_one(model, prompt, answers[query]), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_in_chunks_gives_the_same_loss_and_gradients(models: Any, kind: str) -> None:
    model, found = models[kind], []
    for sizes in (None, MiniBatches(retriever=2, generator=3)):
        loss = step(model, mini_batches=sizes, objective=Objective("emdr2")).loss
        found.append((loss, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}))
    (loss, plain), (chunked_loss, chunked) = found
    assert torch.allclose(loss, chunked_loss, rtol=1e-5)
    assert plain.keys() == chunked.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, chunked[name], atol=1e-4 * float(gradient.abs().max()) + 1e-6), name


def test_chunks_draw_the_same_dropout_twice(tiny_encoder: str) -> None:
    """A second pass with other dropout would be the gradient of another loss; finite differences tell."""
    model = rag_of(tiny_encoder, "gpt2", dropout=0.3).train()
    weight = model.generator.transformer.ln_f.bias

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return step(model, mini_batches=MiniBatches(generator=2)).loss

    loss()
    gradient, direction = weight.grad.clone(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * 1e-2 * direction
        values.append(float(loss().detach()))
        with torch.no_grad():
            weight -= sign * 1e-2 * direction
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(float((gradient * direction).sum()), rel=0.02)


# ---------------------------------------------------------------------- gradients

# objective: (query encoder, target encoder, reader, scale) get a gradient where targets are encoded anew
TABLE = dict.fromkeys(OBJECTIVES, (True, True, True, True)) | {"generator_only": (False, False, True, False)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_reach_what_the_objective_trains_and_nothing_else(tiny_encoder: str, name: str) -> None:
    generator, tokenizer = generator_of("gpt2")
    retriever = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True)
    retriever.corrector = CorrectorModel(CorrectorConfig(kind="residual_mlp", input_dim=32, hidden_dim=8))
    retriever.config.corrector = retriever.corrector.config
    model = RetrievalAugmentedModel.from_parts(
        retriever, generator, tokenizer, learn_scale=True, answer_max_length=16
    )  # fmt: skip
    for fresh in (True, False):
        step(model, fresh=fresh, objective=Objective(name))
        query, target, reader, scale = TABLE[name]
        assert (norm_of(retriever.encoder) > 0) == query
        assert (norm_of(retriever.target_encoder) > 0) == (target and fresh)
        assert (norm_of(model.generator) > 0) == reader
        assert (model.log_scale.grad is not None and float(model.log_scale.grad) != 0) == scale
        assert norm_of(retriever.corrector) == 0


@pytest.mark.parametrize("name", [one for one in OBJECTIVES if one != "generator_only"])
def test_the_retriever_learns_from_a_reader_that_stays_as_it_is(tiny_encoder: str, name: str) -> None:
    model = rag_of(tiny_encoder, "t5")
    model.generator.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.retriever.parameters(), lr=1e-3)
    every, losses = [list(range(len(PASSAGES)))] * 3, []
    for _ in range(8):
        optimizer.zero_grad()
        outputs = model(
            **step_inputs(model), candidate_fn=lambda _: retrieved_of(model, every), objective=Objective(name)
        )  # fmt: skip
        outputs.loss.backward()
        optimizer.step()
        losses.append(float((outputs.loss if name == "marginal" else outputs.retriever_loss).detach()))
    assert losses[-1] < losses[0] - 0.01


def test_the_loss_is_computed_in_float32_under_autocast(models: Any) -> None:
    model = models["t5"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = step(model)
    for part in (outputs.loss, outputs.log_prior, outputs.log_likelihoods):
        assert part.dtype == torch.float32
    assert float(outputs.loss.detach()) == pytest.approx(float(step(model).loss.detach()), rel=0.02)


# ---------------------------------------------------------------------- what is refused


def test_a_query_without_any_passage_is_refused(models: Any) -> None:
    with pytest.raises(DataError, match="query 1 of the batch: expected at least one retrieved target"):
        retrieved_of(models["gpt2"], [[0, 1], [-1, -1]])
    found = retrieved_of(models["gpt2"], [[0, 1]])
    with pytest.raises(ConfigurationError, match="either tokens to encode, or vectors"):
        RetrievedTargets(found.candidates, found.places, found.passages)


def test_parts_that_could_not_be_loaded_again_are_refused(tiny_encoder: str) -> None:
    generator, tokenizer = generator_of("gpt2")
    retriever = DualEncoderModel.from_encoder(tiny_encoder)
    with pytest.raises(ConfigurationError, match="a DualEncoderModel"):
        RetrievalAugmentedModel.from_parts(retriever.encoder, generator, tokenizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="AutoModelForSeq2SeqLM or AutoModelForCausalLM"):
        RetrievalAugmentedModel.from_parts(retriever, generator.transformer, tokenizer)
    prompted = get_peft_model(generator, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ConfigurationError, match="layers and their weights"):
        RetrievalAugmentedModel.from_parts(retriever, prompted, tokenizer)
    inner = get_peft_model(generator_of("gpt2")[0], LoraConfig(target_modules=["c_attn"])).get_base_model()
    with pytest.raises(ConfigurationError, match="a model taken out of one"):
        RetrievalAugmentedModel.from_parts(retriever, inner, tokenizer)


# ---------------------------------------------------------------------- saving

LOAD = """
import sys, torch
from hf_corrector.rag import RetrievalAugmentedModel
sys.path.insert(0, sys.argv[1])
from rag_helpers import retrieved_of, step_inputs
for folder in sys.argv[2:]:
    model, rows = RetrievalAugmentedModel.from_pretrained(folder), [[0, 1, 2], [2, 3, -1], [5, 0, 7]]
    with torch.no_grad():
        outputs = model(**step_inputs(model), candidate_fn=lambda _: retrieved_of(model, rows))
    trainable = sorted(name for name, one in model.named_parameters() if one.requires_grad)
    found = {"prior": outputs.log_prior, "likelihoods": outputs.log_likelihoods, "trainable": trainable}
    torch.save(found, folder + "/found")
"""


def adapted(encoder: str) -> RetrievalAugmentedModel:
    """Compose parts with an adapter each, whose weights are not those an adapter starts with."""
    generator, tokenizer = generator_of("gpt2")
    torch.manual_seed(4)
    reader = get_peft_model(
        generator, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM", lora_alpha=16)
    )
    retriever = get_peft_model(DualEncoderModel.from_encoder(encoder), LoraConfig(target_modules=["query"]))
    for part in (reader, retriever):
        for name, one in part.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(one, std=0.2)
    return RetrievalAugmentedModel.from_parts(retriever, reader, tokenizer, answer_max_length=16)


def corrected(encoder: str) -> RetrievalAugmentedModel:
    """Compose a retriever with a corrector and a reader, with a scale that was learnt."""
    model: RetrievalAugmentedModel = rag_of(encoder, "llama", learn_scale=True)
    model.retriever.corrector = CorrectorModel(CorrectorConfig(kind="residual_mlp", input_dim=32, hidden_dim=8))
    model.retriever.config.corrector = model.retriever.corrector.config
    model.retriever.corrector.requires_grad_(False)
    with torch.no_grad():
        model.log_scale += 0.5
    return model


def test_another_process_loads_the_same_models_bit_for_bit(tiny_encoder: str, tmp_path: Path) -> None:
    made = {name: one(tiny_encoder) for name, one in (("adapted", adapted), ("corrected", corrected))}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in made]
    command = [sys.executable, "-c", LOAD, str(Path(__file__).parent), *folders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, model in made.items():
        with torch.no_grad():
            before = model(**step_inputs(model), candidate_fn=lambda _, model=model: retrieved_of(model, ROWS))
        after = torch.load(tmp_path / name / "found", weights_only=True)
        assert torch.equal(before.log_prior, after["prior"])
        assert torch.equal(before.log_likelihoods, after["likelihoods"])
    loaded = torch.load(tmp_path / "adapted" / "found", weights_only=True)["trainable"]
    assert loaded == sorted(name for name, one in made["adapted"].named_parameters() if one.requires_grad)
    assert all("lora_" in name for name in loaded)
    assert (tmp_path / "corrected" / "corrector" / "config.json").exists()


def test_only_the_adapters_of_parts_get_gradients(tiny_encoder: str) -> None:
    model = adapted(tiny_encoder)
    step(model)
    names = {name for name, one in model.named_parameters() if one.grad is not None}
    assert names and all("lora_" in name for name in names)
    assert {name.split(".")[0] for name in names} == {"retriever", "generator"}


def test_composing_leaves_the_parts_as_they_were(tiny_encoder: str) -> None:
    generator, tokenizer = generator_of("llama")
    retriever = DualEncoderModel.from_encoder(tiny_encoder)
    before = {name: one.clone() for name, one in [*generator.state_dict().items(), *retriever.state_dict().items()]}
    attention = generator.config._attn_implementation
    model = RetrievalAugmentedModel.from_parts(retriever, generator, tokenizer)
    after = {**model.generator.state_dict(), **model.retriever.state_dict()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.generator.config._attn_implementation == attention is not None


def test_names_of_saved_parts_compose_too(tiny_encoder: str, tmp_path: Path) -> None:
    generator, tokenizer = generator_of("t5")
    generator.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    model = RetrievalAugmentedModel.from_names(tiny_encoder, str(tmp_path / "t5"), answer_max_length=16)
    plain = rag_of(tiny_encoder, "t5")
    first, second = (
        one(**step_inputs(one), candidate_fn=lambda _, m=one: retrieved_of(m, ROWS)).loss for one in (model, plain)
    )
    assert torch.equal(first, second)
