"""What is remembered of an encoder and of a run, as plain frozen data.

:class:`EncoderFingerprint` says which encoder made a set of vectors, :class:`FittedTargets` what a corrector has seen;
:class:`RunRecord` is ``run.json``.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from hf_corrector._files import hash_strings, read_json, write_json
from hf_corrector.errors import InputError
from hf_corrector.version import __version__

RECORD_FILE = "run.json"
FITTED_FILE = "fitted_targets.json"
# What encoder passes are spent on, in texts.
COSTS = (
    "initial_target_passes", "train_target_passes", "refresh_target_passes", "rerank_target_passes",
    "final_target_passes", "query_passes",
)  # fmt: skip
RECORDED_PACKAGES = (
    "torch", "transformers", "datasets", "accelerate", "peft", "faiss-cpu", "evaluate", "huggingface-hub", "numpy",
)  # fmt: skip


@dataclass(frozen=True)
class EncoderFingerprint:
    """Everything that changes a vector: two encoders with equal fingerprints write equal caches.

    Attributes:
        name: Where the encoder came from (Hub id or folder); for people, not compared.
        revision: The Hub commit it came from, if known; for people, not compared.
        weights: Hash of the tower's weights (projection and merged adapters included).
        tokenizer: Hash of the tokenizer.
        prompt: Text put before every input.
        max_length: Inputs are cut to this many tokens.
        pooling: How token states become one vector.
        normalize: Whether vectors have unit length.
        role: ``"query"`` or ``"target"``.
        compute_dtype: Arithmetic the vectors were computed in, for instance ``"float32"``.
        corrected_from: Hash of the older encoder and of the corrector, where the vectors are not this encoder's own but
            older ones that were corrected towards it; None for vectors it made itself.
    """

    name: str
    weights: str
    tokenizer: str
    prompt: str
    max_length: int
    pooling: str
    normalize: bool
    role: str
    compute_dtype: str
    revision: str | None = None
    corrected_from: str | None = None

    @property
    def digest(self) -> str:
        """Hash of all that is compared, 32 hexadecimal digits."""
        compared = {key: value for key, value in self.to_dict().items() if key not in {"name", "revision"}}
        return hash_strings(f"{key}={compared[key]!r}" for key in sorted(compared))

    def differences(self, other: EncoderFingerprint) -> list[str]:
        """Name what differs, as ``"prompt: 'query: ' / ''"``; empty where the digests agree."""
        mine, theirs = asdict(self), asdict(other)
        compared = [key for key in mine if key not in {"name", "revision"}]
        return [f"{key}: {mine[key]!r} / {theirs[key]!r}" for key in compared if mine[key] != theirs[key]]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; what says nothing of vectors an encoder made itself is left out, as it always was."""
        plain = asdict(self)
        if self.corrected_from is None:
            del plain["corrected_from"]
        return plain

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> EncoderFingerprint:
        """Rebuild from :meth:`to_dict` or :func:`dataclasses.asdict`.

        Raises:
            InputError: If fields are missing or unknown.
        """
        return cls(**checked_fields(cls, value, where="encoder fingerprint"))

    @classmethod
    def of_precomputed(cls, name: str, *, normalize: bool, role: str = "target") -> EncoderFingerprint:
        """Stand for vectors whose encoder is not at hand; ``name`` is then all that tells two of them apart."""
        return cls(
            name=name, weights=hash_strings([name]), tokenizer="", prompt="", max_length=0, pooling="precomputed",
            normalize=normalize, role=role, compute_dtype="float32",
        )  # fmt: skip


@dataclass(frozen=True)
class FittedTargets:
    """What a corrector was fitted on, kept beside it: between which vectors it leads, and what it has seen.

    Attributes:
        cache: Checksum of the manifest of the cache whose vectors it corrects. The corrector stays right for what edits
            make of that cache, as all its vectors come from one encoder; rows do not, see ``ids``.
        encoder: Digest of the fingerprint of the encoder whose queries it serves, for targets in float32: the one that
            corrected targets lead to, or the one whose queries are mapped.
        rows: Target rows of the cache it was fitted on, ascending; queries looking for others are clean.
        ids: Ids of those rows, by which they are found again in a cache that was edited since; None where unknown.
        encoder_fingerprint: Fields of the fingerprint of that encoder; None where unknown.
        side_details: What the side features it was fitted with were made with (tokenizer, prompt, maximum length); None
            where unknown, or without side features.
        direction: ``"targets"``: it moves vectors of the cache. ``"queries"``: it maps queries of the encoder to the
            cache, whose vectors stay as they are.
    """

    cache: str
    encoder: str
    rows: tuple[int, ...]
    ids: tuple[str, ...] | None = None
    encoder_fingerprint: dict[str, Any] | None = None
    side_details: dict[str, Any] | None = None
    direction: str = "targets"

    def save(self, folder: Path) -> None:
        """Write into a corrector's folder durably."""
        write_json(folder / FITTED_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> FittedTargets | None:
        """Read from a corrector's folder; None where there is no such file.

        Raises:
            InputError: If the file is damaged.
        """
        path = folder / FITTED_FILE
        if not path.is_file():
            return None
        value = checked_fields(cls, read_json(path), where=str(path))
        rows, ids = tuple(int(row) for row in value["rows"]), value.get("ids")
        return cls(**{**value, "rows": rows, "ids": None if ids is None else tuple(ids)})


def shareable(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a fingerprint for others' eyes: of an encoder in a folder only the folder's own name.

    What came from the Hub is known by its revision; names are not compared.
    """
    if fingerprint.get("revision") is not None:
        return dict(fingerprint)
    return {**fingerprint, "name": PurePath(str(fingerprint.get("name", ""))).name}


def checked_fields(cls: type[Any], value: Any, *, where: str) -> dict[str, Any]:
    """Return ``value`` if its keys are fields of the dataclass ``cls`` and no required one is missing.

    Raises:
        InputError: Otherwise, naming the keys.
    """
    if not isinstance(value, dict):
        raise InputError(where, expected="an object", got=type(value).__name__, cure="Restore the file.")
    known = {item.name for item in fields(cls)}
    required = {item.name for item in fields(cls) if not _has_default(item)}
    missing, unknown = sorted(required - value.keys()), sorted(value.keys() - known)
    if missing or unknown:
        raise InputError(
            where, expected=f"the fields {sorted(known)}", got=f"missing {missing}, unknown {unknown}",
            cure="Open it with the version of hf_corrector that wrote it.",
        )  # fmt: skip
    return value


def _has_default(item: Any) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING


def collect_versions() -> dict[str, str]:
    """Return the versions of this package, of Python and of every core dependency that is installed."""
    versions = {"hf_corrector": __version__, "python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def describe_machine() -> str:
    """Return one line on the processor, for benchmark output; names no host and no user."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


@dataclass(frozen=True)
class RunRecord:
    """What one run did and measured; reports and model cards are rendered from it alone.

    Attributes:
        command: What was run, for instance ``"train"``.
        seed: The seed all random choices were keyed by.
        arguments: The arguments as given, JSON values only.
        versions: Package versions, see :func:`collect_versions`.
        evaluation: Quality by condition; ``evaluation["corrected"]["mrr@10"]``.
        fidelity: How close the sampling distribution is to the exact one.
        cost: Encoder forward passes by purpose, in texts.
        timing: Seconds by phase.
        manifests: Manifests of the caches involved.
        history: Logged training steps.
        rows: What was compared, one object per method: metrics, recovery, passes, seconds.
        verdict: What follows from it: the sentence, and where a decision was asked for that and its thresholds.
        examples: A few judged queries with their results, see :mod:`hf_corrector.evaluation.examples`; these are the
            only texts of queries and targets in a record.
        corrector: What the corrector says of itself, where one was fitted: kind, sizes, both encoders.
        created: Unix time of the record.
        machine: Processor.
    """

    command: str
    seed: int
    arguments: dict[str, Any]
    versions: dict[str, str] = field(default_factory=collect_versions)
    evaluation: dict[str, Any] = field(default_factory=dict)
    fidelity: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    manifests: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    verdict: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, Any] = field(default_factory=dict)
    corrector: dict[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)
    machine: str = field(default_factory=describe_machine)

    def save(self, folder: Path) -> Path:
        """Write ``run.json`` into ``folder`` durably and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RECORD_FILE, asdict(self))
        return folder / RECORD_FILE

    @classmethod
    def load(cls, folder: Path) -> RunRecord:
        """Read ``run.json`` from ``folder``.

        Raises:
            InputError: If it is no run record.
            FileNotFoundError: If there is none.
        """
        path = folder / RECORD_FILE
        return cls(**checked_fields(cls, read_json(path), where=str(path)))
