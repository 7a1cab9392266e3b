"""Sessions: auth, expiry, limits, idempotency, timeouts."""

from __future__ import annotations

import pytest

from parrot.serve import events as ev
from parrot.serve.effects import SessionEnded
from parrot.serve.session_registry import EndedSessions
from tests.serve.driver import Driver, content, out, text


def test_every_call_of_a_session_needs_its_auth() -> None:
    d = Driver()
    session = d.open()
    var = d.variable(session)
    for auth, code in ((None, "unauthorized"), ("wrong", "forbidden")):
        assert d.error(d.ask(ev.GetVariable, session, auth, var)).code == code
        assert d.error(d.ask(ev.SetVariable, session, auth, var, content("k", 1))).code == code
        assert d.error(d.ask(ev.CreateVariable, session, auth)).code == code
        assert d.error(d.ask(ev.SubmitCall, session, auth, (text("t"), out("x")))).code == code
        assert d.error(d.ask(ev.ListVariables, session, auth)).code == code
        assert d.error(d.ask(ev.DescribeSession, session, auth)).code == code
        assert d.error(d.ask(ev.CloseSession, session, auth)).code == code
    assert [v.state for v in d.payload(d.ask(ev.ListVariables, session, d.auths[session]))] == ["empty"]


def test_no_session_sees_another_ones_variables() -> None:
    d = Driver()
    one, two = d.open(), d.open()
    d.variable(one)
    assert d.error(d.get(two, "v0")).code == "not_found"
    assert d.payload(d.ask(ev.ListVariables, two, d.auths[two])) == []


def test_an_idle_session_expires_and_says_so() -> None:
    d = Driver(session_life_span=10.0)
    session = d.open()
    d.now = 5.0
    var = d.variable(session)
    assert d.core.next_deadline() == 15.0
    effects = d.send(ev.Tick(), at=15.0)
    assert effects == [SessionEnded(session, "expired")]
    assert d.error(d.get(session, var)).code == "session_expired"
    assert d.core.next_deadline() is None


def test_a_session_with_work_or_a_pending_get_is_not_idle() -> None:
    d = Driver(session_life_span=10.0)
    d.engine()
    waiting, working = d.open(), d.open()
    request = d.get(waiting, d.variable(waiting))
    (x,) = d.outputs(d.submit(working, text("t"), out("x"), output_criteria=None))
    running = d.get(working, x)
    d.send(ev.CancelGet(running))
    d.send(ev.Tick(), at=100.0)
    assert d.core.counts()["sessions"] == 2
    d.finish(d.dispatches[0])
    d.send(ev.CancelGet(request))
    assert d.core.next_deadline() == 110.0
    d.send(ev.Tick(), at=110.0)
    assert d.core.counts()["sessions"] == 0


def test_a_session_that_works_is_described_as_not_idle() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    (x,) = d.outputs(d.submit(session, text("t"), out("x")))
    d.get(session, x)
    d.now = 5.0
    assert d.payload(d.ask(ev.DescribeSession, session, d.auths[session])).idle_s == 0.0
    d.finish(d.dispatches[0])
    d.now = 7.0
    assert d.payload(d.ask(ev.DescribeSession, session, d.auths[session])).idle_s == 2.0


def test_the_number_of_sessions_is_bounded() -> None:
    d = Driver(max_sessions_num=1)
    session = d.open()
    assert d.error(d.ask(ev.OpenSession, 7, "a")).code == "too_many_sessions"
    d.close(session)
    d.payload(d.ask(ev.OpenSession, 7, "a"))


def test_a_full_queue_refuses_only_sessions_that_begin() -> None:
    d = Driver(scheduler={"max_queue_size": 2})
    begun, fresh = d.open(), d.open()
    for i in range(3):
        (x,) = d.outputs(d.submit(begun, text(f"t{i}"), out("x")))
        d.get(begun, x)
    refused = d.ask(ev.SubmitCall, fresh, d.auths[fresh], (text("t"), out("x")))
    assert d.error(refused).code == "queue_full"
    d.submit(begun, text("more"), out("x"))
    d.engine()
    d.submit(fresh, text("t"), out("x"))


def test_tasks_of_a_session_are_bounded() -> None:
    d = Driver(max_tasks_per_session=2)
    session = d.open()
    three = (text("t"), out("x"), text("u"), out("y"), text("v"), out("z"))
    assert d.error(d.ask(ev.SubmitCall, session, d.auths[session], three)).code == "bad_template", "it would never fit"
    d.submit(session, text("t"), out("x"), text("u"), out("y"))
    assert d.error(d.ask(ev.SubmitCall, session, d.auths[session], (text("t"), out("x")))).code == "too_many_tasks"


def test_a_get_times_out_and_cancels_nothing() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    (x,) = d.outputs(d.submit(session, text("t"), out("x")))
    early, late = d.get(session, x, timeout=5.0), d.get(session, x)
    assert d.core.next_deadline() == 5.0
    d.send(ev.Tick(), at=5.0)
    assert d.error(early).code == "timeout"
    d.finish(d.dispatches[0], "done")
    assert d.payload(late) == "done"


@pytest.mark.parametrize("key", ["k1", None])
def test_a_repeated_request_gets_the_first_answer(key: str | None) -> None:
    d = Driver()
    opened = d.ask(ev.OpenSession, 1, "a", "", key)
    again = d.ask(ev.OpenSession, 2, "b", "", key)
    assert (d.payload(again) == d.payload(opened)) is (key is not None)
    d.auths[1] = "a"
    made = [d.payload(d.ask(ev.CreateVariable, 1, "a", "v", key)) for _ in range(2)]
    assert (made[0] == made[1]) is (key is not None)
    calls = [d.submit(1, text("t"), out("x"), idempotency_key=None if key is None else "k2") for _ in range(2)]
    assert (calls[0] == calls[1]) is (key is not None)
    var = made[0]["var_id"]
    d.payload(d.ask(ev.SetVariable, 1, "a", var, content("c", 1), None if key is None else "k3"))
    repeated = d.ask(ev.SetVariable, 1, "a", var, content("c", 1), None if key is None else "k3")
    assert (d.replies[repeated].error is None) is (key is not None)


def test_an_idempotency_key_is_of_one_kind_of_request() -> None:
    d = Driver()
    session = d.open()
    made = d.payload(d.ask(ev.CreateVariable, session, d.auths[session], "x", idempotency_key="1"))
    call = d.payload(d.ask(ev.SubmitCall, session, d.auths[session], (text("t"), out("y")), idempotency_key="1"))
    assert d.outputs(call) != [made["var_id"]]


def test_sessions_expire_in_the_order_of_their_last_access_then_of_their_opening() -> None:
    d = Driver(session_life_span=10.0)
    first, second, third, fourth = [d.open() for _ in range(4)]
    d.now = 1.0
    d.variable(third)
    d.variable(first)
    d.now = 2.0
    d.variable(second)
    d.now = 3.0
    d.variable(fourth)
    d.close(fourth)
    assert d.core.next_deadline() == 11.0
    assert d.send(ev.Tick(), at=11.0) == [SessionEnded(session, "expired") for session in (first, third)]
    assert d.core.next_deadline() == 12.0
    assert d.send(ev.Tick(), at=12.0) == [SessionEnded(second, "expired")]


def test_the_last_sessions_that_ended_are_remembered_and_old_ones_are_not() -> None:
    ended = EndedSessions(kept=3)
    for session_id in range(20):
        ended.add(session_id, "closed" if session_id % 2 else "expired")
        known = [earlier for earlier in range(session_id + 1) if ended.state_of(earlier) is not None]
        assert known[-3:] == list(range(max(0, session_id - 2), session_id + 1))
        assert len(known) < 6
        assert ended.items() == [(i, ended.state_of(i)) for i in known]
    assert ended.state_of(19) == "closed"
    assert ended.state_of(18) == "expired"


def test_only_the_ids_that_the_core_gave_name_variables() -> None:
    d = Driver()
    session = d.open()
    for _ in range(12):
        d.variable(session)
    assert not d.replies.get(d.get(session, "v11"))
    for wrong in ("v12", "v011", "v 1", "v1_1", "v-1", "v", "", "1", "x1", "v\u0661", "v" + "1" * 5000):
        assert d.error(d.get(session, wrong)).code == "not_found"
