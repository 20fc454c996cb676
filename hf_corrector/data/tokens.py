"""Texts tokenised once and kept in memory-mapped files.

A store is a folder: ``tokens.npy`` (int32, all texts one after the other), ``offsets.npy`` (int64, where each text
starts, and the end of the last) and ``store.json``, written last, with the key and a checksum of both. A folder without
``store.json`` is an unfinished build and counts as none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from tqdm.auto import tqdm

from hf_corrector._files import atomic_write, fsync_directory, hash_strings, read_json, write_json, xxh3
from hf_corrector.errors import CacheCorruptedError, CacheIncompleteError, CacheMismatchError, DataError, InputError
from hf_corrector.records import checked_fields

Tokenize = Callable[[list[str]], list[list[int]]]
Verify = Literal["sizes", "full"]

FORMAT_VERSION = 1
TOKENS_FILE, OFFSETS_FILE, MANIFEST_FILE = "tokens.npy", "offsets.npy", "store.json"
TEXTS_PER_CALL = 1000
REBUILD = "Delete the folder and build it again."


def token_store_key(*, tokenizer: str, prompt: str, max_length: int, texts_hash: str) -> str:
    """Hash all that decides the tokens: the tokenizer's fingerprint, the prompt, the cut and the texts."""
    return hash_strings(["token store", tokenizer, prompt, str(max_length), texts_hash])


@dataclass(frozen=True)
class _Manifest:
    format_version: int
    key: str
    texts: int
    tokens: int
    bytes: dict[str, int]
    xxh3: dict[str, str]


class TokenStore:
    """Token lists by row, read from memory-mapped files; made with :meth:`build`, :meth:`open` or both.

    Pickling keeps the path and the key, and unpickling maps the files again, so that worker processes share the pages.
    """

    def __init__(self, path: Path, key: str, *, offsets: npt.NDArray[np.int64], tokens: npt.NDArray[np.int32]) -> None:
        self.path, self.key = path, key
        self._offsets, self._tokens = offsets, tokens
        self._lengths = np.diff(offsets).astype(np.int32)

    @classmethod
    def build(
        cls, path: str | Path, texts: Sequence[str], tokenize: Tokenize, *, key: str, progress: bool = False
    ) -> TokenStore:
        """Tokenise ``texts`` and write the store; an existing one is replaced.

        Args:
            path: Folder for the files; made if missing.
            texts: One text per row.
            tokenize: Turns a list of texts into as many lists of token ids; called with 1000 texts at a time.
            key: What :meth:`open` must be given to accept the store, see :func:`token_store_key`.
            progress: Show a progress bar.

        Raises:
            DataError: If there are no texts, or ``tokenize`` returns another number of lists, or ids beyond int32.
        """
        folder = Path(path)
        if not len(texts):
            raise DataError("texts", expected="at least one text", got="none", cure="Check the corpus.")
        folder.mkdir(parents=True, exist_ok=True)
        # Without its manifest the old store is none, so that a crash below cannot leave a mixture that looks whole.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        fsync_directory(folder)
        lengths: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        batches = _token_batches(texts, tokenize, lengths, progress=progress)
        atomic_write(folder / TOKENS_FILE, lambda temporary: _write_growing_array(temporary, batches))
        offsets = np.cumsum(np.concatenate(lengths))
        atomic_write(folder / OFFSETS_FILE, lambda temporary: _write_array(temporary, offsets))
        sums = {name: _map_bytes(folder / name) for name in (TOKENS_FILE, OFFSETS_FILE)}
        manifest = _Manifest(
            format_version=FORMAT_VERSION, key=key, texts=len(texts), tokens=int(offsets[-1]),
            bytes={name: data.nbytes for name, data in sums.items()},
            xxh3={name: xxh3(data) for name, data in sums.items()},
        )  # fmt: skip
        write_json(folder / MANIFEST_FILE, asdict(manifest))
        return cls.open(folder, key=key, verify="sizes")

    @classmethod
    def open(cls, path: str | Path, *, key: str, verify: Verify = "full") -> TokenStore:
        """Map the files of a finished store.

        Args:
            path: Its folder.
            key: The key it must have been built with.
            verify: ``"full"`` reads everything and compares checksums, ``"sizes"`` only compares sizes.

        Raises:
            CacheIncompleteError: If there is no finished store.
            CacheMismatchError: If it has another key.
            CacheCorruptedError: If its files are not what was written.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        if manifest.key != key:
            raise CacheMismatchError(
                str(folder), expected=f"tokens with the key {key}", got=f"the key {manifest.key}",
                cure="Tokenizer, prompt, max_length or texts differ; choose another folder or delete this one.",
            )  # fmt: skip
        for name in (TOKENS_FILE, OFFSETS_FILE):
            _check_file(folder / name, manifest, verify=verify)
        tokens, offsets = _map_array(folder / TOKENS_FILE), _map_array(folder / OFFSETS_FILE)
        _check_arrays(folder, manifest, tokens, offsets)
        return cls(folder, key, offsets=offsets, tokens=tokens)

    @classmethod
    def open_or_build(
        cls, path: str | Path, texts: Sequence[str], tokenize: Tokenize, *, key: str, progress: bool = False
    ) -> TokenStore:
        """Open the store, or build it if there is none or its build did not finish.

        Raises:
            CacheMismatchError: If there is one with another key; it is left alone.
            CacheCorruptedError: If there is one and it is damaged; it is left alone.
            DataError: See :meth:`build`.
        """
        try:
            return cls.open(path, key=key)
        except CacheIncompleteError:
            return cls.build(path, texts, tokenize, key=key, progress=progress)

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.key)

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Number of tokens of every text, ``(rows,)``."""
        return self._lengths

    def tokens(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> list[list[int]]:
        """Return the token ids of the given rows, in their order; rows may repeat.

        Raises:
            DataError: If a row is negative or past the end.
        """
        wanted = np.asarray(rows, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise DataError(
                "rows", expected=f"rows from 0 to {len(self) - 1}", got=f"{wanted.min()} to {wanted.max()}",
                cure="Use rows of the texts this store was built from.",
            )  # fmt: skip
        starts, ends = self._offsets[wanted].tolist(), self._offsets[wanted + 1].tolist()
        return [self._tokens[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def _reopen(path: Path, key: str) -> TokenStore:
    return TokenStore.open(path, key=key, verify="sizes")


def _token_batches(
    texts: Sequence[str], tokenize: Tokenize, lengths: list[npt.NDArray[np.int64]], *, progress: bool
) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the tokens of a thousand texts at a time, and append their lengths to ``lengths``."""
    with tqdm(total=len(texts), desc="Tokenizing", unit="text", disable=not progress) as bar:
        for start in range(0, len(texts), TEXTS_PER_CALL):
            batch = list(texts[start : start + TEXTS_PER_CALL])
            token_lists = tokenize(batch)
            where = f"tokenize, texts {start} to {start + len(batch) - 1}"
            if len(token_lists) != len(batch):
                raise DataError(
                    where, expected=f"{len(batch)} token lists", got=f"{len(token_lists)}", cure="Return one per text."
                )
            lengths.append(np.array([len(tokens) for tokens in token_lists], dtype=np.int64))
            flat = np.array(list(chain.from_iterable(token_lists)), dtype=np.int64)
            if len(flat) and not 0 <= flat.min() <= flat.max() <= np.iinfo(np.int32).max:
                raise DataError(
                    where, expected="token ids from 0 to 2**31 - 1", got=f"{flat.min()} to {flat.max()}",
                    cure="Check the tokenizer.",
                )  # fmt: skip
            yield flat.astype(np.int32)
            bar.update(len(batch))


def _write_growing_array(path: Path, parts: Iterator[npt.NDArray[np.int32]]) -> None:
    """Write one int32 ``.npy`` file part by part; its header, of constant size, is written again at the end."""
    with open(path, "wb") as handle:
        size = _write_header(handle, 0)
        total = 0
        for part in parts:
            handle.write(part.tobytes())
            total += len(part)
        handle.seek(0)
        if _write_header(handle, total) != size:
            raise CacheCorruptedError(
                str(path),
                expected="a .npy header of constant size",
                got="two sizes",
                cure=f"Report numpy {np.__version__}.",
            )


def _write_header(handle: BinaryIO, length: int) -> int:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<i4")), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(handle, header)
    return handle.tell()


def _write_array(path: Path, array: npt.NDArray[np.int64]) -> None:
    with open(path, "wb") as handle:
        np.save(handle, array.astype("<i8"), allow_pickle=False)


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST_FILE
    try:
        manifest = _Manifest(**checked_fields(_Manifest, read_json(path), where=str(path)))
    except FileNotFoundError as error:
        raise CacheIncompleteError(
            str(folder), expected="a finished token store", got=f"no {MANIFEST_FILE}", cure="Build it."
        ) from error
    except InputError as error:
        raise CacheCorruptedError(error.where, expected=error.expected, got=error.got, cure=REBUILD) from error
    if manifest.format_version != FORMAT_VERSION:
        raise CacheMismatchError(
            str(path), expected=f"format version {FORMAT_VERSION}", got=f"{manifest.format_version}", cure=REBUILD
        )
    return manifest


def _map_bytes(path: Path) -> memoryview:
    return np.memmap(path, dtype=np.uint8, mode="r").data


def _check_file(path: Path, manifest: _Manifest, *, verify: Verify) -> None:
    expected, found = manifest.bytes.get(path.name), path.stat().st_size if path.exists() else None
    if found is None or found != expected:
        raise CacheCorruptedError(
            str(path), expected=f"{expected} bytes", got="no file" if found is None else f"{found} bytes", cure=REBUILD
        )
    if verify == "full":
        digest = xxh3(_map_bytes(path))
        if digest != manifest.xxh3.get(path.name):
            raise CacheCorruptedError(
                str(path), expected=f"the checksum {manifest.xxh3.get(path.name)}", got=digest, cure=REBUILD
            )


def _map_array(path: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise CacheCorruptedError(str(path), expected="a .npy array", got=str(error), cure=REBUILD) from error
    return array


def _check_arrays(folder: Path, manifest: _Manifest, tokens: npt.NDArray[Any], offsets: npt.NDArray[Any]) -> None:
    shapes_fit = manifest.texts > 0 and tokens.shape == (manifest.tokens,) and offsets.shape == (manifest.texts + 1,)
    types_fit = tokens.dtype == np.int32 and offsets.dtype == np.int64
    if shapes_fit and types_fit and offsets[0] == 0 and offsets[-1] == len(tokens) and (np.diff(offsets) >= 0).all():
        return
    raise CacheCorruptedError(
        str(folder), expected=f"{manifest.texts} texts of {manifest.tokens} tokens in all",
        got=f"{offsets.dtype} offsets {offsets.shape} into {tokens.dtype} tokens {tokens.shape}", cure=REBUILD,
    )  # fmt: skip
