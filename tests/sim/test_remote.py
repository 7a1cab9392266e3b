"""Engines behind remote endpoints in simulation: the law of their profile, their limits, and their place beside others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pandas as pd
import pytest

from parrot.engine.core import EngineLimits
from parrot.latency import OutOfRange
from parrot.latency_profile import Hinge
from parrot.protocol.engine import EngineDescription
from parrot.remote_profile import RemoteProfile
from parrot.serve.config import ServeCoreConfig
from sim.clients import Mode
from sim.engine_models import EngineModel
from sim.network import Constant
from sim.population import simulate
from sim.recorder import Recorder
from sim.run import main
from sim.workloads import open_workload
from sim.workloads.program import Call, Get, Program, Read, Text, Write, write_programs
from tests.sim.clusters import PROFILE, engine, write_files
from tests.sim.programs import map_reduce

LAW = RemoteProfile(
    name="law",
    model="gpt",
    endpoint="http://there/v1",
    ttft_s=0.2,
    ttft_prompt=(Hinge(0, 0.001),),
    ttft_load=(Hinge(0, 0.05),),
    tpot_s=0.01,
    tpot_load=(Hinge(0, 0.01),),
    end_s=0.004,
    seen={"prompt_tokens": (1, 4000), "load": (1, 64)},
    ttft_residuals=(-0.5, 0.0, 0.5),
    tpot_residuals=(-0.2, 0.0, 0.2),
)
LIMITS = EngineLimits(4096, 16, 64, 4096, 65536, 64, 65536)


def remote(name: str = "r0", rates: tuple[int | None, int | None] = (None, None), **fields: object) -> EngineModel:
    description = EngineDescription(
        engine_name=name,
        model="gpt",
        tokenizer="test/tokenizer",
        host="h",
        port=1 + sum(name.encode()),
        engine_type="openai",
        tasks_capacity=64,
        tokens_capacity=1 << 20,
        max_seq_len=65536,
        accepts_output_length=True,
    )
    return EngineModel(msgspec.structs.replace(description, **fields), LIMITS, LAW, rates=rates)


def run(some: Sequence[Program], *engines: EngineModel, **options: object) -> Recorder:
    return simulate(some, ServeCoreConfig(), engines or [remote()], network=Constant(0.0), **options)  # type: ignore[arg-type]


def call(prompt: int = 100, output: int = 11, **fields: object) -> Call:
    return Call((Text("prompt", prompt), Write("answer", output)), **fields)  # type: ignore[arg-type]


def program(number: int = 0, at: float = 0.0, **fields: object) -> Program:
    return Program(f"p{number}", at, (call(**fields),), (Get("get", "answer"),))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", list(Mode))
def test_a_call_takes_what_the_profile_says(mode: Mode) -> None:
    recorder = run([program()], mode=mode)
    (task,) = recorder.tasks
    assert (task.started_s, task.engine, task.cached_tokens) == (0.0, "r0", 0)
    assert task.first_token_s == pytest.approx(0.35)
    assert task.decode_s == pytest.approx(10 * 0.02)
    assert recorder.programs[0].jct_s == pytest.approx(0.35 + 0.2 + 0.004)


def test_load_slows_requests_down_and_no_memory_limits_them() -> None:
    recorder = run([program(number, prompt=3000) for number in range(40)])
    assert all(task.started_s == 0.0 for task in recorder.tasks)
    firsts = sorted(task.first_token_s or 0.0 for task in recorder.tasks)
    assert firsts == pytest.approx([3.25 + 0.05 * number for number in range(40)])


def test_limits_a_minute_hold_in_any_minute() -> None:
    recorder = run([program(number) for number in range(40)], remote(rates=(12, None)))
    sent = sorted(task.started_s or 0.0 for task in recorder.tasks)
    assert max(sum(at <= other < at + 60.0 for other in sent) for at in sent) == 12
    assert recorder.counts["finished"] == 40


def both() -> list[EngineModel]:
    return [engine("local"), remote()]


def test_models_route_between_engines_of_ours_and_remote_ones() -> None:
    mixed = Program(
        "p",
        0.0,
        (
            Call((Text("a", 50), Write("draft", 20)), models=("test/model",)),
            Call((Text("b", 50), Read("draft"), Write("better", 20)), models=("gpt",)),
            Call((Text("c", 50), Read("better"), Write("last", 20))),  # any model: engines of ours, where there are some
        ),
        (Get("get", "last"),),
    )
    recorder = run([mixed], *both())
    assert [task.engine for task in sorted(recorder.tasks, key=lambda task: task.call)] == ["local", "r0", "local"]
    assert recorder.counts["finished"] == 1


def test_the_type_of_a_call_chooses_among_engines_of_one_model() -> None:
    engines = [engine("local"), remote(model="test/model")]
    for model_type, name in (("token_id", "local"), ("text", "r0"), (None, "local")):
        (task,) = run([program(model_type=model_type)], *engines).tasks
        assert task.engine == name


@pytest.mark.parametrize("mode", list(Mode))
def test_a_mixed_cluster_finishes_everything_and_jumping_is_stepping(mode: Mode) -> None:
    programs = list(open_workload("map_reduce:chunks=4,chunk_tokens=100", rate=2.0, count=12))
    split = [
        msgspec.structs.replace(p, calls=tuple(msgspec.structs.replace(c, models=("gpt",)) for c in p.calls)) if n % 2 else p
        for n, p in enumerate(programs)
    ]
    jump, step = (run(split, *both(), mode=mode, jump=jump) for jump in (True, False))
    assert jump.counts["finished"] == 12
    assert {task.engine for task in jump.tasks} == {"local", "r0"}
    assert jump.tasks == step.tasks
    assert jump.programs == step.programs


def test_beyond_the_profile_is_told_and_strict_refuses() -> None:
    narrow = remote()._replace(profile=msgspec.structs.replace(LAW, seen={"prompt_tokens": (1, 500), "load": (1, 4)}))
    programs = [program(number) for number in range(9)]
    assert run(programs, narrow).outside == {"law": {"load": (9.0, 1.0, 4.0)}}
    with pytest.raises(OutOfRange, match="'law' was fitted to requests with load from 1 to 4; this run asks for 5"):
        run(programs, narrow, strict=True)
    with pytest.raises(OutOfRange, match="requests with prompt_tokens from 1 to 500; this run asks for 600"):
        run([program(prompt=600)], narrow, strict=True)


# --------------------------------------------------------------------------------------------------------- the command


def files(folder: Path, **fields: object) -> list[str]:
    """Flags of a cluster of one remote engine, whose file has these fields, and an engine's of ours beside it."""
    core, _ = write_files(folder)
    (folder / "remote-profile.json").write_bytes(msgspec.json.encode(LAW))
    config = {
        "model": "gpt",
        "engine_name": "remote",
        "engine_type": "openai",
        "tokenizer": "synthetic",
        "latency_profile": "remote-profile.json",
        "instance": {"base_url": "http://there/v1", "max_seq_len": 60000},
        "scheduler": {"max_total_tokens": 60000},
        **fields,
    }
    (folder / "remote.json").write_text(json.dumps(config))
    return ["--core", core, "--workload", str(folder / "programs.jsonl"), "--no-report"]


def workload(folder: Path, programs: Sequence[Program]) -> None:
    write_programs(folder / "programs.jsonl", programs)


def contents(folder: Path) -> dict[str, bytes]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timing.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = files(tmp_path)
    workload(tmp_path, [map_reduce(4, name=f"p{number}", arrival_s=number / 2) for number in range(5)])
    flags += ["--engines", str(tmp_path / "remote.json")]
    written = []
    for name in ("a", "b"):
        assert main([*flags, "--out", str(tmp_path / name), "--seed", "3", "--intervals", "2"]) == 0
        written.append(contents(tmp_path / name))
        capsys.readouterr()
    assert written[0] == written[1]


def test_requests_deviate_only_in_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = files(tmp_path)
    workload(tmp_path, [program(number, at=10.0 * number) for number in range(20)])
    flags += ["--engines", str(tmp_path / "remote.json"), "--out", str(tmp_path / "out"), "--intervals", "2"]
    assert main(flags) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_draw = {line["draw"]: line["ttft_s"] for line in lines if line["kind"] == "run"}
    assert by_draw[None]["p50"] == pytest.approx(by_draw[None]["p99"]) == pytest.approx(0.35)
    assert by_draw[1]["p99"] > 1.3 * by_draw[1]["p50"]
    assert by_draw[1] != by_draw[2]


def refused(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    capsys.readouterr()
    assert main(list(flags)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_a_profile_of_the_other_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*files(tmp_path, latency_profile="profile.json"), "--out", str(tmp_path / "out")]
    workload(tmp_path, [program()])
    remote_file, ours = str(tmp_path / "remote.json"), str(tmp_path / "engine.json")
    told = refused(capsys, *flags, "--engines", remote_file)
    assert "latency_profile 'profile.json' is of iterations of 'test/model'" in told
    assert "needs one of requests, which sim.calibrate fits to its request log" in told
    files(tmp_path)
    told = refused(capsys, *flags, "--engines", remote_file, "--profile", str(tmp_path / "profile.json"))
    assert "no --profile is of requests to it" in told
    assert "profile.json is of 'test/model' (iterations)" in told
    _, ours = write_files(tmp_path, engine_type="builtin", latency_profile="remote-profile.json")
    told = refused(capsys, *flags, "--engines", ours)
    assert "is of requests to http://there/v1, for an engine behind a remote endpoint (engine_type 'openai')" in told
    files(tmp_path, model="gpt-5")
    told = refused(capsys, *flags, "--engines", remote_file)
    assert "runs 'gpt-5', but its latency_profile" in told
    files(tmp_path, latency_profile=None)
    told = refused(capsys, *flags, "--engines", remote_file)
    assert "no latency profile of 'gpt' behind an endpoint; give --profile FILE" in told
    assert not (tmp_path / "out" / "summary.jsonl").exists()


def test_a_call_for_which_no_engine_is_of_its_type_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*files(tmp_path), "--engines", str(tmp_path / "remote.json"), "--out", str(tmp_path / "out")]
    workload(tmp_path, [program(model_type="token_id")])
    told = refused(capsys, *flags)
    assert "needs model any of model_type token_id (an engine of this project), which no engine has" in told
    workload(tmp_path, [program(prompt=60000)])
    assert "its prompt has 60000 tokens; the largest engine takes 60000 with at least one generated" in refused(capsys, *flags)


def test_an_application_s_own_code_reaches_remote_engines_by_their_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "app.py").write_text(
        "from parrot import P\n"
        'vm_function = P.semantic_function(model_type="text")\n'
        "@vm_function\n"
        "def answer(question: P.Input, reply: P.Output(P.SamplingConfig(max_gen_length=20))):\n"
        '    """Answer {{question}} now: {{reply}}"""\n'
        "def main():\n"
        '    return answer("why").get()\n'
    )
    flags = [flag for flag in files(tmp_path) if flag not in ("--workload", str(tmp_path / "programs.jsonl"))]
    flags += ["--engines", str(tmp_path / "remote.json"), str(tmp_path / "engine.json"), "--out", str(tmp_path / "out")]
    assert main([*flags, "--program", f"{tmp_path / 'app.py'}:main", "--count", "3"]) == 0
    (line,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (line["finished"], line["failed"]) == (3, 0)
    tasks = pd.read_parquet(next((tmp_path / "out").glob("*/tasks.parquet")))
    assert set(tasks["engine"]) == {"remote"}


def test_the_emulated_cluster_places_alike_and_keeps_the_same_limits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    instance = {"base_url": "http://there/v1", "max_seq_len": 60000, "requests_per_minute": 60}
    flags = files(tmp_path, instance=instance)
    programs = [
        program(number, prompt=20, output=3, models=("gpt",) if number % 4 else ("test/model",)) for number in range(17)
    ]
    workload(tmp_path, programs)
    flags += ["--engines", str(tmp_path / "remote.json"), str(tmp_path / "engine.json")]
    placed, sent = {}, {}
    for backend in ("sim", "emulated"):
        out = tmp_path / backend
        assert main([*flags, "--backend", backend, "--out", str(out)]) == 0
        line = json.loads(capsys.readouterr().out.splitlines()[0])
        assert (line["finished"], line["output_tokens"], line["prompt_tokens"]) == (17, 51, 340)
        tasks = pd.read_parquet(next(out.glob("*/tasks.parquet"))).sort_values("program")
        placed[backend] = tasks["engine"].tolist()
        sent[backend] = sorted(tasks[tasks["engine"] == "remote"]["started_s"])
    assert placed["sim"] == placed["emulated"]
    assert sent["sim"] == pytest.approx([0.0] * 10 + [1.0, 2.0])  # ten at once, then one a second
    assert sent["emulated"][11] - sent["emulated"][0] > 0.5  # in real time it may come late, but not at once


def test_a_profile_that_is_of_nothing_known_is_refused_with_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*files(tmp_path), "--engines", str(tmp_path / "remote.json"), "--out", str(tmp_path / "out")]
    workload(tmp_path, [program()])
    (tmp_path / "remote-profile.json").write_text(json.dumps({**json.loads(msgspec.json.encode(LAW)), "tpot_s": -1}))
    assert "key 'tpot_s' is -1" in refused(capsys, *flags)
    (tmp_path / "remote-profile.json").write_text(msgspec.json.encode(PROFILE).decode()[:-9])
    assert "not valid JSON" in refused(capsys, *flags)
