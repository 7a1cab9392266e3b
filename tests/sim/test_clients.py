"""A program's client: what goes out when, in both modes, whatever order the answers come in."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parrot.protocol.errors import ErrorInfo
from sim.actions import Action, Assign, Close, Complete, Create, Fetch, Given, Into, Open, Reference, Submit, Value, Wait
from sim.clients import Mode, new_player
from sim.player import Player
from sim.workloads.program import After, Program, Read, Text, Write
from tests.sim.programs import chain, chat, map_reduce, one_call, programs


class Server:
    """Answers actions after `delay(action)` seconds, variables when their inputs are there; checks what a core would."""

    def __init__(self, delay: Callable[[Action], float]) -> None:
        self.log: list[tuple[float, Action]] = []
        self._delay = delay
        self._ids = 0
        self.open = False

    def play(self, player: Player) -> None:
        queue: list[tuple[float, int, Action]] = []
        count = 0
        now = player.program.arrival_s

        def send(actions: list[Action]) -> None:
            nonlocal count
            for action in actions:
                count += 1
                self.log.append((now, action))
                wait = action.delay_s if type(action) is Wait else self._delay(action)
                heapq.heappush(queue, (now + wait, count, action))

        send(player.start(now))
        while queue:
            now, _, action = heapq.heappop(queue)
            send(player.answer(action, self._answer(action), now))
        assert player.ended, player.waits_for()

    def _answer(self, action: Action) -> object:
        if type(action) is Open:
            assert not self.open
            self.open = True
        elif type(action) is Close:
            assert self.open
            self.open = False
        elif type(action) is Create:
            self._ids += 1
            return f"id-{action.var}"
        elif type(action) is Submit:
            return tuple(piece.var_id or f"id-{piece.name}" for piece in action.pieces if type(piece) is Into)
        elif type(action) is Complete:
            into = action.pieces[-1]
            assert type(into) is Into
            return Value(f"{action.call}.{action.output}", into.output_length)
        elif type(action) is Fetch:
            return Value("", 0)
        return None


def sent(program: Program, mode: Mode, delay_s: float = 0.0, preallocate: bool = False) -> list[tuple[float, Action]]:
    server = Server(lambda _: delay_s)
    server.play(new_player(program, mode, serial=0, max_gen_length=2048, preallocate=preallocate))
    return server.log


def kinds(log: list[tuple[float, Action]]) -> list[str]:
    return [type(action).__name__ for _, action in log]


def test_semantic_mode_opens_submits_gets_and_closes() -> None:
    assert kinds(sent(one_call(), Mode.SEMANTIC)) == ["Open", "Submit", "Fetch", "Close"]


def test_a_far_client_creates_the_variables_between_calls_first_and_then_waits_for_nothing() -> None:
    log = sent(chain(6), Mode.SEMANTIC, delay_s=1.0, preallocate=True)
    assert {time for time, action in log if type(action) in (Submit, Fetch)} == {2.0}
    near = sent(chain(6), Mode.SEMANTIC, delay_s=1.0)
    assert [time for time, action in near if type(action) is Submit] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_request_mode_pays_a_round_trip_for_every_dependent_call() -> None:
    log = sent(chain(4), Mode.REQUEST, delay_s=2.0)
    assert [time for time, action in log if type(action) is Complete] == [0.0, 2.0, 4.0, 6.0]
    log = sent(map_reduce(3), Mode.REQUEST, delay_s=2.0)
    assert [time for time, action in log if type(action) is Complete] == [0.0, 0.0, 0.0, 2.0]


def test_request_mode_sends_a_call_with_two_outputs_as_two_requests_with_the_growing_prompt() -> None:
    first, second = (a for _, a in sent(chat(1), Mode.REQUEST) if type(a) is Complete)
    assert [type(p) for p in first.pieces] == [Text, Text, Into]
    assert [type(p) for p in second.pieces] == [Text, Text, Given, Text, Into]
    assert second.pieces[2].value.key == "0.0"  # the text as it came, so that contexts are shared


def test_request_mode_never_sends_what_nobody_fetches() -> None:
    program = map_reduce(3)
    only = Program("p", 0.0, program.calls, (type(program.gets[0])("g", "m1"),))
    assert [a.call for _, a in sent(only, Mode.REQUEST) if type(a) is Complete] == [1]


def test_think_time_counts_from_the_return_of_the_get() -> None:
    log = sent(chat(3, think_s=2.0), Mode.SEMANTIC, delay_s=1.0)
    returned = 3.0  # open, submit, fetch: a second each
    assert [t for t, a in log if type(a) is Submit] == [1.0, returned + 2.0, returned + 2.0 + 1.0 + 1.0 + 2.0]


def test_an_output_without_a_limit_gets_the_default_or_its_own_length_where_that_is_longer() -> None:
    def into(write: Write) -> Into:
        program = one_call()
        call = type(program.calls[0])((Text("a", 1), write))
        log = sent(Program("p", 0.0, (call,), program.gets), Mode.SEMANTIC)
        return next(a for _, a in log if type(a) is Submit).pieces[-1]  # type: ignore[return-value]

    assert into(Write("answer", 10)).max_gen_length == 2048
    assert into(Write("answer", 5000)).max_gen_length == 5000
    limited = into(Write("answer", 100, max_gen_length=30))
    assert (limited.output_length, limited.max_gen_length) == (30, 30)


def test_a_refusal_is_waited_out_and_tried_again() -> None:
    player = new_player(one_call(), Mode.SEMANTIC, serial=0, max_gen_length=2048, preallocate=False)
    (opening,) = player.start(0.0)
    (wait,) = player.refuse(opening, 2.5, 0.0)
    assert isinstance(wait, Wait)
    assert (wait.delay_s, wait.then) == (2.5, opening)
    assert player.answer(wait, None, 2.5) == [opening]
    assert player.refusals == 1


@pytest.mark.parametrize("mode", list(Mode))
def test_a_failure_ends_the_program_and_closes_its_session(mode: Mode) -> None:
    player = new_player(one_call(), mode, serial=0, max_gen_length=2048, preallocate=False)
    pending = player.start(0.0)
    if mode is Mode.SEMANTIC:
        (submit,) = player.answer(pending[0], None, 0.0)
        pending = player.answer(submit, ("id",), 0.0)
    after = player.fail(pending[0], ErrorInfo("task_too_large", "too large"), 1.0)
    assert [type(a) for a in after] == ([Close] if mode is Mode.SEMANTIC else [])
    if after:
        assert player.answer(after[0], None, 1.5) == []
    assert player.ended
    assert player.error is not None
    assert player.ended_s == 1.0


@settings(max_examples=150, deadline=None)
@given(st.data(), programs(), st.sampled_from(Mode), st.booleans())
def test_every_program_ends_in_every_order_of_answers_and_keeps_its_order(
    data: st.DataObject, program: Program, mode: Mode, preallocate: bool
) -> None:
    server = Server(lambda _: data.draw(st.sampled_from([0.0, 0.1, 1.0])))
    player = new_player(program, mode, serial=7, max_gen_length=2048, preallocate=preallocate)
    server.play(player)
    returned = [player.returned_s(number) for number in range(len(program.gets))]
    assert None not in returned
    assert not server.open
    numbers = {get.id: number for number, get in enumerate(program.gets)}

    def earliest(edges: tuple[After, ...]) -> float:
        begun = [player.started_s if edge.get is None else returned[numbers[edge.get]] for edge in edges]
        return max([at_s + edge.delay_s for at_s, edge in zip(begun, edges, strict=True) if at_s is not None], default=0.0)

    seen: set[int] = set()
    for now, action in server.log:
        if type(action) in (Submit, Complete):
            seen.add(action.call)
            call = program.calls[action.call]
            assert now >= earliest(call.after) - 1e-9
            if mode is Mode.SEMANTIC:
                assert sum(type(p) is Reference for p in action.pieces) == sum(type(s) is Read for s in call.segments)
        if type(action) is Fetch:
            assert now >= earliest(program.gets[action.get].after) - 1e-9
    if mode is Mode.SEMANTIC:
        assert seen == set(range(len(program.calls)))
        assert sum(type(a) is Assign for _, a in server.log) == len(program.sets)
        assert type(server.log[-1][1]) is Close
    requests = [(a.call, a.output) for _, a in server.log if type(a) is Complete]
    assert len(requests) == len(set(requests))
