"""The plots of a comparison, in the style of `sim.report.plots`. Each draws one condition; nothing is computed here beyond what
a plot shows. Real is blue and simulated orange throughout, unless colour tells choices or applications apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from sim.report.style import COLOURS

REAL, SIMULATED, BAND = COLOURS[0], COLOURS[1], "#d9d9d9"
MOST_POINTS = 1000  #: programs in one panel of `programs_scatter`; of more, every k-th is drawn
INTERVAL_RANGE, LEAST_RANGE = 2.5, 5.0  #: intervals are shown to so many times the largest error, and to so many percent
COLUMNS = 4  #: panels beside each other, at most, where there is one for each choice

Array = npt.NDArray[np.float64]


class ErrorBar(NamedTuple):
    """One choice in one row of `error_by_metric`: ratios; None for what is not known. few: too few programs for it."""

    error: float | None
    interval: tuple[float, float] | None
    floor: float | None
    few: bool


def error_by_metric(panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[ErrorBar]]]]], choices: Sequence[str]) -> Figure:
    """A panel a metric, a row a statistic, a dot a choice: (metric, [(statistic, [one ErrorBar a choice])])."""
    columns = 2
    lines = math.ceil(len(panels) / columns)
    height = sum(_error_height(rows, len(choices)) for _, rows in panels[::columns])
    figure = Figure(figsize=(10.5, height + 0.45 * math.ceil(len(choices) / 3) + 0.6), layout="constrained")
    ratios = [_error_height(rows, len(choices)) for _, rows in panels[::columns]]
    grid = figure.subplots(lines, columns, squeeze=False, height_ratios=ratios).flatten()
    for axes, (metric, rows) in zip(grid, panels, strict=False):
        _error_panel(axes, metric, rows)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=_marker(i), linestyle="", label=choice)
        for i, choice in enumerate(choices)
    ]
    if any(bar.floor is not None for _, rows in panels for _, bars in rows for bar in bars):
        handles.append(Patch(color=BAND, label="one real run as the prediction of another (mean size)"))
    if any(bar.few for _, rows in panels for _, bars in rows for bar in bars):
        few = "p99 of < 100 programs, p90 of < 10"
        handles.append(Line2D([], [], color="#444444", marker="o", markerfacecolor="white", linestyle="", label=few))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _error_height(rows: Sequence[object], choices: int) -> float:
    return 0.75 + len(rows) * max(0.34, 0.1 + 0.105 * choices)


def _error_panel(axes: Axes, metric: str, rows: Sequence[tuple[str, Sequence[ErrorBar]]]) -> None:
    _clean(axes)
    axes.axvline(0.0, color="#444444", linewidth=1.0)
    for place, (_, bars) in enumerate(rows):
        step = 0.8 / max(len(bars), 1)
        for index, bar in enumerate(bars):
            y = place - 0.4 + step * (index + 0.5)
            colour = COLOURS[index % len(COLOURS)]
            if bar.floor is not None:
                axes.barh(y, 200.0 * bar.floor, 0.8 * step, left=-100.0 * bar.floor, color=BAND, linewidth=0)
            if bar.error is None:
                continue
            if bar.interval is not None:
                axes.plot([100.0 * bar.interval[0], 100.0 * bar.interval[1]], [y, y], color=colour, linewidth=1.5)
            face = "white" if bar.few else colour
            axes.plot(100.0 * bar.error, y, marker=_marker(index), markersize=4.5, color=colour, markerfacecolor=face)
        if place:
            axes.axhline(place - 0.5, color="#e6e6e6", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    least, most = _error_limits([bar for _, bars in rows for bar in bars])
    axes.set_xlim(least, most)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.3g} %" if value else "0"))
    axes.set_title(metric, fontsize=11)
    axes.set_xlabel("simulated / real − 1")


def _error_limits(bars: Sequence[ErrorBar]) -> tuple[float, float]:
    """What a panel shows, in percent: errors and floors wholly, and as much of the intervals as leaves these apart."""
    shown = [100.0 * abs(value) for bar in bars for value in (bar.error, bar.floor) if value is not None]
    ends = [100.0 * end for bar in bars if bar.interval is not None for end in bar.interval]
    most = max(LEAST_RANGE, INTERVAL_RANGE * max(shown, default=0.0))
    low, high = (
        max(-most, min([*ends, *(-value for value in shown)], default=0.0)),
        min(most, max([*ends, *shown], default=0.0)),
    )
    room = 0.04 * (high - low) or 1.0
    return low - room, high + room


def distributions(panels: Sequence[tuple[str, Sequence[Array], Sequence[Array]]], title: str, unit: str) -> Figure:
    """Cumulative shares, a panel a choice: (choice, sorted values of each real run, those of each simulated run)."""
    figure, grid = _grid(len(panels), 2.5)
    longest = max((values[-1] for _, real, simulated in panels for values in (*real, *simulated) if len(values)), default=1.0)
    for axes, (choice, real, simulated) in zip(grid, panels, strict=True):
        for values, colour, style, width in (
            *((v, REAL, "-", 1.0) for v in real),
            *((v, SIMULATED, "--", 1.6) for v in simulated),
        ):
            if len(values):
                share = np.arange(1, len(values) + 1) / len(values)
                x, y = np.r_[values[0], values], np.r_[0.0, share]
                axes.step(x, y, where="post", color=colour, linestyle=style, linewidth=width)
        axes.set_title(_wrapped(choice), fontsize=9)
        axes.set_xlim(0.0, 1.03 * longest)
        axes.set_ylim(0.0, 1.02)
    handles = [
        Line2D([], [], color=REAL, label="real, each run"),
        Line2D([], [], color=SIMULATED, linestyle="--", label="simulated, each run"),
    ]
    _finish(figure, title, unit, "cumulative share", handles)
    return figure


def programs_scatter(panels: Sequence[tuple[str, pd.DataFrame]], title: str) -> Figure:
    """Each program's JCT, simulated over real, a panel a choice: (choice, columns application, real_s, simulated_s)."""
    figure, grid = _grid(len(panels), 2.7)
    applications = list(dict.fromkeys(name for _, table in panels for name in table["application"]))
    for axes, (choice, table) in zip(grid, panels, strict=True):
        table = table.iloc[:: max(1, math.ceil(len(table) / MOST_POINTS))]
        values = np.r_[table["real_s"], table["simulated_s"]]
        low, high = (values.min(), values.max()) if len(values) else (0.5, 1.0)
        logarithmic = low > 0 and high > 20 * low
        margin = 0.08 * (high - low) + 1e-9
        room = (low / 1.2, high * 1.2) if logarithmic else (max(0.0, low - margin), high + margin)
        line = np.array(room)
        axes.fill_between(line, 0.9 * line, 1.1 * line, color=BAND, linewidth=0, zorder=0)
        axes.plot(line, line, color="#444444", linewidth=1.0, zorder=1)
        for index, application in enumerate(applications):
            mine = table[table["application"] == application]
            colour = COLOURS[index % len(COLOURS)]
            axes.scatter(mine["real_s"], mine["simulated_s"], s=10, color=colour, linewidths=0, alpha=0.8)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_yscale("log")
        axes.set_xlim(*room)
        axes.set_ylim(*room)
        axes.set_aspect("equal")
        axes.set_title(_wrapped(choice), fontsize=9)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker="o", markersize=4, linestyle="", label=name or "program")
        for i, name in enumerate(applications)
    ]
    handles.append(Patch(color=BAND, label="within 10 %"))
    _finish(figure, title, "real (s), mean over runs", "simulated (s)", handles)
    return figure


class RankedChoice(NamedTuple):
    """A row of `orders`."""

    choice: str
    real: float
    interval: tuple[float, float] | None
    simulated: float
    real_rank: float
    simulated_rank: float


def orders(panels: Sequence[tuple[str, str, Sequence[RankedChoice]]], title: str) -> Figure:
    """The choices in their real order, best above, with both values: (heading, unit, rows). The ranks stand at the right."""
    lines = math.ceil(len(panels) / 2)
    rows = max(len(ranked) for _, _, ranked in panels)
    figure = Figure(figsize=(11.0, lines * (1.25 + 0.3 * rows) + 0.6), layout="constrained")
    grid = figure.subplots(lines, 2, squeeze=False).flatten()
    for axes, (heading, unit, ranked) in zip(grid, panels, strict=False):
        _clean(axes)
        for place, row in enumerate(ranked):
            axes.plot([row.real, row.simulated], [place, place], color=BAND, linewidth=3.0, zorder=1)
            if row.interval is not None:
                axes.plot(row.interval, [place, place], color=REAL, linewidth=1.3, zorder=2)
            axes.plot(row.real, place, "o", color=REAL, markersize=6, zorder=3)
            axes.plot(row.simulated, place, "D", color=SIMULATED, markersize=5, zorder=4)
            moved = f"{row.real_rank:g} → {row.simulated_rank:g}"
            axes.annotate(moved, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8, color="#555555")
        axes.set_yticks(range(len(ranked)), [row.choice for row in ranked], fontsize=8.5)
        axes.set_ylim(len(ranked) - 0.4, -0.6)
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_title(heading, fontsize=10, loc="left")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    handles = [
        Line2D([], [], color=REAL, marker="o", markersize=6, linewidth=1.3, label="real, with its interval"),
        Line2D([], [], color=SIMULATED, marker="D", markersize=5, linestyle="", label="simulated"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title)
    return figure


def _marker(index: int) -> str:
    return "osD^vPX*"[index % 8]


def _grid(panels: int, height: float) -> tuple[Figure, Iterator[Axes]]:
    """A figure with so many panels, and these in order."""
    lines = math.ceil(panels / COLUMNS)
    columns = max(2, math.ceil(panels / lines))
    figure = Figure(figsize=(2.75 * columns, height * lines + 1.0), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in grid[:panels]:
        _clean(axes)
    for axes in grid[panels:]:
        axes.set_axis_off()
    return figure, iter(grid[:panels])


def _finish(figure: Figure, title: str, x: str, y: str, handles: Sequence[Line2D | Patch]) -> None:
    """Labels at the outer panels, a title, a legend below."""
    for axes in figure.axes:
        place = axes.get_subplotspec()
        if not axes.axison or place is None:
            continue
        below = place.rowspan.stop * place.get_gridspec().ncols + place.colspan.start
        if below >= sum(other.axison for other in figure.axes):
            axes.set_xlabel(x)
        if place.is_first_col():
            axes.set_ylabel(y)
    figure.suptitle(title)
    figure.legend(handles=list(handles), loc="outside lower center", ncols=min(5, len(handles)), frameon=False, fontsize=9)


def _wrapped(text: str, width: int = 26) -> str:
    """On several lines where it is long, broken behind a + or a comma."""
    lines = [""]
    for piece in text.replace("+", "+\0").replace(", ", ",\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _clean(axes: Axes) -> None:
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
