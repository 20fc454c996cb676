"""Re-encoded rows beside corrected ones: only where both can be compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_helpers import FINGERPRINT, build, make_plan, make_vectors

from hf_corrector.cache import TargetCache
from hf_corrector.cache.overlay import Overlay, OverlayWriter
from hf_corrector.corrected_targets import CorrectedTargets
from hf_corrector.errors import CacheMismatchError, ConfigurationError
from hf_corrector.index.exact import ExactIndex
from hf_corrector.models import CorrectorConfig, CorrectorModel
from hf_corrector.overlaid_targets import OverlaidTargets, OverlayRules, check_one_version

NOW = replace(FINGERPRINT, weights="n" * 32, name="new/encoder")
EARLIER = replace(FINGERPRINT, weights="e" * 32)
SNAPSHOTS = pytest.mark.parametrize("kept", [0, 2**30])


@pytest.fixture
def cache(tmp_path: Path) -> TargetCache:
    return build(tmp_path / "cache", make_plan(), make_vectors())


def shift(amount: float = 100.0, dim: int = 4) -> CorrectorModel:
    corrector = CorrectorModel(CorrectorConfig(kind="mean_shift", input_dim=dim, normalize_output=False))
    corrector.shift.fill_(amount)
    return corrector


def overlay_of(cache: TargetCache, *records: tuple[list[int], float, Any, int]) -> Overlay:
    """Write records of (rows, value, encoder, step)."""
    with OverlayWriter(cache) as writer:
        for rows, value, encoder, step in records:
            vectors = torch.full((len(rows), cache.dim), value)
            writer.append(np.array(rows), vectors, stamp=encoder.digest, step=step)
    return Overlay.open(cache)


def first_column(targets: OverlaidTargets, rows: list[int]) -> list[float]:
    return [round(value, 3) for value in targets.gather(torch.tensor(rows))[:, 0].tolist()]


@SNAPSHOTS
def test_an_empty_overlay_is_the_corrected_cache_bit_for_bit(cache: TargetCache, kept: int) -> None:
    for corrector in (None, shift()):
        base = CorrectedTargets(cache, corrector, snapshot_bytes=kept)
        seen = OverlaidTargets(base, Overlay.open(cache), rules=OverlayRules(NOW))
        assert (len(seen), seen.dim) == (10, 4)
        assert torch.equal(seen.read(2, 9), base.read(2, 9))
        assert torch.equal(seen.gather(torch.tensor([5, 1, 5])), base.gather(torch.tensor([5, 1, 5])))


@SNAPSHOTS
def test_rows_of_the_current_encoder_are_served_and_the_rest_is_corrected(cache: TargetCache, kept: int) -> None:
    base = CorrectedTargets(cache, shift(), snapshot_bytes=kept)
    seen = OverlaidTargets(base, overlay_of(cache, ([3, 5], 7.0, NOW, 0)), rules=OverlayRules(NOW))
    expected = make_vectors() + 100
    expected[[3, 5]] = 7.0
    assert torch.equal(seen.read(0, 10), expected)
    assert torch.equal(seen.read(4, 6), expected[4:6])
    assert torch.equal(seen.gather(torch.tensor([9, 5, 3, 5])), expected[[9, 5, 3, 5]])
    assert torch.equal(base.read(0, 10), make_vectors() + 100)  # neither snapshot nor cache was written into
    assert torch.equal(cache.read(0, 10), make_vectors())


def test_rows_of_another_version_are_not_served(cache: TargetCache) -> None:
    overlay = overlay_of(cache, ([1], 7.0, EARLIER, 90), ([2], 8.0, NOW, 100))
    seen = OverlaidTargets(CorrectedTargets(cache, shift(0.0)), overlay, rules=OverlayRules(NOW, step=100))
    assert first_column(seen, [1, 2]) == [round(float(make_vectors()[1, 0]), 3), 8.0]


@pytest.mark.parametrize(("max_age", "served"), [(0, False), (9, False), (10, False), (11, True), (100, True)])
def test_rows_younger_than_the_bound_are_served(cache: TargetCache, max_age: int, served: bool) -> None:
    overlay = overlay_of(cache, ([1], 7.0, EARLIER, 90))
    rules = OverlayRules(NOW, step=100, max_age=max_age)
    seen = OverlaidTargets(CorrectedTargets(cache, shift()), overlay, rules=rules)
    assert (first_column(seen, [1]) == [7.0]) is served


def test_rows_age_as_training_goes_on(cache: TargetCache) -> None:
    rules = OverlayRules(NOW, step=91, max_age=5)
    seen = OverlaidTargets(CorrectedTargets(cache, shift()), overlay_of(cache, ([1], 7.0, EARLIER, 90)), rules=rules)
    assert first_column(seen, [1]) == [7.0]
    seen.rules = replace(rules, step=95)
    assert first_column(seen, [1]) != [7.0]


def test_rows_with_a_correction_of_their_own_are_moved_by_it(cache: TargetCache) -> None:
    overlay = overlay_of(cache, ([1, 2], 7.0, EARLIER, 1), ([2], 8.0, NOW, 2))
    rules = OverlayRules(NOW, step=3, max_age=100, corrections={EARLIER.digest: shift(0.5)})
    seen = OverlaidTargets(CorrectedTargets(cache, shift()), overlay, rules=rules)
    assert first_column(seen, [0, 1, 2])[1:] == [7.5, 8.0]
    assert torch.equal(seen.read(0, 1), make_vectors()[:1] + 100)


@pytest.mark.parametrize("corrector", [None, CorrectorModel(CorrectorConfig(kind="identity", input_dim=4))])
def test_two_versions_are_never_compared_unaligned(cache: TargetCache, corrector: CorrectorModel | None) -> None:
    base, overlay = CorrectedTargets(cache, corrector), overlay_of(cache, ([1], 7.0, NOW, 0))
    with pytest.raises(CacheMismatchError) as caught:
        OverlaidTargets(base, overlay, rules=OverlayRules(NOW))
    for named in ("'some/encoder'", "'new/encoder'", "weights", "Fit a corrector between the two"):
        assert named in str(caught.value)
    same = OverlaidTargets(base, overlay, rules=OverlayRules(replace(FINGERPRINT, compute_dtype="bfloat16")))
    assert torch.equal(same.read(0, 10), make_vectors())
    with pytest.raises(CacheMismatchError):
        same.rules = OverlayRules(NOW)


def test_rows_appended_later_are_not_compared_unaligned_either(cache: TargetCache) -> None:
    overlay = Overlay.open(cache)
    seen = OverlaidTargets(CorrectedTargets(cache, None), overlay, rules=OverlayRules(NOW))
    overlay_of(cache, ([1], 7.0, NOW, 0))
    overlay.refresh()
    with pytest.raises(CacheMismatchError):
        seen.read(0, 10)


def test_base_overlay_and_corrections_must_fit_together(cache: TargetCache, tmp_path: Path) -> None:
    other = build(tmp_path / "other", make_plan(), make_vectors() * 2)
    overlay = overlay_of(cache, ([1], 7.0, NOW, 0))
    with pytest.raises(ConfigurationError, match="the cache the overlay"):
        OverlaidTargets(CorrectedTargets(other, shift()), overlay, rules=OverlayRules(NOW))
    wide = CorrectorModel(CorrectorConfig(kind="affine", input_dim=4, output_dim=6))
    with pytest.raises(ConfigurationError, match=r"re-encoded rows of size 6; got sizes \[4\]"):
        OverlaidTargets(CorrectedTargets(cache, wide), overlay, rules=OverlayRules(NOW))
    with pytest.raises(ConfigurationError, match=r"got sizes \[4, 6\]"):
        rules = OverlayRules(NOW, corrections={EARLIER.digest: wide})
        OverlaidTargets(CorrectedTargets(cache, shift()), overlay, rules=rules)


def test_caches_of_two_versions_are_no_set_to_search(tmp_path: Path) -> None:
    plans = [make_plan(), make_plan(fingerprint=replace(FINGERPRINT, compute_dtype="bfloat16"))]
    one, same = (build(tmp_path / str(number), plan, make_vectors()) for number, plan in enumerate(plans))
    check_one_version([one, same])
    check_one_version([])
    other = build(tmp_path / "other", make_plan(fingerprint=NOW), make_vectors())
    with pytest.raises(CacheMismatchError, match=r"'some/encoder'.*'new/encoder'.*encode all targets with one"):
        check_one_version([one, same, other])


def test_an_index_searches_overlaid_targets(cache: TargetCache) -> None:
    overlay = overlay_of(cache, ([6], 1000.0, NOW, 0))
    seen = OverlaidTargets(CorrectedTargets(cache, shift()), overlay, rules=OverlayRules(NOW))
    assert ExactIndex(seen).search(torch.ones(1, 4), 1).rows.tolist() == [[6]]
