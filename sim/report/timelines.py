"""The plots of one run over time: tasks as bars, and load and queue as lines. Tables as in `sim.tables` and `sim.metrics`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sim.report.lanes import lanes_of
from sim.report.plots import Metric
from sim.report.style import COLOURS, line_style, names_of, new_figure, shared_legend

MOST_ENGINES = 8  #: each with a line of its own; more are drawn as their middle and their range


def engine_timeline(table: pd.DataFrame, title: str = "Tasks on engines over time") -> Figure:
    """Each engine's tasks as bars, stacked where they overlap. Columns: engine, start_s, end_s, group (its colour)."""
    table = table.dropna(subset=["start_s", "end_s"]).sort_values(["start_s", "end_s"], kind="stable")
    engines = names_of(table["engine"].sort_values())
    groups = names_of(table["group"].sort_values())
    lanes = {}
    for engine in engines:
        mine = table[table["engine"] == engine]
        lanes[engine] = lanes_of(mine["start_s"].tolist(), mine["end_s"].tolist())
    heights = {engine: max(lanes[engine], default=-1) + 1 for engine in engines}
    rows = sum(heights.values())
    figure, ((axes,),) = new_figure(width=9.0, height=0.6 + min(6.0, 0.9 * len(engines) + 0.12 * rows))
    base, ticks = 0.0, []
    for engine in engines:
        ticks.append(base + heights[engine] / 2)
        mine = table[table["engine"] == engine]
        for lane, (_, row) in zip(lanes[engine], mine.iterrows(), strict=True):
            colour = COLOURS[groups.index(str(row["group"])) % len(COLOURS)]
            axes.broken_barh(
                [(row["start_s"], row["end_s"] - row["start_s"])],
                (base + lane + 0.08, 0.84),
                facecolor=colour,
                edgecolor="white",
                linewidth=0.4,
            )
        base += heights[engine] + 0.6
    axes.set_yticks(ticks, engines)
    axes.set_ylim(base - 0.6, 0)
    axes.set_xlabel("time (s)")
    axes.set_title(title)
    axes.grid(axis="y", visible=False)
    handles = [Patch(color=COLOURS[i % len(COLOURS)], label=group) for i, group in enumerate(groups)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    return figure


def queue_lengths(queues: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """The core's queue over time, a line a series; each table is one of `sim.tables.queue_over_time`."""
    figure, ((axes,),) = new_figure(height=2.9)
    for index, (name, queue) in enumerate(queues.items()):
        axes.plot(_middle(queue), queue["queued"], label=name, linewidth=1.3, **line_style(index))
    axes.set_xlabel("time (s)")
    axes.set_ylabel("tasks waiting for a dispatch")
    axes.set_xlim(left=0)
    _from_zero(axes)
    axes.set_title(title)
    shared_legend(figure)
    return figure


def loads(by_series: Mapping[str, pd.DataFrame], metric: Metric, title: str) -> Figure:
    """A panel a series, a line an engine; each table is one of `sim.tables.engine_load`, of which `metric` is a column."""
    columns = min(4, max(2, -(-len(by_series) // 4)))
    rows = -(-len(by_series) // columns)
    figure, grid = new_figure(rows, columns, height=1.9, shared=True)
    for place, (name, load) in enumerate(by_series.items()):
        axes = grid[place // columns][place % columns]
        _engines(axes, load, metric.column)
        axes.set_title(name, fontsize=10)
    grid[0][0].set_xlim(left=0)
    _from_zero(grid[0][0])
    for axes in np.ravel(grid)[len(by_series) :]:
        axes.set_axis_off()
    for place in range(max(0, len(by_series) - columns), len(by_series)):  # the lowest panel of each column
        grid[place // columns][place % columns].set_xlabel("time (s)")
        grid[place // columns][place % columns].tick_params(labelbottom=True)
    figure.supylabel(metric.label, fontsize=10)
    figure.suptitle(title)
    shared_legend(figure)
    return figure


def one_run(queue: pd.DataFrame, load: pd.DataFrame, metrics: Sequence[Metric], title: str) -> Figure:
    """A run alone: the core's queue, and below it a panel for each of `metrics` of `load`, a line an engine."""
    figure, grid = new_figure(1 + len(metrics), 1, height=1.9)
    grid[0][0].plot(_middle(queue), queue["queued"], color="black", linewidth=1.3, label="core")
    grid[0][0].set_ylabel("tasks in the\ncore's queue")
    for (axes,), metric in zip(grid[1:], metrics, strict=True):
        _engines(axes, load, metric.column)
        axes.set_ylabel(metric.label)
    last_s = float((queue["time_s"] + queue["bin_s"]).max())
    for (axes,) in grid:
        axes.set_xlim(0, last_s)
        _from_zero(axes)
    grid[-1][0].set_xlabel("time (s)")
    figure.suptitle(title)
    shared_legend(figure)
    return figure


def _engines(axes: Axes, load: pd.DataFrame, column: str) -> None:
    engines = names_of(load["engine"])
    if len(engines) <= MOST_ENGINES:
        for index, engine in enumerate(engines):
            mine = load[load["engine"] == engine]
            axes.plot(_middle(mine), mine[column], label=engine, linewidth=1.2, **line_style(index))
        return
    groups = load.groupby(_middle(load))[column]
    low, middle, high = groups.min(), groups.median(), groups.max()
    axes.fill_between(low.index, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label=f"range of {len(engines)} engines")
    axes.plot(middle.index, middle, color=COLOURS[0], linewidth=1.3, label="median engine")


def _from_zero(axes: Axes) -> None:
    """Counts, from 0 to at least 1: an empty queue is no mountain range."""
    axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))


def _middle(table: pd.DataFrame) -> pd.Series:
    return table["time_s"] + table["bin_s"] / 2
