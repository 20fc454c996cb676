"""What a configuration of somebody else's may not ask transformers for: code from the Hub, or weights in pickles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from hf_corrector.errors import InputError

# Under any of these, transformers (5.23) takes from a file how attention is computed. A name with a slash is a kernel:
# compiled code and Python, fetched from that repository of the Hub and run when the model is built.
_ATTENTION = frozenset({"attn_implementation", "_attn_implementation", "_attn_implementation_internal"})
# A file named here is opened instead of model.safetensors, even where pickles are ruled out otherwise.
_WEIGHTS = "transformers_weights"
_SAFE_ENDINGS = (".safetensors", ".safetensors.index.json")


def check_config(config: PreTrainedConfig, where: str) -> None:
    """Refuse a configuration that leads to code or pickles, itself or by one inside of it, before a model is built.

    Args:
        config: As transformers read it.
        where: What to call it in errors.

    Raises:
        InputError: Naming the field.
    """
    for name, value in _entries(config):
        if name in _ATTENTION and "/" in str(value):
            raise InputError(
                where, expected="a way to compute attention that comes with transformers",
                got=f"a kernel of the Hub, {name}={value!r}",
                cure="Take the field out of config.json; if you trust that kernel, choose it with "
                "set_attn_implementation on the loaded model.",
            )  # fmt: skip
        if name == _WEIGHTS and value is not None and not str(value).endswith(_SAFE_ENDINGS):
            raise InputError(
                where, expected=f"{_WEIGHTS} in safetensors", got=repr(value), cure="Take the field out of config.json."
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and values of a configuration and of all that are inside of it."""
    if isinstance(value, PreTrainedConfig):
        # Asked for as transformers asks, as a file may also give fields other names (attribute_map).
        yield "attn_implementation", value._attn_implementation
        yield _WEIGHTS, getattr(value, _WEIGHTS, None)
        value = vars(value)
    if isinstance(value, dict):
        for name, one in value.items():
            yield str(name), one
            yield from _entries(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _entries(one)
