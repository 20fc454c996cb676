"""Bridge between corrected targets and the overlay of a cache: re-encoded rows beside corrected ones.

Vectors of two versions of an encoder are never compared unaligned: an index that is half of one and half of the other
is worse than either. A re-encoded row is served while it is as good as current, else the corrected row of the cache is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from hf_corrector.cache.manifest import describe_encoder
from hf_corrector.cache.overlay import Overlay, OverlayEntries
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import CacheMismatchError, ConfigurationError
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.records import EncoderFingerprint


@dataclass(frozen=True)
class OverlayRules:
    """Which re-encoded rows may stand beside corrected ones.

    Attributes:
        encoder: The current encoder; rows it made itself are used as they are.
        step: The current training step.
        max_age: Rows of earlier versions are used as they are while younger than so many steps; 0 for never.
        corrections: A corrector for each earlier version, by its fingerprint's digest, that leads to the current one.
    """

    encoder: EncoderFingerprint
    step: int = 0
    max_age: int = 0
    corrections: Mapping[str, CorrectorModel] = field(default_factory=dict)


class OverlaidTargets:
    """Targets as the corrector sees them, with re-encoded rows where the rules allow them.

    Args:
        base: The cache's rows through the corrector, or as they are.
        overlay: The cache's overlay.
        rules: Which of its rows are used; may be replaced as training goes on.

    Raises:
        CacheMismatchError: If nothing moves the cache's rows to where the re-encoded ones are; names both versions.
        ConfigurationError: If base, overlay and corrections do not fit together.

    Attributes:
        dim: Size of a vector.
    """

    def __init__(self, base: CorrectedTargets, overlay: Overlay, *, rules: OverlayRules) -> None:
        self.base, self.overlay = base, overlay
        self.dim = base.dim
        self.rules = rules

    @property
    def rules(self) -> OverlayRules:
        """Which rows of the overlay are used."""
        return self._rules

    @rules.setter
    def rules(self, rules: OverlayRules) -> None:
        self._check_sizes(rules)
        base, cache = self.base, self.overlay.manifest
        plain = base.corrector is None or base.corrector.config.kind == "identity"
        unaligned = plain and not _same_version(cache.fingerprint, rules.encoder)
        self._refused = _unaligned(str(self.overlay.path), cache.fingerprint, rules.encoder) if unaligned else None
        if self._refused is not None and len(self.overlay):
            raise self._refused
        self._rules = rules

    def __len__(self) -> int:
        return len(self.base)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return rows ``start`` to ``stop`` (exclusive), ``(stop − start, dim)`` float32."""
        return self._overlaid(self.base.read(start, stop), np.arange(start, stop))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows in the order asked for, ``(n, dim)`` float32.

        Args:
            rows: Target rows, ``(n,)`` int64.
        """
        return self._overlaid(self.base.gather(rows), rows.cpu().numpy())

    def _overlaid(self, served: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
        found = self.overlay.find(rows)
        if not len(found):
            return served
        if self._refused is not None:  # they were appended after the rules were checked
            raise self._refused
        rules, out = self.rules, None
        current = found.stamps == rules.encoder.digest
        corrected = np.isin(found.stamps, list(rules.corrections)) & ~current
        young = (rules.step - found.steps < rules.max_age) & ~corrected
        pieces: list[tuple[OverlayEntries, CorrectorModel | None]] = [(found.select(current | young), None)]
        for stamp, correction in rules.corrections.items():
            pieces.append((found.select(corrected & (found.stamps == stamp)), correction))
        for entries, mover in pieces:
            if len(entries):
                # The base may hand out its snapshot or the file itself, neither of which is ours to write into.
                out = served.clone() if out is None else out
                out[torch.from_numpy(entries.positions).to(out.device)] = self._vectors(entries, mover)
        return served if out is None else out

    @torch.no_grad()
    def _vectors(self, entries: OverlayEntries, corrector: CorrectorModel | None) -> torch.Tensor:
        vectors = self.overlay.vectors(entries).to(self.base.device)
        return vectors if corrector is None else corrector(vectors)

    def _check_sizes(self, rules: OverlayRules) -> None:
        base, overlay = self.base, self.overlay
        cache = base.stale
        if not isinstance(cache, TargetCache) or cache.manifest != overlay.manifest:
            raise ConfigurationError(
                "overlaid targets", expected=f"the cache the overlay {overlay.path} belongs to",
                got=repr(cache) if isinstance(cache, TargetCache) else type(cache).__name__,
                cure="Open cache and overlay together, and again after an edit.",
            )  # fmt: skip
        sizes = {overlay.dim, *(int(one.config.output_dim or 0) for one in rules.corrections.values())}
        if sizes != {self.dim}:
            raise ConfigurationError(
                "overlaid targets", expected=f"re-encoded rows of size {self.dim}", got=f"sizes {sorted(sizes)}",
                cure="Overlay rows only for an encoder of the cache's size.",
            )  # fmt: skip
        reading = [one.config.side for one in rules.corrections.values() if one.config.side is not None]
        if reading:
            raise ConfigurationError(
                "overlaid targets", expected="corrections of re-encoded rows that read their vectors alone",
                got=f"one that reads {reading[0]!r}", cure="Fit it without side features.",
            )  # fmt: skip


def check_one_version(caches: Sequence[TargetCache]) -> None:
    """Make sure that caches that are searched together hold vectors of one version of one encoder.

    Raises:
        CacheMismatchError: If they do not; names two that differ.
    """
    for cache in caches[1:]:
        if not _same_version(cache.fingerprint, caches[0].fingerprint):
            raise _unaligned(f"{caches[0].path} and {cache.path}", caches[0].fingerprint, cache.fingerprint)


def _same_version(one: EncoderFingerprint, other: EncoderFingerprint) -> bool:
    """Compare encoders, whatever arithmetic they used."""
    return replace(one, compute_dtype=other.compute_dtype).digest == other.digest


def _unaligned(where: str, one: EncoderFingerprint, other: EncoderFingerprint) -> CacheMismatchError:
    return CacheMismatchError(
        where, expected="vectors of one version of an encoder",
        got=f"some of {describe_encoder(one)}, others of {describe_encoder(other)}, which differ in "
        + "; ".join(one.differences(other)),
        cure="Fit a corrector between the two, or encode all targets with one of them.",
    )  # fmt: skip
