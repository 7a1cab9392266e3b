"""A core that is built from what a journal holds: what earlier lives accepted, with nothing of the lives themselves."""

from __future__ import annotations

from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig
from parrot.serve.events import AnyEvent
from parrot.serve.ledger import Past
from parrot.serve.recovery import recover
from tests.serve.driver import content, out, text


def test_gets_of_two_lives_that_had_the_same_number_do_not_meet() -> None:
    """Request numbers begin anew with every life."""
    first = ev.SubmitCall(2, 7, "auth", (text("S"), out("a")))
    second = ev.SubmitCall(3, 7, "auth", (text("S"), out("b")))
    kept: list[AnyEvent] = [
        ev.OpenSession(1, 7, "auth"),
        first,
        second,
        ev.GetVariable(4, 7, "auth", "v0"),
        ev.GetVariable(4, 7, "auth", "v1"),  # the next life's fourth request
    ]
    core = recover(ServeCoreConfig(), Past(1, 5.0, 5, [(float(at), event) for at, event in enumerate(kept)]), 2)
    core.handle([ev.Restarted(2)], 5.0)
    assert core.counts()["gets"] == 0
    session = core.sessions[7]
    assert session.waiting_gets == 0
    assert [variable.getters for variable in session.variables.values()] == [(), ()]
    assert core.counts()["queued"] == 2  # both are still wanted


def test_a_value_that_was_set_is_there_and_nobody_is_answered() -> None:
    kept: list[AnyEvent] = [
        ev.OpenSession(1, 7, "auth"),
        ev.CreateVariable(2, 7, "auth", "x"),
        ev.SetVariable(3, 7, "auth", "v0", content("k", 3)),
    ]
    core = recover(ServeCoreConfig(), Past(1, 3.0, 3, [(float(at), event) for at, event in enumerate(kept)]), 2)
    assert core.handle([ev.Restarted(2)], 3.0) == []
    assert core.sessions[7].variables["v0"].state == "ready"
