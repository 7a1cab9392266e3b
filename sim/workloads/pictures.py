"""Draws a workload: arrivals over time, lengths, sharing. Computes nothing: the numbers are `sim.workloads.describe`'s."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from sim.report.html import Section, write_report
from sim.report.style import COLOURS
from sim.workloads.describe import PARTS, Description
from sim.workloads.histogram import Histogram

FEWEST_BINS = 10  #: over time
_UNITS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86400.0, "days"))


def write_pictures(description: Description, folder: str | Path) -> Path:
    """Writes FOLDER/workload.html, one file with everything in it. Raises OSError."""
    numbers = description.numbers()
    part = f"{description.repeated_part:.1%}"
    at_once = description.span_s == 0
    shown = "Calls" if at_once else "Prompt tokens over time, and calls"
    sections = [
        Section(
            "Arrivals",
            text=["All programs arrive at one time."] if at_once else [],
            figures=[] if at_once else [(arrivals(description), "Programs that arrive, over time.")],
            tables=[_facts(numbers)],
        ),
        Section(
            "Lengths",
            figures=[(lengths(description), "Prompts and outputs of calls, with their medians and 99th percentiles.")],
            tables=[_lengths_table(numbers)],
        ),
        Section(
            "Sharing",
            text=[
                f"{part} of all prompt tokens are in a prefix that came before, in the order of arrivals and were every "
                "context kept for ever. A call counts at its program's arrival."
            ],
            figures=[(sharing(description), f"{shown} by what part of their prompt is repeated.")],
        ),
        Section("Kinds", tables=[_counts(description.applications, "application"), _counts(description.tenants, "tenant")]),
    ]
    lead = f"{description.programs:,} programs with {description.calls:,} calls in all, within {_duration(description.span_s)}"
    return write_report(Path(folder) / "workload.html", sections, title=f"Workload {description.workload}", lead=lead)


def arrivals(description: Description) -> Figure:
    """Programs per second over time; they must not all arrive at one time."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    axes = figure.subplots()
    _clean(axes)
    edges, (unit_s, unit), (programs, *_) = _over_time(description)
    axes.stairs(programs, edges, fill=True, color=COLOURS[0], alpha=0.85)
    mean = (description.programs - 1) / description.span_s
    axes.axhline(mean, color="black", linewidth=1.2, linestyle="--", label=f"mean: {mean:.3g} programs/s")
    _legend(axes)
    axes.set_ylim(0, 1.18 * max(programs))
    axes.set_xlim(0, edges[-1])
    axes.set_xlabel(f"time since the first arrival ({unit})")
    axes.set_ylabel("arrivals (programs/s)")
    axes.set_title(f"Arrivals, {_duration(edges[1] * unit_s)} a bin")
    return figure


def lengths(description: Description) -> Figure:
    """How long prompts and outputs are; the scale is logarithmic where they differ by much."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, histogram, what, colour in (
        (panels[0], description.prompt_tokens, "prompt", COLOURS[0]),
        (panels[1], description.output_tokens, "output", COLOURS[1]),
    ):
        _clean(axes)
        edges, shares = _logarithmic(histogram)
        axes.stairs(100 * shares, edges, fill=True, color=colour, alpha=0.85)
        for percent, style in ((50, "--"), (99, ":")):
            value = histogram.percentile(percent)
            axes.axvline(value, color="black", linewidth=1.2, linestyle=style, label=f"p{percent}: {value:,.0f}")
        ratio = histogram.most / max(histogram.least or 0, 1)
        if ratio >= 10:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 200 else (1,)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(_tokens)
        axes.set_ylim(0, 125 * max(shares))
        axes.set_xlabel(f"{what} (tokens)")
        axes.set_ylabel(f"share of {what}s (%)")
        axes.set_title(f"Length of {what}s")
        _legend(axes)
    return figure


def sharing(description: Description) -> Figure:
    """New and repeated prompt tokens over time (unless they come at one time), and calls by their prompts' repeated part."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    if description.span_s == 0:
        _by_repeated_part(figure.subplots(), description)
        return figure
    over_time, by_part = figure.subplots(1, 2, width_ratios=(3, 2))
    _clean(over_time)
    edges, (_, unit), (_, _, new, repeated) = _over_time(description)
    over_time.stairs(new + repeated, edges, fill=True, color=COLOURS[5], label="repeated prefix")
    over_time.stairs(new, edges, fill=True, color=COLOURS[0], label="new")
    over_time.set_xlim(0, edges[-1])
    over_time.set_ylim(0, 1.2 * max(new + repeated))
    over_time.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    over_time.set_xlabel(f"time since the first arrival ({unit})")
    over_time.set_ylabel("prompt tokens/s")
    over_time.set_title("Prompt tokens")
    _legend(over_time)
    _by_repeated_part(by_part, description)
    return figure


def _by_repeated_part(axes: Axes, description: Description) -> None:
    _clean(axes)
    *parts, whole = description.repeated_parts
    counts = np.array([*parts[:-1], parts[-1] + whole], dtype=float)
    axes.stairs(100 * counts / counts.sum(), np.linspace(0, 100, PARTS + 1), fill=True, color=COLOURS[5])
    axes.set_xlim(0, 100)
    axes.set_xlabel("part of the prompt that is repeated (%)")
    axes.set_ylabel("share of calls (%)")
    axes.set_title("Calls by repeated part")


def _over_time(description: Description) -> tuple[np.ndarray, tuple[float, str], np.ndarray]:
    """The edges of the bins over time, the unit that they are in (its seconds, its name), and each series per second,
    [series, bins].

    Few programs are shown in few bins, lest each be a peak of its own. The last bin ends with the last arrival; where it would
    be less than half as long as the others it is one with the bin before it.
    """
    width_s, sums = description.over_time.width_s, np.array(description.over_time.sums())
    while sums.shape[1] > max(FEWEST_BINS, 2 * math.sqrt(description.programs)):
        width_s, sums = 2 * width_s, np.add.reduceat(sums, np.arange(0, sums.shape[1], 2), axis=1)
    edges_s = np.arange(sums.shape[1] + 1) * width_s
    edges_s[-1] = description.span_s
    if len(edges_s) > 2 and edges_s[-1] - edges_s[-2] < width_s / 2:
        edges_s, sums = np.delete(edges_s, -2), np.column_stack([sums[:, :-2], sums[:, -2:].sum(axis=1)])
    unit = next((u for u in reversed(_UNITS) if edges_s[-1] >= 2.5 * u[0]), _UNITS[0])
    return edges_s / unit[0], unit, sums / np.diff(edges_s)


def _logarithmic(histogram: Histogram, bins: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Edges that grow by a constant factor, at least one token apart, and the share of values between them."""
    least, most = max(histogram.least or 0, 1), max(histogram.most, 1)
    exact = np.geomspace(least, most + 1, bins + 1) if most > least else np.array([least, least + 1.0])
    edges = np.unique(np.round(exact)) - 0.5  # whole numbers fall between edges, never on one
    values, counts = zip(*histogram.steps(), strict=True)
    found, _ = np.histogram(np.maximum(values, 1), edges, weights=counts)
    return edges, found / histogram.count


def _tokens(value: float, _: int) -> str:
    """A tick's label: short, because those of a logarithmic scale stand close to each other."""
    return f"{value / 1000:g}k" if value >= 10_000 else f"{value:,.0f}"


def _facts(numbers: dict[str, Any]) -> pd.DataFrame:
    rate, variation = numbers["rate_per_s"], numbers["gap_cv"]
    rows = [
        ("programs", f"{numbers['programs']:,}"),
        ("calls", f"{numbers['calls']:,}"),
        ("span", _duration(numbers["span_s"])),
        ("programs per second", "–" if rate is None else f"{rate:.4g}"),
        ("coefficient of variation of the gaps (Poisson: 1)", "–" if variation is None else f"{variation:.3g}"),
        *((f"{name} (mean, most)", f"{numbers[key]['mean']:.4g}, {numbers[key]['max']:,}") for name, key in _SHAPES),
    ]
    return pd.DataFrame(rows, columns=["what", "value"])


_SHAPES = (("calls of a program", "calls_per_program"), ("depth of its DAG", "dag_depth"), ("width of its DAG", "dag_width"))


def _lengths_table(numbers: dict[str, Any]) -> pd.DataFrame:
    names = {"prompt_tokens": "prompt of a call", "output_tokens": "output of a call", "program_tokens": "whole program"}
    columns = ("mean", "min", "p50", "p90", "p99", "max")
    return pd.DataFrame([{"tokens": name, **{c: f"{numbers[key][c]:,.0f}" for c in columns}} for key, name in names.items()])


def _counts(counts: dict[str, int], what: str) -> pd.DataFrame:
    return pd.DataFrame([(name, f"{count:,}") for name, count in counts.items()], columns=[what, "programs"])


def _duration(seconds: float) -> str:
    scale, unit = next((u for u in reversed(_UNITS) if seconds >= 2.5 * u[0]), _UNITS[0])
    return f"{seconds / scale:.3g} {unit}"


def _clean(axes: Axes) -> None:
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Axes) -> None:
    """In a corner, readable over the lines behind it."""
    axes.legend(fontsize=9, loc="upper right", ncols=2, facecolor="white", edgecolor="none", framealpha=0.9)
