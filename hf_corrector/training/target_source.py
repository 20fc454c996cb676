"""What the negatives of a step are drawn from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hf_corrector.data.tokens import TokenStore
from hf_corrector.encoding import encode_rows
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.scans import RerankScan, ScanPlan, TargetScan
from hf_corrector.training.cache_arguments import CacheTrainingArguments
from hf_corrector.training.live_cache import LiveCache, encode_options_of
from hf_corrector.training.scan_setup import plan_scan


@dataclass
class TargetSource:
    """The targets of a run, as its steps look at them.

    Attributes:
        model: The encoder.
        args: Arguments of the run.
        tokens: The tokenised targets.
        cost: Takes the encoder's passes.
        further_ops: Operations of a process in a step beside the encoder's.
        plan: How the targets are looked at; decided when first needed.
        said: What was decided, and why.
    """

    model: DualEncoderModel
    args: CacheTrainingArguments
    tokens: TokenStore
    cost: dict[str, int]
    further_ops: float = 0.0
    plan: ScanPlan | None = field(default=None)
    said: str = ""

    def scan(self, live: LiveCache | None, step: int) -> TargetScan | None:
        """Return what negatives are drawn from after so many steps; None where no vector is looked at."""
        args = self.args
        if live is None or not args.samples_from_scores:
            return None
        warming_up = args.uses_corrector and step < args.corrector_warmup_steps
        if warming_up and args.warms_up_uniformly:
            return None
        if self.plan is None:
            self.plan, self.said = plan_scan(self.model, args, live, self.tokens, further_ops=self.further_ops)
        scan = live.scan(self.plan, warming_up=warming_up)
        if scan is None or args.staleness != "rerank":
            return scan
        return RerankScan(scan, self._encode_candidates, candidates=args.rerank_candidates)

    def cached(self, live: LiveCache | None) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Return what reads the vectors of targets that are not encoded; None where targets are trained."""
        if self.args.encodes_targets or live is None:
            return None
        return live.read_fixed

    def _encode_candidates(self, rows: torch.Tensor) -> torch.Tensor:
        self.cost["rerank_target_passes"] += len(rows)
        return encode_rows(self.model, self.tokens, rows.numpy(), options=encode_options_of(self.args))
