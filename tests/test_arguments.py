from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser

from hf_corrector.errors import ConfigurationError
from hf_corrector.models.configuration_corrector import ACTIVATIONS, KINDS
from hf_corrector.sampling import NegativeFilter
from hf_corrector.training.argument_checks import (
    CACHE_DTYPES,
    NEGATIVES,
    SCAN_DTYPES,
    SCANS,
    STALENESS,
    WARMUP_NEGATIVES,
)
from hf_corrector.training.arguments import DualEncoderTrainingArguments


def arguments(tmp_path: Path, **changes: Any) -> DualEncoderTrainingArguments:
    return DualEncoderTrainingArguments(output_dir=str(tmp_path), report_to="none", **changes)


def test_defaults_are_a_corrected_softmax_run(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    assert (args.negatives, args.staleness, args.corrector_kind) == ("softmax", "corrector", "affine")
    assert args.uses_corrector
    assert args.samples_from_scores
    assert args.needs_cache
    assert not args.remove_unused_columns
    assert args.per_device_train_batch_size == 32


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("negatives", NEGATIVES), ("corrector_kind", KINDS), ("corrector_activation", ACTIVATIONS),
        ("warmup_negatives", WARMUP_NEGATIVES), ("cache_dtype", CACHE_DTYPES), ("scan", SCANS),
        ("scan_dtype", SCAN_DTYPES),
    ],
)  # fmt: skip
def test_every_choice_is_accepted_and_anything_else_is_named(
    name: str, values: tuple[str, ...], tmp_path: Path
) -> None:
    for value in values:
        assert getattr(arguments(tmp_path, **{name: value}), name) == value
    with pytest.raises(ConfigurationError, match=f"^{name}: .*{values[0]}.*'nonsense'"):
        arguments(tmp_path, **{name: "nonsense"})


@pytest.mark.parametrize("staleness", STALENESS)
def test_every_kind_of_staleness_is_accepted(staleness: str, tmp_path: Path) -> None:
    refresh_steps = "10" if staleness == "refresh" else "never"
    args = arguments(tmp_path, staleness=staleness, refresh_steps=refresh_steps)
    assert args.uses_corrector is (staleness == "corrector")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("staleness", "nonsense"), ("corrector_fit", "nonsense"), ("num_negatives", 0), ("corrector_window", 0),
        ("corrector_update_steps", 0), ("corrector_batch_size", 0), ("corrector_updates", 0),
        ("corrector_warmup_steps", -1), ("token_budget", 0), ("uniform_fraction", -0.1), ("uniform_fraction", 1.1),
        ("uniform_fraction", float("nan")), ("corrector_learning_rate", -1e-3),
        ("corrector_learning_rate", float("nan")), ("corrector_hidden_dim", 0),
        ("relative_margin", 1.1), ("range_min", -1), ("given_negatives", -1), ("distillation_weight", -0.5),
        ("distillation_temperature", 0.0), ("mini_batch_size", 0), ("rerank_candidates", 0), ("scan_budget", 1.5),
        ("scan_refresh_steps", 0), ("scan_pool", 0), ("scan_shortlist", 0), ("scan_memory_gb", -1.0),
        ("scan_dtype", "float16"), ("refresh_steps", "often"), ("remove_unused_columns", True),
        ("per_device_train_batch_size", 0), ("learning_rate", -1.0),
    ],
)  # fmt: skip
def test_each_value_out_of_range_is_named(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}: "):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "span"),
    [("drift_bound", 5.0, "1e-09 to 4"), ("scan_budget", 1.5, "0 to 1"), ("num_negatives", 0, "at least 1")],
)
def test_the_range_is_said(name: str, value: float, span: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"expected {span}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"staleness": "refresh"}, "refresh_steps"),
        ({"staleness": "refresh", "refresh_steps": "0"}, "refresh_steps"),
        ({"staleness": "ignore", "refresh_steps": "10"}, "refresh_steps"),
        ({"staleness": "refresh", "refresh_steps": "10", "negatives": "uniform"}, "staleness"),
        ({"corrector_kind": "residual_mlp", "corrector_fit": "closed_form"}, "corrector_fit"),
        ({"corrector_kind": "affine", "corrector_fit": "gradient"}, "corrector_fit"),
        ({"corrector_kind": "mean_shift", "corrector_fit": "gradient"}, "corrector_fit"),
        ({"staleness": "rerank", "refresh_steps": "10"}, "refresh_steps"),
        ({"staleness": "rerank", "negatives": "uniform"}, "staleness"),
        ({"staleness": "rerank", "num_negatives": 9, "rerank_candidates": 8}, "rerank_candidates"),
        ({"train_targets": False}, "staleness"),
        ({"train_targets": False, "staleness": "rerank"}, "staleness"),
        ({"absolute_margin": 0.1, "negatives": "uniform"}, "absolute_margin, relative_margin, max_score, range_min"),
        ({"max_score": 0.9, "drift_bound": 0.2}, "drift_bound"),
        ({"range_min": 3, "negatives": "in_batch"}, "absolute_margin, relative_margin, max_score, range_min"),
        ({"drift_bound": 0.1, "negatives": "in_batch"}, "drift_bound"),
        ({"drift_bound": 0.1, "uniform_fraction": 0.0}, "drift_bound"),
        ({"drift_bound": 0.1, "negatives": "uniform", "staleness": "ignore"}, "drift_bound"),
        ({"drift_bound": 0.1, "train_targets": False, "staleness": "ignore"}, "drift_bound"),
        ({"sampling_correction": True}, "sampling_correction"),
        ({"sampling_correction": True, "share_negatives": False, "negatives": "top_k"}, "sampling_correction"),
        ({"sampling_correction": True, "share_negatives": False, "negatives": "in_batch"}, "sampling_correction"),
    ],
)
def test_each_contradiction_is_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"^{named}: "):
        arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"staleness": "corrector", "refresh_steps": "0-100:50"},
        {"staleness": "rerank", "rerank_candidates": 8, "num_negatives": 8},
        {"train_targets": False, "staleness": "ignore", "negatives": "in_batch"},
        {"absolute_margin": 0.05, "relative_margin": 0.1, "max_score": 0.9, "range_min": 5, "negatives": "top_k"},
        {"scan": "pooled", "scan_pool": 100, "scan_dtype": "bfloat16", "scan_memory_gb": 0.0},
        {"sampling_correction": True, "share_negatives": False},
        {"sampling_correction": True, "share_negatives": False, "negatives": "uniform"},
        {"corrector_kind": "residual_mlp", "corrector_fit": "gradient"},
        {"uniform_fraction": 0.0, "corrector_warmup_steps": 0},
        {"drift_bound": 0.1, "negatives": "uniform"},
        {"uniform_fraction": 1.0, "refresh_steps": 100},
    ],
)
def test_combinations_that_make_sense_are_accepted(changes: dict[str, Any], tmp_path: Path) -> None:
    arguments(tmp_path, **changes)


@pytest.mark.parametrize(
    ("kind", "fit"),
    [
        ("affine", "closed_form"),
        ("mean_shift", "closed_form"),
        ("residual_mlp", "gradient"),
        ("identity", "closed_form"),
    ],
)
def test_the_fit_follows_from_the_family(kind: str, fit: str, tmp_path: Path) -> None:
    assert arguments(tmp_path, corrector_kind=kind).corrector_fit == fit


@pytest.mark.parametrize(
    ("negatives", "staleness", "needs_cache"),
    [
        ("softmax", "ignore", True), ("top_k", "ignore", True), ("uniform", "ignore", False),
        ("in_batch", "ignore", False), ("uniform", "corrector", True), ("in_batch", "corrector", True),
    ],
)  # fmt: skip
def test_a_cache_is_needed_for_scores_and_for_a_corrector(
    negatives: str, staleness: str, needs_cache: bool, tmp_path: Path
) -> None:
    assert arguments(tmp_path, negatives=negatives, staleness=staleness).needs_cache is needs_cache


def test_arguments_are_read_from_a_command_line(tmp_path: Path) -> None:
    words = [
        "--output_dir", str(tmp_path), "--negatives", "top_k", "--num_negatives", "3", "--share_negatives", "False",
        "--refresh_steps", "0-10:5", "--corrector_kind", "residual_mlp", "--uniform_fraction", "0.5",
        "--learning_rate", "3e-5", "--report_to", "none",
    ]  # fmt: skip
    (args,) = HfArgumentParser(DualEncoderTrainingArguments).parse_args_into_dataclasses(words)
    assert (args.negatives, args.num_negatives, args.share_negatives) == ("top_k", 3, False)
    assert (args.refresh_steps, args.corrector_kind, args.corrector_fit) == ("0-10:5", "residual_mlp", "gradient")
    assert (args.uniform_fraction, args.learning_rate) == (0.5, 3e-5)


def test_every_new_argument_is_explained() -> None:
    inherited = DualEncoderTrainingArguments.__mro__[2].__dataclass_fields__
    for name, field in DualEncoderTrainingArguments.__dataclass_fields__.items():
        if name not in inherited:
            assert field.metadata["help"].endswith("."), name


def test_arguments_survive_their_own_dictionary(tmp_path: Path) -> None:
    args = arguments(tmp_path, negatives="top_k", corrector_kind="residual_mlp")
    again = DualEncoderTrainingArguments(**{
        name: value for name, value in args.to_dict().items()
        if name in ("output_dir", "negatives", "corrector_kind", "corrector_fit", "refresh_steps", "cache_dtype")
    })  # fmt: skip
    assert (again.negatives, again.corrector_fit) == ("top_k", "gradient")


def test_filter_of_negatives_is_what_the_arguments_say(tmp_path: Path) -> None:
    args = arguments(tmp_path, absolute_margin=0.1, relative_margin=0.2, max_score=0.8, range_min=5)
    assert args.negative_filter == NegativeFilter(0.1, 0.2, 0.8, 5)
    assert arguments(tmp_path).negative_filter == NegativeFilter()


def test_frozen_targets_are_read_from_a_cache(tmp_path: Path) -> None:
    assert arguments(tmp_path, train_targets=False, staleness="ignore", negatives="uniform").needs_cache
