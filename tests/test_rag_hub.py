"""Retriever and reader to the Hub and back, by its real client and a stand-in, and the card that goes with them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_stand_in import Hub, in_a_fresh_process
from model_helpers import save_bert
from peft import LoraConfig, get_peft_model
from rag_helpers import answers_of, generator_of, question_data, rag_of, rag_trainer

from hf_corrector import CardFacts, CorrectorModel, PushOptions, RunRecord
from hf_corrector.cards import MISSING, card_of_reading_run
from hf_corrector.cli.main import main
from hf_corrector.errors import ConfigurationError
from hf_corrector.models import CorrectorConfig, DualEncoderModel
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.evaluation import judge_trained
from hf_corrector.records import FITTED_FILE

QUIET = PushOptions(progress=False)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
ANSWER = """
import sys, torch
sys.path.insert(0, {tests!r})
from rag_helpers import answers_of
from hf_corrector import RetrievalAugmentedModel
torch.save([answers_of(RetrievalAugmentedModel.from_pretrained(name)) for name in {names!r}], "found.pt")
"""


def made(encoder: str, other: str, kind: str) -> RetrievalAugmentedModel:
    """Compose a retriever of two towers with a corrector and a reader whose way of writing is its own."""
    retriever = DualEncoderModel.from_encoder(encoder, other, query_prompt="q: ", projection_dim=6)
    retriever.corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=6))
    retriever.config.corrector = retriever.corrector.config
    generator, tokenizer = generator_of(kind)
    # What the reader writes first otherwise is forbidden; a temperature without sampling is what transformers refuses
    # to save by itself.
    generator.generation_config.no_repeat_ngram_size, generator.generation_config.temperature = 1, 0.7
    generator.generation_config.bad_words_ids = [[17], [33]]
    return RetrievalAugmentedModel.from_parts(
        retriever, generator, tokenizer, answer_max_length=12, learn_scale=True, passage_separator=" / "
    )  # fmt: skip


def test_another_process_makes_the_same_vectors_and_the_same_answers(
    tiny_encoder: str, hub: Hub, tmp_path: Path
) -> None:
    other = save_bert(tmp_path / "other", seed=5, lowercase=False)
    kinds, adapter = ("t5", "gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    models = {f"someone/{kind}": made(tiny_encoder, other, kind) for kind in kinds}
    reader, tokenizer = generator_of("gpt2", seed=1)
    models["someone/adapted"] = RetrievalAugmentedModel.from_parts(
        DualEncoderModel.from_encoder(tiny_encoder), get_peft_model(reader, adapter), tokenizer, answer_max_length=12
    )
    plain = rag_of(tiny_encoder, "t5", answer_max_length=12)
    for name, model in models.items():
        model.push_to_hub(name, options=QUIET)
    in_a_fresh_process(ANSWER.format(tests=str(Path(__file__).parent), names=list(models)), tmp_path)
    for (name, model), found in zip(models.items(), torch.load(tmp_path / "found.pt"), strict=True):
        expected = answers_of(model)
        assert torch.equal(found["queries"], expected["queries"]), name
        assert torch.equal(found["targets"], expected["targets"]), name
        assert found["answers"] == expected["answers"] and found["rows"] == expected["rows"], name
        assert any(answer[0][0] for answer in expected["answers"]), "answers of some words"
        files = hub.model(name).files()
        assert set(files) == {
            ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors",
            *(f"query_tokenizer/{one}" for one in TOKENIZER), *(f"reader_tokenizer/{one}" for one in TOKENIZER),
            *([] if name == "someone/adapted" else [f"target_tokenizer/{one}" for one in TOKENIZER]),
            *([] if name == "someone/adapted" else ["corrector/config.json", "corrector/model.safetensors"]),
        }  # fmt: skip
        here = [str(tmp_path).encode(), str(Path(tiny_encoder).parent).encode()]
        assert [file for file, content in files.items() if any(one in content for one in here)] == []
        assert b"No record of a run came with these weights" in files["README.md"]
        assert b"trained on" not in files["README.md"], "nobody has said that it was trained at all"
        assert b"from the record of the run" not in files["README.md"]
    own = models["someone/t5"]
    free = answers_of(own)["answers"]
    own.generator.generation_config = plain.generator.generation_config
    assert answers_of(own)["answers"] != free, "how the reader writes decides on its answers"
    asked = {one.rsplit("/", 1)[-1] for one in hub.asked if "/resolve/" in one}
    assert not any(one.endswith((".bin", ".py", ".pt", ".pkl")) for one in asked)


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_trained_one_is_pushed_with_its_card_and_again_when_it_was_judged(
    tiny_encoder: str, hub: Hub, tmp_path: Path
) -> None:
    settings = {"push_to_hub": True, "hub_model_id": "someone/read", "hub_private_repo": True, "max_steps": 2}
    trainer = rag_trainer(rag_of(tiny_encoder, "t5"), tmp_path / "out", **settings)
    assert hub.model("someone/read").private, "a push that cannot work is known before training"
    trainer.card_facts = CardFacts(license="apache-2.0", language=("en",))
    test = question_data()[2]
    trainer.hold_out(test)
    trainer.train()
    trainer.save_model()
    assert hub.messages == ["Model save"]
    files = hub.model("someone/read").files()
    assert {name for name in files if "tokenizer" not in name} == {
        ".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors",
        "corrector/config.json", "corrector/model.safetensors", f"corrector/{FITTED_FILE}",
    }  # fmt: skip
    unjudged = files["README.md"].decode()
    assert f"{MISSING}\n" in unjudged.split("## Results\n")[1].split("## Cost")[0]
    assert "model-index" not in unjudged
    judgement = judge_trained(trainer, test)
    trainer.push_to_hub("Judgement in the model card")
    after = hub.model("someone/read").files()
    assert [name for name in after if after[name] != files.get(name)] == ["README.md"]
    card = after["README.md"].decode()
    for condition, words in (("stale", "stale index"), ("corrected", "corrected"), ("fresh", "full re-embed")):
        mean = judgement.means[condition]["f1"]
        written = f"{mean.estimate:.3f} [{mean.low:.3f}, {mean.high:.3f}]"
        assert any(line.startswith(f"| {words} |") and written in line for line in card.splitlines()), condition
    assert "| corrected − stale |" in card and "12 clean questions of 12" in card
    found = metadata(card)
    assert found["pipeline_tag"] == "question-answering" and found["license"] == "apache-2.0"
    (result,) = found["model-index"][0]["results"]
    values = {one["type"]: one["value"] for one in result["metrics"]}
    assert values["exact_match"] == judgement.means["fresh"]["exact_match"].estimate
    assert str(tmp_path) not in card and str(Path(tiny_encoder).parent) not in card and "PATH_OR_HUB_ID" not in card
    for block in re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), names)
    assert isinstance(names["corrector"], CorrectorModel)
    trainer.train()
    assert trainer.judged == {}, "what is trained further has not been judged"
    with pytest.raises(ConfigurationError, match="hub_strategy"):
        rag_trainer(rag_of(tiny_encoder, "t5"), tmp_path / "other", push_to_hub=True, hub_strategy="every_save")


def test_the_card_says_what_the_record_says_and_what_is_missing(tiny_encoder: str, tmp_path: Path) -> None:
    trainer = rag_trainer(rag_of(tiny_encoder, "t5"), tmp_path, max_steps=2, generator_learning_rate=7e-4)
    trainer.train()
    trainer.save_model()
    record = trainer.run_record()
    record.save(tmp_path)
    assert card_of_reading_run(RunRecord.load(tmp_path)) == card_of_reading_run(record)
    card = card_of_reading_run(record)
    assert f"| prompts read | {record.cost['reader_passes']} |" in card
    assert "| generator_learning_rate | 0.0007 |" in card and "`hf-corrector rag-train`, seed 3" in card
    assert f"| prompt | `{trainer.rag.config.prompt}` |" in card and "| architecture | `t5` |" in card
    assert f"| numbers | {trainer.rag.generator.num_parameters():,} |" in card
    assert record.corrector["fresh_encoder"]["weights"][:12] in card
    named = card_of_reading_run(
        replace(record, arguments={**record.arguments, "reader_name": "a/reader"}), CardFacts(stale_name="b/encoder")
    )
    assert metadata(named)["base_model"] == ["b/encoder", "a/reader"]
    assert "# Retriever from b/encoder with a/reader as its reader" in named
    bare = card_of_reading_run(RunRecord("rag-train", 0, {}, machine=""))
    for section in ("The reader", "Results", "Cost", "Data", "How it was made"):
        assert MISSING in bare.split(f"## {section}\n")[1].split("\n## ")[0], section
    assert "an unnamed encoder with an unnamed reader" in bare and f"Licence of these weights: {MISSING}" in bare


@pytest.mark.parametrize("passages", [0, 2])
def test_the_card_of_a_reader_trained_alone_tells_of_no_stale_cache(
    passages: int, tiny_encoder: str, tmp_path: Path
) -> None:
    settings = {"objective": "generator_only", "num_passages": passages, "max_steps": 2}
    trainer = rag_trainer(rag_of(tiny_encoder, "t5"), tmp_path, **settings)
    trainer.train()
    if trainer.live_cache is None:
        trainer.build_cache()
    judgement = judge_trained(trainer, question_data()[2])
    card = card_of_reading_run(trainer.run_record())
    assert not re.search(r"goes stale|stale index|before and after|re-embed \||fitted on|differences|recovery", card)
    assert "with what the former finds, which stayed as it was" in card if passages else "without passages" in card
    mean, fingerprint = judgement.means["fresh"]["f1"], trainer.encoder.fingerprint("target")
    (line,) = [line for line in card.splitlines() if line.startswith("| index |")]
    assert f"{mean.estimate:.3f} [{mean.low:.3f}, {mean.high:.3f}]" in line
    assert f"| weights | `{fingerprint.weights[:12]}` |" in card.split("## The retriever\n")[1]


def test_a_folder_called_like_a_repository_is_no_base_model(
    tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_encoder, tmp_path / "models" / "encoder")
    for part in generator_of("gpt2"):
        part.save_pretrained(tmp_path / "models" / "reader")
    monkeypatch.chdir(tmp_path)
    model = RetrievalAugmentedModel.from_names("models/encoder", "models/reader", answer_max_length=12)
    model.retriever = DualEncoderModel.from_encoder("models/encoder", revision="main")
    model.retriever.corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=32))
    stale = model.retriever.fingerprint("target")
    model.retriever.corrector.note_encoders(stale=stale, fresh=stale)
    for card in (model.own_card(), model.retriever.own_card(), model.retriever.corrector.own_card()):
        assert "base_model" not in metadata(card) and "models/" not in card
    assert "# Retriever from encoder with reader as its reader" in model.own_card()


def test_push_knows_the_folder_of_a_run(tiny_encoder: str, hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    trainer = rag_trainer(rag_of(tiny_encoder, "gpt2"), out, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.run_record().save(out)
    assert main(["push", str(out), "someone/run", "--quiet", "--license", "mit", "--language", "en"]) == 0
    files = hub.model("someone/run").files()
    assert not any(name.startswith(("cache", "tokens", "checkpoint", "run.json", "training_args")) for name in files)
    card = files["README.md"].decode()
    assert metadata(card)["license"] == "mit" and '"someone/run"' in card and "## Results" in card
    # Its corrector by itself, and a checkpoint, of whose run nothing lies beside it.
    assert main(["push", str(out / "corrector"), "someone/h", "--quiet"]) == 0
    assert b"# Corrector from" in hub.model("someone/h").files()["README.md"]
    assert main(["push", str(out / "checkpoint-1"), "someone/early", "--quiet"]) == 0
    early = hub.model("someone/early").files()
    assert set(early) - {f"corrector/{FITTED_FILE}"} == set(files) - {f"corrector/{FITTED_FILE}"}
    assert b"No record of a run" in early["README.md"] and b"| architecture | `gpt2` |" in early["README.md"]
    assert isinstance(RetrievalAugmentedModel.from_pretrained("someone/early"), RetrievalAugmentedModel)


def test_the_command_pushes_the_model_and_then_its_judgement(tiny_encoder: str, hub: Hub, tmp_path: Path) -> None:
    targets, train, test = question_data()
    folder = tmp_path / "colours"
    (folder / "qrels").mkdir(parents=True)
    rows = {
        "corpus": [{"_id": one["id"], "text": one["text"]} for one in targets],
        "queries": [{"_id": q["query_id"], "text": q["query"], "answers": q["answers"]} for q in [*train, *test]],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    for name, split in (("train", train), ("test", test)):
        pairs = ["query-id\tcorpus-id\tscore", *(f"{q['query_id']}\t{q['positive_ids'][0]}\t1" for q in split)]
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(pairs) + "\n")
    for part in generator_of("t5"):
        part.save_pretrained(tmp_path / "reader")
    assert main([
        "rag-train", f"--data={folder}", f"--model={tiny_encoder}", f"--reader={tmp_path / 'reader'}", "--quiet",
        f"--output_dir={tmp_path / 'out'}", "--max_steps=1", "--num_passages=2", "--per_device_train_batch_size=2",
        "--report_to=none", "--judged_questions=3", "--corrector_warmup_steps=0", "--answer_max_length=8",
        "--use_cpu=true", "--push_to_hub=true", "--hub_model_id=someone/colours",
    ]) == 0  # fmt: skip
    assert hub.messages == ["Model save", "Judgement in the model card"]
    card = hub.model("someone/colours").files()["README.md"].decode()
    assert "| full re-embed |" in card and "| name | colours |" in card and "| split judged on | test |" in card
    assert card == (tmp_path / "out" / "README.md").read_text().replace("PATH_OR_HUB_ID", "someone/colours")
