"""Approximate search by faiss: an index made from target vectors, kept as a file beside a sealed description.

Scores are inner products; for vectors of unit length they are cosines. An index of this kind makes a shortlist and is
never the source of truth: rows may be missing, and scores of compressed vectors are off.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import torch

from hf_corrector._files import atomic_write, make_directory, read_json, write_json, xxh3
from hf_corrector.errors import ConfigurationError, InputError
from hf_corrector.index.base import MAX_ROWS, SearchResult, TargetVectors, pack, unpack
from hf_corrector.index.exact import RowMask, checked_search
from hf_corrector.index.scan import measured

INDEX_FILE = "index.faiss"
DESCRIPTION_FILE = "index.json"

_ADDED_ROWS = 65_536
_REBUILD = "Build the index again from its vectors; that needs no encoder."


@dataclass(frozen=True)
class FaissParameters:
    """How thoroughly an index is searched; None leaves what the index has.

    Attributes:
        nprobe: Lists of an IVF index that are looked into.
        ef_search: Length of the queue of an HNSW index.
        k_factor: How many times more a refined index (``RFlat``) takes from its compressed part.
    """

    nprobe: int | None = None
    ef_search: int | None = None
    k_factor: int | None = None

    def given(self) -> dict[str, int]:
        """Return what is given, by faiss' names."""
        names = {"nprobe": self.nprobe, "efSearch": self.ef_search, "k_factor_rf": self.k_factor}
        return {name: value for name, value in names.items() if value is not None}


@dataclass(frozen=True)
class FaissDescription:
    """What an index file holds and what it was made from.

    Attributes:
        factory: Factory string.
        parameters: How it is searched by default.
        rows: Number of targets.
        dim: Size of a vector.
        source: What the vectors were, for instance the checksum of a cache's manifest; empty if not said.
        train_rows: At most so many vectors were trained on.
        seed: They were drawn with this seed.
        faiss_version: The version that made it.
        file_bytes: Size of the index file.
        file_hash: Hash of the index file, 64-bit xxh3.
    """

    factory: str
    parameters: FaissParameters
    rows: int
    dim: int
    source: str = ""
    train_rows: int = 200_000
    seed: int = 0
    faiss_version: str = field(default_factory=lambda: str(faiss.__version__))
    file_bytes: int = 0
    file_hash: str = ""


class FaissIndex:
    """Approximate inner-product search. Make one with :meth:`build` or :meth:`load`.

    Rebuilding from the same vectors gives the same index, but for HNSW graphs built by several threads and for
    factories with OPQ or PCA (facebookresearch/faiss issue 983).

    Args:
        index: The faiss index.
        description: What it holds.
    """

    def __init__(self, index: Any, description: FaissDescription) -> None:
        self.index, self.description = index, description

    @classmethod
    def build(
        cls, vectors: TargetVectors, factory: str, *, parameters: FaissParameters | None = None, source: str = "",
        train_rows: int = 200_000, seed: int = 0,
    ) -> FaissIndex:  # fmt: skip
        """Make an index of all target vectors, read chunk by chunk.

        Args:
            vectors: The targets.
            factory: What to make, in faiss' words: ``"Flat"``, ``"IVF512,Flat"``, ``"HNSW32"``,
                ``"IVF512,PQ96x4fs,RFlat"``, ...
            parameters: How it is searched unless a search says otherwise.
            source: What the vectors are, to be told apart later; for a cache the checksum of its manifest.
            train_rows: Train clusters and codes on at most so many vectors, drawn without replacement.
            seed: Seed of that draw.

        Raises:
            ConfigurationError: If faiss knows no such index or parameter, or numbers are out of range.
            DataError: If a vector is not finite, or there are too few to train on.
        """
        if train_rows < 1 or not 0 < len(vectors) < MAX_ROWS:
            raise ConfigurationError(
                "faiss index", expected=f"1 to {MAX_ROWS - 1} targets, train_rows >= 1",
                got=f"{len(vectors)} targets, train_rows={train_rows}", cure="Correct the argument.",
            )  # fmt: skip
        parameters = FaissParameters() if parameters is None else parameters
        description = FaissDescription(
            factory, parameters, len(vectors), vectors.dim, source, train_rows=train_rows, seed=seed
        )
        made = cls(_from_factory(factory, vectors.dim), description)
        made._set(parameters)
        if not made.index.is_trained:
            sample = _sample(vectors, train_rows, seed)
            _call(lambda: made.index.train(sample), factory, "vectors to train it on", f"{len(sample)}")
        for start in range(0, len(vectors), _ADDED_ROWS):
            chunk = _read(vectors, start, min(start + _ADDED_ROWS, len(vectors)))
            _call(made.index.add, factory, "an index that numbers its rows itself", "another", chunk)
        return made

    def __len__(self) -> int:
        """Return the number of targets."""
        return self.description.rows

    @property
    def dim(self) -> int:
        """Size of a vector."""
        return self.description.dim

    def search(
        self,
        queries: torch.Tensor,
        k: int,
        *,
        excluded: Sequence[npt.NDArray[np.int64]] | None = None,
        parameters: FaissParameters | None = None,
    ) -> SearchResult:
        """Find about the ``k`` targets of highest inner product for each query.

        faiss breaks ties as it likes. Those inside a result are ordered by row; which of equal targets are in it at
        the k-th place is not defined.

        Args:
            queries: Query vectors, ``(queries, dim)``.
            k: How many targets to return; -1 where faiss found fewer.
            excluded: For each query target rows that must not be returned. As many more are searched for.
            parameters: How thoroughly, from this search on.

        Raises:
            ConfigurationError: If ``k`` is below 1 or the index has no such parameter.
            DataError: If shapes do not fit, excluded rows do not exist or a query is not finite.
        """
        asked = np.ascontiguousarray(checked_search(queries, k, self).cpu().numpy(), dtype=np.float32)
        self._set(FaissParameters() if parameters is None else parameters)
        RowMask(excluded, queries=len(asked), targets=len(self))  # refuses what does not fit
        more = max((len(rows) for rows in excluded or []), default=0)
        fetched = min(k + more, len(self))
        if not len(asked):
            return SearchResult(torch.full((0, k), -1), torch.zeros(0, k))
        found_scores, found_rows = self.index.search(asked, fetched)
        if more and excluded is not None:
            for line, hidden in enumerate(excluded):
                found_rows[line, np.isin(found_rows[line], hidden)] = -1
        rows, scores = torch.from_numpy(found_rows), torch.from_numpy(found_scores)
        scores = scores.masked_fill(rows < 0, float("-inf"))
        keys = pack(scores, rows.clamp(min=0)).topk(min(k, fetched), dim=1).values
        if fetched < k:
            keys = torch.nn.functional.pad(keys, (0, k - fetched), value=torch.iinfo(torch.int64).min)
        return SearchResult(*unpack(keys))

    def save(self, path: str | Path) -> None:
        """Write the index and its sealed description into a folder, which is created if need be.

        Args:
            path: Folder; an index in it is replaced.
        """
        folder = Path(path)
        make_directory(folder)
        # In this order a crash in between leaves a description that does not match, which is noticed.
        atomic_write(folder / INDEX_FILE, lambda temporary: faiss.write_index(self.index, str(temporary)))
        size, digest = _file_facts(folder / INDEX_FILE)
        content = {**asdict(self.description), "file_bytes": size, "file_hash": digest}
        write_json(folder / DESCRIPTION_FILE, {"seal": _seal(content), **content})

    @classmethod
    def load(cls, path: str | Path, *, trust_index: bool = False, source: str | None = None) -> FaissIndex:
        """Read what :meth:`save` wrote.

        Args:
            path: Folder.
            trust_index: Say that the file is your own. faiss' reader is no sandbox: a file made to harm can make it
                write where it must not. Hashes here guard against damage, not against forgery.
            source: What the vectors must have been, see :meth:`build`; not compared if not given.

        Raises:
            ConfigurationError: Without ``trust_index=True``.
            InputError: If files are damaged, or the index is of other vectors.
        """
        folder = Path(path)
        if not trust_index:
            raise ConfigurationError(
                str(folder), expected="trust_index=True to read a faiss file, as faiss' reader can be attacked by one",
                got="trust_index=False", cure=f"Pass it for a file you made yourself. {_REBUILD}",
            )  # fmt: skip
        description = _read_description(folder)
        if source is not None and description.source != source:
            raise InputError(
                str(folder), expected=f"an index of {source}", got=f"one of {description.source or 'unnamed vectors'}",
                cure=_REBUILD,
            )  # fmt: skip
        index = _call(lambda: faiss.read_index(str(folder / INDEX_FILE)), str(folder), "a faiss index", "another file")
        held = (index.ntotal, index.d, index.metric_type)
        if held != (description.rows, description.dim, faiss.METRIC_INNER_PRODUCT):
            raise InputError(
                str(folder), expected=f"{description.rows} rows of size {description.dim} under inner product",
                got=f"rows, size, metric {held}", cure=_REBUILD,
            )  # fmt: skip
        loaded = cls(index, description)
        loaded._set(description.parameters)
        return loaded

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows as the index has them, ``(stop - start, dim)`` float32: exact or not, as its codes are.

        Raises:
            ConfigurationError: If it cannot give them back.
        """
        return torch.from_numpy(
            _call(lambda: self.index.reconstruct_n(start, stop - start), self.description.factory,
                  "an index that can give its rows back", "another")
        )  # fmt: skip

    def _set(self, parameters: FaissParameters) -> None:
        for name, value in parameters.given().items():
            if value < 1:
                raise ConfigurationError("faiss", expected=f"{name} >= 1", got=str(value), cure="Correct it.")
            _call(faiss.ParameterSpace().set_index_parameter, self.description.factory, f"an index with {name}",
                  "one without", self.index, name, value)  # fmt: skip


def _from_factory(factory: str, dim: int) -> Any:
    index = _call(
        lambda: faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT), f"faiss factory {factory!r}",
        f"an index of inner products of vectors of size {dim}", "none",
    )  # fmt: skip
    if index.ntotal or index.d != dim:
        raise ConfigurationError(factory, expected="an empty index", got=f"{index.ntotal} rows", cure="Name another.")
    return index


def _call(function: Any, where: str, expected: str, got: str, *values: Any) -> Any:
    """Call faiss and turn its errors, all RuntimeError, into ours; the last line of them says what it minded."""
    try:
        return function(*values)
    except RuntimeError as error:
        said = str(error).strip().splitlines()[-1][-200:]
        raise ConfigurationError(
            where, expected=expected, got=f"{got} (faiss: {said})", cure="Choose another factory or parameter."
        ) from error


def _read(vectors: TargetVectors, start: int, stop: int) -> npt.NDArray[np.float32]:
    chunk = vectors.read(start, stop).detach()
    measured(chunk, start)
    return np.ascontiguousarray(chunk.cpu().float().numpy())


def _sample(vectors: TargetVectors, train_rows: int, seed: int) -> npt.NDArray[np.float32]:
    """Draw vectors to train on, in row order, without holding all of them."""
    count = min(train_rows, len(vectors))
    picked = np.sort(np.random.default_rng(seed).choice(len(vectors), size=count, replace=False))
    pieces = []
    for start in range(0, len(vectors), _ADDED_ROWS):
        stop = min(start + _ADDED_ROWS, len(vectors))
        begin, end = np.searchsorted(picked, [start, stop])
        if end > begin:
            pieces.append(_read(vectors, start, stop)[picked[begin:end] - start])
    return np.concatenate(pieces)


def _seal(content: dict[str, Any]) -> str:
    return xxh3(json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode())


def _file_facts(path: Path) -> tuple[int, str]:
    """Return size and hash of a file."""
    size = path.stat().st_size
    if not size:
        return 0, xxh3(b"")
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        view = memoryview(mapped)
        digest = xxh3(view)
        view.release()
    return size, digest


def _read_description(folder: Path) -> FaissDescription:
    """Read the description and hold the index file against it."""
    try:
        content = read_json(folder / DESCRIPTION_FILE)
        facts = _file_facts(folder / INDEX_FILE)
    except FileNotFoundError as error:
        raise InputError(
            str(folder), expected=f"{INDEX_FILE} and {DESCRIPTION_FILE}", got=f"no {Path(error.filename).name}",
            cure="Name a folder that an index was saved to.",
        ) from error  # fmt: skip
    seal = content.pop("seal", None) if isinstance(content, dict) else None
    if seal is None or seal != _seal(content):
        raise InputError(
            str(folder / DESCRIPTION_FILE), expected="a description that agrees with its seal", got="another",
            cure=_REBUILD,
        )  # fmt: skip
    try:
        description = FaissDescription(**{**content, "parameters": FaissParameters(**content["parameters"])})
    except (TypeError, KeyError) as error:
        raise InputError(
            str(folder / DESCRIPTION_FILE), expected="the description of a faiss index", got=str(error), cure=_REBUILD
        ) from error
    if facts != (description.file_bytes, description.file_hash):
        raise InputError(
            str(folder / INDEX_FILE), expected=f"{description.file_bytes} bytes of hash {description.file_hash}",
            got=f"{facts[0]} bytes of hash {facts[1]}", cure=_REBUILD,
        )  # fmt: skip
    return description
