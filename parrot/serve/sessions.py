"""A session: one run of an application, with its variables and calls."""

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
        # For `session_registry.IdleSessions` alone: whether it has the session, and the neighbours of the session there.
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
