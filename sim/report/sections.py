"""The sections of a report that have pictures. Each gives None when the sweep has nothing for it to show."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
from matplotlib.figure import Figure

from sim.objectives import Objectives
from sim.report.html import Section
from sim.report.numbers import LATENCIES, TIMES, TOKENS_PER_S, column_of, counted, place_text
from sim.report.plots import Metric, Panel, against, bars, distributions, throughput_and_latency
from sim.report.study import Details, Study, shown_places
from sim.report.timelines import loads, one_run, queue_lengths
from sim.results import RunResult
from sim.tables import pareto_front

_WHISKERS = " Whiskers: confidence intervals, cut where they are far longer than the lines are high; points stand side by side."
THINGS = {"jct_s": "programs", "ttft_s": "calls", "tpot_s": "outputs"}
LOADS = (
    Metric("running", "tasks running"),
    Metric("waiting", "tasks in the\nengine's queue"),
    Metric("kv_tokens", "KV tokens\n(estimate)"),
)


def latency(study: Study) -> Section | None:
    """Latency against the axis, the knees, and the same beside the first series."""
    if study.axis is None:
        return None
    knees = {metric.column: study.knees(metric.column) for metric in LATENCIES} if study.is_rate else {}
    seen = [table for table in knees.values() if len(table)]
    marks = pd.concat(seen, ignore_index=True) if seen else None
    axis = Metric("place", study.axis.label)
    what = {"rate": "arrival rate", "clients": "load", "engines": "the number of engines"}[study.axis.column]
    figure = against(study.points, axis, LATENCIES, f"Latency against {what}", marks)
    figures = [(figure, "Lower is better." + (_WHISKERS if study.over else "") + (" Rings: knees." if seen else ""))]
    if len(study.series) > 1:
        figures.append(_differences(study, axis))
    if not knees:
        return Section(f"Latency against {what}", figures=figures)
    about = "The knee, ringed, is the rate at which a latency first reaches twice its value at the lowest rate measured, "
    if not seen:
        none = "linear between rates. None is seen here: no latency does so, for any series under every seed."
        return Section(f"Latency against {what}", text=[about.replace(", ringed,", "") + none], figures=figures)
    table = pd.DataFrame({"series": study.series})
    for metric in LATENCIES:
        found = knees[metric.column].set_index("series").reindex(study.series)
        table[f"knee of {metric.label.removesuffix(' (s)')} (programs/s)"] = column_of(found, "x")
    return Section(
        f"Latency against {what}",
        text=[
            f"{about}linear between rates; – where it does not under every seed. "
            "The lowest rate should be one without contention."
        ],
        figures=figures,
        tables=[table],
    )


def _differences(study: Study, axis: Metric) -> tuple[Figure, str]:
    """Latencies beside those of the first series."""
    shown = (LATENCIES[0], LATENCIES[2])
    tables = [study.beside_first(metric.column).set_index(["series", "place"]) for metric in shown]
    table = tables[0].join(tables[1]).reset_index()
    metrics = [Metric(metric.column, metric.label.replace("(s)", "difference (%)"), signed=True) for metric in shown]
    figure = against(table, axis, metrics, f"Latency beside that of {study.series[0]}")
    return figure, "Below 0 is better. Compared seed by seed, under which all series ran the same programs."


def front(study: Study) -> Section | None:
    """Throughput and latency of every cell, and which no other beats."""
    points = study.points
    if len(points) < 2:
        return None
    latencies = (LATENCIES[0], LATENCIES[2])
    marked = points.copy()
    for latency in latencies:
        marked[f"front.{latency.column}"] = pareto_front(points[TOKENS_PER_S.column], points[latency.column])
    figure = throughput_and_latency(marked, TOKENS_PER_S, latencies)
    folded: list[tuple[str, str | pd.DataFrame]] = []
    for latency in latencies:
        front = marked[marked[f"front.{latency.column}"]].sort_values(TOKENS_PER_S.column)
        table = pd.DataFrame({"series": front["series"]})
        if study.axis is not None:
            table[study.axis.label] = [f"{place:g}" for place in front["place"]]
        for metric in (TOKENS_PER_S, latency):
            table[metric.label] = column_of(front, metric.column)
        folded.append((f"the front of {latency.label.removesuffix(' (s)')}: {counted(len(front), 'point')}", table))
    text = "A point is on the Pareto front when no other has as much throughput with less latency, or more with as little."
    caption = "A point a cell; lines join the cells of a series in the order of what was swept."
    return Section("Throughput and latency", text=[text], figures=[(figure, caption)], folded=folded)


def latency_distributions(study: Study, details: Details) -> Section | None:
    """Cumulative shares at up to three places."""
    if not details.samples:
        return None
    places = [place for place in shown_places(study) if place in details.samples]
    panels = [
        Panel(
            place_text(study, place),
            TIMES[measure],
            THINGS[measure],
            {name: samples[measure] for name, samples in details.samples[place].items()},
        )
        for measure in TIMES
        for place in places
    ]
    columns = len(places) if len(places) > 1 else len(TIMES)
    figure = distributions(panels, columns)
    caption = "Cumulative share done within a time; further left is better. All seeds together. What failed is never done."
    return Section("Distributions", figures=[(figure, caption)])


def over_time(study: Study, details: Details) -> Section | None:
    """The queue, and the load of each engine."""
    if not details.timelines:
        return None
    timelines = {name: details.timelines[name] for name in study.series if name in details.timelines}
    at = f" at {place_text(study, study.middle)}" if study.axis is not None else ""
    if len(timelines) == 1:
        ((name, timeline),) = timelines.items()
        figure = one_run(timeline.queue, timeline.load, LOADS, f"Load and queue over time: {name}{at}")
        text = "Averages over 1/200 of the run. KV tokens: prompt and output so far of what runs, a shared prefix for each."
        return Section("Load and queue over time", text=[text], figures=[(figure, "A line an engine.")])
    by_series = {name: timeline.load for name, timeline in timelines.items()}
    queues = {name: timeline.queue for name, timeline in timelines.items()}
    said = ["The first run of each series, averaged over 1/200 of it."]
    figures = []
    if any(queue["queued"].any() for queue in queues.values()):
        figures.append((queue_lengths(queues, f"The core's queue{at}"), "Tasks that were ready and not yet dispatched."))
    else:
        said.append("No task waited in the core: each was dispatched at the instant at which it was ready.")
    figures += [
        (
            loads(by_series, Metric("running", "tasks running on an engine"), f"Load of the engines{at}"),
            "Tasks that an engine had begun and not ended. Lines far apart: an uneven load.",
        ),
        (
            loads(by_series, Metric("waiting", "tasks in an engine's queue"), f"Queues of the engines{at}"),
            "Tasks that were dispatched to an engine and that it had not begun.",
        ),
    ]
    return Section("Load and queue over time", text=said, figures=figures)


def goodput(study: Study, details: Details, objectives: Objectives) -> Section | None:
    """Programs within `objectives`."""
    if not objectives:
        return None
    names = {"ttft_s": "TTFT of each call", "tpot_s": "time per token of each output", "jct_s": "JCT"}
    limits = [(name, getattr(objectives, field)) for field, name in names.items()]
    wanted = ", ".join(f"{name} ≤ {limit:g} s" for name, limit in limits if limit is not None)
    text = [f"Programs count that finished with {wanted}."]
    given = objectives == study.specification.objectives

    def share(result: RunResult) -> float | None:
        good = result.summary.within_objectives if given else details.within.get(result.run.name)
        return good / result.summary.programs if good is not None else None

    def rate(result: RunResult) -> float | None:
        good = share(result)
        return good * result.summary.programs / result.summary.simulated_s if good is not None else None

    by_run = study.by_run({"goodput": rate, "share": share})
    if by_run["share"].isna().all():
        return Section("Goodput", warnings=["Neither the summaries nor any tables say which programs these are."], text=text)
    table = study.estimates(by_run.assign(share=100.0 * by_run["share"]), ["goodput", "share"])
    metrics = [
        Metric("goodput", "goodput (programs/s)", linear=True),
        Metric("share", "programs within objectives (%)", top=102.0),
    ]
    return Section("Goodput", text=text, figures=[_against_or_bars(study, table, metrics, "Goodput", "Higher is better.")])


INDICES = {
    "jct_index": "Jain's index of JCT/token",
    "jct_ratio": "JCT/token, largest ÷ smallest",
    "service_index": "Jain's index of tokens served",
    "service_ratio": "tokens served, most ÷ least",
}


def fairness_of_tenants(study: Study, details: Details) -> Section | None:
    """Jain's index and ratios between tenants."""
    if not details.fairness:
        return None
    values = {result.run.name: found for result, found in details.fairness if len(found.tenants) > 1}
    if not values:
        return Section("Fairness", text=["The programs are of one tenant: there is nobody to be fair between."])

    def index(field: str) -> Callable[[RunResult], float | None]:
        return lambda result: getattr(values.get(result.run.name), field, None)

    table = study.estimates(study.by_run({field: index(field) for field in INDICES}), list(INDICES))
    numbers = pd.DataFrame({"series": table["series"]})
    if study.axis is not None:
        numbers[study.axis.label] = [f"{place:g}" for place in table["place"]]
    for field, name in INDICES.items():
        numbers[name] = column_of(table, field)
    metrics = [Metric("jct_index", INDICES["jct_index"], top=1.02), Metric("jct_ratio", INDICES["jct_ratio"])]
    return Section(
        "Fairness",
        text=[
            "Between tenants, by their mean JCT an output token, so that long programs weigh as short ones. Jain's index is 1 "
            "when all tenants fare alike, 1/n when one of n has everything. – where a tenant finished nothing."
        ],
        figures=[_against_or_bars(study, table, metrics, "Fairness between tenants", "1 is best.")] if len(table) > 1 else [],
        tables=[_tenants(study, details)],
        folded=[(counted(len(numbers), "cell"), numbers)],
    )


def _tenants(study: Study, details: Details) -> pd.DataFrame:
    """Each tenant's mean JCT by series, at the middle place."""
    rows = []
    for result, found in details.fairness:
        if study.place_of(result.summary) == study.middle:
            rows += [{"series": study.series_of(result.summary), **row} for row in found.tenants.to_dict("records")]
    table = pd.DataFrame(rows).assign(tenant=lambda t: t["tenant"].replace("", "(none)"))
    at = f" at {place_text(study, study.middle)}" if study.axis is not None else ""
    means = table.groupby(["series", "tenant"])["jct_s"].mean().unstack("tenant").reindex(study.series).dropna(how="all")
    means.columns = [f"{name}: JCT, mean (s)" for name in means.columns]
    return means.reset_index().rename(columns={"series": f"tenants{at}"})


def _against_or_bars(study: Study, table: pd.DataFrame, metrics: list[Metric], title: str, caption: str) -> tuple[Figure, str]:
    """Over the axis where there is one."""
    if study.axis is None:
        return bars(table, metrics, title), caption
    return against(table, Metric("place", study.axis.label), metrics, title), caption
