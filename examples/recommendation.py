"""Two-tower recommendation: vectors of items after the towers were trained further, without encoding all items again.

    python examples/recommendation.py

Nothing here is text. Items and users are rows of an interaction matrix; both towers are small networks over its leading
singular vectors. They are trained on older interactions, all items are encoded into an index, and then the towers are
trained further on newer interactions, in which tastes have moved. Users' new vectors no longer fit the old index. Some
items are encoded anew, those among them that some users took next, and `upgrade_vectors` decides from vectors alone. As
this catalogue is small, all items are encoded too, to see by what other users took whether the decision was right.

The data are synthetic, and made here: items and users have a taste of 16 numbers in 12 clusters; a user interacts with
items drawn from the softmax of the inner products plus a popularity (log-normal). Between both periods the taste of
each user moves towards that of another cluster. One newer interaction of each user is left out of training and is what
the search has to find.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hf_corrector import EncoderFingerprint, JudgedVectors, TargetCache, UpgradeOptions, upgrade_vectors
from hf_corrector.evaluation.evaluator import Judgement, JudgeOptions, clean_queries, judge
from hf_corrector.evaluation.verdict_words import percent, spread
from hf_corrector.index.base import TensorVectors
from hf_corrector.index_upgrade.vector_upgrade import VectorUpgradeReport
from hf_corrector.metrics import Interval

TASTE, CLUSTERS, FEATURES, DIM = 16, 12, 64, 48
METRICS = ("recall@20", "ndcg@20")


@dataclass
class Interactions:
    """Who took what: items of each user in both periods, and one newer item a user that is to be found."""

    older: torch.Tensor  # (users, older interactions) int64
    newer: torch.Tensor  # (users, newer interactions) int64
    held_out: torch.Tensor  # (users,) int64


def make_interactions(items: int, users: int, generator: torch.Generator) -> Interactions:
    """Draw both periods from the softmax of taste and popularity."""
    centres = torch.randn(CLUSTERS, TASTE, generator=generator)
    of_items = centres[torch.randint(CLUSTERS, (items,), generator=generator)]
    of_items = of_items + 0.7 * torch.randn(items, TASTE, generator=generator)
    popularity = 0.7 * torch.randn(items, generator=generator)
    before, after = (torch.randint(CLUSTERS, (users,), generator=generator) for _ in range(2))
    own = 0.5 * torch.randn(users, TASTE, generator=generator)

    def draw(tastes: torch.Tensor, count: int) -> torch.Tensor:
        odds = torch.softmax(0.8 * tastes @ of_items.T + popularity, dim=1)
        return torch.multinomial(odds, count, generator=generator)

    older = draw(centres[before] + own, 40)
    newer = draw(0.5 * centres[before] + 0.7 * centres[after] + own, 21)
    return Interactions(older, newer[:, 1:], newer[:, 0])


def matrix_of(taken: torch.Tensor, items: int) -> torch.Tensor:
    """Return the interaction matrix, users by items, rows of unit length."""
    matrix = torch.zeros(len(taken), items).scatter_(1, taken, 1.0)
    return F.normalize(matrix, dim=1)


class Towers(nn.Module):
    """A network for users and one for items, both over their coordinates among the leading singular vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = (nn.Sequential(nn.Linear(FEATURES, 96), nn.GELU(), nn.Linear(96, DIM)) for _ in range(2))

    def users(self, features: torch.Tensor) -> torch.Tensor:
        """Encode users, at unit length."""
        return F.normalize(self.user(features), dim=1)

    def items(self, features: torch.Tensor) -> torch.Tensor:
        """Encode items, at unit length."""
        return F.normalize(self.item(features), dim=1)


def train(
    towers: Towers, users: torch.Tensor, items: torch.Tensor, taken: torch.Tensor, *, steps: int,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Contrast each user with an item of hers and those of the others in a batch of 128."""
    optimizer = torch.optim.AdamW(towers.parameters(), lr=2e-3)
    for _ in range(steps):
        who = torch.randint(len(users), (128,), generator=generator)
        what = taken[who, torch.randint(taken.shape[1], (128,), generator=generator)]
        scores = 10.0 * towers.users(users[who]) @ towers.items(items[what]).T
        scores = scores.masked_fill((what[:, None] == what) & ~torch.eye(128, dtype=torch.bool), -torch.inf)
        loss = F.cross_entropy(scores, torch.arange(128))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def answers(items: torch.Tensor) -> list[dict[int, float]]:
    """Return judgements with one item a query."""
    return [{int(item): 1.0} for item in items]


def run(arguments: argparse.Namespace, folder: Path) -> tuple[VectorUpgradeReport, Judgement]:
    """Train, index, train further, upgrade on vectors and check with all of them."""
    generator = torch.Generator().manual_seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    made = make_interactions(arguments.items, arguments.users, generator)
    older = matrix_of(made.older, arguments.items)
    _, strengths, directions = torch.svd_lowrank(older, FEATURES, niter=4)
    item_features = directions * len(directions) ** 0.5
    old_users = older @ directions * len(directions) ** 0.5 / strengths[0]

    towers = Towers()
    train(towers, old_users, item_features, made.older, steps=arguments.steps, generator=generator)
    with torch.no_grad():
        old_vectors, old_queries = towers.items(item_features), towers.users(old_users)
    ids = [f"item-{row}" for row in range(arguments.items)]
    made_by = EncoderFingerprint.of_precomputed("item tower, older interactions", normalize=True)
    cache = TargetCache.from_arrays(folder / "items", old_vectors, ids, fingerprint=made_by)

    # The user tower now reads what users took since; the item tower is trained on with it.
    new_users = matrix_of(made.newer, arguments.items) @ directions * len(directions) ** 0.5 / strengths[0]
    train(towers, new_users, item_features, made.newer, steps=arguments.more_steps, generator=generator)
    with torch.no_grad():
        fresh, queries = towers.items(item_features), towers.users(new_users)

    # What some users took next judges the upgrade; what others took, the judgement.
    known, asked = torch.arange(0, arguments.users, 6), torch.arange(1, arguments.users, 2)
    rows = np.random.default_rng(arguments.seed).permutation(arguments.items)[: arguments.sample]
    rows = np.union1d(rows, made.held_out[known].numpy())
    options = JudgeOptions(metrics=METRICS, primary="recall@20")
    judged = JudgedVectors(queries[known], answers(made.held_out[known]), old_queries[known])
    report = upgrade_vectors(
        cache, fresh[torch.from_numpy(rows)], rows, queries=judged,
        options=UpgradeOptions(kinds=("mean_shift", "procrustes", "affine", "kernel"), judging=options),
    )  # fmt: skip
    relevant = answers(made.held_out[asked])
    corrected = report.corrector.correct(old_vectors)
    conditions = {
        "old": (old_queries[asked], TensorVectors(old_vectors)), "stale": (queries[asked], TensorVectors(old_vectors)),
        "corrected": (queries[asked], TensorVectors(corrected)), "fresh": (queries[asked], TensorVectors(fresh)),
    }  # fmt: skip
    return report, judge(conditions, relevant, clean=clean_queries(relevant, rows), options=options)


def main(argv: Sequence[str] | None = None) -> tuple[VectorUpgradeReport, Judgement]:
    """Run and print."""
    parser = argparse.ArgumentParser(description="Correct item vectors of a two-tower recommender.")
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--sample", type=int, default=600, help="items encoded anew at random")
    parser.add_argument("--steps", type=int, default=800, help="training steps on older interactions")
    parser.add_argument("--more_steps", type=int, default=400, help="training steps on newer interactions")
    parser.add_argument("--seed", type=int, default=0)
    arguments, started = parser.parse_args(argv), time.time()
    with tempfile.TemporaryDirectory() as folder:
        report, judgement = run(arguments, Path(folder))
    anew = len(report.inputs.rows)
    print(f"What vectors of {anew:,} items encoded anew tell:\n\n{report.table()}\n\n{report.verdict}\n")
    print(f"What all {arguments.items:,} items tell, encoded anew for this check only:\n\n{judgement.table()}\n")
    recovery = judgement.recovery["corrected"]["recall@20"]
    gain = judgement.differences["corrected-stale"]["recall@20"]
    said = percent(recovery) if isinstance(recovery, Interval) else recovery.reason
    print(f"corrected − stale: {spread(gain)} of recall@20; recovered: {said}; {time.time() - started:.0f} s")
    return report, judgement


if __name__ == "__main__":
    main()
