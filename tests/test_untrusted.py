"""Models from strangers: what could run never runs, and what could mislead is refused, in folders and from the Hub."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks import (
    ON_A_READER,
    ON_ANY_MODEL,
    ON_LARGER_MODELS,
    Attack,
    adapter_beside,
    attention_by_another_name,
    attention_from_the_hub,
    edit,
    pickle_by_the_configuration,
    pickled,
)
from hub_stand_in import Hub, Repository
from model_helpers import TEXTS
from peft import LoraConfig, PeftModel, get_peft_model
from rag_helpers import generator_of, rag_of
from transformers import AutoConfig, AutoModel

from hf_corrector._untrusted import check_files, inside
from hf_corrector.errors import ConfigurationError, InputError
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.models.adapters import dual_encoder_of
from hf_corrector.models.hub_files import CORRECTOR_FILES
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.default_reader import default_reader
from hf_corrector.rag.storage import load_reader


@pytest.fixture
def corrector(tmp_path: Path) -> Path:
    """Folder of a good corrector."""
    CorrectorModel(CorrectorConfig(kind="affine", input_dim=4)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def saved_encoder(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    DualEncoderModel.from_encoder(tiny_encoder).save_pretrained(str(folder))
    return folder


def as_repository(hub: Hub, folder: Path, name: str) -> str:
    """Let the Hub hold a folder as it is, as someone else may have put it there."""
    repository = hub.repositories[f"models/{name}"] = Repository()
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repository.commit(files, "main")
    return name


def check(
    attack: Attack, load: type[CorrectorModel | DualEncoderModel | RetrievalAugmentedModel], name: str, sentinel: Path
) -> None:
    if attack.refused is None:
        assert isinstance(load.from_pretrained(name), load)
    else:
        with pytest.raises((ValueError, OSError), match=attack.refused):
            load.from_pretrained(name)
    assert not sentinel.exists()


@pytest.mark.parametrize("attack", ON_ANY_MODEL, ids=lambda attack: attack.name)
def test_no_folder_of_a_corrector_gets_through(attack: Attack, corrector: Path, tmp_path: Path) -> None:
    attack.change(corrector, tmp_path / "sentinel")
    check(attack, CorrectorModel, str(corrector), tmp_path / "sentinel")


@pytest.mark.parametrize("attack", [one for one in ON_ANY_MODEL if not one.in_a_folder], ids=lambda attack: attack.name)
def test_no_repository_of_a_corrector_gets_through(attack: Attack, corrector: Path, tmp_path: Path, hub: Hub) -> None:
    attack.change(corrector, tmp_path / "sentinel")
    name = as_repository(hub, corrector, f"stranger/{attack.name.replace(' ', '-')}")
    check(attack, CorrectorModel, name, tmp_path / "sentinel")
    asked = {one.rsplit("/", 1)[-1] for one in hub.asked if "/resolve/" in one}
    # transformers may ask whether there is an adapter; what it would open is asked for by nobody.
    assert not any(name.endswith((".bin", ".py", ".pt", ".pkl")) for name in asked)


@pytest.mark.parametrize("attack", [*ON_ANY_MODEL[:8], *ON_LARGER_MODELS], ids=lambda attack: attack.name)
def test_no_folder_of_a_dual_encoder_gets_through(attack: Attack, saved_encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_encoder, tmp_path / "model"))
    attack.change(folder, tmp_path / "sentinel")
    check(attack, DualEncoderModel, str(folder), tmp_path / "sentinel")


@pytest.fixture(scope="module")
def saved_reader(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    rag_of(tiny_encoder, "t5").save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    "attack", [*ON_ANY_MODEL[:8], *ON_LARGER_MODELS, *ON_A_READER], ids=lambda attack: attack.name
)  # fmt: skip
def test_nothing_of_a_retriever_with_its_reader_gets_through(
    attack: Attack, saved_reader: Path, tmp_path: Path, hub: Hub
) -> None:
    folder = Path(shutil.copytree(saved_reader, tmp_path / "model"))
    attack.change(folder, tmp_path / "sentinel")
    name = as_repository(hub, folder, f"stranger/{attack.name.replace(' ', '-')}")
    for one in (str(folder), name):
        check(attack, RetrievalAugmentedModel, one, tmp_path / "sentinel")
    asked = {one.rsplit("/", 1)[-1] for one in hub.asked if "/resolve/" in one}
    assert not any(name.endswith((".bin", ".py", ".pt", ".pkl")) for name in asked)


def test_the_corrector_inside_of_a_dual_encoder_is_looked_at_too(saved_encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_encoder, tmp_path / "model"))
    (folder / "corrector").mkdir()
    (folder / "corrector" / "config.json").write_text('{"kind": "affine", "kind": "identity"}')
    with pytest.raises(InputError, match=r"corrector/config.json.*duplicate keys"):
        DualEncoderModel.from_pretrained(str(folder))


@pytest.mark.parametrize(
    ("load", "attack"),
    [
        *((CorrectorModel, attack) for attack in ON_ANY_MODEL[:8]),
        *((DualEncoderModel, attack) for attack in [*ON_ANY_MODEL[:8], *ON_LARGER_MODELS]),
        *((RetrievalAugmentedModel, attack) for attack in [*ON_ANY_MODEL[:8], *ON_A_READER]),
    ],
)
def test_nothing_of_a_model_in_a_subfolder_gets_through(
    load: type[CorrectorModel | DualEncoderModel | RetrievalAugmentedModel], attack: Attack, corrector: Path,
    saved_encoder: Path, saved_reader: Path, tmp_path: Path, hub: Hub,
) -> None:  # fmt: skip
    good = {CorrectorModel: corrector, DualEncoderModel: saved_encoder, RetrievalAugmentedModel: saved_reader}[load]
    folder = Path(shutil.copytree(good, tmp_path / "models" / "one"))
    attack.change(folder, tmp_path / "sentinel")
    for name in (str(tmp_path / "models"), as_repository(hub, tmp_path / "models", "stranger/models")):
        if attack.refused is None:
            assert isinstance(load.from_pretrained(name, subfolder="one"), load)
        else:
            with pytest.raises((ValueError, OSError), match=attack.refused):
                load.from_pretrained(name, subfolder="one")
    assert not (tmp_path / "sentinel").exists()


def test_models_in_subfolders_are_loaded_whole(saved_encoder: Path, saved_reader: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_encoder, tmp_path / "encoder")
    shutil.copytree(saved_reader, tmp_path / "reader")
    # Of a model at the root, which is not the one that is loaded.
    adapter_beside(tmp_path, tmp_path / "sentinel")
    encoder = DualEncoderModel.from_pretrained(str(tmp_path), subfolder="encoder")
    wanted = DualEncoderModel.from_pretrained(str(saved_encoder))
    assert torch.equal(encoder.encode_query(TEXTS), wanted.encode_query(TEXTS))
    reader = RetrievalAugmentedModel.from_pretrained(str(tmp_path), subfolder="reader")
    assert torch.equal(reader.retriever.encode_target(TEXTS), wanted.encode_target(TEXTS))
    assert reader.reader_tokenizer is not None and not (tmp_path / "sentinel").exists()


def test_an_adapter_and_the_model_under_it_may_lie_in_subfolders(saved_encoder: Path, tmp_path: Path, hub: Hub) -> None:
    shutil.copytree(saved_encoder, tmp_path / "models" / "base")
    base = DualEncoderModel.from_pretrained(str(tmp_path / "models"), subfolder="base")
    lora = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    adapted = dual_encoder_of(get_peft_model(base, lora))
    adapted.save_pretrained(str(tmp_path / "models" / "of_it"))
    for name in (str(tmp_path / "models"), as_repository(hub, tmp_path / "models", "someone/models")):
        loaded = DualEncoderModel.from_pretrained(name, subfolder="of_it")
        assert torch.equal(loaded.encode_query(TEXTS), adapted.encode_query(TEXTS))


def test_an_adapter_in_a_pickle_is_refused(saved_encoder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved_encoder, tmp_path / "model"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(pickled(tmp_path / "sentinel"))
    with pytest.raises(InputError, match=r"adapter_model.safetensors"):
        DualEncoderModel.from_pretrained(str(folder))
    assert not (tmp_path / "sentinel").exists()


def test_a_reader_with_an_adapter_in_a_pickle_is_refused(tmp_path: Path) -> None:
    for part in generator_of("gpt2"):
        part.save_pretrained(tmp_path / "reader")
    adapter_beside(tmp_path / "reader", tmp_path / "sentinel")
    with pytest.raises(ConfigurationError, match="a whole model alone"):
        load_reader(str(tmp_path / "reader"))
    assert not (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (attention_from_the_hub, "a kernel of the Hub"), (attention_by_another_name, "a kernel of the Hub"),
        (pickle_by_the_configuration, "transformers_weights in safetensors"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", ["query", "target", "default reader", "reader"])
def test_no_configuration_of_an_encoder_or_reader_leads_to_code(
    part: str, change: Callable[[Path, Path], None], refused: str, tiny_encoder: str, tmp_path: Path, hub: Hub
) -> None:
    folder = tmp_path / "model"
    if part == "reader":
        for one in generator_of("gpt2"):
            one.save_pretrained(folder)
    else:
        shutil.copytree(tiny_encoder, folder)
    change(folder, tmp_path / "sentinel")
    for name in (str(folder), as_repository(hub, folder, "someone/model")):
        with pytest.raises(InputError, match=refused):
            match part:
                case "query":
                    DualEncoderModel.from_encoder(name)
                case "target":
                    DualEncoderModel.from_encoder(tiny_encoder, name)
                case "default reader":
                    default_reader(name)
                case "reader":
                    load_reader(name)
    assert not (tmp_path / "sentinel").exists() and not [one for one in hub.asked if "stranger" in one]


def test_attention_that_comes_with_transformers_may_be_named(tmp_path: Path) -> None:
    for one in generator_of("gpt2"):
        one.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", attn_implementation="eager")
    assert load_reader(str(tmp_path))[0].config._attn_implementation == "eager"


STRANGE_ADAPTERS: dict[str, tuple[Any, str]] = {
    "a model": ({"peft_type": "SHADOW", "shadow_model": "stranger/pickled"}, "type 'SHADOW'"),
    "another adapter": ({"peft_type": "XLORA", "adapters": {"0": "stranger/pickled"}}, "type 'XLORA'"),
    "a tokenizer": (
        {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x",
         "num_virtual_tokens": 1, "task_type": "SEQ_2_SEQ_LM", "tokenizer_name_or_path": "stranger/pickled"},
        "type 'PROMPT_TUNING'",
    ),
    "a module": (
        {"peft_type": "LORA", "target_modules": ["q", "query"], "megatron_config": {"a": 1}, "megatron_core": "evil"},
        "megatron_config",
    ),
    "nothing that could be": ({"peft_type": ["LORA"]}, r"type \['LORA'\]"),
    "no settings at all": ("LORA", "type None"),
}  # fmt: skip


@pytest.mark.parametrize("named", STRANGE_ADAPTERS)
def test_nothing_is_fetched_or_imported_that_an_adapter_of_a_configuration_names(
    named: str, saved_reader: Path, saved_encoder: Path, tmp_path: Path, hub: Hub
) -> None:
    settings, refused = STRANGE_ADAPTERS[named]
    for part in ("retriever", "generator"):
        folder = Path(shutil.copytree(saved_reader, tmp_path / part))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, f"{part}_adapter": settings}))
        with pytest.raises(InputError, match=rf"adapter of the {part}: .*{refused}"):
            RetrievalAugmentedModel.from_pretrained(str(folder))
    folder = Path(shutil.copytree(saved_encoder, tmp_path / "adapter"))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=rf"adapter_config.json: .*{refused}"):
        DualEncoderModel.from_pretrained(str(folder))
    assert "evil" not in sys.modules and not [one for one in hub.asked if "stranger" in one]


def with_adapter(encoder: str, folder: Path, base: str | None = None) -> Path:
    """Copy an encoder and put a LoRA beside it whose matrices are not zero."""
    tower = AutoModel.from_pretrained(encoder, add_pooling_layer=False)
    adapted = get_peft_model(tower, LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    shutil.copytree(encoder, folder)
    adapted.save_pretrained(folder / "apart")
    for path in (folder / "apart").glob("adapter_*"):
        path.rename(folder / path.name)
    edit(folder / "adapter_config.json", base_model_name_or_path=base)
    return folder


@pytest.mark.parametrize("part", ["query", "target", "reader"])
@pytest.mark.parametrize("named", [*STRANGE_ADAPTERS, "a pickle"])
def test_no_adapter_of_that_kind_is_put_on_an_encoder(
    named: str, part: str, tiny_encoder: str, tmp_path: Path, hub: Hub
) -> None:
    """Which transformers would do unasked with whatever lies beside the weights."""
    folder = with_adapter(tiny_encoder, tmp_path / "encoder")
    if named == "a pickle":
        refused = "adapter_model.safetensors"
        adapter_beside(folder, tmp_path / "sentinel")
        edit(folder / "adapter_config.json", base_model_name_or_path="someone/encoder")
        (folder / "adapter_model.safetensors").unlink()
    else:
        settings, refused = STRANGE_ADAPTERS[named]
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    for name in (str(folder), as_repository(hub, folder, "someone/encoder")):
        with pytest.raises(ConfigurationError, match=rf"adapter_config.json: .*{refused}"):
            match part:
                case "query":
                    DualEncoderModel.from_encoder(name)
                case "target":
                    DualEncoderModel.from_encoder(tiny_encoder, name)
                case "reader":
                    default_reader(name)
    assert not (tmp_path / "sentinel").exists() and not [one for one in hub.asked if one.endswith(".bin")]
    assert "evil" not in sys.modules and not [one for one in hub.asked if "stranger" in one]


def test_an_encoder_with_a_lora_of_its_own_is_loaded_with_it(tiny_encoder: str, tmp_path: Path, hub: Hub) -> None:
    # Of the path where it was trained nobody knows here; what lies beside it is what it is put on.
    folder = with_adapter(tiny_encoder, tmp_path / "encoder", base="stranger/other")
    tower = AutoModel.from_pretrained(tiny_encoder, add_pooling_layer=False)
    wanted = DualEncoderModel.from_encoder(tiny_encoder)
    wanted.encoder = PeftModel.from_pretrained(tower, folder).merge_and_unload()
    vectors = wanted.encode_query(TEXTS)
    hub.asked.clear()  # PEFT looks for the configuration of the model it has been told of
    assert not torch.allclose(vectors, DualEncoderModel.from_encoder(tiny_encoder).encode_query(TEXTS))

    loaded = DualEncoderModel.from_encoder(str(folder))
    torch.testing.assert_close(loaded.encode_query(TEXTS), vectors)
    with pytest.raises(ConfigurationError, match="inside of a tower"):
        loaded.save_pretrained(str(tmp_path / "saved"))
    edit(folder / "adapter_config.json", base_model_name_or_path="someone/encoder")
    of_the_hub = DualEncoderModel.from_encoder(as_repository(hub, folder, "someone/encoder"))
    torch.testing.assert_close(of_the_hub.encode_query(TEXTS), vectors)
    assert not [one for one in hub.asked if "stranger" in one]


def test_no_other_model_is_loaded_than_the_one_that_was_named(tiny_encoder: str, tmp_path: Path, hub: Hub) -> None:
    """Of a repository with an adapter, transformers would take the weights from wherever that says."""
    folder = with_adapter(tiny_encoder, tmp_path / "encoder", base="stranger/other")
    with pytest.raises(ConfigurationError, match="an adapter of someone/encoder itself; got one of 'stranger/other'"):
        DualEncoderModel.from_encoder(as_repository(hub, folder, "someone/encoder"))
    assert not [one for one in hub.asked if "stranger" in one]


def test_a_pickled_tower_is_never_loaded(tiny_encoder: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_encoder, tmp_path / "tower"))
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(tmp_path / "sentinel"))
    with pytest.raises(OSError, match=r"model.safetensors"):
        DualEncoderModel.from_encoder(str(folder))
    assert not (tmp_path / "sentinel").exists()


def test_auto_classes_need_no_code_either(corrector: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(corrector, trust_remote_code=False), CorrectorConfig)
    assert isinstance(AutoModel.from_pretrained(corrector, trust_remote_code=False), CorrectorModel)


def test_links_of_the_local_cache_of_the_hub_are_files(corrector: Path, tmp_path: Path) -> None:
    """A snapshot is full of links into its own repository; one that leads on from there is refused."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in list(corrector.iterdir()):
        path.rename(tmp_path / "models--a--b" / "blobs" / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert check_files(snapshot, CORRECTOR_FILES) == ["config.json", "model.safetensors"]
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match=r"a link to /etc/passwd"):
        check_files(snapshot, CORRECTOR_FILES)


def test_a_linked_folder_is_no_way_out(corrector: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (corrector / "corrector").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="elsewhere"):
        inside(corrector, ("corrector/config.json",))


def test_patterns_reach_no_deeper_than_they_say(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("model-1.safetensors", "deep/model-2.safetensors", "other.json"):
        (tmp_path / name).write_bytes(b"")
    assert inside(tmp_path, ("model*.safetensors",)) == ["model-1.safetensors"]
    assert inside(tmp_path, ("deep/*",)) == ["deep/model-2.safetensors"]


def test_a_good_model_is_loaded_as_it_was(corrector: Path) -> None:
    vectors = torch.randn(3, 4)
    assert CorrectorModel.from_pretrained(str(corrector)).correct(vectors).shape == (3, 4)
