"""How every picture of a report looks: colours, line styles and markers of series, axes, legends."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: colours that stay apart for the colour-blind, in a fixed order (after Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#8c6d1f")
STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.2, 1.2, 1.2)), (0, (1.2, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
GREY = "#888888"
LEGEND_COLUMNS, LEGEND_LETTERS = 4, 130  #: at most so many names in a line, and so many letters
WIDTH = 9.6  #: of a figure that fills the page, inches


def line_style(index: int) -> dict[str, Any]:
    """Colour and line style of the `index`-th series, alike in every plot of a report.

    Neighbours differ in both, so that of two lines that coincide both can be seen; 32 series have each their own.
    """
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[(index + index // len(COLOURS)) % len(STYLES)]}


def point_style(index: int) -> dict[str, Any]:
    """As `line_style`, with a marker."""
    return line_style(index) | {"marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def names_of(column: Iterable[Any]) -> list[str]:
    """The distinct values, in order of their first appearance."""
    return [str(name) for name in dict.fromkeys(column)]


Panels = npt.NDArray[Any]


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = 3.0, shared: bool = False
) -> tuple[Figure, Panels]:
    """A figure of `rows` × `columns` panels, each `height` inches high, and the panels as a two-dimensional array.

    shared: all panels have the same scales.
    """
    figure = Figure(figsize=(width, 0.6 + height * rows), layout="constrained")
    panels: Panels = figure.subplots(rows, columns, squeeze=False, sharex=shared, sharey=shared)
    for axes in np.ravel(panels):
        clean(axes)
    return figure, panels


def clean(axes: Axes) -> None:
    """A light grid behind the data, no box around it."""
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shared_legend(figure: Figure) -> None:
    """One legend below all panels: a series once, however many panels it is in; none when there is one series."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if len(handles) > 1:
        widest = max(len(label) for label in handles)
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=max(1, min(LEGEND_COLUMNS, len(handles), LEGEND_LETTERS // (widest + 8))),
            frameon=False,
            fontsize=9,
            handlelength=3.2,
        )
