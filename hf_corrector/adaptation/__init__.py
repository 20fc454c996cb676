"""Keep correcting while the encoder moves on outside of a training run.

:class:`~.streaming_corrector.StreamingCorrector` follows a stream of pairs, :class:`.DriftDetector` (of
:mod:`hf_corrector.drift_detection`, which training uses as well) says when that is no longer enough, and
:class:`~.adaptive_cache.AdaptiveCache` does what it says to a cache.
"""

from __future__ import annotations

from hf_corrector.adaptation.adaptive_cache import AdaptiveCache, AdaptiveSettings, Passes, StoredTargetEncoder
from hf_corrector.adaptation.streaming_corrector import StreamingCorrector, StreamingOptions
from hf_corrector.drift_detection import AdaptationPolicy, Decision, DriftDetector

__all__ = [
    "AdaptationPolicy", "AdaptiveCache", "AdaptiveSettings", "Decision", "DriftDetector", "Passes",
    "StoredTargetEncoder", "StreamingCorrector", "StreamingOptions",
]  # fmt: skip
