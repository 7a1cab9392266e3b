"""Intervals: they cover what they promise to, by simulation of the statistics themselves, and are null where they must be."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sim.cells import cells_of, confidence_interval, prediction_interval
from sim.metrics import METRICS, Distribution, Summary
from sim.spec import EngineChoice, Run, Specification, runs_of

TRIALS = 700
NOTHING = Distribution(None, None, None, None)


def test_a_confidence_interval_is_students_of_the_seeds_means() -> None:
    low, high = confidence_interval([[1.0], [2.0], [4.0]], 0.9)  # type: ignore[misc]
    expected = stats.t.interval(0.9, 2, loc=7 / 3, scale=stats.sem([1.0, 2.0, 4.0]))
    assert (low, high) == pytest.approx(expected)
    assert confidence_interval([[0.5, 1.5], [2.0, 2.0], [3.0, 5.0]], 0.9) == pytest.approx(expected)


def test_of_one_seed_an_interval_is_over_its_repeats_and_of_one_value_there_is_none() -> None:
    assert confidence_interval([[1.0, 2.0, 4.0]], 0.9) == confidence_interval([[1.0], [2.0], [4.0]], 0.9)
    assert confidence_interval([[1.0]], 0.9) is None
    assert confidence_interval([], 0.9) is None
    assert prediction_interval([[1.0]], 0.9) is None
    assert prediction_interval([], 0.9) is None


@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize("repeats", [1, 4])
def test_a_confidence_interval_covers_the_true_mean_as_often_as_it_says(seeds: int, repeats: int) -> None:
    generator = np.random.default_rng(7)
    covered = 0
    for _ in range(TRIALS):
        values = generator.normal(10.0, 3.0, (seeds, 1)) + generator.normal(0.0, 1.0, (seeds, repeats))
        low, high = confidence_interval(values.tolist(), 0.9)  # type: ignore[misc]
        covered += low <= 10.0 <= high
    assert covered / TRIALS == pytest.approx(0.9, abs=0.035)


@pytest.mark.parametrize("between", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_a_prediction_interval_covers_a_run_with_a_new_seed_and_new_engines(seeds: int, between: float) -> None:
    generator, draws, within = np.random.default_rng(11), 8, 0.2
    covered = 0
    for _ in range(TRIALS):
        centre = generator.normal(1.0, between, seeds + 1)
        values = np.exp(centre[:seeds, None] + generator.normal(0.0, within, (seeds, draws)))
        low, high = prediction_interval(values.tolist(), 0.95)  # type: ignore[misc]
        covered += low <= float(np.exp(centre[-1] + generator.normal(0.0, within))) <= high
    assert covered / TRIALS > 0.93, "never less than promised; three standard deviations are 0.025 here"
    if seeds > 3:
        assert covered / TRIALS < 0.98, "and of several seeds hardly more"


def test_of_one_seed_a_prediction_interval_carries_the_spread_of_the_draws_alone() -> None:
    generator = np.random.default_rng(13)
    covered = 0
    for _ in range(TRIALS):
        values = np.exp(generator.normal(0.0, 0.2, 9))
        low, high = prediction_interval([values[:8].tolist()], 0.9)  # type: ignore[misc]
        covered += low <= values[8] <= high
    assert covered / TRIALS == pytest.approx(0.9, abs=0.035)


def test_what_never_varies_has_an_interval_of_no_width_and_a_zero_needs_no_logarithm() -> None:
    assert prediction_interval([[3.0, 3.0], [3.0, 3.0]], 0.9) == (pytest.approx(3.0), pytest.approx(3.0))
    low, high = prediction_interval([[0.0, 1.0], [0.0, 2.0]], 0.9)  # type: ignore[misc]
    assert low < 0.0 < high


def summary_of(run: Run, jct_s: float | None) -> Summary:
    numbers = dict.fromkeys((name for name in METRICS if "." not in name), 1)
    nothing = dict.fromkeys({name.partition(".")[0] for name in METRICS if "." in name}, NOTHING)
    nothing["jct_s"] = Distribution(jct_s, jct_s, jct_s, jct_s)
    which = {name: getattr(run, name) for name in ("policy", "rate", "seed", "repeat", "draw", "workload", "backend", "rtt_ms")}
    return Summary(**which, client="semantic", engines=1, settings=run.settings, errors={}, **numbers, **nothing)


def specification(**fields: object) -> Specification:
    given = {"workloads": ("chat",), "core": "core.json", "engines": (EngineChoice("engine.json"),), **fields}
    return Specification(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("written", [{}, {"explain": True}, {"trace": True}, {"tables": False}])
def test_a_cell_holds_what_differs_in_seed_repeat_and_draw_alone(written: dict[str, bool]) -> None:
    """Whatever is written of the runs, of which less is written of draws."""
    spec = specification(policies=("parrot", "round_robin"), rates=(1.0, 2.0), seeds=(1, 2, 3), intervals=2, **written)
    runs = runs_of(spec)
    cells = cells_of([(run, summary_of(run, float(run.seed + (run.draw or 0)))) for run in runs], 0.95)
    assert [(cell.policy, cell.rate) for cell in cells] == [(p, r) for p in ("parrot", "round_robin") for r in (1.0, 2.0)]
    for cell in cells:
        assert (cell.seeds, cell.runs, cell.draws, cell.over) == ((1, 2, 3), 3, 6, "seeds")
        jct = cell.metrics["jct_s.mean"]
        assert jct.mean == 2.0, "draws are not in the mean"
        assert jct.confidence_interval == confidence_interval([[1.0], [2.0], [3.0]], 0.95)
        assert jct.prediction_interval == prediction_interval([[2.0, 3.0], [3.0, 4.0], [4.0, 5.0]], 0.95)
        assert cell.metrics["ttft_s.p99"].mean is None


def test_a_simulation_repeated_is_the_same_run_and_a_real_one_is_not() -> None:
    for backend, over in (("sim", None), ("emulated", "repeats")):
        runs = runs_of(specification(backend=backend, repeats=3))
        (cell,) = cells_of([(run, summary_of(run, 1.0 + run.repeat)) for run in runs], 0.95)
        assert (cell.over, cell.runs) == (over, 3)
        assert (cell.metrics["jct_s.mean"].confidence_interval is None) == (over is None)


def test_seeds_that_change_nothing_are_one_run_and_give_no_interval() -> None:
    for backend, over in (("sim", None), ("emulated", "seeds")):
        runs = runs_of(specification(seeds=(1, 2, 3), backend=backend))
        (cell,) = cells_of([(run, summary_of(run, 5.0)) for run in runs], 0.95)
        assert (cell.over, cell.seeds, cell.runs, cell.metrics["jct_s.mean"].mean) == (over, (1, 2, 3), 3, 5.0)
        assert (cell.metrics["jct_s.mean"].confidence_interval is None) == (over is None)


def test_a_run_without_the_metric_does_not_count_for_it() -> None:
    runs = runs_of(specification(seeds=(1, 2, 3)))
    (cell,) = cells_of([(run, summary_of(run, None if run.seed == 2 else 5.0)) for run in runs], 0.95)
    assert cell.metrics["jct_s.p90"].mean == 5.0


def test_a_draw_repeated_is_the_same_run_and_narrows_nothing() -> None:
    intervals = []
    for repeats in (1, 2):
        runs = runs_of(specification(repeats=repeats, intervals=3))
        (cell,) = cells_of([(run, summary_of(run, 5.0 + (run.draw or 0))) for run in runs], 0.95)
        assert (cell.runs, cell.draws) == (repeats, 3)
        intervals.append(cell.metrics["jct_s.mean"].prediction_interval)
    assert intervals[0] == intervals[1] == prediction_interval([[6.0, 7.0, 8.0]], 0.95)
