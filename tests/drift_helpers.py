"""Small made-up drifts that several tests of correctors share."""

import torch
from torch.nn.functional import normalize

from hf_corrector.losses import corrector_loss
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.side_features import TokenCounts
from hf_corrector.training.corrector_fit import CorrectorFitting

DIM = 8
TARGETS = 400
QUICK = CorrectorFitting(max_epochs=30, batch_size=64, updates=2, finishing_updates=20, update_steps=5, window=20)


def make(kind: str, dim_in: int = DIM, dim_out: int = DIM, *, seed: int = 0) -> CorrectorModel:
    torch.manual_seed(seed)
    return CorrectorModel(CorrectorConfig(kind=kind, input_dim=dim_in, output_dim=dim_out, hidden_dim=64))


def unit_rows(count: int = TARGETS, dim: int = DIM, *, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def linear_drift(stale: torch.Tensor) -> torch.Tensor:
    change = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5)) * 0.4
    return normalize(stale @ (torch.eye(DIM) + change).T + 0.3, dim=1)


def bent_drift(stale: torch.Tensor) -> torch.Tensor:
    """Move each vector in a direction that no linear map of it gives."""
    change = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(6))
    return normalize(stale + 0.7 * torch.sign(stale[:, :1]) * torch.tanh(3 * stale @ change.T).abs(), dim=1)


def error(corrector: CorrectorModel, stale: torch.Tensor, fresh: torch.Tensor) -> float:
    return float(corrector_loss(corrector.correct(stale), fresh))


def token_counts(count: int = TARGETS, *, vocabulary: int = 30, seed: int = 3) -> TokenCounts:
    """Give every target a few tokens out of a small vocabulary."""
    drawn = torch.randint(vocabulary, (count, 6), generator=torch.Generator().manual_seed(seed))
    return TokenCounts.from_lists(drawn.tolist(), vocabulary=vocabulary, bigram_buckets=64)


def lexical_drift(stale: torch.Tensor, counts: TokenCounts) -> torch.Tensor:
    """Move each vector by what its tokens say, which its own direction does not tell."""
    change = 0.4 * torch.randn(counts.width, DIM, generator=torch.Generator().manual_seed(7))
    change[counts.vocabulary :] = 0
    return normalize(stale + counts.read(0, len(counts)) @ change, dim=1)
