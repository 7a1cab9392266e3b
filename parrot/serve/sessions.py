"""Sessions: one run of an application, with its variables and calls; and which of them have been idle for too long."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from parrot.protocol.engine import TaskId
from parrot.protocol.errors import ParrotError
from parrot.serve import states
from parrot.serve.contexts import Context
from parrot.serve.graph import Call, Group, Task
from parrot.serve.variables import Variable


class Session(msgspec.Struct, eq=False):
    """One session. `sequence`: the order of arrival. `domain`: whom it shares contexts with.

    `unfinished` counts its tasks that have not ended, `waiting_gets` its pending gets: while `active` work or a get is
    there, it is not idle.
    """

    id: int
    auth: str
    tenant: str
    sequence: int
    opened_s: float
    last_access_s: float
    state: str = "open"
    variables: dict[str, Variable] = {}
    calls: list[Call] = []
    unfinished: int = 0
    active: int = 0  # tasks that are queued or in flight
    waiting_gets: int = 0
    answers: dict[tuple[type, str], Any] | None = None  # kind of request, Idempotency-Key -> the first answer's payload
    contexts: dict[Context, None] | None = None  # those that only this session can share
    groups: dict[tuple[TaskId, int], Group] | None = None

    @property
    def domain(self) -> str:
        return f"tenant:{self.tenant}" if self.tenant else f"session:{self.id}"

    @property
    def busy(self) -> bool:
        return self.active > 0 or self.waiting_gets > 0

    def move(self, by: str) -> None:
        self.state = states.move(states.SESSION, self.state, by)

    def new_variable(self, name: str) -> Variable:
        variable = Variable(f"v{len(self.variables)}", name)
        self.variables[variable.id] = variable
        return variable

    def variable(self, var_id: str) -> Variable:
        """Raises not_found."""
        variable = self.variables.get(var_id)
        if variable is None:
            raise ParrotError("not_found", f"session {self.id} has no variable {var_id!r}", var_id=var_id)
        return variable

    def task(self, task_id: TaskId) -> Task | None:
        """The task of that id, if there is one."""
        if 0 <= task_id.call < len(self.calls):
            tasks = self.calls[task_id.call].tasks
            if 0 <= task_id.output < len(tasks):
                return tasks[task_id.output]
        return None

    def group(self, root: TaskId, depth: int) -> Group:
        """The task group of that stage, made when it is first asked for."""
        if self.groups is None:
            self.groups = {}
        found = self.groups.get((root, depth))
        if found is None:
            found = self.groups[root, depth] = Group(root, depth)
        return found


class IdleSessions:
    """Sessions with nothing to do, the longest idle first. All have the same life span, so the order of their last
    access is the order in which they expire, and every operation takes constant time."""

    def __init__(self, life_span_s: float) -> None:
        self._life_span_s = life_span_s
        self._sessions: OrderedDict[int, Session] = OrderedDict()

    def touch(self, session: Session, now: float) -> None:
        """The session was accessed, or its work has just ended."""
        session.last_access_s = now
        if session.active > 0 or session.waiting_gets > 0:
            self._sessions.pop(session.id, None)
        else:
            self._sessions[session.id] = session
            self._sessions.move_to_end(session.id)

    def remove(self, session: Session) -> None:
        self._sessions.pop(session.id, None)

    def next_deadline(self) -> float | None:
        """When the first of them expires."""
        if not self._sessions:
            return None
        return next(iter(self._sessions.values())).last_access_s + self._life_span_s

    def expired(self, now: float) -> list[Session]:
        """Those whose life span is over, taken out."""
        found: list[Session] = []
        while self._sessions:
            session = next(iter(self._sessions.values()))
            if session.last_access_s + self._life_span_s > now:
                break
            del self._sessions[session.id]
            found.append(session)
        return found
