"""Which targets the questions of a step read, drawn from all targets by all processes together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from hf_corrector._distributed import all_gather_rows, rank
from hf_corrector.batching import pad_tokens
from hf_corrector.candidate_sampling import Sampled, SamplingPlan, sample_candidates
from hf_corrector.data.tokens import TokenStore
from hf_corrector.rag.passages import RetrievedTargets, distinct_rows
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.sampling import Candidates, DrawKeys, ExcludedRows, IntArray, draw_uniform, uniform_counts
from hf_corrector.scans import TargetScan
from hf_corrector.training.step_fidelity import StepTargets
from hf_corrector.training.target_choice import check_agreement


@dataclass(frozen=True)
class PassageTokens:
    """The targets in tokens.

    Attributes:
        encoder: The target tower's, by row.
        reader: The reader's, by row.
        pad: The target tower's padding id.
    """

    encoder: TokenStore
    reader: TokenStore
    pad: int


@dataclass(frozen=True)
class PassageChoice:
    """The targets of one step.

    Attributes:
        part: What this process's questions read.
        own_rows: Its distinct target rows, ascending, ``(m,)`` int64.
        queries: Embeddings of the questions of all processes, ``(n, dim)`` float32, detached.
        sampled: What the sampler knows of all of them.
        probes: Rows drawn uniformly for the corrector, distinct, ascending.
    """

    part: RetrievedTargets
    own_rows: IntArray
    queries: torch.Tensor
    sampled: Sampled
    probes: IntArray

    @property
    def prompts(self) -> int:
        """Passages read by the questions of all processes."""
        return int(self.sampled.candidates.mask.sum())


class PassageChooser:
    """Choose what the questions of a batch read, as the arguments of a run say.

    Known positives are candidates like all others: the passage that holds the answer must be found.

    Args:
        args: Arguments of the run.
        tokens: The targets in tokens.
    """

    def __init__(self, args: RetrievalAugmentedTrainingArguments, tokens: PassageTokens) -> None:
        self._args, self._tokens = args, tokens

    def choose(
        self, query_embeddings: torch.Tensor, query_rows: torch.Tensor, *, scan: TargetScan, step: int, scale: float,
        cached: Callable[[torch.Tensor], torch.Tensor],
    ) -> PassageChoice:  # fmt: skip
        """Choose targets for a batch of questions, together with all other processes.

        Args:
            query_embeddings: ``(batch, dim)``, detached.
            query_rows: Rows of the questions in their split, ``(batch,)``.
            scan: All targets.
            step: Optimiser steps done; the draws are keyed by it.
            scale: Inverse temperature β of the softmax they are drawn from.
            cached: Returns vectors of target rows, where targets are not encoded but read.

        Raises:
            DistributedError: If processes have chosen differently.
        """
        args = self._args
        counts = [len(part) for part in all_gather_rows(query_rows)]
        queries = torch.cat(all_gather_rows(query_embeddings.detach().float().contiguous()))
        rows = torch.cat(all_gather_rows(query_rows)).cpu().numpy()
        keys, nothing = DrawKeys(seed=args.seed, step=step, query_ids=rows), ExcludedRows([[]] * len(rows))
        plan = SamplingPlan(args.passages, args.num_passages, 0.0, scale, args.seed)
        sampled = sample_candidates(
            scan, queries, plan, positives=torch.zeros(len(rows), dtype=torch.int64), excluded=nothing, keys=keys
        )
        one = sampled.candidates
        check_agreement(one.ids[one.mask])
        mine = slice(sum(counts[: rank()]), sum(counts[: rank() + 1]))
        own = Candidates(
            one.ids[mine], one.scores[mine], one.log_proposal[mine], one.mask[mine], one.uniform[mine]
        )  # fmt: skip
        distinct, places = distinct_rows(own.ids, own.mask)
        words, tokens, vectors = self._tokens.reader.tokens(distinct), None, None
        if args.encodes_targets:
            padded = pad_tokens(self._tokens.encoder.tokens(distinct), self._tokens.pad)
            tokens = {name: tensor.to(args.device) for name, tensor in padded.items()}
        else:
            vectors = cached(torch.from_numpy(distinct))
        part = RetrievedTargets(own, places, words, tokens=tokens, vectors=vectors)
        return PassageChoice(part, distinct, queries, sampled, self._probes(len(scan), nothing, keys))

    def _probes(self, targets: int, nothing: ExcludedRows, keys: DrawKeys) -> IntArray:
        args = self._args
        wanted = (args.uses_corrector or args.drift_bound is not None) and args.draws_uniformly
        if not wanted:
            return np.zeros(0, dtype=np.int64)
        counts = uniform_counts(args.num_passages, args.uniform_fraction, keys)
        drawn = draw_uniform(targets, int(counts.max()), excluded=nothing, keys=keys)
        return np.unique(drawn[(np.arange(drawn.shape[1]) < counts[:, None]) & (drawn >= 0)])

    def encoded(
        self, choice: PassageChoice, fresh: torch.Tensor, encode: Callable[[IntArray], torch.Tensor]
    ) -> tuple[StepTargets, torch.Tensor]:  # fmt: skip
        """Return all targets the processes have encoded in a step, and their embeddings ``(columns, dim)``.

        Args:
            choice: Of this step.
            fresh: Embeddings of this process's targets, ``(m, dim)`` float32, detached.
            encode: Encodes target rows, called by all processes together; for probes that nobody has read.
        """
        rows = torch.cat(all_gather_rows(torch.from_numpy(choice.own_rows))).numpy()
        vectors = torch.cat(all_gather_rows(fresh.contiguous()))
        # Questions of two processes may read the same target.
        read, first = np.unique(rows, return_index=True)
        vectors = vectors[torch.from_numpy(first).to(vectors.device)]
        further = np.setdiff1d(choice.probes, read)
        if len(further):
            vectors = torch.cat([vectors, encode(further).to(vectors)])
        together = np.concatenate([read, further])
        order = np.argsort(together, kind="stable")
        together, args = together[order], self._args
        targets = StepTargets(
            torch.from_numpy(together), torch.from_numpy(np.isin(together, choice.probes)),
            torch.zeros(len(together), dtype=torch.bool), choice.queries, choice.sampled.excluded, choice.sampled,
            draws=args.num_passages, uniform_draws=args.num_passages * args.uniform_fraction,
        )  # fmt: skip
        return targets, vectors[torch.from_numpy(order).to(vectors.device)]
