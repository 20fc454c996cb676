"""Folders that try to make a reader run code, read elsewhere or believe what was not written.

Each attack takes a folder with a good model and changes it. Whatever could run writes a sentinel: a file that must
never appear.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Attack:
    """One way to change a folder.

    Attributes:
        name: What it is called.
        change: Changes the folder; its second argument is the sentinel.
        refused: What the error says; None where the model loads as if nothing had been there.
        in_a_folder: Whether it is one of folders alone, which a repository cannot hold.
    """

    name: str
    change: Callable[[Path, Path], None]
    refused: str | None
    in_a_folder: bool = False


class _Writes:
    """Unpickled, it writes the sentinel."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[object, ...]:
        return exec, (f"open({str(self.sentinel)!r}, 'w').close()",)


def pickled(sentinel: Path) -> bytes:
    return pickle.dumps(_Writes(sentinel))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def header_of(data: bytes) -> tuple[dict[str, object], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: str, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header.encode())) + header.encode() + rest


def pickles_beside(folder: Path, sentinel: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "adapter_model.bin", "optimizer.pt", "tokenizer.pkl"):
        (folder / name).write_bytes(pickled(sentinel))


def pickle_instead(folder: Path, sentinel: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(sentinel))


def pickle_by_another_name(folder: Path, sentinel: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickled(sentinel))


def code_beside(folder: Path, sentinel: Path) -> None:
    (folder / "evil.py").write_text(
        f"open({str(sentinel)!r}, 'w').close()\nclass EvilConfig: pass\nclass EvilModel: pass\n"
    )
    edit(folder / "config.json", auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"})


def code_for_the_tokenizer(folder: Path, sentinel: Path) -> None:
    code_beside(folder, sentinel)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({
        **(json.loads(path.read_text()) if path.exists() else {}),
        "auto_map": {"AutoTokenizer": ["evil.EvilModel", "evil.EvilModel"]},
    }))  # fmt: skip


def adapter_beside(folder: Path, sentinel: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "stranger/other", "target_modules": ["query"]}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.bin").write_bytes(pickled(sentinel))


def code_for_the_reader(folder: Path, sentinel: Path) -> None:
    """Name code for the reader inside of a model, and for its tokenizer."""
    code_beside(folder, sentinel)
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoModelForCausalLM": "evil.EvilModel", "AutoModelForSeq2SeqLM": "evil.EvilModel"}
    edit(folder / "config.json", generator={**config["generator"], "auto_map": mapped})
    (folder / "reader_tokenizer" / "evil.py").write_text((folder / "evil.py").read_text())
    tokenizer = {"AutoTokenizer": ["evil.EvilModel", "evil.EvilModel"]}
    edit(folder / "reader_tokenizer" / "tokenizer_config.json", auto_map=tokenizer)


def attention_from_the_hub(folder: Path, sentinel: Path) -> None:
    """Name a kernel: compiled code that transformers fetches from there and runs."""
    edit(folder / "config.json", attn_implementation="stranger/kernel")


def attention_by_another_name(folder: Path, sentinel: Path) -> None:
    """Let a file say that one field is another."""
    edit(
        folder / "config.json", attribute_map={"harmless": "_attn_implementation_internal"}, harmless="stranger/kernel"
    )


def attention_of_a_part(folder: Path, sentinel: Path) -> None:
    """Name a kernel for a model inside of the model, which the configuration around it overrides."""
    config = json.loads((folder / "config.json").read_text())
    part = "generator" if "generator" in config else "encoder"
    edit(folder / "config.json", **{part: {**config[part], "_attn_implementation": "stranger/kernel@main:attend"}})


def pickle_by_the_configuration(folder: Path, sentinel: Path) -> None:
    """Name the one pickle that transformers opens where pickles are ruled out."""
    (folder / "adapter_model.bin").write_bytes(pickled(sentinel))
    edit(folder / "config.json", transformers_weights="adapter_model.bin")


def key_twice(folder: Path, sentinel: Path) -> None:
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "model_type": "bert"}')


def not_a_number(folder: Path, sentinel: Path) -> None:
    text = (folder / "config.json").read_text().rstrip()
    (folder / "config.json").write_text(text[:-1] + ', "scale": NaN}')


def deep_json(folder: Path, sentinel: Path) -> None:
    (folder / "config.json").write_text("[" * 200_000)


def tensor_twice(folder: Path, sentinel: Path) -> None:
    header, rest = header_of((folder / WEIGHTS).read_bytes())
    name = next(one for one in header if one != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    (folder / WEIGHTS).write_bytes(with_header(text, rest))


def huge_header(folder: Path, sentinel: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + data[8:])


def overlapping_tensors(folder: Path, sentinel: Path) -> None:
    header, rest = header_of((folder / WEIGHTS).read_bytes())
    for name, entry in header.items():
        if name != "__metadata__" and isinstance(entry, dict):
            start, stop = entry["data_offsets"]
            entry["data_offsets"] = [0, stop - start]
    (folder / WEIGHTS).write_bytes(with_header(json.dumps(header), rest))


def hidden_bytes(folder: Path, sentinel: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + pickled(sentinel))


def _index(folder: Path, shard: str) -> None:
    header, _ = header_of((folder / WEIGHTS).read_bytes())
    names = [name for name in header if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, shard)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def parts_elsewhere(folder: Path, sentinel: Path) -> None:
    _index(folder, "../secret/model.safetensors")
    (folder / WEIGHTS).unlink()


def pickled_parts(folder: Path, sentinel: Path) -> None:
    _index(folder, "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickled(sentinel))


def link_out(folder: Path, sentinel: Path) -> None:
    secret = folder.parent / "secret.safetensors"
    (folder / WEIGHTS).rename(secret)
    (folder / WEIGHTS).symlink_to(secret)


def config_linked_out(folder: Path, sentinel: Path) -> None:
    secret = folder.parent / "secret.json"
    (folder / "config.json").rename(secret)
    (folder / "config.json").symlink_to(f"../{secret.name}")


ON_ANY_MODEL = [
    Attack("pickles beside", pickles_beside, None),
    Attack("pickle instead", pickle_instead, "model.safetensors"),
    Attack("pickle by another name", pickle_by_another_name, "header"),
    Attack("code beside", code_beside, None),
    Attack("adapter beside", adapter_beside, "adapter"),
    Attack("attention from the Hub", attention_from_the_hub, "a kernel of the Hub"),
    Attack("attention by another name", attention_by_another_name, "a kernel of the Hub"),
    Attack("pickle by the configuration", pickle_by_the_configuration, "transformers_weights in safetensors"),
    Attack("key twice", key_twice, "duplicate keys"),
    Attack("not a number", not_a_number, "NaN"),
    Attack("deep JSON", deep_json, "JSON"),
    Attack("tensor twice", tensor_twice, "duplicate keys"),
    Attack("huge header", huge_header, "header of at most"),
    Attack("overlapping tensors", overlapping_tensors, "tile"),
    Attack("hidden bytes", hidden_bytes, "tile"),
    Attack("link out", link_out, "a link to", in_a_folder=True),
    Attack("config linked out", config_linked_out, "a link to", in_a_folder=True),
]
# Of models that may have a tokenizer, or parts.
ON_LARGER_MODELS = [
    Attack("code for the tokenizer", code_for_the_tokenizer, None),
    Attack("attention of a part", attention_of_a_part, None),
    Attack("parts elsewhere", parts_elsewhere, "plain file names"),
    Attack("pickled parts", pickled_parts, r"\*.safetensors"),
]
ON_A_READER = [Attack("code for the reader", code_for_the_reader, None)]
