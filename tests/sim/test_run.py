"""The command: what it prints and writes, that it repeats to the byte, and what it refuses before anything runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from parrot.serve.policies import POLICIES, SWITCHES
from sim.run import main
from sim.workloads.program import Call, Get, Program, Read, Text, Write, write_programs
from tests.sim.clusters import processes_with, write_files
from tests.sim.programs import chain, chat, map_reduce, one_call

PRINTED = ("policy", "rate", "seed", "programs", "calls", "finished", "failed", "simulated_s", "throughput_tokens_per_s")
DISTRIBUTIONS = ("ttft_s", "tpot_s", "jct_s", "normalized_latency_s")


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Flags of a small run: a core, two engines and a file of programs."""
    core, engine = write_files(tmp_path)
    some: list[Program] = []
    for number in range(5):
        at = {"name": f"p{number}", "arrival_s": number * 1.5}
        some.append(
            (one_call, lambda **k: chain(3, **k), lambda **k: map_reduce(4, **k), lambda **k: chat(2, **k))[number % 4](**at)
        )
    workload = tmp_path / "programs.jsonl"
    write_programs(workload, some)
    return ["--core", core, "--engines", f"{engine}:2", "--workload", str(workload), "--no-report"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "timing.json"
    }


def test_one_json_object_a_run_and_everything_else_elsewhere(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*flags, "--policy", "parrot:all,round_robin", "--rate", "0.5,1", "--seed", "1,2", "--out", str(out)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    lines = [line for line in printed if line["kind"] == "run"]
    assert [line["kind"] for line in printed] == ["run"] * 8 + ["cell"] * 4
    assert [(line["policy"], line["rate"], line["seed"]) for line in lines] == [
        (policy, rate, seed) for policy in ("parrot:all", "round_robin") for rate in (0.5, 1.0) for seed in (1, 2)
    ]
    for line in lines:
        assert set(PRINTED) <= set(line)
        assert (line["programs"], line["finished"], line["failed"]) == (5, 5, 0)
        assert all(set(line[name]) == {"mean", "p50", "p90", "p99"} for name in DISTRIBUTIONS)
    timing = json.loads((out / "timing.json").read_text())
    assert timing["wall_s"] > 0
    assert [(r["policy"], r["rate"], r["seed"]) for r in timing["runs"]] == [(x["policy"], x["rate"], x["seed"]) for x in lines]
    programs = pd.read_parquet(out / "round_robin_rate1_seed2" / "programs.parquet")
    assert programs["jct_s"].mean() == pytest.approx(lines[-1]["jct_s"]["mean"])


def test_the_same_seed_writes_the_same_bytes_under_every_policy_however_many_workers(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies = [*POLICIES, "parrot:all", *(f"parrot:{switch}" for switch in SWITCHES)]
    printed, written = [], []
    for number, workers in enumerate(("1", "2", "1")):
        out = tmp_path / f"out{number}"
        sweep = ["--policy", ",".join(policies), "--rtt-ms", "40", "--workers", workers, "--out", str(out)]
        assert main([*flags, *sweep]) == 0
        printed.append(capsys.readouterr().out)
        written.append(files_of(out))
    assert printed[0] == printed[1] == printed[2]
    assert written[0] == written[1] == written[2]
    assert len(written[0]) == len(policies) * 6 + 4


def test_stepping_prints_what_jumping_prints(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for way in ("--jump", "--step"):
        assert main([*flags, way, "--out", str(tmp_path / way)]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_specification_file_says_what_the_flags_say(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core, engine, workload = flags[1], flags[3].rpartition(":")[0], flags[5]
    spec = {
        "core": core,
        "engines": [{"file": engine, "count": 2}],
        "workloads": [workload],
        "policies": ["round_robin"],
        "client": "request",
        "settings": {"global_scheduler.max_queue_size": [32]},
    }
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec))
    out = ["--out", str(tmp_path / "out")]
    assert main(["--spec", str(file), *out]) == 0
    from_file = capsys.readouterr().out
    same = [*flags, "--policy", "round_robin", "--client", "request", "--set", "global_scheduler.max_queue_size=32", *out]
    assert main(same) == 0
    assert capsys.readouterr().out == from_file


def test_settings_reach_the_core_and_the_engines_and_lists_of_them_are_swept(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    swept = ["--set", "engine.scheduler.max_batch_size=1,8", "--max-gen-length", "32", "--no-tables"]
    assert main([*flags, *swept, "--rate", "50", "--out", str(tmp_path / "out")]) == 0
    narrow, wide = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert narrow["settings"] == {"engine.scheduler.max_batch_size": 1}
    assert narrow["jct_s"]["mean"] > wide["jct_s"]["mean"]


REFUSALS = {
    "unknown policy": (["--policy", "fastest"], "fastest"),
    "unknown parameter of a policy": (["--policy", "round_robin:speed=1"], "core.json, policy 'round_robin:speed=1': global_"),
    "parameter of the wrong kind": (["--policy", "parrot:ctx_weight=much"], "expected float of at least 0"),
    "class that is no policy": (["--policy", "json:JSONDecoder"], "'json:JSONDecoder' is no policy: it has no method place"),
    "class that is not there": (["--policy", "json:Decoder"], "'json:Decoder' cannot be loaded"),
    "unknown switch": (["--policy", "parrot:speed"], "speed"),
    "rate of zero": (["--rate", "0"], "rate 0"),
    "negative rate": (["--rate", "-1"], "rate -1"),
    "rate that is no number": (["--rate", "fast"], "fast"),
    "no programs": (["--count", "0"], "count 0"),
    "no such workload": (["--workload", "nothing.jsonl"], "nothing.jsonl"),
    "no such core file": (["--core", "nowhere.json"], "nowhere.json"),
    "no such engine file": (["--engines", "nowhere.json"], "nowhere.json"),
    "no engine of a file": (["--engines", "nowhere.json:0"], "count 0"),
    "unknown key of the core": (["--set", "global_scheduler.speed=1"], "speed"),
    "unknown key of the engines": (["--set", "engine.speed=1"], "speed"),
    "policy as a setting": (["--set", "global_scheduler.policy=round_robin,random"], "policies (--policy)"),
    "seed as a setting": (["--set", "global_scheduler.random_seed=1"], "seeds (--seed)"),
    "setting of a running cluster": (
        ["--core-url", "http://localhost:1", "--backend", "real", "--set", "global_scheduler.app_fifo=true"],
        "--set global_scheduler.app_fifo: the cluster at http://localhost:1",
    ),
    "policies of a running cluster": (
        ["--core-url", "http://localhost:1", "--backend", "real", "--policy", "parrot,random"],
        "the cluster at http://localhost:1 has one of its own",
    ),
    "setting that is none": (["--set", "speed"], "KEY=VALUE"),
    "no such profile": (["--profile", "nothing.json"], "nothing.json"),
    "round trips that are none": (["--rtt-ms", "nothing.json"], "nothing.json"),
    "no arrivals of that name": (["--arrivals", "gama:2"], "gama:2"),
    "closed loop of nobody": (["--clients", "0"], "clients 0"),
    "closed loop with a rate": (["--clients", "2", "--rate", "1"], "no rate"),
    "objective that is none": (["--objectives", "jct=2"], "jct_s=SECONDS"),
    "objective below zero": (["--objectives", "jct_s=-2"], "jct_s=-2"),
    "metric that is none": (["--metrics", "jct_s.p95"], "jct_s.p99"),
    "confidence that is none": (["--confidence", "95"], "confidence 95"),
    "no repeat": (["--repeats", "0"], "repeats 0: at least 1 is needed"),
    "outputs of no token": (["--max-gen-length", "0"], "max_gen_length 0: at least 1 is needed"),
    "a delay below 0": (["--engine-delay-ms", "-0.5"], "engine_delay_ms -0.5: at least 0 is needed"),
    "one draw": (["--intervals", "1"], "intervals 1"),
    "draws of a real cluster": (["--intervals", "2", "--backend", "emulated"], "backend is emulated"),
    "no count of engines": (["--engines", "engine.json:1,0"], "count 0"),
    "seed that is no whole number": (["--seed", "1.5"], "whole numbers"),
    "negative seed": (["--seed", "-1"], "seed -1"),
    "no workers": (["--workers", "0"], "--workers 0"),
    "the same run twice": (["--policy", "parrot,parrot"], "run parrot_seed0 twice"),
    "running cluster in simulation": (["--core-url", "http://localhost:1"], "core_url"),
}


@pytest.mark.parametrize("wrong", list(REFUSALS))
def test_what_cannot_run_is_refused_in_one_line_before_anything_is_printed(
    wrong: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, named = REFUSALS[wrong]
    assert main([*flags, *given, "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err


def refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], *given: str) -> str:
    assert main([*flags, *given, "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_malformed_line_of_a_workload_is_named(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(flags[5], "a") as file:
        file.write('{"id": "x"}\n')
    assert "programs.jsonl:6" in refused(flags, tmp_path, capsys)


def test_a_file_that_holds_no_programs_is_refused_with_what_was_expected(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mix = tmp_path / "mix.json"
    mix.write_text('{\n  "parts": []\n}\n')
    told = refused([*flags, "--workload", str(mix)], tmp_path, capsys)
    assert f"{mix}:1: " in told
    assert "mix:PATH" in told


def test_a_program_that_cannot_run_is_refused_before_the_first_is_run(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def simulate(*_: object, **__: object) -> object:
        raise AssertionError("a run has begun")

    monkeypatch.setattr("sim.sweep.simulate", simulate)
    last = tmp_path / "last.jsonl"
    write_programs(last, [*(one_call(f"p{n}", float(n)) for n in range(20)), one_call("large", 20.0, prompt=10**6)])
    assert f"{last}:21: program 'large', call 0" in refused([*flags, "--workload", str(last)], tmp_path, capsys)


def test_an_engine_with_no_profile_is_refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, engine = write_files(tmp_path, latency_profile=None)
    assert "no latency profile of 'test/model'" in refused([*flags[:3], engine, *flags[4:]], tmp_path, capsys)


def test_a_profile_of_another_model_is_refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, engine = write_files(tmp_path, model="other/model")
    told = refused([*flags[:3], engine, *flags[4:]], tmp_path, capsys, "--profile", str(tmp_path / "profile.json"))
    assert "other/model" in told
    assert "test/model" in told


def test_an_engine_whose_file_names_a_profile_of_another_model_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, engine = write_files(tmp_path, model="other/model")
    told = refused([*flags[:3], engine, *flags[4:]], tmp_path, capsys)
    assert "'other/model'" in told
    assert "profile.json is of 'test/model'" in told


def test_a_truncated_trace_is_refused_with_its_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,48,10\n2023-11-16 18:17")
    assert "trace.csv:3" in refused(flags, tmp_path, capsys, "--workload", f"azure:{trace}")
    assert "trace.csv:3" in refused(flags, tmp_path, capsys, "--workload", f"azure:{trace}", "--policy", "parrot,round_robin")


@pytest.mark.parametrize("key", ["engine.scheduler.max_total_tokens", "engine.instance.num_kv_cache_blocks"])
def test_an_engine_whose_memory_is_too_small_for_one_prompt_is_refused(
    key: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(flags, tmp_path, capsys, "--set", f"{key}=2", "--workload", "chat")
    assert "chat: program" in told
    assert "the largest engine takes" in told


def test_a_model_that_no_engine_has_is_refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = one_call("p")
    call = type(program.calls[0])(program.calls[0].segments, models=("rare/model",))
    write_programs(flags[5], [Program("p", 0.0, (call,), program.gets)])
    told = refused(flags, tmp_path, capsys)
    assert "rare/model" in told
    assert "test/model" in told


def test_an_engine_too_small_for_one_prompt_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_programs(flags[5], [one_call("p", prompt=4096, output=1)])
    assert "4096" in refused(flags, tmp_path, capsys)


def test_the_line_of_a_trace_that_does_not_fit_is_named(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    azure, mooncake = tmp_path / "trace.csv", tmp_path / "trace.jsonl"
    head = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,48,10\n\n"
    azure.write_text(head + "2023-11-16 18:17:04,900000,10\n")
    assert f"{azure}:4: program 'trace/1', call 0: its prompt has 900000" in refused(
        flags, tmp_path, capsys, "--workload", f"azure:{azure}", "--rate", "3"
    )
    request = '{{"timestamp": 0, "input_length": {0}, "output_length": 5, "hash_ids": {1}}}\n'
    mooncake.write_text(request.format(9, [1]) + request.format(5120, list(range(10))))
    assert f"{mooncake}:2: program 'trace/1', call 0: its prompt has 5120" in refused(
        flags, tmp_path, capsys, "--workload", f"mooncake:{mooncake}:merge=true"
    )


def test_a_call_that_reads_its_own_output_too_early_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = Call((Text("a", 3), Read("v"), Write("v", 3)))
    write_programs(flags[5], [Program("p", 0.0, (call,), (Get("g", "v"),))])
    assert "'v'" in refused(flags, tmp_path, capsys)


def test_an_unwritable_output_is_refused(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    assert main([*flags, "--out", str(file / "below")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["timing.json", "cells.jsonl"])
def test_a_file_that_cannot_be_written_at_the_end_is_named_in_one_line(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    assert main([*flags, "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"sim.run: {tmp_path / 'out' / name}: cannot be written: Is a directory\n"
    assert list((tmp_path / "out").rglob("*.partial")) == []


def test_a_reader_of_stdout_that_leaves_ends_the_sweep_and_what_is_finished_stays(flags: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    given = ["--policy", "parrot,random", "--workers", "1", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "sim.run", *flags, *given]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert done.stderr.startswith("sim.run: nobody reads stdout any more; 1 finished runs are kept in ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_an_interrupted_sweep_leaves_no_worker_behind(signal_name: str, flags: list[str], tmp_path: Path) -> None:
    long = ["--workload", "chat", "--count", "2000000", "--policy", "parrot,round_robin", "--workers", "2"]
    command = [sys.executable, "-m", "sim.run", *flags, *long, "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while len(processes_with(str(tmp_path))) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(getattr(signal, signal_name))
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert told.decode().startswith("sim.run: interrupted")
    assert told.count(b"\n") == 1
    assert processes_with(str(tmp_path)) == []
