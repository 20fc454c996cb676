"""Which targets a training batch encodes: sampled from all targets, given by the data, and shared among processes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_corrector._distributed import all_gather_rows, gather_columns, rank, world_size
from hf_corrector.batching import pad_tokens
from hf_corrector.candidate_sampling import (
    ContrastSet,
    GivenTargets,
    Sampled,
    SamplingPlan,
    contrast_set,
    sample_candidates,
    sample_uniformly,
)
from hf_corrector.data.tokens import TokenStore
from hf_corrector.errors import DistributedError
from hf_corrector.models.contrast import SampledTargets
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.sampling import DrawKeys, ExcludedRows
from hf_corrector.scans import TargetScan
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.step_fidelity import StepTargets


@dataclass(frozen=True)
class Judgements:
    """What the data say about the training queries, each sequence one entry per query.

    Attributes:
        positives: Known positives, target row to grade.
        negatives: Given hard negatives, target rows.
        teacher: A teacher's scores, target row to score.
    """

    positives: Sequence[Mapping[int, float]]
    negatives: Sequence[Sequence[int]]
    teacher: Sequence[Mapping[int, float]]


@dataclass(frozen=True)
class Choice:
    """The targets of one step.

    Attributes:
        contrast: What the queries of all processes are contrasted with.
        queries: Their embeddings, ``(queries of all processes, dim)`` float32, detached.
        excluded: Known positives of each of them.
        sampled: What the sampler knows; None where no score was looked at.
        part: What this process's forward pass takes.
    """

    contrast: ContrastSet
    queries: torch.Tensor
    excluded: ExcludedRows
    sampled: Sampled | None
    part: SampledTargets

    def encoded(self, args: DualEncoderTrainingArguments) -> StepTargets:
        """Return the targets as the corrector and the log take them."""
        by_chance = args.num_negatives * args.uniform_fraction
        return StepTargets(
            self.contrast.rows, self.contrast.uniform, self.contrast.certain, self.queries, self.excluded, self.sampled,
            draws=args.num_negatives - by_chance, uniform_draws=by_chance,
        )  # fmt: skip


class TargetChooser:
    """Choose the targets of each batch, as the arguments of a run say.

    Args:
        model: The encoder, for its size, scale and padding.
        args: Arguments of the run.
        tokens: The tokenised targets.
        judgements: What the data say about the training queries.
    """

    def __init__(
        self, model: DualEncoderModel, args: DualEncoderTrainingArguments, tokens: TokenStore, *, judgements: Judgements
    ) -> None:
        self._args, self._tokens, self._judgements = args, tokens, judgements
        self._pad = model.pad_token_id("target")
        self._plan = None
        if args.negatives != "in_batch":
            self._plan = SamplingPlan(
                negatives=args.negatives, num_negatives=args.num_negatives, uniform_fraction=args.uniform_fraction,
                scale=model.config.scale, seed=args.seed, negative_filter=args.negative_filter,
            )  # fmt: skip

    def choose(
        self, query_embeddings: torch.Tensor, batch: Mapping[str, Any], *, scan: TargetScan | None, step: int,
        cached: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Choice:  # fmt: skip
        """Choose targets for a batch of queries, together with all other processes.

        Args:
            query_embeddings: ``(batch, dim)``, detached.
            batch: What the collator made: ``query_rows`` and ``positive_rows``, each ``(batch,)``.
            scan: All targets, or None where negatives are chosen without looking at vectors.
            step: Optimiser steps done; the draws are keyed by it.
            cached: Returns the vectors of target rows, where targets are not encoded but read.

        Returns:
            The targets of all processes' queries, and this process's part of encoding and scoring them.
        """
        counts = [len(part) for part in all_gather_rows(batch["query_rows"])]
        queries = torch.cat(all_gather_rows(query_embeddings.detach().float().contiguous()))
        query_rows = torch.cat(all_gather_rows(batch["query_rows"])).cpu().numpy()
        positives = torch.cat(all_gather_rows(batch["positive_rows"]))
        excluded = ExcludedRows([list(self._judgements.positives[row]) for row in query_rows.tolist()])
        keys = DrawKeys(seed=self._args.seed, step=step, query_ids=query_rows)
        sampled, candidates, too_good = None, None, None
        if self._plan is not None and scan is None:
            by_chance = SamplingPlan("uniform", self._plan.num_negatives, 1.0, self._plan.scale, self._plan.seed)
            candidates = sample_uniformly(len(self._tokens), by_chance, excluded=excluded, keys=keys)
        elif self._plan is not None and scan is not None:
            sampled = sample_candidates(scan, queries, self._plan, positives=positives, excluded=excluded, keys=keys)
            candidates, too_good = sampled.candidates, sampled.too_good
        contrast = contrast_set(
            candidates, self._given(query_rows, positives, excluded), share_negatives=self._args.share_negatives,
            too_good=too_good,
        )  # fmt: skip
        check_agreement(contrast.rows)
        part = self._part_of(contrast, counts, None if cached is None else cached(contrast.rows))
        return Choice(contrast, queries, excluded, sampled, part)

    def _given(self, query_rows: np.ndarray, positives: torch.Tensor, excluded: ExcludedRows) -> GivenTargets:
        args, known, queries = self._args, self._judgements, query_rows.tolist()
        negatives = [known.negatives[row][: args.given_negatives] for row in queries] if args.given_negatives else []
        return GivenTargets(
            positives, excluded,
            grades=[known.positives[row] for row in queries] if args.several_positives else (),
            negatives=negatives,
            teacher=[known.teacher[row] for row in queries] if args.distillation_weight else (),
        )  # fmt: skip

    def _part_of(self, contrast: ContrastSet, counts: list[int], vectors: torch.Tensor | None) -> SampledTargets:
        """Take this process's queries and its share of the targets that are no positives."""
        own, first = counts[rank()], sum(counts[: rank()])
        mine = slice(first, first + own)
        extra, parts = contrast.rows[sum(counts) :].numpy(), world_size()
        shares = [extra[len(extra) * part // parts : len(extra) * (part + 1) // parts] for part in range(parts)]
        tokens = None
        if len(shares[rank()]) and vectors is None:
            padded = pad_tokens(self._tokens.tokens(shares[rank()]), self._pad)
            tokens = {name: tensor.to(self._args.device) for name, tensor in padded.items()}
        together = None
        if parts > 1 and vectors is None:
            order = _columns_in_order(counts, [len(share) for share in shares])
            together = lambda encoded: gather_columns(encoded)[order.to(encoded.device)]  # noqa: E731
        weights, teacher = contrast.label_weights, contrast.teacher_scores
        return SampledTargets(
            tokens, contrast.allowed[mine],
            log_proposal=contrast.log_proposal[mine] if self._args.sampling_correction else None,
            labels=torch.arange(first, first + own, device=contrast.allowed.device),
            label_weights=None if weights is None else weights[mine],
            teacher_scores=None if teacher is None else teacher[mine],
            vectors=vectors, gather=together,
        )  # fmt: skip


def check_agreement(rows: torch.Tensor) -> None:
    """Refuse to go on where processes have chosen different targets: their gradients would not belong together.

    Raises:
        DistributedError: If one has, as processors that round differently may.
    """
    found = [int(one) for one in all_gather_rows(torch.tensor([zlib.crc32(rows.cpu().numpy().tobytes())]))]
    if len(set(found)) > 1:
        raise DistributedError(
            f"rank {rank()} of {world_size()}, choosing targets", expected="the same targets on every process",
            got=f"{len(set(found))} different choices", cure="Use equal processors and thread numbers, or scan='full'.",
        )  # fmt: skip


def _columns_in_order(positives: list[int], extras: list[int]) -> torch.Tensor:
    """Return where each column is found, once the targets of all processes stand under each other in rank order."""
    start, first, then = 0, [], []
    for own, more in zip(positives, extras, strict=True):
        first.append(torch.arange(start, start + own))
        then.append(torch.arange(start + own, start + own + more))
        start += own + more
    return torch.cat([*first, *then])
