"""Correct stale vectors with numpy and safetensors alone, for workers beside a database that have no torch.

This file needs nothing else of the package and may be copied: ``save_for_numpy(corrector, folder)`` puts it beside the
weights. There::

    from numpy_corrector import NumpyCorrector

    corrected = NumpyCorrector.load("folder").correct(stale)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

Floats = npt.NDArray[np.float32]
# Vectors corrected at a time; with side features of tokens fewer, as each of their entries is a row of a table.
CHUNK_ROWS = 4096
TOKEN_CHUNK_ROWS = 256
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True, eq=False)
class Counts:
    """How often each token, and each pair of adjacent tokens, occurs in each target, one after the other.

    Attributes:
        offsets: Where each row starts, and where the last one ends, ``(rows + 1,)``.
        columns: Columns, ``(entries,)``.
        counts: How often each occurs, at least once, ``(entries,)``.
    """

    offsets: npt.NDArray[np.integer[Any]]
    columns: npt.NDArray[np.integer[Any]]
    counts: npt.NDArray[np.integer[Any]]

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.offsets) - 1


class NumpyCorrector:
    """A corrector as saved by ``CorrectorModel.save_pretrained``, computed by numpy in float32.

    Args:
        config: Content of ``config.json``.
        weights: Content of ``model.safetensors``.

    Raises:
        ValueError: If this is no corrector, or weights are missing.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, npt.NDArray[Any]]) -> None:
        if config.get("model_type") != "target-corrector":
            raise ValueError(
                f"NumpyCorrector: expected the configuration of a corrector; got model_type "
                f"{config.get('model_type')!r}. Name the folder of a corrector."
            )
        self.kind = str(config.get("kind", "identity"))
        self.side = config.get("side")
        self.input_dim = int(config.get("input_dim", 384))
        self.output_dim = int(config.get("output_dim") or self.input_dim)
        self.normalize_output = bool(config.get("normalize_output", True))
        self._activation = str(config.get("activation", "gelu"))
        self._vocabulary = int(config.get("side_vocabulary") or 0)
        self._weights = {name: np.ascontiguousarray(value) for name, value in weights.items()}
        missing = [name for name in self._needed() if name not in self._weights]
        if missing:
            raise ValueError(
                f"NumpyCorrector of kind {self.kind!r}: expected the weights {self._needed()}; got none for {missing}. "
                "Restore model.safetensors, or read it with the version of hf_corrector that wrote it."
            )
        self._matrix, self._offset = self._affine()

    @classmethod
    def load(cls, folder: str | Path) -> NumpyCorrector:
        """Read the folder of a corrector; only ``config.json`` and ``model.safetensors`` are opened.

        Raises:
            ValueError: If it is none.
            FileNotFoundError: If a file is missing.
        """
        path = Path(folder)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return cls(config, load_file(path / "model.safetensors"))

    def correct(self, vectors: npt.NDArray[Any], side: Any = None) -> Floats:
        """Correct stale vectors.

        Args:
            vectors: ``(n, input_dim)``, any floating type.
            side: Side features of the same targets for a corrector that reads some: :class:`Counts` (or anything with
                its three arrays, as ``TokenCounts``) for tokens, else a matrix ``(n, width)``.

        Returns:
            Corrected vectors, ``(n, output_dim)`` float32.

        Raises:
            ValueError: If a shape is another, or a row holds NaN or infinity (the row is named).
        """
        self._check(vectors, side)
        corrected = np.empty((len(vectors), self.output_dim), dtype=np.float32)
        rows = TOKEN_CHUNK_ROWS if self.side == "tokens" else CHUNK_ROWS
        for start in range(0, len(vectors), rows):
            stop = min(start + rows, len(vectors))
            stale = np.asarray(vectors[start:stop], dtype=np.float32)
            bad = np.flatnonzero(~np.isfinite(stale).all(axis=1))
            if len(bad):
                raise ValueError(
                    f"NumpyCorrector: expected finite vectors; got NaN or infinity in row {start + int(bad[0])}. "
                    "Remove or re-encode that row."
                )
            corrected[start:stop] = self._corrected(stale, side, start)
        return corrected

    def _corrected(self, stale: Floats, side: Any, start: int) -> Floats:
        if self.kind == "identity":
            return stale
        moved = self._mapped(stale)
        if self.side is not None:
            moved = moved + self._displacement(side, start, start + len(stale))
        if not self.normalize_output:
            return moved
        norms = np.sqrt(np.einsum("nd,nd->n", moved, moved, dtype=np.float64))
        normalized: Floats = moved / np.maximum(norms, _SMALLEST_NORM)[:, None].astype(np.float32)
        return normalized

    def _mapped(self, stale: Floats) -> Floats:
        """Return what the stale vectors alone become, before normalisation."""
        weights, square = self._weights, self.input_dim == self.output_dim
        if self.kind == "residual_mlp":
            hidden = _ACTIVATIONS[self._activation](stale @ weights["hidden.weight"].T + weights["hidden.bias"])
            base = stale if square else stale @ weights["skip"].T
            network: Floats = base + (hidden @ weights["output.weight"].T + weights["output.bias"])
            return network
        displacement = self._offset if self._matrix is None else stale @ self._matrix.T + self._offset
        if self.kind == "kernel":
            displacement = displacement + self._radial(stale) @ weights["landmark_weight"]
        moved: Floats = stale + displacement if square else np.asarray(displacement)
        return moved

    def _affine(self) -> tuple[Floats | None, Floats]:
        """Return matrix and offset of the displacement; the mean goes into the offset."""
        weights = self._weights
        if self.kind in ("identity", "residual_mlp"):
            return None, np.zeros(self.output_dim, dtype=np.float32)
        if self.kind == "mean_shift":
            return None, weights["shift"].astype(np.float32)
        wide = weights["weight"].astype(np.float64) if self.kind != "low_rank" else (
            weights["up"].astype(np.float64) @ weights["down"].astype(np.float64)
        )  # fmt: skip
        offset = weights["bias"] - wide @ weights["mean"].astype(np.float64)
        return wide.astype(np.float32), offset.astype(np.float32)

    def _radial(self, stale: Floats) -> Floats:
        """Return exp(-|z - landmark|² / 2 width²), ``(n, landmarks)``."""
        landmarks, width = self._weights["landmarks"], self._weights["landmark_width"]
        squares = (stale**2).sum(axis=1)[:, None] + (landmarks**2).sum(axis=1)
        distances = np.maximum(squares - 2.0 * (stale @ landmarks.T), 0.0)
        radial: Floats = np.exp(distances / (-2.0 * width**2), dtype=np.float32)
        return radial

    def _displacement(self, side: Any, start: int, stop: int) -> Floats:
        """Return what side features add to rows ``start`` to ``stop``."""
        weights = self._weights
        if self.side != "tokens":
            matrix = np.asarray(side[start:stop], dtype=np.float32)
            dense: Floats = (matrix - weights["side_mean"]) @ weights["side_weight"]
            return dense
        bounds = np.asarray(side.offsets[start : stop + 1], dtype=np.int64)
        columns = np.asarray(side.columns[bounds[0] : bounds[-1]], dtype=np.int64)
        counts = np.asarray(side.counts[bounds[0] : bounds[-1]], dtype=np.float32)
        values = (1 + np.log(counts)) * weights["side_idf"][columns]
        row = np.repeat(np.arange(stop - start), np.diff(bounds))
        # Tokens and token pairs of a row are each brought to unit length.
        part = 2 * row + (columns >= self._vocabulary)
        squares = np.bincount(part, weights=values.astype(np.float64) ** 2, minlength=2 * (stop - start))
        values = values / np.maximum(np.sqrt(squares), _SMALLEST_NORM)[part].astype(np.float32)
        entries = weights["side_table"][weights["side_place"][columns]] * values[:, None]
        added = np.zeros((stop - start, self.output_dim), dtype=np.float32)
        filled = np.flatnonzero(np.diff(bounds))
        if len(filled):
            added[filled] = np.add.reduceat(entries, bounds[filled] - bounds[0], axis=0)
        return added

    def _needed(self) -> list[str]:
        affine = ["mean", "weight", "bias"]
        by_kind = {
            "identity": [], "mean_shift": ["shift"], "procrustes": affine, "affine": affine,
            "low_rank": ["mean", "up", "down", "bias"],
            "kernel": [*affine, "landmarks", "landmark_weight", "landmark_width"],
            "residual_mlp": ["hidden.weight", "hidden.bias", "output.weight", "output.bias"],
        }  # fmt: skip
        if self.kind not in by_kind:
            raise ValueError(
                f"NumpyCorrector: expected a kind among {list(by_kind)}; got {self.kind!r}. "
                "Use the numpy_corrector.py of the version that saved it."
            )
        skip = ["skip"] if self.kind == "residual_mlp" and self.input_dim != self.output_dim else []
        by_side = {None: [], "tokens": ["side_idf", "side_place", "side_table"]}
        return [*by_kind[self.kind], *skip, *by_side.get(self.side, ["side_mean", "side_weight"])]

    def _check(self, vectors: npt.NDArray[Any], side: Any) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.input_dim or vectors.dtype.kind != "f":
            raise ValueError(
                f"NumpyCorrector: expected floating vectors of shape (n, {self.input_dim}); got {vectors.dtype} of "
                f"shape {vectors.shape}. Pass vectors of the encoder it was fitted on."
            )
        if (side is None) != (self.side is None):
            cure = "Leave `side` out." if self.side is None else f"Pass the {self.side} of the same targets."
            raise ValueError(
                f"NumpyCorrector: expected {'no side features' if self.side is None else self.side}; got "
                f"{'none' if side is None else 'some'}. {cure}"
            )
        if side is not None and len(side) != len(vectors):
            raise ValueError(
                f"NumpyCorrector: expected side features of the same {len(vectors)} targets; got {len(side)} rows. "
                "Pass one row for every vector."
            )


def _erf(x: Floats) -> Floats:
    """Return the error function to seven digits: the rational function Eigen and XLA use in float32."""
    bounded = np.clip(x, -4.0, 4.0).astype(np.float64)
    square = bounded**2
    above = np.polyval(
        [-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
         -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02], square,
    )  # fmt: skip
    below = np.polyval(
        [-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
         -1.42647390514189e-02], square,
    )  # fmt: skip
    found: Floats = (bounded * above / below).astype(np.float32)
    return found


def _relu(x: Floats) -> Floats:
    return np.maximum(x, np.float32(0))


def _gelu(x: Floats) -> Floats:
    activated: Floats = np.float32(0.5) * x * (np.float32(1) + _erf(x * np.float32(0.5**0.5)))
    return activated


def _silu(x: Floats) -> Floats:
    # By tanh, which does not overflow: sigmoid(x) = (1 + tanh(x / 2)) / 2.
    activated: Floats = np.float32(0.5) * x * (np.float32(1) + np.tanh(np.float32(0.5) * x))
    return activated


_ACTIVATIONS = {"relu": _relu, "gelu": _gelu, "silu": _silu}
