"""Programs' own code against simulated engines: it runs as it is, waits in virtual time, and is measured as workloads are."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import msgspec
import pytest

from parrot.serve.config import ServeCoreConfig
from sim.faults import tokenizers
from sim.network import Constant
from sim.programs.outputs import open_outputs
from sim.programs.simulated import simulate_instances
from sim.programs.source import Source, read_inputs
from tests.sim.program_runs import Runner, engines, run, says, told

__all__ = ["run"]

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_values_are_texts_and_branches_follow_them(run: Runner) -> None:
    steps = {"how": "LOOK rope", "LOOK rope": "LOOK lamp", "LOOK lamp": "DONE yes"}

    def answer(name: str, prompt: str) -> str:
        last = max(steps, key=prompt.rfind)
        return steps[last]

    recorder = run(
        """
        def main():
            said, notes = "", "how"
            while not said.startswith("DONE"):
                said = ask(notes).get()
                told.append(said)
                notes += " / " + said
        """,
        outputs=says(answer),
    )
    assert told == ["LOOK rope", "LOOK lamp", "DONE yes"]
    assert [(row.state, row.calls, row.gets) for row in recorder.programs] == [("finished", 3, 3)]
    assert [row.output_tokens for row in recorder.calls] == [2, 2, 2]


def test_a_graph_is_submitted_whole_and_its_outputs_feed_its_calls(run: Runner) -> None:
    recorder = run(
        """
        def main():
            first = ask("a b")
            second = ask(first)
            told.append(second.get("latency"))
            told.append(first.get())
        """,
        outputs=says(lambda name, prompt: f"so {len(prompt.split())} many"),
    )
    assert told == ["so 5 many", "so 4 many"]
    assert [(row.criteria, row.depth) for row in recorder.tasks] == [("latency", 1), ("latency", 0)]
    assert [get.criteria for get in recorder.gets] == ["latency", "throughput"]


def test_an_async_program_waits_for_many_outputs_at_once(run: Runner) -> None:
    recorder = run(
        """
        async def main():
            outputs = [await ask.ainvoke(str(n)) for n in range(8)]
            texts = await asyncio.gather(*(o.aget() for o in outputs))
            told.extend(texts)
            await asyncio.sleep(5)
            told.append(round(asyncio.get_running_loop().time() - time.monotonic(), 9))
        """,
        outputs=says(lambda name, prompt: prompt.split()[1]),
    )
    assert told == [*map(str, range(8)), 0.0]
    starts = {row.dispatched_s for row in recorder.tasks}
    assert len(starts) == 1, "all gets wait together"


def test_asyncio_run_and_vm_run_need_no_change(run: Runner) -> None:
    run(
        """
        vm = P.VirtualMachine("http://localhost:9000")

        async def inner():
            async with vm.running_scope():
                told.append(await (await ask.ainvoke("one")).aget())

        def main():
            asyncio.run(inner())
            told.append(vm.run(lambda: told.append(ask("two").get())) > 0)
        """,
        outputs=says(lambda name, prompt: prompt.split()[1]),
    )
    assert told == ["one", "two", True]


@pytest.mark.parametrize(
    "text",
    [
        "def wrapped(f):\n    return lambda *a: f(*a)\n\n@wrapped\nasync def main():\n    told.append(await ask('x').aget())\n",
        "class App:\n    async def __call__(self, vm):\n        told.append(await ask('x').aget())\n\nmain = App()\n",
        "async def inner():\n    told.append(await ask('x').aget())\n\ndef main(vm):\n    return inner()\n",
    ],
    ids=["decorated", "callable", "returned"],
)
def test_a_coroutine_is_run_wherever_it_comes_from(text: str, run: Runner) -> None:
    recorder = run(text, outputs=says(lambda name, prompt: "said"))
    assert told == ["said"]
    assert recorder.counts["calls_finished"] == 1


def test_a_program_that_reads_its_command_line_finds_its_own(run: Runner) -> None:
    before = list(sys.argv)
    run("import sys\n\nargv = list(sys.argv)\n\ndef main():\n    told.append([argv, sys.argv])\n")
    ((at_import, at_run),) = told
    assert at_import == at_run
    assert [Path(argument).name for argument in at_run] == ["program0.py"]
    assert sys.argv == before


def test_a_stream_gives_the_text(run: Runner) -> None:
    recorder = run(
        """
        async def more():
            vm = P.VirtualMachine()
            async with vm.running_scope():
                told.append("".join([piece async for piece in (await ask.ainvoke("y")).stream()]))

        def main():
            told.append("".join(ask("x").stream()))
            asyncio.run(more())
        """,
        outputs=says(lambda name, prompt: f"all of {prompt.split()[1]}"),
    )
    assert told == ["all of x", "all of y"]
    assert [get.returned_s is not None for get in recorder.gets] == [True, True]


def test_an_hour_of_sleep_takes_no_time(run: Runner) -> None:
    begun = time.monotonic()
    recorder = run(
        """
        from time import sleep

        def main():
            before = time.time(), time.perf_counter(), time.monotonic_ns()
            sleep(3600)
            after = time.time(), time.perf_counter(), time.monotonic_ns()
            told.append([b - a for a, b in zip(before, after)])
            ask("x").get()
        """,
        config=ServeCoreConfig(session_life_span=7200.0),
        count=3,
    )
    assert told == [[3600.0, 3600.0, 3600 * 10**9]] * 3
    assert time.monotonic() - begun < 60
    assert all(row.state == "finished" and row.ended_s > 3600 for row in recorder.programs)


def test_a_session_that_idles_expires_as_it_would(run: Runner) -> None:
    recorder = run("def main():\n    time.sleep(3600)\n    ask('x').get()\n")
    assert recorder.errors == {"session_expired": 1}


def test_instances_are_apart_from_each_other(run: Runner) -> None:
    recorder = run(
        """
        count = 0

        def main(vm):
            global count
            for _ in range(3):
                count += 1
                ask("x").get()
            told.append((count, len(vm.functions), vm.stat.requests))
        """,
        count=20,
        rate=1000.0,
    )
    assert len(told) == 20
    assert set(told) == {(3, 0, 7)}
    assert recorder.counts["finished"] == 20


def test_instances_of_one_instant_go_in_order(run: Runner) -> None:
    run("def main(n):\n    time.sleep(1.0)\n    told.append(n)\n", count=30, inputs=[f"[{n}]" for n in range(30)])
    assert told == list(range(30))


def test_a_round_trip_is_paid_for_each_request(run: Runner) -> None:
    recorder = run(
        """
        def main():
            begun = time.monotonic()
            output = ask("x")
            told.append(time.monotonic() - begun)
            output.get()
        """,
        rtt_s=0.5,
    )
    assert told == [0.5]
    (row,) = recorder.programs
    (call,) = recorder.calls
    # The open's and the call's round trips and half of the get's, the call, and the way back.
    assert row.jct_s == pytest.approx(1.5 + call.latency_s)  # type: ignore[operator]


def test_a_get_that_is_given_up_is_forgotten(run: Runner) -> None:
    recorder = run(
        """
        async def main():
            slow = P.variable("slow")
            output = await ask.ainvoke(slow)
            try:
                await asyncio.wait_for(output.aget(), 3.0)
            except TimeoutError:
                told.append(time.monotonic())
            try:
                output_again = await output.aget(timeout=2.0)
            except P.ParrotError as error:
                told.append((error.code, time.monotonic()))
            await slow.aset("quick")
            told.append(await output.aget())
        """,
        outputs=says(lambda name, prompt: "done"),
    )
    assert told == [3.0, ("timeout", 5.0), "done"]
    assert recorder.counts["finished"] == 1


def test_closed_loops_keep_as_many_under_way(run: Runner) -> None:
    recorder = run("def main():\n    time.sleep(10)\n    ask('x').get()\n", count=6, clients=2)
    starts = sorted(row.started_s for row in recorder.programs)
    assert [starts[0], starts[1]] == [0.0, 0.0]
    assert starts[2] > 10
    assert starts[4] > 20


def test_outputs_end_where_an_engine_would_end_them(run: Runner) -> None:
    recorder = run(
        """
        @P.semantic_function()
        def stops(q: P.Input, a: P.Output(P.SamplingConfig(stop_str="##", max_gen_length=50))):
            '''{{q}} {{a}}'''

        def main():
            told.append(ask("x").get())
            told.append(stops("x").get())
        """,
        outputs=says(lambda name, prompt: "word " * 30 if name == "ask" else "up to here ## and no further"),
    )
    assert told == [" ".join(["word"] * 20), "up to here "]
    assert [row.output_tokens for row in recorder.calls] == [20, 3]


def test_texts_are_tokenized_with_the_engines_tokenizer(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.programs.tokenizers.tokenizer_or_synthetic", tokenizers.load)
    (one,) = engines(1)
    halves = [one._replace(description=msgspec.structs.replace(one.description, tokenizer=tokenizers.HALVES))]
    words = " ".join(f"w{n}" for n in range(30))
    recorder = run(
        "def main():\n    told.append(ask('w7').get())\n",
        outputs=says(lambda name, prompt: words),
        engines=halves,
    )
    (call,) = recorder.calls
    assert told == [" ".join(words.split()[:10])]
    assert (call.output_tokens, call.prompt_tokens) == (20, 1 + 2 * 3)  # one at the head, two a word


def test_what_an_instance_raises_is_counted_and_shown(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = run(
        """
        def main(n):
            ask("x").get()
            if n % 2:
                raise ValueError("odd one")
        """,
        count=5,
        inputs=[f"[{n}]" for n in range(5)],
    )
    assert (recorder.counts["finished"], recorder.counts["failed"], recorder.errors) == (3, 2, {"ValueError": 2})
    assert [row.error for row in recorder.programs if row.error] == ["ValueError: odd one"] * 2
    shown = capsys.readouterr().err
    assert "2 of 5 instances" in shown
    assert "instance 1 and 1 more: Traceback" in shown
    assert 'raise ValueError("odd one")' in shown
    assert shown.count("Traceback") == 1
    assert "sim/programs" not in shown


def test_refusals_of_the_core_are_the_programs_to_see(run: Runner) -> None:
    recorder = run(
        """
        def main():
            try:
                P.variable("nobody writes me").get()
            except P.ParrotError as error:
                told.append(error.code)
            output = ask("x")
            try:
                output.set("again")
            except P.ParrotError as error:
                told.append(error.code)
            raise SystemExit(0)
        """
    )
    assert told == ["bad_request", "conflict"]
    assert recorder.counts["failed"] == 0


def test_a_full_queue_is_waited_out_and_counted(run: Runner) -> None:
    config = ServeCoreConfig()
    config = type(config)(global_scheduler=type(config.global_scheduler)(max_queue_size=1))
    recorder = run(
        "def main():\n    ask('x').get()\n    ask('y').get()\n",
        count=40,
        config=config,
        engines=engines(1, tokens_capacity=60),
    )
    assert recorder.counts["finished"] == 40
    assert recorder.counts["refused"] > 0


def test_sessions_that_a_program_leaves_open_are_closed_and_counted(run: Runner) -> None:
    recorder = run(
        """
        def main():
            vm = P.VirtualMachine("http://elsewhere:1")
            vm.register_session()
            vm.set_global_env()
            ask("x").get()
        """
    )
    assert (recorder.counts["finished"], recorder.counts["calls_finished"]) == (1, 1)


def test_examples_run_as_they_are(run: Runner) -> None:
    for name, calls in {"hello": 2, "map_reduce": 9, "chain_summary": 4, "chat": 4}.items():
        recorder = simulate_instances(
            Source(f"{EXAMPLES / name}.py:main"),
            read_inputs(None),
            3,
            ServeCoreConfig(),
            engines(2),
            outputs=open_outputs(None, 0),
            network=Constant(0.0),
        )
        assert (recorder.counts["finished"], recorder.counts["calls_finished"]) == (3, 3 * calls), name
        assert math.isfinite(recorder.last_s)
