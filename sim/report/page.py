"""report.html: the sections of a sweep's report, in their order. What was not varied gets no plot against it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePath

from sim.report import html
from sim.report.numbers import all_numbers, at_a_glance
from sim.report.overview import lead, overview
from sim.report.sections import fairness_of_tenants, front, goodput, latency, latency_distributions, over_time
from sim.report.study import objectives_of, open_study, read_details
from sim.results import REPORT


def write_report(folder: str | Path, objectives: Mapping[str, float] | None = None) -> Path:
    """Writes FOLDER/report.html of what `sim.run --out FOLDER` wrote, and returns its path.

    objectives: ttft_s, tpot_s, jct_s -> seconds; null: the specification's. Equal results give equal bytes. Raises ResultsError
    for a folder that is none of results, ConfigurationError for objectives that are none, OSError when it cannot be written.
    """
    study = open_study(folder)
    names = ", ".join(PurePath(workload).name for workload in study.specification.workloads)
    limits = objectives_of(study, objectives)
    details = read_details(study, limits)
    sections = [
        overview(study, details),
        at_a_glance(study),
        latency(study),
        front(study),
        latency_distributions(study, details),
        over_time(study, details),
        goodput(study, details, limits),
        fairness_of_tenants(study, details),
        all_numbers(study),
    ]
    return html.write_report(
        Path(folder) / REPORT,
        [section for section in sections if section is not None],
        title=study.specification.about or f"Parrot testbed: {names}",
        lead=lead(study),
        contents=True,
    )
