"""A cache that stays usable while its encoder moves on: pairs in, decisions out, and what was decided done."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from hf_corrector.adaptation.streaming_corrector import StreamingCorrector
from hf_corrector.cache.overlay import Overlay, OverlayWriter
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.cache.writer import CachePlan, CacheWriter
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.tokens import TokenStore
from hf_corrector.drift_detection import AdaptationPolicy, Decision, DriftDetector
from hf_corrector.encoding import DEFAULT_SHARD_ROWS, EncodeOptions, encode_rows
from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.metrics import FloatArray, IntArray
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.overlaid_targets import OverlaidTargets, OverlayRules
from hf_corrector.planning.worst_first import MAX_LANDMARKS, ResidualPredictor, worst_first
from hf_corrector.records import EncoderFingerprint
from hf_corrector.side_features import SideFeatures

_FEWEST_RESIDUALS = 10


class TargetEncoder(Protocol):
    """The encoder of now, and the texts of all targets."""

    def fingerprint(self) -> EncoderFingerprint:
        """Return what it is; asked for after every move."""

    def encode(self, rows: IntArray) -> torch.Tensor:
        """Encode targets by row, ``(n, dim)`` float32 on the CPU."""


@dataclass(frozen=True)
class StoredTargetEncoder:
    """A model and the tokenised corpus.

    Attributes:
        model: The encoder; may be trained on between calls.
        tokens: The targets' tokens, see :func:`~hf_corrector.encoding.tokenize_texts`.
        options: How to encode.
    """

    model: DualEncoderModel
    tokens: TokenStore
    options: EncodeOptions = field(default_factory=lambda: EncodeOptions(progress=False))

    def fingerprint(self) -> EncoderFingerprint:
        """Return what the model is by now."""
        return self.model.fingerprint("target", compute_dtype=self.options.compute_dtype)

    def encode(self, rows: IntArray) -> torch.Tensor:
        """Encode targets by row, ``(n, dim)``, without dropout."""
        module: torch.nn.Module = self.model
        training = module.training
        module.eval()
        vectors = encode_rows(self.model, self.tokens, rows, options=self.options)
        module.train(training)
        return vectors


@dataclass(frozen=True, eq=False)
class AdaptiveSettings:
    """What an adaptive cache knows beside its vectors.

    Attributes:
        side: Side features of the targets, for a corrector that reads some.
        traffic: How often each target is asked for, ``(targets,)``, to weigh the order in which rows are re-encoded;
            by residual alone if None, which leaves less wrong, see :mod:`hf_corrector.planning.worst_first`.
        max_age: Re-encoded rows of earlier versions of the encoder are served as they are while younger than so many
            steps, see :class:`~hf_corrector.overlaid_targets.OverlayRules`.
        refresh_folder: Where caches made anew go, each in a folder of its own; beside the cache if None.
        shard_rows: Rows of a shard of those.
        refit_pairs: When the corrector is refitted because the bound was crossed, all earlier pairs together count from
            then on as so many new ones at most.
        snapshot_bytes: Keep corrected rows in memory if they need no more than this; made anew after every fit.
        seed: Seed of the rows that :meth:`AdaptiveCache.probe` draws.
    """

    side: SideFeatures | None = None
    traffic: FloatArray | None = None
    max_age: int = 0
    refresh_folder: Path | None = None
    shard_rows: int = DEFAULT_SHARD_ROWS
    refit_pairs: float = 256.0
    snapshot_bytes: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Passes:
    """Encoder passes of targets, by what they were for.

    Attributes:
        given: Encoded by someone else, who handed in the vectors.
        probed: Drawn and encoded by :meth:`AdaptiveCache.probe`.
        worst: Re-encoded worst first.
        refreshed: Encoded to make the cache anew.
    """

    given: int = 0
    probed: int = 0
    worst: int = 0
    refreshed: int = 0

    @property
    def spent(self) -> int:
        """Passes this cache asked for itself."""
        return self.probed + self.worst + self.refreshed


class AdaptiveCache:
    """Serve a cache through a corrector that follows its moving encoder, and re-encode when that is not enough.

    ::

        adaptive = AdaptiveCache(cache, StreamingCorrector(corrector), encoder, policy=AdaptationPolicy(bound=0.2))
        for step, (rows, fresh) in enumerate(stream):
            adaptive.encoder_moved(step=step)
            decision = adaptive.observe(rows, fresh)
        found = ExactIndex(adaptive.targets).search(queries, 10)

    Args:
        cache: Vectors of an earlier encoder.
        streaming: Follows the drift; its corrector leads from the cache's vectors to the encoder of now.
        encoder: The encoder of now.
        policy: What to do when.
        settings: What else is known.

    Raises:
        ConfigurationError: If rows are to be re-encoded that could not be served beside the corrected ones.

    Attributes:
        targets: All targets as they are served: corrected, or re-encoded where that is recent.
        cache: The vectors in use; another cache after a full refresh.
        detector: What decides.
        passes: Encoder passes so far.
    """

    def __init__(
        self,
        cache: TargetCache,
        streaming: StreamingCorrector,
        encoder: TargetEncoder,
        *,
        policy: AdaptationPolicy,
        settings: AdaptiveSettings | None = None,
    ) -> None:
        self.streaming, self.policy, self._encoder = streaming, policy, encoder
        self._settings = AdaptiveSettings() if settings is None else settings
        self.detector, self.passes = DriftDetector(policy, targets=len(cache)), Passes()
        self._check(cache)
        self._made_by, self._step, self._probes = encoder.fingerprint(), 0, 0
        self._use(cache)

    def _check(self, cache: TargetCache) -> None:
        config, traffic = self.streaming.corrector.config, self._settings.traffic
        serves = config.kind != "identity" and config.output_dim == cache.dim
        if not serves and "refresh_worst" in self.policy.actions:
            raise ConfigurationError(
                "adaptive cache", expected=f"a corrector to vectors of size {cache.dim}, beside which re-encoded ones "
                "can stand", got=f"kind {config.kind!r} to size {config.output_dim}",
                cure="Leave 'refresh_worst' out of the policy's actions.",
            )  # fmt: skip
        if traffic is not None and traffic.shape != (len(cache),):
            raise ConfigurationError(
                "adaptive cache", expected=f"traffic of {len(cache)} targets", got=f"shape {traffic.shape}",
                cure="Give a target without traffic a 0.",
            )  # fmt: skip

    def _use(self, cache: TargetCache) -> None:
        self.cache = cache
        self._corrected = CorrectedTargets(
            cache, self.streaming.corrector, side=self._settings.side, snapshot_bytes=self._settings.snapshot_bytes
        )
        self._residuals: dict[int, float] = {}
        self.targets = OverlaidTargets(self._corrected, Overlay.open(cache), rules=self._rules())

    def _rules(self) -> OverlayRules:
        return OverlayRules(self._made_by, step=self._step, max_age=self._settings.max_age)

    def encoder_moved(self, *, step: int) -> None:
        """Note that the encoder was updated; rows it made before are served only as the settings' ``max_age`` says.

        Args:
            step: Its training step, or any count that grows.
        """
        self._made_by, self._step = self._encoder.fingerprint(), step
        self.targets.rules = self._rules()

    def observe(
        self,
        rows: torch.Tensor,
        fresh: torch.Tensor,
        *,
        uniform: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> Decision:
        """Take in targets that someone has encoded: judge, learn, decide, act.

        Args:
            rows: Target rows, ``(n,)`` int64.
            fresh: Their vectors by the encoder of now, ``(n, dim)``.
            uniform: Which of them were drawn uniformly from all targets, ``(n,)`` bool; all if not given. Only these
                say how wrong the others are.
            weights: Weight of each pair in the fit, ``(n,)``; 1 if not given.

        Returns:
            The decision; what it says has been done.

        Raises:
            DataError: If rows, vectors and mask do not fit together, or a row is none of the cache's.
        """
        decision = self._observe(rows, fresh, uniform=uniform, weights=weights)
        self.passes = replace(self.passes, given=self.passes.given + len(rows))
        return decision

    def probe(self, count: int) -> Decision:
        """Draw targets uniformly, encode them, and observe; for streams in which none are drawn so.

        Args:
            count: How many to encode; drawn with replacement, by seed and number of the probe.
        """
        generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + self._probes)
        rows = torch.randint(len(self.cache), (count,), generator=generator)
        unique, places = torch.unique(rows, return_inverse=True)
        fresh = self._encoder.encode(unique.numpy())
        self._probes += 1
        self.passes = replace(self.passes, probed=self.passes.probed + len(unique))
        return self._observe(rows, fresh[places])

    def _observe(
        self,
        rows: torch.Tensor,
        fresh: torch.Tensor,
        *,
        uniform: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> Decision:
        uniform = torch.ones(len(rows), dtype=torch.bool) if uniform is None else uniform.cpu()
        if rows.shape != uniform.shape or fresh.shape != (len(rows), self.targets.dim):
            raise DataError(
                "pairs of an adaptive cache", expected=f"rows (n,), vectors (n, {self.targets.dim}), uniform (n,)",
                got=f"{tuple(rows.shape)}, {tuple(fresh.shape)} and {tuple(uniform.shape)}",
                cure="Pass one vector of the encoder of now for every row.",
            )  # fmt: skip
        rows, fresh = rows.cpu(), fresh.detach().float().cpu()
        # Before the fit has seen them: afterwards these targets would look better than the others.
        served = (self.targets.gather(rows).cpu() - fresh).square().sum(dim=1)
        corrected = (self._corrected.gather(rows).cpu() - fresh).square().sum(dim=1)
        self._remember(rows, corrected)
        stale, side = self.cache.gather(rows), self._settings.side
        beside = None if side is None else side.gather(rows)
        if self.streaming.partial_fit(stale, fresh, side=beside, weights=weights, target_rows=rows):
            self._corrected.invalidate()
        decision = self.detector.observe(served[uniform])
        self._act(decision)
        return decision

    def _remember(self, rows: torch.Tensor, residuals: torch.Tensor) -> None:
        """Keep what correction left wrong of recent targets, from which it is predicted for the others."""
        for row, residual in zip(rows.tolist(), residuals.tolist(), strict=True):
            self._residuals.pop(row, None)
            self._residuals[row] = residual
        for row in list(self._residuals)[: max(len(self._residuals) - MAX_LANDMARKS, 0)]:
            del self._residuals[row]

    def _act(self, decision: Decision) -> None:
        match decision.action:
            case "refit":
                self.streaming.discount(self._settings.refit_pairs)
                if self.streaming.refit():
                    self._corrected.invalidate()
            case "refresh_worst":
                self._refresh_rows(self.worst_rows(decision.passes))
            case "refresh_all":
                self._refresh_all()

    def worst_rows(self, count: int) -> IntArray:
        """Return the targets to re-encode first, by predicted residual, times traffic where that was given.

        Targets that are served as the encoder of now made them come last.

        Args:
            count: How many, ``(count,)`` int64 at most.
        """
        predicted = np.ones(len(self.cache))
        known = torch.tensor(list(self._residuals), dtype=torch.int64)
        residuals = np.array(list(self._residuals.values()))
        if len(known) >= _FEWEST_RESIDUALS and residuals.max() > 0:
            predicted = ResidualPredictor.fit(self.cache.gather(known), residuals).predict(self.cache)
        rows = np.arange(len(self.cache))
        found = self.targets.overlay.find(rows)
        current = rows[found.positions[found.stamps == self._made_by.digest]]
        return worst_first(predicted, self._settings.traffic, skipped=current)[:count]

    def _refresh_rows(self, rows: IntArray) -> None:
        vectors = self._encoder.encode(rows)
        with OverlayWriter(self.cache) as writer:
            writer.append(rows, vectors, stamp=self._made_by.digest, step=self._step)
        self.targets.overlay.refresh()
        self.passes = replace(self.passes, worst=self.passes.worst + len(rows))

    def _refresh_all(self) -> None:
        """Make the cache anew, or finish that where an earlier process was killed; then start from the identity."""
        old, folder = self.cache, self._settings.refresh_folder
        base = old.path.parent if folder is None else folder
        plan = CachePlan(
            ids=old.ids, dim=self.targets.dim, dtype=old.manifest.dtype, fingerprint=self._made_by,
            texts_hash=old.texts_hash, shard_rows=self._settings.shard_rows, text_hashes=old.text_hashes,
            generation=old.manifest.generation + 1,
        )  # fmt: skip
        with CacheWriter(base / f"{old.path.name.split('@')[0]}@{self._made_by.digest[:12]}", plan) as writer:
            pending = writer.pending_shards()
            for shard in pending:
                writer.write_shard(shard.index, self._encoder.encode(np.arange(shard.start, shard.stop)))
            made = writer.finish()
        self.passes = replace(self.passes, refreshed=self.passes.refreshed + sum(shard.rows for shard in pending))
        self.streaming.forget()
        self._use(made)
