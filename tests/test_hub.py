"""Models and caches through the Hub and back, by its real client and a stand-in that speaks its protocol."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_helpers import FINGERPRINT, build, make_plan, make_vectors
from datasets import Dataset
from hub_stand_in import ENDPOINT, Hub, Repository, in_a_fresh_process, sha256
from huggingface_hub import constants
from model_helpers import save_bert

from hf_corrector import FittedCorrector, PushOptions
from hf_corrector._hub import Upload, push
from hf_corrector.cache import TargetCache
from hf_corrector.cache.edits import edit_arrays
from hf_corrector.cards import CardFacts
from hf_corrector.cli.main import main
from hf_corrector.corrected_cache import write_corrected
from hf_corrector.data.datasets import RetrievalData, from_pairs
from hf_corrector.errors import CacheCorruptedError, CacheMismatchError, ConfigurationError, HubError, InputError
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.records import FITTED_FILE, FittedTargets
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.corrector_fit import fit_corrector
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer

QUIET = PushOptions(progress=False)
FRESH = replace(FINGERPRINT, name="other/encoder", weights="x" * 32)


def make_corrector(dim: int = 4, *, noted: bool = True) -> CorrectorModel:
    model = CorrectorModel(CorrectorConfig(kind="affine", input_dim=dim))
    weight = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1))
    model.load_parameters({"weight": weight, "fitted_pairs": torch.tensor(7)})
    if noted:
        model.note_encoders(stale=FINGERPRINT, fresh=FRESH)
    return model


# ---------------------------------------------------------------------- correctors


def test_an_encoder_of_the_hub_is_known_by_its_commit(tiny_encoder: str, hub: Hub) -> None:
    repository = hub.repositories["models/someone/encoder"] = Repository()
    commit = repository.commit({path.name: path.read_bytes() for path in Path(tiny_encoder).iterdir()}, "main")
    stale = DualEncoderModel.from_encoder("someone/encoder").fingerprint("target")
    assert (stale.name, stale.revision) == ("someone/encoder", commit)
    corrector = make_corrector(noted=False)
    corrector.note_encoders(stale=stale, fresh=replace(stale, weights="x" * 32), trained=True)
    assert "base_model:\n- someone/encoder\n" in corrector.own_card() and commit in corrector.own_card()


def test_a_corrector_comes_back_with_what_it_was_fitted_to(hub: Hub) -> None:
    model, vectors = make_corrector(), torch.randn(5, 4)
    address = model.push_to_hub("someone/a-to-b", options=QUIET)
    assert address.startswith(f"{ENDPOINT}/someone/a-to-b/commit/")
    loaded = CorrectorModel.from_pretrained("someone/a-to-b", expected_stale=FINGERPRINT, expected_fresh=FRESH)
    assert torch.equal(loaded.correct(vectors), model.correct(vectors))
    # Which arithmetic an encoder computed in is no other encoder.
    loaded.check_encoders("h", stale=replace(FINGERPRINT, compute_dtype="bfloat16"))
    assert set(hub.model("someone/a-to-b").files()) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"), [({"weights": "y" * 32, "name": "third/one"}, "weights"), ({"prompt": ""}, "prompt"),
                          ({"pooling": "cls"}, "pooling"), ({"normalize": True}, "normalize")],
)  # fmt: skip
def test_another_encoder_is_refused_and_both_are_named(hub: Hub, change: dict[str, object], words: str) -> None:
    make_corrector().push_to_hub("someone/a-to-b", options=QUIET)
    other = replace(FINGERPRINT, **change)
    with pytest.raises(CacheMismatchError, match=words) as raised:
        CorrectorModel.from_pretrained("someone/a-to-b", expected_stale=other)
    assert repr(other.name) in str(raised.value) and "'some/encoder' at revision abc" in str(raised.value)
    with pytest.raises(CacheMismatchError, match="fresh encoder"):
        CorrectorModel.from_pretrained("someone/a-to-b", expected_fresh=replace(FRESH, **change))


def test_a_corrector_that_does_not_say_is_refused_where_it_matters(tmp_path: Path) -> None:
    make_corrector(noted=False).save_pretrained(tmp_path / "h")
    assert CorrectorModel.from_pretrained(str(tmp_path / "h")).config.stale_encoder is None
    with pytest.raises(CacheMismatchError, match="does not say"):
        CorrectorModel.from_pretrained(str(tmp_path / "h"), expected_stale=FINGERPRINT)


def test_where_an_encoder_lay_on_this_machine_stays_here() -> None:
    model = make_corrector(noted=False)
    model.note_encoders(stale=replace(FINGERPRINT, name="/home/me/secret/minilm", revision=None), fresh=FRESH)
    assert model.config.stale_encoder is not None and model.config.stale_encoder["name"] == "minilm"
    assert model.config.fresh_encoder is not None and model.config.fresh_encoder["name"] == "other/encoder"


def test_what_is_fitted_anew_says_nothing_of_its_encoders(tmp_path: Path) -> None:
    cache = build(tmp_path / "old", make_plan(), make_vectors())
    model = make_corrector()
    with pytest.raises(CacheMismatchError, match="fresh encoder 'third/one'"):
        write_corrected(model, cache, tmp_path / "no", encoder=replace(FRESH, name="third/one", weights="z" * 32))
    fit_corrector(model, cache.read(0, 10), make_vectors())
    assert model.config.stale_encoder is None and model.config.fresh_encoder is None
    model = make_corrector()
    model.reset()
    assert model.config.stale_encoder is None


def test_an_encoder_that_was_trained_is_at_no_commit() -> None:
    model = make_corrector(noted=False)
    model.note_encoders(stale=FINGERPRINT, fresh=replace(FRESH, revision="abc"), trained=True)
    assert model.config.stale_encoder is not None and model.config.stale_encoder["revision"] == "abc"
    assert model.config.fresh_encoder is not None and model.config.fresh_encoder["revision"] is None
    model.check_encoders("h", fresh=FRESH)


def test_a_fitted_corrector_works_on_every_cache_of_its_encoder(hub: Hub, tmp_path: Path) -> None:
    """Also on a cache of other targets; not on one of another encoder, which is named."""
    cache = build(tmp_path / "old", make_plan(), make_vectors())
    note = FittedTargets(cache.manifest.checksum, FRESH.digest, (0, 1), ("target-0", "target-1"), FRESH.to_dict())
    fitted = FittedCorrector(make_corrector(), note, FRESH)
    fitted.push_to_hub("someone/fitted", options=QUIET)
    loaded = FittedCorrector.load("someone/fitted")
    assert loaded.fitted == note and loaded.leads_to == FRESH
    first = loaded.apply(cache, tmp_path / "first").read(0, 10)
    assert torch.equal(first, fitted.apply(cache, tmp_path / "second").read(0, 10))
    others = build(tmp_path / "others", make_plan(rows=6), make_vectors(rows=6))
    assert len(loaded.apply(others, tmp_path / "third")) == 6
    command = ["apply", "--corrector", "someone/fitted", "--cache", str(tmp_path / "others"), "--quiet"]
    assert main([*command, "--output_dir", str(tmp_path / "fourth")]) == 0
    assert torch.equal(
        TargetCache.open(tmp_path / "fourth").read(0, 6), TargetCache.open(tmp_path / "third").read(0, 6)
    )
    foreign = build(tmp_path / "foreign", make_plan(fingerprint=replace(FINGERPRINT, prompt="q: ")), make_vectors())
    with pytest.raises(CacheMismatchError, match=r"prompt: 'passage: ' / 'q: '"):
        loaded.apply(foreign, tmp_path / "none")


# ---------------------------------------------------------------------- what is sent


def test_only_the_model_is_sent_and_only_what_changed(hub: Hub, tmp_path: Path) -> None:
    folder, model = tmp_path / "out", make_corrector()
    model.save_pretrained(folder)
    for name in ("run.json", "training_args.bin", "side-tokens.g0.safetensors", "optimizer.pt", ".env"):
        (folder / name).write_text("mine")
    command = ["push", str(folder), "someone/h", "--quiet", "--commit-message", "The first"]
    (folder / "run.json").unlink()
    assert main(command) == 0
    sent = set(hub.model("someone/h").files()) - {".gitattributes"}
    assert sent == {"config.json", "model.safetensors", "README.md"} and hub.messages == ["The first"]
    assert main(command) == 0
    assert hub.messages == ["The first"], "nothing had changed, so there is nothing to commit"
    assert hub.received == [sha256((folder / "model.safetensors").read_bytes())]
    make_corrector(dim=5).save_pretrained(folder)
    assert main(command) == 0
    assert len(hub.received) == 2 and hub.messages == ["The first"] * 2


def test_what_an_earlier_push_left_is_removed_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    """Parts of a model that is whole now would be loaded instead of it."""
    repository = hub.repositories["models/someone/h"] = Repository()
    repository.commit({"model-00001-of-00002.safetensors": b"", "notes.txt": b"", "README.md": b"mine"}, "main")
    files: dict[str, Path | bytes] = {"config.json": b"{}", "README.md": b"---\na: 1\n---\n"}
    upload = Upload(files, "m", owned=("model*.safetensors",), kept=("README.md",))
    push(upload, "someone/h", options=QUIET)
    assert hub.model("someone/h").files() == {"notes.txt": b"", "README.md": b"mine", "config.json": b"{}"}


def test_private_repositories_branches_and_pull_requests(hub: Hub, tmp_path: Path) -> None:
    model = make_corrector()
    model.push_to_hub("someone/h", private=True, options=QUIET)
    assert hub.model("someone/h").private
    model.push_to_hub("someone/h", revision="dev", commit_message="On a branch", options=QUIET)
    assert set(hub.model("someone/h").refs) == {"main", "dev"}
    changed = make_corrector(dim=3)
    address = changed.push_to_hub("someone/h", create_pr=True, options=QUIET)
    assert address == f"{ENDPOINT}/someone/h/discussions/1"
    assert CorrectorModel.from_pretrained("someone/h").config.input_dim == 4
    assert CorrectorModel.from_pretrained("someone/h", revision="refs/pr/1").config.input_dim == 3
    with pytest.raises(HubError, match="hf auth login"):
        model.push_to_hub("someone/h", token="hf_wrong", options=QUIET)
    with pytest.raises(ConfigurationError, match="create_pr or revision"):
        model.push_to_hub("someone/h", create_pr=True, revision="dev", options=QUIET)
    with pytest.raises(TypeError, match="comit_message"):
        model.push_to_hub("someone/h", comit_message="misspelt", options=QUIET)


def test_what_is_not_there_is_said_so(hub: Hub) -> None:
    for load in (CorrectorModel.from_pretrained, DualEncoderModel.from_pretrained, FittedCorrector.load):
        with pytest.raises(HubError, match="someone/nothing"):
            load("someone/nothing")
    with pytest.raises(HubError, match=r"manifest.json from someone/nothing"):
        TargetCache.from_hub("someone/nothing")
    with pytest.raises(OSError, match="Check name"):
        CorrectorModel.from_pretrained("no name: of a repository")


def test_a_link_out_of_the_folder_is_never_sent(hub: Hub, tmp_path: Path) -> None:
    make_corrector().save_pretrained(tmp_path / "h")
    (tmp_path / "h" / FITTED_FILE).symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="a link to /etc/passwd"):
        FittedCorrector.load(tmp_path / "h")
    assert main(["push", str(tmp_path / "h"), "someone/h", "--quiet"]) == 1
    assert hub.repositories == {}


def test_an_adapter_whose_base_nobody_else_has_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"name": "/home/me/base", "revision": None, "subfolder": "", "num_hidden_layers": None}
    origin = {"kind": "encoders", "sources": [source], "weights": "w", "dtype": "float32"}
    (tmp_path / "base_model.json").write_text(json.dumps({"origin": origin, "dtype": "float32"}))
    (tmp_path / "adapter_config.json").write_text("{}")
    assert main(["push", str(tmp_path), "someone/adapter", "--quiet"]) == 1
    assert "Push the model under it first" in capsys.readouterr().err and hub.repositories == {}


def test_a_folder_that_is_nothing_known_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_bert(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    for name in ("plain", "empty", "missing"):
        assert main(["push", str(tmp_path / name), "someone/h"]) == 1
        assert "expected a corrector, a dual encoder, a cache" in capsys.readouterr().err
    make_corrector().save_pretrained(tmp_path / "h")
    assert main(["push", str(tmp_path / "h"), "someone/h", "--license", "mit"]) == 1
    assert "run.json of its run" in capsys.readouterr().err
    assert hub.repositories == {}


# ---------------------------------------------------------------------- caches


def test_a_cache_comes_back_whole_and_alone(hub: Hub, tmp_path: Path) -> None:
    """Of a repository that holds more, only what the manifest names is downloaded."""
    cache = build(tmp_path / "cache", make_plan(), make_vectors())
    assert main(["push", str(cache.path), "someone/vectors", "--quiet", "--license", "mit"]) == 1
    assert main(["push", str(cache.path), "someone/vectors", "--quiet"]) == 0
    repository = hub.dataset("someone/vectors")
    pickled = {"evil.bin": b"pickle", "more.safetensors": b"more"}
    repository.commit({**repository.files(), **pickled}, "main")
    hub.asked.clear()
    loaded = TargetCache.from_hub("someone/vectors", expected=FINGERPRINT)
    assert torch.equal(loaded.read(0, 10), cache.read(0, 10)) and list(loaded.ids) == list(cache.ids)
    assert loaded.manifest == cache.manifest and loaded.verify() is None
    asked = {one.rsplit("/", 1)[-1] for one in hub.asked if "/resolve/" in one}
    assert asked == {"manifest.json", *(entry.file for entry in cache.manifest.files)}
    with pytest.raises(CacheMismatchError, match="prompt"):
        TargetCache.from_hub("someone/vectors", expected=replace(FINGERPRINT, prompt="q: "))


def test_a_push_that_was_cut_off_is_finished_by_the_same_call(hub: Hub, tmp_path: Path) -> None:
    cache = build(tmp_path / "cache", make_plan(), make_vectors())
    hub.uploads_left = 2
    with pytest.raises(HubError, match="push to someone/vectors"):
        cache.push_to_hub("someone/vectors", options=QUIET)
    first = list(hub.received)
    assert len(first) == 2 and set(hub.dataset("someone/vectors").files()) == {".gitattributes"}
    with pytest.raises(HubError):
        TargetCache.from_hub("someone/vectors")
    hub.uploads_left = None
    cache.push_to_hub("someone/vectors", options=QUIET)
    assert len(hub.received) == len(set(hub.received)) == len(cache.manifest.files)
    assert len(TargetCache.from_hub("someone/vectors")) == 10


def test_what_xet_does_not_bring_goes_the_plain_way(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in refuses Xet: the client does not fall back by itself, nothing is committed, and the cure works."""
    pytest.importorskip("hf_xet")
    model = make_corrector()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match="HF_HUB_DISABLE_XET=1"):
        model.push_to_hub("someone/a-to-b", options=QUIET)
    assert "GET /api/models/someone/a-to-b/xet-write-token/main" in hub.asked
    assert hub.received == hub.messages == [] and set(hub.model("someone/a-to-b").files()) == {".gitattributes"}
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    model.push_to_hub("someone/a-to-b", options=QUIET)
    # A repository that offers nothing by Xet is read the plain way, by a client that has it.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    vectors = make_vectors()
    assert torch.equal(CorrectorModel.from_pretrained("someone/a-to-b").correct(vectors), model.correct(vectors))


def test_of_an_edited_cache_only_what_the_edit_wrote_is_sent(hub: Hub, tmp_path: Path) -> None:
    cache = build(tmp_path / "cache", make_plan(), make_vectors())
    cache.push_to_hub("someone/vectors", options=QUIET)
    commit = hub.dataset("someone/vectors").refs["main"]
    hub.received.clear()
    edited = edit_arrays(cache.path, delete=["target-3"])
    with pytest.raises(CacheMismatchError, match="Open it again"):
        cache.push_to_hub("someone/vectors", options=QUIET)
    edited.push_to_hub("someone/vectors", options=QUIET)
    kept = {entry.file for entry in cache.manifest.files} & {entry.file for entry in edited.manifest.files}
    assert len(hub.received) == len(edited.manifest.files) - len(kept) and kept
    named = {"manifest.json", *(entry.file for entry in edited.manifest.files)}
    assert set(hub.dataset("someone/vectors").files()) == named | {".gitattributes", "README.md"}
    assert "target-3" not in list(TargetCache.from_hub("someone/vectors").ids)
    assert len(TargetCache.from_hub("someone/vectors", revision=commit)) == 10


def test_a_damaged_or_misleading_cache_of_the_hub_is_refused(hub: Hub, tmp_path: Path) -> None:
    cache = build(tmp_path / "cache", make_plan(), make_vectors())
    cache.push_to_hub("someone/vectors", options=QUIET)
    repository = hub.dataset("someone/vectors")
    good, shard = repository.files(), cache.manifest.shards[1].file
    repository.commit({**good, shard: good[shard][:-1] + b"\0"}, "main")
    with pytest.raises(CacheCorruptedError, match=re.escape(shard)):
        TargetCache.from_hub("someone/vectors")
    for bad in (good["manifest.json"].replace(b"emb-00001", b"../../xx1"), b'{"rows": 1, "rows": 2}'):
        repository.commit({**good, "manifest.json": bad}, "main")
        hub.asked.clear()
        with pytest.raises(CacheCorruptedError):
            TargetCache.from_hub("someone/vectors")
        assert not any("safetensors" in one for one in hub.asked)
    repository.commit({name: data for name, data in good.items() if name != shard}, "main")
    with pytest.raises(CacheCorruptedError, match=re.escape(shard)):
        TargetCache.from_hub("someone/vectors")


# ---------------------------------------------------------------------- dual encoders and trainers


def test_a_dual_encoder_comes_back_with_both_tokenizers(tiny_encoder: str, hub: Hub, tmp_path: Path) -> None:
    other = save_bert(tmp_path / "other", seed=5, lowercase=False)
    model = DualEncoderModel.from_encoder(tiny_encoder, other, target_prompt="t: ", projection_dim=6)
    model.push_to_hub("someone/encoder", options=QUIET)
    loaded = DualEncoderModel.from_pretrained("someone/encoder")
    texts = ["List all Files", "sort lines"]
    assert torch.equal(loaded.encode_query(texts), model.encode_query(texts))
    assert torch.equal(loaded.encode_target(texts), model.encode_target(texts))
    assert loaded.fingerprint("target").digest == model.fingerprint("target").digest
    assert "target_tokenizer/tokenizer.json" in hub.model("someone/encoder").files()


@pytest.fixture(scope="module")
def data() -> RetrievalData:
    rows = [{"anchor": f"find the file {n} of ten", "positive": f"the file is number {n} here"} for n in range(60)]
    return from_pairs(Dataset.from_list(rows), dev_fraction=0.2, test_fraction=0.2)


def arguments(out: Path, **changes: object) -> DualEncoderTrainingArguments:
    settings: dict[str, object] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "corrector_warmup_steps": 1, "corrector_update_steps": 1,
    }  # fmt: skip
    return DualEncoderTrainingArguments(str(out), **{**settings, **changes})


def test_trained_pushed_and_loaded_in_a_fresh_process_it_makes_the_same_vectors(
    tiny_encoder: str, data: RetrievalData, hub: Hub, tmp_path: Path
) -> None:
    args = arguments(tmp_path / "out", push_to_hub=True, hub_model_id="someone/trained", hub_private_repo=True)
    trainer = DualEncoderTrainer(
        DualEncoderModel.from_encoder(tiny_encoder), args, train_dataset=data.train, targets=data.corpus
    )
    assert hub.model("someone/trained").private, "a push that cannot work is known before training"
    trainer.card_facts = CardFacts(license="apache-2.0")
    trainer.train()
    trainer.save_model()
    files = hub.model("someone/trained").files()
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "corrector/config.json", "corrector/model.safetensors", f"corrector/{FITTED_FILE}",
    }  # fmt: skip
    assert b"license: apache-2.0" in files["README.md"] and b'from_pretrained("someone/trained")' in files["README.md"]
    for block in re.findall(r"```python\n(.*?)```", files["README.md"].decode(), flags=re.DOTALL):
        exec(compile(block, "README.md", "exec"), {})
    corrector_alone = FittedCorrector.load(tmp_path / "out" / "corrector")
    assert corrector_alone.leads_to.digest == trainer.encoder.fingerprint("target").digest
    for name, content in files.items():
        assert str(tmp_path).encode() not in content and str(Path(tiny_encoder).parent).encode() not in content, name
    model, cache = trainer.encoder, trainer.live_cache.cache
    stale = cache.read(0, 20)
    torch.save(  # what the other process is to find, by its own arithmetic
        {"stale": stale, "texts": data.corpus["text"][:5], "stale_encoder": cache.fingerprint.to_dict()},
        tmp_path / "given.pt",
    )
    in_a_fresh_process(
        "import torch\n"
        "from hf_corrector import CorrectorModel, DualEncoderModel, EncoderFingerprint\n"
        "given = torch.load('given.pt')\n"
        "model = DualEncoderModel.from_pretrained('someone/trained')\n"
        "stale = EncoderFingerprint.from_dict(given['stale_encoder'])\n"
        "alone = CorrectorModel.from_pretrained('someone/trained', subfolder='corrector', expected_stale=stale,\n"
        "    expected_fresh=model.fingerprint('target'))\n"
        "torch.save([model.encode_query(given['texts']), model.encode_target(given['texts']),\n"
        "    model.corrector.correct(given['stale']), alone.correct(given['stale'])], 'found.pt')\n",
        tmp_path,
    )
    texts, found = data.corpus["text"][:5], torch.load(tmp_path / "found.pt")
    assert torch.equal(found[0], model.encode_query(texts)) and torch.equal(found[1], model.encode_target(texts))
    assert torch.equal(found[2], model.corrector.correct(stale)) and torch.equal(found[3], found[2])
    assert not torch.equal(found[2], stale)


def test_a_trainer_pushes_when_asked_and_refuses_what_would_send_the_run(
    tiny_encoder: str, data: RetrievalData, hub: Hub, tmp_path: Path
) -> None:
    trainer = DualEncoderTrainer(
        DualEncoderModel.from_encoder(tiny_encoder), arguments(tmp_path / "my-run"), train_dataset=data.train,
        targets=data.corpus,
    )  # fmt: skip
    trainer.push_to_hub("By hand", revision="dev")
    assert hub.messages == ["By hand"] and set(hub.model("someone/my-run").refs) == {"main", "dev"}
    assert "model.safetensors" in hub.model("someone/my-run").files("dev")
    with pytest.raises(ConfigurationError, match="blocking=True"):
        trainer.push_to_hub(blocking=False)
    with pytest.raises(ConfigurationError, match="hub_strategy"):
        arguments(tmp_path / "other", push_to_hub=True, hub_strategy="every_save")


def test_the_train_command_pushes_the_model_and_then_its_judgement(tiny_encoder: str, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "words"
    (folder / "qrels").mkdir(parents=True)
    for name, text in (("corpus", "list the files number {}"), ("queries", "how to list {}")):
        rows = [{"_id": f"{name[0]}{n}", "text": text.format(n)} for n in range(40)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, numbers in (("train", range(25)), ("test", range(25, 40))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\tc{n}\t1" for n in numbers)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    command = ["train", "--data", str(folder), "--model", tiny_encoder, "--max_steps", "3", "--report_to", "none"]
    command += ["--per_device_train_batch_size", "4", "--corrector_warmup_steps", "1", "--disable_tqdm", "true"]
    pushing = ["--push_to_hub", "true", "--hub_model_id", "someone/words"]
    assert main([*command, "--output_dir", str(tmp_path / "out"), *pushing]) == 0
    assert hub.messages == ["Model save", "Judgement in the model card"]
    repository = hub.model("someone/words")
    saved, judged = [repository.commits[oid] for oid in list(repository.commits)[-2:]]
    assert {name for name in judged if judged[name] != saved.get(name)} == {"README.md"}
    assert "| stale index |" in judged["README.md"].decode() and "| name | words |" in judged["README.md"].decode()
    assert judged["README.md"].decode() == (tmp_path / "out" / "README.md").read_text().replace(
        "PATH_OR_HUB_ID", "someone/words"
    )
