"""Invariant 6: no session reads or changes what is another's, and no context is shared across sharing domains but for
leading constants with `cache_prefix`; in a core that has been killed and made anew as well."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from parrot.serve import events as ev
from parrot.serve.effects import Dispatch, Reply
from tests.properties.test_recovery import Kills, calls, variables
from tests.serve.driver import content, out, read, text

#: Every kind of request that names a session.
KINDS = ("close", "describe", "list", "submit", "create", "set", "get")


class Strangers(Kills):
    """Each generated text carries its session's number; each context is remembered with whose it is."""

    def __init__(self) -> None:
        super().__init__()
        self.makers: dict[tuple[int, int, int], tuple[str, bool]] = {}  # (epoch, engine, context) -> domain, for everybody

    def answered(self, event: Any, reply: Reply) -> None:
        super().answered(event, reply)
        if reply.error is None and isinstance(event, ev.GetVariable) and str(reply.payload).startswith("out"):
            assert str(reply.payload).endswith(f":{event.session_id}"), "another session's text"

    def send(self, *events: ev.AnyEvent) -> list[Any]:
        effects = super().send(*events)
        for effect in effects:
            if isinstance(effect, Dispatch):
                self.check_chain(effect)
        return effects

    def check_chain(self, dispatch: Dispatch) -> None:
        session = self.core.sessions.get(dispatch.task.session_id)
        assert session is not None
        call = session.calls[dispatch.task.call]
        domain = f"tenant {session.tenant}" if session.tenant else f"session {session.id}"
        own = [dispatch.generate_context_id, *(link.context_id for link in dispatch.chain)]
        for place, context_id in enumerate(own):
            leading = place == 1 and isinstance(call.segments[0], ev.Constant) and call.cache_prefix and not call.fuse_fill
            leading = leading and dispatch.chain[0].keys == (call.segments[0].content.key,)
            maker, common = self.makers.setdefault((dispatch.epoch, dispatch.engine_id, context_id), (domain, leading))
            assert maker == domain or (leading and common), "a context of another domain"

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), kind=st.sampled_from(KINDS), auth=st.sampled_from(["another's", "none", "made up"]))
    def trespass(self, data: st.DataObject, kind: str, auth: str) -> None:
        """A request with the wrong auth is refused whatever it asks, and changes nothing."""
        session = self.session(data)
        others = sorted(set(self.sessions) - {session})
        wrong = None if auth == "none" else f"auth{others[0]}" if auth == "another's" and others else "auth"
        before = variables(self.core), calls(self.core)
        reply = self.ask(self.request_of(kind, session, wrong, "v0"))
        assert reply is not None
        assert reply.error is not None
        assert reply.error.code == ("unauthorized" if wrong is None else "forbidden")
        assert reply.payload is None
        assert (variables(self.core), calls(self.core)) == before

    @precondition(lambda self: len(self.sessions) > 1)
    @rule(data=st.data(), kind=st.sampled_from(["submit", "set", "get"]))
    def reach_for_what_another_has(self, data: st.DataObject, kind: str) -> None:
        """A variable is named within its session: an id that only others have is not there."""
        session = self.session(data)
        foreign = sorted({var for vars in self.sessions.values() for var in vars} - set(self.sessions[session]))
        if foreign:
            reply = self.ask(self.request_of(kind, session, f"auth{session}", data.draw(st.sampled_from(foreign))))
            assert reply is not None
            assert reply.error is not None
            assert reply.error.code in {"not_found", "queue_full", "too_many_tasks"}

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def look_around(self, data: st.DataObject) -> None:
        """A session that lists its variables sees its own, all of them."""
        session = self.session(data)
        reply = self.ask(self.request_of("list", session, f"auth{session}", ""))
        assert reply is not None
        assert sorted(info.var_id for info in reply.payload) == sorted(self.sessions[session])

    def request_of(self, kind: str, session: int, auth: str | None, var: str) -> Any:
        rest: dict[str, tuple[type, tuple[Any, ...]]] = {
            "close": (ev.CloseSession, ()),
            "describe": (ev.DescribeSession, (True,)),
            "list": (ev.ListVariables, ()),
            "submit": (ev.SubmitCall, ((text("S", 20), read("a", var), out("b")),)),
            "create": (ev.CreateVariable, ("mine",)),
            "set": (ev.SetVariable, (var, content("mine", 1))),
            "get": (ev.GetVariable, (var,)),
        }
        what, arguments = rest[kind]
        return self.request_for(what, session, auth, *arguments)


Strangers.TestCase.settings = settings(
    max_examples=int(os.environ.get("PARROT_EXAMPLES", "40")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestIsolation = Strangers.TestCase
