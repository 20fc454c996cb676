"""Adapters of PEFT on a dual encoder: train, save, resume, reload in another process, merge, the same vectors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from model_helpers import TEXTS, save_bert
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from hf_corrector.batching import pad_tokens
from hf_corrector.errors import CheckpointError, ConfigurationError
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel, SampledTargets
from hf_corrector.models.adapters import check_adapter, dual_encoder_of, freeze_targets
from hf_corrector.training.checkpointing import CheckpointingTrainer

ATTENTION = ["query", "value"]
QUERY_TOWER = r"encoder\..*\.(query|value)"
CASES = {
    "shared": ({}, LoraConfig(target_modules=ATTENTION)),
    "both": ({"separate_towers": True}, LoraConfig(target_modules=ATTENTION, use_rslora=True)),
    "query": ({"separate_towers": True}, LoraConfig(target_modules=QUERY_TOWER, lora_alpha=32)),
    "random_projection": ({"projection_dim": 7}, LoraConfig(target_modules=ATTENTION)),
    "trained_projection": (
        {"projection_dim": 7, "separate_towers": True},
        LoraConfig(target_modules=ATTENTION, modules_to_save=["projection"]),
    ),
    "adapted_projection": ({"projection_dim": 7}, LoraConfig(target_modules=[*ATTENTION, "projection"], use_dora=True)),
    "biases": ({}, LoraConfig(target_modules=ATTENTION, bias="lora_only")),
    "ia3": ({}, IA3Config(target_modules=ATTENTION, feedforward_modules=[])),
}


@dataclass(frozen=True)
class Trained:
    case: str
    model: DualEncoderModel
    folder: Path
    vectors: torch.Tensor


def make(path: str, case: str) -> PeftModel:
    settings, config = CASES[case]
    # Projections and adapters are drawn: the same ones whatever test has run before.
    torch.manual_seed(0)
    return get_peft_model(
        DualEncoderModel.from_encoder(path, **settings), PeftConfig.from_peft_type(**config.to_dict())
    )


def vectors_of(model: DualEncoderModel) -> torch.Tensor:
    return torch.cat([model.encode_query(TEXTS), model.encode_target(TEXTS)])


def batches(model: DualEncoderModel) -> list[dict[str, list[int]]]:
    queries, targets = model.tokenize(TEXTS, "query"), model.tokenize(TEXTS[::-1], "target")
    return [{"query": query, "target": target} for query, target in zip(queries, targets, strict=True)]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, dict[str, torch.Tensor]]:
    names = {"queries": "query", "positives": "target"}
    return {to: pad_tokens([one[name] for one in examples], 0) for to, name in names.items()}


class PairTrainer(CheckpointingTrainer):
    def floating_point_ops(self, inputs: dict[str, dict[str, torch.Tensor]]) -> int:
        return dual_encoder_of(self.model).floating_point_ops(inputs)


def trainer_of(model: torch.nn.Module, folder: Path, **settings: object) -> CheckpointingTrainer:
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=4, learning_rate=0.01, report_to="none", use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True, **{"max_steps": 3, "save_strategy": "no", **settings},
    )  # fmt: skip
    examples = batches(dual_encoder_of(model))
    return PairTrainer(model=model, args=args, train_dataset=examples, data_collator=collate)


def train(model: torch.nn.Module, folder: Path, **settings: object) -> torch.nn.Module:
    trainer = trainer_of(model, folder, **settings)
    trainer.train()
    trainer.save_model()
    return model


@pytest.fixture
def adapted(tiny_encoder: str, tmp_path: Path) -> PeftModel:
    """A trained LoRA, saved under ``tmp_path / "adapter"``."""
    return train(make(tiny_encoder, "shared"), tmp_path / "adapter")


# ---------------------------------------------------------------------- wrappers


def test_dual_encoder_is_found_inside_of_every_wrapper(tiny_model: DualEncoderModel) -> None:
    assert dual_encoder_of(tiny_model) is tiny_model
    assert dual_encoder_of(torch.compile(tiny_model, backend="eager")) is tiny_model
    adapted = get_peft_model(tiny_model, LoraConfig(target_modules=ATTENTION))
    assert dual_encoder_of(adapted) is tiny_model
    assert dual_encoder_of(torch.nn.DataParallel(torch.compile(adapted, backend="eager"))) is tiny_model


@pytest.mark.parametrize("wrong", [torch.nn.Linear(2, 2), None, torch.nn.DataParallel(torch.nn.Linear(2, 2))])
def test_what_holds_no_dual_encoder_is_refused(wrong: torch.nn.Module) -> None:
    with pytest.raises(ConfigurationError, match="DualEncoderModel"):
        dual_encoder_of(wrong)


# ---------------------------------------------------------------------- round trips


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """An adapter of every case after some steps."""
    model, folder = make(tiny_encoder, request.param), tmp_path_factory.mktemp(request.param)
    before = vectors_of(dual_encoder_of(model))
    after = vectors_of(dual_encoder_of(train(model, folder)))
    assert not torch.allclose(after, before, atol=1e-4)
    return Trained(request.param, dual_encoder_of(model), folder, after)


def test_trained_adapter_is_loaded_again_with_the_same_vectors_bit_for_bit(trained: Trained, tmp_path: Path) -> None:
    loaded = DualEncoderModel.from_pretrained(trained.folder)
    assert torch.equal(vectors_of(loaded), trained.vectors)
    assert not loaded.training
    for role in ("query", "target"):
        assert loaded.fingerprint(role).digest == trained.model.fingerprint(role).digest
    loaded.save_pretrained(tmp_path)
    assert torch.equal(vectors_of(DualEncoderModel.from_pretrained(tmp_path)), trained.vectors)


def test_plain_peft_loads_what_was_saved_onto_the_same_base(trained: Trained, tiny_encoder: str) -> None:
    torch.manual_seed(99)
    base = DualEncoderModel.from_encoder(tiny_encoder, **CASES[trained.case][0])
    loaded = PeftModel.from_pretrained(base, trained.folder)
    assert torch.equal(vectors_of(loaded.get_base_model()), trained.vectors)


def test_merged_adapter_is_a_plain_dual_encoder_with_the_same_vectors(trained: Trained, tmp_path: Path) -> None:
    merged = DualEncoderModel.load_adapter_on_base(str(trained.folder)).merge_and_unload()
    assert type(merged) is DualEncoderModel
    assert torch.allclose(vectors_of(merged), trained.vectors, atol=1e-6)
    merged.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert torch.equal(vectors_of(DualEncoderModel.from_pretrained(tmp_path)), vectors_of(merged))


def downloaded(encoder: str, cache: Path) -> str:
    """Put an encoder where the Hub's client keeps downloads, and return the commit it stands for."""
    commit, repository = "0123456789abcdef0123456789abcdef01234567", cache / "models--someone--tiny"
    shutil.copytree(encoder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return commit


@pytest.mark.usefixtures("one_thread")
def test_fresh_process_makes_the_model_under_the_adapter_again(tiny_encoder: str, tmp_path: Path) -> None:
    """Of one encoder, of two, of a saved dual encoder, and of the Hub at the commit that was downloaded."""
    other = save_bert(tmp_path / "other", seed=5, lowercase=False)
    two = DualEncoderModel.from_encoder(tiny_encoder, other, pooling="cls", target_prompt="t: ")
    DualEncoderModel.from_encoder(tiny_encoder, num_hidden_layers=1, query_max_length=5).save_pretrained(
        tmp_path / "saved"
    )
    saved = DualEncoderModel.from_pretrained(tmp_path / "saved")
    models = {
        "one": make(tiny_encoder, "random_projection"), "two": get_peft_model(two, CASES["both"][1]),
        "on_saved": get_peft_model(saved, LoraConfig(target_modules=ATTENTION)),
    }  # fmt: skip
    for name, model in models.items():
        train(model, tmp_path / name)
    commit = downloaded(tiny_encoder, tmp_path / "hub")
    code = (
        "import torch; from test_peft import *\n"
        "train(make('someone/tiny', 'shared'), Path('of_hub')); DualEncoderModel.from_pretrained('of_hub')\n"
        f"for name in {list(models)}: torch.save(vectors_of(DualEncoderModel.from_pretrained(name)), name + '.pt')"
    )
    where = {"PYTHONPATH": str(Path(__file__).parent), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    where["OMP_NUM_THREADS"] = "1"  # as in this process
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, **where},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, model in models.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), vectors_of(dual_encoder_of(model))), name
    (source,) = json.loads((tmp_path / "of_hub" / "base_model.json").read_text())["origin"]["sources"]
    assert (source["name"], source["revision"]) == ("someone/tiny", commit)


def test_half_precision_base_is_brought_to_half_precision_again(tiny_encoder: str, tmp_path: Path) -> None:
    base = DualEncoderModel.from_encoder(tiny_encoder).to(torch.bfloat16)
    model = train(get_peft_model(base, LoraConfig(target_modules=ATTENTION)), tmp_path / "adapter")
    loaded = DualEncoderModel.from_pretrained(tmp_path / "adapter")
    assert loaded.encoder.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert torch.equal(vectors_of(loaded), vectors_of(dual_encoder_of(model)))


def test_corrector_travels_with_the_adapter(tiny_encoder: str, tmp_path: Path) -> None:
    base = DualEncoderModel.from_encoder(tiny_encoder)
    base.corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=base.config.embedding_dim))
    base.config.corrector = base.corrector.config
    model = train(get_peft_model(base, LoraConfig(target_modules=ATTENTION)), tmp_path / "adapter")
    base.corrector.load_parameters({"weight": torch.randn(32, 32)})
    trainer_of(model, tmp_path / "adapter").save_model()
    loaded, stale = DualEncoderModel.from_pretrained(tmp_path / "adapter"), torch.randn(5, 32)
    assert torch.equal(loaded.corrector(stale), base.corrector(stale))
    assert torch.equal(CorrectorModel.from_pretrained(tmp_path / "adapter" / "corrector")(stale), base.corrector(stale))


def test_folder_that_would_be_uploaded_is_all_it_takes(tiny_encoder: str, tmp_path: Path) -> None:
    """The Trainer uploads its output folder without checkpoints, a model what its save_pretrained writes."""
    model = make(tiny_encoder, "random_projection")
    trainer = trainer_of(model, tmp_path / "out", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(model_name="x")
    shutil.copytree(tmp_path / "out", tmp_path / "hub", ignore=shutil.ignore_patterns("_*", "checkpoint-*"))
    dual_encoder_of(model).save_pretrained(tmp_path / "hub2")
    for folder in ("hub", "hub2"):
        loaded = DualEncoderModel.from_pretrained(tmp_path / folder)
        assert torch.equal(vectors_of(loaded), vectors_of(dual_encoder_of(model)))


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("case", ["query", "trained_projection", "biases"])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tiny_encoder: str, tmp_path: Path, case: str) -> None:
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    start = make(tiny_encoder, case)
    # A projection is made at random, so that both runs must start from one file.
    dual_encoder_of(start).save_pretrained(tmp_path / "start")
    begin = lambda: DualEncoderModel.load_adapter_on_base(str(tmp_path / "start"), is_trainable=True)  # noqa: E731
    whole = begin()
    trainer_of(whole, tmp_path / "whole", **settings).train()
    resumed = begin()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    trainer_of(resumed, tmp_path / "part", **settings).train(resume_from_checkpoint=True)
    left, right = (dict(model.named_parameters()) for model in (whole, resumed))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert not torch.equal(vectors_of(dual_encoder_of(whole)), vectors_of(dual_encoder_of(begin())))


def test_resuming_brings_back_the_corrector(tiny_encoder: str, tmp_path: Path) -> None:
    def build() -> PeftModel:
        model = make(tiny_encoder, "shared")
        encoder = dual_encoder_of(model)
        encoder.corrector = CorrectorModel(CorrectorConfig(kind="low_rank", input_dim=32)).requires_grad_(False)
        encoder.config.corrector = encoder.corrector.config
        return model

    model, settings = build(), {"max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    fitted = {"down": torch.randn(3, 32), "up": torch.randn(32, 3)}
    dual_encoder_of(model).corrector.load_parameters(fitted)
    trainer_of(model, tmp_path, **settings).train()
    other = build()
    trainer_of(other, tmp_path, **{**settings, "max_steps": 3}).train(resume_from_checkpoint=True)
    assert torch.equal(dual_encoder_of(other).corrector.down, fitted["down"])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(target_modules=ATTENTION, lora_alpha=16), "lora_alpha"),
        (LoraConfig(target_modules=ATTENTION, r=4), "r 8 / 4"),
        (LoraConfig(target_modules=["key"]), "target_modules"),
    ],
)
def test_checkpoint_of_another_adapter_is_refused(
    tiny_encoder: str, tmp_path: Path, config: LoraConfig, named: str
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(make(tiny_encoder, "shared"), tmp_path, **settings).train()
    other = get_peft_model(DualEncoderModel.from_encoder(tiny_encoder), config)
    with pytest.raises(CheckpointError, match=named):
        trainer_of(other, tmp_path, **settings).train(resume_from_checkpoint=True)


def test_checkpoint_of_an_adapter_on_another_base_is_refused(tiny_encoder: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(make(tiny_encoder, "shared"), tmp_path / "out", **settings).train()
    other = make(save_bert(tmp_path / "other", seed=5), "shared")
    with pytest.raises(CheckpointError, match="other"):
        trainer_of(other, tmp_path / "out", **settings).train(resume_from_checkpoint=True)


def test_whole_models_and_adapters_are_not_mixed_in_one_folder(tiny_encoder: str, tmp_path: Path) -> None:
    """Readers take the whole model of a folder that holds both, silently."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(DualEncoderModel.from_encoder(tiny_encoder), tmp_path / "whole", **settings).train()
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        trainer_of(make(tiny_encoder, "shared"), tmp_path / "whole", **settings).train()
    with pytest.raises(CheckpointError, match="adapter"):
        trainer_of(make(tiny_encoder, "shared"), tmp_path / "new", **settings).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )
    train(make(tiny_encoder, "shared"), tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"adapter_config\.json"):
        DualEncoderModel.from_encoder(tiny_encoder).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    (tmp_path / "base").mkdir()
    DualEncoderModel.from_encoder(tiny_encoder).save_pretrained(tmp_path / "base")
    with pytest.raises(ConfigurationError, match=r"model\.safetensors"):
        dual_encoder_of(make(tiny_encoder, "shared")).save_pretrained(tmp_path / "base")
    DualEncoderModel.from_pretrained(tmp_path / "base")


# ---------------------------------------------------------------------- what is refused


def test_adapter_whose_base_has_other_weights_now_is_refused_naming_both(tiny_encoder: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_encoder, base)
    model = train(make(str(base), "shared"), tmp_path / "adapter")
    then = dual_encoder_of(model).origin.weights
    weights = load_file(base / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][3, 4] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    now = DualEncoderModel.from_encoder(str(base)).origin.weights
    with pytest.raises(ConfigurationError, match=f"(?s){then}.*{now}"):
        DualEncoderModel.from_pretrained(tmp_path / "adapter")


def test_adapter_that_peft_alone_saved_says_what_is_missing(tiny_encoder: str, tmp_path: Path) -> None:
    make(tiny_encoder, "shared").save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"base_model.json.*PeftModel.from_pretrained"):
        DualEncoderModel.from_pretrained(tmp_path)


def test_base_that_was_changed_since_it_was_loaded_is_refused_before_training(
    tiny_encoder: str, tmp_path: Path
) -> None:
    base = DualEncoderModel.from_encoder(tiny_encoder)
    with torch.no_grad():
        base.encoder.encoder.layer[0].output.dense.weight.mul_(2)
    changed = get_peft_model(base, LoraConfig(target_modules=ATTENTION))
    with pytest.raises(ConfigurationError, match="as it was loaded"):
        trainer_of(changed, tmp_path).train()
    config = DualEncoderModel.from_encoder(tiny_encoder).config
    with pytest.raises(ConfigurationError, match="not loaded"):
        check_adapter(get_peft_model(DualEncoderModel(config), LoraConfig(target_modules=ATTENTION)))


def test_trainable_weights_that_would_not_be_saved_are_refused_before_training(
    tiny_encoder: str, tmp_path: Path
) -> None:
    model = make(tiny_encoder, "random_projection")
    dual_encoder_of(model).projection.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"projection.weight.*modules_to_save"):
        trainer_of(model, tmp_path).train()


def test_several_adapters_and_ones_for_a_task_or_inside_of_the_corrector_are_refused(tiny_encoder: str) -> None:
    several = make(tiny_encoder, "shared")
    several.add_adapter("second", LoraConfig(target_modules=ATTENTION))
    with pytest.raises(ConfigurationError, match="second"):
        check_adapter(several)
    for_a_task = LoraConfig(target_modules=ATTENTION, task_type="FEATURE_EXTRACTION")
    with pytest.raises(ConfigurationError, match="FEATURE_EXTRACTION"):
        check_adapter(get_peft_model(DualEncoderModel.from_encoder(tiny_encoder), for_a_task))
    base = DualEncoderModel.from_encoder(tiny_encoder)
    base.corrector = CorrectorModel(CorrectorConfig(kind="residual_mlp", input_dim=32))
    base.config.corrector = base.corrector.config
    with pytest.raises(ConfigurationError, match=r"corrector.hidden.*exclude_modules"):
        check_adapter(get_peft_model(base, LoraConfig(target_modules=["query", "hidden"])))


def test_loaded_adapter_is_not_trained_by_mistake(adapted: PeftModel, tmp_path: Path) -> None:
    loaded = DualEncoderModel.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="load_adapter_on_base"):
        trainer_of(loaded, tmp_path / "more").train()
    more = DualEncoderModel.load_adapter_on_base(str(tmp_path / "adapter"), is_trainable=True)
    before = vectors_of(dual_encoder_of(more))
    assert torch.equal(before, vectors_of(dual_encoder_of(adapted)))
    train(more, tmp_path / "more")
    assert not torch.equal(vectors_of(dual_encoder_of(more)), before)


# ---------------------------------------------------------------------- fingerprints


def test_fingerprint_changes_with_every_bit_and_setting_of_the_adapter(adapted: PeftModel) -> None:
    encoder = dual_encoder_of(adapted)
    seen = [encoder.fingerprint("target").digest]
    layer = encoder.encoder.encoder.layer[0].attention.self.query
    with torch.no_grad():
        weight = layer.lora_B["default"].weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    seen.append(encoder.fingerprint("target").digest)
    layer.set_scale("default", 3.0)
    seen.append(encoder.fingerprint("target").digest)
    with adapted.disable_adapter():
        seen.append(encoder.fingerprint("target").digest)
    assert len(set(seen)) == 4
    assert encoder.fingerprint("target").digest == seen[2]


def test_adapter_of_the_query_tower_leaves_the_targets_fingerprint_alone(tiny_encoder: str, tmp_path: Path) -> None:
    model = make(tiny_encoder, "query")
    plain = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True)
    train(model, tmp_path)
    assert dual_encoder_of(model).fingerprint("target").digest == plain.fingerprint("target").digest
    assert dual_encoder_of(model).fingerprint("query").digest != plain.fingerprint("query").digest


# ---------------------------------------------------------------------- memory, and queries alone


def gradients(model: PeftModel, mini_batch_size: int | None = None) -> torch.Tensor:
    model.train().zero_grad()
    model(**collate(batches(dual_encoder_of(model))), mini_batch_size=mini_batch_size).loss.backward()
    return torch.cat([one.grad.flatten() for one in model.parameters() if one.requires_grad])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_and_chunks_give_the_adapter_the_same_gradient(
    tiny_encoder: str, reentrant: bool
) -> None:
    model = make(tiny_encoder, "both")
    expected = gradients(model)
    assert expected.norm() > 0
    # What reentrant checkpointing needs where the weights below the first adapter are frozen.
    model.enable_input_require_grads()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    encoder = dual_encoder_of(model)
    for tower in (encoder.encoder, encoder.separate_target_encoder):
        assert all(layer.gradient_checkpointing for layer in tower.encoder.layer)
    for size in (None, *([] if reentrant else [3])):
        assert (gradients(model, size) - expected).norm() < 5e-6 * expected.norm()


def test_with_frozen_targets_only_queries_learn_from_given_vectors(tiny_encoder: str) -> None:
    model = make(tiny_encoder, "both")
    freeze_targets(model)
    encoder = dual_encoder_of(model)
    trainable = [name for name, one in encoder.named_parameters() if one.requires_grad]
    assert trainable
    assert all(name.startswith("encoder.") for name in trainable)
    columns = encoder.encode_target(TEXTS)
    sampled = SampledTargets(None, torch.ones(len(TEXTS), len(TEXTS), dtype=torch.bool), vectors=columns)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.05)
    tokens, losses = collate(batches(encoder))["queries"], []
    for _ in range(8):
        loss = model(tokens, None, lambda queries: sampled, mini_batch_size=5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(encoder.encode_target(TEXTS), columns)


def test_whole_target_tower_and_its_projection_are_frozen(tiny_encoder: str) -> None:
    model = DualEncoderModel.from_encoder(tiny_encoder, separate_towers=True, projection_dim=7)
    freeze_targets(model)
    learning = {name.split(".")[0] for name, one in model.named_parameters() if one.requires_grad}
    assert learning == {"encoder", "projection"}


def test_targets_of_a_shared_tower_cannot_be_frozen(tiny_encoder: str) -> None:
    for model in (DualEncoderModel.from_encoder(tiny_encoder), make(tiny_encoder, "shared")):
        with pytest.raises(ConfigurationError, match="separate_towers=True"):
            freeze_targets(model)
