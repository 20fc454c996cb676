"""Every way to look at all targets, against all scores computed at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scan_helpers import (
    BATCH,
    MANY,
    QUERIES,
    SCALE,
    STRATEGIES,
    assert_same,
    clustered,
    draw_from,
    keys_of,
    make_scan,
    nothing,
    targets_of,
    turn,
    turned,
    unit,
)
from scipy.stats import chisquare

from hf_corrector.candidate_sampling import SamplingPlan, sample_candidates
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import ConfigurationError
from hf_corrector.index.base import TensorVectors
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.sampling import (
    BLOCK_ROWS,
    ExcludedRows,
    NegativeFilter,
    ScoredTargets,
    draw_softmax,
)
from hf_corrector.scans import BlockScan, ScanPlan

# ---------------------------------------------------------------------- every scan


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scan_that_looks_at_everything_knows_the_whole_softmax(strategy: str) -> None:
    targets = targets_of(500, turned())
    scan, known = make_scan(strategy, targets), [[row, 499 - row] for row in range(BATCH)]
    draws = scan.draw(QUERIES, 4, scale=SCALE, excluded=ExcludedRows(known), keys=keys_of())
    scores = QUERIES @ targets.read(0, 500).T
    left = scores.scatter(1, torch.tensor(known), -torch.inf)
    assert torch.allclose(draws.log_normalizer, torch.logsumexp(SCALE * left.double(), dim=1), atol=1e-5)
    assert torch.allclose(draws.scores, left.gather(1, draws.ids), atol=1e-5)
    assert len(scan) == 500


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_single_draws_of_a_scan_that_looks_at_everything_follow_the_softmax(strategy: str) -> None:
    targets, batch = targets_of(60, turned()), 6000
    query = QUERIES[:1]
    ids = make_scan(strategy, targets).draw(
        query.expand(batch, -1), 1, scale=SCALE, excluded=nothing(batch), keys=keys_of(batch)
    ).ids  # fmt: skip
    expected = (SCALE * query.double() @ targets.read(0, 60).double().T).softmax(dim=1)[0] * batch
    counts = torch.bincount(ids[:, 0], minlength=60).double()
    often = expected >= 10
    observed = torch.cat([counts[often], counts[~often].sum()[None]]).numpy()
    foretold = torch.cat([expected[often], expected[~often].sum()[None]]).numpy()
    assert chisquare(observed, foretold).pvalue > 1e-3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_highest_are_the_highest_with_equal_ones_by_row(strategy: str) -> None:
    vectors = clustered(400)
    vectors[200:] = vectors[:200]
    targets = CorrectedTargets(TensorVectors(vectors))
    found = make_scan(strategy, targets).top(QUERIES, 6, excluded=ExcludedRows([[3], []] * 3), keys=keys_of())
    scores = QUERIES @ vectors.T
    scores[::2, 3] = -torch.inf
    best = torch.argsort(scores, dim=1, descending=True, stable=True)[:, :6]
    assert torch.equal(found.ids.cpu(), best)
    assert torch.allclose(found.scores.cpu(), scores.gather(1, best), atol=1e-6)
    assert found.log_normalizer.isnan().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_so_many_highest_scores_lie_above_the_ceiling(strategy: str) -> None:
    targets = targets_of(500, turned())
    known = ExcludedRows([[row] for row in range(BATCH)])
    ceiling = make_scan(strategy, targets).skip_highest(QUERIES, 7, excluded=known, keys=keys_of())
    scores = (QUERIES @ targets.read(0, 500).T).scatter(1, torch.arange(BATCH)[:, None], -torch.inf)
    best = scores.topk(8, dim=1).values
    assert (best[:, 6] > ceiling - 1e-6).all()
    assert (best[:, 7] <= ceiling + 1e-6).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_are_those_of_the_targets_asked_for(strategy: str) -> None:
    targets = targets_of(500, turned())
    rows = torch.randint(500, (BATCH, 9), generator=torch.Generator().manual_seed(3))
    expected = torch.einsum("bd,bkd->bk", QUERIES, targets.read(0, 500)[rows])
    assert torch.allclose(make_scan(strategy, targets).score(QUERIES, rows), expected, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_places_are_masked_where_targets_run_out(strategy: str) -> None:
    targets = targets_of(30, turned())
    excluded = ExcludedRows([list(range(27)), [], list(range(30))] * 2)
    scan = make_scan(strategy, targets)
    for found in (
        scan.draw(QUERIES, 40, scale=SCALE, excluded=excluded, keys=keys_of()),
        scan.top(QUERIES, 40, excluded=excluded, keys=keys_of()),
    ):
        assert found.ids.shape == found.scores.shape == (BATCH, 40)
        for ids, left in zip(found.ids.tolist(), [3, 30, 0] * 2, strict=True):
            assert sorted(ids[:left]) == list(range(30 - left, 30))
            assert ids[left:] == [-1] * (40 - left)
        assert torch.equal(found.scores == -torch.inf, found.ids < 0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ceilings_hold(strategy: str) -> None:
    targets = targets_of(500, turned())
    scores = QUERIES @ targets.read(0, 500).T
    excluded = ExcludedRows([[]] * BATCH, scores.median(dim=1).values)
    scan = make_scan(strategy, targets, shortlist=200)
    for found in (
        scan.draw(QUERIES, 10, scale=SCALE, excluded=excluded, keys=keys_of()),
        scan.top(QUERIES, 10, excluded=excluded, keys=keys_of()),
    ):
        assert (found.scores <= scores.median(dim=1).values[:, None]).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_negatives_can_be_sampled_from_every_scan(strategy: str) -> None:
    targets = targets_of(500, turned())
    scan = make_scan(strategy, targets, shortlist=50, pool=100)
    plan = SamplingPlan("softmax", 5, 0.4, SCALE, 1, NegativeFilter(relative_margin=0.05, range_min=2))
    known = ExcludedRows([[row] for row in range(BATCH)])
    found = sample_candidates(
        scan, QUERIES, plan, positives=torch.arange(BATCH), excluded=known, keys=keys_of()
    ).candidates  # fmt: skip
    assert found.mask.any()
    assert found.log_proposal[found.mask].isfinite().all()
    scores = QUERIES @ targets.read(0, 500).T
    own = scores.diagonal()[:, None]
    limit = (own - 0.05 * own.abs()).expand_as(found.ids)
    assert (scores.gather(1, found.ids.clamp(min=0)) <= limit + 1e-5)[found.mask].all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_snapshot_of_the_targets_is_left_alone(strategy: str) -> None:
    """The rows of an invalidated corrector must not linger, nor may all of them be corrected for a few."""
    corrector = turned()
    targets = targets_of(500, corrector)
    targets.read(0, 500)
    turn(corrector, 9)
    expected = torch.einsum("bd,d->b", corrector(clustered(500))[:BATCH], QUERIES[0])
    if strategy != "rerank":  # which is handed what encodes
        found = make_scan(strategy, targets).score(QUERIES[:1], torch.arange(BATCH)[None])
        assert torch.allclose(found[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "values", [{"strategy": "all"}, {"dtype": "float16"}, {"refresh_steps": 0}, {"pool": 0}, {"shortlist": 0}]
)
def test_plans_out_of_range_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="scan"):
        ScanPlan(**values)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- all targets, block by block


@pytest.mark.parametrize("snapshot_bytes", [0, 2**30])
@pytest.mark.parametrize("corrected", [True, False])
def test_full_scan_draws_what_all_scores_at_once_draw(snapshot_bytes: int, corrected: bool) -> None:
    targets = targets_of(corrector=turned() if corrected else None)
    vectors = torch.cat([targets.read(at, min(at + BLOCK_ROWS, MANY)) for at in range(0, MANY, BLOCK_ROWS)])
    scan, excluded = BlockScan(targets, ScanPlan(snapshot_bytes=snapshot_bytes)), ExcludedRows([[1, 8200]] * BATCH)
    draws = scan.draw(QUERIES, 7, scale=SCALE, excluded=excluded, keys=keys_of())
    scored = ScoredTargets(lambda start, stop: QUERIES @ vectors[start:stop].T, MANY)
    expected = draw_softmax(scored, 7, scale=SCALE, excluded=excluded, keys=keys_of())
    assert torch.equal(draws.ids, expected.ids)
    assert torch.allclose(draws.scores, expected.scores, atol=1e-6)


@pytest.mark.parametrize("kept", ["full", "amortised"])
def test_scan_of_stale_float32_rows_copies_nothing(kept: str) -> None:
    assert not BlockScan(targets_of(), ScanPlan(kept)).kept
    assert BlockScan(targets_of(), ScanPlan(kept, dtype="bfloat16")).kept
    assert BlockScan(targets_of(corrector=turned()), ScanPlan(kept)).kept


def test_amortised_scan_of_every_step_is_the_full_one() -> None:
    corrector = turned()
    targets = targets_of(corrector=corrector)
    full, amortised = BlockScan(targets, ScanPlan()), BlockScan(targets, ScanPlan("amortised", refresh_steps=1))
    for step in range(4):
        assert_same(draw_from(full, step), draw_from(amortised, step))
        turn(corrector, step + 20)
        for scan in (full, amortised):
            scan.invalidate()
            scan.advance()


def test_amortised_rows_are_never_older_than_the_plan_says() -> None:
    """Every corrected row carries the number of the corrector that made it, and scores are that number."""
    rows, every = 6 * BLOCK_ROWS + 10, 4
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=2, normalize_output=False))
    scan = BlockScan(
        CorrectedTargets(TensorVectors(torch.zeros(rows, 2)), corrector), ScanPlan("amortised", refresh_steps=every)
    )
    read = torch.tensor([[1.0, 0.0]])
    for version in range(12):
        corrector.bias.copy_(torch.tensor([float(version), 0.0]))
        scan.invalidate()
        scan.advance()
        found = scan.top(read, rows, excluded=nothing(1), keys=keys_of(1))
        ages = version - found.scores
        assert ages.min() == 0
        assert ages.max() == min(version, every - 1)
    scan.renew()
    renewed = scan.top(read, rows, excluded=nothing(1), keys=keys_of(1))
    assert (renewed.scores == 11).all()


class CountedVectors(TensorVectors):
    """Vectors that note which rows were read."""

    read_rows: list[int]

    def read(self, start: int, stop: int) -> torch.Tensor:
        self.read_rows.append(stop - start)
        return super().read(start, stop)


def test_amortised_scan_corrects_no_more_than_its_share_in_a_step() -> None:
    source = CountedVectors(clustered(5 * BLOCK_ROWS))
    object.__setattr__(source, "read_rows", [])
    scan = BlockScan(CorrectedTargets(source, turned()), ScanPlan("amortised", refresh_steps=5))
    draw_from(scan, 0)
    for step in range(1, 8):
        source.read_rows.clear()
        scan.invalidate()
        scan.advance()
        draw_from(scan, step)
        assert sum(source.read_rows) == BLOCK_ROWS


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_renewed_scan_is_a_new_one(strategy: str) -> None:
    corrector = turned()
    targets = targets_of(corrector=corrector)
    sizes = {"refresh_steps": 3, "pool": 700, "shortlist": 50}
    scan = make_scan(strategy, targets, **sizes)
    for step in range(5):
        draw_from(scan, step)
        turn(corrector, step + 30)
        targets.invalidate()
        scan.invalidate()
        scan.advance()
    scan.renew()
    new = make_scan(strategy, targets, **sizes)
    for step in range(5, 9):
        assert_same(draw_from(scan, step), draw_from(new, step))
        turn(corrector, step + 30)
        targets.invalidate()
        for one in (scan, new):
            one.invalidate()
            one.advance()


def test_snapshot_too_large_for_memory_goes_to_a_file_that_leaves_nothing(tmp_path: Path) -> None:
    corrector = turned()
    targets = targets_of(corrector=corrector)
    plans = [ScanPlan("amortised", refresh_steps=2, snapshot_bytes=size) for size in (0, 2**30)]
    in_file, in_memory = (BlockScan(targets, plan, scratch=tmp_path / "snapshot") for plan in plans)
    for step in range(4):
        assert_same(draw_from(in_file, step), draw_from(in_memory, step))
        turn(corrector, step + 40)
        for scan in (in_file, in_memory):
            scan.advance()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process as Linux tells it")
def test_snapshot_in_a_file_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    vectors = unit(100_000, 0, dim=128)
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=128))
    scan = BlockScan(
        CorrectedTargets(TensorVectors(vectors), corrector), ScanPlan("amortised", snapshot_bytes=0),
        scratch=tmp_path / "snapshot",
    )  # fmt: skip
    query, before = unit(1, 1, dim=128), own_kilobytes()
    scan.draw(query, 2, scale=SCALE, excluded=nothing(1), keys=keys_of(1))
    assert own_kilobytes() - before < vectors.nbytes / 1024 / 2


def own_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("scale", [10.0, 20.0, 50.0])
def test_bfloat16_scores_are_near_the_exact_ones(scale: float) -> None:
    targets = targets_of(corrector=turned())
    exact, rounded = (BlockScan(targets, ScanPlan(dtype=dtype)) for dtype in ("float32", "bfloat16"))
    found = []
    for scan in (exact, rounded):
        highest = scan.top(QUERIES, MANY, excluded=nothing(), keys=keys_of())
        logits = scale * torch.empty(BATCH, MANY).scatter_(1, highest.ids, highest.scores).double()
        found.append(logits.softmax(dim=1))
    variation = 0.5 * (found[0] - found[1]).abs().sum(dim=1)
    assert 0 < variation.mean() < 0.001 * scale
    draws = [draw_from(scan, 0).log_normalizer for scan in (exact, rounded)]
    assert torch.allclose(draws[0], draws[1], atol=0.02)
