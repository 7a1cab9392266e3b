"""The tables of a report: numbers with their intervals and units."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from sim.report.html import Section, format_interval, format_number
from sim.report.plots import Metric
from sim.report.study import Study

LATENCIES = (
    Metric("jct_s.mean", "JCT, mean (s)"),
    Metric("jct_s.p99", "JCT, p99 (s)"),
    Metric("ttft_s.mean", "TTFT, mean (s)"),
    Metric("ttft_s.p99", "TTFT, p99 (s)"),
)
TOKENS_PER_S = Metric("throughput_tokens_per_s", "generated tokens/s")
PROGRAMS_PER_S = Metric("throughput_programs_per_s", "programs/s")
TIMES = {"jct_s": "job completion time (s)", "ttft_s": "time to first token (s)", "tpot_s": "time per token (s)"}


def plus_minus(row: pd.Series, column: str, sign: bool = False) -> str:
    """The number in `column` of a table of `Study`, with its interval. sign: a plus in front of what is above 0."""
    text = format_interval(row[column], row[f"{column}.low"], row[f"{column}.high"])
    return f"+{text}" if sign and row[column] > 0 else text


def column_of(table: pd.DataFrame, column: str) -> list[str]:
    """`plus_minus` of every row."""
    return [plus_minus(row, column) for _, row in table.iterrows()]


def _prediction(table: pd.DataFrame, column: str) -> list[str]:
    pairs = zip(table[f"{column}.least"], table[f"{column}.most"], strict=True)
    return ["–" if pd.isna(low) else f"{format_number(low)} to {format_number(high)}" for low, high in pairs]


def place_text(study: Study, place: float) -> str:
    """A place on the axis, with its unit."""
    if study.axis is None:
        return ""
    unit = {"rate": "programs/s", "clients": "programs under way", "engines": "engines"}[study.axis.column]
    return f"{place:g} {unit}" if (unit, place) != ("engines", 1) else "1 engine"


def counted(number: int, thing: str) -> str:
    """As "1 cell", "2 cells"."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


GLANCE = (*LATENCIES[:3], Metric("tpot_s.mean", "time per token, mean (s)"), TOKENS_PER_S)


def at_a_glance(study: Study) -> Section:
    """Every series at the middle place."""
    points = study.points
    if len(points) == 1:
        return _single(points.iloc[0])
    here = points[points["place"] == study.middle].set_index("series")
    here = here.reindex([name for name in study.series if name in here.index])
    rows = pd.DataFrame({"series": here.index})
    first = study.series[0]
    for metric in GLANCE:
        rows[metric.label] = column_of(here, metric.column)
        if metric is LATENCIES[0]:
            if study.results.draws:
                rows["JCT mean, prediction interval (s)"] = _prediction(here, metric.column)
            if len(study.series) > 1:
                rows[f"JCT beside {first}'s (%)"] = _beside_first(study, here.index)
    if study.axis is not None:
        most = points.loc[points.groupby("series")[TOKENS_PER_S.column].idxmax()].set_index("series").reindex(here.index)
        anywhere = {"rate": "rate", "clients": "number of clients", "engines": "number of engines"}[study.axis.column]
        rows[f"most tokens/s at any {anywhere}"] = column_of(most, TOKENS_PER_S.column)
    text = ""
    if study.axis is not None:
        which = ", the first rate at or above the usual knee of JCT" if study.usual_knee is not None else ""
        text = f"At {place_text(study, study.middle)}{which}. "
    if len(study.series) > 1:
        text += (
            f"The difference to {first} is taken seed by seed, under which both ran the same programs, so that it can be surer "
            "than the times themselves."
        )
    return Section("At a glance", text=[text] if text else [], tables=[rows])


def _beside_first(study: Study, series: Iterable[str]) -> list[str]:
    found = study.beside_first(LATENCIES[0].column)
    found = found[found["place"] == study.middle].set_index("series")
    known = set(found.index) - {study.series[0]}
    return [plus_minus(found.loc[name], LATENCIES[0].column, sign=True) if name in known else "–" for name in series]


def _single(row: pd.Series) -> Section:
    """The one cell there is."""
    names = {**TIMES, "max_gap_s": "largest gap between tokens (s)", "normalized_latency_s": "latency of a call / token (s)"}
    parts = ("mean", "p50", "p90", "p99")
    times = pd.DataFrame([{"": name} | {p: plus_minus(row, f"{field}.{p}") for p in parts} for field, name in names.items()])
    speeds = pd.DataFrame([{"": m.label, "value": plus_minus(row, m.column)} for m in (TOKENS_PER_S, PROGRAMS_PER_S)])
    return Section("At a glance", tables=[times, speeds])


def all_numbers(study: Study) -> Section:
    """Every cell."""
    points = study.points
    table = pd.DataFrame({"series": points["series"]})
    if study.axis is not None:
        table[study.axis.label] = [f"{place:g}" for place in points["place"]]
    table["runs"] = points["runs"].astype(int)
    table["programs failed, mean"] = points["failed"]
    for field, name in (("jct_s", "JCT"), ("ttft_s", "TTFT"), ("tpot_s", "time per token")):
        for part in ("mean", "p50", "p90", "p99"):
            table[f"{name}, {part} (s)"] = column_of(points, f"{field}.{part}")
            if part == "mean" and study.results.draws:
                table[f"{name} mean, prediction interval (s)"] = _prediction(points, f"{field}.{part}")
    for metric in (TOKENS_PER_S, PROGRAMS_PER_S):
        table[metric.label] = column_of(points, metric.column)
    table["prompt tokens cached"] = [f"{share:.1%}" for share in points["cached_tokens"] / points["prompt_tokens"]]
    names = "\n".join(result.run.name for result in study.runs)
    return Section(
        "All numbers",
        text=["Means over the runs of a cell, which differ in their seed alone. The same, for programs to read: cells.jsonl."],
        folded=[(counted(len(table), "cell"), table), ("names of the finished runs, which are their folders'", names)],
    )
