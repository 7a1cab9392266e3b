"""What came out: every row with its prediction, the errors by figure and system, and a picture. Computes errors, nothing else.

The error of a row is predicted / measured − 1. A row that is not simulated, or has a measured value of 0, has none, and is
counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.fidelity.measured import Experiment, Row
from experiments.fidelity.scenarios import Outcome, modelled
from sim.report.style import COLOURS

MARKERS = "osD^vP*X"
UNITS = {"_s": "s", "_ms": "ms", "_token": "ms/token"}


def table_of(rows: Sequence[Row], outcomes: Mapping[Experiment, Outcome]) -> pd.DataFrame:
    """One row a measurement: what it was of, the profile that predicted it, whether that was fitted to it, both values."""
    records = []
    for row in rows:
        outcome = outcomes.get(row.experiment)
        predicted = outcome.metrics[row.metric] if outcome is not None else float("nan")
        error = predicted / row.value - 1.0 if row.value else float("nan")
        part = "fitted" if row.experiment.fitted else "held out"
        part = "not modelled" if modelled(row.experiment) else part
        e = row.experiment
        profile = "" if outcome is None else e.profile
        values = (row.value, predicted, error)
        records.append((row.line, e.figure, e.system, e.params, row.metric, row.source, profile, part, *values))
    columns = ["line", "figure", "system", "params", "metric", "source", "profile", "part", "measured", "predicted", "error"]
    return pd.DataFrame.from_records(records, columns=columns)


def by_figure(table: pd.DataFrame) -> pd.DataFrame:
    """Errors of rows by figure, system, metric and part: how many, mean and median of |error|, the worst with its sign."""
    lines = []
    for keys, group in table.groupby(["figure", "system", "metric", "part"], sort=False):
        errors = group["error"].dropna()
        magnitude = errors.abs()
        worst = float(errors.loc[magnitude.idxmax()]) if len(errors) else float("nan")
        mean, median = (float(magnitude.mean()), float(magnitude.median())) if len(errors) else (float("nan"), float("nan"))
        lines.append((*keys, len(group), len(errors), mean, median, worst))
    columns = ["figure", "system", "metric", "part", "rows", "with error", "mean", "median", "worst"]
    frame = pd.DataFrame.from_records(lines, columns=columns)
    return frame.sort_values("figure", key=lambda column: column.astype(int), kind="stable", ignore_index=True)


def as_text(summary: pd.DataFrame) -> str:
    """The table by figure for a terminal and for Markdown."""
    lines = ["| figure | system | metric | part | rows | mean | median | worst |", "|---|---|---|---|---:|---:|---:|---:|"]
    for _, line in summary.iterrows():
        errors = (
            [f"{line['mean']:.1%}", f"{line['median']:.1%}", f"{line['worst']:+.1%}"] if line["with error"] else ["–", "–", "–"]
        )
        cells = [line["figure"], line["system"], line["metric"], line["part"], str(line["rows"]), *errors]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(table: pd.DataFrame) -> Figure:
    """Predicted against measured, a panel a figure; filled marks were fitted to, hollow ones were not."""
    shown = table.dropna(subset=["error"])
    figures = sorted(shown["figure"].unique(), key=int)
    columns = min(3, len(figures))
    lines = -(-len(figures) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.6 * lines + 0.6), dpi=100, layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, columns)).flat
    for panel, name in zip(panels, figures, strict=False):
        rows = shown[shown["figure"] == name]
        low, high = rows[["measured", "predicted"]].min().min() * 0.8, rows[["measured", "predicted"]].max().max() * 1.25
        panel.plot([low, high], [low, high], color="#444444", linewidth=0.8)
        panel.fill_between([low, high], [0.9 * low, 0.9 * high], [1.1 * low, 1.1 * high], color=COLOURS[5], alpha=0.2)
        for index, system in enumerate(rows["system"].unique()):
            for part in ("fitted", "held out"):
                chosen = rows[(rows["system"] == system) & (rows["part"] == part)]
                colour = COLOURS[index % len(COLOURS)]
                if len(chosen):
                    panel.plot(
                        chosen["measured"],
                        chosen["predicted"],
                        MARKERS[index % len(MARKERS)],
                        color=colour,
                        markerfacecolor=colour if part == "fitted" else "none",
                        markersize=5,
                        linestyle="none",
                        label=f"{system}, {part}",
                    )
        units = sorted({UNITS[next(s for s in ("_token", "_ms", "_s") if m.endswith(s))] for m in rows["metric"].unique()})
        panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), title=f"Figure {name}")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(NullLocator())
        panel.set_xlabel(f"measured ({', '.join(units)})")
        panel.set_ylabel(f"predicted ({', '.join(units)})")
        panel.legend(frameon=False, fontsize=8, loc="upper left")
    for panel in panels:
        panel.set_visible(False)
    figure.suptitle("Measured by the paper and predicted by simulation (band: ± 10 %)", fontsize=12)
    return figure


def write(table: pd.DataFrame, summary: pd.DataFrame, out: Path) -> None:
    """Writes rows.csv, by_figure.csv and predicted.png. Raises OSError."""
    table.to_csv(out / "rows.csv", index=False, float_format="%.6g", lineterminator="\n")
    summary.to_csv(out / "by_figure.csv", index=False, float_format="%.6g", lineterminator="\n")
    draw(table).savefig(out / "predicted.png", format="png", metadata={"Software": None})
