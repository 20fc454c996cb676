"""An immutable store of target embeddings on disk: arrays, files and fingerprints; it knows no model.

:class:`TargetCache` reads, :class:`CacheWriter` builds what a :class:`CachePlan` describes and resumes after a crash,
:class:`CacheManifest` says who made the vectors and carries the checksums.
"""

from __future__ import annotations

from hf_corrector.cache.entries import ShardEntry, ShardRange
from hf_corrector.cache.ids import PackedIds
from hf_corrector.cache.manifest import CacheManifest, PlanRecord
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import CachePlan, CacheWriter, default_shard_rows

__all__ = [
    "CacheManifest", "CachePlan", "CacheWriter", "PackedIds", "PlanRecord", "ShardEntry", "ShardRange", "TargetCache",
    "default_shard_rows",
]  # fmt: skip
