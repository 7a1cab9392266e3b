"""Deadlines: backward through the DAG, what becomes of work that nobody can use in time, and what of work that somebody can."""

from __future__ import annotations

from typing import Any

import pytest

from parrot.protocol.api import Criteria
from parrot.protocol.errors import ERRORS
from parrot.serve import events as ev
from parrot.serve.deadlines import Deadlines
from parrot.serve.effects import Abort
from parrot.serve.graph import Task
from parrot.serve.policies.least_loaded import LeastLoaded
from parrot.serve.policies.registry import POLICIES
from tests.serve.driver import Driver, out, read, text


class Clocked(Driver):
    """A driver whose time passes as a shell's does: a Tick at every deadline on the way."""

    def until(self, now: float) -> None:
        while (deadline := self.core.next_deadline()) is not None and deadline <= now:
            assert deadline >= self.now
            self.send(ev.Tick(), at=deadline)
            after = self.core.next_deadline()
            assert after is None or after > deadline, "a deadline that a Tick does not settle"
        self.now = now

    def call(self, session: int, key: str, *reads: str, **fields: Any) -> str:
        inputs = [read(f"in{place}", var) for place, var in enumerate(reads)]
        (var,) = self.outputs(self.submit(session, text(key), *inputs, out("x"), **fields))
        return var

    def fetch(self, session: int, var: str, deadline: float | None = None, timeout: float | None = None) -> int:
        return self.ask(ev.GetVariable, session, self.auths[session], var, Criteria.LATENCY, timeout, False, deadline)

    def task(self, session: int, var: str) -> Task:
        (found,) = (t for c in self.core.calls(session) for t in c.tasks if t.output.id == var)
        return found

    def code(self, request: int) -> str | None:
        return None if request not in self.replies else self.error(request).code


def chain(d: Clocked, length: int = 3) -> tuple[int, list[str]]:
    session = d.open()
    variables: list[str] = []
    for number in range(length):
        variables.append(d.call(session, f"c{number}", *variables[-1:]))
    return session, variables


def test_the_tightest_deadline_goes_backward() -> None:
    d = Clocked()
    session, (a, b, c) = chain(d)
    d.now = 1.0
    d.fetch(session, c, deadline=20.0)
    assert [d.task(session, v).deadline_s for v in (a, b, c)] == [21.0] * 3
    d.fetch(session, b, deadline=5.0)
    assert [d.task(session, v).deadline_s for v in (a, b, c)] == [6.0, 6.0, 21.0]
    d.fetch(session, c, deadline=100.0)
    d.fetch(session, c)
    assert [d.task(session, v).deadline_s for v in (a, b, c)] == [6.0, 6.0, 21.0], "a later get tightens, never loosens"


def test_without_a_deadline_there_is_none() -> None:
    d = Clocked()
    session, variables = chain(d)
    d.fetch(session, variables[-1])
    assert [d.task(session, v).deadline_s for v in variables] == [None] * 3
    assert d.core.sessions[session].deadlines is None


def test_work_past_its_deadline_fails_where_it_waits_and_is_aborted_where_it_runs() -> None:
    d = Clocked()
    d.engine(tasks_capacity=1)
    session = d.open()
    running, queued = d.call(session, "a"), d.call(session, "b")
    waiting = d.call(session, "c", running, queued)
    get = d.fetch(session, waiting, deadline=5.0)
    (dispatch,) = d.dispatches
    d.until(4.99)
    assert get not in d.replies
    d.until(5.0)
    assert d.error(get).code == "deadline_exceeded"
    assert waiting in d.error(get).message
    assert [d.task(session, v).state for v in (running, queued, waiting)] == ["failed"] * 3
    assert [e.task for e in d.effects if isinstance(e, Abort)] == [dispatch.task]
    assert d.core.counts()["queue"] == 0
    assert all(not engine.tasks and engine.reserved == 0 for engine in d.core.engines.values())
    assert {d.core.sessions[session].variables[v].error.code for v in (running, queued, waiting)} == {"deadline_exceeded"}
    late = d.fetch(session, waiting)
    assert d.error(late).code == "deadline_exceeded", "what has failed stays so"


def test_a_result_in_time_is_a_result() -> None:
    d = Clocked()
    d.engine()
    session, (a, b) = chain(d, 2)
    get = d.fetch(session, b, deadline=5.0)
    d.until(2.0)
    d.finish(d.dispatches[0])
    d.finish(d.dispatches[0])
    assert d.payload(get)
    d.until(50.0)
    assert [d.task(session, v).state for v in (a, b)] == ["finished"] * 2
    assert d.core.next_deadline() == pytest.approx(602.0), "nothing is left of it but the session's life"


def test_what_somebody_else_wants_goes_on() -> None:
    d = Clocked()
    d.engine()
    session = d.open()
    shared = d.call(session, "shared")
    hurried, patient = d.call(session, "h", shared), d.call(session, "p", shared)
    first = d.fetch(session, hurried, deadline=5.0)
    second = d.fetch(session, patient)
    d.until(6.0)
    assert d.code(first) == "deadline_exceeded"
    assert d.task(session, hurried).state == "failed"
    assert d.task(session, shared).state == "dispatched"
    assert d.task(session, shared).deadline_s == 5.0
    d.finish(d.dispatches[0])
    d.finish(d.dispatches[-1])
    assert d.payload(second)


def test_of_two_deadlines_the_later_one_ends_the_work() -> None:
    d = Clocked()
    session, (a, b) = chain(d, 2)
    gets = [d.fetch(session, b, deadline=seconds) for seconds in (5.0, 9.0)]
    d.until(5.0)
    assert [d.code(get) for get in gets] == ["deadline_exceeded", None]
    assert d.task(session, a).state == "queued"
    d.until(9.0)
    assert d.code(gets[1]) == "deadline_exceeded"
    assert d.task(session, a).state == "failed"


@pytest.mark.parametrize(
    ("deadline", "timeout", "code"), [(5.0, 9.0, "deadline_exceeded"), (5.0, 5.0, "deadline_exceeded"), (9.0, 5.0, "timeout")]
)
def test_a_timeout_before_the_deadline_cancels_nothing(deadline: float, timeout: float, code: str) -> None:
    d = Clocked()
    session, (a,) = chain(d, 1)
    get = d.fetch(session, a, deadline, timeout)
    d.until(5.0)
    assert d.code(get) == code
    assert d.task(session, a).state == ("queued" if code == "timeout" else "failed")
    d.until(9.0)
    assert d.task(session, a).state == "failed"


@pytest.mark.parametrize("first", ["get", "consumer", "producer"])
def test_in_whatever_order_they_come(first: str) -> None:
    """A get, the call that it wants and the call that this one reads from."""
    d = Clocked()
    session = d.open()
    source, target = d.variable(session), d.variable(session)

    def produce() -> None:
        d.submit(session, text("p"), out("x", source))

    def consume() -> None:
        d.submit(session, text("c"), read("in", source), out("x", target))

    steps = {"get": lambda: d.fetch(session, target, deadline=5.0), "consumer": consume, "producer": produce}
    for step in [steps.pop(first), *steps.values()]:
        step()
    assert [d.task(session, v).deadline_s for v in (source, target)] == [5.0, 5.0]
    d.until(5.0)
    assert [d.task(session, v).state for v in (source, target)] == ["failed"] * 2


def test_a_call_s_deadline_holds_for_all_its_outputs_whoever_asks() -> None:
    d = Clocked()
    session = d.open()
    before = d.call(session, "before")
    one, two = d.outputs(d.submit(session, text("t"), read("in", before), out("x"), text("u"), out("y"), deadline=5.0))
    get = d.fetch(session, two)
    assert [d.task(session, v).deadline_s for v in (before, one, two)] == [5.0] * 3
    d.until(5.0)
    assert d.code(get) == "deadline_exceeded"
    assert [d.task(session, v).state for v in (before, one, two)] == ["failed"] * 3


def test_a_call_that_nobody_asked_for_fails_at_its_deadline_too() -> None:
    d = Clocked()
    session = d.open()
    var = d.call(session, "t", deadline=5.0)
    d.until(5.0)
    assert d.code(d.fetch(session, var)) == "deadline_exceeded"


def test_a_deadline_at_the_very_start_of_the_clock_counts_too() -> None:
    d = Clocked()
    assert d.now == 0.0
    session = d.open()
    var = d.call(session, "a", deadline=0.0)
    assert d.task(session, var).state == "failed"
    assert d.error(d.fetch(session, var)).code == "deadline_exceeded"


def test_an_activated_call_with_a_deadline_hurries_what_it_reads() -> None:
    d = Clocked()
    session = d.open()
    before = d.call(session, "before")
    d.call(session, "t", before, deadline=5.0, output_criteria=Criteria.LATENCY)
    assert d.task(session, before).deadline_s == 5.0
    d.until(5.0)
    assert d.task(session, before).state == "failed"


def test_what_was_wanted_before_the_first_deadline_is_wanted_for_ever() -> None:
    d = Clocked()
    session, (a, b) = chain(d, 2)
    d.fetch(session, b)
    late = d.fetch(session, b, deadline=5.0)
    d.until(5.0)
    assert d.code(late) == "deadline_exceeded"
    assert d.task(session, a).state == "queued"
    assert d.task(session, a).deadline_s == 5.0


def test_a_variable_that_nobody_produces_is_too_late_all_the_same() -> None:
    d = Clocked()
    session = d.open()
    var = d.variable(session)
    get = d.fetch(session, var, deadline=5.0)
    d.until(5.0)
    assert d.code(get) == "deadline_exceeded"
    d.set(session, var, "k")
    assert d.payload(d.fetch(session, var))


def test_a_deadline_of_now_gives_what_is_ready_and_nothing_else() -> None:
    d = Clocked()
    d.engine()
    session, (a, b) = chain(d, 2)
    get = d.fetch(session, a)
    d.finish(d.dispatches[0])
    assert d.payload(get) == d.payload(d.fetch(session, a, deadline=0.0))
    assert d.code(d.fetch(session, b, deadline=0.0)) == "deadline_exceeded"
    assert len(d.dispatches) == 0


class Urgent(LeastLoaded):
    """Whoever has the earliest deadline first."""

    name = "urgent"

    def order(self, task: Task) -> Any:
        return (task.deadline_s or 1e9, task.sequence)


def test_a_tighter_deadline_moves_a_queued_task_of_a_policy_that_goes_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, "urgent", Urgent)
    d = Clocked("urgent")
    session = d.open()
    first, second = d.call(session, "a"), d.call(session, "b")
    d.fetch(session, first, deadline=50.0)
    d.fetch(session, second)
    (lane,) = d.core.scheduler.queue.lanes()
    assert d.core.scheduler.queue.head(lane).output.id == first
    d.fetch(session, second, deadline=20.0)
    assert d.core.scheduler.queue.head(lane).output.id == second


def test_a_restart_keeps_deadlines() -> None:
    d = Clocked()
    d.engine()
    session, (a, b) = chain(d, 2)
    d.fetch(session, b, deadline=5.0)
    d.until(2.0)
    d.send(ev.Restarted(1))
    d.until(4.0)
    assert d.task(session, a).state == "queued"
    d.until(5.0)
    assert [d.task(session, v).state for v in (a, b)] == ["failed"] * 2


def test_a_wide_and_deep_graph_is_walked_once() -> None:
    d = Clocked()
    session = d.open()
    layer = [d.call(session, "root")]
    for depth in range(12):
        layer = [d.call(session, f"{depth}.{width}", *layer) for width in range(6)]
    last = d.call(session, "last", *layer)
    deadlines = Deadlines(lambda task: None)
    deadlines.want(d.task(session, last), 5.0, 5.0)
    assert deadlines._pushed == len(deadlines.over(5.0)) == 12 * 6 + 2


def test_entries_that_no_longer_hold_are_thrown_out() -> None:
    d = Clocked()
    d.engine()
    session = d.open()
    for number in range(500):
        d.fetch(session, d.call(session, f"t{number}"), deadline=1000.0)
        d.finish(d.dispatches[0])
    assert len(d.core.dataflow.deadlines._heap) <= 65


def test_the_table_says_504_and_that_trying_again_is_of_no_use() -> None:
    assert ERRORS["deadline_exceeded"] == (504, False)
