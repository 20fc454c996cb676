"""An encoder and a corrector behind it as one sentence-transformers model, of that package's own modules alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from torch import nn

from hf_corrector._extras import need_sentence_transformers
from hf_corrector.errors import ConfigurationError
from hf_corrector.exports.dense_layers import DenseLayer, dense_layers
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.sentence_transformers_export import (
    check_new_folder,
    dense,
    prompts_of,
    routed,
    save_modules,
    stock_modules,
)
from hf_corrector.models.sentence_transformers_format import read_repository_json, role_prompts
from hf_corrector.models.text_encoding import Role

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Encoder: TypeAlias = Union[str, Path, DualEncoderModel, "SentenceTransformer"]
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "identity": nn.Identity}


def save_as_sentence_transformer(
    corrector: CorrectorModel,
    path: str | Path,
    base_model: Encoder,
    *,
    query_model: Encoder | None = None,
    document_model: Encoder | None = None,
) -> Path:
    """Write an encoder with a corrector behind it as a sentence-transformers model that needs no other code.

    Alone, ``SentenceTransformer(path).encode_document(texts)`` makes corrected vectors. With ``query_model``, queries
    go through that one and documents through ``base_model`` and the corrector: an index of corrected vectors grows by
    ``encode_document`` and is searched by ``encode_query``. With ``document_model`` it is the other way round, for a
    corrector that maps new queries to an index left as it is.

    Args:
        corrector: Any without side features, but of kind ``"kernel"``.
        path: A new or empty folder.
        base_model: The encoder whose vectors the corrector moves: a sentence-transformers model, a dual encoder, or
            the folder or Hub id of one.
        query_model: The encoder of queries, where documents are corrected.
        document_model: The encoder of documents, where queries are corrected.

    Returns:
        The folder.

    Raises:
        ConfigurationError: If the corrector cannot be repeated exactly, sizes do not fit, both other models are given,
            or the folder holds something.
        MissingDependencyError: If sentence-transformers is not installed.
    """
    layers = dense_layers(corrector)
    need_sentence_transformers("save_as_sentence_transformer")
    check_new_folder(path)
    if query_model is not None and document_model is not None:
        raise ConfigurationError(
            "save_as_sentence_transformer", expected="query_model or document_model", got="both",
            cure="The corrector is behind base_model, which encodes what the other one does not.",
        )  # fmt: skip
    role: Role = "target" if document_model is None else "query"
    base = _route(base_model, role)
    _check_size(base, int(corrector.config.input_dim), what="the corrector reads")
    corrected = replace(base, modules=[*base.modules, *_modules_of(corrector, layers)])
    other = query_model if document_model is None else document_model
    if other is None:
        return _save(corrected.modules, path, prompts=base.prompts, corrector=corrector)
    beside = _route(other, "query" if role == "target" else "target")
    _check_size(beside, int(corrector.config.output_dim or 0), what="the corrector makes")
    queries, documents = (beside, corrected) if role == "target" else (corrected, beside)
    prompts = {"query": queries.prompts.get("query", ""), "document": documents.prompts.get("document", "")}
    return _save(routed(queries.modules, documents.modules), path, prompts=prompts, corrector=corrector)


def _save(modules: list[nn.Module], path: str | Path, *, prompts: dict[str, str], corrector: CorrectorModel) -> Path:
    return save_modules(modules, path, prompts=prompts, normalized=bool(corrector.config.normalize_output))


def _modules_of(corrector: CorrectorModel, layers: list[DenseLayer]) -> list[nn.Module]:
    """Return what stands behind the encoder; nothing for the identity, which does not normalise either."""
    from sentence_transformers.sentence_transformer.modules import Normalize

    modules = [dense(one.weight, one.bias, _ACTIVATIONS[one.activation]()) for one in layers]
    return [*modules, Normalize()] if layers and corrector.config.normalize_output else modules


@dataclass(frozen=True, eq=False)
class _Route:
    """Modules that make the vectors of one role.

    Attributes:
        name: What to call the encoder.
        role: Which texts they are for.
        modules: Applied one after the other.
        prompts: Prompts by name.
    """

    name: str
    role: Role
    modules: list[nn.Module]
    prompts: dict[str, str]

    def size(self) -> int:
        """Return the size of a vector, by making one."""
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(modules=self.modules, device="cpu")
        return len(model.encode(["size"], task="query" if self.role == "query" else "document")[0])


def _route(encoder: Encoder, role: Role) -> _Route:
    """Take the modules of one role out of any encoder, in float32."""
    from sentence_transformers import SentenceTransformer

    if isinstance(encoder, str | Path) and _is_dual_encoder(str(encoder)):
        encoder = DualEncoderModel.from_pretrained(str(encoder))
    if isinstance(encoder, DualEncoderModel):
        return _Route(str(encoder.config.name_or_path), role, stock_modules(encoder, role), prompts_of(encoder))
    name = str(encoder) if isinstance(encoder, str | Path) else "the encoder"
    # A copy, as it is moved and brought to another type here.
    given = SentenceTransformer(name, device="cpu") if isinstance(encoder, str | Path) else copy.deepcopy(encoder)
    if given.truncate_dim is not None:
        raise ConfigurationError(
            name, expected="a model of whole vectors", got=f"one that cuts them to {given.truncate_dim} numbers",
            cure="Fit a corrector to whole vectors, and load the model without truncate_dim.",
        )  # fmt: skip
    # Layers behind an encoder in half precision would be of another type than what it makes.
    modules = list(given.float().children())
    known = {key: value for key, value in given.prompts.items() if value}
    prompts = role_prompts({"prompts": known, "default_prompt_name": given.default_prompt_name})
    by_role = {"query": prompts["query_prompt"], "document": prompts["target_prompt"]}
    return _Route(name, role, _unrouted(modules, role), {**known, **by_role})


def _unrouted(modules: list[nn.Module], role: Role) -> list[nn.Module]:
    """Replace a router at the front by the modules of one role."""
    from sentence_transformers.sentence_transformer.modules import Router

    if not isinstance(modules[0], Router):
        return modules
    name = "query" if role == "query" else "document"
    if name not in modules[0].sub_modules:
        raise ConfigurationError(
            "save_as_sentence_transformer", expected=f"a route called {name!r}", got=str(list(modules[0].sub_modules)),
            cure="Give the encoder of that route by itself.",
        )  # fmt: skip
    return [*modules[0].sub_modules[name].children(), *modules[1:]]


def _is_dual_encoder(name: str) -> bool:
    config = read_repository_json(name, "config.json", None)
    return config is not None and config.get("model_type") == DualEncoderConfig.model_type


def _check_size(route: _Route, wanted: int, *, what: str) -> None:
    found = route.size()
    if found != wanted:
        raise ConfigurationError(
            route.name, expected=f"vectors of size {wanted}, which {what}", got=f"size {found}",
            cure="Name the encoder the corrector was fitted with.",
        )  # fmt: skip
