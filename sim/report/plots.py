"""The plots of many runs. Each takes a table, whose columns its docstring names, and gives a figure: axes with units, a legend.

Nothing is computed here beyond what a plot shows (an order, a cumulative share); metrics come from sim.metrics and sim.tables.
A table's column `series` says which line a row belongs to. An interval around the column `c` is in `c.low` and `c.high`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sim.report.style import COLOURS, GREY, line_style, names_of, new_figure, point_style, shared_legend

MOST_POINTS = 300  #: of a cumulative share; more could not be told apart
DODGE = 0.006  #: of an axis' length, between series of one place
LEAST_DIFFERENCE = 5.0  #: percent; an axis of differences goes no finer for whiskers' sake
LOGARITHMIC = 40.0  #: latencies that differ by more than this factor get a logarithmic axis


def real_against_simulated(table: pd.DataFrame) -> Figure:
    """Mean job completion time of each application. Columns: application, real_s (a list, one number a run), simulated_s."""
    figure, ((axes,),) = new_figure(width=7.5, height=3.2)
    positions = np.arange(len(table))
    means = [float(np.mean(runs)) for runs in table["real_s"]]
    axes.bar(positions - 0.2, means, 0.38, color=COLOURS[0], label="real (mean)")
    axes.bar(positions + 0.2, table["simulated_s"], 0.38, color=COLOURS[4], label="simulated")
    for index, runs in enumerate(table["real_s"]):
        offsets = np.linspace(-0.08, 0.08, len(runs)) if len(runs) > 1 else [0.0]
        label = "real, each run" if index == 0 else None
        axes.scatter(positions[index] - 0.2 + np.array(offsets), runs, s=22, color="black", zorder=3, label=label)
    highest = max([*table["simulated_s"], *(max(runs) for runs in table["real_s"])], default=1.0)
    for index, (mean, simulated) in enumerate(zip(means, table["simulated_s"], strict=True)):
        top = max(simulated, mean)
        axes.text(
            positions[index] + 0.2, top + 0.02 * highest, f"{simulated / mean - 1:+.1%}", ha="center", va="bottom", fontsize=9
        )
    axes.set_ylim(0, 1.3 * highest)  # room for the numbers and the legend
    axes.set_xticks(positions, [str(name) for name in table["application"]])
    axes.set_ylabel("job completion time (s)")
    axes.set_title("Job completion time, real and simulated")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="upper left")
    return figure


# ----------------------------------------------------------------------------------------------------- distributions


class Sample(NamedTuple):
    """Measured values, of `total` things: what failed has none, and keeps its line below 1."""

    values: npt.NDArray[np.float64]
    total: int


def sample_of(column: pd.Series) -> Sample:
    """A column of times, in which a null is of something that failed."""
    return Sample(column.dropna().to_numpy(dtype=float), len(column))


class Panel(NamedTuple):
    """A panel of cumulative shares: a line a series. `things`: of what it is the share."""

    title: str
    xlabel: str
    things: str
    samples: Mapping[str, Sample]


def distributions(panels: Sequence[Panel], columns: int, title: str = "") -> Figure:
    """Cumulative shares, `columns` panels a row. A series has the style of its place among all series of all panels; panels
    with the same label are all logarithmic or none."""
    series = names_of(name for panel in panels for name in panel.samples)
    logarithmic = {panel.xlabel for panel in panels if _spreads_far(panel)}
    rows = -(-len(panels) // columns)
    figure, grid = new_figure(rows, columns, height=2.7)
    for panel, axes in zip(panels, np.ravel(grid), strict=False):
        for name, sample in panel.samples.items():
            if len(sample.values):
                times, shares = _cumulative(sample)
                axes.plot(times, shares, label=name, linewidth=1.5, drawstyle="steps-post", **line_style(series.index(name)))
        axes.set_xscale("log" if panel.xlabel in logarithmic else "linear")
        if axes.get_xscale() == "linear":
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(panel.xlabel)
        axes.set_ylabel(f"share of {panel.things}")
        axes.set_ylim(0, 1.02)
        axes.set_title(panel.title, fontsize=10)
    for axes in np.ravel(grid)[len(panels) :]:
        axes.set_axis_off()
    if title:
        figure.suptitle(title)
    shared_legend(figure)
    return figure


def _cumulative(sample: Sample) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    ordered = np.sort(sample.values)
    kept = np.unique(np.linspace(0, len(ordered) - 1, MOST_POINTS).round().astype(int))
    return np.r_[ordered[0], ordered[kept]], np.r_[0.0, (kept + 1) / sample.total]


def _spreads_far(panel: Panel) -> bool:
    """Whether a few values are so much larger than most that a logarithm shows more."""
    values = np.concatenate([np.empty(0), *(sample.values for sample in panel.samples.values())])
    return bool(len(values) and values.min() > 0 and values.max() > LOGARITHMIC * np.median(values))


# ---------------------------------------------------------------------------------- against what was swept, and fronts


class Metric(NamedTuple):
    """A column of a table and what to call it, unit included. `top`: of an axis that must not end elsewhere. `signed`: values
    lie around 0. `linear`: even where values differ by much, as of what is better when larger."""

    column: str
    label: str
    top: float | None = None
    signed: bool = False
    linear: bool = False


def against(
    table: pd.DataFrame, axis: Metric, metrics: Sequence[Metric], title: str, marks: pd.DataFrame | None = None
) -> Figure:
    """A panel a metric over `axis`, a line a series, with whiskers where the table has intervals. Each series stands a little
    to the side of the one before, so that of points in one place each can be seen. The scale is that of the lines: whiskers
    much longer are cut.

    Columns: series, those of `axis` and `metrics`. marks: rings on a line, columns series, metric (a column's name), x, y.
    """
    columns = min(2, len(metrics)) if len(metrics) != 3 else 3
    rows = -(-len(metrics) // columns)
    figure, grid = new_figure(rows, columns, height=2.9)
    series = names_of(table["series"])
    aside = DODGE * float(table[axis.column].max() - table[axis.column].min())
    for axes, metric in zip(np.ravel(grid), metrics, strict=False):
        for index, name in enumerate(series):
            line = table[table["series"] == name].sort_values(axis.column)
            x = line[axis.column] + aside * (index - (len(series) - 1) / 2)
            _whiskers(axes, x, line, metric, index)
            axes.plot(x, line[metric.column], label=name, **point_style(index) | {"linewidth": 1.4})
            if marks is not None:
                mine = marks[(marks["series"] == name) & (marks["metric"] == metric.column)]
                ring = {"facecolors": "none", "edgecolors": COLOURS[index % len(COLOURS)], "linewidths": 1.6, "zorder": 4}
                axes.scatter(mine["x"], mine["y"], s=110, **ring)
        if (table[axis.column].dropna() % 1 == 0).all():
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(axis.label)
        axes.set_ylabel(metric.label)
        if metric.signed:
            axes.axhline(0.0, color=GREY, linewidth=1.0, zorder=1)
        _scale_y(axes, table, metric)
    for axes in np.ravel(grid)[len(metrics) :]:
        axes.set_axis_off()
    figure.suptitle(title)
    shared_legend(figure)
    return figure


def _whiskers(axes: Axes, x: pd.Series, line: pd.DataFrame, metric: Metric, index: int) -> None:
    low, high = f"{metric.column}.low", f"{metric.column}.high"
    if low in line and line[low].notna().any():
        # a time below 0 cannot be, whatever the t distribution says
        low_values = line[low] if metric.signed else line[low].clip(lower=0.0)
        colour = COLOURS[index % len(COLOURS)]
        axes.vlines(x, low_values, line[high], color=colour, linewidth=1.0, alpha=0.6, zorder=1)


def _scale_y(axes: Axes, table: pd.DataFrame, metric: Metric) -> None:
    """From 0 (around it when signed), or logarithmic, as far as the lines go, and their whiskers within reason."""
    known = table[metric.column].dropna().to_numpy(dtype=float)
    ends = [f"{metric.column}.low", f"{metric.column}.high"]
    whiskers = table[[end for end in ends if end in table]].to_numpy(dtype=float)
    furthest = float(np.nanmax(np.abs(whiskers), initial=0.0))
    most = float(np.abs(known).max(initial=0.0))
    if metric.signed:
        limit = min(1.05 * max(most, furthest), max(3.0 * most, LEAST_DIFFERENCE))
        axes.set_ylim(-limit or -1.0, limit or 1.0)
    elif metric.top is not None:
        axes.set_ylim(0, metric.top)
    elif not metric.linear and len(known) and known.min() > 0 and most > LOGARITHMIC * known.min():
        axes.set_yscale("log")
        axes.set_ylim(bottom=known.min() / 2, top=min(1.2 * max(most, furthest), 3.0 * most))
    else:
        axes.set_ylim(0, min(1.05 * max(most, furthest), 1.6 * most) or None)


def throughput_and_latency(table: pd.DataFrame, throughput: Metric, latencies: Sequence[Metric]) -> Figure:
    """A panel a latency: a point a cell, a line a series through what was swept, and the Pareto front as a grey staircase.

    Columns: series, those of `throughput` and `latencies`, and for each latency `front.COLUMN`, whether on the front.
    """
    figure, grid = new_figure(1, len(latencies), height=3.8)
    for axes, latency in zip(grid[0], latencies, strict=True):
        for index, name in enumerate(names_of(table["series"])):
            line = table[table["series"] == name]
            style = point_style(index) | {"linewidth": 1.0, "alpha": 0.9}
            axes.plot(line[throughput.column], line[latency.column], label=name, **style)
        front = table[table[f"front.{latency.column}"]].sort_values(throughput.column)
        axes.plot(
            front[throughput.column],
            front[latency.column],
            color=GREY,
            linewidth=4,
            alpha=0.45,
            drawstyle="steps-pre",
            solid_capstyle="round",
            marker="o",
            markersize=13,
            zorder=0,
            label="Pareto front",
        )
        axes.set_xlabel(throughput.label)
        axes.set_ylabel(latency.label)
        known = table[latency.column].dropna()
        if len(known) and known.min() > 0 and known.max() > LOGARITHMIC * known.min():
            axes.set_yscale("log")
    figure.suptitle("Throughput and latency: right and down is better")
    shared_legend(figure)
    return figure


def bars(table: pd.DataFrame, metrics: Sequence[Metric], title: str) -> Figure:
    """A panel a metric, a bar a series, with its interval, where nothing was swept. Columns: series, those of `metrics`."""
    figure, grid = new_figure(1, len(metrics), height=0.6 + 0.32 * len(table))
    places = np.arange(len(table))
    for axes, metric in zip(grid[0], metrics, strict=True):
        values = table[metric.column].to_numpy(dtype=float)
        axes.barh(places, values, 0.7, color=[COLOURS[i % len(COLOURS)] for i in places])
        low, high = f"{metric.column}.low", f"{metric.column}.high"
        if low in table and table[low].notna().any():
            errors = np.stack([values - table[low].clip(lower=0.0), table[high] - values])
            axes.errorbar(values, places, xerr=np.maximum(errors, 0.0), fmt="none", ecolor="black", capsize=3, linewidth=1)
        axes.set_yticks(places, [str(name) for name in table["series"]] if axes is grid[0][0] else [""] * len(table))
        axes.invert_yaxis()
        axes.set_xlabel(metric.label)
        axes.set_xlim(left=0, right=metric.top)
        axes.grid(axis="y", visible=False)
    figure.suptitle(title)
    return figure
