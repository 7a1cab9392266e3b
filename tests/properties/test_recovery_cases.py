"""What the machine of `test_recovery` finds only now and then: instants in which several things happen, told in full."""

from __future__ import annotations

from typing import Any

import pytest

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve.core import ServeCore
from parrot.serve.effects import SessionEnded
from parrot.serve.ledger import Ledger
from parrot.serve.recovery import recover
from parrot.serve.texts import Piece, Texts
from tests.properties.journal_model import MemoryJournal
from tests.properties.test_recovery import calls, variables
from tests.serve.driver import Driver, content, out, read, text


class Journaled(Driver):
    """A Driver whose instants go through a ledger."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.journal, self.texts = MemoryJournal("recover"), Texts()
        self.ledger = Ledger("recover", self.texts)

    def send(self, *events: Any, at: float | None = None) -> list[Any]:
        effects = super().send(*events, at=at)
        dropped = {e.session_id: self.texts.end(e.session_id) for e in effects if isinstance(e, SessionEnded)}
        self.journal.commit(self.ledger.instant(self.now, events, effects, dropped)[0])
        return effects

    def recovered(self) -> ServeCore:
        return recover(self.core.config, self.journal.past(), 1)

    def number(self) -> int:
        self.request += 1
        return self.request


def test_a_result_that_comes_twice_in_an_instant_is_kept_once() -> None:
    d = Journaled()
    d.engine()
    session = d.open()
    d.submit(session, text("t"), out("x"), output_criteria=Criteria.LATENCY)
    (dispatch,) = d.dispatches
    name = (dispatch.epoch, dispatch.task, dispatch.attempt)
    d.send(ev.TaskFinished(*name, content("first", 3), 3), ev.TaskFinished(*name, content("second", 3), 3))
    assert variables(d.recovered()) == variables(d.core)


def test_a_result_behind_a_failure_of_its_instant_changes_nothing() -> None:
    d = Journaled()
    d.engine()
    session = d.open()
    d.submit(session, text("t"), out("x"), output_criteria=Criteria.LATENCY)
    (dispatch,) = d.dispatches
    name = (dispatch.epoch, dispatch.task, dispatch.attempt)
    d.send(ev.TaskFailed(*name, "generation_failed", "no"), ev.TaskFinished(*name, content("late", 3), 3))
    assert d.core.sessions[session].variables["v0"].state == "failed"
    assert variables(d.recovered()) == variables(d.core)


def test_what_was_accepted_because_of_a_failure_in_its_instant_is_accepted_again() -> None:
    """w waits for z and y. Once z has failed, and w with it, a call that reads w may write y: that is a cycle no more."""
    d = Journaled()
    session = d.open()
    y = d.variable(session)
    (z,) = d.outputs(d.submit(session, text("c"), out("z"), output_criteria=Criteria.LATENCY))
    d.engine()
    (dispatch,) = d.dispatches
    (w,) = d.outputs(d.submit(session, text("d"), read("z", z), read("y", y), out("w")))
    d.send(
        ev.TaskFailed(dispatch.epoch, dispatch.task, dispatch.attempt, "generation_failed", "no"),
        ev.SubmitCall(d.number(), session, d.auths[session], (text("e"), read("w", w), out("v", y))),
    )
    assert d.replies[d.request].error is None
    recovered = d.recovered()
    assert variables(recovered) == variables(d.core)
    assert calls(recovered) == calls(d.core)


def test_a_get_that_fails_at_once_still_made_others_wanted() -> None:
    """The empty prompt fails as soon as it is wanted; the other input was begun all the same, and its result is known."""
    d = Journaled()
    d.engine()
    session = d.open()
    (empty,) = d.outputs(d.submit(session, text("nothing", 0), out("a")))
    (other,) = d.outputs(d.submit(session, text("t"), out("b")))
    (both,) = d.outputs(d.submit(session, text("s"), read("a", empty), read("b", other), out("c")))
    d.get(session, both)
    assert d.error(d.request).code == "input_failed"
    for dispatch in list(d.dispatches):
        d.finish(dispatch)
    recovered = d.recovered()
    assert variables(recovered) == variables(d.core)
    assert calls(recovered) == calls(d.core)


@pytest.mark.parametrize("then", ["cancelled", "timed out", "restarted"])
def test_what_a_get_wanted_before_its_call_came_stays_wanted(then: str) -> None:
    d = Journaled()
    session = d.open()
    x = d.variable(session)
    get = d.get(session, x, timeout=5.0)
    if then == "cancelled":
        d.send(ev.CancelGet(get))
    elif then == "timed out":
        d.send(ev.Tick(), at=5.0)
    else:
        d.send(ev.Restarted(0))
    d.submit(session, text("t"), out("x", x))
    assert d.core.counts()["queue"] == 1
    assert calls(d.recovered()) == calls(d.core)


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_a_restart_measures_no_task_by_an_engine_that_goes_too(order: tuple[str, str]) -> None:
    d = Driver()
    for name in order:
        d.engine(name, max_seq_len=50 if name == "small" else 5000)
    d.submit(d.open(), text("long", 400), out("x"), output_criteria=Criteria.LATENCY)
    assert len(d.dispatches) == 1
    d.send(ev.Restarted(1))
    assert d.core.counts()["queue"] == 1


def test_a_text_that_outlives_who_brought_it_leaves_the_journal() -> None:
    """One session brings a text and ends; another named it meanwhile, but was refused."""
    texts = Texts()
    for session in (1, 2):
        texts.open(session)
    kept, refused = (Piece("k", "text") for _ in range(2))
    texts.hold(1, [kept])
    kept.stored = True
    keys = texts.hold(2, [refused])
    assert texts.end(1) == []
    texts.release(2, keys)
    assert texts.end(2) == ["k"]


def test_a_text_that_is_named_again_stays_in_the_journal() -> None:
    texts = Texts()
    for session in (1, 2):
        texts.open(session)
    kept, again = (Piece("k", "text") for _ in range(2))
    texts.hold(1, [kept])
    kept.stored = True
    keys = texts.hold(2, [Piece("k", "text")])
    texts.end(1)
    texts.release(2, keys)
    texts.hold(2, [again])
    assert again.stored, "it is there, and must not be dropped as nobody's"
    texts.open(3)
    assert texts.end(3) == []
