"""Programs against a core: calls, variables, sessions, blocking and async."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from parrot import P

from .fake_server import FakeServer


@P.semantic_function()
def ask(question: P.Input, answer: P.Output(P.SamplingConfig(max_gen_length=9))):  # type: ignore[no-untyped-def,valid-type]
    """Q {{question}} A {{answer}}. And so on."""


@P.semantic_function(output_criteria="TTFT", models=["m"])
def two(first: P.Output, second: P.Output):  # type: ignore[no-untyped-def]
    """1 {{first}} 2 {{second}}"""


@P.native_function(timeout=2.0)
def concat(a: P.Input, b: P.Input, c: P.Output):  # type: ignore[no-untyped-def]
    c.set(a + b)


def test_a_program_pipes_variables_and_its_session_is_closed(server: FakeServer, vm: P.VirtualMachine) -> None:
    seen: list[str] = []

    def program(topic: str) -> None:
        first = ask(topic)
        second = ask(question=first)
        assert not first.is_ready
        assert first.is_registered
        assert first.name == "answer"
        seen.append(second.get(P.PerformanceCriteria.LATENCY))
        seen.append(first.get("throughput"))
        assert (first.is_ready, first.content) == (True, seen[1])

    seconds = vm.run(program, args=["cats"])
    assert seconds == vm.stat_run_time > 0
    assert seen == ["[Q [Q cats A ] A ]", "[Q cats A ]"]
    assert server.criteria == ["latency", "throughput"]
    assert not server.open_sessions
    assert not vm.session_registered
    assert vm.session_id is None


def test_what_is_sent_is_the_functions_own(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        outputs = two()
        ask(12.5)
    assert [v.name for v in outputs] == ["first", "second"]
    call = server.calls[0]
    assert (call.func_name, call.models, call.output_criteria, call.template) == (
        "two",
        ["m"],
        "TTFT",
        "1 {{first}} 2 {{second}}",
    )
    assert server.calls[1].parameters[0].value == "12.5"
    sampling = server.calls[1].parameters[1].sampling_config
    assert sampling is not None
    assert sampling.max_gen_length == 9


def test_every_post_carries_a_key_of_its_own(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        v = P.variable("x")
        ask(v)
        v.set("1")
    assert len(server.keys) == 4
    assert None not in server.keys
    assert len(set(server.keys)) == 4


def test_variables_given_for_outputs_and_inputs_are_the_ones_used(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        question, answer = P.variable("question"), P.variable("mine")
        assert not question.is_registered
        result = ask(question, answer=answer)
        assert result is answer
        assert question.is_registered
        question.set("late")
        assert question.is_ready
        assert answer.get() == "[Q late A ]"
        assert answer.name == "mine"


def test_a_ready_variable_is_sent_once_by_value_and_then_by_id(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        shared = P.variable("shared", content=42)
        assert shared.get() == "42"
        ask(shared)
        ask(shared)
    assert server.calls[0].parameters[0].value == "42"
    assert server.calls[1].parameters[0].var_id == shared.id
    assert server.work["create"] == 0


def test_a_result_of_an_earlier_session_is_an_input_by_value(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        old = ask("a")
        unread = ask("b")
        old.get()
    with vm.running_scope():
        assert ask(old).get() == "[Q [Q a A ] A ]"
        with pytest.raises(P.ParrotError, match="another session"):
            ask(unread)
        with pytest.raises(P.ParrotError, match="was closed") as caught:
            unread.get()
    assert caught.value.code == "session_closed"


def test_a_second_set_is_a_conflict_here_and_at_the_core(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        v = P.variable("x", content="1")
        with pytest.raises(P.ParrotError) as here:
            v.set("2")
        produced = ask("a")
        ask(produced).get()
        with pytest.raises(P.ParrotError) as there:
            produced.set("mine")
    assert here.value.code == there.value.code == "conflict"


def test_a_variable_that_nobody_writes_cannot_be_fetched() -> None:
    with pytest.raises(P.ParrotError, match="no session knows it"):
        P.variable("x").get()


def test_a_failed_producer_is_raised_with_its_code_and_the_program_goes_on(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        with pytest.raises(P.ParrotError, match="said no") as caught:
            ask("FAIL").get()
        assert caught.value.code == "generation_failed"
        assert caught.value.info.details == {"prompt": "Q FAIL A "}
        assert ask("fine").get() == "[Q fine A ]"


def test_a_timeout_cancels_nothing(server: FakeServer, vm: P.VirtualMachine) -> None:
    server.hold.clear()
    with vm.running_scope():
        v = ask("a")
        with pytest.raises(P.ParrotError) as caught:
            v.get(timeout=0.01)
        assert caught.value.code == "timeout"
        server.hold.set()
        assert v.get() == "[Q a A ]"


def test_an_unknown_criteria_is_refused_before_anything_is_sent(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        v = ask("a")
        with pytest.raises(P.ParrotError, match="TPOT"):
            v.get("fast")
    assert server.criteria == []


def test_a_programs_own_exception_comes_through_and_the_session_is_closed(server: FakeServer, vm: P.VirtualMachine) -> None:
    def program() -> None:
        ask("a")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vm.run(program)

    async def aprogram() -> None:
        await ask.ainvoke("a")
        raise KeyError("async")

    with pytest.raises(KeyError, match="async"):
        vm.run(aprogram)
    assert not server.open_sessions
    assert isinstance(ask("now"), P.Call)


def test_async_programs_run_and_get_may_be_awaited(server: FakeServer, vm: P.VirtualMachine) -> None:
    seen: list[str] = []

    async def program(n: int) -> None:
        variables = [await ask.ainvoke(str(i)) for i in range(n)]
        seen.extend(await asyncio.gather(*(v.aget() for v in variables)))
        seen.append(await ask("plain").get(P.PerformanceCriteria.TTFT))
        late = P.variable("late")
        answer = await ask.ainvoke(late, answer=P.variable("mine"))
        await late.aset("x")
        seen.append(await answer.get())

    assert vm.run(program, args=[20]) > 0
    assert seen == [f"[Q {i} A ]" for i in range(20)] + ["[Q plain A ]", "[Q x A ]"]
    assert vm.run(program(0)) > 0
    assert not server.open_sessions


async def test_a_scope_in_a_running_loop(server: FakeServer, vm: P.VirtualMachine) -> None:
    async with vm.running_scope():
        assert vm.session_registered
        v = await ask.ainvoke("a")
        assert await v.aget() == "[Q a A ]"
        assert (await vm.areport()).state == "open"
    assert not server.open_sessions
    with pytest.raises(RuntimeError, match="async with"):
        vm.run(_nothing)


async def test_a_blocking_scope_in_a_running_loop_works_too(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        assert await ask("a").get() == "[Q a A ]"
    await asyncio.sleep(0)
    assert not server.open_sessions


async def _nothing() -> None: ...


def test_text_streams_piece_by_piece(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        v = ask("stream")
        pieces = list(v.stream())
        assert len(pieces) > 3
        assert "".join(pieces) == v.content == "[Q stream A ]"
        assert list(v.stream()) == [v.content]
        again = ask("more")
        assert "".join(again.stream()) == again.content
    assert vm.stat.lost_connections == 0


def test_text_streams_in_async_programs(server: FakeServer, vm: P.VirtualMachine) -> None:
    async def program() -> None:
        v = await ask.ainvoke("stream")
        assert [piece async for piece in v.stream("TTFT")] == ["[Q ", "str", "eam", " A ", "]"]
        assert v.is_ready

    vm.run(program)


def test_a_stream_of_a_failed_variable_raises_its_error(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope(), pytest.raises(P.ParrotError) as caught:
        list(ask("FAIL").stream())
    assert caught.value.code == "generation_failed"


def test_a_native_function_is_parsed_and_the_cores_refusal_is_clear(server: FakeServer, vm: P.VirtualMachine) -> None:
    assert isinstance(concat("a", "b"), P.Call)
    with vm.running_scope(), pytest.raises(P.ParrotError, match="not run by this core") as caught:
        concat("a", b="b")
    assert caught.value.code == "not_implemented"
    body = server.requests[-2][2]
    assert body["func_name"] == "concat"
    assert body["timeout"] == 2.0
    assert body["func_code"]


def test_functions_are_defined_and_imported_by_name(server: FakeServer, vm: P.VirtualMachine) -> None:
    function = vm.define_function(
        None, "x {{a}} {{b}}", [P.Parameter("a", P.ParamType.INPUT_PYOBJ), P.Parameter("b", P.ParamType.OUTPUT_LOC)]
    )
    named = vm.define_function("named", "x {{b}}", [P.Parameter("b", P.ParamType.OUTPUT_LOC)], models=["m"])
    assert function.name.startswith("anonymous")
    assert vm.functions["named"] is named
    assert vm.import_function("ask", "tests.frontend.test_programs").name == "ask"
    for name, module, code in [
        ("nobody", __name__, "not_found"),
        ("ask", "no_module", "not_found"),
        ("FakeServer", __name__, "bad_request"),
    ]:
        with pytest.raises(P.ParrotError) as caught:
            vm.import_function(name, module)
        assert caught.value.code == code
    with vm.running_scope():
        assert function([1, 2]).get() == "[x [1, 2] ]"

        @P.semantic_function()
        def inside(x: P.Output):  # type: ignore[no-untyped-def]
            """hi {{x}}"""

        @P.semantic_function(try_register=False)
        def hidden(x: P.Output):  # type: ignore[no-untyped-def]
            """hi {{x}}"""

    assert vm.functions["inside"] is inside
    assert "hidden" not in vm.functions


def test_sessions_and_environment_by_hand(server: FakeServer, vm: P.VirtualMachine) -> None:
    vm.register_session()
    assert server.open_sessions == {vm.session_id}
    with pytest.raises(P.ParrotError, match="registered already"):
        vm.register_session()
    vm.set_global_env()
    assert ask("a").get() == "[Q a A ]"
    with vm.running_scope():
        ask("b")
    assert vm.session_registered
    vm.unset_global_env()
    vm.unset_global_env()
    assert isinstance(ask("c"), P.Call)
    vm.unregister_session()
    assert not server.open_sessions
    vm.set_global_env()
    with pytest.raises(P.ParrotError, match="no session is registered"):
        ask("d")
    vm.unset_global_env()


def test_machines_in_threads_do_not_meet(server: FakeServer) -> None:
    gate = threading.Barrier(3)
    seen: dict[int, str] = {}

    def work(number: int) -> None:
        machine = P.VirtualMachine(server.address)
        with machine.running_scope():
            gate.wait(10)
            seen[number] = ask(number).get()
            gate.wait(10)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {n: f"[Q {n} A ]" for n in range(3)}
    assert len({call.session_id for call in server.calls}) == 3


def test_a_thread_of_the_program_uses_the_machine_that_runs(server: FakeServer, vm: P.VirtualMachine) -> None:
    seen: list[str] = []
    with vm.running_scope():
        thread = threading.Thread(target=lambda: seen.append(ask("t").get()))
        thread.start()
        thread.join()
        other = P.VirtualMachine(server.address)
        with other.running_scope():
            failures: list[BaseException] = []

            def lost() -> None:
                try:
                    ask("u")
                except P.ParrotError as error:
                    failures.append(error)

            thread = threading.Thread(target=lost)
            thread.start()
            thread.join()
    assert seen == ["[Q t A ]"]
    assert "2 virtual machines run" in str(failures[0])


def test_debug_mode_and_timeit_print_to_stderr(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> None:
    machine = P.VirtualMachine(server.address, mode="debug")
    machine.run(lambda: ask("hello").get(), timeit=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "ask(question='hello') -> <answer" in printed.err
    assert "the program ran for" in printed.err
    with pytest.raises(P.ParrotError, match="'release'"):
        P.VirtualMachine(server.address, mode="loud")


def test_profile_runs_warmups_and_trials_and_returns_seconds(server: FakeServer, vm: P.VirtualMachine) -> None:
    runs: list[int] = []
    mean = vm.profile(lambda n: runs.append(n), warmups=2, trials=3, args=[1])
    assert len(runs) == 5
    assert 0 < mean < 10
    with pytest.raises(ValueError, match="trials"):
        vm.profile(lambda: None, trials=0)


def test_the_report_gives_timings_and_the_machine_the_job_completion_time(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        assert vm.jct_s is None
        ask("a").get()
        rows = P.timings(vm.report())
        jct = vm.jct_s
    assert [(r.func_name, r.ttft_s, r.tpot_s, r.latency_s, r.output_tokens) for r in rows] == [("f", 0.5, 0.5, 2.5, 5)]
    assert jct is not None
    assert jct > 0
    assert "0.500" in P.timing_table(rows, jct)
    assert "job completion time" in P.timing_table(rows, jct)


def test_an_address_that_is_none_is_refused() -> None:
    for address in ("ftp://x", "http://", "http://x:notaport"):
        with pytest.raises(P.ParrotError, match="no address"):
            P.VirtualMachine(address)
    assert P.VirtualMachine("localhost:9000/").core_http_addr == "http://localhost:9000"
    assert "aiohttp" in sys.modules
