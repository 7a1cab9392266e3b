"""The table of ratios for a terminal and for Markdown, the CSV files, and the picture. Computes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sim.report.style import COLOURS, GREY, MARKERS, clean

METRICS = {
    "jct_s": "completion time",
    "request_latency_mean_s": "latency of a request",
    "normalized_latency_ms_per_token": "latency a token",
    "chat_normalized_latency_ms": "chats: latency a token",
    "chat_decode_ms_per_token": "chats: decoding a token",
    "map_reduce_jct_mean_s": "map-reduce: completion time",
}


def as_text(summary: pd.DataFrame) -> str:
    """The table by pair: a mean, and from least to most where there are several rows."""
    lines = [
        "| figure | workload | against | by | rows | paper's ratio | ours | same winner | with an interval that excludes 1 |",
        "|---|---|---|---|---:|---|---|---:|---:|",
    ]
    for _, line in summary.iterrows():
        bound = "≥ " if line["bound"] else ""
        cells = [
            line["figure"], line["workload"], line["other"], METRICS[line["metric"]], str(line["rows"]), _span(line, "paper"),
            bound + _span(line, "ours"), f"{line['same']} of {line['rows']}", f"{line['sure']} of {line['rows']}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _span(line: pd.Series, who: str) -> str:
    mean = f"{line[f'{who} mean']:.2f}"
    if line["rows"] == 1:
        return mean
    return f"{mean} ({line[f'{who} least']:.2f} to {line[f'{who} most']:.2f})"


def draw(table: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Left a pair a line, the paper's mean and ours with their ranges; right every row, ours over the paper's."""
    figure = Figure(figsize=(13.0, 1.4 + 0.42 * len(summary)), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1.0))
    places = np.arange(len(summary))
    for offset, who, colour in ((-0.16, "paper", GREY), (0.16, "ours", COLOURS[0])):
        mean = summary[f"{who} mean"].to_numpy(dtype=float)
        ends = np.stack([mean - summary[f"{who} least"], summary[f"{who} most"] - mean])
        left.errorbar(
            mean, places + offset, xerr=np.maximum(ends, 0.0), fmt="o", color=colour, markersize=6, linewidth=1.6, label=who
        )
    shown = summary[["figure", "workload", "other", "metric"]].itertuples(index=False)
    names = [f"{f}: {w}, {METRICS[m]}\nagainst {o}" for f, w, o, m in shown]
    left.set_yticks(places, names, fontsize=8)
    left.invert_yaxis()
    left.set_xlabel("times better than the other system (bars: least to most of the rows)")
    left.legend(frameon=False, loc="lower right")
    groups = list(dict.fromkeys(table["workload"]))
    low, high = table[["paper", "ours"]].min().min() * 0.8, table[["paper", "ours"]].max().max() * 1.25
    right.plot([low, high], [low, high], color="#444444", linewidth=0.8)
    right.fill_between([low, 1.0], [1.0, 1.0], [high, high], color=COLOURS[1], alpha=0.08, linewidth=0)
    right.fill_between([1.0, high], [low, low], [1.0, 1.0], color=COLOURS[1], alpha=0.08, linewidth=0)
    for index, name in enumerate(groups):
        rows = table[table["workload"] == name]
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "linestyle": "none"}
        right.plot(rows["paper"], rows["ours"], markersize=5, alpha=0.75, label=name, **style)
    right.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    right.set_xlabel("the paper's ratio (shaded: another winner)")
    right.set_ylabel("ours")
    right.legend(frameon=False, fontsize=8, loc="upper left")
    left.set_xscale("log")
    for axes in (left, right):
        clean(axes)
    for axis in (left.xaxis, right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    left.axvline(1.0, color="#444444", linewidth=0.8)
    figure.suptitle("How many times better Parrot is: measured by the paper, and simulated here", fontsize=12)
    return figure


def write(table: pd.DataFrame, summary: pd.DataFrame, out: Path) -> None:
    """Writes ratios.csv, by_pair.csv and ratios.png. Raises OSError."""
    table.to_csv(out / "ratios.csv", index=False, float_format="%.6g", lineterminator="\n")
    summary.to_csv(out / "by_pair.csv", index=False, float_format="%.6g", lineterminator="\n")
    draw(table, summary).savefig(out / "ratios.png", format="png", metadata={"Software": None})
