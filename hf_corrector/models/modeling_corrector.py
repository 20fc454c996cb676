"""The corrector network h: stale target embeddings in, corrected ones out (arXiv 2409.01890)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .configuration_corrector import CorrectorConfig
from .stored_corrector import StoredCorrector

Vectors = TypeVar("Vectors", torch.Tensor, np.ndarray)
CORRECT_CHUNK_ROWS = 16_384
AFFINE_KINDS = ("procrustes", "affine", "kernel")


class CorrectorModel(StoredCorrector):
    """Move stale target embeddings to where the current encoder would put them.

    Every kind starts as the identity (up to normalisation) where input and output have the same size, so that an
    untrained corrector changes nothing. All arithmetic is float32, under any autocast.
    """

    fitted_pairs: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    skip: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    landmarks: torch.Tensor
    landmark_weight: torch.Tensor
    landmark_width: torch.Tensor
    side_idf: torch.Tensor
    side_place: torch.Tensor
    side_table: torch.Tensor
    side_mean: torch.Tensor
    side_weight: torch.Tensor
    hidden: nn.Linear
    output: nn.Linear
    base_model_prefix = "corrector"
    main_input_name = "stale"
    # A corrector is tiny and its error is the whole point: a half-precision copy would cost accuracy and save nothing.
    # The anchors keep these names, read as patterns by transformers, from matching weights of a model around this one.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "^shift", "^mean", "^weight", "^bias", "^skip", "^down", "^up", "^landmark", "^side", "^hidden", "^output",
    ]  # fmt: skip

    def __init__(self, config: CorrectorConfig) -> None:
        super().__init__(config)
        # Also what a checkpoint of kind "identity" consists of: safetensors files without a tensor are not written.
        self.register_buffer("fitted_pairs", torch.zeros((), dtype=torch.int64))
        self._register_map(config)
        self._register_side(config)
        self.post_init()

    def _register_map(self, config: CorrectorConfig) -> None:
        """Register what reads the stale vector."""
        dim_in, dim_out, width = config.input_dim, int(config.output_dim or 0), int(config.hidden_dim or 0)
        if config.kind in (*AFFINE_KINDS, "low_rank"):
            self.register_buffer("mean", torch.zeros(dim_in))
            self.register_buffer("bias", torch.zeros(dim_out))
        if config.kind in AFFINE_KINDS:
            self.register_buffer("weight", torch.empty(dim_out, dim_in))
        match config.kind:
            case "mean_shift":
                self.register_buffer("shift", torch.zeros(dim_out))
            case "low_rank":
                rank = config.fitted_rank or min(config.rank or dim_in, dim_in, dim_out)
                self.register_buffer("down", torch.empty(rank, dim_in))
                self.register_buffer("up", torch.empty(dim_out, rank))
            case "kernel":
                self.register_buffer("landmarks", torch.empty(config.landmark_rows, dim_in))
                self.register_buffer("landmark_weight", torch.empty(config.landmark_rows, dim_out))
                self.register_buffer("landmark_width", torch.empty(()))
            case "residual_mlp":
                self.hidden = nn.Linear(dim_in, width)
                self.output = nn.Linear(width, dim_out)
                if dim_in != dim_out:
                    self.register_buffer("skip", torch.eye(dim_out, dim_in))

    def _register_side(self, config: CorrectorConfig) -> None:
        """Register what reads the side features; the last row of the table is for columns without displacement."""
        if config.side is None:
            return
        width, dim_out = int(config.side_dim or 0), int(config.output_dim or 0)
        if config.side == "tokens":
            self.register_buffer("side_idf", torch.zeros(width))
            self.register_buffer("side_place", torch.zeros(width, dtype=torch.int64))
            self.register_buffer("side_table", torch.zeros(config.side_rows + 1, dim_out))
        else:
            self.register_buffer("side_mean", torch.zeros(width))
            self.register_buffer("side_weight", torch.zeros(width, dim_out))

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
            if name in ("weight", "skip", "down", "up") and not square:
                nn.init.eye_(buffer)
            elif name == "landmark_width":
                nn.init.ones_(buffer)

    def reset(self) -> None:
        """Go back to the identity, as after a refresh of the cache."""
        for module in self.modules():
            self._init_weights(module)
        self.forget_encoders()

    @torch.no_grad()
    def load_parameters(self, parameters: dict[str, torch.Tensor]) -> None:
        """Set buffers by name, also those whose size a fit decides: rank, landmarks and side features.

        Args:
            parameters: New values; brought to float32, or for places in a table int64, and to the corrector's device.

        Raises:
            ValueError: If this kind has no such buffer, or its other sizes differ.
        """
        for name, value in parameters.items():
            if name not in self._buffers:
                raise ValueError(f"CorrectorModel: expected one of {sorted(self._buffers)}; got {name!r}.")
            old = self.get_buffer(name)
            value = value.detach().to(device=old.device, dtype=old.dtype)
            if value.shape != old.shape and (name not in _SIZED_BY_FIT or value.dim() != old.dim()):
                raise ValueError(
                    f"CorrectorModel.{name}: expected shape {tuple(old.shape)}; got {tuple(value.shape)}. "
                    "Configure the corrector for these encoders."
                )
            self.register_buffer(name, value.clone(memory_format=torch.contiguous_format))
        self._note_sizes()
        self.forget_encoders()

    def _note_sizes(self) -> None:
        """Bring the configuration up to the sizes a fit decided, so that a saved corrector loads."""
        if "down" in self._buffers:
            self.config.fitted_rank = len(self.down)
        if "landmarks" in self._buffers:
            self.config.landmark_rows = len(self.landmarks)
        if "side_table" in self._buffers:
            self.config.side_rows = len(self.side_table) - 1

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Make room for what a fit sized differently, as when a training run is resumed."""
        for name in _SIZED_BY_FIT:
            saved, own = state_dict.get(prefix + name), self._buffers.get(name)
            if saved is not None and own is not None and saved.shape != own.shape:
                self.register_buffer(name, own.new_empty(saved.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._note_sizes()

    def forward(self, stale: torch.Tensor, side: torch.Tensor | None = None) -> torch.Tensor:
        """Correct a batch of stale vectors.

        Args:
            stale: Stale target embeddings, ``(n, input_dim)``, any floating dtype.
            side: Side features of the same targets, ``(n, side_dim)``: for ``side="tokens"`` counts as a CSR tensor,
                otherwise dense; None for a corrector that reads none.

        Returns:
            Corrected embeddings, ``(n, output_dim)``, float32; for ``kind="identity"`` the input itself.

        Raises:
            ValueError: If a shape is another, or side features are missing or not wanted.
        """
        self._check(stale, side)
        if self.config.kind == "identity":
            return stale
        with torch.autocast(stale.device.type, enabled=False):
            return self.combine(stale.float(), None if side is None else self.side_displacement(side))

    def combine(self, stale: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """Correct vectors with what their side features add already computed, without checks.

        Args:
            stale: Stale target embeddings, ``(n, input_dim)`` float32.
            added: :meth:`side_displacement` of the same targets, ``(n, output_dim)``, or None.

        Returns:
            Corrected embeddings, ``(n, output_dim)``, float32.
        """
        corrected = self._correct(stale) if added is None else self._correct(stale) + added
        return F.normalize(corrected, dim=-1) if self.config.normalize_output else corrected

    def _correct(self, stale: torch.Tensor) -> torch.Tensor:
        square = self.config.input_dim == self.config.output_dim
        if self.config.kind == "mean_shift":
            return stale + self.shift
        if self.config.kind == "residual_mlp":
            base = stale if square else F.linear(stale, self.skip)
            return base + self.output(_ACTIVATION[self.config.activation](self.hidden(stale)))
        # Kept as a displacement of z (and not as I + A) so that small corrections keep all their digits.
        if self.config.kind == "low_rank":
            displacement = F.linear(F.linear(stale - self.mean, self.down), self.up, self.bias)
        else:
            # The mean goes into the offset, which saves a pass over all vectors; in float64, whose rounded result does
            # not depend on where in memory a loaded weight happens to lie.
            offset = self.bias.double() - self.weight.double() @ self.mean.double()
            displacement = F.linear(stale, self.weight, offset.float())
        if self.config.kind == "kernel":
            displacement = displacement + self._radial(stale) @ self.landmark_weight
        return stale + displacement if square else displacement

    def _radial(self, stale: torch.Tensor) -> torch.Tensor:
        """Return exp(-|z - landmark|² / 2 width²), ``(n, landmarks)``."""
        squares = stale.square().sum(dim=1)[:, None] + self.landmarks.square().sum(dim=1)
        distances = torch.addmm(squares, stale, self.landmarks.T, alpha=-2.0).clamp_(min=0.0)
        return torch.exp(distances / (-2.0 * self.landmark_width.square()))

    def side_displacement(self, side: torch.Tensor) -> torch.Tensor:
        """Return what the side features alone add before normalisation, ``(n, output_dim)`` float32.

        Args:
            side: As in :meth:`forward`.
        """
        if self.config.side != "tokens":
            return (side.float() - self.side_mean) @ self.side_weight
        columns, starts = side.col_indices(), side.crow_indices()
        values = (1.0 + side.values().float().log()) * self.side_idf[columns]
        # Tokens and token pairs of a row are each brought to unit length.
        row = torch.repeat_interleave(torch.arange(len(side), device=columns.device), starts.diff())
        part = 2 * row + (columns >= int(self.config.side_vocabulary or 0))
        squares = torch.zeros(2 * len(side), device=values.device).index_add_(0, part, values.square())
        values = values / squares.sqrt().clamp(min=1e-12)[part]
        return F.embedding_bag(
            self.side_place[columns], self.side_table, starts[:-1], mode="sum", per_sample_weights=values
        )

    def affine_map(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return W ``(output_dim, input_dim)`` and c ``(output_dim,)`` with h(z) = W z + c before normalisation.

        None where h is no affine function of z alone: kinds ``"kernel"`` and ``"residual_mlp"``, and side features.
        """
        config = self.config
        if config.side is not None or config.kind in ("kernel", "residual_mlp"):
            return None
        identity = torch.eye(config.input_dim, device=self.fitted_pairs.device)
        square = config.input_dim == config.output_dim
        if config.kind in SHIFT_KINDS:
            return identity, self.shift if config.kind == "mean_shift" else torch.zeros_like(identity[0])
        if config.kind == "low_rank":
            weight = self.up @ self.down
            return (identity + weight if square else weight), self.bias - weight @ self.mean
        return (identity + self.weight if square else self.weight), self.bias - self.weight @ self.mean

    def _check(self, stale: torch.Tensor, side: torch.Tensor | None) -> None:
        config = self.config
        if stale.dim() != 2 or stale.shape[1] != config.input_dim or not stale.is_floating_point():
            raise ValueError(
                f"CorrectorModel: expected floating vectors of shape (n, {config.input_dim}); got "
                f"{stale.dtype} of shape {tuple(stale.shape)}. Pass vectors of the encoder it was fitted on."
            )
        if side is None and config.side is None:
            return
        layout = torch.sparse_csr if config.side == "tokens" else torch.strided
        fits = side is not None and side.shape == (len(stale), config.side_dim) and side.layout == layout
        if config.side is None or not fits:
            wanted = f"side features of shape ({len(stale)}, {config.side_dim}), {layout}"
            got = "none" if side is None else f"{side.layout} of shape {tuple(side.shape)}"
            cure = "Leave `side` out." if config.side is None else f"Pass the {config.side} of the same targets."
            raise ValueError(
                f"CorrectorModel of kind {config.kind!r} with side {config.side!r}: expected "
                f"{'no side features' if config.side is None else wanted}; got {got}. {cure}"
            )

    @torch.no_grad()
    def correct(self, vectors: Vectors, side: Any = None) -> Vectors:
        """Correct any number of stale vectors, chunk by chunk, outside of training.

        Args:
            vectors: Stale target embeddings, ``(n, input_dim)``, a torch tensor or a numpy array.
            side: Side features of the same targets for a corrector that reads some: anything with
                ``read(start, stop)``, for instance ``TokenCounts``, or a CSR or dense tensor or an array.

        Returns:
            Corrected embeddings, ``(n, output_dim)``, float32, of the type and on the device that came in.

        Raises:
            ValueError: If the shape is another, or a row holds NaN or infinity (the row is named).
        """
        device = torch.device("cpu") if isinstance(vectors, np.ndarray) else vectors.device
        here = self.fitted_pairs.device
        corrected = torch.empty(len(vectors), int(self.config.output_dim or 0), dtype=torch.float32, device=device)
        if side is not None and len(side) != len(vectors):
            raise ValueError(
                f"CorrectorModel: expected side features of the same {len(vectors)} targets; got {len(side)} rows. "
                "Pass one row for every vector."
            )
        for start in range(0, max(len(vectors), 1), CORRECT_CHUNK_ROWS):
            rows = vectors[start : start + CORRECT_CHUNK_ROWS]
            # Copied, as an array may be read-only or run backwards; in chunks, as it may be larger than memory.
            chunk = torch.from_numpy(np.array(rows)) if isinstance(rows, np.ndarray) else rows
            beside = _read_side(side, start, start + len(chunk))
            self._check(chunk, beside)
            _refuse_bad_row(chunk, start)
            beside = None if beside is None else beside.to(here)
            corrected[start : start + len(chunk)] = self(chunk.to(here), beside).to(device)
        return corrected.numpy() if isinstance(vectors, np.ndarray) else corrected


SHIFT_KINDS = ("identity", "mean_shift")
_SIZED_BY_FIT = ("down", "up", "landmarks", "landmark_weight", "side_table")


def _read_side(side: Any, start: int, stop: int) -> torch.Tensor | None:
    if side is None:
        return None
    if isinstance(side, np.ndarray):
        return torch.from_numpy(np.array(side[start:stop]))
    if not isinstance(side, torch.Tensor):
        found: torch.Tensor = side.read(start, stop)
        return found
    if side.layout == torch.sparse_csr and (start, stop) != (0, len(side)):
        starts = side.crow_indices()[start : stop + 1]
        part = slice(int(starts[0]), int(starts[-1]))
        columns, values = side.col_indices()[part], side.values()[part]
        shape = (stop - start, side.shape[1])
        return torch.sparse_csr_tensor(starts - starts[0], columns, values, size=shape, check_invariants=True)
    return side if side.layout == torch.sparse_csr else side[start:stop]


def _refuse_bad_row(chunk: torch.Tensor, start: int) -> None:
    bad = ~torch.isfinite(chunk).all(dim=1)
    if bad.any():
        raise ValueError(
            f"CorrectorModel: expected finite vectors; got NaN or infinity in row "
            f"{start + int(bad.nonzero()[0])}. Remove or re-encode that row."
        )


_ACTIVATION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
