"""What is sent again, what is not, and that nothing is done twice."""

from __future__ import annotations

import socket

import pytest

from parrot import P

from .fake_server import FakeServer

ask = P.SemanticFunction(
    "ask", [P.Parameter("q", P.ParamType.INPUT_LOC), P.Parameter("a", P.ParamType.OUTPUT_LOC)], "Q {{q}} A {{a}}"
)


def program() -> None:
    assert ask("x").get() == "[Q x A ]"


async def aprogram() -> None:
    answer = await ask.ainvoke("x")
    assert await answer.aget() == "[Q x A ]"


PROGRAMS = pytest.mark.parametrize("run", [program, aprogram])


@PROGRAMS
def test_a_lost_connection_is_tried_again_and_nothing_is_done_twice(
    run: object, server: FakeServer, vm: P.VirtualMachine
) -> None:
    server.faults = [None, "drop", "drop", None, "drop"]
    vm.run(run)  # type: ignore[arg-type]
    assert server.work["call"] == 1
    assert server.keys[1] == server.keys[2] == server.keys[3]
    assert not server.open_sessions
    if run is program:  # aiohttp itself repeats a GET once on a kept connection, uncounted
        assert (vm.stat.lost_connections, vm.stat.retries) == (3, 3)


@PROGRAMS
def test_busy_answers_are_waited_for_and_counted(run: object, server: FakeServer, vm: P.VirtualMachine) -> None:
    server.faults = ["busy", "unavailable", None, "busy"]
    vm.run(run)  # type: ignore[arg-type]
    assert vm.stat.busy_answers == vm.stat.retries == 3
    assert vm.stat.requests == 4
    assert server.work["call"] == 1


def test_patience_ends(server: FakeServer, vm: P.VirtualMachine) -> None:
    server.faults = ["busy"] * 50
    with pytest.raises(P.ParrotError, match="queue is full") as caught:
        vm.register_session()
    assert caught.value.code == "queue_full"
    assert vm.stat.busy_answers == 4
    impatient = P.VirtualMachine(server.address, retry=P.RetryPolicy(patience_s=0.05, first_wait_s=0.001))
    server.faults = ["drop"] * 500
    with pytest.raises(P.ParrotError, match=r"for 0\.05 s.*is it running") as caught:
        impatient.register_session()
    assert caught.value.code == "unavailable"
    assert server.address in str(caught.value)
    server.faults = []


def test_a_refusal_is_never_tried_again(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        server.faults = ["garbage"]
        with pytest.raises(P.ParrotError, match="proxy") as caught:
            ask("x")
    assert caught.value.code == "internal"
    assert vm.stat.retries == 0


def test_a_broken_stream_goes_on_where_it_stopped(server: FakeServer, vm: P.VirtualMachine) -> None:
    server.cut_stream_after = 6
    with vm.running_scope():
        assert "".join(ask("stream").stream()) == "[Q stream A ]"
    assert [body.get("stream_from") for method, _, body in server.requests if method == "GET"] == [0, 6]


def test_a_broken_async_stream_goes_on_where_it_stopped(server: FakeServer, vm: P.VirtualMachine) -> None:
    server.cut_stream_after = 6

    async def run() -> None:
        v = await ask.ainvoke("stream")
        assert "".join([piece async for piece in v.stream()]) == "[Q stream A ]"

    vm.run(run)
    assert [body.get("stream_from") for method, _, body in server.requests if method == "GET"] == [0, 6]


def test_nobody_listening_is_said_soon_and_plainly() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        machine = P.VirtualMachine(address, retry=P.RetryPolicy(first_contact_s=0.05, first_wait_s=0.001))
        for run in (program, aprogram):
            with pytest.raises(P.ParrotError, match="is it running") as caught:
                machine.run(run)
            assert caught.value.code == "unavailable"
            assert address in str(caught.value)


def test_a_core_that_goes_away_leaves_the_programs_own_error(server: FakeServer) -> None:
    vm = P.VirtualMachine(server.address, retry=P.RetryPolicy(closing_s=0.05, first_wait_s=0.001))

    def run() -> None:
        server.faults = ["drop"] * 500
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vm.run(run)
    server.faults = []


def test_leaving_a_stream_early_leaves_the_machine_usable(server: FakeServer, vm: P.VirtualMachine) -> None:
    with vm.running_scope():
        v = ask("stream")
        for _ in v.stream():
            break
        assert v.get() == "[Q stream A ]"
