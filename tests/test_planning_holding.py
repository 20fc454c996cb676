"""How long a corrector holds, from run records, and refreshes that keep to a floor."""

import numpy as np
import pytest

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.planning.holding import fit_drift_law, holding_time, refresh_schedule
from hf_corrector.records import RunRecord
from hf_corrector.training.refresh_schedule import RefreshSchedule

EVERY = 25


def walk(rate: float, power: float, steps: int, *, refresh: int | None = None, noise: float = 0.02, seed: int = 0):
    """Record a run whose targets drift by a known law, logged as means over the steps since the last entry."""
    generator, history = np.random.default_rng(seed), []
    made = 0
    for end in range(EVERY, steps + 1, EVERY):
        middle = end - EVERY + (EVERY + 1) / 2
        distance = rate * (middle**power - made**power) * np.exp(noise * generator.standard_normal())
        history.append({
            "step": end, "loss": 1.0, "cosine_stale_fresh": 1 - distance / 2, "cosine_corrected_fresh": 0.95,
        })  # fmt: skip
        if refresh is not None and end % refresh == 0:
            made = end
    arguments = {"refresh_steps": "never" if refresh is None else str(refresh)}
    return RunRecord(command="train", seed=seed, arguments=arguments, history=[*history, {"train_runtime": 3.0}])


def test_law_is_found_again_with_and_without_refreshes() -> None:
    for refresh in (None, 100):
        law = fit_drift_law([walk(0.01, 0.7, 500, refresh=refresh, seed=seed) for seed in range(3)])
        assert law.points == 3 * 20
        assert np.median(law.powers) == pytest.approx(0.7, abs=0.1)
        truth = 0.01 * (500**0.7 - 300**0.7)
        low, high = np.quantile(law.draws(300, 500), (0.05, 0.95))
        # Distances to the start alone say too little of increments, so that forecast is raised.
        assert low <= truth * (1.0 if refresh else 1.5) <= high
        assert (np.median(law.draws(300, 500)) > 1.2 * truth) == (refresh is None)


def test_intervals_that_mix_two_caches_are_left_out() -> None:
    assert fit_drift_law([walk(0.01, 0.7, 500, refresh=60)]).points < 20


def test_holding_time_is_where_the_error_meets_the_floor() -> None:
    records = [walk(0.001, 1.0, 500, refresh=100, noise=0.005, seed=seed) for seed in range(3)]
    found = holding_time(records, min_cosine=0.9, fitted_at=200)
    assert found.fitted_error == pytest.approx(0.1)
    # From a squared distance of 0.1 to one of 0.2 at 0.001 a step.
    assert found.steps.low <= 100 <= found.steps.high
    assert found.steps.estimate == pytest.approx(100, rel=0.25)
    looser = holding_time(records, min_cosine=0.8, fitted_at=200)
    assert looser.steps.estimate > 2 * found.steps.estimate
    assert holding_time(records, min_cosine=0.96, fitted_at=0).steps.high == 0
    assert holding_time(records, min_cosine=0.9, fitted_at=0, fitted_cosine=1.0).fitted_error == 0


def test_schedule_keeps_to_the_floor_and_the_trainer_reads_it() -> None:
    law = fit_drift_law([walk(0.01, 0.5, 1_000, refresh=200, noise=0.005, seed=seed) for seed in range(3)])
    plan = refresh_schedule(law, min_cosine=0.95, max_steps=1_000, targets=5_000, cost_per_pass=0.001)
    schedule, last = RefreshSchedule.parse(plan.refresh_steps), 0
    assert [step for step in range(1, 1_001) if schedule.due(step)] == list(plan.steps)
    spaces = np.diff([0, *plan.steps])
    assert len(spaces) > 1 and (np.diff(spaces) > 0).all()
    for step in [*plan.steps, 1_000]:
        assert np.median(law.draws(last, step)) <= 0.1
        last = step
    assert plan.passes == len(plan.steps) * 5_000 and plan.cost == pytest.approx(plan.passes * 0.001)


def test_a_floor_that_holds_needs_no_refresh_and_a_tight_one_comes_every_step() -> None:
    law = fit_drift_law([walk(0.001, 1.0, 500)])
    never = refresh_schedule(law, min_cosine=0.1, max_steps=100, targets=10)
    assert (never.refresh_steps, never.steps, never.passes) == ("never", (), 0)
    always = refresh_schedule(law, min_cosine=0.99999, max_steps=5, targets=10)
    assert always.steps == (1, 2, 3, 4)


def test_too_little_and_wrong_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="cosine_stale_fresh"):
        fit_drift_law([RunRecord(command="embed", seed=0, arguments={})])
    records = [walk(0.001, 1.0, 500)]
    bare = RunRecord(
        command="train", seed=0, arguments={},
        history=[{k: v for k, v in one.items() if k != "cosine_corrected_fresh"} for one in records[0].history],
    )  # fmt: skip
    with pytest.raises(DataError, match="cosine_corrected_fresh"):
        holding_time([bare], min_cosine=0.9, fitted_at=0)
    with pytest.raises(ConfigurationError, match="floor"):
        holding_time(records, min_cosine=1.0, fitted_at=0)
    with pytest.raises(ConfigurationError, match="refresh schedule"):
        refresh_schedule(fit_drift_law(records), min_cosine=0.9, max_steps=0, targets=10)
