"""`sim.run --explain` and `python -m sim.explain`: what is written, that it repeats to the byte, what is told and refused."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from parrot.engine.config import load_engine_config
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.policies import find_policy
from sim.explain import main as explain
from sim.processes import local_cluster
from sim.run import main
from sim.workloads.program import write_programs
from tests.sim.clusters import PROFILE, write_files
from tests.sim.programs import chain, map_reduce, one_call

BROKEN = """
from parrot.serve.policies.least_loaded import LeastLoaded

class Broken(LeastLoaded):
    name = "broken"

    def choose(self, task, queue, cluster):
        if task.depth:
            raise RuntimeError("only final calls are understood")
        return super().choose(task, queue, cluster)
"""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A run in which tasks wait: two engines of two places each."""
    core, engine = write_files(
        tmp_path, scheduler={"max_batch_size": 2, "max_num_batched_tokens": 256, "max_total_tokens": 400}
    )
    workload = tmp_path / "programs.jsonl"
    write_programs(workload, [map_reduce(9, prompt=150), chain(3, arrival_s=0.1), one_call(arrival_s=0.2)])
    return ["--core", core, "--engines", f"{engine}:2", "--workload", str(workload), "--max-gen-length", "8", "--no-report"]


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert explain(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert explain(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_every_placement_has_a_row_an_engine_that_was_weighed_and_the_same_seed_the_same_bytes(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = []
    for out in (tmp_path / "a", tmp_path / "b"):
        assert main([*flags, "--policy", "least_loaded", "--explain", "--out", str(out)]) == 0
        files.append((out / "least_loaded_seed0" / "placements.parquet").read_bytes())
    assert files[0] == files[1]
    table = pd.read_parquet(tmp_path / "a" / "least_loaded_seed0" / "placements.parquet")
    tasks = pd.read_parquet(tmp_path / "a" / "least_loaded_seed0" / "tasks.parquet")
    chosen = table[table["chosen"]].sort_values(["program", "call", "output"], ignore_index=True)
    assert list(chosen[["program", "call", "output"]].itertuples(index=False)) == list(
        tasks[["program", "call", "output"]].itertuples(index=False)
    )
    assert (chosen["engine"] == tasks["engine"]).all()
    assert (chosen["time_s"] == tasks["dispatched_s"]).all()
    assert (chosen["waited_s"] == tasks["dispatched_s"] - tasks["ready_s"]).all()
    assert chosen["fits"].all()
    assert chosen["waited_s"].max() > 0
    assert set(table.groupby("placement").size()) == {2}
    assert set(json.loads(table["terms"].iloc[0])) == {"reserved_tokens", "tasks"}


def test_nothing_of_it_is_written_unless_it_was_asked_for(flags: list[str], tmp_path: Path) -> None:
    assert main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert not list((tmp_path / "out").glob("*/placements.parquet"))
    assert main([*flags, "--explain", "--no-tables", "--out", str(tmp_path / "alone")]) == 0
    assert sorted(path.name for path in (tmp_path / "alone").glob("*/*")) == ["placements.parquet", "run.json"]
    assert main([*flags, "--out", str(tmp_path / "alone"), "--fresh"]) == 0
    assert not list((tmp_path / "alone").glob("*/placements.parquet")), "--fresh removes it"


def test_a_task_that_waited_is_told_behind_what_and_who_would_have_been_second(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([*flags, "--policy", "least_loaded", "--explain", "--out", out]) == 0
    capsys.readouterr()
    waited = told(capsys, out, "--task", "0/0/0")
    assert waited.startswith("task 0/0/0, call 'map' of program 'mapreduce': finished at ")
    assert "behind 8 placements: 0/1/0, 0/2/0, 0/3/0," in waited, "the deduction walks backward: the last call is queued first"
    assert "queue      3 tasks, itself included" in waited
    assert "decided    policy least_loaded" in waited
    assert "->  test/model-0  yes               158      1" in waited
    assert "test/model-0 was the best. Second: test/model-1." in waited
    first = told(capsys, out, "--task", "0/8")
    assert "waited     not at all" in first


def test_what_is_not_there_is_refused_with_what_is(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main([*flags, "--policy", "least_loaded,round_robin", "--explain", "--out", out]) == 0
    assert main([*flags, "--out", str(tmp_path / "without")]) == 0
    capsys.readouterr()
    assert "run it again with sim.run --explain" in refused(capsys, str(tmp_path / "without"), "--task", "0/0/0")
    assert "no such folder" in refused(capsys, str(tmp_path / "nowhere"), "--task", "0/0/0")
    assert "name one with --run: least_loaded_seed0, round_robin_seed0" in refused(capsys, out, "--task", "0/0/0")
    one = ["--run", "round_robin_seed0"]
    assert "programs 0 to 2 there are" in refused(capsys, out, *one, "--task", "7/0/0")
    assert "of program 1 there are 1/0/0, 1/1/0, 1/2/0" in refused(capsys, out, *one, "--task", "1/5/0")
    assert "PROGRAM/CALL/OUTPUT" in refused(capsys, out, *one, "--task", "chain")
    assert "no run 'fastest'" in refused(capsys, out, "--run", "fastest", "--task", "0/0/0")


def test_a_policy_that_fails_costs_no_run_and_is_told_everywhere(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_policy.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    try:
        assert main([*flags, "--policy", "broken_policy:Broken", "--explain", "--out", str(out)]) == 0
    finally:
        find_policy.cache_clear()
    captured = capsys.readouterr()
    summary = json.loads(captured.out)
    what = "RuntimeError in policy 'broken_policy:Broken': only final calls are understood"
    assert (summary["finished"], list(summary["policy_errors"])) == (3, [what])
    count = summary["policy_errors"][what]
    assert f"sim.run: policy broken_policy:Broken failed {count} times ({what}); least_loaded placed" in captured.err
    assert "least_loaded, because the run's policy failed on it" in told(capsys, str(out), "--task", "0/0/0")
    assert "policy broken_policy:Broken" in told(capsys, str(out), "--task", "2/0/0")
    assert "policy broken_policy:Broken" in (out / "inputs.json").read_text(), "its source is one of the run's files"


def test_a_real_cluster_explains_too(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    emulated = ["--backend", "emulated", "--policy", "least_loaded", "--set", "engine_secret=open sesame"]
    emulated += ["--set", "engine.serve_core.engine_secret=open sesame"]
    assert main([*flags, *emulated, "--explain", "--out", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["policy_errors"] == {}
    text = told(capsys, str(out), "--task", "0/9/0")
    assert "policy least_loaded" in text
    assert "call 'reduce'" in text
    table = pd.read_parquet(out / "least_loaded_seed0" / "placements.parquet")
    assert len(table[table["chosen"]]) == 14
    assert (table["program"] >= 0).all()


async def test_a_cluster_that_runs_explains_as_much_as_it_keeps(flags: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = ServeCoreConfig(global_scheduler=GlobalSchedulerConfig(policy="least_loaded", explain_placements=10))
    engine = load_engine_config(flags[3].rpartition(":")[0], {})
    async with local_cluster(config, [(engine, PROFILE)]) as (url, _):
        command = [sys.executable, "-m", "sim.run", *flags[4:], "--backend", "emulated", "--core-url", url]
        told = await asyncio.to_thread(
            subprocess.run, [*command, "--explain", "--out", str(out)], capture_output=True, text=True, check=True
        )
    assert f"4 tasks have no explanation: the core at {url} keeps its last 10 placements" in told.stderr
    table = pd.read_parquet(next(out.glob("*/placements.parquet")))
    assert len(table) == 10
    assert list(table["time_s"]) == sorted(table["time_s"])
    assert json.loads(told.stdout)["policy_errors"] == {}
