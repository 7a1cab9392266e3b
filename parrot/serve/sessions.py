"""Sessions: one run of an application, with its variables and calls; and which of them have been idle for too long."""

from __future__ import annotations

from heapq import heapify, heappop, heappush, heapreplace
from typing import Any

from parrot.protocol.engine import TaskId
from parrot.protocol.errors import ParrotError
from parrot.serve.contexts import Context
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
        "account", "active", "answers", "auth", "calls", "contexts", "deadlines", "domain", "ephemeral", "id", "last_access_s",
        "opened_s",
        "sequence", "stages", "state", "tenant", "top_rank", "unfinished", "variables", "waiting_gets", "watched",
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
        self.variables: dict[str, Variable] = {}
        self.calls: list[Call] = []
        self.unfinished = 0
        self.active = 0  # tasks that are queued or in flight
        self.waiting_gets = 0
        self.answers: dict[tuple[type, str], Any] | None = None  # (kind, Idempotency-Key) -> the first answer's payload
        self.contexts: dict[Context, None] | None = None  # those that only this session can share
        self.stages: dict[tuple[Task, int], Task | Group] | None = None  # a stage's group, or its only task
        self.top_rank = 0  # the highest of its tasks' ranks
        self.deadlines: dict[Variable, Want] | None = None  # of fetched variables, once anybody has named one
        self.watched = False  # whether IdleSessions has it
        self.domain = f"tenant:{tenant}" if tenant else f"session:{id}"

    @property
    def busy(self) -> bool:
        return self.active > 0 or self.waiting_gets > 0

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
            call.tasks.clear()
        self.calls.clear()
        for variable in self.variables.values():
            variable.producer = variable.consumers = None
        self.variables.clear()
        for stage in self.stages.values() if self.stages is not None else ():
            if isinstance(stage, Group):
                stage.members.clear()
        self.stages = self.contexts = self.answers = self.deadlines = None


class IdleSessions:
    """Which sessions expire when. `touch` is on the way of every event, so that it only notes the time: a session stands in
    the heap once at most, under a time that may have passed since, and may be busy. Who comes to the top is looked at again.
    """

    def __init__(self, life_span_s: float) -> None:
        self._life_span_s = life_span_s
        self._heap: list[tuple[float, int, Session]] = []  # an access, the session's sequence, the session
        self._ended = 0  # entries of sessions that have ended

    def touch(self, session: Session, now: float) -> None:
        """The session was accessed, or its work has just ended."""
        session.last_access_s = now
        if not session.watched:
            session.watched = True
            heappush(self._heap, (now, session.sequence, session))

    def remove(self, session: Session) -> None:
        """The session has ended."""
        if session.watched:
            self._ended += 1
            if self._ended > 64 + len(self._heap) // 2:
                self._heap = [entry for entry in self._heap if entry[2].state == "open"]
                heapify(self._heap)
                self._ended = 0

    def next_deadline(self) -> float | None:
        """When the first of them expires."""
        first = self._first()
        return None if first is None else first.last_access_s + self._life_span_s

    def expired(self, now: float) -> list[Session]:
        """Those whose life span is over, taken out."""
        found: list[Session] = []
        while (session := self._first()) is not None and session.last_access_s + self._life_span_s <= now:
            heappop(self._heap)
            session.watched = False
            found.append(session)
        return found

    def _first(self) -> Session | None:
        """The session that has been idle for the longest time. It stands at the top of the heap."""
        heap = self._heap
        while heap:
            since_s, sequence, session = heap[0]
            if session.state != "open":
                heappop(heap)
                self._ended -= 1
            elif session.busy:  # it is touched when its work ends
                heappop(heap)
                session.watched = False
            elif session.last_access_s > since_s:
                heapreplace(heap, (session.last_access_s, sequence, session))
            else:
                return session
        return None
