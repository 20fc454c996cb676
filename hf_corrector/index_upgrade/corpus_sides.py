"""Side features read off the corpus when they are asked for: nothing is stored, no encoder is run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset

from hf_corrector.data.retrieval import column
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.side_features import SideFeatures, TokenCounts, mean_word_embeddings


@dataclass(frozen=True, eq=False)
class CorpusSide:
    """Tokens of the targets of a corpus as an encoder's tokenizer sees them, or the mean of their word embeddings.

    Attributes:
        corpus: Targets with a column ``text``.
        model: Whose tokenizer, prompt, maximum length and word embeddings to use.
        kind: ``"tokens"`` or ``"word_embeddings"``.
    """

    corpus: Dataset
    model: DualEncoderModel
    kind: str = "tokens"

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

    def gather(self, rows: torch.Tensor | npt.NDArray[np.int64]) -> torch.Tensor:
        """Return any rows, ``(n, width)`` float32, in CSR layout for tokens."""
        wanted = np.asarray(rows, dtype=np.int64)
        texts = column(self.corpus.select(wanted), "text") if len(wanted) else []
        lists = self.model.tokenize(texts, "target") if texts else []
        counts = TokenCounts.from_lists(lists, vocabulary=self.vocabulary)
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
