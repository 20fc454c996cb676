"""Every error this package raises on purpose.

The tree::

    HFCorrectorError
    ├── InputError(ValueError)            an argument or a file of the user's cannot be used
    │   ├── ConfigurationError            arguments that contradict each other or are out of range
    │   └── DataError                     queries, targets or judgements that do not fit together
    ├── CacheError(RuntimeError)          a cache of target embeddings cannot be used
    │   ├── CacheCorruptedError           bytes on disk are not the bytes that were written
    │   ├── CacheMismatchError            the vectors were made by another encoder or from other texts
    │   └── CacheIncompleteError          the build did not finish
    ├── CheckpointError(RuntimeError)     a training checkpoint cannot be resumed from
    ├── HubError(OSError)                 the Hub cannot be reached, refuses, or lacks what was asked for
    ├── DistributedError(RuntimeError)    another process of the run is gone, late or has failed
    └── MissingDependencyError(ImportError)   an optional package is not installed

Each message says what was expected, what was found and what to do about it.
"""

from __future__ import annotations


class HFCorrectorError(Exception):
    """Report a problem as where, expected, got and cure.

    Args:
        where: What was being looked at, for instance ``"corpus.jsonl, line 3"``.
        expected: What would have been right.
        got: What was found instead.
        cure: What the user can do about it, as an imperative.
    """

    def __init__(self, where: str, *, expected: str, got: str, cure: str) -> None:
        self.where, self.expected, self.got, self.cure = where, expected, got, cure
        super().__init__(f"{where}: expected {expected}; got {got}. {cure}")

    def __reduce__(self) -> tuple[object, ...]:
        """Survive pickling between processes, which would otherwise lose the keyword arguments."""
        return _rebuild, (type(self), self.where, self.expected, self.got, self.cure)


def _rebuild(cls: type[HFCorrectorError], where: str, expected: str, got: str, cure: str) -> HFCorrectorError:
    return cls(where, expected=expected, got=got, cure=cure)


class InputError(HFCorrectorError, ValueError):
    """An argument or a file of the user's cannot be used."""


class ConfigurationError(InputError):
    """Arguments contradict each other or are out of range."""


class DataError(InputError):
    """Queries, targets or judgements do not fit together."""


class CacheError(HFCorrectorError, RuntimeError):
    """A cache of target embeddings cannot be used."""


class CacheCorruptedError(CacheError):
    """Bytes on disk are not the bytes that were written."""


class CacheMismatchError(CacheError):
    """The cached vectors were made by another encoder or from other texts."""


class CacheIncompleteError(CacheError):
    """A cache build did not finish."""


class CheckpointError(HFCorrectorError, RuntimeError):
    """A training checkpoint cannot be resumed from."""


class HubError(HFCorrectorError, OSError):
    """The Hub cannot be reached, refuses, or lacks what was asked for."""


class DistributedError(HFCorrectorError, RuntimeError):
    """Another process of the run is gone, late or has failed."""


class MissingDependencyError(HFCorrectorError, ImportError):
    """An optional package is not installed."""
