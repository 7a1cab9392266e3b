"""Sessions: one run of an application, with its variables and calls; and which of them have been idle for too long."""

from __future__ import annotations

from typing import Any

from parrot.protocol.engine import TaskId
from parrot.protocol.errors import ParrotError
from parrot.serve.contexts import Line
from parrot.serve.deadlines import Want
from parrot.serve.graph import Call, Group, Task
from parrot.serve.tenants import Tenant
from parrot.serve.variables import Variable


class Session:
    """One session. `account`: what its tenant may have. `sequence`: the order of arrival. `domain`: whom it shares contexts
    with. `ephemeral`: it ends with the core's life at the latest.

    `unfinished` counts its tasks that have not ended, `waiting_gets` its pending gets: while `active` work or a get is
    there, it is not idle.
    """

    __slots__ = (
        "account", "active", "all_variables", "answers", "auth", "calls", "contexts", "deadlines", "domain", "ephemeral", "id",
        "idle", "last_access_s", "newer", "older", "opened_s", "sequence", "stages", "state", "tenant", "top_rank",
        "unfinished", "waiting_gets",
    )  # fmt: skip

    def __init__(
        self, id: int, auth: str, tenant: str, account: Tenant, sequence: int, now: float, ephemeral: bool = False
    ) -> None:
        self.id = id
        self.auth = auth
        self.tenant = tenant
        self.account = account
        self.sequence = sequence
        self.ephemeral = ephemeral
        self.opened_s = now
        self.last_access_s = now
        self.state = "open"
        self.all_variables: list[Variable] = []  # in the order of their ids, v0, v1 …
        self.calls: list[Call] = []
        self.unfinished = 0
        self.active = 0  # tasks that are queued or in flight
        self.waiting_gets = 0
        self.answers: dict[tuple[type, str], Any] | None = None  # (kind, Idempotency-Key) -> the first answer's payload
        self.contexts: Line | None = None  # those that only this session can share
        self.stages: dict[tuple[Task, int], Task | Group] | None = None  # a stage's group, or its only task
        self.top_rank = 0  # the highest of its tasks' ranks
        self.deadlines: dict[Variable, Want] | None = None  # of fetched variables, once anybody has named one
        # For IdleSessions alone: whether it has the session, and the neighbours of the session there.
        self.idle = False
        self.older: Session | None = None
        self.newer: Session | None = None
        self.domain = f"tenant:{tenant}" if tenant else f"session:{id}"

    @property
    def busy(self) -> bool:
        return self.active > 0 or self.waiting_gets > 0

    @property
    def variables(self) -> dict[str, Variable]:
        """By id, in the order in which they were made. Made anew for each who asks."""
        return {variable.id: variable for variable in self.all_variables}

    def new_variable(self, name: str) -> Variable:
        variable = Variable(self, f"v{len(self.all_variables)}", name)
        self.all_variables.append(variable)
        return variable

    def variable(self, var_id: str) -> Variable:
        """Raises not_found."""
        try:
            number = int(var_id[1:])  # which reads more than the core writes
        except ValueError:
            number = -1
        if 0 <= number < len(self.all_variables):
            variable = self.all_variables[number]
            if variable.id == var_id:
                return variable
        raise ParrotError("not_found", f"session {self.id} has no variable {var_id!r}", var_id=var_id)

    def task(self, task_id: TaskId) -> Task | None:
        """The task of that id, if there is one."""
        call, output = task_id.call, task_id.output
        if 0 <= call < len(self.calls):
            tasks = self.calls[call].tasks
            if 0 <= output < len(tasks):
                return tasks[output]
        return None

    def forget(self) -> None:
        """The session has ended: breaks the cycles of calls, tasks, variables and groups, so that memory is given back at
        once."""
        for call in self.calls:
            for task in call.tasks:
                task.sources = None
            call.tasks = ()
        self.calls.clear()
        for variable in self.all_variables:
            variable.producer = variable.consumers = None
        self.all_variables.clear()
        for stage in self.stages.values() if self.stages is not None else ():
            if isinstance(stage, Group):
                stage.members.clear()
        self.stages = self.contexts = self.answers = self.deadlines = None


class IdleSessions:
    """Which sessions expire when: the idle ones, and no others, in a line by their last access."""

    def __init__(self, life_span_s: float) -> None:
        self._life_span_s = life_span_s
        self._oldest: Session | None = None
        self._newest: Session | None = None

    def touch(self, session: Session, now: float) -> None:
        """The session was accessed, or its work has begun or ended."""
        session.last_access_s = now
        if session.active > 0 or session.waiting_gets > 0:
            self.remove(session)
        elif session is not self._newest:
            self.remove(session)
            newest = self._newest
            session.idle = True
            session.older = newest
            if newest is None:
                self._oldest = session
            else:
                newest.newer = session
            self._newest = session

    def remove(self, session: Session) -> None:
        """The session has ended, or is not idle."""
        if not session.idle:
            return
        older, newer = session.older, session.newer
        if older is None:
            self._oldest = newer
        else:
            older.newer = newer
        if newer is None:
            self._newest = older
        else:
            newer.older = older
        session.idle = False
        session.older = session.newer = None

    def next_deadline(self) -> float | None:
        """When the first of them expires."""
        oldest = self._oldest
        return None if oldest is None else oldest.last_access_s + self._life_span_s

    def expired(self, now: float) -> list[Session]:
        """Those whose life span is over, taken out; of those that were last accessed at once, the first opened first."""
        found: list[Session] = []
        while (session := self._oldest) is not None and session.last_access_s + self._life_span_s <= now:
            self.remove(session)
            found.append(session)
        found.sort(key=_last_access)
        return found


def _last_access(session: Session) -> tuple[float, int]:
    return session.last_access_s, session.sequence


class EndedSessions:
    """Which sessions have ended, and how: the last ones, at least so many as `kept` says and at most twice as many."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._late: dict[int, str] = {}
        self._early: dict[int, str] = {}  # all before those

    def add(self, session_id: int, state: str) -> None:
        self._late[session_id] = state
        if len(self._late) == self._kept:
            self._early, self._late = self._late, {}

    def state_of(self, session_id: int) -> str | None:
        """`closed` or `expired`; None when nothing is known of it."""
        found = self._late.get(session_id)
        return found if found is not None else self._early.get(session_id)

    def items(self) -> list[tuple[int, str]]:
        """(session id, state), in the order of their end."""
        return [*self._early.items(), *self._late.items()]
