"""Targets encoded by the new encoder: each at most once, counted, and kept on disk as soon as it is there."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_corrector.cache.manifest import MANIFEST_FILE
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.retrieval import column
from hf_corrector.encoding import EncodeOptions
from hf_corrector.index_upgrade.inputs import UpgradeInputs

FRESH_FOLDER = "fresh"
_ROWS_AT_ONCE = 16_384


class FreshTargets:
    """Fresh vectors of some targets of a corpus.

    Args:
        inputs: Corpus and encoders.
        folder: Where to keep them, as caches of parts of the corpus; those that are there already are taken. None
            keeps them in memory only.
        options: How to encode.
    """

    def __init__(self, inputs: UpgradeInputs, folder: Path | None, *, options: EncodeOptions) -> None:
        self._inputs, self._options = inputs, options
        self._place = np.full(len(inputs.cache), -1, dtype=np.int64)
        self._parts: list[torch.Tensor] = []
        self._folder: Path | None = None
        self.passes, self.seconds = 0, 0.0
        if folder is not None:
            self.keep_in(folder)

    def keep_in(self, folder: Path) -> None:
        """Keep what is there and what will come in a folder, and take what the folder has.

        Raises:
            CacheMismatchError: If the folder holds vectors of another encoder.
        """
        if self._folder == folder / FRESH_FOLDER:
            return
        mine, self._folder = self.rows, folder / FRESH_FOLDER
        wanted = self._inputs.model.fingerprint("target", compute_dtype=self._options.compute_dtype)
        for path in sorted(self._folder.glob("part-*")):
            if not (path / MANIFEST_FILE).exists():
                shutil.rmtree(path)  # what a run left that was killed while writing it
                continue
            part = TargetCache.open(path, expected=wanted)
            rows = self._inputs.cache.rows_of(part.ids)
            mine = np.setdiff1d(mine, rows)
            self._take(rows, part.read(0, len(part)).float().clone())
        if len(mine):
            self._write(mine, self.gather(mine))

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows that are there, ascending."""
        return np.flatnonzero(self._place >= 0)

    @property
    def seconds_per_pass(self) -> float | None:
        """Seconds one pass took, tokenising included; None where none was needed."""
        return self.seconds / self.passes if self.passes else None

    def gather(self, rows: npt.NDArray[np.int64]) -> torch.Tensor:
        """Return the fresh vectors of rows, encoding those that are not there, ``(n, dim)`` float32."""
        missing = np.unique(rows[self._place[rows] < 0])
        disable = not self._options.progress or not len(missing)
        with tqdm(total=len(missing), desc="encode targets", unit="text", disable=disable) as bar:
            for start in range(0, len(missing), _ROWS_AT_ONCE):
                self._encode(missing[start : start + _ROWS_AT_ONCE], bar)
        self._merge()
        everything = self._parts[0] if self._parts else torch.empty(0, self._inputs.model.config.embedding_dim)
        return everything[torch.from_numpy(self._place[rows])]

    def _encode(self, rows: npt.NDArray[np.int64], bar: tqdm) -> None:
        started, model = time.perf_counter(), self._inputs.model
        texts = column(self._inputs.data.corpus.select(rows), "text")
        vectors = model.encode_tokens(
            model.tokenize(texts, "target"), "target", token_budget=self._options.token_budget,
            compute_dtype=self._options.compute_dtype, progress=bar,
        )  # fmt: skip
        self.seconds += time.perf_counter() - started
        self.passes += len(rows)
        self._take(rows, vectors)
        self._write(rows, vectors)

    def _take(self, rows: npt.NDArray[np.int64], vectors: torch.Tensor) -> None:
        self._place[rows] = sum(len(part) for part in self._parts) + np.arange(len(rows))
        self._parts.append(vectors)

    def _merge(self) -> None:
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]

    def _write(self, rows: npt.NDArray[np.int64], vectors: torch.Tensor) -> None:
        if self._folder is None:
            return
        fingerprint = self._inputs.model.fingerprint("target", compute_dtype=self._options.compute_dtype)
        ids = self._inputs.cache.ids
        number = 1 + max((int(path.name[5:]) for path in self._folder.glob("part-*")), default=-1)
        TargetCache.from_arrays(
            self._folder / f"part-{number:05d}", vectors, [ids[int(row)] for row in rows], fingerprint=fingerprint
        )
