"""The cache of a training run: made once, seen through the corrector, refreshed or reopened."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.utils import logging

from hf_corrector._distributed import barrier, is_main, on_main, world_size
from hf_corrector._files import atomic_write, read_json, write_json
from hf_corrector.cache.side_store import side_details
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.tokens import TokenStore
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.errors import CacheMismatchError, CheckpointError
from hf_corrector.index.faiss import FaissIndex
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.records import EncoderFingerprint, FittedTargets
from hf_corrector.scans import BlockScan, PooledScan, ScanPlan, ShortlistScan, TargetScan, stale_index
from hf_corrector.training.ages import Ages
from hf_corrector.training.cache_arguments import CacheTrainingArguments
from hf_corrector.training.checkpoint_files import remove_folder
from hf_corrector.training.corrector_exchange import send_corrector
from hf_corrector.training.corrector_fit import CorrectorFitting
from hf_corrector.training.corrector_trainer import OnlineCorrector, OnlineTargets
from hf_corrector.training.drift_watch import DriftWatch
from hf_corrector.training.run_sides import carry_side, side_of
from hf_corrector.training.step_fidelity import StepTargets, sampling_variation
from hf_corrector.training.step_log import StepLog

STATE_FILE = "corrector_state.json"
STATE_TENSORS = "corrector_state.safetensors"
SCAN_FILE = "scan-snapshot"
logger = logging.get_logger(__name__)


class LiveCache:
    """A cache in use by a training run.

    Args:
        cache: The cache to start with.
        model: The encoder, with the corrector if one is trained.
        args: Arguments of the run.
        first: The cache the run started with; ``cache`` if not given.
        held_out: Rows the corrector is not fitted on, ``(n,)`` int64.
        from_start: Whether the vectors are those of the encoder as it was when training with them began.

    Attributes:
        cache: The vectors in use.
        first: Those training started with; the same until a refresh.
        stale: The vectors as they are.
        corrected: The vectors through the corrector; ``stale`` without one.
        online: What fits the corrector; None without one, or where it stays as it was given.
    """

    def __init__(
        self,
        cache: TargetCache,
        model: DualEncoderModel,
        args: CacheTrainingArguments,
        *,
        first: TargetCache | None = None,
        held_out: torch.Tensor | None = None,
        from_start: bool = True,
    ) -> None:
        self._model, self._args, self._held_out, self._from_start = model, args, held_out, from_start
        self.first = cache if first is None else first
        self.watch = None if args.drift_bound is None else DriftWatch(
            args.drift_bound, args.drift_action, targets=len(cache)
        )  # fmt: skip
        self._use(cache)

    def _use(self, cache: TargetCache) -> None:
        self.cache = cache
        self.stale = CorrectedTargets(cache, None, device=self._args.device)
        self.corrected, self.online = self.stale, None
        self._scan: TargetScan | None = None
        self._scanned: CorrectedTargets | None = None
        self._index: FaissIndex | None = None
        self._ages = Ages(len(cache))
        corrector = self._model.corrector
        if corrector is None:
            return
        side = side_of(cache, self._model, corrector.config.side)
        self.corrected = CorrectedTargets(cache, corrector, side=side, device=self._args.device)
        if self._args.uses_corrector:
            targets = OnlineTargets(
                len(cache), cache.gather, side=side, held_out=self._held_out, drift_from_zero=self._from_start
            )
            self.online = OnlineCorrector(corrector, targets, fitting=fitting_of(self._args))

    @property
    def fitted_rows(self) -> np.ndarray:
        """Rows of the targets the corrector was fitted on, ``(n,)`` int64; known to the main process."""
        rows = torch.zeros(0, dtype=torch.int64) if self.online is None else self.online.fitted_rows
        found: np.ndarray = rows.numpy()
        return found

    def scan(self, plan: ScanPlan, *, warming_up: bool) -> TargetScan | None:
        """Return what negatives are drawn from: all targets through the corrector, or as they are while it warms up.

        None where vectors of another size cannot be scored before the corrector is used.
        """
        targets = self.stale if warming_up else self.corrected
        if targets.dim != self._model.config.embedding_dim:
            return None
        if self._scan is None or self._scanned is not targets:
            self._scan, self._scanned = self._new_scan(targets, plan), targets
            self._ages.note_scan(plan)
        return self._scan

    def _new_scan(self, targets: CorrectedTargets, plan: ScanPlan) -> TargetScan:
        match plan.strategy:
            case "pooled":
                return PooledScan(targets, plan)
            case "shortlist":
                if self._index is None:
                    self._index = stale_index(self.cache, seed=self._args.seed)
                return ShortlistScan(targets, plan, index=self._index)
            case _:
                return BlockScan(targets, plan, scratch=Path(str(self._args.output_dir)) / SCAN_FILE)

    @torch.no_grad()
    def read_fixed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return cached vectors of targets that are not encoded anew, ``(n, dim)``, through any fixed corrector."""
        stale = self.cache.gather(rows).to(self._args.device)
        if self.corrected.corrector is None:
            return stale
        side = None if self.corrected.side is None else self.corrected.side.gather(rows).to(stale.device)
        corrected: torch.Tensor = self.corrected.corrector(stale, side)
        return corrected

    @torch.no_grad()
    def learn_from(self, targets: StepTargets, fresh: torch.Tensor, *, step: int, log: StepLog) -> None:
        """Log how stale the targets of a step were, and hand them to the corrector as pairs.

        Args:
            targets: Which targets the step encoded, on all processes.
            fresh: Their embeddings, ``(columns, dim)`` float32.
            step: Optimiser steps done before.
            log: Takes the cosines, the residual on uniform rows before the corrector has seen them, and how far the
                distribution targets are drawn from is from the exact one.
        """
        stale = self.cache.gather(targets.rows).to(fresh.device)
        corrected, count = stale, len(fresh)
        if stale.shape == fresh.shape:
            log.observe("cosine_stale_fresh", float(F.cosine_similarity(stale, fresh).mean()), count=count)
        if self.online is not None:
            side = self.online.targets.side
            beside = None if side is None else side.gather(targets.rows).to(fresh.device)
            corrected = self.online.corrector(stale, beside)
            log.observe("cosine_corrected_fresh", float(F.cosine_similarity(corrected, fresh).mean()), count=count)
            if is_main():
                self.online.observe(targets.rows, fresh, step=step)
        seen = self._seen(targets.rows, stale, corrected)
        if seen.shape != fresh.shape:
            return
        uniform = targets.uniform.to(fresh.device)
        if uniform.any():
            residuals = (seen - fresh)[uniform].square().sum(dim=1)
            log.observe("residual_uniform", float(residuals.mean()), count=len(residuals))
            if self.watch is not None:
                self.watch.observe(residuals, log)
        # Reranking draws by scores the encoder has just made: there is nothing stale to measure.
        drawn = targets.sampled is not None and targets.sampled.log_normalizer is not None
        if drawn and self._args.staleness != "rerank":
            variation = sampling_variation(
                targets, seen, fresh, scale=self._model.config.scale, num_targets=len(self.cache)
            )
            log.observe("sampling_tv", float(variation.mean()), count=len(variation))

    def _seen(self, rows: torch.Tensor, stale: torch.Tensor, corrected: torch.Tensor) -> torch.Tensor:
        """Return the vectors of targets as negatives were drawn by them, ``(n, dim)``."""
        if self._scanned is self.stale:
            return stale
        kept = self._scan.kept_rows(rows) if isinstance(self._scan, BlockScan) else None
        return corrected if kept is None else kept.to(corrected)

    def update_corrector(self, step: int, learning_rate: float) -> None:
        """Let the corrector follow the drift after a step that was taken with this learning rate."""
        if self.online is not None:
            self.online.advance(learning_rate)
            if self.online.due(step):
                self._change(self.online.update, step)
        if self._scan is not None:
            self._scan.advance()
            self._ages.advance()

    def _change(self, fit: Callable[..., bool], *about: int) -> None:
        """Let the main process fit the corrector, and all others take it over."""
        if self.online is None:
            return
        corrector = self.online.corrector
        changed = on_main("fitting the corrector", lambda: fit(*about))
        if changed:
            if is_main():
                self._ages.note_fit(self.online)
            if world_size() > 1:
                send_corrector(corrector)
            self.corrected.invalidate()
            if self._scan is not None and self._scanned is self.corrected:
                self._scan.invalidate()

    def refit(self) -> None:
        """Fit the corrector now, without waiting for its turn."""
        if self.online is not None:
            self._change(self.online.refit)

    def ages(self, steps: int) -> dict[str, float]:
        """Return how old the corrector's pairs and an amortised scan's rows are after so many steps, as logged."""
        scanned = isinstance(self._scan, BlockScan) and self._scan.kept
        found = {
            "pair_age": None if self.online is None else self._ages.of_pairs(self.online, steps),
            "snapshot_age": self._ages.of_snapshot() if scanned else None,
        }
        return {name: age for name, age in found.items() if age is not None}

    def finish_corrector(self) -> None:
        """Fit the corrector once more when training ends."""
        if self.online is not None:
            self._change(self.online.finish)

    def refresh(self, targets: Dataset, tokens: TokenStore) -> int:
        """Encode all targets anew with the current weights; the corrector starts again at the identity.

        The side features it reads stay those of the cache before.

        Returns:
            Targets encoded.
        """
        generation = self.cache.manifest.generation + 1
        path = Path(str(self._args.output_dir)) / f"cache-{generation:04d}"
        options = encode_options_of(self._args)
        try:
            built = build_cache(self._model, targets, path, tokens=tokens, options=options, generation=generation)
        except CacheMismatchError:
            # Left by an earlier run of this folder that went another way after the checkpoint this one resumed from.
            logger.warning(f"{path} holds vectors of other weights; it is made anew.")
            on_main("removing a cache of other weights", lambda: remove_folder(path))
            built = build_cache(self._model, targets, path, tokens=tokens, options=options, generation=generation)
        side = None if self._model.corrector is None else self._model.corrector.config.side
        if side is not None:
            # Rows are the same, and what else the corrector reads of them may have come with the first cache only.
            carry_side(self.cache, built.cache, side)
        self.reset_corrector()
        self._from_start = True
        if self.watch is not None:
            self.watch.reset()
        self._use(built.cache)
        # No process reads the cache before any more.
        barrier()
        self._remove_unnamed(path)
        return built.encoded

    def reset_corrector(self) -> None:
        """Start the corrector again at the identity, by the run's seed."""
        if self._model.corrector is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._args.seed)
                self._model.corrector.reset()

    def _remove_unnamed(self, current: Path) -> None:
        """Remove refreshed caches that no checkpoint names any more; the first one is always kept."""
        if not is_main():
            return
        out = Path(str(self._args.output_dir))
        named = {current.resolve(), self.first.path.resolve()}
        for state in out.glob(f"*/{STATE_FILE}"):
            named |= {_cache_path(state.parent, entry) for entry in read_json(state)["caches"]}
        for folder in out.glob("cache-[0-9][0-9][0-9][0-9]"):
            if folder.resolve() not in named:
                remove_folder(folder)

    def note_encoders(self, fresh: EncoderFingerprint) -> None:
        """Let the corrector say, before it is saved, that it leads from the cache's encoder to this one."""
        if self.online is not None:
            stale = self.cache.fingerprint
            self.online.corrector.note_encoders(stale=stale, fresh=fresh, trained=fresh.weights != stale.weights)

    def note_fitted(self, folder: Path, encoder: EncoderFingerprint) -> None:
        """Write beside a saved corrector what it was fitted to, this encoder being saved with it, if one is trained."""
        if self.online is None:
            return
        side = self._args.corrector_side
        rows = tuple(self.fitted_rows.tolist())
        FittedTargets(
            self.cache.manifest.checksum, encoder.digest, rows, tuple(self.cache.ids[row] for row in rows),
            encoder.to_dict(), None if side is None else side_details(self.cache, side) or None,
        ).save(folder)  # fmt: skip

    def save(self, folder: Path, known: dict[str, Any]) -> None:
        """Write into a checkpoint which caches are in use, the corrector's pairs, and what the trainer knows."""
        if self._scan is not None:
            # A resumed run corrects all targets anew, so this one does too.
            self._scan.renew()
            self._ages.renew()
        if not is_main():
            return
        tensors = {} if self.online is None else {**self.online.state(), **self._ages.state()}
        tensors |= {} if self.watch is None else self.watch.state()
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write(folder / STATE_TENSORS, lambda path: save_file(contiguous, path))
        # Relative, so that a run may be moved as a whole.
        named = [
            {"path": os.path.relpath(one.path.resolve(), folder.resolve()), "checksum": one.manifest.checksum}
            for one in (self.first, self.cache)
        ]
        write_json(folder / STATE_FILE, {**known, "caches": named, "from_start": self._from_start})

    @classmethod
    def reopen(
        cls,
        folder: Path,
        model: DualEncoderModel,
        args: CacheTrainingArguments,
        *,
        held_out: torch.Tensor | None = None,
    ) -> LiveCache:
        """Open the caches a checkpoint names, and restore the corrector's pairs.

        Raises:
            CheckpointError: If a cache is gone or was replaced.
        """
        state = read_json(folder / STATE_FILE)
        first, current = (_open_named(folder, state["caches"][place]) for place in (0, -1))
        live = cls(current, model, args, first=first, held_out=held_out, from_start=state["from_start"])
        tensors = load_file(folder / STATE_TENSORS)
        if live.online is not None:
            live.online.load_state(tensors)
            live._ages.load_state(tensors)
        if live.watch is not None:
            live.watch.load_state(tensors)
        return live


def _cache_path(folder: Path, entry: dict[str, str]) -> Path:
    # Resolved, as the checkpoint it is named from may be removed while the run goes on.
    return (folder / entry["path"]).resolve()


def _open_named(folder: Path, entry: dict[str, str]) -> TargetCache:
    path = _cache_path(folder, entry)
    if not path.is_dir():
        raise CheckpointError(
            str(folder), expected=f"the cache {path}", got="no such folder",
            cure="Put the cache back; it cannot be made again from later weights.",
        )  # fmt: skip
    cache = TargetCache.open(path)
    if cache.manifest.checksum != entry["checksum"]:
        raise CheckpointError(
            str(folder), expected=f"the cache {path} as it was when the checkpoint was written",
            got="another cache in that folder", cure="Put the cache back, or train from the start.",
        )  # fmt: skip
    return cache


def compute_dtype_of(args: CacheTrainingArguments) -> str:
    """Return the arithmetic of the encoder, as ``--bf16`` and ``--fp16`` say."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def encode_options_of(args: CacheTrainingArguments) -> EncodeOptions:
    """Return how a run encodes its corpus."""
    return EncodeOptions(
        cache_dtype=args.cache_dtype, compute_dtype=compute_dtype_of(args), token_budget=args.token_budget,
        progress=not args.disable_tqdm,
    )  # fmt: skip


def fitting_of(args: CacheTrainingArguments) -> CorrectorFitting:
    """Return how a run fits its corrector."""
    return CorrectorFitting(
        window=args.corrector_window, update_steps=args.corrector_update_steps,
        learning_rate=args.corrector_learning_rate, batch_size=args.corrector_batch_size,
        updates=args.corrector_updates, seed=args.seed,
    )  # fmt: skip
