"""Synthetic encoders whose drift is known: vectors before and after, and queries that each look for one target.

Targets are unit vectors of a low-dimensional source plus a little noise. Training moves an encoder by a given length
times a direction that is, by kind:

* ``linear``: a linear map of the old vector, which an affine corrector can learn to the end;
* ``smooth``: a random network of the old vector, smooth but not linear;
* ``partly``: half a linear map, half noise of each target that cannot be read off its old vector;
* ``words``: half a linear map, half the sum of a vector for each of the target's words, of which the old vector says
  nothing;
* ``rotated``: a skew-symmetric map, the beginning of a rotation;
* ``clustered``: a linear map of its own for each of some clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from hf_corrector.side_features import TokenCounts

KINDS = ("linear", "smooth", "partly", "words")
# Kinds nothing of the planner was ever chosen with.
OTHER_KINDS = ("rotated", "clustered")
DIM, SOURCE_DIM, QUERIES = 64, 24, 300
CLUSTERS, VOCABULARY, LENGTH = 8, 400, 8


@dataclass(frozen=True)
class SyntheticDrift:
    """Vectors before and after a drift of known nature, and queries that each look for one target.

    Attributes:
        name: Kind and staleness.
        old: ``(n, dim)``.
        new: ``(n, dim)``.
        queries: By the new encoder, ``(q, dim)``.
        relevant: The target of each query.
        tokens: Of the targets, where the drift goes with them.
    """

    name: str
    old: torch.Tensor
    new: torch.Tensor
    queries: torch.Tensor
    relevant: list[dict[int, float]]
    tokens: TokenCounts | None = None


def synthetic_drift(
    kind: str, staleness: float, *, targets: int = 6_000, seed: int = 0, queries: int = QUERIES,
    query_noise: float = 0.9,
) -> SyntheticDrift:  # fmt: skip
    """Make targets and move them.

    Args:
        kind: One of :data:`KINDS` or :data:`OTHER_KINDS`.
        staleness: Length of the displacement, relative to the vectors.
        targets: How many.
        seed: Of everything random.
        queries: How many.
        query_noise: Length of what a query has beside its target.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    source = gaussian(targets, SOURCE_DIM) * torch.linspace(2.0, 0.3, SOURCE_DIM)
    old = normalize(source @ gaussian(SOURCE_DIM, DIM) + 0.5 * gaussian(targets, DIM), dim=1)
    linear, tokens = normalize(old @ gaussian(DIM, DIM) + 0.5 * gaussian(DIM) / DIM**0.5, dim=1), None
    match kind:
        case "linear":
            direction = linear
        case "smooth":
            hidden = torch.tanh(2.0 * DIM**0.5 * old @ gaussian(DIM, 2 * DIM) / DIM**0.5)
            direction = normalize(hidden @ gaussian(2 * DIM, DIM), dim=1)
        case "partly":
            direction = normalize(linear + normalize(gaussian(targets, DIM), dim=1), dim=1)
        case "rotated":
            half = gaussian(DIM, DIM)
            direction = normalize(old @ (half - half.T), dim=1)
        case "clustered":
            nearest = (old @ gaussian(DIM, CLUSTERS)).argmax(dim=1)
            direction = normalize(torch.einsum("nd,nde->ne", old, gaussian(CLUSTERS, DIM, DIM)[nearest]), dim=1)
        case _:
            drawn = (VOCABULARY * torch.rand(targets, LENGTH, generator=generator).square()).long()
            tokens = TokenCounts.from_lists(drawn.tolist(), vocabulary=VOCABULARY, bigram_buckets=0)
            direction = normalize(linear + normalize(gaussian(VOCABULARY, DIM)[drawn].sum(dim=1), dim=1), dim=1)
    new = normalize(old + staleness * direction, dim=1)
    wanted = torch.randperm(targets, generator=generator)[:queries]
    asked = normalize(new[wanted] + query_noise * normalize(gaussian(queries, DIM), dim=1), dim=1)
    relevant = [{row: 1.0} for row in wanted.tolist()]
    return SyntheticDrift(f"{kind}-{staleness:g}", old, new, asked, relevant, tokens)
