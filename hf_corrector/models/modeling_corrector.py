"""The corrector network h: stale target embeddings in, corrected ones out (arXiv 2409.01890)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .configuration_corrector import CorrectorConfig

Vectors = TypeVar("Vectors", torch.Tensor, np.ndarray)
CORRECT_CHUNK_ROWS = 16_384


class CorrectorModel(PreTrainedModel):
    """Move stale target embeddings to where the current encoder would put them.

    Every kind starts as the identity (up to normalisation) where input and output have the same size, so that an
    untrained corrector changes nothing. All arithmetic is float32, under any autocast.
    """

    config: CorrectorConfig
    fitted_pairs: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    skip: torch.Tensor
    hidden: nn.Linear
    output: nn.Linear
    config_class = CorrectorConfig
    base_model_prefix = "corrector"
    main_input_name = "stale"
    # A corrector is tiny and its error is the whole point: a half-precision copy would cost accuracy and save nothing.
    # The anchors keep these names, read as patterns by transformers, from matching weights of a model around this one.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "^shift", "^mean", "^weight", "^bias", "^skip", "^hidden", "^output",
    ]  # fmt: skip

    def __init__(self, config: CorrectorConfig) -> None:
        super().__init__(config)
        dim_in, dim_out, width = config.input_dim, int(config.output_dim or 0), int(config.hidden_dim or 0)
        # Also what a checkpoint of kind "identity" consists of: safetensors files without a tensor are not written.
        self.register_buffer("fitted_pairs", torch.zeros((), dtype=torch.int64))
        match config.kind:
            case "mean_shift":
                self.register_buffer("shift", torch.zeros(dim_out))
            case "affine":
                self.register_buffer("mean", torch.zeros(dim_in))
                self.register_buffer("weight", torch.eye(dim_out, dim_in) if dim_in != dim_out else _zeros(dim_out))
                self.register_buffer("bias", torch.zeros(dim_out))
            case "residual_mlp":
                self.hidden = nn.Linear(dim_in, width)
                self.output = nn.Linear(width, dim_out)
                if dim_in != dim_out:
                    self.register_buffer("skip", torch.eye(dim_out, dim_in))
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """Return float32, the only dtype of a corrector (kinds without parameters have none to ask)."""
        return torch.float32

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CorrectorModel:
        """Follow ``.to()`` to another device but not to another dtype, also as part of a larger model."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start at the identity; called by transformers for whatever a checkpoint does not hold."""
        if self.config.kind == "residual_mlp" and module is self.output:
            nn.init.zeros_(self.output.weight)
            nn.init.zeros_(self.output.bias)
        elif self.config.kind == "residual_mlp" and module is self.hidden:
            nn.init.kaiming_uniform_(self.hidden.weight, a=5**0.5)
            nn.init.zeros_(self.hidden.bias)
        elif module is self:
            self._init_buffers()

    def _init_buffers(self) -> None:
        square = self.config.input_dim == self.config.output_dim
        for name, buffer in self.named_buffers(recurse=False):
            nn.init.zeros_(buffer)
            if name in ("weight", "skip") and not square:
                nn.init.eye_(buffer)

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> CorrectorModel:
        """Load a saved corrector.

        Args:
            name: Folder or Hub id.
            args: Handed to transformers' ``from_pretrained``.
            kwargs: Handed to transformers' ``from_pretrained``.

        Raises:
            ValueError: If the weights are not those of a corrector of that configuration.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(name, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if info["missing_keys"] or info["unexpected_keys"]:
            raise ValueError(
                f"{name}: expected the weights of a corrector of kind {model.config.kind!r}; got missing "
                f"{sorted(info['missing_keys'])[:3]}, unexpected {sorted(info['unexpected_keys'])[:3]}. "
                "Name the folder of a corrector, for instance out/corrector."
            )
        return loaded if wants_info else model

    def reset(self) -> None:
        """Go back to the identity, as after a refresh of the cache."""
        for module in self.modules():
            self._init_weights(module)

    def forward(self, stale: torch.Tensor, side: torch.Tensor | None = None) -> torch.Tensor:
        """Correct a batch of stale vectors.

        Args:
            stale: Stale target embeddings, ``(n, input_dim)``, any floating dtype.
            side: Side features of the targets; no kind of this version takes any.

        Returns:
            Corrected embeddings, ``(n, output_dim)``, float32; for ``kind="identity"`` the input itself.

        Raises:
            ValueError: If the shape is another or side features are given.
        """
        self._check(stale, side)
        if self.config.kind == "identity":
            return stale
        with torch.autocast(stale.device.type, enabled=False):
            corrected = self._correct(stale.float())
            return F.normalize(corrected, dim=-1) if self.config.normalize_output else corrected

    def _correct(self, stale: torch.Tensor) -> torch.Tensor:
        square = self.config.input_dim == self.config.output_dim
        match self.config.kind:
            case "mean_shift":
                return stale + self.shift
            case "affine":
                # Kept as a displacement of z (and not as I + A) so that small corrections keep all their digits.
                displacement = F.linear(stale - self.mean, self.weight, self.bias)
                return stale + displacement if square else displacement
            case "residual_mlp":
                base = stale if square else F.linear(stale, self.skip)
                return base + self.output(_ACTIVATION[self.config.activation](self.hidden(stale)))
        raise ValueError(f"CorrectorModel: expected a known kind; got {self.config.kind!r}. Reload the configuration.")

    def _check(self, stale: torch.Tensor, side: torch.Tensor | None) -> None:
        if stale.dim() != 2 or stale.shape[1] != self.config.input_dim or not stale.is_floating_point():
            raise ValueError(
                f"CorrectorModel: expected floating vectors of shape (n, {self.config.input_dim}); got "
                f"{stale.dtype} of shape {tuple(stale.shape)}. Pass vectors of the encoder it was fitted on."
            )
        if side is not None:
            raise ValueError(
                f"CorrectorModel: expected no side features for kind {self.config.kind!r}; got shape "
                f"{tuple(side.shape)}. Leave `side` out."
            )

    @torch.no_grad()
    def correct(self, vectors: Vectors) -> Vectors:
        """Correct any number of stale vectors, chunk by chunk, outside of training.

        Args:
            vectors: Stale target embeddings, ``(n, input_dim)``, a torch tensor or a numpy array.

        Returns:
            Corrected embeddings, ``(n, output_dim)``, float32, of the type and on the device that came in.

        Raises:
            ValueError: If the shape is another, or a row holds NaN or infinity (the row is named).
        """
        device = torch.device("cpu") if isinstance(vectors, np.ndarray) else vectors.device
        corrected = torch.empty(len(vectors), int(self.config.output_dim or 0), dtype=torch.float32, device=device)
        for start in range(0, max(len(vectors), 1), CORRECT_CHUNK_ROWS):
            rows = vectors[start : start + CORRECT_CHUNK_ROWS]
            # Copied, as an array may be read-only or run backwards; in chunks, as it may be larger than memory.
            chunk = torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows
            self._check(chunk, None)
            bad = ~torch.isfinite(chunk).all(dim=1)
            if bad.any():
                raise ValueError(
                    f"CorrectorModel: expected finite vectors; got NaN or infinity in row "
                    f"{start + int(bad.nonzero()[0])}. Remove or re-encode that row."
                )
            corrected[start : start + len(chunk)] = self(chunk.to(self.fitted_pairs.device)).to(device)
        return corrected.numpy() if isinstance(vectors, np.ndarray) else corrected


def _zeros(dim: int) -> torch.Tensor:
    return torch.zeros(dim, dim)


_ACTIVATION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
