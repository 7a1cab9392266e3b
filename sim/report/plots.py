"""The plots of a report. Each takes a table, whose columns its docstring names, and gives a figure: axes with units, a legend.

Nothing is computed here beyond what a plot shows (an order, a cumulative share); metrics come from sim.metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

#: colours that stay apart for the colour-blind, in a fixed order (after Okabe and Ito), and line styles for more series
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#8c6d1f")
STYLES = ("-", "--", "-.", ":")


def series_style(index: int) -> dict[str, Any]:
    """Colour and line style of the `index`-th series; alike in every plot of a report."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[(index // len(COLOURS)) % len(STYLES)]}


def real_against_simulated(table: pd.DataFrame) -> Figure:
    """Mean job completion time of each application. Columns: application, real_s (a list, one number a run), simulated_s."""
    figure, axes = _figure(7.5, 3.8)
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


def jct_distribution(table: pd.DataFrame, title: str = "Job completion time by policy") -> Figure:
    """Cumulative share of programs over job completion time, a line a policy. Columns: policy, jct_s."""
    figure, axes = _figure(7.5, 3.8)
    for index, policy in enumerate(_names(table["policy"])):
        times = np.sort(table.loc[table["policy"] == policy, "jct_s"].dropna().to_numpy(dtype=float))
        if len(times) == 0:
            continue
        share = np.arange(1, len(times) + 1) / len(times)
        axes.step(np.r_[times[0], times], np.r_[0, share], where="post", label=policy, linewidth=1.8, **series_style(index))
    axes.set_xlabel("job completion time (s)")
    axes.set_ylabel("share of programs")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.set_title(title)
    _legend(axes)
    return figure


def latency_against_rate(table: pd.DataFrame, metrics: Sequence[tuple[str, str]]) -> Figure:
    """A panel a metric, a line a policy. Columns: policy, rate (programs/s), and those of `metrics` ((column, axis label))."""
    figure = Figure(figsize=(3.75 * max(2, len(metrics)), 3.6), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, (column, label) in zip(panels, metrics, strict=True):
        _clean(axes)
        for index, policy in enumerate(_names(table["policy"])):
            rows = table[table["policy"] == policy].groupby("rate", as_index=False)[column].mean().sort_values("rate")
            axes.plot(rows["rate"], rows[column], marker="o", markersize=4, label=policy, **series_style(index))
        axes.set_xlabel("arrival rate (programs/s)")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    _legend(panels[0])
    figure.suptitle("Latency against arrival rate")
    return figure


def engine_timeline(table: pd.DataFrame, title: str = "Tasks on engines over time") -> Figure:
    """Each engine's tasks as bars, stacked where they overlap. Columns: engine, start_s, end_s, group (its colour)."""
    table = table.dropna(subset=["start_s", "end_s"]).sort_values(["start_s", "end_s"], kind="stable")
    engines = _names(table["engine"].sort_values())
    groups = _names(table["group"].sort_values())
    lanes = {engine: _lanes(table[table["engine"] == engine]) for engine in engines}
    heights = {engine: max(lanes[engine], default=-1) + 1 for engine in engines}
    rows = sum(heights.values())
    figure, axes = _figure(9.0, 1.2 + min(6.0, 0.9 * len(engines) + 0.12 * rows))
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


def _lanes(tasks: pd.DataFrame) -> list[int]:
    """For tasks in order of their start: the first lane in which each overlaps with none before it."""
    ends: list[float] = []
    lanes = []
    for start, end in zip(tasks["start_s"], tasks["end_s"], strict=True):
        lane = next((i for i, free_from in enumerate(ends) if free_from <= start), len(ends))
        if lane == len(ends):
            ends.append(end)
        else:
            ends[lane] = end
        lanes.append(lane)
    return lanes


def _names(column: pd.Series[Any]) -> list[str]:
    """The distinct values, in order of their first appearance."""
    return [str(name) for name in dict.fromkeys(column.tolist())]


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    return figure, axes


def _clean(axes: Axes) -> None:
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=9)
