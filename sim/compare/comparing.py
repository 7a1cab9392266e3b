"""From matched cells to the document: the errors of each cell, those of its programs, and all cells together.

Puts together what `statistics` and `resampling` compute; `orders` does so for the order of the choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sim.compare import statistics
from sim.compare.document import CellComparison, Comparison, ErrorRow, Overall, ProgramErrors, Side, number
from sim.compare.matching import Matched, name_of
from sim.compare.measured import MEASURES, Measure, Measured, measure_cell
from sim.compare.orders import rankings_of
from sim.compare.resampling import Bootstrap, interval

FEW = {"p90": 10, "p99": 100}  #: below so many programs a percentile is little more than the largest value


class Compared(NamedTuple):
    """The document, and the measured values behind it, cell by cell, for plots."""

    document: Comparison
    measured: list[Measured]


def compare(matched: Matched, bootstrap: Bootstrap) -> Compared:
    """The whole comparison. Raises ResultsError for a table that cannot be read."""
    measured = [measure_cell(cell, bootstrap) for cell in matched.cells]
    cells = [_cell(one, bootstrap) for one in measured]
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
        rankings=rankings_of(measured, bootstrap),
    )
    return Compared(document, measured)


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
    errors = statistics.summary_of_errors(measured.program_errors[:, chosen])
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


def _mean(values: Iterable[float]) -> float | None:
    given = list(values)
    return float(np.mean(given)) if given else None
