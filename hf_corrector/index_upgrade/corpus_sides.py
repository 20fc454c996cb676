"""Side features read off the corpus when they are asked for, where none are stored; no encoder is run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset

from hf_corrector.cache.manifest import CacheManifest
from hf_corrector.cache.side_store import save_counts, save_dense, write_blocks, write_counts
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.retrieval import column
from hf_corrector.encoding import count_details
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.side_features import DenseSide, SideFeatures, TokenCounts, TokenStatistics, mean_word_embeddings

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class CorpusSide:
    """Tokens of the targets of a corpus as an encoder's tokenizer sees them, or the mean of their word embeddings.

    Attributes:
        corpus: Targets with a column ``text``.
        model: Whose tokenizer, prompt, maximum length and word embeddings to use.
        kind: ``"tokens"`` or ``"word_embeddings"``.
        manifest: Rows of the cache it belongs to, where it is to be kept with a corrector.
    """

    corpus: Dataset
    model: DualEncoderModel
    kind: str = "tokens"
    manifest: CacheManifest | None = None

    @property
    def _embeddings(self) -> torch.Tensor:
        module: Any = self.model.target_encoder.get_input_embeddings()
        table: torch.Tensor = module.weight
        return table

    @property
    def vocabulary(self) -> int:
        """Number of tokens the encoder knows."""
        return len(self._embeddings)

    @property
    def width(self) -> int:
        """Number of columns."""
        return int(self.gather(np.zeros(0, dtype=np.int64)).shape[1])

    def __len__(self) -> int:
        """Return the number of targets."""
        return len(self.corpus)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop``, ``(stop - start, width)`` float32, in CSR layout for tokens."""
        return self.gather(np.arange(start, stop))

    def counts(self, rows: npt.NDArray[np.int64]) -> TokenCounts:
        """Count the tokens of any rows ``(n,)``."""
        texts = column(self.corpus.select(rows), "text") if len(rows) else []
        lists = self.model.tokenize(texts, "target") if texts else []
        return TokenCounts.from_lists(lists, vocabulary=self.vocabulary)

    def blocks(self) -> Iterator[TokenCounts]:
        """Count the tokens of all targets, some at a time."""
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield self.counts(np.arange(start, min(start + _ROWS_AT_ONCE, len(self))))

    def dense_blocks(self) -> Iterator[DenseSide]:
        """Average the word embeddings of all targets, some at a time."""
        for block in self.blocks():
            yield mean_word_embeddings(block, self._embeddings)

    def details(self) -> dict[str, str | int]:
        """Return what decides the tokens, and whose embeddings they get, to be stored with them."""
        made_by = self.model.fingerprint("target")
        whose = {} if self.kind == "tokens" else {"weights": made_by.weights}
        return {**count_details(made_by), **whose}

    def store(self, cache: TargetCache) -> None:
        """Store the features of all targets with their cache.

        Raises:
            CacheError: If someone else is writing into the folder, or it holds another generation by now.
            OSError: If the disk refuses.
        """
        if self.kind == "tokens":
            save_counts(cache, self.blocks(), details=self.details())
        else:
            save_dense(cache, self.dense_blocks(), kind=self.kind, width=self.width, details=self.details())

    def keep(self, folder: Path) -> None:
        """Write the features of all targets into another folder than that of their cache, if it is known."""
        if self.manifest is None:
            return
        if self.kind == "tokens":
            write_counts(folder, self.manifest, self.blocks(), details=self.details())
        else:
            blocks, details = self.dense_blocks(), self.details()
            write_blocks(folder, self.manifest, blocks, kind=self.kind, width=self.width, details=details)

    def statistics(self) -> TokenStatistics:
        """Return in how many targets each column occurs; tokenises all of them."""
        frequency = torch.zeros(self.width, dtype=torch.int64)
        for block in self.blocks():
            frequency += block.statistics().frequency
        return TokenStatistics(frequency, len(self), self.vocabulary)

    def gather(self, rows: torch.Tensor | npt.NDArray[np.int64]) -> torch.Tensor:
        """Return any rows, ``(n, width)`` float32, in CSR layout for tokens."""
        counts = self.counts(np.asarray(rows, dtype=np.int64))
        found = counts if self.kind == "tokens" else mean_word_embeddings(counts, self._embeddings)
        return found.read(0, len(found))


@dataclass(frozen=True, eq=False)
class SideRows:
    """Side features of some rows, counted from 0.

    Attributes:
        side: Side features of all targets.
        rows: Which of them, ``(n,)`` int64.
    """

    side: SideFeatures
    rows: npt.NDArray[np.int64]

    @property
    def kind(self) -> str:
        """Kind of the side features."""
        return self.side.kind

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.side.width

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop``, ``(stop - start, width)`` float32."""
        return self.side.gather(self.rows[start:stop])

    def gather(self, rows: torch.Tensor | npt.NDArray[np.int64]) -> torch.Tensor:
        """Return any rows, ``(n, width)`` float32."""
        return self.side.gather(self.rows[np.asarray(rows, dtype=np.int64)])
