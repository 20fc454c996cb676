"""Configuration of a corrector: what it maps, by which family, between which spaces, and what else it reads."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

KINDS = ("identity", "mean_shift", "procrustes", "low_rank", "affine", "kernel", "residual_mlp")
CLOSED_FORM_KINDS = ("mean_shift", "procrustes", "low_rank", "affine", "kernel")
# These have no map between spaces of different size.
SAME_SIZE_KINDS = ("identity", "mean_shift")
ACTIVATIONS = ("relu", "gelu", "silu")
SIDES = ("tokens", "word_embeddings", "matrix")


@strict
class CorrectorConfig(PreTrainedConfig):
    """Describe a corrector h that moves stale target embeddings to where the current encoder would put them.

    Args:
        kind: The family of h. ``"identity"`` returns its input bit for bit; ``"mean_shift"`` adds one vector;
            ``"procrustes"`` rotates; ``"low_rank"`` adds a linear displacement of few dimensions; ``"affine"`` is a
            linear map with offset; ``"kernel"`` adds a smooth displacement, a sum of radial functions around
            landmarks, to an affine map; all these are solved in closed form. ``"residual_mlp"`` is a
            one-hidden-layer network around a skip connection, trained by gradient descent.
        input_dim: Size of a stale vector.
        output_dim: Size of a corrected vector; ``input_dim`` if not given.
        hidden_dim: Width of the hidden layer of ``"residual_mlp"``; twice ``input_dim`` if not given.
        activation: ``"relu"``, ``"gelu"`` or ``"silu"``.
        rank: Rank of ``"low_rank"``; chosen by the fit if not given (64 with side features).
        fitted_rank: The rank it has; set by the fit.
        num_landmarks: Landmarks of ``"kernel"``, at most; a fit to fewer pairs takes fewer.
        landmark_rows: How many landmarks there are; set by the fit.
        side: What h reads of a target besides its stale vector: ``"tokens"`` (counts of its tokens and token pairs,
            each with a learned displacement), ``"word_embeddings"`` or ``"matrix"`` (dense features); None for
            nothing.
        side_dim: Number of side features.
        side_vocabulary: How many of the columns of ``"tokens"`` are tokens; the others are hashed token pairs.
        side_rows: How many of the columns of ``"tokens"`` have a displacement; set by the fit.
        normalize_output: Whether corrected vectors are scaled to unit length, as the encoder's are.
        fit_summary: Facts of the last fit (pairs, ridge, errors), kept for reports.
        stale_encoder: Fingerprint of the encoder of the cached vectors it was fitted to (name, revision, hash of the
            weights, tokenizer, prompt, pooling, normalisation, …); None where unknown.
        fresh_encoder: Fingerprint, for targets, of the encoder whose queries it serves; None where unknown.
        direction: ``"targets"``: it moves cached vectors to where the fresh encoder would put them. ``"queries"``: it
            maps queries of the fresh encoder to the cached vectors, which stay as they are.
    """

    model_type = "target-corrector"

    kind: str = "identity"
    input_dim: int = 384
    output_dim: int | None = None
    hidden_dim: int | None = None
    activation: str = "gelu"
    rank: int | None = None
    fitted_rank: int | None = None
    num_landmarks: int = 2048
    landmark_rows: int = 0
    side: str | None = None
    side_dim: int | None = None
    side_vocabulary: int | None = None
    side_rows: int = 0
    normalize_output: bool = True
    fit_summary: dict[str, Any] | None = None
    stale_encoder: dict[str, Any] | None = None
    fresh_encoder: dict[str, Any] | None = None
    direction: str = "targets"

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
        rank = 1 if self.rank is None else self.rank
        if min(self.input_dim, self.output_dim, self.hidden_dim, self.num_landmarks, rank) < 1:
            raise ValueError(
                "CorrectorConfig: expected sizes of at least 1; got "
                f"{self.input_dim} -> {self.hidden_dim} -> {self.output_dim}, rank {self.rank}, "
                f"{self.num_landmarks} landmarks. Give the encoders' embedding sizes."
            )
        if self.kind in SAME_SIZE_KINDS and self.input_dim != self.output_dim:
            raise ValueError(
                f"CorrectorConfig: expected equal sizes for kind {self.kind!r}; got {self.input_dim} and "
                f"{self.output_dim}. Use 'affine' or 'residual_mlp' between spaces of different size."
            )
        self._check_side()
        super().__post_init__(**kwargs)

    def _check_side(self) -> None:
        if self.side is None:
            if self.side_dim is not None or self.side_vocabulary is not None or self.side_rows:
                raise ValueError("CorrectorConfig: expected no sizes of side features without `side`. Name the side.")
            return
        if self.side not in SIDES or self.kind == "identity":
            raise ValueError(
                f"CorrectorConfig.side: expected None or one of {SIDES}, and None for the identity; got {self.side!r} "
                f"for kind {self.kind!r}. Choose one of them."
            )
        if self.side_dim is None or self.side_dim < 1 or self.side_rows < 0:
            raise ValueError(
                f"CorrectorConfig.side_dim: expected the number of side features; got {self.side_dim}. "
                "Give the width of the side features."
            )
        self.side_vocabulary = self.side_dim if self.side_vocabulary is None else self.side_vocabulary
