"""Which targets a training batch encodes: sampled from the live cache, without known positives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_corrector.batching import pad_tokens
from hf_corrector.candidate_sampling import ContrastSet, SamplingPlan, contrast_set, sample_candidates
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.tokens import TokenStore
from hf_corrector.index.base import TensorVectors
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel, SampledTargets
from hf_corrector.sampling import DrawKeys, ExcludedRows
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.live_cache import LiveCache


class TargetChooser:
    """Choose the targets of each batch, as the arguments of a run say.

    Args:
        model: The encoder, for its size, scale and padding.
        args: Arguments of the run.
        tokens: The tokenised targets.
        positives: For each training query its known positives, target row to grade.
    """

    def __init__(
        self,
        model: DualEncoderModel,
        args: DualEncoderTrainingArguments,
        tokens: TokenStore,
        *,
        positives: Sequence[Mapping[int, float]],
    ) -> None:
        self._args, self._tokens, self._positives = args, tokens, positives
        self._scale, self._dim, self._pad = model.config.scale, model.config.embedding_dim, model.pad_token_id("target")

    def choose(
        self, query_embeddings: torch.Tensor, batch: Mapping[str, Any], *, live: LiveCache | None, step: int
    ) -> tuple[ContrastSet, SampledTargets]:
        """Choose targets for a batch of queries.

        Args:
            query_embeddings: ``(batch, dim)``, detached.
            batch: What the collator made: ``query_rows`` and ``positive_rows``, each ``(batch,)``.
            live: The cache, or None where negatives are chosen without looking at vectors.
            step: Optimiser steps done; the draws are keyed by it.

        Returns:
            Which targets, and their tokens for the encoder's forward pass.
        """
        query_rows = batch["query_rows"].cpu().numpy()
        excluded = ExcludedRows([list(self._positives[row]) for row in query_rows.tolist()])
        candidates = None
        if self._args.negatives != "in_batch":
            warming_up = self._args.uses_corrector and step < self._args.corrector_warmup_steps
            # Vectors of another size cannot be scored before the corrector is used: chance chooses until then.
            blind = live is None or (warming_up and live.stale.dim != self._dim)
            by_chance = warming_up and (blind or self._args.warmup_negatives == "uniform")
            candidates = sample_candidates(
                self._view(None if blind else live, warming_up), query_embeddings, self._plan(by_chance),
                excluded=excluded, keys=DrawKeys(seed=self._args.seed, step=step, query_ids=query_rows),
            )  # fmt: skip
        contrast = contrast_set(
            candidates, batch["positive_rows"], excluded=excluded, share_negatives=self._args.share_negatives
        )
        return contrast, self._with_tokens(contrast, len(query_rows))

    def _view(self, live: LiveCache | None, warming_up: bool) -> CorrectedTargets:
        if live is not None:
            return live.stale if warming_up else live.corrected
        # Uniform draws look at no vector; zeros that take no memory stand for them, so that one path serves all.
        zeros = torch.zeros(1, self._dim).expand(len(self._tokens), -1)
        return CorrectedTargets(TensorVectors(zeros), None, device=self._args.device, snapshot_bytes=0)

    def _plan(self, by_chance: bool) -> SamplingPlan:
        return SamplingPlan(
            negatives="uniform" if by_chance else self._args.negatives, num_negatives=self._args.num_negatives,
            uniform_fraction=self._args.uniform_fraction, scale=self._scale, seed=self._args.seed,
        )  # fmt: skip

    def _with_tokens(self, contrast: ContrastSet, batch: int) -> SampledTargets:
        extra = contrast.rows[batch:].numpy()
        tokens = None
        if len(extra):
            padded = pad_tokens(self._tokens.tokens(extra), self._pad)
            tokens = {name: tensor.to(self._args.device) for name, tensor in padded.items()}
        log_proposal = contrast.log_proposal if self._args.sampling_correction else None
        return SampledTargets(tokens, contrast.allowed, log_proposal)
