"""What `handle` holds to whatever the events are: the same effects for the same events, time that goes on, and a failure inside
that costs what it failed at and no more."""

from __future__ import annotations

from typing import Any

import pytest

from parrot.serve import events as ev
from parrot.serve.effects import Dispatch
from tests.serve.driver import Driver, out, read, text, value


def test_the_same_events_give_the_same_effects() -> None:
    def run() -> list[object]:
        d = Driver("parrot", {"app_fifo": True, "graph_group": True, "ctx_group": True, "ctx_aware": True})
        for name in ("a", "b", "c"):
            d.engine(name, tasks_capacity=2)
        for _ in range(5):
            session = d.open()
            maps = [d.outputs(d.submit(session, text("map"), value("c", f"c{i}"), out("s")))[0] for i in range(4)]
            reads = [read(f"s{i}", v) for i, v in enumerate(maps)]
            d.fetched(session, text("reduce"), *reads, out("f"))
        while d.dispatches:
            d.now += 1.0
            d.finish(d.dispatches[0])
        return d.effects

    first = run()
    assert any(isinstance(e, Dispatch) for e in first)
    assert first == run()


def test_time_never_goes_back() -> None:
    d = Driver()
    d.send(ev.Tick(), at=5.0)
    with pytest.raises(ValueError, match="time went back"):
        d.send(ev.Tick(), at=4.0)


def test_a_bug_costs_its_own_event_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Driver()
    session = d.open()
    core = d.core

    def broken(event: ev.ListVariables, now: float) -> None:
        raise AssertionError("planted")

    monkeypatch.setitem(core._handlers, ev.ListVariables, broken)
    events = (ev.ListVariables(50, session, d.auths[session]), ev.CreateVariable(51, session, d.auths[session]))
    d.send(*events)
    assert d.error(50).code == "internal"
    assert d.payload(51) == {"var_id": "v0"}
    assert [str(fault.error) for fault in d.faults] == ["planted"]


def test_a_fault_at_a_deadline_costs_that_one_alone_and_no_deadline_stays_in_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Driver(session_life_span=10.0)
    first, second = d.open(), d.open()
    end = d.core.requests.end_session

    def fails(session: Any, by: str, now: float) -> None:
        if session.id == first:
            raise RuntimeError("a bug")
        end(session, by, now)

    monkeypatch.setattr(d.core.requests, "end_session", fails)
    d.send(ev.Tick(), at=10.0)
    assert [str(fault.error) for fault in d.faults] == ["a bug"]
    assert d.error(d.ask(ev.DescribeSession, second, d.auths[second])).code == "session_expired"

    def always_fails(now: float) -> None:
        raise RuntimeError("another bug")

    monkeypatch.setattr(d.core.scheduler, "_ask_again", always_fails)
    get = d.get(first, d.variable(first), timeout=5.0)
    d.send(ev.Tick(), at=15.0)
    assert d.error(get).code == "timeout"
    monkeypatch.setattr(d.core.scheduler, "next_deadline", lambda: 0.0)  # and what it waits for stays
    d.send(ev.Tick(), at=16.0)
    assert d.core.next_deadline() == 17.0
    d.send(ev.CancelGet(1), at=16.5)
    assert d.core.next_deadline() == 17.0


def test_a_fault_at_placing_is_contained_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    d = Driver()
    d.engine()
    place = d.core.scheduler.place
    broken = True

    def fails(now: float) -> None:
        if broken:
            d.core.scheduler.changed = False
            raise RuntimeError("a bug")
        place(now)

    monkeypatch.setattr(d.core.scheduler, "place", fails)
    request = d.fetched(d.open(), text("a"), out("x"))
    assert [str(fault.error) for fault in d.faults] == ["a bug"]
    assert d.core.next_deadline() == 1.0
    d.send(ev.Tick(), at=1.0)
    assert len(d.faults) == 2
    assert d.core.next_deadline() == 2.0
    broken = False
    d.send(ev.Tick(), at=2.0)
    d.finish(d.dispatches[0], "done")
    assert d.payload(request) == "done"
