from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_corrector.candidate_sampling import GivenTargets, SamplingPlan, contrast_set, sample_candidates
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.index.base import TensorVectors
from hf_corrector.sampling import DrawKeys, ExcludedRows
from hf_corrector.sampling.fidelity import EncodedTargets, estimate_total_variation
from hf_corrector.scans import BlockScan, ScanPlan

DIM, BATCH, UNIFORM = 32, 32, 0.25


def mean_variations(
    targets: int, draws: int, scale: float, drift: float, steps: int = 50
) -> tuple[float, float]:  # fmt: skip
    """Sample as training does, from vectors that have drifted; return the mean estimate and the mean truth."""
    generator = torch.Generator().manual_seed(targets + draws)
    stale = F.normalize(torch.randn(targets, DIM, generator=generator), dim=1)
    fresh = F.normalize(stale + drift * torch.randn(targets, DIM, generator=generator) / DIM**0.5, dim=1)
    scan = BlockScan(CorrectedTargets(TensorVectors(stale)), ScanPlan())
    plan = SamplingPlan("softmax", draws, UNIFORM, scale, seed=0)
    estimates, truths = [], []
    for step in range(steps):
        positives = torch.randint(targets, (BATCH,), generator=generator)
        queries = F.normalize(fresh[positives] + torch.randn(BATCH, DIM, generator=generator) / DIM**0.5, dim=1)
        excluded = ExcludedRows([[row] for row in positives.tolist()])
        keys = DrawKeys(seed=0, step=step, query_ids=np.arange(BATCH) + step * BATCH)
        sampled = sample_candidates(scan, queries, plan, positives=positives, excluded=excluded, keys=keys)
        contrast = contrast_set(sampled.candidates, GivenTargets(positives, excluded), share_negatives=True)
        rows = torch.unique(contrast.rows)
        assert sampled.log_normalizer is not None
        encoded = EncodedTargets(
            queries @ stale[rows].T, queries @ fresh[rows].T, rows == positives[:, None],
            torch.isin(rows, positives), sampled.log_normalizer,
        )  # fmt: skip
        found = estimate_total_variation(
            encoded, scale=scale, draws=draws * (1 - UNIFORM), uniform_draws=draws * UNIFORM, num_targets=targets
        )
        assert ((found >= 0) & (found <= 1)).all()
        estimates.append(found.mean())
        logits = [(scale * queries @ one.T).double() for one in (stale, fresh)]
        first, second = (one.scatter(1, positives[:, None], -torch.inf).softmax(dim=1) for one in logits)
        truths.append(0.5 * (first - second).abs().sum(dim=1).mean())
    return float(torch.stack(estimates).mean()), float(torch.stack(truths).mean())


@pytest.mark.parametrize(
    ("targets", "draws", "scale", "drift", "about"),
    [
        (5000, 8, 20.0, 0.04, 0.05), (5000, 8, 20.0, 0.17, 0.2), (5000, 8, 20.0, 0.47, 0.5),
        (5000, 32, 20.0, 0.47, 0.5),
        # Where a few targets hold most of the mass, draws without replacement go far down the list.
        (5000, 8, 50.0, 0.03, 0.05), (5000, 8, 50.0, 0.12, 0.2), (5000, 32, 100.0, 0.11, 0.2),
        (5000, 32, 100.0, 0.28, 0.5), (20_000, 16, 50.0, 0.1, 0.2),
    ],
)  # fmt: skip
def test_mean_of_the_estimates_is_near_the_truth(
    targets: int, draws: int, scale: float, drift: float, about: float
) -> None:
    estimate, truth = mean_variations(targets, draws, scale, drift)
    assert truth == pytest.approx(about, rel=0.3)
    assert abs(estimate - truth) < 0.05


@pytest.mark.parametrize("draws", [0.0, 4.0, 30.0])
def test_with_all_targets_at_hand_the_estimate_is_exact(draws: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sampled, fresh = torch.randn(2, 6, 40, generator=generator)
    excluded = torch.zeros(6, 40, dtype=torch.bool)
    excluded[:, 3] = True
    sampled_logits, fresh_logits = ((2.0 * one.double()).masked_fill(excluded, -torch.inf) for one in (sampled, fresh))
    encoded = EncodedTargets(
        sampled, fresh, excluded, torch.ones(40, dtype=torch.bool), torch.logsumexp(sampled_logits, dim=1)
    )
    found = estimate_total_variation(encoded, scale=2.0, draws=draws, uniform_draws=1.0, num_targets=40)
    exact = 0.5 * (sampled_logits.softmax(dim=1) - fresh_logits.softmax(dim=1)).abs().sum(dim=1)
    assert torch.allclose(found, exact, atol=1e-6)
    same = EncodedTargets(sampled, sampled, excluded, encoded.certain, encoded.log_normalizer)
    unmoved = estimate_total_variation(same, scale=2.0, draws=draws, uniform_draws=1.0, num_targets=40)
    assert unmoved.max() < 1e-6


def test_estimates_are_finite_where_one_target_holds_all_the_mass() -> None:
    scores = torch.zeros(2, 5)
    scores[:, 0] = 40.0
    encoded = EncodedTargets(
        scores, scores.flip(1), torch.zeros(2, 5, dtype=torch.bool), torch.zeros(5, dtype=torch.bool),
        torch.logsumexp(20 * scores.double(), dim=1),
    )  # fmt: skip
    found = estimate_total_variation(encoded, scale=20.0, draws=6.0, uniform_draws=2.0, num_targets=1000)
    assert torch.allclose(found, torch.ones(2, dtype=torch.float64))
