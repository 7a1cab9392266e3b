"""The demo's judgement and its page, from results made up for the test."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from experiments import demo
from experiments.applications import APPLICATIONS, Outcome
from experiments.demo_report import Comparison, Summary, run_name, write
from parrot.latency import FixedCost, Hinge, LatencyProfile
from parrot.protocol.api import CallReport, TaskReport
from sim.metrics import write_tables
from sim.workloads import open_workload
from sim.workloads.program import check

PROFILE = LatencyProfile("p", "m", "cpu", "sdpa", (FixedCost(1, 0.01),), (Hinge(0, 0.001),), 0.0, 0.0,
                         error={"mean": 0.05, "p99": 0.2, "total": 0.01, "iterations": 9})  # fmt: skip


def outcomes(round_: int) -> list[Outcome]:
    task = TaskReport("v", "finished", engine="engine-0", started_s=1.0, first_token_s=1.5, finished_s=3.0 + round_)
    reports = (CallReport(1, "f", "finished", 0.5, (task,)),)
    return [
        Outcome(name, 10 * round_ + i, 0.0, 3.0, 3.0 + round_, 0.5, 0.04, {"text": f"<{name}>"}, reports)
        for i, name in enumerate(APPLICATIONS)
    ]


def run_folder(folder: Path, summary: Summary) -> tuple[Summary, Path]:
    ids = [f"session-{10 * r + i}" for r in range(3) for i in range(3)]
    programs = pd.DataFrame({"program": range(9), "id": ids, "application": "x", "jct_s": [float(i + 1) for i in range(9)]})
    tasks = pd.DataFrame({"program": range(9), "engine": "engine-1", "started_s": 0.5, "finished_s": 2.5})
    target = folder / run_name(summary)
    write_tables({"programs": programs, "tasks": tasks}, target)
    return summary, target


def summary(policy: str, rate: float | None) -> Summary:
    times = {"mean": 2.0, "p50": 2.0, "p90": 3.0, "p99": 4.0}
    return Summary(policy, rate, 0, 9, 9, 0, 50.0, times, times)


def test_the_page_has_every_part_and_needs_nothing_beside_it(tmp_path: Path) -> None:
    rounds = [outcomes(number) for number in range(3)]
    comparison = [Comparison(name, [3.0, 4.0, 5.0], [4.2]) for name in APPLICATIONS]
    swept = [
        run_folder(tmp_path, summary(policy, rate)) for policy in ("parrot:all", "round_robin") for rate in (0.1, 0.2, 0.4)
    ]
    replayed = [run_folder(tmp_path, summary("parrot", None))]
    page = write(tmp_path / "report.html", rounds, PROFILE, comparison, replayed, swept).read_text()
    assert page.count("<svg") == 5
    assert "&lt;chat&gt;" in page
    assert "+5.0%" in page
    for title in ("What ran", "Real against simulated", "Engine timeline", "Policies"):
        assert f"<h2>{title}</h2>" in page


def test_a_simulation_within_its_bound_passes_and_beyond_it_fails_with_the_numbers() -> None:
    demo.check_bound([Comparison("a", [10.0, 10.0, 10.0], [12.4]), Comparison("b", [8.0, 10.0, 12.0], [17.0])])
    with pytest.raises(demo.DemoError, match=r"a: .* off by \+26\.0%, beyond 25\.0%"):
        demo.check_bound([Comparison("a", [10.0, 10.0, 10.0], [12.6])])


def test_the_mix_is_sound_and_the_same_every_time() -> None:
    programs = list(open_workload("chat:turns=2", count=4))
    mixed = demo.mix(programs, 30)
    assert mixed == demo.mix(programs, 30)
    assert len({program.id for program in mixed}) == 30
    for program in mixed:
        check(program)
