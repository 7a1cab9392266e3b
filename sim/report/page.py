"""report.html: the sections of a sweep's report, in their order. What was not varied gets no plot against it.

A sweep of several policies over several workloads has a page a workload beside it, whose lines would not be read in one plot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sim.objectives import Objectives
from sim.report import html
from sim.report.html import Section
from sim.report.numbers import all_numbers, at_a_glance
from sim.report.overview import lead, lead_of_several, overview
from sim.report.sections import fairness_of_tenants, front, goodput, latency, latency_distributions, over_time
from sim.report.standings import conditions_of
from sim.report.study import Details, Study, objectives_of, of_workload, open_study, read_details, short_names
from sim.report.winners import standings_table, who_wins
from sim.results import REPORT, REPORT_OF, STANDINGS


def write_report(folder: str | Path, objectives: Mapping[str, float] | None = None) -> Path:
    """Writes FOLDER/report.html of what `sim.run --out FOLDER` wrote, and returns its path.

    objectives: ttft_s, tpot_s, jct_s -> seconds; null: the specification's. Equal results give equal bytes. Raises ResultsError
    for a folder that is none of results, ConfigurationError for objectives that are none, OSError when it cannot be written.
    """
    study = open_study(folder)
    limits = objectives_of(study, objectives)
    names = short_names(dict.fromkeys(result.run.workload for result in study.runs))
    title = study.specification.about or f"Parrot testbed: {', '.join(names.values())}"
    winners = who_wins(study)
    if winners is not None:
        standings_table(study).to_csv(Path(folder) / STANDINGS, index=False, float_format="%.6g", lineterminator="\n")
    if len(names) < 2 or len({result.run.policy for result in study.runs}) < 2:
        sections = _sections(study, limits, winners)
        return html.write_report(Path(folder) / REPORT, sections, title=title, lead=lead(study), contents=True)
    links = []
    for workload, name in names.items():
        part = Study(of_workload(study.results, workload))
        page = REPORT_OF.format(re.sub(r"[^\w.-]", "_", name))
        sections = _sections(part, limits, who_wins(part))
        html.write_report(Path(folder) / page, sections, title=f"{title}: {name}", lead=lead(part), contents=True)
        links.append((name, page))
    whole = [
        overview(study, Details({}, {}, [], {}, [])),
        winners,
        Section("By workload", text=["Latency, distributions, load and all else of each workload by itself:"], links=links),
        all_numbers(study),
    ]
    sections = [section for section in whole if section is not None]
    told = lead_of_several(study, len(conditions_of(study)))
    return html.write_report(Path(folder) / REPORT, sections, title=title, lead=told, contents=True)


def _sections(study: Study, limits: Objectives, winners: Section | None) -> list[Section]:
    """All that there is to show of one workload, or of one policy."""
    details = read_details(study, limits)
    sections = [
        overview(study, details),
        at_a_glance(study),
        winners,
        latency(study),
        front(study),
        latency_distributions(study, details),
        over_time(study, details),
        goodput(study, details, limits),
        fairness_of_tenants(study, details),
        all_numbers(study),
    ]
    return [section for section in sections if section is not None]
