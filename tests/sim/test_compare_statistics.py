"""The numbers of a comparison, against worked examples, scipy and numpy, and the laws that their intervals claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sim.compare.resampling import Bootstrap, interval, program_draws, samples, statistics_of, widened, widening
from sim.compare.statistics import (
    best_of,
    clear_tau,
    difference_spread,
    error_against_real_runs,
    error_of_real_runs,
    floor_of_order,
    kendall_tau,
    kendall_taus,
    ranks,
    regret,
    regrets,
    relative_error,
    spread,
    summary_of_errors,
)


def test_an_error_has_a_sign_and_is_undefined_over_zero() -> None:
    assert relative_error(2.0, 4.0) == -0.5
    assert math.isnan(relative_error(1.0, 0.0))
    assert relative_error(np.array([3.0, 1.0]), np.array([2.0, 2.0])).tolist() == [0.5, -0.5]


def test_the_spread_is_that_of_repeats_and_of_seeds_only_without_any() -> None:
    assert spread([[1.0, 3.0], [2.0, 4.0]]) == (pytest.approx(math.sqrt(4 / 2) / 2.5), "repeats")
    assert spread([[1.0], [3.0]]) == (pytest.approx(math.sqrt(2.0) / 2.0), "seeds")
    nothing = spread([[1.0]])
    assert math.isnan(nothing.variation)
    assert nothing.over == ""


def test_the_floor_is_the_error_of_each_real_run_as_the_prediction_of_each_other_one_of_its_seed() -> None:
    assert error_of_real_runs([[1.0, 2.0], [5.0]]) == pytest.approx((0.5 + 1.0) / 2)
    assert math.isnan(error_of_real_runs([[1.0], [2.0]]))
    assert error_against_real_runs([1.5], [[1.0, 2.0]]) == pytest.approx((0.5 + 0.25) / 2)


def test_knowing_the_real_mean_beats_the_floor_by_the_square_root_of_two() -> None:
    runs = np.random.default_rng(0).normal(10.0, 0.2, (1, 120)).tolist()
    assert error_against_real_runs([10.0], runs) / error_of_real_runs(runs) == pytest.approx(1 / math.sqrt(2), rel=0.1)


def test_a_difference_spreads_by_seed_where_the_seeds_are_shared_and_by_repeat_where_there_is_one() -> None:
    assert difference_spread([[1.0], [2.0]], [[1.5], [3.5]]) == pytest.approx(np.std([-0.5, -1.5], ddof=1))
    assert difference_spread([[1.0, 2.0]], [[4.0, 4.0, 7.0]]) == pytest.approx(math.sqrt(0.5 + 3.0))
    assert math.isnan(difference_spread([[1.0]], [[2.0]]))


def test_the_summary_of_errors_leaves_out_what_is_no_number() -> None:
    found = summary_of_errors([[0.1, -0.3], [math.nan, 0.05]])
    assert found.bias == pytest.approx(-0.05)
    assert found.mean == pytest.approx(0.15)
    assert found.p50 == pytest.approx(0.1)
    assert found.within_10_percent == pytest.approx(2 / 3)
    assert math.isnan(summary_of_errors([]).mean)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8))
def test_tau_of_all_draws_at_once_is_scipys(rows: list[tuple[int, int]]) -> None:
    real, simulated = np.array(rows, dtype=float).T
    expected = stats.kendalltau(real, simulated).statistic
    (found,) = kendall_taus(real[None], simulated[None])
    assert found == pytest.approx(expected, nan_ok=True)
    assert kendall_tau(list(real), list(simulated)) == pytest.approx(expected, nan_ok=True)


def test_tau_is_not_defined_for_one_choice() -> None:
    assert math.isnan(kendall_tau([1.0], [1.0]))


def test_tau_without_ties_counts_only_pairs_that_the_real_runs_tell_apart() -> None:
    # pairs (0,1) agree, (0,2) disagree, (1,2) disagree
    real, simulated = [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]
    assert clear_tau(real, simulated, [False, False, False]) == pytest.approx(-1 / 3)
    assert clear_tau(real, simulated, [False, False, True]) == 0.0
    assert math.isnan(clear_tau(real, simulated, [True, True, True]))


def test_regret_is_what_the_simulations_choice_costs_in_reality() -> None:
    assert regret([1.0, 2.0, 4.0], [3.0, 1.0, 2.0], False) == 1.0
    assert regret([1.0, 2.0, 4.0], [0.1, 0.2, 0.3], False) == 0.0
    assert regret([10.0, 5.0], [1.0, 2.0], True) == 0.5
    assert regrets([10.0, 5.0], True).tolist() == [0.0, 0.5]


def test_what_the_simulation_cannot_tell_apart_costs_its_mean() -> None:
    assert best_of([1.0, 1.0, 2.0], False).tolist() == [True, True, False]
    assert regret([1.0, 2.0, 4.0], [1.0, 1.0, 2.0], False) == 0.5
    assert ranks([1.0, 1.0, 2.0], False).tolist() == [1.5, 1.5, 3.0]
    assert ranks([1.0, 5.0, 2.0], True).tolist() == [3.0, 1.0, 2.0]


def test_the_floor_of_an_order_holds_each_run_against_the_others() -> None:
    repeats = np.array([[1.0, 2.0], [3.0, 2.0], [1.0, 3.0]])
    # run 0: others (2, 2.5), agrees; run 1: others (1, 2.5), picks the second, which costs 1.5; run 2: others (2, 2), no order
    found = floor_of_order(repeats[:2], False)
    assert found.tau == -1.0
    assert found.regret == pytest.approx((0.5 + 1.0) / 2)
    assert floor_of_order(repeats, False).regret == pytest.approx((0.0 + 1.5 + 0.0) / 3)
    assert math.isnan(floor_of_order(repeats[:1], False).tau)


# ---------------------------------------------------------------------------------------------------------- resampling


@given(
    st.lists(st.tuples(st.floats(0, 1e3), st.integers(0, 3)), min_size=1, max_size=30).filter(lambda r: any(w for _, w in r))
)
def test_statistics_of_weighted_values_are_those_of_the_repeated_values(rows: list[tuple[float, int]]) -> None:
    values, weights = np.array(sorted(rows)).T
    repeated = np.repeat(values, weights.astype(int))
    expected = [repeated.mean(), *np.percentile(repeated, (50, 90, 99))]
    assert statistics_of(values, weights.astype(np.int64)) == pytest.approx(expected)


def test_a_program_is_drawn_with_all_its_calls_and_the_same_on_both_sides() -> None:
    calls = samples([1.0, 3.0, 10.0, math.nan], [0, 0, 1, 1])
    doubled = samples([2.0, 6.0, 20.0], [0, 0, 1])
    real, simulated = program_draws([{"m": calls}, {"m": doubled}], ["m"], 2, Bootstrap(draws=50), "programs")
    assert set(np.round(real[:, 0], 6)) <= {2.0, 10.0, round(14 / 3, 6)}
    assert len(set(real[:, 0])) == 3
    assert np.allclose(simulated, 2 * real)


def test_draws_of_one_name_and_number_are_alike_and_others_are_not() -> None:
    bootstrap = Bootstrap(draws=20)
    assert (bootstrap.indices("seeds", 5) == bootstrap.indices("seeds", 5)).all()
    assert (bootstrap.indices("seeds", 5) != bootstrap.indices("other", 5)).any()
    assert (bootstrap.indices("seeds", 5) != Bootstrap(draws=20, seed=1).indices("seeds", 5)).any()


def test_widening_is_students_factor() -> None:
    assert widening(3, 0.95) == pytest.approx(4.3027 * math.sqrt(3 / 2) / 1.95996, rel=1e-4)
    assert widening(10_000, 0.95) == pytest.approx(1.0, abs=1e-3)
    assert widening(1, 0.95) == 1.0


def _coverage(runs: int, widen: bool) -> float:
    """How often an interval of the mean of `runs` normal values contains the true mean."""
    bootstrap, generator, hits, trials = Bootstrap(draws=300), np.random.default_rng(1), 0, 300
    indices = bootstrap.indices("test", runs)
    for _ in range(trials):
        values = generator.normal(10.0, 0.3, runs)
        draws, point = values[indices].mean(axis=1), np.array(values.mean())
        found = interval(widened(point, draws, runs, 0.95) if widen else draws, 0.95)
        assert found is not None
        hits += found[0] <= 10.0 <= found[1]
    return hits / trials


@pytest.mark.parametrize("runs", [3, 5, 10])
def test_intervals_over_few_runs_contain_the_truth_as_often_as_they_say(runs: int) -> None:
    assert 0.91 <= _coverage(runs, widen=True) <= 0.99


def test_the_plain_bootstrap_of_three_runs_does_not() -> None:
    assert _coverage(3, widen=False) < 0.85


def test_an_interval_of_nothing_is_none() -> None:
    assert interval([math.nan], 0.95) is None


@settings(max_examples=20)
@given(st.floats(0.5, 0.99))
def test_a_higher_confidence_is_wider(confidence: float) -> None:
    draws = np.random.default_rng(0).normal(size=500)
    low, high = interval(draws, confidence) or (0.0, 0.0)
    wider = interval(draws, (1 + confidence) / 2) or (0.0, 0.0)
    assert wider[0] <= low <= high <= wider[1]
