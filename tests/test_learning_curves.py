"""Learning curves: what is fitted, how wide forecasts are, and that they hold what happens."""

import numpy as np
import pytest

from hf_corrector.errors import ConfigurationError, DataError
from hf_corrector.learning_curves import Forecast, fit_learning_curve, interval_score, pairs_for

SIZES = (25, 50, 100, 200, 400)


def law(pairs, floor: float = 0.2, scale: float = 2.0, exponent: float = 0.6):
    return floor + scale * np.asarray(pairs, float) ** -exponent


def noisy(generator: np.random.Generator, *, noise: float = 0.02, resamples: int = 5, **parameters: float):
    return law(SIZES, **parameters) * (1 + noise * generator.standard_normal((resamples, len(SIZES))))


def test_forecast_of_a_clean_law_is_close_and_contains_it() -> None:
    curve = fit_learning_curve(SIZES, np.tile(law(SIZES), (5, 1)))
    for pairs in (400, 800, 1600):
        forecast = curve.forecast(pairs)
        assert forecast.low <= law(pairs) <= forecast.high
        assert forecast.estimate == pytest.approx(float(law(pairs)), rel=0.1)


def test_intervals_hold_nine_of_ten_values_of_laws_not_seen() -> None:
    generator, inside = np.random.default_rng(0), []
    for _ in range(150):
        parameters = {"floor": generator.uniform(0.05, 0.5), "scale": 2.0, "exponent": generator.uniform(0.3, 1.0)}
        curve = fit_learning_curve(SIZES, noisy(generator, **parameters), seed=int(generator.integers(2**31)))
        forecast = curve.forecast(1600)
        inside.append(forecast.low <= law(1600, **parameters) <= forecast.high)
    assert np.mean(inside) >= 0.85


def test_intervals_widen_with_distance_noise_and_fewer_sizes() -> None:
    errors = noisy(np.random.default_rng(1))
    curve = fit_learning_curve(SIZES, errors)
    widths = [(one := curve.forecast(pairs)).high - one.low for pairs in (400, 800, 3200)]
    assert widths[0] < widths[1] < widths[2]
    shared = fit_learning_curve(SIZES, errors, relative_sd=0.1).forecast(400)
    assert shared.high - shared.low > 2 * widths[0]
    fewer = fit_learning_curve(SIZES[-2:], errors[:, -2:]).forecast(3200)
    assert fewer.high - fewer.low > widths[2]


def test_one_odd_size_does_not_decide() -> None:
    errors = np.tile(law(SIZES), (5, 1))
    errors[:, 2] *= 1.5
    assert fit_learning_curve(SIZES, errors).forecast(800).estimate == pytest.approx(float(law(800)), rel=0.2)


def test_a_flat_curve_stays_flat_and_none_rises() -> None:
    curve = fit_learning_curve(SIZES, np.ones((5, 5)))
    assert curve.forecast(3200).estimate == pytest.approx(1.0, abs=0.1)
    rising = fit_learning_curve(SIZES, np.tile(np.linspace(1.0, 1.2, 5), (5, 1)))
    assert rising.forecast(3200).estimate <= 1.25


def test_overlapping_resamples_count_for_less() -> None:
    errors = noisy(np.random.default_rng(2), noise=0.05)
    free = fit_learning_curve(SIZES, errors).forecast(1600)
    bound = fit_learning_curve(SIZES, errors, population=500).forecast(1600)
    assert bound.high - bound.low > free.high - free.low


def test_law_gives_the_medians_and_the_same_seed_the_same_draws() -> None:
    errors = noisy(np.random.default_rng(3))
    first, again = (fit_learning_curve(SIZES, errors, seed=4) for _ in range(2))
    assert np.array_equal(first.draws(700), again.draws(700))
    floor, scale, exponent, onset = first.law()
    assert floor + scale * (400 + onset) ** -exponent == pytest.approx(first.forecast(400).estimate, rel=0.05)


def test_pairs_for_inverts_the_median() -> None:
    curve = fit_learning_curve(SIZES, np.tile(law(SIZES), (5, 1)))
    pairs = pairs_for(curve, 0.25, largest=5_000)
    assert pairs is not None
    assert curve.forecast(pairs).estimate <= 0.25 < curve.forecast(pairs - 1).estimate
    assert pairs_for(curve, 0.01, largest=5_000) is None


def test_interval_score_adds_what_is_missed() -> None:
    forecast = Forecast(0.5, 0.4, 0.6, 0.9)
    assert interval_score(forecast, 0.5) == pytest.approx(0.2)
    assert interval_score(forecast, 0.7) == pytest.approx(0.2 + 20 * 0.1)
    assert interval_score(forecast, 0.3) == pytest.approx(0.2 + 20 * 0.1)


@pytest.mark.parametrize(
    ("sizes", "errors", "population"),
    [
        ((10,), np.ones((2, 1)), None),
        ((20, 10), np.ones((2, 2)), None),
        ((10, 20), np.ones((2, 3)), None),
        ((10, 20), np.zeros((2, 2)), None),
        ((10, 20), np.full((2, 2), np.nan), None),
        ((10, 20), np.ones((2, 2)), 15),
    ],
)
def test_what_cannot_be_fitted_is_refused(sizes: tuple[int, ...], errors: np.ndarray, population: int | None) -> None:
    with pytest.raises(DataError, match="learning curve"):
        fit_learning_curve(sizes, errors, population=population)


def test_forecasts_for_nothing_are_refused() -> None:
    curve = fit_learning_curve(SIZES, np.tile(law(SIZES), (5, 1)))
    with pytest.raises(ConfigurationError, match="learning curve"):
        curve.forecast(0)
    with pytest.raises(ConfigurationError, match="learning curve"):
        curve.forecast(10, level=1.0)
