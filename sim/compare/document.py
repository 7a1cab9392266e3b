"""The comparison as a document: for each cell the error of each metric, for each condition the order of the choices.

Puts together what `matching` found and what `statistics` and `resampling` compute; prints and draws nothing. What is not
defined is null: no interval where nothing can be drawn again, no spread without repeats, no order of a single choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from sim.compare import statistics
from sim.compare.matching import Matched, Unmatched, name_of
from sim.compare.measured import MEASURES, Measure, Measured, measure_cell
from sim.compare.resampling import Bootstrap, interval
from sim.compare.statistics import Array, ErrorSummary

Interval = tuple[float, float] | None
FEW = {"p90": 10, "p99": 100}  #: below so many programs a percentile is little more than the largest value


class Side(msgspec.Struct, frozen=True):
    """One of the two folders. runs: those that are in a matched cell."""

    folder: str
    backend: str
    runs: int


class ErrorRow(msgspec.Struct, frozen=True, kw_only=True):
    """A statistic of a metric in a cell. real, simulated: means over runs, in seconds, or per second.

    error: simulated/real − 1. real_spread: coefficient of variation of real runs, over repeats or seeds (spread_over).
    off_one_run: mean |simulated/x − 1| over real runs x; floor: the same of one real run as the prediction of another of its
    seed. few: too few programs for this percentile. predicted: the simulation's prediction interval, with --intervals.
    """

    metric: str
    statistic: str
    real: float | None
    simulated: float | None
    error: float | None
    error_interval: Interval
    real_spread: float | None
    spread_over: str
    off_one_run: float | None
    floor: float | None
    few: bool
    predicted: Interval
    real_is_predicted: bool | None


class ProgramErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Relative errors of single programs' JCT against each real run of them: mean with its sign, and of the sizes. floor: sizes
    of the errors of one real run as the prediction of another. `application` null: all together."""

    application: str | None
    programs: int
    bias: float | None
    mean: float | None
    p50: float | None
    p90: float | None
    p99: float | None
    within_10_percent: float | None
    floor_mean: float | None
    floor_p90: float | None


class CellComparison(msgspec.Struct, frozen=True, kw_only=True):
    """A cell that both sides ran. programs: that finished in a real run, the least; failed: in all runs. resampled: what
    intervals draw again. program_errors: empty unless both sides ran the same programs and kept their tables; left_out: those
    programs of such runs that did not finish on both sides."""

    choice: str
    condition: str
    cell: dict[str, Any]
    paired: bool
    seeds: list[int]
    left_over_seeds: dict[str, list[int]]
    real_runs: int
    simulated_runs: int
    programs: int
    failed_real: int
    failed_simulated: int
    resampled: str | None
    errors: list[ErrorRow]
    program_errors: list[ProgramErrors]
    left_out: int


class Overall(msgspec.Struct, frozen=True, kw_only=True):
    """A statistic over all cells: sizes of the errors, and in how many cells the error's interval contains 0 (of those that
    have one)."""

    metric: str
    statistic: str
    cells: int
    mean_error: float | None
    worst_error: float | None
    worst_in: str | None
    mean_floor: float | None
    with_interval: int
    interval_contains_0: int
    predicted: int | None


class Choice(msgspec.Struct, frozen=True):
    """Ranks count from 1, the best; equal values share the mean of their ranks."""

    choice: str
    real: float
    real_interval: Interval
    simulated: float
    real_rank: float
    simulated_rank: float


class Pair(msgspec.Struct, frozen=True):
    """Differences are a/b − 1. tied: the real difference is within the spread of real runs; null: that is not known."""

    a: str
    b: str
    real_difference: float
    simulated_difference: float
    tied: bool | None
    same_order: bool


class Ranking(msgspec.Struct, frozen=True, kw_only=True):
    """The choices under one condition by one statistic, in their real order. The floors are of one real run in the simulation's
    place.

    picked: what simulation puts first; best: what reality does. regret: what picking it costs, over the best. agrees: the share
    of `picked` that is best. regret_at_random: the mean cost of all choices. clear_pairs: those that are not tied.
    """

    condition: str
    metric: str
    statistic: str
    choices: list[Choice]
    pairs: list[Pair]
    tau: float | None
    tau_interval: Interval
    clear_pairs: int
    clear_tau: float | None
    floor_tau: float | None
    picked: list[str]
    best: list[str]
    agrees: float
    agrees_in_draws: float | None
    picked_is_tied_with_best: bool | None
    regret: float | None
    regret_interval: Interval
    floor_regret: float | None
    regret_at_random: float | None


class Comparison(msgspec.Struct, frozen=True, kw_only=True, tag="comparison", tag_field="kind"):
    """What `python -m sim.compare` prints."""

    real: Side
    simulated: Side
    confidence: float
    draws: int
    seed: int
    warnings: list[str]
    unmatched: list[Unmatched]
    overall: list[Overall]
    cells: list[CellComparison]
    rankings: list[Ranking]


class Compared(NamedTuple):
    """The document, and the measured values behind it, cell by cell, for plots."""

    document: Comparison
    measured: list[Measured]


def compare(matched: Matched, bootstrap: Bootstrap) -> Compared:
    """The whole comparison. Raises ResultsError for a table that cannot be read."""
    measured = [measure_cell(cell, bootstrap) for cell in matched.cells]
    cells = [_cell(one, bootstrap) for one in measured]
    by_condition: dict[str, list[Measured]] = {}
    for one in measured:
        by_condition.setdefault(one.cell.condition, []).append(one)
    rankings = [
        ranking
        for condition, choices in by_condition.items()
        if len(choices) > 1
        for column in range(len(MEASURES))
        if (ranking := _ranking(condition, choices, column, bootstrap)) is not None
    ]
    sides = [
        Side(
            str(folder.path),
            " and ".join(sorted({result.run.backend for result in folder.runs})),
            sum(len(runs) for cell in matched.cells for runs in getattr(cell, side).values()),
        )
        for side, folder in (("real", matched.real), ("simulated", matched.simulated))
    ]
    document = Comparison(
        real=sides[0],
        simulated=sides[1],
        confidence=bootstrap.confidence,
        draws=bootstrap.draws,
        seed=bootstrap.seed,
        warnings=matched.warnings,
        unmatched=matched.unmatched,
        overall=_overall(cells),
        cells=cells,
        rankings=rankings,
    )
    return Compared(document, measured)


def encode(document: Comparison) -> str:
    """The document as one line of JSON."""
    return msgspec.json.encode(document).decode()


# ------------------------------------------------------------------------------------------------------------- errors


def _cell(measured: Measured, bootstrap: Bootstrap) -> CellComparison:
    cell = measured.cell
    real = [result for runs in cell.real.values() for result in runs]
    simulated = [result for runs in cell.simulated.values() for result in runs]
    programs = min(result.summary.finished for result in real)
    return CellComparison(
        choice=cell.choice,
        condition=cell.condition,
        cell=cell.fields,
        paired=cell.paired,
        seeds=sorted(cell.real),
        left_over_seeds=cell.left_over,
        real_runs=len(real),
        simulated_runs=len(simulated),
        programs=programs,
        failed_real=sum(result.summary.failed for result in real),
        failed_simulated=sum(result.summary.failed for result in simulated),
        resampled=measured.resampled,
        errors=[_error(measured, column, programs, bootstrap) for column in range(len(MEASURES))],
        program_errors=_program_errors(measured),
        left_out=measured.left_out,
    )


def _error(measured: Measured, column: int, programs: int, bootstrap: Bootstrap) -> ErrorRow:
    measure = MEASURES[column]
    runs = measured.runs("real", column)
    real, simulated = float(measured.real[column]), float(measured.simulated[column])
    by_seed = [float(np.mean(values)) for values in measured.runs("simulated", column)]
    if not measured.cell.paired:
        by_seed = [simulated] * len(runs)
    variation = statistics.spread(runs)
    predicted = interval(measured.predictions[:, column], bootstrap.confidence)
    return ErrorRow(
        metric=measure.metric,
        statistic=measure.statistic,
        real=number(real),
        simulated=number(simulated),
        error=number(statistics.relative_error(simulated, real)),
        error_interval=interval(
            statistics.relative_error(measured.simulated_draws[:, column], measured.real_draws[:, column]), bootstrap.confidence
        ),
        real_spread=number(variation.variation),
        spread_over=variation.over,
        off_one_run=number(statistics.error_against_real_runs(by_seed, runs)),
        floor=number(statistics.error_of_real_runs(runs)),
        few=programs < FEW.get(measure.statistic, 0),
        predicted=predicted,
        real_is_predicted=predicted[0] <= real <= predicted[1] if predicted is not None else None,
    )


def _program_errors(measured: Measured) -> list[ProgramErrors]:
    if measured.programs is None:
        return []
    table = measured.programs
    names = list(dict.fromkeys(table["application"].tolist()))
    rows = [_program_row(None, measured, np.ones(len(table), dtype=bool))]
    if len(names) > 1:
        rows += [_program_row(str(name), measured, (table["application"] == name).to_numpy()) for name in names]
    return rows


def _program_row(application: str | None, measured: Measured, chosen: Any) -> ProgramErrors:
    assert measured.programs is not None
    errors: ErrorSummary = statistics.summary_of_errors(measured.program_errors[:, chosen])
    floor = statistics.summary_of_errors(measured.program_floor[:, chosen])
    return ProgramErrors(
        application=application,
        programs=int(np.sum(chosen)),
        bias=number(errors.bias),
        mean=number(errors.mean),
        p50=number(errors.p50),
        p90=number(errors.p90),
        p99=number(errors.p99),
        within_10_percent=number(errors.within_10_percent),
        floor_mean=number(floor.mean),
        floor_p90=number(floor.p90),
    )


def _overall(cells: Sequence[CellComparison]) -> list[Overall]:
    return [_overall_row(MEASURES[column], cells, [cell.errors[column] for cell in cells]) for column in range(len(MEASURES))]


def _overall_row(measure: Measure, cells: Sequence[CellComparison], rows: Sequence[ErrorRow]) -> Overall:
    errors = [(abs(row.error), name_of(cell)) for cell, row in zip(cells, rows, strict=True) if row.error is not None]
    intervals = [row.error_interval for row in rows if row.error_interval is not None]
    predicted = [row.real_is_predicted for row in rows if row.real_is_predicted is not None]
    worst, worst_in = max(errors, key=lambda error: error[0], default=(None, None))
    return Overall(
        metric=measure.metric,
        statistic=measure.statistic,
        cells=len(errors),
        mean_error=_mean(size for size, _ in errors),
        worst_error=worst,
        worst_in=worst_in,
        mean_floor=_mean(row.floor for row in rows if row.floor is not None),
        with_interval=len(intervals),
        interval_contains_0=sum(low <= 0.0 <= high for low, high in intervals),
        predicted=sum(predicted) if predicted else None,
    )


# ------------------------------------------------------------------------------------------------------------- orders


def _ranking(condition: str, measured: Sequence[Measured], column: int, bootstrap: Bootstrap) -> Ranking | None:
    """None where fewer than two choices have this statistic on both sides."""
    chosen = [one for one in measured if np.isfinite(one.real[column]) and np.isfinite(one.simulated[column])]
    if len(chosen) < 2:
        return None
    measure = MEASURES[column]
    real, simulated = (np.array([getattr(one, side)[column] for one in chosen]) for side in ("real", "simulated"))
    order = np.argsort(-real if measure.higher_is_better else real, kind="stable")
    chosen, real, simulated = [chosen[i] for i in order], real[order], simulated[order]
    real_draws, simulated_draws = (
        np.stack([getattr(one, side)[:, column] for one in chosen], axis=1) for side in ("real_draws", "simulated_draws")
    )
    names = [one.cell.choice for one in chosen]
    pairs = [_pair(chosen, i, j, column) for i, j in statistics.pairs_of(len(chosen))]
    picked, best = (statistics.best_of(values, measure.higher_is_better) for values in (simulated, real))
    with np.errstate(all="ignore"):
        taus = statistics.kendall_taus(real_draws, simulated_draws)
        costs = statistics.regret(real_draws, simulated_draws, measure.higher_is_better)
    floor = _floor(chosen, column, measure.higher_is_better)
    return Ranking(
        condition=condition,
        metric=measure.metric,
        statistic=measure.statistic,
        choices=_choices(chosen, real, simulated, real_draws, measure, bootstrap),
        pairs=pairs,
        tau=number(statistics.kendall_tau(list(real), list(simulated))),
        tau_interval=interval(taus, bootstrap.confidence),
        clear_pairs=sum(pair.tied is not True for pair in pairs),
        clear_tau=number(statistics.clear_tau(list(real), list(simulated), [pair.tied is True for pair in pairs])),
        floor_tau=number(floor.tau),
        picked=[name for name, is_picked in zip(names, picked, strict=True) if is_picked],
        best=[name for name, is_best in zip(names, best, strict=True) if is_best],
        agrees=float(best[picked].mean()),
        agrees_in_draws=number(_agreement(real_draws, simulated_draws, measure.higher_is_better)),
        picked_is_tied_with_best=_is_tied(picked, best, pairs, names),
        regret=number(statistics.regret(real, simulated, measure.higher_is_better)),
        regret_interval=interval(costs, bootstrap.confidence),
        floor_regret=number(floor.regret),
        regret_at_random=number(float(np.mean(statistics.regrets(real, measure.higher_is_better)))),
    )


def _choices(
    chosen: Sequence[Measured], real: Array, simulated: Array, draws: Array, measure: Measure, bootstrap: Bootstrap
) -> list[Choice]:
    ranks = [statistics.ranks(values, measure.higher_is_better) for values in (real, simulated)]
    return [
        Choice(
            one.cell.choice,
            float(real[i]),
            interval(draws[:, i], bootstrap.confidence),
            float(simulated[i]),
            float(ranks[0][i]),
            float(ranks[1][i]),
        )
        for i, one in enumerate(chosen)
    ]


def _pair(chosen: Sequence[Measured], i: int, j: int, column: int) -> Pair:
    a, b = chosen[i], chosen[j]
    real = float(a.real[column] - b.real[column])
    simulated = float(a.simulated[column] - b.simulated[column])
    varies = statistics.difference_spread(a.runs("real", column), b.runs("real", column))
    if math.isnan(varies) and a.resampled == b.resampled == "programs":
        varies = float(np.std(a.real_draws[:, column] - b.real_draws[:, column]))
    return Pair(
        a=a.cell.choice,
        b=b.cell.choice,
        real_difference=statistics.relative_error(a.real[column], b.real[column]),
        simulated_difference=statistics.relative_error(a.simulated[column], b.simulated[column]),
        tied=None if math.isnan(varies) else abs(real) <= varies,
        same_order=bool(np.sign(real) == np.sign(simulated)),
    )


def _is_tied(picked: Any, best: Any, pairs: Sequence[Pair], names: Sequence[str]) -> bool | None:
    """Whether every choice that simulation puts first is the best one, or tied with it."""
    tied = {frozenset((pair.a, pair.b)): pair.tied for pair in pairs}
    first = names[int(np.argmax(best))]
    chosen = [name for name, is_picked, is_best in zip(names, picked, best, strict=True) if is_picked and not is_best]
    found = [tied[frozenset((name, first))] for name in chosen]
    return None if None in found and False not in found else all(found)


def _agreement(real: Array, simulated: Array, higher_is_better: bool) -> float:
    """The mean share, over draws, of what simulation puts first that is best."""
    whole = np.isfinite(real).all(axis=1) & np.isfinite(simulated).all(axis=1)
    if not whole.any():
        return math.nan
    picked, best = (statistics.best_of(values[whole], higher_is_better) for values in (simulated, real))
    return float(np.mean((picked & best).sum(axis=1) / picked.sum(axis=1)))


def _floor(chosen: Sequence[Measured], column: int, higher_is_better: bool) -> statistics.Floor:
    """Mean over seeds of the floor of each, where all choices have repeats of it."""
    floors = []
    for seed in sorted(set.intersection(*(set(one.cell.real) for one in chosen))):
        runs = [one.runs("real", column)[sorted(one.cell.real).index(seed)] for one in chosen]
        repeats = min(len(values) for values in runs)
        if repeats > 1:
            floors.append(statistics.floor_of_order(np.array([values[:repeats] for values in runs]).T, higher_is_better))
    if not floors:
        return statistics.Floor(math.nan, math.nan)
    return statistics.Floor(float(np.mean([f.tau for f in floors])), float(np.mean([f.regret for f in floors])))


# ------------------------------------------------------------------------------------------------------------- numbers


def number(value: float) -> float | None:
    """None for what is no number."""
    return value if math.isfinite(value) else None


def _mean(values: Iterable[float]) -> float | None:
    given = list(values)
    return float(np.mean(given)) if given else None
