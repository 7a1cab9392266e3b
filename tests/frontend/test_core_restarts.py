"""A core that dies and comes back is a pause to a program: the right texts, nothing done twice, no exception."""

from __future__ import annotations

import threading

import pytest

from parrot import P
from parrot.frontend.wire import Answer, Attempts, LostConnection, RetryPolicy, Stat

from .fake_server import FakeServer

ask = P.SemanticFunction(
    "ask", [P.Parameter("q", P.ParamType.INPUT_LOC), P.Parameter("a", P.ParamType.OUTPUT_LOC)], "Q {{q}} A {{a}}"
)
DEAD_S = 0.15  # longer than the first waits, so that the connection is refused more than once


@pytest.fixture
def vm(server: FakeServer) -> P.VirtualMachine:
    return P.VirtualMachine(server.address, retry=P.RetryPolicy(first_wait_s=0.01, max_wait_s=0.05))


def check(server: FakeServer, vm: P.VirtualMachine) -> None:
    assert server.work["call"] == 1
    assert not server.open_sessions
    assert vm.stat.lost_connections > 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_get_survives_the_death_of_the_core(asynchronous: bool, server: FakeServer, vm: P.VirtualMachine) -> None:
    server.hold.clear()  # the value comes after the restart
    threading.Timer(0.1, server.start_dying, [DEAD_S]).start()
    threading.Timer(0.1 + 2 * DEAD_S, server.hold.set).start()

    async def arun() -> None:
        assert await (await ask.ainvoke("x")).aget() == "[Q x A ]"

    def run() -> None:
        assert ask("x").get() == "[Q x A ]"

    vm.run(arun if asynchronous else run)
    check(server, vm)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_call_that_meets_a_dead_core_is_made_once(asynchronous: bool, server: FakeServer, vm: P.VirtualMachine) -> None:
    def away() -> None:
        server.die()
        threading.Timer(DEAD_S, server.come_back).start()

    async def arun() -> None:
        away()
        value = await ask.ainvoke("x")
        away()
        assert await value.aget() == "[Q x A ]"
        away()  # the session's close meets it as well

    def run() -> None:
        away()
        value = ask("x")
        away()
        assert value.get() == "[Q x A ]"
        away()

    vm.run(arun if asynchronous else run)
    check(server, vm)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stream_goes_on_at_the_core_s_next_life(asynchronous: bool, server: FakeServer, vm: P.VirtualMachine) -> None:
    server.cut_stream_after = 6
    server.on_cut = lambda: server.start_dying(DEAD_S)

    async def arun() -> None:
        value = await ask.ainvoke("stream")
        assert "".join([piece async for piece in value.stream()]) == "[Q stream A ]"

    def run() -> None:
        assert "".join(ask("stream").stream()) == "[Q stream A ]"

    vm.run(arun if asynchronous else run)
    check(server, vm)
    assert [body.get("stream_from") for method, _, body in server.requests if method == "GET"] == [0, 6]


def test_a_stream_that_a_stopping_core_ends_goes_on(server: FakeServer, vm: P.VirtualMachine) -> None:
    server.cut_stream_after = 6
    server.last_line = b'{"error":{"code":"unavailable","message":"the server is shutting down"}}\n'
    with vm.running_scope():
        assert "".join(ask("stream").stream()) == "[Q stream A ]"


# ------------------------------------------------------------------------------------------------ for how long it is tried


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def attempts(clock: Clock) -> Attempts:
    policy = RetryPolicy(patience_s=30.0, first_contact_s=3.0, closing_s=6.0, first_wait_s=0.5, max_wait_s=2.0)
    return Attempts(policy, Stat(answers=1), "http://here", clock=clock)


REFUSED = LostConnection("refused", unheard=True)
CUT = LostConnection("cut")


def refused_for(attempts: Attempts, clock: Clock) -> float:
    """Seconds of refused connections until it gives up."""
    begun_s = clock.now_s

    def insist() -> None:
        while True:
            clock.now_s += attempts.lost(REFUSED)

    with pytest.raises(P.ParrotError, match="http://here") as caught:
        insist()
    assert caught.value.code == "unavailable"
    return clock.now_s - begun_s


def test_a_dead_core_is_given_up_when_its_silence_has_lasted(attempts: Attempts, clock: Clock) -> None:
    assert 28.0 <= refused_for(attempts, clock) <= 30.0


def test_waits_grow_to_their_limit_and_are_drawn_within_it(attempts: Attempts, clock: Clock) -> None:
    waits = [attempts.lost(CUT), *(attempts.lost(REFUSED) for _ in range(6))]
    assert waits[0] == 0.0
    for wait_s, most_s in zip(waits[1:], (1.0, 2.0, 2.0, 2.0, 2.0, 2.0), strict=True):
        assert most_s / 2 <= wait_s <= most_s


def test_a_request_that_was_held_for_long_is_no_silence(attempts: Attempts, clock: Clock) -> None:
    for _ in range(10):
        clock.now_s += 25.0  # a get that waits, until the core is killed
        assert attempts.lost(CUT) == 0.0
    assert 28.0 <= refused_for(attempts, clock) <= 30.0


def test_silence_to_the_timeout_counts_as_silence(attempts: Attempts, clock: Clock) -> None:
    clock.now_s += 31.0
    with pytest.raises(P.ParrotError):
        attempts.lost(LostConnection("timed out", unheard=True))


def test_a_part_of_an_answer_is_a_sign_of_life(attempts: Attempts, clock: Clock) -> None:
    for _ in range(10):
        clock.now_s += attempts.lost(REFUSED)
        clock.now_s += 1.0
        attempts.heard()
    clock.now_s += attempts.lost(CUT)
    attempts.busy(Answer(503, b"{}", "1"))
    assert 28.0 <= refused_for(attempts, clock) <= 30.0


@pytest.mark.parametrize(("answers", "urgent", "least_s", "most_s"), [(0, False, 1.0, 3.0), (1, True, 4.0, 6.0)])
def test_a_wrong_address_and_a_close_are_given_up_sooner(
    answers: int, urgent: bool, least_s: float, most_s: float, clock: Clock
) -> None:
    policy = RetryPolicy(patience_s=30.0, first_contact_s=3.0, closing_s=6.0, first_wait_s=0.5, max_wait_s=2.0)
    attempts = Attempts(policy, Stat(answers=answers), "http://here", urgent=urgent, clock=clock)
    assert least_s <= refused_for(attempts, clock) <= most_s
