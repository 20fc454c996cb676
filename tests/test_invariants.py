"""What must hold across modules, whatever changes inside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from hf_corrector.candidate_sampling import SamplingPlan, sample_candidates
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.data.pairs import from_pairs
from hf_corrector.data.retrieval import RetrievalData, column
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.index.base import TensorVectors
from hf_corrector.index.exact import ExactIndex
from hf_corrector.losses import truncated_softmax_loss
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.sampling import BLOCK_ROWS, DrawKeys, ExcludedRows
from hf_corrector.scans import BlockScan, ScanPlan
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer


def unit(rows: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def small_data() -> RetrievalData:
    rows = [
        {"anchor": f"query about {word} {number}", "positive": f"{word} answers {number}"}
        for number, word in enumerate(["copy", "move", "list", "count", "sort", "find", "print", "replace"] * 4)
    ]
    return from_pairs(Dataset.from_list(rows), dev_fraction=0.0, test_fraction=0.0)


def test_identity_corrector_is_no_corrector_bit_for_bit() -> None:
    stale, queries = unit(BLOCK_ROWS + 500, 8, 0), unit(6, 8, 1)
    identity = CorrectorModel(CorrectorConfig(kind="identity", input_dim=8))
    seen, plain = CorrectedTargets(TensorVectors(stale), identity), CorrectedTargets(TensorVectors(stale))
    assert torch.equal(seen.read(0, len(stale)), stale) and torch.equal(identity.correct(stale), stale)
    plan = SamplingPlan(negatives="softmax", num_negatives=5, uniform_fraction=0.2, scale=10.0, seed=1)
    keys, excluded = DrawKeys(1, 2, np.arange(6)), ExcludedRows([[row] for row in range(6)])
    first, second = (
        sample_candidates(
            BlockScan(one, ScanPlan()), queries, plan, positives=torch.arange(6), excluded=excluded, keys=keys
        ).candidates
        for one in (seen, plain)
    )
    assert torch.equal(first.ids, second.ids) and torch.equal(first.scores, second.scores)
    searched = [ExactIndex(one).search(queries, 20) for one in (seen, plain)]
    assert torch.equal(searched[0].rows, searched[1].rows) and torch.equal(searched[0].scores, searched[1].scores)


@pytest.mark.parametrize("kind", ["mean_shift", "affine", "residual_mlp"])
def test_an_untrained_corrector_changes_nothing(kind: str) -> None:
    stale = unit(50, 8, 0)
    corrected = CorrectorModel(CorrectorConfig(kind=kind, input_dim=8)).correct(stale)
    assert torch.allclose(corrected, stale, atol=2e-7)


def test_loss_over_all_targets_is_the_full_softmax() -> None:
    queries, targets = unit(5, 8, 0), unit(40, 8, 1)
    labels = torch.tensor([3, 0, 39, 7, 7])
    loss = truncated_softmax_loss(queries @ targets.T, labels, torch.ones(5, 40, dtype=torch.bool), scale=20.0)
    full = -torch.log_softmax(20.0 * (queries.double() @ targets.double().T), dim=1)[torch.arange(5), labels]
    assert torch.allclose(loss.double(), full, atol=1e-5)


def test_snapshot_and_chunks_of_corrected_targets_agree() -> None:
    stale = unit(300, 8, 0)
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=8))
    corrector.weight.copy_(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)) * 0.2)
    kept = CorrectedTargets(TensorVectors(stale), corrector)
    chunked = CorrectedTargets(TensorVectors(stale), corrector, snapshot_bytes=0)
    rows = torch.tensor([7, 299, 7, 0])
    assert torch.allclose(kept.read(10, 200), chunked.read(10, 200), atol=1e-6)
    assert torch.allclose(kept.gather(rows), chunked.gather(rows), atol=1e-6)


def test_cache_rows_are_what_training_encodes(tiny_encoder: str, tmp_path: Path) -> None:
    data, model = small_data(), DualEncoderModel.from_encoder(tiny_encoder)
    cache = build_cache(model, data.corpus, tmp_path / "cache", options=EncodeOptions(progress=False)).cache
    model.train()
    texts = column(data.corpus, "text")
    for row, tokens in enumerate(model.tokenize(texts, "target")):
        batch = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64)}
        cosine = F.cosine_similarity(model.embed(batch, "target")[0], cache.read(row, row + 1)[0], dim=0)
        assert abs(float(cosine.detach()) - 1.0) < 1e-6


def test_accumulated_batches_equal_one_big_batch_where_negatives_are_per_query(
    tiny_encoder: str, tmp_path: Path
) -> None:
    data, states = small_data(), []
    # Plain gradient descent: Adam would blow rounding errors of gradients that are zero up to whole steps.
    for name, batch, accumulation in (("big", 8, 1), ("parts", 2, 4)):
        model = DualEncoderModel.from_encoder(tiny_encoder)
        args = DualEncoderTrainingArguments(
            str(tmp_path / name), max_steps=3, per_device_train_batch_size=batch, learning_rate=0.1, optim="sgd",
            seed=5,
            gradient_accumulation_steps=accumulation, share_negatives=False, num_negatives=4, report_to=[],
            disable_tqdm=True, save_strategy="no", corrector_update_steps=1, corrector_warmup_steps=1,
        )  # fmt: skip
        DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus).train()
        states.append(model.state_dict())
    for name, tensor in states[0].items():
        assert torch.allclose(tensor.double(), states[1][name].double(), atol=1e-5), name


def test_a_fit_in_closed_form_is_the_optimum_gradients_find() -> None:
    from hf_corrector.fitting import Pairs, fit_affine

    stale, generator = unit(60, 4, 0), torch.Generator().manual_seed(1)
    fresh = stale @ torch.randn(4, 4, generator=generator) + 0.1
    fresh = fresh + 0.05 * torch.randn(60, 4, generator=generator)
    pairs = Pairs.collect(stale, fresh)
    fit = fit_affine(pairs, priors=("identity",), relative_ridges=(0.1,))
    centred = pairs.stale - pairs.stale.mean(0)
    ridge = 0.1 * float(torch.linalg.eigvalsh(centred.T @ centred / 60).mean())
    weight = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        value = (pairs.stale + centred @ weight.T + bias - pairs.fresh).pow(2).sum(1).mean() + ridge * weight.pow(
            2
        ).sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert torch.allclose(fit.weight.double(), weight.detach(), atol=1e-5)
    assert torch.allclose(fit.bias.double(), bias.detach(), atol=1e-5)
