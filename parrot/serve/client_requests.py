"""What clients ask of a core: who may, whether it was asked before, what it changes, and the answer.

Each function takes one kind of event. It raises a ParrotError before anything is changed, or answers: at once, but for a get
that waits. How a session ends, whoever ends it, is here too. What a call or a get sets in motion is the dataflow's affair
(`dataflow.py`).
"""

from __future__ import annotations

import math
from typing import Any, Final

import msgspec

from parrot.protocol.api import VariableInfo
from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig
from parrot.serve.dataflow import Dataflow
from parrot.serve.effects import Reply, SessionEnded
from parrot.serve.graph import Call, tasks_of
from parrot.serve.instant import Instant
from parrot.serve.reports import call_answer, session_report
from parrot.serve.session_registry import SessionRegistry
from parrot.serve.sessions import Session
from parrot.serve.states import VARIABLE
from parrot.serve.submission import bind, check_form, check_room, check_variables

_EMPTY: Final[dict[str, Any]] = {}

# By names of this module's own that never change: the compiled module need not look them up.
_REPLY: Final = Reply
_SESSION_ENDED: Final = SessionEnded

_Repeatable = ev.SubmitCall | ev.CreateVariable | ev.SetVariable


class ClientRequests:
    """The requests of all clients. `recalling`: what is asked was accepted in an earlier life, so that no limit refuses it."""

    def __init__(self, config: ServeCoreConfig, registry: SessionRegistry, dataflow: Dataflow, instant: Instant) -> None:
        self._config = config
        self._registry = registry
        self._dataflow = dataflow
        self._scheduler = dataflow.scheduler
        self._instant = instant
        self.recalling = False

    # ------------------------------------------------------------------------------------------- sessions

    def open_session(self, event: ev.OpenSession, now: float) -> None:
        registry, tenants = self._registry, self._scheduler.tenants
        key = event.idempotency_key
        if key is not None:
            known = registry.opened_under(key, now)
            if known is not None:
                self._instant.effects.append(Reply(event.request, known))
                return
        session_id, tenant = event.session_id, event.tenant
        registry.check_free(session_id)
        account = tenants.of(tenant)
        if not self.recalling:
            registry.check_room(now)
            account.check_session(now)
        tenants.join(account, now)
        session = registry.open(session_id, event.auth, tenant, account, event.ephemeral, key, now)
        self._instant.effects.append(_REPLY(event.request, session.id))

    def close_session(self, event: ev.CloseSession, now: float) -> None:
        session = self._registry.enter(event.session_id, event.auth, now)
        self.end_session(session, "close", now)
        self._instant.effects.append(_REPLY(event.request, _EMPTY))

    def end_session(self, session: Session, by: str, now: float) -> None:
        """Closes it, or lets it expire: cancels its work, answers its gets, frees its contexts, forgets its variables."""
        scheduler = self._scheduler
        self._registry.end(session, by)
        self._dataflow.abandon(session, now)
        scheduler.tenants.leave(session.account, now)
        scheduler.free_session(session)
        for call in session.calls:
            scheduler.engines.leave(call.lane)
        session.forget()
        self._instant.effects.append(_SESSION_ENDED(session.id, session.state))

    def describe_session(self, event: ev.DescribeSession, now: float) -> None:
        session = self._registry.sessions.get(event.session_id)
        idle_since = session.last_access_s if session is not None and not session.busy else now
        session = self._registry.enter(event.session_id, event.auth, now)
        report = session_report(session, now, event.calls, event.numbers)
        self._instant.effects.append(Reply(event.request, msgspec.structs.replace(report, idle_s=now - idle_since)))

    # ------------------------------------------------------------------------------------------- asked before

    def _repeated(self, session: Session, event: _Repeatable) -> bool:
        """Answers a request that was answered before under the same Idempotency-Key. A key names one request of one kind."""
        key = event.idempotency_key
        if key is None or session.answers is None or (type(event), key) not in session.answers:
            return False
        self._instant.effects.append(Reply(event.request, session.answers[type(event), key]))
        return True

    def _answer(self, session: Session, event: _Repeatable, payload: Any) -> None:
        key = event.idempotency_key
        if key is not None:
            if session.answers is None:
                session.answers = {}
            session.answers[type(event), key] = payload
        self._instant.effects.append(_REPLY(event.request, payload))

    # ------------------------------------------------------------------------------------------- variables

    def create_variable(self, event: ev.CreateVariable, now: float) -> None:
        session = self._registry.enter(event.session_id, event.auth, now)
        if not self._repeated(session, event):
            variable = session.new_variable(event.name)
            self._answer(session, event, {"var_id": variable.id})

    def set_variable(self, event: ev.SetVariable, now: float) -> None:
        session = self._registry.enter(event.session_id, event.auth, now)
        if event.idempotency_key is not None and self._repeated(session, event):
            return
        variable = session.variable(event.var_id)
        if variable.state != "empty":
            reason = "a call produces it" if variable.producer is not None else "it has a content"
            raise ParrotError("conflict", f"variable {event.var_id!r} cannot be set: {reason}", var_id=event.var_id)
        variable.state = VARIABLE[variable.state, "set"]
        variable.content = event.content
        self._answer(session, event, _EMPTY)
        self._dataflow.ready(session, variable, now)

    def list_variables(self, event: ev.ListVariables, now: float) -> None:
        session = self._registry.enter(event.session_id, event.auth, now)
        listed = [
            VariableInfo(
                variable.id,
                variable.name,
                variable.state,
                variable.content.key if variable.content is not None else None,
                variable.error.message if variable.error is not None else None,
            )
            for variable in session.all_variables
        ]
        self._instant.effects.append(Reply(event.request, listed))

    def get_variable(self, event: ev.GetVariable, now: float) -> None:
        session = self._registry.enter(event.session_id, event.auth, now)
        variable = session.variable(event.var_id)
        if variable.state == "ready":
            assert variable.content is not None
            self._instant.effects.append(_REPLY(event.request, variable.content.key))
        elif variable.state == "failed":
            self._instant.effects.append(_REPLY(event.request, None, variable.error))
        else:
            self._dataflow.fetch(event, session, variable, now)

    def cancel_get(self, event: ev.CancelGet, now: float) -> None:
        self._dataflow.drop_get(event.request, now)

    # ------------------------------------------------------------------------------------------- calls

    def submit_call(self, event: ev.SubmitCall, now: float) -> None:
        session = self._registry.enter(event.session_id, event.auth, now)
        if event.idempotency_key is not None and self._repeated(session, event):
            return
        outputs = check_form(event)
        if not self.recalling:  # how full it was then is not known any more
            check_room(session, outputs, self._config, self._scheduler, now)
            session.account.check_minute(now)
        check_variables(session, event)
        session.account.asked(now)
        deadline = event.deadline
        call = Call(
            number=len(session.calls),
            session=session,
            func_name=event.func_name,
            segments=event.segments,
            variables=(),
            lane=self._scheduler.engines.lane(event.models, event.model_type),
            cache_prefix=event.cache_prefix,
            fuse_fill=event.fuse_fill,
            submitted_s=now,
            until_s=math.inf if deadline is None else now + deadline,
        )
        if deadline is not None and session.deadlines is None:
            session.deadlines = {}
        call.variables = bind(session, event)
        session.calls.append(call)
        call.tasks = tasks_of(call)
        session.unfinished += len(call.tasks)
        self._answer(session, event, call_answer(call))
        self._dataflow.add(call, event.output_criteria, now)

    def cancel_call(self, event: ev.CancelCall, now: float) -> None:
        session = self._registry.enter(event.session_id, event.auth, now)
        if not 0 <= event.call < len(session.calls):
            raise ParrotError("not_found", f"session {session.id} has no call {event.call}")
        error = ErrorInfo("cancelled", f"call {event.call} was cancelled: its client went away")
        for task in session.calls[event.call].tasks:
            if not task.ended:
                self._scheduler.expire(task, error, now)
        self._instant.effects.append(Reply(event.request, _EMPTY))
