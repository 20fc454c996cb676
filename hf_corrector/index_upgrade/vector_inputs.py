"""What an upgrade starts from where only vectors are at hand: checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from hf_corrector.cache.manifest import MANIFEST_FILE
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import hash_vectors
from hf_corrector.corrected_arrays import ArrayVectors, check_vectors
from hf_corrector.errors import CacheMismatchError, DataError
from hf_corrector.index_upgrade.fits import FitPairs
from hf_corrector.records import EncoderFingerprint

Matrix: TypeAlias = str | Path | torch.Tensor | npt.NDArray[Any]
IntArray: TypeAlias = npt.NDArray[np.int64]
# Below it nothing can be held out and still be fitted to; a hundred times as many are a good start.
MIN_SAMPLE = 20
_UNIT = 1e-2


@dataclass(frozen=True, eq=False)
class JudgedVectors:
    """Judged queries of which the vectors are known.

    Attributes:
        new: By the new encoder, ``(queries, dim_new)``: an array, a tensor or an ``.npy`` file.
        relevant: For each query the rows of the old vectors that answer it, and their grades.
        old: By the old encoder, ``(queries, dim_old)``, to judge the old model kept; None where they are not known.
    """

    new: Matrix
    relevant: Sequence[Mapping[int, float]] = field(repr=False)
    old: Matrix | None = None


@dataclass(frozen=True, eq=False)
class SampledQueries:
    """Judged queries that targets of the sample answer.

    Attributes:
        new: ``(queries, dim_new)`` float32.
        old: ``(queries, dim_old)`` float32, or None.
        relevant: Their positives as places in the sample, with grades.
        given: How many queries there were before those were left out that nothing in the sample answers.
    """

    new: torch.Tensor
    old: torch.Tensor | None
    relevant: list[dict[int, float]]
    given: int


@dataclass(frozen=True, eq=False)
class VectorInputs:
    """Checked vectors.

    Attributes:
        old: All old vectors.
        rows: Which of them were embedded anew, ascending, ``(n,)``.
        stale: Those, ``(n, dim_old)`` float32.
        fresh: Their new vectors, ``(n, dim_new)`` float32.
        queries: Judged queries, or None.
    """

    old: TargetCache | ArrayVectors
    rows: IntArray
    stale: torch.Tensor
    fresh: torch.Tensor
    queries: SampledQueries | None

    @property
    def normalize(self) -> bool:
        """Whether the new encoder's vectors have unit length."""
        return bool(((self.fresh.norm(dim=1) - 1).abs() < _UNIT).all())

    @property
    def same_size(self) -> bool:
        """Whether new queries can be compared with old vectors at all."""
        return self.stale.shape[1] == self.fresh.shape[1]

    @property
    def checksum(self) -> str:
        """What tells these old vectors from others."""
        old = self.old
        return old.manifest.checksum if isinstance(old, TargetCache) else f"vectors-{hash_vectors(old.array)}"

    @property
    def pairs(self) -> FitPairs:
        """What correctors are fitted to."""
        return FitPairs(self.rows, self.stale, self.fresh, None, normalize=self.normalize)

    def leads_to(self, name: str) -> EncoderFingerprint:
        """Return what stands for the new encoder."""
        return EncoderFingerprint.of_precomputed(name, normalize=self.normalize)


def load_vectors(
    old: Matrix | TargetCache, new_sample: Matrix, rows: Sequence[int] | IntArray | None, queries: JudgedVectors | None
) -> VectorInputs:
    """Open and check what the user gave.

    Raises:
        DataError: If an array cannot be vectors of an encoder, or rows and judgements do not fit to them.
        CacheMismatchError: If the old vectors are a cache of corrected ones.
    """
    vectors = _old_vectors(old)
    fresh = check_vectors("new_sample", new_sample)
    places = _checked_rows(rows, total=len(vectors), count=len(fresh))
    order = np.argsort(places)
    places = places[order]
    judged = None
    if queries is not None:
        judged = _judged(queries, places, dims=(vectors.dim, fresh.dim), total=len(vectors))
    return VectorInputs(vectors, places, vectors.gather(places).float(), fresh.gather(order), judged)


def _old_vectors(old: Matrix | TargetCache) -> TargetCache | ArrayVectors:
    if isinstance(old, str | Path) and (Path(old) / MANIFEST_FILE).is_file():
        old = TargetCache.open(old)
    if not isinstance(old, TargetCache):
        return check_vectors("old vectors", old)
    if old.fingerprint.corrected_from is not None:
        raise CacheMismatchError(
            str(old.path), expected="vectors as an encoder made them", got="corrected ones",
            cure="Give the cache they were corrected from, whose errors do not add up.",
        )  # fmt: skip
    return old


def _checked_rows(rows: Sequence[int] | IntArray | None, *, total: int, count: int) -> IntArray:
    if rows is None and total != count:
        raise DataError(
            "rows", expected=f"which of the {total:,} old vectors the {count:,} new ones stand for", got="nothing",
            cure="Give the row of each new vector.",
        )  # fmt: skip
    found = np.arange(count) if rows is None else np.asarray(rows)
    whole = found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
    if not whole or len(found) != count or len(np.unique(found)) != count:
        raise DataError(
            "rows", expected=f"{count:,} different integers, one for each new vector",
            got=f"{found.dtype} of shape {found.shape}, {len(np.unique(found)):,} different",
            cure="Give the row of each new vector once.",
        )  # fmt: skip
    if found.min(initial=0) < 0 or found.max(initial=0) >= total:
        raise DataError(
            "rows", expected=f"rows from 0 to {total - 1}", got=f"{found.min()} to {found.max()}",
            cure="Count rows of the old vectors from 0.",
        )  # fmt: skip
    if count < MIN_SAMPLE:
        raise DataError(
            "new_sample", expected=f"at least {MIN_SAMPLE} vectors", got=str(count),
            cure="Embed more targets anew; some hundreds are a start, 2,000 are good.",
        )  # fmt: skip
    return found.astype(np.int64)


def _judged(queries: JudgedVectors, rows: IntArray, *, dims: tuple[int, int], total: int) -> SampledQueries:
    """Check judged queries and leave out those that nothing in the sample answers."""
    new = check_vectors("queries", queries.new, rows=len(queries.relevant))
    old = None if queries.old is None else check_vectors("old queries", queries.old, rows=len(queries.relevant))
    for name, found, wanted in (("queries", new, dims[1]), ("old queries", old, dims[0])):
        if found is not None and found.dim != wanted:
            raise DataError(
                name, expected=f"vectors of size {wanted}, as those of the targets", got=f"size {found.dim}",
                cure="Embed queries and targets with the same encoder.",
            )  # fmt: skip
    place = {row: number for number, row in enumerate(rows.tolist())}
    kept, relevant = [], []
    for number, known in enumerate(queries.relevant):
        if any(not 0 <= row < total for row in known):
            raise DataError(
                f"judgements of query {number}", expected=f"rows from 0 to {total - 1}", got=str(list(known)[:5]),
                cure="Count rows of the old vectors from 0.",
            )  # fmt: skip
        here = {place[row]: float(grade) for row, grade in known.items() if row in place}
        if any(grade > 0 for grade in here.values()):
            kept.append(number)
            relevant.append(here)
    if not kept:
        raise DataError(
            "judged queries", expected="at least one that a target of the sample answers", got="none",
            cure="Embed the targets that answer judged queries anew as well, and give them with the sample.",
        )  # fmt: skip
    picked = np.asarray(kept, dtype=np.int64)
    return SampledQueries(
        new.gather(picked), None if old is None else old.gather(picked), relevant, len(queries.relevant)
    )
