"""The dataflow of sessions: which tasks wait for which variables, who waits for a variable, and what follows when it is filled.

The tasks of a submitted call are put into the graph. A get says that a variable is wanted: what must run for it is deduced
(`deduction.py`), and until when it is of any use (`deadlines.py`). A task that is wanted and has all its inputs goes to the
scheduler, which tells of its end: the output is ready or failed, its getters are answered, and its consumers run or fail too.

It knows nothing of who may ask for what (`client_requests.py`), nor where and when a task runs (`scheduler.py`).
"""

from __future__ import annotations

import math
from typing import Final

from parrot.protocol.api import Criteria
from parrot.protocol.errors import ErrorInfo
from parrot.serve.alarm import Alarm
from parrot.serve.config import ServeCoreConfig
from parrot.serve.deadlines import Deadlines
from parrot.serve.deduction import Deduction, tighter
from parrot.serve.effects import Reply
from parrot.serve.events import Content, GetVariable
from parrot.serve.gets import PendingGets
from parrot.serve.graph import Call, Task
from parrot.serve.instant import Instant
from parrot.serve.reports import input_failed
from parrot.serve.scheduler import Scheduler
from parrot.serve.session_registry import IdleSessions
from parrot.serve.sessions import Session
from parrot.serve.states import IN_FLIGHT, TASK, VARIABLE
from parrot.serve.variables import Variable

# By names of this module's own that never change: the compiled module need not look them up.
_REPLY: Final = Reply
_THROUGHPUT: Final = Criteria.THROUGHPUT
_PRODUCE: Final = VARIABLE.of("produce")
_FINISH: Final = VARIABLE.of("finish")


class Dataflow:
    """The graphs of all sessions. `scheduler` runs their tasks; it is made here, for it tells of each task's end. `idle` is
    told when a session has work or a get, and when it has none; `alarm` of deadlines."""

    def __init__(self, config: ServeCoreConfig, epoch: int, idle: IdleSessions, alarm: Alarm, instant: Instant) -> None:
        self._idle = idle
        self._alarm = alarm
        self._instant = instant
        self.gets = PendingGets()
        self.deduction = Deduction(self._activated)
        self.deadlines = Deadlines(self._activated)
        self.scheduler = Scheduler(config, epoch, instant, self._finished, self._failed)
        self._now = 0.0  # of the call or the get that deduction follows

    # ------------------------------------------------------------------------------------------- calls

    def add(self, call: Call, wanted: Criteria | None, now: float) -> None:
        """Puts the tasks of a new call into its session's graph. `wanted`: its last output is wanted so, without a get."""
        self._now = now
        for task in call.tasks:
            self._connect(task, now)
        last = call.tasks[-1]
        if call.session.deadlines is not None:
            if wanted is not None:
                self.deadlines.want(last, math.inf, math.inf)
            self._alarm.no_later(self.deadlines.next_deadline())
        if wanted is not None and not last.ended:
            self._want(last.output, wanted)

    def _connect(self, task: Task, now: float) -> None:
        """Puts a new task into the graph: what it waits for, and who waits for it already."""
        output = task.output
        output.producer = task
        output.state = _PRODUCE[output.state]
        failed: Variable | None = None
        for variable in task.inputs():
            if variable.consumers is None:
                variable.consumers = [task]
            else:
                variable.consumers.append(task)
            if variable.state == "failed":
                failed = failed or variable
            elif variable.state != "ready":
                task.missing += 1
                if variable.producer is not None:
                    if task.sources is None:
                        task.sources = []
                    task.sources.append(variable.producer)
        if failed is not None:
            assert failed.error is not None
            task.state = TASK[task.state, "fail"]
            task.finished_at = now
            self._failed(task, input_failed(failed, failed.error), now)
            return
        if task.call.session.deadlines is not None:
            self.deadlines.connect(task)
        self.deduction.add(task)

    def _activated(self, task: Task) -> None:
        """Deduction has activated the task, or changed what it says of it."""
        if task.state == "queued":
            self.scheduler.reorder(task)
        elif task.state == "waiting":
            if task.missing == 0:
                self._enqueue(task, self._now)
        elif task.state in IN_FLIGHT:
            self.scheduler.hurry(task)

    def _enqueue(self, task: Task, now: float) -> None:
        session = task.call.session
        session.active += 1
        self._idle.touch(session, now)
        self.scheduler.enqueue(task, now)

    # ------------------------------------------------------------------------------------------- gets

    def fetch(self, event: GetVariable, session: Session, variable: Variable, now: float) -> None:
        """A get begins to wait for a variable that is neither ready nor failed."""
        self._now = now
        deadline, late, useless = event.timeout, False, event.deadline
        if useless is not None and (deadline is None or useless <= deadline):
            deadline, late = useless, True
        if deadline is not None:
            deadline += now
            self._alarm.no_later(deadline)
        self.gets.add(event.request, variable, deadline, late)
        self._idle.touch(session, now)
        if useless is not None or session.deadlines is not None:
            self.deadlines.fetched(session, variable, math.inf if useless is None else now + useless)
            self._alarm.no_later(self.deadlines.next_deadline())
        self._want(variable, event.criteria or _THROUGHPUT)

    def _want(self, variable: Variable, criteria: Criteria) -> None:
        """Somebody wants the variable. What is wanted once stays so, whatever becomes of the get."""
        wanted = tighter(variable.criteria, criteria)
        if wanted is not variable.criteria:
            variable.criteria = wanted
            if variable.producer is not None:
                self.deduction.fetch(variable.producer)

    def drop_get(self, request: int, now: float) -> Variable | None:
        """That get waits no longer. For which variable it did; None when it did not wait."""
        variable = self.gets.drop(request)
        if variable is not None:
            self._idle.touch(variable.session, now)
        return variable

    # ------------------------------------------------------------------------------------------- variables are settled

    def ready(self, session: Session, variable: Variable, now: float) -> None:
        """The variable has its content: whoever waited for it goes on."""
        content = variable.content
        assert content is not None
        if variable.getters:
            for request in self.gets.settle(session, variable):
                self._instant.effects.append(_REPLY(request, content.key))
        if variable.consumers:
            for task in variable.consumers:
                task.missing -= 1
                if task.missing == 0 and task.activated and task.state == "waiting":
                    self._enqueue(task, now)
        self._idle.touch(session, now)

    def _finished(self, task: Task, content: Content, now: float) -> None:
        session = task.call.session
        session.active -= 1
        session.unfinished -= 1
        task.output.state = _FINISH[task.output.state]
        task.output.content = content
        self.ready(session, task.output, now)

    def _failed(self, task: Task, error: ErrorInfo, now: float) -> None:
        """The task has failed, and so does all that waits for its output: a loop, for a chain may be long."""
        session = task.call.session
        failed = [(task, error)]
        while failed:
            task, error = failed.pop()
            if task.ready_at < math.inf:
                session.active -= 1
            session.unfinished -= 1
            task.output.state = VARIABLE[task.output.state, "fail"]
            consumers = self._never_ready(session, task.output, error, now)
            derived = input_failed(task.output, error)
            failed.extend((consumer, derived) for consumer in reversed(consumers))

    def _never_ready(self, session: Session, variable: Variable, error: ErrorInfo, now: float) -> list[Task]:
        """The variable will never have a content: its getters are told why, its consumers fail too. Those consumers."""
        variable.error = error
        for request in self.gets.settle(session, variable):
            self._instant.effects.append(Reply(request, None, error))
        failed = [task for task in variable.consumers or () if task.state == "waiting"]
        for task in failed:
            task.state = TASK[task.state, "fail"]
            task.finished_at = now
        self._idle.touch(session, now)
        return failed

    def abandon(self, session: Session, now: float) -> None:
        """The session has ended: its gets are told so, and its tasks are given up."""
        scheduler = self.scheduler
        if session.waiting_gets:
            error = ErrorInfo(f"session_{session.state}", f"session {session.id} is {session.state}")
            for variable in session.all_variables:
                for request in self.gets.settle(session, variable):
                    self._instant.effects.append(Reply(request, None, error))
        if session.unfinished:
            for call in session.calls:
                for task in call.tasks:
                    if not task.ended:
                        scheduler.cancel(task, now)

    # ------------------------------------------------------------------------------------------- time

    def next_deadline(self) -> float | None:
        """When the first get or task comes to its end."""
        get, task = self.gets.next_deadline(), self.deadlines.next_deadline()
        return task if get is None or (task is not None and task < get) else get

    def tick(self, now: float) -> None:
        """Ends the tasks and the gets whose time is over."""
        scheduler = self.scheduler
        for task in self.deadlines.over(now):
            scheduler.contain(f"ending task {task.id}, whose deadline has passed", self._expire, task, now)
        for request, late in self.gets.due(now):
            scheduler.contain(f"ending get {request}", self._time_out, request, late, now)

    def _expire(self, task: Task, now: float) -> None:
        if not task.ended:
            what = f"output {task.output.id!r} of call {task.call.number} was not ready by its deadline"
            self.scheduler.expire(task, ErrorInfo("deadline_exceeded", what), now)

    def _time_out(self, request: int, late: bool, now: float) -> None:
        variable = self.drop_get(request, now)
        if variable is not None:
            code, by = ("deadline_exceeded", "by its deadline") if late else ("timeout", "in time")
            message = f"variable {variable.id!r} was not ready {by}"
            self._instant.effects.append(Reply(request, None, ErrorInfo(code, message)))
