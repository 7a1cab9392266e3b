"""The first section of a report: what ran, what did not end, what failed, and where the simulation extrapolates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
import pandas as pd

from sim.outside import farthest
from sim.report.html import Section, format_number
from sim.report.study import Details, Study
from sim.spec import WorkloadChoice

LISTED = 12  #: lines of a list that is not summed up


def lead(study: Study) -> str:
    """One line below the title."""
    runs = len(study.runs) + len(study.results.missing)
    seeds = len({result.run.seed for result in study.runs})
    what = [f"{len(study.series)} series"] if len(study.series) > 1 else [study.series[0]]
    if study.axis is not None:
        what.append(f"{len(study.places)} values of {study.axis.label}")
    what.append(f"{seeds} seeds" if seeds > 1 else "1 seed")
    backend = {"sim": "simulated", "emulated": "emulated", "real": "real"}[study.specification.backend]
    return f"{runs} {'run' if runs == 1 else 'runs'} on a {backend} cluster: {' × '.join(what)}."


def lead_of_several(study: Study, conditions: int) -> str:
    """The same where workloads have pages of their own."""
    runs, policies = (len({getattr(r.run, field) for r in study.runs}) for field in ("name", "policy"))
    runs += len(study.results.missing)
    seeds = len({result.run.seed for result in study.runs})
    return f"{runs} runs: {policies} policies × {conditions} conditions × {seeds} {'seeds' if seeds > 1 else 'seed'}."


def overview(study: Study, details: Details) -> Section:
    """The section."""
    return Section(
        "What ran",
        warnings=[*_missing(study), *_outside(study), *_unread(details)],
        text=[_intervals_text(study)],
        facts=_facts(study),
        tables=_failures(study),
    )


def _facts(study: Study) -> list[tuple[str, str]]:
    spec = study.specification
    if spec.program is None:
        facts = [("workload", "; ".join(_workload(item) for item in spec.workloads))]
    else:
        facts = [("program", spec.program), ("inputs", spec.inputs or "none"), ("outputs", spec.outputs or "synthetic")]
    facts += [
        ("policy", ", ".join(spec.policies)),
        ("core", spec.core or spec.core_url or "–"),
        ("engines", " or ".join(dict.fromkeys(" + ".join(cell.cluster) for cell in study.cells))),
        ("client mode", spec.client.value),
        ("round trip", f"{spec.rtt_ms:g} ms" if isinstance(spec.rtt_ms, float) else spec.rtt_ms),
    ]
    facts += [(key, ", ".join(str(msgspec.to_builtins(value)) for value in values)) for key, values in spec.settings.items()]
    if spec.profiles:
        facts.append(("profiles", ", ".join(spec.profiles)))
    if spec.engine_delay_ms:
        facts.append(("core to engines", f"{spec.engine_delay_ms:g} ms each way"))
    if spec.arrivals is not None:
        facts.append(("arrivals", spec.arrivals))
    if spec.rates != (None,):
        facts.append(("rate", _rates(spec.rates)))
    if spec.clients != (None,):
        facts.append(("clients", ", ".join(map(str, spec.clients)) + " (closed loop)"))
    return [
        *facts,
        ("seeds", ", ".join(map(str, spec.seeds)) + (f", each {spec.repeats} times" if spec.repeats > 1 else "")),
        ("a run has", f"{_span(study, 'programs')} programs in {_span(study, 'simulated_s')} s"),
    ]


def _workload(item: str | WorkloadChoice) -> str:
    if isinstance(item, str):
        return item
    rates = f" at {_rates(item.rates)}" if item.rates is not None else ""
    return item.workload + rates + (f", {item.count} programs" if item.count is not None else "")


def _rates(rates: Sequence[float | None]) -> str:
    return ", ".join("as recorded" if rate is None else f"{rate:g}" for rate in rates) + " programs/s"


def _span(study: Study, field: str) -> str:
    values = [getattr(result.summary, field) for result in study.runs]
    low, high = (f"{value:,}" if isinstance(value, int) else format_number(value) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _intervals_text(study: Study) -> str:
    confidence = f"{study.specification.confidence:.0%}"
    said = [
        "JCT: from a program's first request to its last answer, on the client's clock. TTFT: from a call being ready (client "
        "mode request: submitted) to its first token. Time per token: between the first token of an output and its last."
    ]
    same = len(study.without_chance)
    if study.over is not None:
        said.append(f"± and whiskers are {confidence} confidence intervals of the mean over {study.over}.")
    elif not same:
        said.append("Each number is of a single seed: there are no confidence intervals.")
    if same:
        which = "all cells" if same == len(study.cells) else f"{same} of {len(study.cells)} cells"
        said.append(
            f"In {which} every seed came to the same numbers, as with recorded arrivals and a policy without chance: they have "
            "no interval."
        )
    if study.results.draws:
        said.append(f"Prediction intervals ({confidence}): for one run more, with the spread of the latency profiles in it.")
    return " ".join(said)


def _missing(study: Study) -> list[str]:
    names = study.results.missing
    if not names:
        return []
    listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
    return [f"{len(names)} of {len(names) + len(study.runs)} runs have not finished and are in no number here: {listed}."]


def _unread(details: Details) -> list[str]:
    reasons = details.unread
    if not reasons:
        return []
    more = f", and {len(reasons) - 3} runs more" if len(reasons) > 3 else ""
    return [f"Left out of what is drawn from tables: {'; '.join(reasons[:3])}{more}."]


def _outside(study: Study) -> list[str]:
    """What engines did that their profiles have not seen: the farthest of all runs."""
    return [
        f"Extrapolated: {feature} came to {_count(value)}, but profile {profile} has seen {_count(low)} to {_count(high)} "
        "only. Latencies out there are unproven."
        for profile, feature, (value, low, high) in farthest(result.summary.outside for result in study.runs)
    ]


def _count(value: float) -> str:
    """A feature of iterations is a whole number, one of remote requests may be a rate."""
    return f"{value:,.0f}" if value == int(value) else format_number(value)


def _failures(study: Study) -> list[pd.DataFrame]:
    """Runs in which programs failed; more than a list can hold are summed by series."""
    failed = [result for result in study.runs if result.summary.failed]
    if not failed:
        return []
    if len(failed) <= LISTED:
        names = {result.run.name: [result.summary] for result in failed}
    else:
        names = {name: [r.summary for r in failed if study.series_of(r.summary) == name] for name in study.series}
        names = {name: summaries for name, summaries in names.items() if summaries}
    rows = []
    for name, summaries in names.items():
        errors: Counter[str] = Counter()
        for summary in summaries:
            errors.update(summary.errors)
        rows.append(
            {
                "programs failed in": name,
                "runs": len(summaries),
                "failed": sum(summary.failed for summary in summaries),
                "of programs": sum(summary.programs for summary in summaries),
                "errors": ", ".join(f"{code}: {count}" for code, count in sorted(errors.items())),
            }
        )
    return [pd.DataFrame(rows)]
