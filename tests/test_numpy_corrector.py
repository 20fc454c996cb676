"""What numpy computes of a corrector is what torch computes, also where torch is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_helpers import ROWS, random_corrector, random_vectors, run_without

from hf_corrector.exports.numpy_worker import save_for_numpy
from hf_corrector.models import CorrectorModel
from hf_corrector.models.configuration_corrector import ACTIVATIONS, KINDS, SAME_SIZE_KINDS
from hf_corrector.numpy_corrector import NumpyCorrector
from hf_corrector.side_features import TokenCounts

CASES: list[tuple[str, int, dict[str, Any]]] = [
    *((kind, 24, {}) for kind in KINDS),
    *((kind, size, {}) for kind in KINDS if kind not in SAME_SIZE_KINDS for size in (16, 40)),
    *(("residual_mlp", 24, {"activation": name}) for name in ACTIVATIONS),
    *((kind, 24, {"normalize_output": False}) for kind in ("affine", "residual_mlp")),
]


@pytest.mark.parametrize(("kind", "dim_out", "settings"), CASES, ids=[f"{k}-{d}-{s}" for k, d, s in CASES])
def test_numpy_corrects_as_torch_does(kind: str, dim_out: int, settings: dict[str, Any], tmp_path: Path) -> None:
    model = random_corrector(kind, dim_out=dim_out, **settings)
    stale = random_vectors()
    found = NumpyCorrector.load(save_for_numpy(model, tmp_path)).correct(stale.numpy())
    assert found.dtype == np.float32 and found.shape == (ROWS, dim_out)
    assert np.abs(found - model.correct(stale).numpy()).max() <= 1e-5


def counts(rows: int) -> TokenCounts:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, 9, (rows,), generator=generator).tolist()
    lists = [torch.randint(0, 50, (length,), generator=generator).tolist() for length in lengths]
    return TokenCounts.from_lists(lists, vocabulary=50, bigram_buckets=14)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "identity"])
def test_tokens_move_vectors_as_torch_moves_them(kind: str, tmp_path: Path) -> None:
    model = random_corrector(kind, side="tokens", side_dim=64, side_vocabulary=50, side_rows=20)
    model.load_parameters({"side_place": torch.arange(64) % 21})
    stale, side = random_vectors(), counts(ROWS)
    found = NumpyCorrector.load(save_for_numpy(model, tmp_path)).correct(stale.numpy(), side)
    assert np.abs(found - model.correct(stale, side).numpy()).max() <= 1e-5
    assert np.abs(found - random_corrector(kind).correct(stale).numpy()).max() > 0.01


@pytest.mark.parametrize("side", ["word_embeddings", "matrix"])
def test_dense_side_features_move_vectors_too(side: str, tmp_path: Path) -> None:
    model = random_corrector("affine", side=side, side_dim=5)
    stale, matrix = random_vectors(), random_vectors(dim=5)
    found = NumpyCorrector.load(save_for_numpy(model, tmp_path)).correct(stale.numpy(), matrix.numpy())
    assert np.abs(found - model.correct(stale, matrix).numpy()).max() <= 1e-5


def test_folder_works_where_neither_torch_nor_this_package_is(tmp_path: Path) -> None:
    model, stale = random_corrector("residual_mlp"), random_vectors()
    folder = save_for_numpy(model, tmp_path / "worker")
    np.save(tmp_path / "stale.npy", stale.numpy())
    script = """
import numpy, sys
from numpy_corrector import NumpyCorrector
numpy.save("../found.npy", NumpyCorrector.load(".").correct(numpy.load("../stale.npy", mmap_mode="r")))
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "hf_corrector"}))
"""
    printed = run_without(["torch", "transformers", "hf_corrector"], script, cwd=folder)
    assert printed == "[]\n"
    assert np.abs(np.load(tmp_path / "found.npy") - model.correct(stale).numpy()).max() <= 1e-5


def test_folder_still_is_one_of_a_corrector(tmp_path: Path) -> None:
    model, stale = random_corrector("affine"), random_vectors(10)
    again = CorrectorModel.from_pretrained(str(save_for_numpy(model, tmp_path)))
    assert torch.equal(again.correct(stale), model.correct(stale))


def test_half_precision_vectors_and_none_at_all_are_taken(tmp_path: Path) -> None:
    worker = NumpyCorrector.load(save_for_numpy(random_corrector("affine"), tmp_path))
    half = random_vectors(10).half().numpy()
    assert np.array_equal(worker.correct(half), worker.correct(half.astype(np.float32)))
    assert worker.correct(half[:0]).shape == (0, 24)


@pytest.mark.parametrize(
    ("vectors", "side", "message"),
    [
        (np.zeros((3, 5), np.float32), None, r"shape \(n, 24\)"),
        (np.zeros((3, 24), np.int64), None, "floating"),
        (np.full((3, 24), np.nan, np.float32), None, "row 0"),
        (np.zeros((3, 24), np.float32), np.zeros((3, 2)), "no side features"),
    ],
    ids=["size", "integers", "NaN", "unwanted side"],
)
def test_unfit_vectors_are_refused(vectors: Any, side: Any, message: str, tmp_path: Path) -> None:
    worker = NumpyCorrector.load(save_for_numpy(random_corrector("affine"), tmp_path))
    with pytest.raises(ValueError, match=message):
        worker.correct(vectors, side)


def test_missing_and_short_side_features_are_refused(tmp_path: Path) -> None:
    model = random_corrector("affine", side="matrix", side_dim=5)
    worker, stale = NumpyCorrector.load(save_for_numpy(model, tmp_path)), np.zeros((3, 24), np.float32)
    with pytest.raises(ValueError, match="Pass the matrix"):
        worker.correct(stale)
    with pytest.raises(ValueError, match="same 3 targets"):
        worker.correct(stale, np.zeros((2, 5)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "bert"}, "configuration of a corrector"), ({"kind": "spline"}, "a kind among"),
     ({"kind": "kernel"}, "got none for")],
)  # fmt: skip
def test_other_folders_are_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    save_for_numpy(random_corrector("affine"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        NumpyCorrector.load(tmp_path)
