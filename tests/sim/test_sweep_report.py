"""report.html of folders that `sim.run` wrote: what was varied has its plot, what failed or is missing is said."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pandas as pd
import pytest

from sim.report import write_report
from sim.report.__main__ import main as report
from sim.report.numbers import at_a_glance
from sim.report.study import open_study
from sim.results import FINISHED, read_results
from sim.run import main as run
from sim.workloads.program import Program, write_programs
from tests.sim.clusters import write_files
from tests.sim.programs import chain, map_reduce, one_call


def programs() -> list[Program]:
    tenant = ["a", "b", ""]
    made = [map_reduce(3, f"m{i}", 0.4 * i) if i % 2 else chain(2, f"c{i}", 0.4 * i) for i in range(8)]
    return [msgspec.structs.replace(program, tenant=tenant[i % 3]) for i, program in enumerate(made)]


def results(folder: Path, *flags: str, work: list[Program] | None = None) -> Path:
    core, engine = write_files(folder)
    write_programs(folder / "programs.jsonl", work or programs())
    files = ["--core", core, "--engines", f"{engine}:2", "--workload", str(folder / "programs.jsonl"), "--workers", "1"]
    assert run([*files, "--no-report", *flags, "--out", str(folder / "out")]) == 0
    return folder / "out"


def headings(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_a_sweep_has_every_section(tmp_path: Path) -> None:
    swept = ["--policy", "round_robin,parrot:all", "--rate", "1,2", "--arrivals", "poisson", "--seed", "0,1"]
    out = results(tmp_path, *swept, "--objectives", "jct_s=1")
    page = write_report(out).read_text()
    assert headings(page) == [
        "What ran",
        "At a glance",
        "Who wins where",
        "Latency against arrival rate",
        "Throughput and latency",
        "Distributions",
        "Load and queue over time",
        "Goodput",
        "Fairness",
        "All numbers",
    ]
    assert "8 runs on a simulated cluster" in page
    assert re.findall(r'href="#(s\d+)"', page) == re.findall(r'<section id="(s\d+)"', page)
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "95% confidence intervals of the mean over seeds" in page
    assert "None is seen here" in page  # and so none is spoken of where the rate is chosen
    assert "the first rate at or above" not in page


def test_of_recorded_arrivals_and_policies_without_chance_seeds_are_one_run_and_nobody_wins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = results(tmp_path, "--policy", "round_robin,least_loaded", "--rate", "2,8", "--seed", "0,1,2")
    assert "in all cells every seed came to the same numbers" in capsys.readouterr().err
    page = write_report(out).read_text()
    assert "In all cells every seed came to the same numbers" in page
    assert "Who wins where" not in page
    assert "confidence intervals of the mean" not in page
    differences = open_study(out).beside_first("jct_s.mean")
    assert differences["jct_s.mean"].notna().all()
    assert differences["jct_s.mean.low"].isna().all()


def test_beside_a_policy_with_chance_those_without_have_no_interval_and_do_not_win(tmp_path: Path) -> None:
    out = results(tmp_path, "--policy", "random,round_robin,least_loaded", "--rate", "4", "--seed", "0,1,2")
    study = open_study(out)
    assert {cell.policy: cell.over for cell in study.cells} == {"random": "seeds", "round_robin": None, "least_loaded": None}
    points = study.points.set_index("series")["jct_s.mean.low"]
    assert points.notna().to_dict() == {"random": True, "round_robin": False, "least_loaded": False}
    page = write_report(out).read_text()
    assert "In 2 of 3 cells every seed came to the same numbers" in page


def test_where_no_task_waited_in_the_core_that_is_said_and_no_empty_plot_drawn(tmp_path: Path) -> None:
    page = write_report(results(tmp_path, "--policy", "round_robin,random", work=[chain(2, "c")])).read_text()
    assert "No task waited in the core" in page
    assert "Tasks that were ready and not yet dispatched." not in page


def test_what_ran_names_an_applications_own_code_and_what_stands_beside_the_defaults(tmp_path: Path) -> None:
    core, engine = write_files(tmp_path)
    code = tmp_path / "summary.py"
    code.write_text("""from parrot import P

@P.semantic_function()
def title(text: P.Input, name: P.Output(P.SamplingConfig(max_gen_length=8))):
    \"\"\"A title for {{text}}: {{name}}\"\"\"

def main():
    return title("rain").get()
""")
    command = ["--core", core, "--engines", f"{engine}:2", "--program", f"{code}:main", "--count", "3", "--rate", "1"]
    command += ["--arrivals", "constant", "--engine-delay-ms", "2", "--workers", "1", "--out", str(tmp_path / "out")]
    assert run(command) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Parrot testbed: summary.py:main" in page
    for name, fact in {"program": f"{code}:main", "arrivals": "constant", "core to engines": "2 ms each way"}.items():
        assert f"<tr><th>{name}</th><td>{fact}</td></tr>" in page


def test_one_run_has_no_plot_against_what_was_not_varied_and_the_same_bytes_twice(tmp_path: Path) -> None:
    out = results(tmp_path, "--policy", "parrot", work=[one_call("a"), one_call("b", 0.1)])
    page = write_report(out).read_text()
    assert headings(page) == ["What ran", "At a glance", "Distributions", "Load and queue over time", "Fairness", "All numbers"]
    assert "there are no confidence intervals" in page
    assert "of one tenant" in page
    assert write_report(out).read_text() == page


def test_without_tables_the_report_is_of_the_summaries(tmp_path: Path) -> None:
    out = results(tmp_path, "--policy", "round_robin,parrot", "--rate", "2,8", "--no-tables")
    assert headings(write_report(out).read_text()) == [
        "What ran",
        "At a glance",
        "Latency against arrival rate",
        "Throughput and latency",
        "All numbers",
    ]


def test_missing_runs_failed_programs_and_extrapolation_are_said(tmp_path: Path) -> None:
    out = results(tmp_path, "--policy", "round_robin,parrot,least_loaded")
    one, other, third = read_results(out).runs
    (third.folder / FINISHED).unlink()
    document = json.loads((one.folder / FINISHED).read_text())
    document["summary"] |= {"failed": 8, "finished": 0, "errors": {"no_engine": 8}}
    document["summary"]["jct_s"] = dict.fromkeys(("mean", "p50", "p90", "p99"))
    document["summary"]["outside"] = {"made-up": {"batch size": [96, 1, 64]}}
    (one.folder / FINISHED).write_text(json.dumps(document))
    table = pd.read_parquet(one.folder / "programs.parquet").assign(state="failed", jct_s=float("nan"))
    table.to_parquet(one.folder / "programs.parquet", index=False)
    (other.folder / "tasks.parquet").write_bytes(b"PAR1")
    page = write_report(out).read_text()
    assert "1 of 3 runs have not finished and are in no number here: least_loaded_seed0." in page
    assert "no_engine: 8" in page
    assert "batch size came to 96, but profile made-up has seen 1 to 64 only" in page
    assert "Left out of what is drawn from tables" in page
    assert "tasks.parquet" in page or "a table cannot be read" in page


def test_series_are_named_by_what_varies_beside_the_axis(tmp_path: Path) -> None:
    flags = ["--policy", "round_robin,parrot", "--rate", "2,8", "--set", "global_scheduler.max_queue_size=16,64"]
    study = open_study(results(tmp_path, *flags))
    assert study.axis is not None
    assert study.axis.column == "rate"
    assert study.places == [2.0, 8.0]
    assert study.series == [f"{policy}, max_queue_size={size}" for policy in ("round_robin", "parrot") for size in (16, 64)]


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    study = open_study(results(tmp_path, "--policy", "round_robin,parrot:all", "--rate", "8", "--seed", "0,1"))
    found = study.beside_first("jct_s.mean").set_index("series")["jct_s.mean"]
    by_seed = [[r.summary.jct_s.mean for r in study.runs if r.run.seed == seed] for seed in (0, 1)]
    expected = sum(100.0 * (other / first - 1.0) for first, other in by_seed) / 2
    assert found["round_robin"] == 0.0
    assert found["parrot:all"] == pytest.approx(expected)


def test_objectives_after_the_fact_and_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = results(tmp_path, "--policy", "parrot")
    assert report([str(out), "--objectives", "jct_s=1.5,ttft_s=0.5"]) == 0
    page = (out / "report.html").read_text()
    assert "TTFT of each call ≤ 0.5 s, JCT ≤ 1.5 s" in page
    capsys.readouterr()
    refused = {"jct=1": "'jct'", "jct_s=soon": "expected NAME=SECONDS", "jct_s=0": "above 0"}
    for text, reason in refused.items():
        assert report([str(out), "--objectives", text]) == 1
        assert reason in capsys.readouterr().err
    assert report([str(tmp_path)]) == 1
    assert "no folder of results" in capsys.readouterr().err


def test_the_knee_is_ringed_and_chooses_the_rate_that_is_shown(tmp_path: Path) -> None:
    work = [one_call(f"o{n}", 0.5 * n, output=60) for n in range(40)]
    out = results(tmp_path, "--rate", "0.5,60,200", "--set", "engine.scheduler.max_batch_size=1", work=work)
    study = open_study(out)
    (knee,) = study.knees("jct_s.mean")["x"]
    by_rate = study.points.set_index("place")["jct_s.mean"]
    twice = 2 * by_rate[0.5]
    assert 0.5 < knee < 60
    assert knee == pytest.approx(0.5 + (60 - 0.5) * (twice - by_rate[0.5]) / (by_rate[60] - by_rate[0.5]))
    assert (study.usual_knee, study.middle) == (knee, 60.0)
    assert at_a_glance(study).text == ["At 60 programs/s, the first rate at or above the usual knee of JCT. "]


def test_a_report_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = results(tmp_path, work=programs()[:2])
    (out / "report.html").mkdir()
    assert report([str(out)]) == 1
    assert capsys.readouterr().err == f"sim.report: {out}: cannot be written: Is a directory\n"
