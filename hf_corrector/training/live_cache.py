"""The cache of a training run: made once, seen through the corrector, refreshed or reopened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.utils import logging

from hf_corrector._files import atomic_write, read_json, write_json
from hf_corrector.cache.side_store import open_side, save_dense, save_side, side_details, stored_sides
from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.candidate_sampling import ContrastSet
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.tokens import TokenStore
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.errors import CacheMismatchError, CheckpointError
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.side_features import DenseSide, SideFeatures, TokenCounts, mean_word_embeddings
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.corrector_fit import CorrectorFitting
from hf_corrector.training.corrector_trainer import OnlineCorrector, OnlineTargets
from hf_corrector.training.step_log import StepLog

STATE_FILE = "corrector_state.json"
STATE_TENSORS = "corrector_state.safetensors"
_MEAN_ROWS = 65_536
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
        online: What fits the corrector, or None.
    """

    def __init__(
        self,
        cache: TargetCache,
        model: DualEncoderModel,
        args: DualEncoderTrainingArguments,
        *,
        first: TargetCache | None = None,
        held_out: torch.Tensor | None = None,
        from_start: bool = True,
    ) -> None:
        self._model, self._args, self._held_out, self._from_start = model, args, held_out, from_start
        self.first = cache if first is None else first
        self._use(cache)

    def _use(self, cache: TargetCache) -> None:
        self.cache = cache
        self.stale = CorrectedTargets(cache, None, device=self._args.device)
        self.corrected, self.online = self.stale, None
        corrector = self._model.corrector
        if corrector is not None and self._args.uses_corrector:
            side = side_of(cache, self._model, self._args)
            self.corrected = CorrectedTargets(cache, corrector, side=side, device=self._args.device)
            targets = OnlineTargets(
                len(cache), cache.gather, side=side, held_out=self._held_out, drift_from_zero=self._from_start
            )
            self.online = OnlineCorrector(corrector, targets, fitting=fitting_of(self._args))

    @torch.no_grad()
    def learn_from(self, contrast: ContrastSet, fresh: torch.Tensor, *, step: int, log: StepLog) -> None:
        """Log how stale the targets of a step were, and hand them to the corrector as pairs.

        Args:
            contrast: Which targets the step encoded.
            fresh: Their embeddings, ``(n, dim)`` float32.
            step: Optimiser steps done before.
            log: Takes the cosines, and the residual on uniform rows before the corrector has seen them.
        """
        stale = self.cache.gather(contrast.rows).to(fresh.device)
        seen, count = stale, len(fresh)
        log.observe("cosine_stale_fresh", float(F.cosine_similarity(stale, fresh).mean()), count=count)
        if self.online is not None:
            side = self.online.targets.side
            beside = None if side is None else side.gather(contrast.rows).to(fresh.device)
            seen = self.online.corrector(stale, beside)
            log.observe("cosine_corrected_fresh", float(F.cosine_similarity(seen, fresh).mean()), count=count)
            self.online.observe(contrast.rows, fresh, step=step)
        uniform = contrast.uniform.to(fresh.device)
        if uniform.any():
            residual = (seen - fresh)[uniform].square().sum(dim=1).mean()
            log.observe("residual_uniform", float(residual), count=int(uniform.sum()))

    def update_corrector(self, step: int, learning_rate: float) -> None:
        """Let the corrector follow the drift after a step that was taken with this learning rate."""
        if self.online is None:
            return
        self.online.advance(learning_rate)
        if self.online.update(step):
            self.corrected.invalidate()

    def finish_corrector(self) -> None:
        """Fit the corrector once more when training ends."""
        if self.online is not None and self.online.finish():
            self.corrected.invalidate()

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
            shutil.rmtree(path)
            built = build_cache(self._model, targets, path, tokens=tokens, options=options, generation=generation)
        side = self._args.corrector_side
        if self.online is not None and side is not None:
            # Rows are the same, and what else the corrector reads of them may have come with the first cache only.
            save_side(built.cache, open_side(self.cache, side), details=side_details(self.cache, side))
        self.reset_corrector()
        self._from_start = True
        self._use(built.cache)
        self._remove_unnamed(path)
        return built.encoded

    def reset_corrector(self) -> None:
        """Start the corrector again at the identity, by the run's seed."""
        if self._model.corrector is not None and self._args.uses_corrector:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._args.seed)
                self._model.corrector.reset()

    def _remove_unnamed(self, current: Path) -> None:
        """Remove refreshed caches that no checkpoint names any more; the first one is always kept."""
        out = Path(str(self._args.output_dir))
        named = {current.resolve(), self.first.path.resolve()}
        for state in out.glob(f"*/{STATE_FILE}"):
            named |= {_cache_path(state.parent, entry).resolve() for entry in read_json(state)["caches"]}
        for folder in out.glob("cache-[0-9][0-9][0-9][0-9]"):
            if folder.resolve() not in named:
                shutil.rmtree(folder)

    def save(self, folder: Path, cost: dict[str, int]) -> None:
        """Write into a checkpoint which caches are in use, and the corrector's pairs."""
        tensors = {} if self.online is None else self.online.state()
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        atomic_write(folder / STATE_TENSORS, lambda path: save_file(contiguous, path))
        # Relative, so that a run may be moved as a whole.
        named = [
            {"path": os.path.relpath(one.path.resolve(), folder.resolve()), "checksum": one.manifest.checksum}
            for one in (self.first, self.cache)
        ]
        state = {"cost": cost, "caches": named, "settings": settings_of(self._args), "from_start": self._from_start}
        write_json(folder / STATE_FILE, state)

    @classmethod
    def reopen(
        cls,
        folder: Path,
        model: DualEncoderModel,
        args: DualEncoderTrainingArguments,
        *,
        held_out: torch.Tensor | None = None,
    ) -> LiveCache:
        """Open the caches a checkpoint names, and restore the corrector's pairs.

        Raises:
            CheckpointError: If a cache is gone or was replaced.
        """
        state = read_json(folder / STATE_FILE)
        named, settings = state["caches"], settings_of(args)
        if state["settings"] != settings:
            raise CheckpointError(
                str(folder), expected=f"the arguments it was written with, {state['settings']}", got=str(settings),
                cure="Resume with the same arguments, or train from the start.",
            )  # fmt: skip
        first, current = (_open_named(folder, entry) for entry in (named[0], named[-1]))
        live = cls(current, model, args, first=first, held_out=held_out, from_start=state["from_start"])
        if live.online is not None:
            live.online.load_state(load_file(folder / STATE_TENSORS))
        return live


def _cache_path(folder: Path, entry: dict[str, str]) -> Path:
    return folder / entry["path"]


def side_of(cache: TargetCache, model: DualEncoderModel, args: DualEncoderTrainingArguments) -> SideFeatures | None:
    """Open the side features a run's corrector reads; word embeddings are stored when they are first asked for.

    Raises:
        CacheError: If the cache holds none of that kind.
    """
    if args.corrector_side != "word_embeddings":
        return None if args.corrector_side is None else open_side(cache, args.corrector_side)
    if "word_embeddings" not in stored_sides(cache):
        counts = cast(TokenCounts, open_side(cache, "tokens"))
        table = cast(torch.nn.Embedding, model.target_encoder.get_input_embeddings()).weight
        save_dense(cache, _mean_blocks(counts, table), kind="word_embeddings", width=table.shape[1])
    return open_side(cache, "word_embeddings")


def _mean_blocks(counts: TokenCounts, table: torch.Tensor) -> Iterator[DenseSide]:
    for start in range(0, len(counts), _MEAN_ROWS):
        block = replace(counts, offsets=counts.offsets[start : start + _MEAN_ROWS + 1])
        yield mean_word_embeddings(block, table)


def settings_of(args: DualEncoderTrainingArguments) -> dict[str, str]:
    """Return the arguments a checkpoint's state depends on; it cannot be resumed with others."""
    return {
        "negatives": args.negatives, "staleness": args.staleness,
        "corrector_kind": args.corrector_kind if args.uses_corrector else "none",
        "corrector_side": str(args.corrector_side) if args.uses_corrector else "none",
    }  # fmt: skip


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


def compute_dtype_of(args: DualEncoderTrainingArguments) -> str:
    """Return the arithmetic of the encoder, as ``--bf16`` and ``--fp16`` say."""
    return "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"


def encode_options_of(args: DualEncoderTrainingArguments) -> EncodeOptions:
    """Return how a run encodes its corpus."""
    return EncodeOptions(
        cache_dtype=args.cache_dtype, compute_dtype=compute_dtype_of(args), token_budget=args.token_budget,
        progress=not args.disable_tqdm,
    )  # fmt: skip


def fitting_of(args: DualEncoderTrainingArguments) -> CorrectorFitting:
    """Return how a run fits its corrector."""
    return CorrectorFitting(
        window=args.corrector_window, update_steps=args.corrector_update_steps,
        learning_rate=args.corrector_learning_rate, batch_size=args.corrector_batch_size,
        updates=args.corrector_updates, seed=args.seed,
    )  # fmt: skip
