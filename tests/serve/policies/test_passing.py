"""Policies that go through the whole queue (`Passing`): what finds no room is passed over, at no cost, and does not starve."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve.effects import Dispatch
from parrot.serve.graph import Task
from parrot.serve.policies.passing import Needs
from tests.serve.driver import Driver, described, out, text, value
from tests.serve.policies.scenes import ask, begun, engines_of, heads, rules

STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "ask", "ask"]), st.integers(0, 30), st.integers(0, 60)), max_size=60
)


@given(STEPS)
def test_needs_find_the_first_that_so_much_room_is_enough_for(steps: list[tuple[str, int, int]]) -> None:
    needs, known = Needs(), {}
    for what, place, room in steps:
        key = (place // 3, place)
        if what == "add" and key not in known:
            known[key] = room
            needs.add(key, room, f"task{place}")  # type: ignore[arg-type]
        elif what == "remove" and key in known:
            del known[key]
            needs.remove(key)
        after = (place // 3, place)
        for behind in (None, after):
            fitting = sorted(k for k, need in known.items() if need <= room and (behind is None or k > behind))
            assert needs.first(room, behind) == ((fitting[0], f"task{fitting[0][1]}") if fitting else None)
    assert bool(needs) == bool(known)


def test_a_task_without_room_is_passed_over_and_goes_first_once_there_is_room() -> None:
    d = Driver("parrot")
    d.engine(tokens_capacity=200)
    session = d.open()
    for i, tokens in enumerate((100, 150, 20, 120)):  # and 16 each that they may generate
        ask(d, session, f"t{i}", tokens)
    assert heads(d) == ["t0", "t2"]
    d.finish(begun(d, "t0"))
    assert heads(d) == ["t2", "t3"], "t1 needs more than what is left, t3 does not"
    d.finish(begun(d, "t3"))
    assert heads(d) == ["t2"]
    d.finish(begun(d, "t2"))
    assert heads(d) == ["t1"]


def test_of_those_that_there_is_room_for_the_first_in_order_goes() -> None:
    def order(**switches: bool) -> list[str]:
        d = Driver("parrot", switches)
        d.engine(tokens_capacity=200)
        late, early = d.open(1), d.open(2)
        ask(d, late, "runs", 150)
        ask(d, late, "large", 180)
        ask(d, early, "b", 80)
        ask(d, late, "a", 80)
        d.finish(begun(d, "runs"))
        d.finish(begun(d, "large"))
        return heads(d)

    assert order() == ["b", "a"]
    assert order(app_fifo=True) == ["a", "b"], "its program came first"


def test_a_task_behind_the_first_needs_no_room_for_the_prefix_that_an_engine_holds() -> None:
    d = Driver("parrot")
    d.engine(tokens_capacity=700)
    session = d.open()

    def question(name: str, tokens: int = 20) -> None:
        (x,) = d.outputs(d.submit(session, text("system", 400), value("q", name, tokens), out("x", max_gen_length=10)))
        d.get(session, x)

    question("first")
    ask(d, session, "other", 200)
    assert len(d.dispatches) == 2  # 430 and 216 tokens
    ask(d, session, "large", 500)
    question("second", 100)
    question("third", 80)
    assert len(d.dispatches) == 2
    d.finish(begun(d, "other"))  # 270 tokens are free: the two need 110 and 90 of them
    assert heads(d) == ["system", "system", "system"]


def test_the_first_of_the_lane_is_asked_again_when_what_was_placed_has_brought_its_prefix() -> None:
    d = Driver("parrot", {"app_fifo": True})
    d.engine(tokens_capacity=500)
    late, early = d.open(1), d.open(2)
    ask(d, late, "runs", 300)

    def question(session: int, name: str) -> None:
        (x,) = d.outputs(d.submit(session, text("system", 280), value("q", name), out("x", max_gen_length=10)))
        d.get(session, x)

    other = d.open(3)
    ask(d, other, "small", 140)
    question(late, "a")  # the first now, in order; the others came before it and were passed over
    question(early, "b")
    assert heads(d) == ["runs", "small"]
    d.finish(begun(d, "runs"))  # room for one with its system prompt: for the other one it is there then
    assert heads(d) == ["small", "system", "system"]


def test_who_becomes_the_first_of_the_lane_is_asked_as_it_is() -> None:
    d = Driver("parrot")
    d.engine(tokens_capacity=300)
    own, other = d.open(), d.open()
    (x,) = d.outputs(d.submit(own, text("a", 100), text("b", 100), value("q", "first", 5), out("x", max_gen_length=10)))
    d.get(own, x)
    d.finish(d.dispatches[0])
    ask(d, other, "runs", 150)
    ask(d, other, "blocks", 250)
    (y,) = d.outputs(d.submit(own, text("a", 100), text("b", 100), value("q", "then", 5), out("x", max_gen_length=100)))
    d.get(own, y)
    assert len(d.dispatches) == 2, "one link or two, all of it is there: 105 tokens"
    d.close(other)
    assert len(d.dispatches) >= 2


def test_groups_still_land_together_when_their_first_member_was_passed_over() -> None:
    d = Driver("parrot", {"graph_group": True})
    for _ in range(2):
        d.engine(tokens_capacity=300)
    session = d.open()
    ask(d, session, "one", 200)
    ask(d, session, "two", 200)
    parts = [d.outputs(d.submit(session, text(f"m{i}", 80), out("s", max_gen_length=10)))[0] for i in range(3)]
    reads = [ev.Input(f"s{i}", var) for i, var in enumerate(parts)]
    (f,) = d.outputs(d.submit(session, text("reduce"), *reads, out("f")))
    d.get(session, f)
    assert heads(d) == ["one", "two"]
    d.finish(begun(d, "two"))
    assert engines_of(d)[1:] == [2, 2, 2]
    assert rules(d)[-3:] == ["task_group"] * 3


def test_with_a_bound_what_may_not_go_beside_a_latency_bound_task_is_passed_over_too() -> None:
    d = Driver("parrot", {"params": {"latency_capacity": 300}})
    d.engine()
    session = d.open()
    ask(d, session, "chat0", 84, criteria=Criteria.LATENCY)
    ask(d, session, "bulk", 284, criteria=Criteria.THROUGHPUT)
    ask(d, session, "chat1", 84, criteria=Criteria.LATENCY)
    ask(d, session, "chat2", 84, criteria=Criteria.LATENCY)
    ask(d, session, "chat3", 84, criteria=Criteria.LATENCY)
    assert heads(d) == ["chat0", "chat1", "chat2"]
    for name in ("chat0", "chat1", "chat2"):
        d.finish(begun(d, name))
    assert heads(d) == ["chat3"], "300 tokens may be there, and bulk has 300"
    d.finish(begun(d, "chat3"))
    assert heads(d) == ["bulk"]


def stream_of_small_ones(patience: float | None) -> float | None:
    """When a task that needs most of an engine starts, while small ones of its own lane come for ever, out of step."""
    d = Driver("parrot", {"patience": patience})
    d.engine(tokens_capacity=100)
    session = d.open()
    ends: dict[float, list[Dispatch]] = {}
    number = 0
    while d.now < 60.0:
        for dispatch in ends.pop(d.now, []):
            d.finish(dispatch)
        number += 1
        ask(d, session, f"small{number}", 20, most=10)
        if d.now == 1.0:
            ask(d, session, "large", 80, most=10)
        for dispatch in d.dispatches:
            if dispatch.chain[0].keys[0] == "large":
                return d.now
            if not any(dispatch in flying for flying in ends.values()):
                ends.setdefault(d.now + 2.0, []).append(dispatch)
        now = d.now + 1.0
        while (deadline := d.core.next_deadline()) is not None and deadline < now:
            d.send(ev.Tick(), at=deadline)
        d.now = now
    return None


def test_what_is_passed_over_starts_within_its_patience_and_what_is_in_flight() -> None:
    assert stream_of_small_ones(None) is None, "nobody overtakes it, so this shows nothing"
    started = stream_of_small_ones(10.0)
    assert started is not None
    assert 11.0 <= started <= 11.0 + 2.0 + 1.0


@pytest.mark.parametrize("switches", [{}, {"app_fifo": True, "graph_group": True, "ctx_group": True, "ctx_aware": True}])
def test_an_instant_does_no_work_for_what_cannot_be_placed(switches: dict[str, Any]) -> None:
    def calls_of_an_instant(waiting: int) -> int:
        d = Driver("parrot", {"explain_placements": 0, "max_queue_size": 1 << 20, **switches}, max_tasks_per_session=1 << 20)
        d.engine(tokens_capacity=1000)
        session = d.open()
        for i in range(12):
            ask(d, session, f"small{i}", 60, criteria=Criteria.THROUGHPUT)
        for i in range(waiting):
            ask(d, session, f"large{i}", 900 + i % 50, criteria=Criteria.THROUGHPUT)
        for i in range(9):
            ask(d, session, f"late{i}", 60, criteria=Criteria.THROUGHPUT)
        assert len(d.dispatches) == 13, "a hundred tokens are left, but for one small one"
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event == "call"

        for i in range(8):
            ended = begun(d, f"small{i}")
            before = len(d.dispatches)
            sys.setprofile(count)
            d.finish(ended)
            sys.setprofile(None)
            assert len(d.dispatches) == before, "what stands at the end of the queue takes its place"
        return calls

    few, many = calls_of_an_instant(20), calls_of_an_instant(1500)
    assert many <= 1.5 * few


def test_an_instant_that_was_broken_off_has_lost_nobody() -> None:
    d = Driver("parrot")
    session = d.open()
    for i in range(3):
        ask(d, session, f"t{i}")
    scheduler = d.core.scheduler
    scheduler.engines.register(described("e"))  # nobody is told, so that the core does not ask the policy itself
    broken_off = iter(scheduler.policy.place(scheduler.queue, scheduler.cluster, 0.0))
    next(broken_off)
    broken_off.close()  # type: ignore[attr-defined]  # a generator
    d.engine("another", model="of another lane")
    d.close(d.open())
    ask(d, session, "t3")
    assert heads(d) == ["t0", "t1", "t2", "t3"]


def test_tasks_that_end_while_no_engine_is_live_are_not_remembered() -> None:
    def tasks() -> int:
        gc.collect()
        return sum(isinstance(known, Task) for known in gc.get_objects())

    before = tasks()
    d = Driver("parrot", {"max_queue_size": 1 << 20})
    for i in range(3000):
        session = d.open()
        ask(d, session, f"t{i}")
        d.close(session)
    assert tasks() - before < 2000
