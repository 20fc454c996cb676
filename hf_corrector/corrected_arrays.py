"""Bridge between corrector and plain arrays: vectors in ``.npy`` files whose encoder is not at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_corrector._files import atomic_write
from hf_corrector.cache.shard_files import first_bad_row
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import check_matrix
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.index.base import TargetVectors
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.side_features import SideFeatures

CHUNK_ROWS = 16_384
ARRAY_SUFFIX = ".npy"
ARRAY_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16)}


@dataclass(frozen=True, eq=False)
class ArrayVectors:
    """Vectors of an array, which may be larger than memory.

    Attributes:
        array: ``(rows, dim)``, floating point, perhaps memory-mapped and read-only.
    """

    array: npt.NDArray[Any]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.array)

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return int(self.array.shape[1])

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return a copy of rows ``start`` to ``stop``, ``(stop - start, dim)`` float32."""
        return torch.from_numpy(np.array(self.array[start:stop], dtype=np.float32))

    def gather(self, rows: torch.Tensor | npt.NDArray[np.integer[Any]]) -> torch.Tensor:
        """Return a copy of any rows ``(n,)``, ``(n, dim)`` float32."""
        return torch.from_numpy(np.array(self.array[np.asarray(rows, dtype=np.int64)], dtype=np.float32))


def load_array(path: str | Path) -> npt.NDArray[Any]:
    """Map an ``.npy`` file into memory; one that holds pickled objects is never read.

    Raises:
        DataError: If there is no such file, or it holds no array of numbers.
    """
    if not Path(path).is_file():
        raise DataError(
            str(path), expected="a file in numpy's .npy format", got="no such file",
            cure="Check the name; write one with numpy.save(path, array).",
        )  # fmt: skip
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(
            str(path), expected="an array of numbers in numpy's .npy format", got=str(error).split("\n")[0][:120],
            cure="Write it with numpy.save(path, array).",
        ) from error  # fmt: skip
    if not isinstance(found, np.ndarray):
        raise DataError(
            str(path), expected="one array", got="an archive of several", cure="Write it with numpy.save(path, array)."
        )
    return found


def check_vectors(where: str, vectors: Any, *, rows: int | None = None) -> ArrayVectors:
    """Refuse what cannot be vectors of an encoder, reading all of them.

    Args:
        where: What to call them.
        vectors: An array, a tensor, or the name of an ``.npy`` file.
        rows: How many there should be; any number if not given.

    Raises:
        DataError: If it is no matrix of floats, or a row holds NaN or infinity or is zero; names the row.
    """
    if isinstance(vectors, torch.Tensor):
        # numpy has no bfloat16.
        vectors = vectors.detach().cpu()
        vectors = (vectors.float() if vectors.dtype == torch.bfloat16 else vectors).numpy()
    array = load_array(vectors) if isinstance(vectors, str | Path) else np.asarray(vectors)
    check_matrix(where, array, rows=rows if rows is not None else array.shape[0] if array.ndim else 0)
    if not len(array):
        raise DataError(where, expected="at least one vector", got="none", cure="Give the vectors of all targets.")
    found = ArrayVectors(array)
    for start in range(0, len(array), CHUNK_ROWS):
        bad = first_bad_row(found.read(start, start + CHUNK_ROWS), nonzero=True)
        if bad is not None:
            raise DataError(
                f"{where}, row {start + bad[0]}", expected="a vector", got=bad[1],
                cure="Embed that one again, or leave it out.",
            )  # fmt: skip
    return found


@dataclass(frozen=True, eq=False)
class FreshArray:
    """Vectors of the new encoder for some rows, to be taken instead of corrected ones.

    Attributes:
        rows: Rows, distinct, ``(m,)`` int64.
        vectors: ``(m, dim_out)`` float32.
    """

    rows: npt.NDArray[np.int64]
    vectors: torch.Tensor


@dataclass(frozen=True, eq=False)
class ArrayOptions:
    """How corrected vectors are written.

    Attributes:
        dtype: One of :data:`ARRAY_DTYPES`.
        fresh: What to take instead of corrected vectors.
        progress: Whether to show a progress bar.
    """

    dtype: str = "float32"
    fresh: FreshArray | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuse a type numpy does not have (ConfigurationError)."""
        if self.dtype not in ARRAY_DTYPES:
            raise ConfigurationError(
                "dtype of an .npy file", expected=f"one of {tuple(ARRAY_DTYPES)}", got=repr(self.dtype),
                cure="Choose one of them, or write a cache.",
            )  # fmt: skip


def write_corrected_array(
    corrector: CorrectorModel,
    vectors: TargetVectors,
    path: str | Path,
    *,
    side: SideFeatures | None = None,
    options: ArrayOptions | None = None,
) -> Path:
    """Correct all vectors into an ``.npy`` file, which is there once it is whole.

    Args:
        corrector: Leads from these vectors to others.
        vectors: The older vectors.
        path: A new file.
        side: Side features, for a corrector that reads some.
        options: How to write.

    Raises:
        ConfigurationError: If sizes or side features do not fit, or the file exists.
        CacheCorruptedError: If the vectors are a cache and a byte of it is not what was written.
        DataError: If a corrected row is NaN or infinite; names the row.
    """
    options = ArrayOptions() if options is None else options
    target, dim_out = Path(path), int(corrector.config.output_dim or 0)
    fresh = options.fresh
    _check(corrector, vectors, target, side=side, fresh=fresh)

    def write(temporary: Path) -> None:
        out = np.lib.format.open_memmap(
            temporary, mode="w+", dtype=ARRAY_DTYPES[options.dtype], shape=(len(vectors), dim_out)
        )  # fmt: skip
        with tqdm(total=len(vectors), desc="correct targets", unit="row", disable=not options.progress) as bar:
            for start in range(0, len(vectors), CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, len(vectors))
                out[start:stop] = _corrected(corrector, vectors, side, (start, stop))
                bar.update(stop - start)
        if fresh is not None:
            out[fresh.rows] = fresh.vectors.numpy()
        out.flush()

    atomic_write(target, write)
    return target


def _corrected(
    corrector: CorrectorModel, vectors: TargetVectors, side: SideFeatures | None, rows: tuple[int, int]
) -> npt.NDArray[np.float32]:
    start, stop = rows
    if isinstance(vectors, TargetCache):
        vectors.check_bytes(start, stop)
    stale = vectors.read(start, stop).float()
    corrected = corrector.correct(stale, None if side is None else side.read(start, stop))
    bad = first_bad_row(corrected, nonzero=False)
    if bad is not None:
        raise DataError(
            f"corrected row {start + bad[0]}", expected="a vector", got=bad[1], cure="Fit the corrector again."
        )
    found: npt.NDArray[np.float32] = corrected.numpy()
    return found


def _check(
    corrector: CorrectorModel, vectors: TargetVectors, target: Path, *, side: SideFeatures | None,
    fresh: FreshArray | None,
) -> None:  # fmt: skip
    config = corrector.config
    if target.exists() or target.suffix != ARRAY_SUFFIX:
        got = "a file that exists" if target.exists() else f"the suffix {target.suffix!r}"
        raise ConfigurationError(str(target), expected="a new .npy file", got=got, cure="Name another file.")
    if config.input_dim != vectors.dim or config.side != (None if side is None else side.kind):
        raise ConfigurationError(
            "corrected vectors", expected=f"vectors of size {config.input_dim} and side features {config.side!r}",
            got=f"size {vectors.dim} and {None if side is None else side.kind!r}",
            cure="Use the corrector that was fitted to these vectors.",
        )  # fmt: skip
    if fresh is not None:
        outside = (fresh.rows < 0) | (fresh.rows >= len(vectors))
        if outside.any() or fresh.vectors.shape != (len(fresh.rows), config.output_dim):
            raise DataError(
                "fresh vectors", expected=f"vectors of size {config.output_dim} for rows from 0 to {len(vectors) - 1}",
                got=f"shape {tuple(fresh.vectors.shape)} for {len(fresh.rows)} rows, {int(outside.sum())} outside",
                cure="Give one vector for each row.",
            )  # fmt: skip
