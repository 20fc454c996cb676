"""Configuration of a corrector: what it maps, by which family, between which spaces."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

KINDS = ("identity", "mean_shift", "affine", "residual_mlp")
CLOSED_FORM_KINDS = ("mean_shift", "affine")
ACTIVATIONS = ("relu", "gelu", "silu")


@strict
class CorrectorConfig(PreTrainedConfig):
    """Describe a corrector h that moves stale target embeddings to where the current encoder would put them.

    Args:
        kind: The family of h. ``"identity"`` returns its input bit for bit; ``"mean_shift"`` adds one vector;
            ``"affine"`` is a linear map with offset, solved in closed form; ``"residual_mlp"`` is a one-hidden-layer
            network around a skip connection, trained by gradient descent.
        input_dim: Size of a stale vector.
        output_dim: Size of a corrected vector; ``input_dim`` if not given.
        hidden_dim: Width of the hidden layer of ``"residual_mlp"``; twice ``input_dim`` if not given.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        normalize_output: Whether corrected vectors are scaled to unit length, as the encoder's are.
        fit_summary: Facts of the last fit (pairs, ridge, errors), kept for reports.
    """

    model_type = "target-corrector"

    kind: str = "identity"
    input_dim: int = 384
    output_dim: int | None = None
    hidden_dim: int | None = None
    activation: str = "gelu"
    normalize_output: bool = True
    fit_summary: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the sizes that follow from others and refuse values out of range (ValueError)."""
        if self.kind not in KINDS:
            raise ValueError(f"CorrectorConfig.kind: expected one of {KINDS}; got {self.kind!r}. Choose one of them.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"CorrectorConfig.activation: expected one of {ACTIVATIONS}; got {self.activation!r}. "
                "Choose one of them."
            )
        self.output_dim = self.input_dim if self.output_dim is None else self.output_dim
        self.hidden_dim = 2 * self.input_dim if self.hidden_dim is None else self.hidden_dim
        if min(self.input_dim, self.output_dim, self.hidden_dim) < 1:
            raise ValueError(
                "CorrectorConfig: expected sizes of at least 1; got "
                f"{self.input_dim} -> {self.hidden_dim} -> {self.output_dim}. Give the encoders' embedding sizes."
            )
        if self.kind in ("identity", "mean_shift") and self.input_dim != self.output_dim:
            raise ValueError(
                f"CorrectorConfig: expected equal sizes for kind {self.kind!r}; got {self.input_dim} and "
                f"{self.output_dim}. Use 'affine' or 'residual_mlp' between spaces of different size."
            )
        super().__post_init__(**kwargs)
