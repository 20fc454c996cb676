"""How a run looks at all targets in each step, from its arguments and sizes."""

from __future__ import annotations

import numpy as np
import torch
from transformers.utils import logging

from hf_corrector._distributed import broadcast_object, is_main
from hf_corrector.data.tokens import TokenStore
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.scans import ScanPlan, ScanTask, choose_scan, correction_ops, fast_in_bfloat16
from hf_corrector.training.cache_arguments import CacheTrainingArguments
from hf_corrector.training.live_cache import LiveCache

# Below this many targets a scan is so short that rounding its scores buys nothing.
_FULL_PRECISION_TARGETS = 50_000
logger = logging.get_logger(__name__)


def plan_scan(
    model: DualEncoderModel, args: CacheTrainingArguments, live: LiveCache, tokens: TokenStore, *,
    further_ops: float = 0.0,
) -> tuple[ScanPlan, str]:  # fmt: skip
    """Decide how the targets are looked at, the same on every process, and say in a sentence what was decided.

    Args:
        model: The encoder.
        args: Arguments of the run.
        live: The cache and its corrector.
        tokens: The tokenised targets.
        further_ops: Operations of one process in a step beside the encoder's, for instance a reader's.
    """
    dtype = args.scan_dtype
    if dtype == "auto":
        half = len(live.cache) > _FULL_PRECISION_TARGETS and fast_in_bfloat16(args.device.type)
        dtype = "bfloat16" if half else "float32"
    wanted = ScanPlan(
        strategy="full" if args.scan == "auto" else args.scan, dtype=dtype, refresh_steps=args.scan_refresh_steps,
        pool=args.scan_pool, shortlist=args.scan_shortlist, snapshot_bytes=int(args.scan_memory_gb * 2**30),
    )  # fmt: skip
    sentence = f"scan={wanted.strategy!r} in {wanted.dtype}, as the arguments say."
    if args.scan == "auto":
        task = scan_task(model, args, live, mean_tokens=float(np.mean(tokens.lengths)), further_ops=further_ops)
        wanted, sentence = choose_scan(task, wanted, budget=args.scan_budget)
        if is_main():
            # Negatives drawn otherwise than from all targets as they are now are to be known without asking for it.
            (logger.info if wanted.strategy == "full" else logger.warning)(sentence)
    return broadcast_object((wanted, sentence))


def scan_task(
    model: DualEncoderModel, args: CacheTrainingArguments, live: LiveCache, *, mean_tokens: float, further_ops: float
) -> ScanTask:  # fmt: skip
    """Describe what a scan of this run has to do, and how long its steps take besides."""
    own = args.per_device_train_batch_size
    texts = own * args.texts_per_query
    weights = model.target_encoder.num_parameters(exclude_embeddings=True)
    gradient = live.online is not None and args.corrector_fit == "gradient"
    return ScanTask(
        targets=len(live.cache), dim=live.corrected.dim, batch=own * args.world_size, processes=args.world_size,
        correction_ops=0.0 if live.online is None else correction_ops(live.online.corrector.config),
        steps_between_fits=1 if gradient else args.corrector_update_steps,
        step_ops=6.0 * weights * texts * mean_tokens + further_ops, half_encoder=args.bf16 or args.fp16,
        device=args.device.type, threads=torch.get_num_threads(),
    )  # fmt: skip
