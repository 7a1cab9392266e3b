"""The demo's page: what ran, how close the simulation came, what the policies did. Lays out; computes no metric of its own."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pandas as pd

from experiments.applications import Outcome
from parrot.latency import LatencyProfile
from sim.metrics import read_tables
from sim.report.html import Section, write_report
from sim.report.plots import Metric, Panel, against, distributions, real_against_simulated, sample_of
from sim.report.timelines import engine_timeline


class Summary(msgspec.Struct, frozen=True):
    """What the demo reads of a line that sim.run prints."""

    policy: str
    rate: float | None
    seed: int
    programs: int
    finished: int
    failed: int
    throughput_tokens_per_s: float
    ttft_s: dict[str, float]
    jct_s: dict[str, float]


def run_name(summary: Summary) -> str:
    """The folder that sim.run gives the run's tables."""
    rate = f"_rate{summary.rate:g}" if summary.rate is not None else ""
    return f"{summary.policy.replace(':', '-')}{rate}_seed{summary.seed}"


@dataclass(frozen=True)
class Comparison:
    """An application's job completion times, one number a run."""

    application: str
    real_s: list[float]
    simulated_s: list[float]

    @property
    def real_mean_s(self) -> float:
        return statistics.fmean(self.real_s)

    @property
    def simulated_mean_s(self) -> float:
        return statistics.fmean(self.simulated_s)

    @property
    def error(self) -> float:
        """Of the simulated mean, relative to the real one."""
        return self.simulated_mean_s / self.real_mean_s - 1.0

    @property
    def spread(self) -> float:
        """Of the real runs: (longest − shortest) / mean."""
        return (max(self.real_s) - min(self.real_s)) / self.real_mean_s


def write(
    path: Path,
    rounds: Sequence[Sequence[Outcome]],
    profile: LatencyProfile,
    comparison: Sequence[Comparison],
    replayed: Sequence[tuple[Summary, Path]],
    swept: Sequence[tuple[Summary, Path]],
) -> Path:
    """Writes the page to `path` and returns it."""
    sections = [
        _real(rounds),
        _real_beside_simulated(comparison, profile),
        _timelines(rounds, replayed[0][1]),
        _policies(swept),
    ]
    lead = "Three applications on a real cluster of this machine, and the same in simulation. Every number is of this run."
    return write_report(path, sections, title="Parrot testbed: demo", lead=lead)


def _real(rounds: Sequence[Sequence[Outcome]]) -> Section:
    rows = [
        {
            "application": outcome.application,
            "run": number,
            "calls": outcome.calls,
            "TTFT mean (s)": outcome.ttft_s,
            "time per token mean (ms)": outcome.tpot_s * 1e3,
            "JCT (s)": outcome.jct_s,
        }
        for number, one in enumerate(rounds, 1)
        for outcome in one
    ]
    texts = [(f"{o.application}: {name}", text.strip()) for o in rounds[-1] for name, text in o.texts.items()]
    return Section(
        "What ran",
        text=[
            f"{len(rounds)} runs; in each the applications ran together, on two CPU engines of one thread each. "
            "TTFT: from the call being ready to its first token. JCT: from a program's first request to its last answer, on "
            "the client's clock."
        ],
        tables=[pd.DataFrame(rows)],
        folded=texts,
    )


def _real_beside_simulated(comparison: Sequence[Comparison], profile: LatencyProfile) -> Section:
    table = pd.DataFrame(
        {
            "application": [row.application for row in comparison],
            "real_s": [row.real_s for row in comparison],
            "simulated_s": [row.simulated_mean_s for row in comparison],
        }
    )
    numbers = pd.DataFrame(
        {
            "application": [row.application for row in comparison],
            "real, mean (s)": [row.real_mean_s for row in comparison],
            "simulated, mean (s)": [row.simulated_mean_s for row in comparison],
            "error": [f"{row.error:+.1%}" for row in comparison],
            "spread of real runs": [f"{row.spread:.1%}" for row in comparison],
        }
    )
    error = profile.error
    return Section(
        "Real against simulated",
        text=[
            "The cluster's record was turned into programs, and these ran through the same core in simulation. Engines take as "
            "long as the latency profile says that was fitted to the iteration logs of these very runs.",
            f"The profile's error on iterations that were held out: mean {error['mean']:.1%}, p99 {error['p99']:.1%}; of their "
            f"summed durations {error['total']:+.1%}.",
        ],
        figures=[
            (real_against_simulated(table), "Bars are means, dots are single real runs; above a bar, the simulation's error.")
        ],
        tables=[numbers],
        folded=[("the latency profile", profile.notes + "\n\n" + msgspec.json.format(msgspec.json.encode(profile)).decode())],
    )


def _timelines(rounds: Sequence[Sequence[Outcome]], replay: Path) -> Section:
    real = pd.DataFrame(
        [
            {"engine": task.engine, "start_s": task.started_s, "end_s": task.finished_s, "group": outcome.application}
            for outcome in rounds[-1]
            for call in outcome.reports
            for task in call.tasks
        ]
    )
    groups = {f"session-{outcome.session_id}": outcome.application for outcome in rounds[-1]}
    tables = read_tables(replay)
    ids = tables["programs"].set_index("program")["id"]
    tasks = tables["tasks"].assign(id=lambda t: t["program"].map(ids))
    tasks = tasks[tasks["id"].isin(list(groups))]
    simulated = pd.DataFrame(
        {
            "engine": tasks["engine"],
            "start_s": tasks["started_s"],
            "end_s": tasks["finished_s"],
            "group": tasks["id"].map(groups),
        }
    )
    return Section(
        "Engine timeline",
        text=[
            "Each bar is a completion task on its engine, from its admission to its last token; time 0 is the first admission."
        ],
        figures=[
            (engine_timeline(_from_zero(real), f"Run {len(rounds)}, real"), "As the real engines reported."),
            (engine_timeline(_from_zero(simulated), f"Run {len(rounds)}, simulated"), "The same programs in simulation."),
        ],
    )


def _from_zero(table: pd.DataFrame) -> pd.DataFrame:
    start = table["start_s"].min()
    return table.assign(start_s=table["start_s"] - start, end_s=table["end_s"] - start)


def _policies(swept: Sequence[tuple[Summary, Path]]) -> Section:
    rates = sorted({summary.rate for summary, _ in swept if summary.rate is not None})
    middle = rates[len(rates) // 2]
    times = {s.policy: sample_of(read_tables(folder)["programs"]["jct_s"]) for s, folder in swept if s.rate == middle}
    panel = Panel(f"Job completion time by policy at {middle:g} programs/s", "job completion time (s)", "programs", times)
    rows = pd.DataFrame([_flat(summary) for summary, _ in swept])
    return Section(
        "Policies",
        text=[
            "Programs drawn from those that ran above, with Poisson arrivals. The rates are multiples of the real runs' own; "
            "at high rates batches are larger than any that the profile has seen, so there the simulation extrapolates."
        ],
        figures=[
            (
                distributions([panel], columns=1),
                "Cumulative share of programs that were done within a time; further left is better.",
            ),
            (
                against(
                    rows.rename(columns={"policy": "series"}),
                    Metric("rate", "arrival rate (programs/s)"),
                    [Metric("JCT mean (s)", "JCT, mean (s)"), Metric("TTFT mean (s)", "TTFT, mean (s)")],
                    "Latency against arrival rate",
                ),
                "Latency against arrival rate, a line a policy.",
            ),
        ],
        tables=[rows],
    )


def _flat(summary: Summary) -> Mapping[str, object]:
    return {
        "policy": summary.policy,
        "rate": summary.rate,
        "JCT mean (s)": summary.jct_s["mean"],
        "JCT p90 (s)": summary.jct_s["p90"],
        "TTFT mean (s)": summary.ttft_s["mean"],
        "tokens/s": summary.throughput_tokens_per_s,
        "programs": summary.programs,
    }
