"""What the core knows of chats and clients that come and go: roles, cancelled calls, ephemeral sessions, ends of outputs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from parrot.protocol.api import Criteria
from parrot.protocol.engine import CONTINUED
from parrot.serve import events as ev
from parrot.serve.effects import Abort, Dispatch, SessionEnded
from parrot.serve.events import Constant, Input
from parrot.serve.ledger import KEPT, Ledger, encode
from parrot.serve.texts import Piece, Texts
from tests.serve.driver import Driver, content, out, read, text


def begun(key: str, role: str, tokens: int = 10) -> Constant:
    return Constant(content(key, tokens), role)


def ephemeral(d: Driver) -> int:
    session = 500
    d.auths[session] = "auth500"
    d.payload(d.ask(ev.OpenSession, session, "auth500", ephemeral=True))
    return session


# --------------------------------------------------------------------------------------------------------------- roles


def test_roles_go_with_their_links_to_the_engine() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    story = d.variable(session)
    d.set(session, story, "a story")
    segments = (begun("be brief", "system"), begun("sum up", "user"), Input("story", story, role=CONTINUED), out("x"))
    d.submit(session, *segments, output_criteria=Criteria.LATENCY)
    assert d.dispatches[0].roles == ("system", "user", CONTINUED)


def test_a_role_is_not_lost_with_an_empty_content() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    story = d.variable(session)
    d.set(session, story, "nothing", tokens=0)
    segments = (text("t"), Input("story", story, role="user"), begun("and more", CONTINUED), out("x"))
    d.submit(session, *segments, output_criteria=Criteria.LATENCY)
    assert d.dispatches[0].roles == ("", "user")


def test_a_call_without_roles_is_dispatched_as_ever() -> None:
    d = Driver()
    d.engine()
    d.submit(d.open(), text("t"), out("x"), output_criteria=Criteria.LATENCY)
    assert "roles" not in msgspec.to_builtins(d.dispatches[0])


# ---------------------------------------------------------------------------------------------------- cancelled calls


def test_a_cancelled_call_gives_up_its_work_and_fails_who_reads_it() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    first = d.submit(session, text("t"), out("x"), output_criteria=Criteria.LATENCY)
    (x,) = d.outputs(first)
    second = d.submit(session, text("u"), read("x", x), out("y"), output_criteria=Criteria.LATENCY)
    get = d.get(session, *d.outputs(second))
    effects_before = len(d.effects)
    assert d.payload(d.ask(ev.CancelCall, session, d.auths[session], first.request_id)) == {}
    assert any(isinstance(effect, Abort) for effect in d.effects[effects_before:])
    assert d.error(get).code == "input_failed"
    assert d.error(d.get(session, x)).code == "cancelled"
    assert d.report(session).calls == {"failed": 2}


def test_other_calls_of_the_session_go_on() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    gone = d.submit(session, text("t"), out("x"), output_criteria=Criteria.LATENCY)
    kept = d.submit(session, text("u"), out("y"), output_criteria=Criteria.LATENCY)
    d.ask(ev.CancelCall, session, d.auths[session], gone.request_id)
    d.finish(d.dispatches[1], "said")
    assert d.payload(d.get(session, *d.outputs(kept))) == "said"


def test_a_call_that_has_ended_is_left_as_it_is() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    call = d.submit(session, text("t"), out("x"), output_criteria=Criteria.LATENCY)
    d.finish(d.dispatches[0], "said")
    d.ask(ev.CancelCall, session, d.auths[session], call.request_id)
    assert d.payload(d.get(session, *d.outputs(call))) == "said"


@pytest.mark.parametrize(
    ("call", "auth", "code"), [(1, "auth1000", "not_found"), (-1, "auth1000", "not_found"), (0, "x", "forbidden")]
)
def test_what_cannot_be_cancelled_is_refused(call: int, auth: str, code: str) -> None:
    d = Driver()
    session = d.open(1000)
    d.submit(session, text("t"), out("x"))
    assert d.error(d.ask(ev.CancelCall, session, auth, call)).code == code
    assert d.report(session).calls == {"waiting": 1}


# ------------------------------------------------------------------------------------------------- ephemeral sessions


def test_an_ephemeral_session_does_not_outlive_the_core() -> None:
    d = Driver()
    d.engine()
    kept, gone = d.open(), ephemeral(d)
    for session in (kept, gone):
        d.submit(session, text("t"), out("x"), output_criteria=Criteria.LATENCY)
    effects = d.send(ev.Restarted(1))
    assert [effect.session_id for effect in effects if isinstance(effect, SessionEnded)] == [gone]
    assert d.core.counts()["sessions"] == 1
    d.engine()
    assert [dispatch.task.session_id for dispatch in d.dispatches if dispatch.epoch == 1] == [kept]
    assert not d.faults


def instants(mode: Any, ephemeral_session: bool) -> tuple[list[Any], list[set[int]]]:
    """The rows, and the requests that waited, of a session with a call and a get, opened and closed."""
    d, texts = Driver(), Texts()
    ledger = Ledger(mode, texts)
    rows: list[Any] = []
    waited: list[set[int]] = []
    send = d.send

    def through(*events: Any, at: float | None = None) -> Any:
        for event in events:
            if isinstance(event, ev.OpenSession):
                texts.open(event.session_id)
            elif isinstance(event, ev.SubmitCall):
                texts.hold(event.session_id, [Piece("t", "text")])
        effects = send(*events, at=at)
        dropped = {e.session_id: texts.end(e.session_id) for e in effects if isinstance(e, SessionEnded)}
        entry, promised = ledger.instant(d.now, events, effects, dropped)
        rows.extend([*entry.rows, *entry.texts, *entry.ended])
        waited.append(promised)
        return effects

    d.send = through  # type: ignore[method-assign]
    d.engine()
    session = ephemeral(d) if ephemeral_session else d.open()
    call = d.submit(session, text("t"), out("x"))
    d.get(session, *d.outputs(call))
    d.finish(d.dispatches[0], "said")
    d.close(session)
    return rows, waited


def test_nothing_of_an_ephemeral_session_is_kept_and_no_answer_waits_for_the_journal() -> None:
    rows, waited = instants("recover", True)
    assert rows == []
    assert not any(waited)
    rows, waited = instants("recover", False)
    assert sum(getattr(row, "kind", None) == KEPT for row in rows) == 4
    assert sum(map(len, waited)) == 3  # opening, submitting, the get


def test_a_record_has_ephemeral_sessions_too() -> None:
    rows, waited = instants("record", True)
    assert sum(getattr(row, "kind", None) == KEPT for row in rows) == 4
    assert sum(map(len, waited)) == 3


def test_a_refused_ephemeral_session_is_forgotten_by_the_ledger() -> None:
    d = Driver(max_sessions_num=1)
    d.open()
    event = ev.OpenSession(99, 7, "auth7", ephemeral=True)
    ledger = Ledger("recover", Texts())
    entry, promised = ledger.instant(0.0, [event], d.send(event), {})
    assert not entry
    assert not promised
    assert d.error(99).code == "too_many_sessions"
    submit = ev.SubmitCall(100, 7, "auth7", (text("t"), out("x")))
    assert ledger.instant(0.0, [submit], d.send(submit), {})[1] == set()


# ------------------------------------------------------------------------------------------------------------- reports


def test_a_report_tells_why_an_output_ended_and_only_of_the_calls_that_are_asked_for() -> None:
    d = Driver()
    d.engine()
    session = d.open()
    for key in ("t", "u"):
        d.submit(session, text(key), out("x"), output_criteria=Criteria.LATENCY)
    for dispatch, reason in zip(list(d.dispatches), ("eos", "length"), strict=True):
        name = (dispatch.epoch, dispatch.task, dispatch.attempt)
        d.send(ev.TaskFinished(*name, content("said", 3), 3, reason=reason))
    asked = d.ask(ev.DescribeSession, session, d.auths[session], True, (1, 7))
    assert [(call.request_id, call.tasks[0].reason) for call in d.payload(asked).reports] == [(1, "length")]
    whole = d.payload(d.ask(ev.DescribeSession, session, d.auths[session], True))
    assert [call.tasks[0].reason for call in whole.reports] == ["eos", "length"]


def test_events_and_effects_of_before_are_read_and_written_as_they_were() -> None:
    """What was added has defaults, and defaults are not written: a journal of before replays byte for byte."""
    old = {
        ev.OpenSession(1, 2, "a"): {"type": "OpenSession", "request": 1, "session_id": 2, "auth": "a"},
        ev.DescribeSession(1, 2, "a", True): {
            "type": "DescribeSession",
            "request": 1,
            "session_id": 2,
            "auth": "a",
            "calls": True,
        },
    }
    for event, written in old.items():
        assert encode(event) == msgspec.msgpack.encode(written)
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(written), type=ev.AnyEvent) == event
    d = Driver()
    d.engine()
    d.submit(d.open(), text("t"), out("x"), output_criteria=Criteria.LATENCY)
    (dispatch,) = d.dispatches
    assert set(msgspec.to_builtins(dispatch)) <= {
        "type", "engine_id", "epoch", "task", "attempt", "chain", "parent", "cached_links", "generate_context_id", "sampling",
        "output_var",
    }  # fmt: skip
    assert isinstance(dispatch, Dispatch)
