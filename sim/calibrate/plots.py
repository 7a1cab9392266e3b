"""Residuals of a fitted profile, as one picture: predicted / measured − 1 against each input, and the total of each run.

Nothing is fitted or judged here. A residual that leans with an input is a term that the model lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from parrot.latency import LatencyProfile
from sim.calibrate.fitting import Array, predictions
from sim.calibrate.logs import Iteration, Run
from sim.report.style import COLOURS

POINTS = 4000  #: dots of a series at most, evenly taken: more are one blot
BINS = 12

#: What residuals are drawn against, from an iteration and its predicted duration. Not the measured one: noise leans there.
INPUTS: dict[str, Callable[[Iteration, float], float]] = {
    "rows": lambda i, _: i.decode_rows + i.prefill_rows,
    "tokens": lambda i, _: i.decode_rows + i.prefill_tokens,
    "prefill query·key pairs": lambda i, _: i.prefill_pairs,
    "KV tokens read by decoding": lambda i, _: i.decode_kv,
    "predicted duration (ms)": lambda _, predicted_s: 1e3 * predicted_s,
}


def write_residuals(
    path: str | Path, profile: LatencyProfile, fitted: Sequence[Iteration], held: Sequence[Iteration], runs: Sequence[Run]
) -> None:
    """Writes the picture (PNG). `held`: iterations not fitted. `runs`: those whose totals are shown. Raises OSError."""
    figure = Figure(figsize=(13, 7.6), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3)
    for place, (label, value) in zip(axes.flat, INPUTS.items(), strict=False):
        _against(place, label, value, profile, fitted, held)
    _totals(axes.flat[-1], profile, runs)
    figure.suptitle(f"{profile.name}: {profile.model} on {profile.device}, residuals of the fit", fontsize=12)
    figure.savefig(path, format="png", metadata={"Software": None})


def _against(
    axes: Axes,
    label: str,
    value: Callable[[Iteration, float], float],
    profile: LatencyProfile,
    fitted: Sequence[Iteration],
    held: Sequence[Iteration],
) -> None:
    points = []
    for series in (fitted, held):
        predicted, measured = predictions(profile, series) if series else (np.zeros(0), np.zeros(0))
        inputs = [value(i, told_s) for i, told_s in zip(series, predicted, strict=True)]
        points.append((np.array(inputs, dtype=float), predicted, measured))
    draw_residuals(axes, label, points[0], points[1])


Points = tuple[Array, Array, Array]  # input, predicted, measured


def draw_residuals(axes: Axes, label: str, fitted: Points, held: Points) -> None:
    """Predicted / measured − 1 against an input, with medians; what was fitted and what was held out apart."""
    inputs: list[float] = []
    spans = []
    for (x, predicted, measured), colour, name in ((fitted, COLOURS[0], "fitted"), (held, COLOURS[1], "held out")):
        if not len(x):
            continue
        y = 100.0 * (predicted / measured - 1.0)
        step = -(-len(x) // POINTS)
        axes.plot(x[::step], y[::step], ".", markersize=2.5, alpha=0.35, color=colour, rasterized=True)
        axes.plot(*_medians(x, y), "-", linewidth=2.2, color=colour, label=f"{name}, median", zorder=3)
        inputs += [float(x.min()), float(x.max())]
        spans.append(np.percentile(y, [0.5, 99.5]))
    axes.axhline(0.0, color="#444444", linewidth=0.8)
    if inputs and min(inputs) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    elif inputs and max(inputs) > 50:  # 0 has a place of its own on the left
        linear = max(1.0, max(inputs) / 1e4)
        axes.set_xscale("symlog", linthresh=linear)
        axes.set_xlim(-0.3 * linear, 1.6 * max(inputs))
        decades = [10.0**k for k in range(16) if linear <= 10.0**k <= 1.6 * max(inputs)]
        axes.xaxis.set_major_locator(FixedLocator([0.0, *decades]))
    if spans:  # a few outliers must not flatten the rest
        low, high = min(s[0] for s in spans), max(s[1] for s in spans)
        margin = 0.08 * max(high - low, 1.0)
        axes.set_ylim(min(low, 0.0) - margin, max(high, 0.0) + margin)
    axes.set_xlabel(label)
    axes.set_ylabel("predicted / measured − 1 (%)")
    axes.legend(frameon=False, fontsize=8)


def _medians(x: Array, y: Array) -> tuple[Array, Array]:
    """The median of y in bins of x that hold about equally many."""
    edges = np.unique(np.quantile(x, np.linspace(0.0, 1.0, BINS + 1)))
    bins = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(len(edges) - 2, 0))
    used = np.unique(bins)
    return (
        np.array([np.median(x[bins == b]) for b in used]),
        np.array([np.median(y[bins == b]) for b in used]),
    )


def _totals(axes: Axes, profile: LatencyProfile, runs: Sequence[Run]) -> None:
    """Error of each run's total time, by the run's load."""
    held = {key.removeprefix("total of ") for key in profile.error}
    totals = []
    for run in runs:
        if run.iterations:
            predicted, measured = predictions(profile, run.iterations)
            totals.append((run.load, float(predicted.sum() / measured.sum() - 1.0), run.name in held))
    draw_totals(axes, "load: mean rows of an iteration", totals, profile.spread)


def draw_totals(axes: Axes, label: str, totals: Sequence[tuple[float, float, bool]], spread: float) -> None:
    """Errors of runs' totals: load, predicted / measured − 1, whether it was held out."""
    ordered = sorted(totals)
    for wanted, colour, name in ((False, COLOURS[0], "fitted run"), (True, COLOURS[1], "held-out run")):
        chosen = [(load, 100.0 * error) for load, error, held in ordered if held is wanted]
        if chosen:
            axes.plot([load for load, _ in chosen], [error for _, error in chosen], "o", color=colour, label=name)
    axes.axhspan(-100 * spread, 100 * spread, color=COLOURS[5], alpha=0.2, label="± spread")
    axes.axhline(0.0, color="#444444", linewidth=0.8)
    axes.set_xlabel(label)
    axes.set_ylabel("error of a run's total time (%)")
    axes.legend(frameon=False, fontsize=8)
