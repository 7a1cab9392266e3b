"""Programs and examples against a real core and an emulated engine of no latency, as separate processes."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from parrot import P

ROOT = Path(__file__).parents[2]
START_S = 60.0


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def core() -> Iterator[str]:
    """The address of a core with one engine."""
    serve = start("parrot.serve.http_server", "--config_path", "sample_configs/core/localhost_serve_core.json", "--port", "0")
    engine: subprocess.Popen[str] | None = None
    try:
        assert serve.stderr is not None
        line = serve.stderr.readline()
        found = re.search(r"http://\S+?:(\d+)", line)
        assert found, line
        address = f"http://localhost:{found[1]}"
        config = ["--config_path", "sample_configs/engine/emulated-zero.json", "--port", "0"]
        engine = start("parrot.engine.http_server", *config, "--serve_core", f"localhost:{found[1]}", "--release_mode")
        give_up = time.monotonic() + START_S
        while not json.load(urllib.request.urlopen(f"{address}/v1/models"))["models"]:
            assert engine.poll() is None, engine.communicate()[1]
            assert time.monotonic() < give_up
            time.sleep(0.1)
        yield address
    finally:
        for process in (engine, serve):
            if process is not None:
                stop(process)


@P.semantic_function()
def ask(q: P.Input, a: P.Output(P.SamplingConfig(max_gen_length=30)), b: P.Output(P.SamplingConfig(max_gen_length=5))):  # type: ignore[no-untyped-def,valid-type]
    """Question {{q}} answer {{a}} then {{b}} tail"""


@P.native_function()
def copy(a: P.Input, b: P.Output):  # type: ignore[no-untyped-def]
    b.set(a)


def refused(code: str, run: object, *args: object, **kwargs: object) -> None:
    with pytest.raises(P.ParrotError) as caught:
        run(*args, **kwargs)  # type: ignore[operator]
    assert caught.value.code == code


def test_outputs_variables_and_streams(core: str) -> None:
    vm = P.VirtualMachine(core)
    with vm.running_scope():
        mine, late = P.variable("mine"), P.variable("late")
        a, b = ask(late, a=mine)
        assert a is mine
        refused("timeout", b.get, timeout=0.05)
        late.set("known now")
        assert len(b.get(P.PerformanceCriteria.TPOT).split()) == 5
        assert len("".join(a.stream()).split()) == 30
        assert a.get() == a.content
        report = vm.report()
        assert report.calls == {"finished": 1}
        assert [row.output_tokens for row in P.timings(report)] == [30, 5]
        assert {v.var_name for v in vm.session.variables()} >= {"mine", "late"}
    assert vm.stat.lost_connections == 0


def test_the_cores_refusals_reach_the_program(core: str) -> None:
    vm = P.VirtualMachine(core)
    with vm.running_scope():
        a, _ = ask("x")
        refused("conflict", a.set, "mine")
        refused("conflict", ask, "y", a=a)
        again = P.variable("again")
        refused("cyclic_dependency", ask, again, a=again)
        refused("not_implemented", copy, "x")
        braces = ask("{{q}} }} {{nobody}}")[1]
        assert braces.get()
        vm.session.close()
        refused("session_closed", a.get)


def test_an_async_program_of_many_calls(core: str) -> None:
    texts: list[str] = []

    async def program() -> None:
        outputs = [await ask.ainvoke(str(number)) for number in range(20)]
        texts.extend(await asyncio.gather(*(b.aget("latency") for _, b in outputs)))
        texts.append("".join([piece async for piece in outputs[0][0].stream()]))

    P.VirtualMachine(core).run(program)
    assert [len(text.split()) for text in texts] == [5] * 20 + [30]


@pytest.mark.parametrize("example", ["hello", "map_reduce", "chain_summary", "chat", "agent"])
def test_examples_run_and_print_their_times(core: str, example: str) -> None:
    done = subprocess.run(
        [sys.executable, f"examples/{example}.py", "--core", core], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "job completion time" in done.stdout


def test_an_example_without_a_core_says_so_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "examples/hello.py", "--core", "http://localhost:1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("unavailable: no answer from the core at http://localhost:1")
    assert done.stderr.count("\n") == 1
