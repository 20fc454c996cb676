"""What scores like a positive is no negative; checked against brute force and against sentence-transformers' miner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import chisquare
from torch.nn import functional as F

from hf_corrector.candidate_sampling import GivenTargets, Sampled, SamplingPlan, contrast_set, sample_candidates
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import ConfigurationError
from hf_corrector.index.base import TensorVectors
from hf_corrector.sampling import DrawKeys, ExcludedRows, NegativeFilter
from hf_corrector.scans import BlockScan, ScanPlan

TARGETS, DIM, BATCH, SCALE = 300, 6, 12, 8.0
FILTERS = [
    NegativeFilter(absolute_margin=0.1),
    NegativeFilter(absolute_margin=0.0),
    NegativeFilter(relative_margin=0.2),
    NegativeFilter(max_score=0.3),
    NegativeFilter(range_min=7),
    NegativeFilter(absolute_margin=0.05, relative_margin=0.1, max_score=0.7),
    NegativeFilter(relative_margin=0.1, max_score=0.6, range_min=4),
]


def unit(rows: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, DIM, generator=torch.Generator().manual_seed(seed)), dim=1)


VECTORS, QUERIES = unit(TARGETS, 0), unit(BATCH, 1)
# The positives of a few queries score below zero.
POSITIVES = [[int(row), int(row) + 1] for row in (QUERIES @ VECTORS[:-1].T).topk(80, dim=1).indices[:, 30].tolist()]
POSITIVES[:3] = [[int(row)] for row in (QUERIES[:3] @ VECTORS.T).argmin(dim=1).tolist()]


def allowed_by(wanted: NegativeFilter) -> torch.Tensor:
    """Say which targets may be drawn, ``(batch, targets)``, query by query."""
    allowed = torch.ones(BATCH, TARGETS, dtype=torch.bool)
    for query, positives in enumerate(POSITIVES):
        scores = VECTORS @ QUERIES[query]
        lowest = float(scores[positives].min())
        allowed[query, positives] = False
        if wanted.absolute_margin is not None:
            allowed[query] &= scores <= lowest - wanted.absolute_margin
        if wanted.relative_margin is not None:
            allowed[query] &= scores <= lowest - abs(lowest) * wanted.relative_margin
        if wanted.max_score is not None:
            allowed[query] &= scores <= wanted.max_score
        best = scores.masked_fill(~allowed[query], -torch.inf).argsort(descending=True)
        allowed[query, best[: wanted.range_min]] = False
    return allowed


def sample(
    wanted: NegativeFilter, negatives: str, fraction: float, *, k: int = 10, copies: int = 1, step: int = 0
) -> Sampled:
    plan = SamplingPlan(negatives, k, fraction, SCALE, 0, wanted)
    scan = BlockScan(CorrectedTargets(TensorVectors(VECTORS)), ScanPlan())
    keys = DrawKeys(seed=0, step=step, query_ids=np.arange(BATCH * copies))
    trained_on = torch.tensor([known[0] for known in POSITIVES])
    return sample_candidates(
        scan, QUERIES.repeat(copies, 1), plan, positives=trained_on.repeat(copies),
        excluded=ExcludedRows(POSITIVES * copies), keys=keys,
    )  # fmt: skip


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_highest_negatives_are_the_highest_of_those_allowed(wanted: NegativeFilter) -> None:
    found = sample(wanted, "top_k", 0.0).candidates
    scores = (QUERIES @ VECTORS.T).masked_fill(~allowed_by(wanted), -torch.inf)
    best = scores.topk(10, dim=1)
    assert torch.equal(found.ids, torch.where(best.values > -torch.inf, best.indices, -1))


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_softmax_is_over_those_allowed(wanted: NegativeFilter) -> None:
    found, allowed = sample(wanted, "softmax", 0.0), allowed_by(wanted)
    logits = (SCALE * QUERIES.double() @ VECTORS.T.double()).masked_fill(~allowed, -torch.inf)
    expected = torch.logsumexp(logits, dim=1)
    assert found.log_normalizer is not None
    assert torch.equal(found.log_normalizer == -torch.inf, expected == -torch.inf)
    assert torch.allclose(found.log_normalizer, expected, atol=1e-5)
    ids, mask = found.candidates.ids, found.candidates.mask
    assert torch.equal(mask.sum(dim=1), allowed.sum(dim=1).clamp(max=10))
    assert allowed.gather(1, ids.clamp(min=0))[mask].all()


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_uniform_share_is_uniform_over_those_allowed(wanted: NegativeFilter) -> None:
    allowed = allowed_by(wanted)
    found = sample(wanted, "softmax", 1.0, k=4, copies=400).candidates
    for query in range(BATCH):
        ids = found.ids[query::BATCH]
        assert not (ids[ids >= 0] >= 0).logical_and(~allowed[query][ids[ids >= 0]]).any()
        counts = torch.bincount(ids[ids >= 0], minlength=TARGETS)[allowed[query]]
        if len(counts) >= 20:
            # Of one query's draws without replacement, only the first of each copy are independent.
            first = torch.bincount(ids[:, 0], minlength=TARGETS)[allowed[query]]
            bins = [int(part.sum()) for part in first.tensor_split(10)]
            sizes = np.array([len(part) for part in first.tensor_split(10)])
            assert chisquare(bins, sizes / sizes.sum() * sum(bins)).pvalue > 1e-4
            assert (ids >= 0).all()


def test_uniform_draws_are_found_even_where_few_targets_are_allowed() -> None:
    scores = QUERIES @ VECTORS.T
    wanted = NegativeFilter(max_score=float(scores.sort(dim=1).values[:, 12].max()))
    found, allowed = sample(wanted, "softmax", 1.0, k=5).candidates, allowed_by(wanted)
    assert (allowed.sum(dim=1) < 60).all()
    assert torch.equal(found.mask.sum(dim=1), allowed.sum(dim=1).clamp(max=5))
    assert allowed.gather(1, found.ids.clamp(min=0))[found.mask].all()
    alone = sample(wanted, "softmax", 1.0, k=5, copies=2).candidates
    assert torch.equal(alone.ids[:BATCH], found.ids)


@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_no_query_shares_what_it_may_not_draw(wanted: NegativeFilter) -> None:
    sampled, allowed = sample(wanted, "softmax", 0.25, k=4), allowed_by(wanted)
    own = torch.tensor([known[0] for known in POSITIVES])
    given_row = int((QUERIES[0] @ VECTORS.T).argmax())
    given = GivenTargets(own, ExcludedRows(POSITIVES), negatives=[[given_row], *([[]] * (BATCH - 1))])
    found = contrast_set(sampled.candidates, given, share_negatives=True, too_good=sampled.too_good)
    columns, shared = found.rows, found.allowed.clone()
    shared[torch.arange(BATCH), torch.arange(BATCH)] = False
    assert shared[0, (columns == given_row).nonzero()[0, 0]], "given negatives are kept"
    shared[0, columns == given_row] = False
    assert not (shared & ~allowed[:, columns]).any()
    # And all others are shared: of columns with the same target the first.
    first = torch.tensor([columns.tolist().index(row) == place for place, row in enumerate(columns.tolist())])
    expected = allowed[:, columns] & first
    expected[0, columns == given_row] = False
    expected[torch.arange(BATCH), torch.arange(BATCH)] = False
    assert torch.equal(shared, expected)


@pytest.mark.parametrize("negatives", ["softmax", "top_k"])
def test_where_nothing_is_allowed_all_places_are_masked(negatives: str) -> None:
    found = sample(NegativeFilter(max_score=-2.0), negatives, 0.25)
    assert not found.candidates.mask.any()
    assert not found.candidates.log_proposal.isnan().any()


def test_filter_of_nothing_changes_nothing() -> None:
    plain, filtered = (sample(NegativeFilter(max_score=limit), "softmax", 0.25).candidates for limit in (None, 2.0))
    assert torch.equal(plain.ids, filtered.ids)
    assert torch.equal(plain.log_proposal, filtered.log_proposal)


@pytest.mark.parametrize("values", [{"range_min": -1}, {"relative_margin": 1.5}, {"relative_margin": -0.1}])
def test_values_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="negative filter"):
        NegativeFilter(**values)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", FILTERS, ids=str)
def test_names_mean_what_they_mean_in_sentence_transformers(wanted: NegativeFilter) -> None:
    upstream = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from sentence_transformers.util import mine_hard_negatives
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    # Every text is one word, and every word's embedding the vector it stands for.
    words = [f"t{row}" for row in range(TARGETS)] + [f"q{row}" for row in range(BATCH)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = Whitespace()
    weights = torch.cat([VECTORS, QUERIES]).numpy()
    static = StaticEmbedding(tokenizer, embedding_weights=weights)
    model = upstream.SentenceTransformer(modules=[static], device="cpu", similarity_fn_name="dot")
    pairs = [(f"q{query}", f"t{row}") for query, known in enumerate(POSITIVES) for row in known]
    dataset = Dataset.from_dict({"query": [one for one, _ in pairs], "answer": [one for _, one in pairs]})
    mined = mine_hard_negatives(
        dataset, model, corpus=words[:TARGETS], num_negatives=3, range_min=wanted.range_min, range_max=TARGETS - 2,
        absolute_margin=wanted.absolute_margin, relative_margin=wanted.relative_margin, max_score=wanted.max_score,
        sampling_strategy="top", output_format="triplet", verbose=False,
    )  # fmt: skip
    theirs: dict[str, set[int]] = {}
    for row in mined:
        theirs.setdefault(row["query"], set()).add(int(row["negative"][1:]))
    assert theirs
    found = sample(wanted, "top_k", 0.0, k=3).candidates
    for query in range(BATCH):
        # They leave out queries with fewer negatives than asked for.
        if f"q{query}" in theirs:
            assert set(found.ids[query].tolist()) == theirs[f"q{query}"]
        else:
            assert not found.mask[query].all()
