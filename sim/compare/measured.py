"""The numbers of a matched cell: each statistic of each run, its draws, and the programs of both sides side by side.

Decides what is drawn again for a cell's intervals, the first of these that there is: seeds (programs and machine vary together,
both sides' runs of a seed move as one), repeats of one seed (the machine varies), programs of single runs (each with its calls
and tasks; nothing then says how far real runs differ). Sides without a seed in common are drawn each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sim.compare.matching import Cell, table_of
from sim.compare.resampling import Bootstrap, Samples, program_draws, samples, widened
from sim.compare.statistics import Array, relative_error
from sim.metrics import Summary
from sim.results import RunResult


class Measure(NamedTuple):
    """A statistic of a metric, as `sim.metrics.Summary` has it."""

    metric: str
    statistic: str
    higher_is_better: bool


#: metric -> the table that has its values
LATENCIES = {"ttft_s": "calls", "tpot_s": "tasks", "jct_s": "programs", "normalized_latency_s": "calls"}
STATISTICS = ("mean", "p50", "p90", "p99")
THROUGHPUTS = ("throughput_tokens_per_s", "throughput_programs_per_s")
TOTAL = "total"
MEASURES = (
    *(Measure(metric, statistic, False) for metric in LATENCIES for statistic in STATISTICS),
    *(Measure(metric, TOTAL, True) for metric in THROUGHPUTS),
)


class Measured(NamedTuple):
    """A cell's numbers; columns are MEASURES throughout, absent values NaN.

    by_seed: side -> for each seed, shape (repeats, columns). real, simulated: the means over seeds of the means over repeats.
    real_draws, simulated_draws: shape (draws, columns). predictions: the simulation's runs of --intervals, (number, columns).
    programs: those that finished on both sides, with application, real_s (mean over runs), simulated_s; None without tables.
    program_errors: shape (real runs, programs); program_floor: (ordered pairs of real runs, programs).
    distributions: side -> metric -> the sorted values of each run, for plots.
    """

    cell: Cell
    by_seed: Mapping[str, list[Array]]
    real: Array
    simulated: Array
    resampled: str | None
    real_draws: Array
    simulated_draws: Array
    predictions: Array
    programs: pd.DataFrame | None
    program_errors: Array
    program_floor: Array
    left_out: int
    distributions: Mapping[str, Mapping[str, list[Array]]]

    def runs(self, side: str, column: int) -> list[list[float]]:
        """One statistic of each run: for each seed, a number a repeat."""
        return [repeats[:, column].tolist() for repeats in self.by_seed[side]]


def measure_cell(cell: Cell, bootstrap: Bootstrap) -> Measured:
    """Raises ResultsError for a table that cannot be read."""
    sides: dict[str, dict[int, list[RunResult]]] = {"real": cell.real, "simulated": cell.simulated}
    by_seed = {
        side: [np.array([_row(result.summary) for result in seeds[seed]]) for seed in sorted(seeds)]
        for side, seeds in sides.items()
    }
    points = {side: np.mean([repeats.mean(axis=0) for repeats in seeds], axis=0) for side, seeds in by_seed.items()}
    tables = {side: [_tables(r) for seed in sorted(seeds) for r in seeds[seed]] for side, seeds in sides.items()}
    resampled, draws = _draws(cell, by_seed, points, tables, bootstrap)
    pairs = _programs(cell, tables) if cell.paired else None
    return Measured(
        cell=cell,
        by_seed=by_seed,
        real=points["real"],
        simulated=points["simulated"],
        resampled=resampled,
        real_draws=draws["real"],
        simulated_draws=draws["simulated"],
        predictions=_predictions(cell),
        programs=pairs.table if pairs else None,
        program_errors=pairs.errors if pairs else np.empty((0, 0)),
        program_floor=pairs.floor if pairs else np.empty((0, 0)),
        left_out=pairs.left_out if pairs else 0,
        distributions={side: _distributions(given) for side, given in tables.items()},
    )


def _row(summary: Summary) -> list[float]:
    """A run's statistics, NaN for what it has not."""
    found = []
    for measure in MEASURES:
        value = getattr(summary, measure.metric)
        if measure.statistic != TOTAL:
            value = getattr(value, measure.statistic)
        found.append(math.nan if value is None else float(value))
    return found


def _predictions(cell: Cell) -> Array:
    """The draws of --intervals, each the mean over its seeds."""
    by_draw: dict[Any, list[list[float]]] = {}
    for result in cell.draws:
        by_draw.setdefault((result.run.repeat, result.run.draw), []).append(_row(result.summary))
    if not by_draw:
        return np.empty((0, len(MEASURES)))
    return np.array([np.mean(rows, axis=0) for rows in by_draw.values()])


# -------------------------------------------------------------------------------------------------------------- tables


class _Tables(NamedTuple):
    """Of a run: its programs in order, and metric -> (value, program) of each that has one."""

    programs: pd.DataFrame
    samples: dict[str, Samples]


def _tables(result: RunResult) -> _Tables | None:
    if not result.run.tables:
        return None
    programs = table_of(result, "programs", ("program", "application", "jct_s"))
    numbers = pd.Series(np.arange(len(programs)), index=programs["program"])
    found = {}
    for name in dict.fromkeys(LATENCIES.values()):
        metrics = [metric for metric, table in LATENCIES.items() if table == name]
        table = table_of(result, name, ("program", *metrics))
        owners = numbers.reindex(table["program"]).to_numpy()
        found.update({metric: samples(table[metric], owners) for metric in metrics})
    return _Tables(programs, found)


def _distributions(tables: Sequence[_Tables | None]) -> dict[str, list[Array]]:
    return {metric: [given.samples[metric].values for given in tables if given is not None] for metric in ("jct_s", "ttft_s")}


class _Pairs(NamedTuple):
    table: pd.DataFrame
    errors: Array
    floor: Array
    left_out: int


def _programs(cell: Cell, tables: Mapping[str, Sequence[_Tables | None]]) -> _Pairs | None:
    """Program by program, seed by seed. A program that did not finish in every run of its seed is left out."""
    remaining = {side: list(given) for side, given in tables.items()}
    frames, errors, floors = [], [], []
    left_out = 0
    for seed in sorted(cell.real):
        real = [remaining["real"].pop(0) for _ in cell.real[seed]]
        simulated = [remaining["simulated"].pop(0) for _ in cell.simulated[seed]]
        if any(given is None for given in (*real, *simulated)):
            return None
        times = [
            np.stack([run.programs["jct_s"].to_numpy(dtype=float) for run in side if run is not None])
            for side in (real, simulated)
        ]
        finished = np.isfinite(times[0]).all(axis=0) & np.isfinite(times[1]).all(axis=0)
        left_out += int((~finished).sum())
        measured, predicted = times[0][:, finished], times[1][:, finished].mean(axis=0)
        assert real[0] is not None
        frames.append(
            pd.DataFrame(
                {
                    "application": real[0].programs["application"].to_numpy()[finished],
                    "real_s": measured.mean(axis=0),
                    "simulated_s": predicted,
                }
            )
        )
        errors.append(relative_error(predicted, measured))
        others = [relative_error(a, b) for i, a in enumerate(measured) for j, b in enumerate(measured) if i != j]
        floors.append(np.array(others) if others else np.empty((0, measured.shape[1])))
    return _Pairs(pd.concat(frames, ignore_index=True), _joined(errors), _joined(floors), left_out)


def _joined(arrays: Sequence[Array]) -> Array:
    """Arrays (runs, programs) of several seeds beside each other, short ones filled with NaN."""
    rows = max(len(array) for array in arrays)
    return np.concatenate([np.pad(a, ((0, rows - len(a)), (0, 0)), constant_values=math.nan) for a in arrays], axis=1)


# --------------------------------------------------------------------------------------------------------------- draws


def _draws(
    cell: Cell,
    by_seed: Mapping[str, list[Array]],
    points: Mapping[str, Array],
    tables: Mapping[str, Sequence[_Tables | None]],
    bootstrap: Bootstrap,
) -> tuple[str | None, dict[str, Array]]:
    """What is drawn again, and side -> draws."""
    sides = ("real", "simulated")
    if not cell.paired:
        found = {side: _alone(side, by_seed[side], points[side], tables[side], bootstrap) for side in sides}
        return found["real"][0], {side: draws for side, (_, draws) in found.items()}
    if len(by_seed["real"]) > 1:
        means = {side: np.array([repeats.mean(axis=0) for repeats in by_seed[side]]) for side in sides}
        return "seeds", {side: _of_units(means[side], points[side], "seeds", bootstrap) for side in sides}
    if len(by_seed["real"][0]) > 1:
        who = f"{cell.choice}, {cell.condition}"
        return "repeats", {
            side: _of_units(by_seed[side][0], points[side], f"{side} repeats of {who}", bootstrap)
            if len(by_seed[side][0]) > 1
            else _constant(points[side], bootstrap)
            for side in sides
        }
    given = [run for side in sides if (run := tables[side][0]) is not None]
    if len(given) == len(sides):
        drawn = _of_programs(given, points, sides, bootstrap, "programs")
        return "programs", dict(zip(sides, drawn, strict=True))
    return None, {side: np.full((bootstrap.draws, len(MEASURES)), math.nan) for side in sides}


def _alone(
    side: str, seeds: Sequence[Array], point: Array, tables: Sequence[_Tables | None], bootstrap: Bootstrap
) -> tuple[str | None, Array]:
    """One side by itself: its runs, or the programs of its only run."""
    runs = np.concatenate(seeds)
    if len(runs) > 1:
        return "runs", _of_units(runs, point, f"{side} runs", bootstrap)
    if tables[0] is not None:
        (draws,) = _of_programs([tables[0]], {side: point}, (side,), bootstrap, f"programs of {side}")
        return "programs", draws
    return None, np.full((bootstrap.draws, len(MEASURES)), math.nan)


def _of_units(values: Array, point: Array, name: str, bootstrap: Bootstrap) -> Array:
    """Means of draws of the rows of `values`."""
    draws = values[bootstrap.indices(name, len(values))].mean(axis=1)
    return widened(point, draws, len(values), bootstrap.confidence)


def _of_programs(
    given: Sequence[_Tables], points: Mapping[str, Array], sides: Sequence[str], bootstrap: Bootstrap, name: str
) -> list[Array]:
    """Draws of the programs of one run a side; a throughput is of the whole run and has none."""
    programs = len(given[0].programs)
    drawn = program_draws([tables.samples for tables in given], list(LATENCIES), programs, bootstrap, name)
    absent = np.full((bootstrap.draws, len(THROUGHPUTS)), math.nan)
    return [
        widened(points[side], np.concatenate([draws, absent], axis=1), programs, bootstrap.confidence)
        for side, draws in zip(sides, drawn, strict=True)
    ]


def _constant(point: Array, bootstrap: Bootstrap) -> Array:
    return np.tile(point, (bootstrap.draws, 1))
