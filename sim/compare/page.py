"""The comparison as one self-contained HTML page. Lays out what the document says; computes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from sim.compare import plots
from sim.compare.comparing import Compared
from sim.compare.document import CellComparison, Comparison, ErrorRow, Interval, Ranking, Side
from sim.compare.matching import name_of
from sim.compare.measured import LATENCIES, STATISTICS, THROUGHPUTS, TOTAL, Measured
from sim.report.html import Section, write_report

MOST_CONDITIONS = 8  #: so many conditions are drawn; all are in the tables

NAMES = {
    "ttft_s": "TTFT",
    "tpot_s": "time per token",
    "jct_s": "JCT",
    "normalized_latency_s": "normalised latency",
    "throughput_tokens_per_s": "tokens/s",
    "throughput_programs_per_s": "programs/s",
}
#: what the page draws the choices' order by
DRAWN_ORDERS = (("jct_s", "mean"), ("jct_s", "p99"), ("ttft_s", "mean"), ("throughput_tokens_per_s", TOTAL))


def write_page(path: Path, compared: Compared) -> Path:
    """Writes the page and returns its path."""
    document = compared.document
    conditions = list(dict.fromkeys(cell.condition for cell in document.cells))
    sections: list[Section | None] = [_in_short(document, conditions)]
    for condition in conditions[:MOST_CONDITIONS]:
        cells = [cell for cell in document.cells if cell.condition == condition]
        measured = [one for one in compared.measured if one.cell.condition == condition]
        rankings = [ranking for ranking in document.rankings if ranking.condition == condition]
        sections += _of_condition(condition, cells, measured, rankings)
    sections += [_orders_table(document), _programs_table(document), _everything(document), _not_compared(document)]
    lead = (
        f"{_side(document.real)} beside {_side(document.simulated)}. "
        f"Intervals are at {document.confidence:.0%}, of {document.draws} bootstrap draws."
    )
    return write_report(path, [s for s in sections if s is not None], title="Real against simulated", lead=lead)


# ------------------------------------------------------------------------------------------------------------ sections


def _side(side: Side) -> str:
    return f"{side.runs} run{'s' if side.runs != 1 else ''} of {side.folder} ({side.backend})"


def _in_short(document: Comparison, conditions: Sequence[str]) -> Section:
    drawn_again = {
        "seeds": "seeds, so that they speak of other programs of the workload, too",
        "repeats": "repeats of the same programs, so that they speak of these programs alone",
        "programs": "programs within single runs, as if they did not disturb each other: how far real runs differ is not known",
        "runs": "runs, each side by itself",
        None: "nothing: there is one real run, and no tables",
    }
    ways = list(dict.fromkeys(cell.resampled for cell in document.cells))
    text = [
        "Error: simulated / real − 1. The floor is the mean size of the error that one real run makes as the prediction of "
        "another of the same programs; against single runs, a simulation that knew the mean exactly would come to 0.71 of it.",
        "Intervals draw again: " + "; ".join(drawn_again[way] for way in ways) + ".",
    ]
    if len(conditions) > MOST_CONDITIONS:
        text.append(f"{MOST_CONDITIONS} of {len(conditions)} conditions are drawn; the tables have all.")
    rows = [
        {
            "metric": named(row.metric, row.statistic),
            "cells": row.cells,
            "mean size of error": percent(row.mean_error),
            "worst": percent(row.worst_error),
            "in": row.worst_in or "–",
            "floor": percent(row.mean_floor),
            "interval contains 0": f"{row.interval_contains_0} of {row.with_interval}" if row.with_interval else "–",
        }
        for row in document.overall
    ]
    return Section("In short", warnings=document.warnings, text=text, tables=[pd.DataFrame(rows)])


def _of_condition(
    condition: str, cells: Sequence[CellComparison], measured: Sequence[Measured], rankings: Sequence[Ranking]
) -> list[Section]:
    name = condition or "all programs"
    figures: list[tuple[Figure, str]] = [
        (
            plots.error_by_metric(_error_panels(cells), [cell.choice for cell in cells]),
            "Error of the simulation, with its interval, which is cut where it is far longer than errors are large; right of 0 "
            "the simulation is slower, or its throughput higher.",
        )
    ]
    drawn = [_drawn_order(by[order]) for by in [_by_statistic(rankings)] for order in DRAWN_ORDERS if order in by]
    if drawn:
        figures.append(
            (
                plots.orders(drawn, f"The order of the choices, {name}"),
                "Best above, in the real order; at the right the ranks, real → simulated. Floor: one real run in the "
                "simulation's place.",
            )
        )
    for metric, label in (("jct_s", "job completion time (s)"), ("ttft_s", "time to first token (s)")):
        panels = [
            (one.cell.choice, one.distributions["real"][metric], one.distributions["simulated"][metric]) for one in measured
        ]
        if any(len(values) for _, real, simulated in panels for values in (*real, *simulated)):
            figures.append(
                (
                    plots.distributions(panels, f"{NAMES[metric]}, real and simulated, {name}", label),
                    "Share of programs that were done within a time."
                    if metric == "jct_s"
                    else "Share of calls whose first token came within a time of their being ready.",
                )
            )
    scattered = [(one.cell.choice, one.programs) for one in measured if one.programs is not None and len(one.programs)]
    if scattered:
        figures.append(
            (
                plots.programs_scatter(scattered, f"JCT program by program, {name}"),
                f"A dot a program that finished on both sides (of more than {plots.MOST_POINTS:,}, every k-th).",
            )
        )
    return [Section(f"Condition: {name}", figures=figures)]


def _error_panels(
    cells: Sequence[CellComparison],
) -> list[tuple[str, list[tuple[str, list[plots.ErrorBar]]]]]:
    rows: list[Mapping[tuple[str, str], ErrorRow]] = [
        {(row.metric, row.statistic): row for row in cell.errors} for cell in cells
    ]

    def bars(metric: str, statistic: str) -> list[plots.ErrorBar]:
        found = [row[metric, statistic] for row in rows]
        return [plots.ErrorBar(row.error, row.error_interval, row.floor, row.few) for row in found]

    panels = [(NAMES[metric], [(name, bars(metric, name)) for name in STATISTICS]) for metric in LATENCIES]
    return [*panels, ("throughput", [(NAMES[metric], bars(metric, TOTAL)) for metric in THROUGHPUTS])]


def _by_statistic(rankings: Sequence[Ranking]) -> dict[tuple[str, str], Ranking]:
    return {(ranking.metric, ranking.statistic): ranking for ranking in rankings}


def _drawn_order(ranking: Ranking) -> tuple[str, str, list[plots.RankedChoice]]:
    heading = f"{named(ranking.metric, ranking.statistic)}: τ {plain(ranking.tau)}{_plain_interval(ranking.tau_interval)}"
    if ranking.floor_tau is not None:
        heading += f", floor {plain(ranking.floor_tau)}"
    heading += f"\nregret {percent(ranking.regret)}{interval_text(ranking.regret_interval)}"
    if ranking.floor_regret is not None:
        heading += f", floor {percent(ranking.floor_regret)}"
    unit = "per second" if ranking.statistic == TOTAL else "seconds"
    rows = [
        plots.RankedChoice(row.choice, row.real, row.real_interval, row.simulated, row.real_rank, row.simulated_rank)
        for row in ranking.choices
    ]
    return heading, unit, rows


def _orders_table(document: Comparison) -> Section | None:
    if not document.rankings:
        return None
    rows = [
        {
            "condition": ranking.condition or "–",
            "by": named(ranking.metric, ranking.statistic),
            "τ": plain(ranking.tau) + _plain_interval(ranking.tau_interval),
            "τ floor": plain(ranking.floor_tau),
            "τ without ties": plain(ranking.clear_tau),
            "clear pairs": f"{ranking.clear_pairs} of {len(ranking.pairs)}" if ranking.clear_pairs is not None else "–",
            "simulation picks": " or ".join(ranking.picked),
            "best": " or ".join(ranking.best),
            "regret": percent(ranking.regret) + interval_text(ranking.regret_interval),
            "regret floor": percent(ranking.floor_regret),
            "at random": percent(ranking.regret_at_random),
        }
        for ranking in document.rankings
    ]
    text = [
        "Kendall's τ-b of the real and the simulated order: 1 the same, 0 unrelated, −1 reversed. Regret: how much worse than "
        "the best the choice is, in reality, that simulation puts first; at random: the mean over all choices. A pair is clear "
        "when its difference exceeds the spread of real runs. Floors: one real run is the simulation, the others are reality.",
    ]
    return Section("Orders", text=text, tables=[pd.DataFrame(rows)])


def _programs_table(document: Comparison) -> Section | None:
    rows = [
        {
            "cell": name_of(cell),
            "application": row.application or "all",
            "programs": row.programs,
            "bias": percent(row.bias),
            "mean size": percent(row.mean),
            "p50": percent(row.p50),
            "p90": percent(row.p90),
            "p99": percent(row.p99),
            "within 10 %": percent(row.within_10_percent),
            "floor, mean": percent(row.floor_mean),
            "floor, p90": percent(row.floor_p90),
        }
        for cell in document.cells
        for row in cell.program_errors
    ]
    if not rows:
        return None
    left_out = sum(cell.left_out for cell in document.cells)
    text = ["The error of each program's JCT, simulated / real − 1, against each real run of it; p50, p90 and p99 of its size."]
    if left_out:
        text.append(f"{left_out} programs did not finish in every run and are left out here.")
    return Section("Program by program", text=text, tables=[pd.DataFrame(rows)])


def _everything(document: Comparison) -> Section:
    rows = [
        {
            "cell": name_of(cell),
            "metric": named(row.metric, row.statistic),
            "real": value(row.real),
            "simulated": value(row.simulated),
            "error": percent(row.error) + (" *" if row.few else ""),
            "interval": interval_text(row.error_interval).strip() or "–",
            "off one run": percent(row.off_one_run),
            "floor": percent(row.floor),
            "spread": percent(row.real_spread),
            **({"predicted": _predicted(row)} if any(r.predicted for c in document.cells for r in c.errors) else {}),
        }
        for cell in document.cells
        for row in cell.errors
    ]
    cells = [
        {
            "cell": name_of(cell),
            "programs": cell.programs,
            "real runs": cell.real_runs,
            "simulated runs": cell.simulated_runs,
            "seeds": ", ".join(map(str, cell.seeds)),
            "failed, real": cell.failed_real,
            "failed, simulated": cell.failed_simulated,
            "intervals over": cell.resampled or "–",
        }
        for cell in document.cells
    ]
    text = [
        "Seconds, or per second. Off one run: mean size of the simulation's error against single real runs, to be held against "
        "the floor. Spread: coefficient of variation of real runs, over repeats if there are any, else over seeds. "
        "*: a p99 of fewer than 100 programs, or a p90 of fewer than 10.",
    ]
    return Section("Everything", text=text, tables=[pd.DataFrame(cells), pd.DataFrame(rows)])


def _not_compared(document: Comparison) -> Section | None:
    rows = [
        {"only": row.side, "cell": row.cell, "runs": len(row.runs), "first run": row.runs[0]} for row in document.unmatched
    ] + [
        {"only": side, "cell": name_of(cell), "runs": len(seeds), "first run": f"seed {seeds[0]}"}
        for cell in document.cells
        for side, seeds in cell.left_over_seeds.items()
    ]
    return Section("Not compared", text=["What only one side ran."], tables=[pd.DataFrame(rows)]) if rows else None


# ---------------------------------------------------------------------------------------------------------------- words


def named(metric: str, statistic: str) -> str:
    """A statistic of a metric in words."""
    return NAMES[metric] + (f" {statistic}" if statistic != TOTAL else "")


def percent(ratio: float | None) -> str:
    """A ratio in percent; errors have their sign with them in the number."""
    return "–" if ratio is None else f"{100 * ratio:.1f} %"


def plain(number: float | None) -> str:
    """Two decimals."""
    return "–" if number is None else f"{number:.2f}"


def value(number: float | None) -> str:
    """Three significant digits or all before the point."""
    return "–" if number is None else f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def interval_text(interval: Interval) -> str:
    """` [low, high]` in percent, or nothing."""
    return f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval is not None else ""


def _plain_interval(interval: Interval) -> str:
    return f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval is not None else ""


def _predicted(row: ErrorRow) -> str:
    if row.predicted is None:
        return "–"
    return f"[{value(row.predicted[0])}, {value(row.predicted[1])}]{'' if row.real_is_predicted else ': not the real one'}"
