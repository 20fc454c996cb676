"""Targets encoded by the new encoder: each at most once, counted, and kept on disk as soon as it is there."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_corrector._files import hash_strings
from hf_corrector.cache.manifest import MANIFEST_FILE
from hf_corrector.cache.row_files import hash_texts
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import CachePlan, CacheWriter, default_shard_rows
from hf_corrector.data.retrieval import column
from hf_corrector.encoding import EncodeOptions
from hf_corrector.index_upgrade.inputs import UpgradeInputs

FRESH_FOLDER = "fresh"
_ROWS_AT_ONCE = 16_384


class FreshTargets:
    """Fresh vectors of some targets of a corpus.

    Args:
        inputs: Corpus and encoders.
        folder: Where to keep them, as caches of parts of the corpus; those that are there already are taken where
            id and text are the same. None keeps them in memory only.
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
            rows, kept = self._same_texts(part)
            mine = np.setdiff1d(mine, rows)
            self._take(rows, part.gather(kept))
        if len(mine):
            self._write(mine, self.gather(mine))

    def _same_texts(self, part: TargetCache) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return rows of the corpus, and where a part has them; targets whose text is another one by now are left."""
        rows = self._inputs.cache.ids.find(part.ids)
        if part.text_hashes is None:  # it cannot be seen which texts its vectors are of
            return rows[:0], rows[:0]
        known = np.flatnonzero(rows >= 0)
        kept = known[hash_texts(self._texts(rows[known])) == part.text_hashes[known]]
        return rows[kept], kept

    def _texts(self, rows: npt.NDArray[np.int64]) -> list[str]:
        return column(self._inputs.data.corpus.select(rows), "text") if len(rows) else []

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
        vectors = model.encode_tokens(
            model.tokenize(self._texts(rows), "target"), "target", token_budget=self._options.token_budget,
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
        texts, dim = self._texts(rows), int(vectors.shape[1])
        plan = CachePlan(
            ids=[ids[int(row)] for row in rows], dim=dim, dtype="float32", fingerprint=fingerprint,
            texts_hash=hash_strings(texts), shard_rows=default_shard_rows(dim, "float32"),
            text_hashes=hash_texts(texts),
        )  # fmt: skip
        with CacheWriter(self._folder / f"part-{number:05d}", plan) as writer:
            for shard in writer.pending_shards():
                writer.write_shard(shard.index, vectors[shard.start : shard.stop])
            writer.finish()
