"""What is wrong with the arguments of a run, before any work is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from accelerate.utils import parse_flag_from_env
from transformers.trainer_utils import HubStrategy

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.configuration_corrector import ACTIVATIONS, CLOSED_FORM_KINDS, KINDS, SIDES
from hf_corrector.scans.base import STRATEGIES
from hf_corrector.training.refresh_schedule import RefreshSchedule
from hf_corrector.training.sharding import check_sharding

if TYPE_CHECKING:
    from hf_corrector.training.arguments import DualEncoderTrainingArguments
    from hf_corrector.training.cache_arguments import CacheTrainingArguments as Arguments

NEGATIVES = ("softmax", "top_k", "uniform", "in_batch")
STALENESS = ("corrector", "ignore", "refresh", "rerank")
CORRECTOR_FITS = ("closed_form", "gradient")
WARMUP_NEGATIVES = ("stale", "uniform")
CACHE_DTYPES = ("float32", "bfloat16", "float16")
DRIFT_ACTIONS = ("log", "refit", "refresh")
SCANS = ("auto", *STRATEGIES)
SCAN_DTYPES = ("auto", "float32", "bfloat16")
INFINITE = float("inf")


def check(args: DualEncoderTrainingArguments) -> None:
    """Refuse values out of range and combinations that cannot work (ConfigurationError)."""
    check_choices({
        "negatives": (args.negatives, NEGATIVES),
        "warmup_negatives": (args.warmup_negatives, WARMUP_NEGATIVES),
    })  # fmt: skip
    check_ranges({
        "num_negatives": (args.num_negatives, 1, INFINITE),
        "relative_margin": (args.relative_margin, 0, 1),
        "range_min": (args.range_min, 0, INFINITE),
        "given_negatives": (args.given_negatives, 0, INFINITE),
        "distillation_weight": (args.distillation_weight, 0, INFINITE),
        "distillation_temperature": (args.distillation_temperature, 1e-6, INFINITE),
    })  # fmt: skip
    check_common(args)
    _check_negatives(args)


def check_common(args: Arguments) -> None:
    """Refuse what no training from a cache can work with (ConfigurationError)."""
    _check_choices(args)
    _check_ranges(args)
    _check_refreshes(args)
    _check_encoder(args)
    _check_corrector(args)
    _check_upstream(args)


def refuse(name: str, *, expected: str, got: Any, cure: str) -> None:
    """Raise the error about an argument (ConfigurationError)."""
    raise ConfigurationError(name, expected=expected, got=str(got), cure=cure)


def check_choices(choices: dict[str, tuple[Any, tuple[str | None, ...]]]) -> None:
    """Refuse values that are not among those allowed: ``{name: (value, allowed)}`` (ConfigurationError)."""
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            refuse(name, expected=f"one of {allowed}", got=repr(value), cure="Choose one of them.")


def check_ranges(ranges: dict[str, tuple[float | None, float, float]]) -> None:
    """Refuse values out of range: ``{name: (value or None, least, most)}`` (ConfigurationError)."""
    for name, (value, least, most) in ranges.items():
        if value is not None and not least <= value <= most:
            span = f"at least {least:g}" if most > 1e6 else f"{least:g} to {most:g}"
            refuse(name, expected=span, got=value, cure="Give a number in that range.")


def check_launcher(args: Arguments) -> None:
    """Refuse DeepSpeed (ConfigurationError); called before transformers looks for a package that need not be there."""
    if args.deepspeed is not None or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        refuse(
            "deepspeed", expected="DistributedDataParallel or FSDP2", got="DeepSpeed",
            cure="Leave deepspeed out and start with examples/accelerate/ddp.yaml, or with fsdp2.yaml for shards.",
        )  # fmt: skip


def _check_choices(args: Arguments) -> None:
    check_choices({
        "staleness": (args.staleness, STALENESS),
        "corrector_kind": (args.corrector_kind, KINDS),
        "corrector_side": (args.corrector_side, (None, *SIDES)),
        "corrector_fit": (args.corrector_fit, (None, *CORRECTOR_FITS)),
        "corrector_activation": (args.corrector_activation, ACTIVATIONS),
        "cache_dtype": (args.cache_dtype, CACHE_DTYPES),
        "drift_action": (args.drift_action, DRIFT_ACTIONS),
        "scan": (args.scan, SCANS),
        "scan_dtype": (args.scan_dtype, SCAN_DTYPES),
    })  # fmt: skip


def _check_ranges(args: Arguments) -> None:
    check_ranges({
        "corrector_window": (args.corrector_window, 1, INFINITE),
        "corrector_update_steps": (args.corrector_update_steps, 1, INFINITE),
        "corrector_batch_size": (args.corrector_batch_size, 1, INFINITE),
        "corrector_updates": (args.corrector_updates, 1, INFINITE),
        "corrector_warmup_steps": (args.corrector_warmup_steps, 0, INFINITE),
        "corrector_hidden_dim": (args.corrector_hidden_dim, 1, INFINITE),
        "corrector_learning_rate": (args.corrector_learning_rate, 0, 1e30),
        "token_budget": (args.token_budget, 1, INFINITE),
        "per_device_train_batch_size": (args.per_device_train_batch_size, 1, INFINITE),
        "learning_rate": (args.learning_rate, 0, INFINITE),
        "uniform_fraction": (args.uniform_fraction, 0, 1),
        "mini_batch_size": (args.mini_batch_size, 1, INFINITE),
        "drift_bound": (args.drift_bound, 1e-9, 4 - 1e-9),
        "rerank_candidates": (args.rerank_candidates, 1, INFINITE),
        "scan_budget": (args.scan_budget, 0, 1),
        "scan_refresh_steps": (args.scan_refresh_steps, 1, INFINITE),
        "scan_pool": (args.scan_pool, 1, INFINITE),
        "scan_shortlist": (args.scan_shortlist, 1, INFINITE),
        "scan_memory_gb": (args.scan_memory_gb, 0, INFINITE),
    })  # fmt: skip


def _check_refreshes(args: Arguments) -> None:
    scheduled = bool(RefreshSchedule.parse(args.refresh_steps).phases)
    if args.staleness == "refresh" and not scheduled:
        refuse(
            "refresh_steps", expected="a schedule with staleness='refresh'", got=repr(args.refresh_steps),
            cure="Give a number of steps, for instance 100.",
        )  # fmt: skip
    if args.staleness in ("ignore", "rerank") and scheduled:
        refuse(
            "refresh_steps", expected=f"'never' with staleness={args.staleness!r}", got=repr(args.refresh_steps),
            cure="Use staleness='refresh', or 'corrector' with refreshes.",
        )  # fmt: skip
    if args.staleness in ("refresh", "rerank") and not args.samples_from_scores:
        refuse(
            "staleness", expected="'ignore' or 'corrector' where no negative is chosen by a cached vector",
            got=f"{args.staleness!r}",
            cure="Use staleness='ignore': nothing is read stale.",
        )  # fmt: skip

    if args.staleness == "rerank" and args.rerank_candidates < args.candidates_per_query:
        refuse(
            "rerank_candidates", expected=f"at least the {args.candidates_per_query} targets chosen for a query",
            got=args.rerank_candidates, cure="Raise it.",
        )  # fmt: skip

    if args.drift_bound is not None and not (args.needs_cache and args.train_targets and args.draws_uniformly):
        refuse(
            "drift_bound", expected="a run that trains targets, reads a cache and draws some targets by chance",
            got=f"uniform_fraction={args.uniform_fraction}, staleness={args.staleness!r}, "
            f"train_targets={args.train_targets}", cure="Leave drift_bound out.",
        )  # fmt: skip
    if args.drift_bound is not None and args.drift_action == "refit" and not args.uses_corrector:
        refuse(
            "drift_action", expected="'log' or 'refresh' without a corrector", got="'refit'", cure="Choose one of them."
        )


def _check_negatives(args: DualEncoderTrainingArguments) -> None:
    if args.sampling_correction and (args.share_negatives or args.negatives not in ("softmax", "uniform")):
        refuse(
            "sampling_correction", expected="share_negatives=False and negatives 'softmax' or 'uniform'",
            got=f"share_negatives={args.share_negatives}, negatives={args.negatives!r}",
            cure="How often shared or top-k negatives are drawn is not defined; switch one of the two off.",
        )  # fmt: skip
    wanted = args.negative_filter
    if (wanted.by_score or wanted.range_min) and not args.samples_from_scores:
        refuse(
            "absolute_margin, relative_margin, max_score, range_min",
            expected="negatives 'softmax' or 'top_k', which look at scores", got=repr(args.negatives),
            cure="Leave the filter out, or sample by scores.",
        )  # fmt: skip
    if args.drift_bound is not None and (wanted.by_score or wanted.range_min):
        refuse(
            "drift_bound", expected="uniform targets that no filter has sorted out: it judges all targets by them",
            got=repr(wanted), cure="Leave drift_bound or the filter out.",
        )  # fmt: skip


def _check_encoder(args: Arguments) -> None:
    if not args.train_targets and args.staleness != "ignore":
        refuse(
            "staleness", expected="'ignore' with train_targets=False: frozen targets do not go stale",
            got=repr(args.staleness), cure="Use staleness='ignore'.",
        )  # fmt: skip
    check_sharding(args)
    if args.fp16 and args.device.type == "cpu":
        refuse(
            "fp16", expected="a GPU: on a CPU accelerate computes in float32 and does not say so", got="a CPU",
            cure="Use bf16=True, which this package runs natively on CPUs that have it.",
        )  # fmt: skip


def _check_corrector(args: Arguments) -> None:
    closed = args.corrector_kind in CLOSED_FORM_KINDS
    if args.corrector_fit == "closed_form" and args.corrector_kind == "residual_mlp":
        refuse(
            "corrector_fit", expected="'gradient' for a residual_mlp", got="'closed_form'",
            cure="Leave corrector_fit out, or use corrector_kind='affine'.",
        )  # fmt: skip
    if args.corrector_fit == "gradient" and closed:
        refuse(
            "corrector_fit", expected=f"'closed_form' for {args.corrector_kind}", got="'gradient'",
            cure="Leave corrector_fit out, or use corrector_kind='residual_mlp'.",
        )  # fmt: skip


def _check_upstream(args: Arguments) -> None:
    """Refuse what transformers offers and this trainer cannot honour, before it fails in the middle of a run."""
    if args.train_sampling_strategy not in ("random", "sequential"):
        refuse(
            "train_sampling_strategy", expected="'random' or 'sequential'", got=repr(args.train_sampling_strategy),
            cure="Leave it out: batches are padded to their own longest query and target.",
        )  # fmt: skip
    if args.include_num_input_tokens_seen != "no":
        refuse(
            "include_num_input_tokens_seen", expected="'no'", got=repr(args.include_num_input_tokens_seen),
            cure="Read trainer.cost instead, which counts every encoded query and target.",
        )  # fmt: skip
    if args.push_to_hub and args.hub_strategy != HubStrategy.END:
        refuse(
            "hub_strategy", expected="'end': the model and its card are pushed when it is saved", got=args.hub_strategy,
            cure="Leave hub_strategy out, and push checkpoints by 'hf-corrector push FOLDER REPO_ID'.",
        )  # fmt: skip
    if args.label_smoothing_factor:
        refuse(
            "label_smoothing_factor", expected="0: the losses here have no smoothed labels",
            got=args.label_smoothing_factor, cure="Leave it out.",
        )  # fmt: skip
    if args.remove_unused_columns:
        refuse("remove_unused_columns", expected="False", got="True", cure="Leave it out.")
    if args.n_gpu > 1:
        refuse(
            "processes", expected="one device per process", got=f"{args.n_gpu} devices in one",
            cure="Start with `accelerate launch --multi_gpu`, one process per device, or set CUDA_VISIBLE_DEVICES.",
        )  # fmt: skip
