"""A corrector as a chain of dense layers, which is all that other packages' modules can be relied on to have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.modeling_corrector import CorrectorModel


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """One layer, φ(Wx + b).

    Attributes:
        weight: W, ``(out, in)`` float32.
        bias: b, ``(out,)`` float32.
        activation: φ: ``"relu"``, ``"gelu"``, ``"silu"``, or ``"identity"``.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    activation: str = "identity"


@torch.no_grad()
def dense_layers(corrector: CorrectorModel) -> list[DenseLayer]:
    """Return the layers that make what a corrector makes before it normalises; none for the identity.

    A network's skip connection is carried through its activation by φ(x) − φ(−x) = x, which holds for ReLU, GELU and
    SiLU: rows [I; −I; W₁], then columns [I, −I, W₂].

    Raises:
        ConfigurationError: If no such layers make exactly the same vectors.
    """
    config = corrector.config
    if config.side is not None or config.kind == "kernel":
        what = f"kind {config.kind!r}" + ("" if config.side is None else f" with side features {config.side!r}")
        raise ConfigurationError(
            "export of a corrector", expected="one that dense layers can repeat exactly", got=what,
            cure="Fit another without side features, of kind 'affine' or 'residual_mlp'; or correct vectors with "
            "CorrectorModel.correct(), or without torch with save_for_numpy().",
        )  # fmt: skip
    if config.kind == "identity":
        return []
    found = corrector.affine_map()
    if found is not None:
        return [DenseLayer(found[0].float().cpu(), found[1].float().cpu())]
    return _network(corrector)


def _network(corrector: CorrectorModel) -> list[DenseLayer]:
    config, hidden, output = corrector.config, corrector.hidden, corrector.output
    dim_in, dim_out = config.input_dim, int(config.output_dim or config.input_dim)
    into, onward = torch.eye(dim_in), torch.eye(dim_in)
    if dim_in != dim_out:
        skip = corrector.skip.cpu()
        # Where the smaller of both sizes passes through the activation.
        into, onward = (skip, torch.eye(dim_out)) if dim_out < dim_in else (into, skip)
    first = torch.cat([into, -into, hidden.weight.cpu()])
    bias = torch.cat([torch.zeros(2 * len(into)), hidden.bias.cpu()])
    second = torch.cat([onward, -onward, output.weight.cpu()], dim=1)
    return [DenseLayer(first, bias, str(config.activation)), DenseLayer(second, output.bias.detach().cpu().clone())]
