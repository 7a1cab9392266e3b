"""A task's way into the scheduler and out of it: it begins to wait once it is ready, and it ends once, however it ends.

It decides which tasks no engine will ever run (an empty prompt, one too large for all engines, no engine in time) and carries
ends out: books closed, the effect written, whoever made the tasks told. It never decides where a task runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from parrot.protocol.errors import ErrorInfo
from parrot.serve.backlog import Backlog
from parrot.serve.effects import TaskEnded
from parrot.serve.engines import Lane
from parrot.serve.events import Content, TaskFinished
from parrot.serve.graph import Task
from parrot.serve.instant import Instant
from parrot.serve.policies.base import prompt_tokens, too_large
from parrot.serve.states import TASK

Finished = Callable[[Task, Content, float], None]
Failed = Callable[[Task, ErrorInfo, float], None]

# By names of this module's own that never change: the compiled module need not look them up.
_TASK_ENDED: Final = TaskEnded
_FINISH: Final = TASK.of("finish")


class Lifecycle:
    """`finished(task, content, now)` and `failed(task, error, now)` are told once a task; nobody is told of cancelled ones."""

    def __init__(self, instant: Instant, backlog: Backlog, finished: Finished, failed: Failed) -> None:
        self._instant = instant
        self._backlog = backlog
        self._finished = finished
        self._failed = failed

    # ------------------------------------------------------------------------------------------- to wait

    def enqueue(self, task: Task, now: float) -> None:
        """A waiting task whose inputs are ready, or one whose attempt came to nothing."""
        if task.links is None and not self._backlog.take_prompt(task):
            # An engine needs something to begin from; the template held nothing but empty values.
            task.ready_at = now
            self._end_failed(task, ErrorInfo("bad_template", f"call {task.call.number}: its prompt is empty"), now)
            return
        self._backlog.enter(task, now)
        self._refuse_if_too_large(task, now)

    def engine_came(self, lane: Lane, now: float) -> None:
        """The first engine of the lane has come."""
        for task in self._backlog.in_lane(lane):
            self._backlog.rescue(task)
            self._refuse_if_too_large(task, now)

    def engine_went(self, lane: Lane, now: float) -> None:
        """The lane has lost an engine: tasks that only it could take fail, or begin to wait for another."""
        for task in self._backlog.in_lane(lane):
            if lane.engines:
                self._refuse_if_too_large(task, now)
            else:
                self._backlog.strand(task, now)

    def fail_stranded(self, now: float) -> None:
        """Gives up tasks that no engine came for."""
        while (task := self._backlog.overdue(now)) is not None:
            message = f"no engine for {task.call.lane.describe()} came within {self._backlog.engine_wait_s:g} s"
            self.fail(task, ErrorInfo("no_engine", message), now)

    def _refuse_if_too_large(self, task: Task, now: float) -> None:
        engines = task.call.lane.engines.values()
        if not engines:
            return
        for engine in engines:
            if not too_large(task, engine):
                return
        largest = max(engines, key=lambda e: e.description.max_seq_len)
        message = (
            f"the prompt of call {task.call.number} has {prompt_tokens(task, largest)} tokens; the largest engine for "
            f"{task.call.lane.describe()} takes {largest.description.max_seq_len} with the output"
        )
        self.fail(task, ErrorInfo("task_too_large", message), now)

    # ------------------------------------------------------------------------------------------- to end

    def finish(self, task: Task, event: TaskFinished, now: float) -> None:
        """An engine has its result, and is done with it."""
        task.state = _FINISH[task.state]
        self._end_finished(task, event, now)

    def recall(self, task: Task, event: TaskFinished, now: float) -> None:
        """A queued task that finished in an earlier life, on an engine that nobody knows any more."""
        self._backlog.leave(task, now)
        task.state = TASK[task.state, "recall"]
        self._end_finished(task, event, now)

    def fail(self, task: Task, error: ErrorInfo, now: float) -> None:
        """It has failed for good; no engine works on it."""
        self._leave_queue(task, now)
        self._end_failed(task, error, now)

    def cancel(self, task: Task, now: float) -> None:
        """Nobody wants its result any more; no engine works on it."""
        self._leave_queue(task, now)
        task.state = TASK[task.state, "cancel"]
        self._close(task, 0, now)

    def _leave_queue(self, task: Task, now: float) -> None:
        if task.state == "queued":
            self._backlog.leave(task, now)
            self._backlog.changed = True  # it may have held others back

    def _end_finished(self, task: Task, event: TaskFinished, now: float) -> None:
        task.prompt_tokens, task.cached_tokens = event.prompt_tokens, event.cached_tokens
        task.output_tokens = event.output_tokens
        task.decode_s, task.max_gap_s = event.decode_s, event.max_gap_s
        task.cost = event.cost
        task.reason = event.reason
        self._close(task, event.prompt_tokens + event.output_tokens, now)
        instant = self._instant
        instant.effects.append(_TASK_ENDED(task.id, task.attempt, task.output.id, None, instant.event))
        self._finished(task, event.content, now)

    def _end_failed(self, task: Task, error: ErrorInfo, now: float) -> None:
        task.state = TASK[task.state, "fail"]
        self._close(task, 0, now)
        self._instant.effects.append(TaskEnded(task.id, task.attempt, task.output.id, error, self._instant.event))
        self._failed(task, error, now)

    def _close(self, task: Task, used: int, now: float) -> None:
        """The task has ended and has used so many tokens: gives back what it had, and drops what only one that may still run
        needs."""
        task.finished_at = now
        if task.charged:
            task.call.session.account.settle(task, used, now)
        self._backlog.drop_prompt(task)
        self._backlog.give_back(task)
        task.refusals = task.contexts = task.engine = None
