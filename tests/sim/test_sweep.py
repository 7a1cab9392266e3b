"""Sweeps: what lists stand for, what is kept after a kill, what a changed specification meets, and what the cells say."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pandas as pd
import pytest

import sim.sweep
from parrot.latency import LatencyProfile
from parrot.serve.policies import POLICIES
from sim.flags import parser, specification_of
from sim.pool import Progress
from sim.results import read_results
from sim.run import main
from sim.spec import Run, Specification, runs_of, with_every_policy
from sim.sweep import Outcome, Where, run_all, run_one
from sim.workloads.program import write_programs
from tests.sim.clusters import PROFILE, processes_with, write_files
from tests.sim.programs import chain, map_reduce

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    core, engine = write_files(tmp_path)
    workload = tmp_path / "programs.jsonl"
    write_programs(workload, [chain(2, "a"), map_reduce(3, "b", arrival_s=0.2), chain(3, "c", arrival_s=0.5)])
    out = ["--no-report", "--out", str(tmp_path / "out")]
    return ["--core", core, "--engines", f"{engine}:2", "--workload", str(workload), *out]


def printed(capsys: Capture, kind: str = "run") -> list[dict[str, object]]:
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if line["kind"] == kind]


def files_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timing.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# -------------------------------------------------------------------------------------------------------------- lists


def test_every_flag_that_takes_a_list_is_swept(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    _, engine = write_files(tmp_path)
    other = tmp_path / "other.json"
    other.write_text(Path(engine).read_text())
    swept = ["--workload", flags[5], "chain:chunks=2,chunk_tokens=30", "--engines", f"{engine},{other}:1,3", str(other)]
    assert main([*flags[:2], *swept, "--count", "2", "--policy", "parrot,round_robin", "--seed", "4,5", *flags[6:]]) == 0
    lines = printed(capsys)
    assert [(x["workload"], x["cluster"], x["policy"], x["seed"]) for x in lines] == [
        (workload, [f"{file}:{count}", f"{other}:1"], policy, seed)
        for workload in swept[1:3]
        for file in (engine, str(other))
        for count in (1, 3)
        for policy in ("parrot", "round_robin")
        for seed in (4, 5)
    ]
    assert [x["engines"] for x in lines[:8]] == [2] * 4 + [4] * 4


def test_any_value_of_the_configuration_is_swept_in_every_combination(flags: list[str], capsys: Capture) -> None:
    swept = ["--set", "global_scheduler.app_fifo=true,false", "--set", "engine.scheduler.max_batch_size=1,8"]
    assert main([*flags, *swept]) == 0
    keys = ("global_scheduler.app_fifo", "engine.scheduler.max_batch_size")
    assert [tuple(line["settings"][key] for key in keys) for line in printed(capsys)] == [  # type: ignore[index]
        (True, 1), (True, 8), (False, 1), (False, 8)
    ]  # fmt: skip


def test_the_specification_of_a_folder_gives_the_same_bytes(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    more = ["--policy", "parrot,round_robin", "--seed", "1,2", "--rtt-ms", "5", "--objectives", "jct_s=2,ttft_s=0.5"]
    assert main([*flags, *more, "--intervals", "2", "--set", "global_scheduler.max_queue_size=32"]) == 0
    first = capsys.readouterr().out
    assert main(["--spec", str(tmp_path / "out" / "spec.json"), "--out", str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out == first
    assert files_of(tmp_path / "again") == files_of(tmp_path / "out")


def test_flags_stand_above_the_specification_file(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main([*flags, "--set", "global_scheduler.max_queue_size=32"]) == 0
    spec = ["--spec", str(tmp_path / "out" / "spec.json"), "--out", str(tmp_path / "again")]
    assert main([*spec, "--policy", "round_robin", "--set", "global_scheduler.app_fifo=true"]) == 0
    (_, line) = printed(capsys)
    assert line["policy"] == "round_robin"
    assert line["settings"] == {"global_scheduler.max_queue_size": 32, "global_scheduler.app_fifo": True}


def test_a_workload_can_have_rates_and_a_count_of_its_own(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    assert main([*flags, "--policy", "least_loaded,*", "--seed", "1", "--no-report"]) == 0
    every = [line["policy"] for line in printed(capsys)]
    assert every[0] == "least_loaded"
    assert sorted(every) == sorted(POLICIES)  # what the list names comes once
    written = json.loads((tmp_path / "out" / "spec.json").read_text())
    assert written["policies"] == every  # the folder says which there were
    own = {"workload": "chain:chunks=2,chunk_tokens=30", "rates": [2, 4], "count": 3}
    spec = tmp_path / "own.json"
    spec.write_text(
        json.dumps({**written, "workloads": [own, "map_reduce:chunks=2,chunk_tokens=20"], "rates": [9], "count": 2})
    )
    again = ["--spec", str(spec), "--policy", "round_robin", "--no-report", "--out"]
    assert main([*again, str(tmp_path / "own")]) == 0
    assert [(line["workload"][:5], line["rate"], line["programs"]) for line in printed(capsys)] == [
        ("chain", 2.0, 3),
        ("chain", 4.0, 3),
        ("map_r", 9.0, 2),
    ]
    assert main([*again, str(tmp_path / "flags"), "--rate", "5", "--count", "1"]) == 0  # flags stand above a workload's own
    assert [(line["rate"], line["programs"]) for line in printed(capsys)] == [(5.0, 1), (5.0, 1)]


def test_a_policy_that_knows_the_future_is_none_of_every_policy_of_a_real_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES["round_robin"], "clairvoyant", True, raising=False)
    whole = Specification(policies=("*",))
    assert "round_robin" in with_every_policy(whole).policies
    assert "round_robin" not in with_every_policy(msgspec.structs.replace(whole, backend="real")).policies


WRONG_FILES = {
    "empty rates of a workload": (
        '{"workloads": [{"workload": "chat", "rates": []}]}',
        "the rates of one are an empty list: leave them out, or give one",
    ),
    "rates of a workload in a closed loop": (
        '{"workloads": [{"workload": "chat", "rates": [1]}], "clients": [2]}',
        "no rate and no arrivals beside it",
    ),
    "unknown key of a workload": ('{"workloads": [{"workload": "chat", "rate": 1}]}', "workloads[0]"),
    "unknown key": ('{"workloads": ["chat"], "speed": 1}', "speed.json: unknown key 'speed'"),
    "wrong type": ('{"workloads": ["chat"], "rates": ["fast"]}', "key 'rates[0]' is 'fast'"),
    "no list": ('{"workloads": "chat"}', "key 'workloads' is 'chat': expected `array`"),
    "unknown key of an engine": ('{"workloads": ["chat"], "engines": [{"file": "e", "size": 2}]}', "engines[0]"),
    "unknown backend": ('{"workloads": ["chat"], "backend": "gpu"}', "expected one of: sim, emulated, real"),
    "objective of zero": ('{"workloads": ["chat"], "objectives": {"jct_s": 0}}', "key 'objectives.jct_s' is 0"),
    "no workload": ("{}", "speed.json, with the flags above it: workloads, program: one of the two is needed"),
    "rate of zero": ('{"workloads": ["chat"], "rates": [0]}', "speed.json, with the flags above it: rate 0"),
    "no JSON": ("{", "speed.json: not valid JSON"),
}


@pytest.mark.parametrize("wrong", list(WRONG_FILES))
def test_a_wrong_specification_file_is_refused_with_file_and_key(wrong: str, tmp_path: Path, capsys: Capture) -> None:
    text, named = WRONG_FILES[wrong]
    (tmp_path / "speed.json").write_text(text)
    assert main(["--spec", str(tmp_path / "speed.json"), "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert named in told
    assert "speed.json" in told
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_a_sweep_that_was_stopped_goes_on_where_it_was(name: str, flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    seeds = ",".join(map(str, range(12)))
    long = ["--workload", "chain:chunks=4,chunk_tokens=100", "--count", "20", "--seed", seeds, "--workers", "2"]
    command = [sys.executable, "-m", "sim.run", *flags, *long]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while len(list(out.glob("*/run.json"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(getattr(signal, name))
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    while processes_with(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_with(str(tmp_path)) == []
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*") if (path.parent / "run.json").is_file()}
    finished = len({path.parent for path in kept})
    assert 2 <= finished < 12
    assert not (out / "summary.jsonl").exists()
    if name == "SIGINT":
        assert process.returncode == 130
        assert f"{finished} finished runs are kept in {out}" in told.decode()
    assert main([*flags, *long]) == 0
    resumed = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert main([*flags[:-1], str(tmp_path / "whole"), *long]) == 0
    assert capsys.readouterr().out == resumed
    assert files_of(tmp_path / "whole") == files_of(out)


def test_a_worker_that_is_killed_is_named_and_loses_no_other_run(
    flags: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = [*flags, "--seed", "1,2,3", "--workers", "2"]
    simulate = sim.sweep._simulate

    def fatal(run: sim.sweep.Run, *told: Any) -> object:
        if run.seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return simulate(run, *told)

    def only_the_lost_one(run: sim.sweep.Run, *told: Any) -> object:
        return simulate(run, *told) if run.seed == 2 else pytest.fail(f"{run.name} is repeated")

    with monkeypatch.context() as patch:
        patch.setattr("sim.sweep._simulate", fatal)
        assert main(sweep) == 1
    captured = capsys.readouterr()
    assert "run parrot_seed2: its process was killed by SIGKILL" in captured.err
    assert "2 of 3 runs are finished" in captured.err
    assert [json.loads(line)["seed"] for line in captured.out.splitlines() if '"run"' in line] == [1, 3]
    assert read_results(tmp_path / "out").missing == ["parrot_seed2"]
    monkeypatch.setattr("sim.sweep._simulate", only_the_lost_one)
    assert main(sweep) == 0
    assert [line["seed"] for line in printed(capsys)] == [1, 2, 3]


def test_runs_that_are_carried_out_elsewhere_count_in_the_progress_when_they_are_back(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Ray, where a run counts its programs in another process' memory."""
    elsewhere = types.ModuleType("sim.ray_cluster")

    def on_ray(runs: list[Run], folder: str, where: Where, tell: Callable[[], None]) -> Iterator[Outcome]:
        for run in runs:
            yield run_one(run, folder)
            tell()

    elsewhere.on_ray = on_ray  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sim.ray_cluster", elsewhere)
    runs = runs_of(specification_of(parser().parse_args([*flags, "--seed", "1,2"])))
    seen: list[list[tuple[int, int]]] = []

    def look(progress: Sequence[Progress]) -> None:
        seen.append([far.read() for far in progress])

    assert len(list(run_all(runs, str(tmp_path / "out"), where=Where(ray="local"), on_progress=look))) == 2
    assert seen == [[(3, 3), (0, 0)], [(3, 3), (3, 3)]]


def test_another_specification_in_the_same_folder_is_refused_with_what_differs(flags: list[str], capsys: Capture) -> None:
    assert main([*flags, "--seed", "1,2"]) == 0
    before = capsys.readouterr().out
    assert main([*flags, "--seed", "1,3", "--rate", "2"]) == 1
    told = capsys.readouterr().err
    assert "seeds [1,2] there, [1,3] here" in told
    assert "rates [null] there, [2.0] here" in told
    assert main([*flags, "--seed", "1,2", "--metrics", "jct_s.p99"]) == 0, "what only presents is no other specification"
    assert capsys.readouterr().out == before


def test_a_changed_file_in_the_same_folder_is_refused_by_name(flags: list[str], capsys: Capture) -> None:
    assert main(flags) == 0
    with open(flags[5], "a") as file:
        file.write("\n")
    assert main(flags) == 1
    assert f"other contents of {flags[5]}" in capsys.readouterr().err


def test_fresh_removes_what_a_sweep_wrote_and_nothing_else(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    assert main([*flags, "--seed", "1,2"]) == 0
    mine = [out / "notes.txt", out / "parrot_seed1" / "notes.txt", out / "other" / "programs.parquet"]
    mine[2].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    assert main([*flags, "--seed", "3", "--fresh"]) == 0
    assert all(path.read_text() == "mine" for path in mine)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["other", "parrot_seed1", "parrot_seed3"]
    assert [run.run.seed for run in read_results(out).runs] == [3]
    capsys.readouterr()


def test_a_folder_with_no_finished_run_is_taken_over(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    write_programs(flags[5], [chain(2, "a", prompt=5000)])
    assert main(flags) == 1
    write_programs(flags[5], [chain(2, "a")])
    assert main([*flags, "--policy", "round_robin"]) == 0


# ----------------------------------------------------------------------------------------------- cells, draws, goodput


def test_cells_stand_behind_the_runs_when_there_is_more_than_one_of_a_kind(
    flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main([*flags, "--policy", "parrot,round_robin"]) == 0
    assert printed(capsys, "cell") == []
    (first, _) = map(json.loads, (tmp_path / "out" / "cells.jsonl").read_text().splitlines())
    assert first["over"] is None
    assert first["metrics"]["jct_s.mean"]["confidence_interval"] is None
    assert main([*flags, "--seed", "1,2", "--workload", "chain", "--count", "5", "--fresh", "--confidence", "0.9"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["run", "run", "cell"]
    jct = lines[2]["metrics"]["jct_s.p99"]
    low, high = jct["confidence_interval"]
    assert jct["mean"] == pytest.approx(sum(line["jct_s"]["p99"] for line in lines[:2]) / 2)
    assert low < jct["mean"] < high
    assert (lines[2]["seeds"], lines[2]["confidence"], jct["prediction_interval"]) == ([1, 2], 0.9, None)


def with_profile(tmp_path: Path, profile: LatencyProfile) -> None:
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(profile))


def test_prediction_intervals_carry_the_spread_of_the_profile(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    with_profile(tmp_path, msgspec.structs.replace(PROFILE, spread=0.2))
    more = ["--policy", "parrot,round_robin", "--seed", "1,2", "--intervals", "4", "--workload", "chain", "--count", "5"]
    assert main([*flags, *more]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    runs = [line for line in lines if line["kind"] == "run"]
    assert [run["draw"] for run in runs[:5]] == [None, 1, 2, 3, 4]
    assert len({run["jct_s"]["mean"] for run in runs[:5]}) == 5
    cell = next(line for line in lines if line["kind"] == "cell")
    assert (cell["runs"], cell["draws"]) == (2, 8)
    jct = cell["metrics"]["jct_s.mean"]
    low, high = jct["prediction_interval"]
    assert low < jct["mean"] < high
    assert high - low > 0.2 * jct["mean"]
    assert captured.err == ""
    results = read_results(tmp_path / "out")
    assert (len(results.runs), len(results.draws), results.missing) == (4, 16, [])
    assert not list((tmp_path / "out").glob("*draw*/*.parquet"))


def test_explanations_and_traces_beside_prediction_intervals_are_written_and_reported(flags: list[str], tmp_path: Path) -> None:
    with_profile(tmp_path, msgspec.structs.replace(PROFILE, spread=0.2))
    more = ["--seed", "1,2", "--intervals", "3", "--explain", "--trace", "--workload", "chain", "--count", "3"]
    assert main([*[flag for flag in flags if flag != "--no-report"], *more]) == 0
    (cell,) = [json.loads(line) for line in (tmp_path / "out" / "cells.jsonl").read_text().splitlines()]
    assert (cell["runs"], cell["draws"]) == (2, 6)
    assert cell["metrics"]["jct_s.mean"]["prediction_interval"] is not None
    assert "Prediction intervals" in (tmp_path / "out" / "report.html").read_text()


def test_a_profile_without_spread_is_said_to_state_none(flags: list[str], capsys: Capture) -> None:
    assert main([*flags, "--intervals", "4", "--seed", "1,2"]) == 0
    captured = capsys.readouterr()
    assert "profile made-up states no spread" in captured.err
    cell = json.loads(captured.out.splitlines()[-1])
    assert (cell["draws"], cell["metrics"]["jct_s.mean"]["prediction_interval"]) == (0, None)


def test_that_a_simulated_engine_writes_no_log_is_said_once(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    log = tmp_path / "log.jsonl"
    assert main([*flags, "--policy", "parrot,round_robin", "--set", f"engine.iteration_log={log}"]) == 0
    said = capsys.readouterr().err
    assert said == f"sim.run: iteration_log {log}: is not written: only real engines have iterations of their own to log\n"
    assert not log.exists()


def test_real_engines_that_would_write_one_log_are_refused(flags: list[str], tmp_path: Path, capsys: Capture) -> None:
    engine = tmp_path / "engine.json"
    file = json.loads(engine.read_text())
    file["engine_type"] = "builtin"
    engine.write_text(json.dumps({key: value for key, value in file.items() if key != "latency_profile"}))
    log = tmp_path / "log.jsonl"
    assert main([*flags, "--backend", "real", "--set", f"engine.iteration_log={log}"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"would both write iteration_log {log}" in captured.err


def test_what_a_profile_has_not_seen_is_said_once_and_refused_when_strict(
    flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    with_profile(tmp_path, msgspec.structs.replace(PROFILE, seen={"tokens": (1, 20), "rows": (1, 64)}))
    assert main([*flags, "--policy", "parrot,round_robin"]) == 0
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    farthest = max(line["outside"]["made-up"]["tokens"][0] for line in lines)
    assert captured.err.count("\n") == 1
    assert f"profile made-up: beyond what it was fitted to: tokens {farthest:g} (seen 1 to 20)" in captured.err
    assert main([*flags, "--strict", "--fresh"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "'made-up' was fitted to iterations with tokens from 1 to 20" in captured.err


@pytest.mark.parametrize(
    ("objectives", "column"),
    [("jct_s={}", "jct_s"), ("ttft_s={}", "ttft_s"), ("tpot_s={}", "tpot_s"), ("ttft_s=99,jct_s={}", "jct_s")],
)
def test_goodput_counts_the_programs_within_their_objectives(
    objectives: str, column: str, flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    assert main(flags) == 0
    capsys.readouterr()
    folder = tmp_path / "out" / "parrot_seed0"
    table = {"jct_s": "programs", "ttft_s": "calls", "tpot_s": "tasks"}[column]
    worst = pd.read_parquet(folder / f"{table}.parquet").groupby("program")[column].max()
    limit = float(worst.sort_values().iloc[:2].mean())
    assert main([*flags, "--objectives", objectives.format(limit), "--no-tables", "--fresh"]) == 0
    (line,) = printed(capsys)
    assert line["within_objectives"] == 1
    assert line["goodput_programs_per_s"] == pytest.approx(1 / line["simulated_s"])  # type: ignore[operator]


def test_without_objectives_there_is_no_goodput(flags: list[str], capsys: Capture) -> None:
    assert main(flags) == 0
    (line,) = printed(capsys)
    assert (line["within_objectives"], line["goodput_programs_per_s"]) == (None, None)


# ------------------------------------------------------------------------------------------------- report and traces


def test_reports_and_traces_are_written_when_they_are_asked_for_with_the_same_bytes(
    flags: list[str], tmp_path: Path, capsys: Capture
) -> None:
    more = ["--policy", "parrot,round_robin", "--seed", "1,2", "--trace", "--report"]
    for name, workers in (("one", "1"), ("two", "2")):
        assert main([*flags[:-1], str(tmp_path / name), *more, "--workers", workers]) == 0
    written = files_of(tmp_path / "one")
    assert files_of(tmp_path / "two") == written
    assert b"round_robin" in written["report.html"]
    for run in read_results(tmp_path / "one").runs:
        events = json.loads(gzip.decompress(written[f"{run.run.name}/trace.json.gz"]))["traceEvents"]
        assert events
    assert main([*flags, "--trace", "--no-tables"]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "parrot_seed0").iterdir()) == ["run.json", "trace.json.gz"]
    assert not (tmp_path / "out" / "report.html").exists()
    capsys.readouterr()
