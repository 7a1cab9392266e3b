"""The same programs in simulation and over HTTP on real processes: the same work is done, and no process is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pandas as pd
import pytest

from parrot.configuration import ConfigurationError
from parrot.protocol.api import ParameterSpec
from parrot.protocol.template import parse_template
from sim.actions import Given, Into, Reference, Value
from sim.clients import Mode
from sim.http_client import MODEL, TOLD, Style, render, text_of
from sim.processes import Processes, free_ports
from sim.run import main
from sim.workloads.program import Program, Text, write_programs
from tests.sim.clusters import processes_with, write_files
from tests.sim.programs import chain, chat, map_reduce, one_call

KEYS = ["program", "call", "output"]


def test_pieces_become_a_template_whose_segments_stay_apart() -> None:
    pieces = (
        Text("system", 3),
        Text("question", 2),
        Reference("v", "id-7"),
        Given("x", Value("k", 2, "real text")),
        Reference("v", "id-7"),
        Into("out", 4, 16),
    )
    template, parameters = render(pieces, TOLD)
    assert len(parse_template(template, [json_parameter(p) for p in parameters])) == len(pieces)
    assert [p.get("value") for p in parameters] == [text_of(Text("question", 2), TOLD), None, "real text", None]
    assert parameters[-1]["sampling_config"].output_length == 4


@pytest.mark.parametrize("style", [TOLD, MODEL])
def test_equal_keys_are_equal_texts_of_the_length_that_was_asked_for(style: Style) -> None:
    text = text_of(Text("system", 30), style)
    assert len(text.split()) == 30
    assert text == text_of(Value("system", 30), style) != text_of(Text("other", 30), style)


def json_parameter(parameter: dict[str, object]) -> ParameterSpec:
    return msgspec.convert(msgspec.to_builtins(parameter), ParameterSpec)


def test_a_process_that_dies_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing.py").write_text("import sys; sys.exit('out of luck')")
    processes = Processes(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    try:
        processes.start("engine 3", "failing", [])
        processes.running()[0].wait(timeout=60)
        with pytest.raises(ConfigurationError, match=r"engine 3 died with status 1: out of luck"):
            processes.check()
    finally:
        processes.stop()


def test_stopping_ends_a_process_that_ignores_the_polite_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.processes.STOP_TIMEOUT_S", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "stubborn.py").write_text(
        "import signal, time, pathlib\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(60)\n"
    )
    processes = Processes(tmp_path)
    processes.start("stubborn", "stubborn", [])
    (process,) = processes.running()
    while not (tmp_path / "up").exists():
        processes.check()
        time.sleep(0.02)
    processes.stop()
    assert process.returncode == -signal.SIGKILL


def test_free_ports_are_all_different() -> None:
    assert len(set(free_ports(20))) == 20


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    core, engine = write_files(tmp_path)
    some = [
        one_call("p0"),
        chain(3, "p1", arrival_s=0.05),
        map_reduce(4, "p2", arrival_s=0.1),
        chat(2, 0.2, "p3", arrival_s=0.2),
    ]
    workload = tmp_path / "programs.jsonl"
    write_programs(workload, some)
    return ["--core", core, "--engines", f"{engine}:2", "--workload", str(workload), "--no-report"]


@pytest.mark.parametrize("mode", list(Mode))
def test_an_emulated_cluster_does_the_work_that_the_simulated_one_does(
    mode: Mode, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for backend in ("sim", "emulated"):
        out = tmp_path / backend
        given = ["--client", mode.value, "--backend", backend, "--rtt-ms", "5", "--out", str(out)]
        assert main([*flags, *given]) == 0, capsys.readouterr().err
        tables[backend] = {
            n: pd.read_parquet(out / "parrot_seed0" / f"{n}.parquet") for n in ("programs", "calls", "tasks", "gets")
        }
        line = json.loads(capsys.readouterr().out)
        assert (line["finished"], line["failed"], line["backend"]) == (4, 0, backend)
    for name, columns in {
        "programs": ["program", "id", "state", "calls", "gets"],
        "calls": [*KEYS, "name", "state", "output_tokens", "prompt_tokens"],
        "tasks": [*KEYS, "state", "attempts", "criteria", "depth", "prompt_tokens", "output_tokens"],
    }.items():
        pd.testing.assert_frame_equal(tables["emulated"][name][columns], tables["sim"][name][columns], obj=name)
    assert processes_with(str(tmp_path)) == []


def test_in_a_closed_loop_a_program_starts_when_one_before_it_has_ended(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for backend in ("sim", "emulated"):
        out = tmp_path / backend
        assert main([*flags, "--clients", "2", "--backend", backend, "--out", str(out)]) == 0, capsys.readouterr().err
        programs = pd.read_parquet(out / "parrot_clients2_seed0" / "programs.parquet").sort_values("started_s")
        started, ended = programs["started_s"].to_numpy(), programs["ended_s"].to_numpy()
        under_way = [int(((started <= at) & (ended > at)).sum()) for at in started]
        assert under_way == [1, 2, 2, 2] or under_way == [2, 2, 2, 2]
        assert list(programs["program"]) == [0, 1, 2, 3]
    capsys.readouterr()


def test_an_interrupted_run_leaves_no_process_behind(tmp_path: Path) -> None:
    core, engine = write_files(tmp_path)
    workload = tmp_path / "programs.jsonl"
    write_programs(workload, [one_call("p0"), Program("late", 600.0, one_call().calls, one_call().gets)])
    command = [sys.executable, "-m", "sim.run", "--core", core, "--engines", engine, "--workload", str(workload)]
    command += ["--backend", "emulated", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # the cluster's files lie there, and so in its command lines
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while len(processes_with(f"{tmp_path}/parrot-")) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert told.decode().splitlines()[-1] == "sim.run: interrupted"
    assert processes_with(f"{tmp_path}/parrot-") == []


def test_a_core_that_is_not_there_is_named(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    assert main([*flags, "--backend", "real", "--core-url", url, "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert url in captured.err


def test_a_clairvoyant_policy_is_refused_where_engines_are_not_told_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = Path(__file__).parents[2] / "sample_configs"
    flags = ["--core", str(samples / "core" / "localhost_serve_core.json"), "--workload", "chain", "--count", "1"]
    flags += ["--engines", str(samples / "engine" / "smollm2-135m-cpu.json"), "--policy", "clairvoyant"]
    assert main([*flags, "--backend", "real", "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert "policy 'clairvoyant' reads the true lengths of outputs" in line
    assert processes_with(f"{tmp_path}/parrot-") == []
