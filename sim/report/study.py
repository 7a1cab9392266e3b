"""What a report is about: the runs of a folder, which of their fields make a line in a plot and which the horizontal axis,
and every number with its interval. Nothing is drawn or worded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from parrot.configuration import ConfigurationError
from sim.cells import Cell, cells_of, confidence_interval
from sim.metrics import Summary, metrics_of
from sim.objectives import Objectives, within
from sim.report.plots import Metric, Sample, sample_of
from sim.results import ResultFolder, ResultsError, RunResult, read_results
from sim.spec import choices_of, runs_of
from sim.tables import Fairness, engine_load, fairness, knee, queue_over_time
from sim.workloads.generators import GENERATORS

#: what can be the horizontal axis of a plot; the first that has several values is
AXES = (
    Metric("rate", "arrival rate (programs/s)"),
    Metric("clients", "programs under way (clients)"),
    Metric("engines", "engines"),
)
BINS = 200  #: of a timeline in a report


class Study:
    """The finished runs of a sweep, by series (a line in a plot) and by the place on `axis` (None: nothing to plot against).

    A series is told by what was varied beside the axis, seeds and repeats; alike in every plot and table.
    """

    def __init__(self, results: ResultFolder) -> None:
        self.results = results
        self.runs = results.runs
        self.specification = results.specification
        drawn = [(result.run, result.summary) for result in (*results.runs, *results.draws)]
        self.cells = cells_of(drawn, results.specification.confidence)
        self.axis = next((axis for axis in AXES if len(_values(self.cells, axis.column)) > 1), None)
        self._names = _series_names(self.cells, self.axis)
        self.series = list(dict.fromkeys(self.series_of(cell) for cell in self.cells))

    def series_of(self, cell: Cell | Summary) -> str:
        return self._names(cell)

    def place_of(self, cell: Cell | Summary) -> float:
        """On the axis; 0 where there is none, NaN for recorded arrivals beside rates."""
        if self.axis is None:
            return 0.0
        value = getattr(cell, self.axis.column)
        return float(value) if value is not None else float("nan")

    @cached_property
    def points(self) -> pd.DataFrame:
        """A row a cell: series, place, seeds, runs, and of each metric `m` the columns `m`, `m.low`, `m.high` (of the mean's
        confidence interval), `m.least`, `m.most` (of the prediction interval)."""
        rows = []
        for cell in self.cells:
            row: dict[str, Any] = {"series": self.series_of(cell), "place": self.place_of(cell)}
            row |= {"seeds": len(cell.seeds), "runs": cell.runs}
            for name, estimate in cell.metrics.items():
                row[name] = estimate.mean
                row[f"{name}.low"], row[f"{name}.high"] = estimate.confidence_interval or (None, None)
                row[f"{name}.least"], row[f"{name}.most"] = estimate.prediction_interval or (None, None)
            rows.append(row)
        table = pd.DataFrame(rows)
        numbers = table.columns.drop("series")
        return table.astype(dict.fromkeys(numbers, "float64"))

    @cached_property
    def places(self) -> list[float]:
        """The values on the axis, in order; 0 alone where there is none."""
        return sorted(self.points["place"].dropna().unique().tolist())

    @cached_property
    def usual_knee(self) -> float | None:
        """The median of the series' knees in their mean JCT; null when none is seen."""
        knees = self.knees("jct_s.mean")["x"] if self.is_rate else []
        return float(np.median(knees)) if len(knees) else None

    @cached_property
    def middle(self) -> float:
        """The place that shows most: the first at or above the usual knee, else the middle one."""
        if self.usual_knee is None:
            return self.places[len(self.places) // 2]
        return next((place for place in self.places if place >= self.usual_knee), self.places[-1])

    @property
    def over(self) -> str | None:
        """What confidence intervals are over: seeds or repeats; null when there are none."""
        return next((cell.over for cell in self.cells if cell.over), None)

    @cached_property
    def without_chance(self) -> set[tuple[str, str]]:
        """Series and place of the cells that came to the same numbers under several seeds: they have no intervals."""
        same = (cell for cell in self.cells if len(cell.seeds) > 1 and cell.over is None)
        return {(self.series_of(cell), str(self.place_of(cell))) for cell in same}

    @property
    def is_rate(self) -> bool:
        return self.axis is not None and self.axis.column == "rate"

    def knees(self, metric: str) -> pd.DataFrame:
        """The knee of each series that has one under every seed, as its mean over seeds: series, x, x.low, x.high, y, metric.

        y: of the mean line at x, for a mark in a plot.
        """
        rows = []
        by_run = self.by_run({metric: lambda result: metrics_of(result.summary)[metric]})
        for name in self.series:
            mine = by_run[by_run["series"] == name]
            seeds = mine.groupby(["seed", "place"], as_index=False)[metric].mean()
            found = [knee(group["place"].tolist(), group[metric].tolist()) for _, group in seeds.groupby("seed")]
            known = [value for value in found if value is not None]
            if not known or len(known) < len(found):
                continue
            interval = confidence_interval([[value] for value in known], self.specification.confidence)
            low, high = interval if interval is not None and len(set(known)) > 1 else (np.nan, np.nan)
            line = self.points[self.points["series"] == name].sort_values("place")
            x = float(np.mean(known))
            y = float(np.interp(x, line["place"], line[metric]))
            rows.append({"series": name, "x": x, "x.low": low, "x.high": high, "y": y, "metric": metric})
        return pd.DataFrame(rows, columns=["series", "x", "x.low", "x.high", "y", "metric"])

    def beside_first(self, metric: str) -> pd.DataFrame:
        """How much larger `metric` is than that of the first series at the same place, in percent of it: series, place,
        `metric` and its interval. Compared seed by seed: under one seed all series ran the same programs."""
        by_run = self.by_run({metric: lambda result: metrics_of(result.summary)[metric]})
        means = by_run.groupby(["place", "seed", "series"], sort=False)[metric].mean()
        first = means.xs(self.series[0], level="series")
        change = 100.0 * (means / first.reindex(means.index.droplevel("series")).to_numpy() - 1.0)
        of_first = {place for name, place in self.without_chance if name == self.series[0]}
        same = {(name, place) for name, place in self.without_chance if place in of_first}
        return self.estimates(change.reset_index(), [metric], same)

    def by_run(self, values: Mapping[str, Callable[[RunResult], float | None]]) -> pd.DataFrame:
        """A row a run: series, place, seed, and `values`."""
        rows = [
            {"series": self.series_of(r.summary), "place": self.place_of(r.summary), "seed": r.run.seed}
            | {name: value(r) for name, value in values.items()}
            for r in self.runs
        ]
        return pd.DataFrame(rows).astype(dict.fromkeys(["place", *values], "float64"))

    def estimates(
        self, by_run: pd.DataFrame, metrics: Sequence[str], without_chance: set[tuple[str, str]] | None = None
    ) -> pd.DataFrame:
        """From a row a run to a row a cell: series, place, and of each metric its mean over seeds with its interval.

        without_chance: the cells that have no intervals; null: those of the study.
        """
        certain = self.without_chance if without_chance is None else without_chance
        rows = []
        for (series, place), group in by_run.groupby(["series", "place"], sort=False, dropna=False):
            row: dict[str, Any] = {"series": series, "place": place}
            for metric in metrics:
                seeds = [g[metric].tolist() for _, g in group.dropna(subset=[metric]).groupby("seed", sort=True)]
                row[metric] = float(np.mean([np.mean(values) for values in seeds])) if seeds else np.nan
                drawn = bool(seeds) and (series, str(place)) not in certain
                interval = confidence_interval(seeds, self.specification.confidence) if drawn else None
                row[f"{metric}.low"], row[f"{metric}.high"] = interval or (np.nan, np.nan)
            rows.append(row)
        return pd.DataFrame(rows)


def open_study(folder: str | Path) -> Study:
    """The study of a folder of results. Raises ResultsError."""
    return Study(read_results(folder))


def of_workload(results: ResultFolder, workload: str) -> ResultFolder:
    """The part of a sweep that is of one of its workloads."""
    spec = results.specification
    (choice,) = (choice for choice in choices_of(spec) if choice.workload == workload)
    names = {run.name for run in runs_of(spec) if run.workload == workload}
    return ResultFolder(
        results.path,
        msgspec.structs.replace(spec, workloads=(choice.workload,), rates=choice.rates, count=choice.count),
        [result for result in results.runs if result.run.workload == workload],
        [result for result in results.draws if result.run.workload == workload],
        [name for name in results.missing if name in names],
    )


def short_names(workloads: Iterable[str]) -> dict[str, str]:
    """Workload -> its name without parameters and folders, or the whole where two would be alike."""
    short = {workload: _short(workload) for workload in workloads}
    several = {name for name, count in Counter(short.values()).items() if count > 1}
    return {workload: PurePath(workload).name if name in several else name for workload, name in short.items()}


def _short(workload: str) -> str:
    kind, _, rest = workload.partition(":")
    if kind.endswith(".py"):  # an application's own code
        return f"{PurePath(kind).name}:{rest}"
    if kind in GENERATORS or not rest:
        return PurePath(kind).stem
    return PurePath(rest.partition(":")[0].partition(",")[0]).stem


def _values(cells: Sequence[Cell], field: str) -> set[Any]:
    return {value for cell in cells if (value := getattr(cell, field)) is not None}


def _series_names(cells: Sequence[Cell], axis: Metric | None) -> Callable[[Cell | Summary], str]:
    """Says what names a series: the fields that vary beside the axis, or the policy where none does."""
    column = axis.column if axis is not None else ""
    parts: list[Callable[[Any], str]] = []
    if len(_values(cells, "policy")) > 1:
        parts.append(lambda c: str(c.policy))
    if len(_values(cells, "workload")) > 1:
        names = short_names(dict.fromkeys(cell.workload for cell in cells))
        parts.append(lambda c: names[c.workload])
    if len({_files(cell.cluster) for cell in cells} if column == "engines" else {cell.cluster for cell in cells}) > 1:
        parts.append(lambda c: _cluster(c.cluster, counts=column != "engines"))
    if len(_values(cells, "clients")) > 1 and column != "clients":
        parts.append(lambda c: f"{c.clients} clients")
    for key in cells[0].settings:
        if len({repr(cell.settings.get(key)) for cell in cells}) > 1:
            parts.append(lambda c, key=key: f"{key.rpartition('.')[2]}={_plain(c.settings.get(key))}")  # type: ignore[misc]
    if not parts:
        parts.append(lambda c: str(c.policy))
    return lambda cell: ", ".join(part(cell) for part in parts)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _files(cluster: Iterable[str]) -> tuple[str, ...]:
    return tuple(group.rpartition(":")[0] for group in cluster)


def _cluster(cluster: Iterable[str], counts: bool) -> str:
    groups = [group.rpartition(":") for group in cluster]
    return " + ".join(f"{count} × {PurePath(file).stem}" if counts else PurePath(file).stem for file, _, count in groups)


# ------------------------------------------------------------------------------------------- what only the tables say


class Timeline(NamedTuple):
    """A run over time; see `sim.tables.queue_over_time` and `engine_load`."""

    queue: pd.DataFrame
    load: pd.DataFrame


class Details(NamedTuple):
    """What is drawn from the tables of the runs, each of which was read once.

    samples: place -> series -> ("jct_s", "ttft_s", "tpot_s") -> all seeds together. timelines: series -> its first run at
    the middle place. fairness: (run, fairness). within: run's name -> programs within the objectives. unread: reasons.
    """

    samples: dict[float, dict[str, dict[str, Sample]]]
    timelines: dict[str, Timeline]
    fairness: list[tuple[RunResult, Fairness]]
    within: dict[str, int]
    unread: list[str]


MEASURES = (("jct_s", "programs"), ("ttft_s", "calls"), ("tpot_s", "tasks"))  #: a time, and the table that has it


def shown_places(study: Study) -> list[float]:
    """The lowest place, the middle one and the highest."""
    if len(study.places) <= 3:
        return study.places
    return sorted({study.places[0], study.middle, study.places[-1]})


def read_details(study: Study, objectives: Objectives) -> Details:
    """Reads the tables of the runs that have any, one run after the other."""
    shown = [study.place_of(r.summary) for r in study.runs]
    wanted = shown_places(study)
    pooled: dict[float, dict[str, dict[str, list[pd.Series]]]] = {}
    found = Details({}, {}, [], {}, [])
    for result, place in zip(study.runs, shown, strict=True):
        if not result.run.tables:
            continue
        try:
            tables = result.tables()
        except ResultsError as error:
            found.unread.append(str(error))
            continue
        series = study.series_of(result.summary)
        found.fairness.append((result, fairness(tables["programs"], tables["calls"])))
        if objectives:
            found.within[result.run.name] = int(within(tables, objectives).sum())
        if place in wanted:
            columns = pooled.setdefault(place, {}).setdefault(series, {})
            for measure, table in MEASURES:
                columns.setdefault(measure, []).append(_measured(tables[table], measure))
        if series not in found.timelines and place == study.middle:
            tasks = tables["tasks"]
            found.timelines[series] = Timeline(queue_over_time(tasks, BINS), engine_load(tasks, BINS))
    for place in sorted(pooled):
        by_series = pooled[place]
        found.samples[place] = {
            name: {measure: sample_of(pd.concat(columns, ignore_index=True)) for measure, columns in by_series[name].items()}
            for name in study.series
            if name in by_series
        }
    return found


def _measured(table: pd.DataFrame, measure: str) -> pd.Series:
    """The column, without the outputs of one token, which have no time per token and did not fail."""
    if measure != "tpot_s":
        return table[measure]
    return table.loc[table["tpot_s"].notna() | (table["state"] != "finished"), measure]


def objectives_of(study: Study, given: Mapping[str, float] | None) -> Objectives:
    """Those given, else the specification's. Raises ConfigurationError for a name or value that is none."""
    if given is None:
        return study.specification.objectives
    for name, limit in given.items():
        if name not in Objectives.__struct_fields__:
            raise ConfigurationError(f"objective {name!r}: expected one of {', '.join(Objectives.__struct_fields__)}")
        if not limit > 0:
            raise ConfigurationError(f"objective {name} {limit:g}: a time in seconds above 0 is needed")
    return Objectives(**given)
