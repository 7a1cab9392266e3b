"""Deadlines: until when a task's output is of any use, deduced backward through the DAG from gets and calls.

A get with a deadline says that its value is worthless later; a call with one says so of its outputs, whoever asks. Two things
follow for every task behind it, in the same direction as criteria (`deduction.Deduction`):

- `deadline_s`, the tightest of those that it serves: how urgent it is, for policies. It is only ever tightened.
- `wanted_until_s`, the latest: after that nobody can use its output any more. One get without a deadline makes it endless.

A task whose time is over fails, wherever it is. Sessions in which nobody names a deadline cost nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from parrot.serve.variables import Variable

if TYPE_CHECKING:
    from parrot.serve.graph import Task
    from parrot.serve.sessions import Session

Want = tuple[float, float]  #: the tightest deadline and the latest, seconds of the core's clock; inf for none


class Deadlines:
    """The deadlines of all sessions. `tightened` is called for each queued task whose `deadline_s` is another one now."""

    def __init__(self, tightened: Callable[[Task], None]) -> None:
        self._tightened = tightened
        self._heap: list[tuple[float, int, Task]] = []  # ends; one that no longer holds stays until it comes to the top
        self._pushed = 0
        self._most = 64  # entries before those that no longer hold are thrown out

    # ------------------------------------------------------------------------------------------- what is wanted

    def fetched(self, session: Session, variable: Variable, until_s: float) -> None:
        """A get wants the variable until then. To be called before the producer is activated for it; in a session that has
        had a deadline, for every get."""
        wants = session.deadlines
        if wants is None:
            wants = session.deadlines = {}
        tightest, latest = wants.get(variable, (math.inf, -math.inf if variable.criteria is None else math.inf))
        want = wants[variable] = (min(tightest, until_s), max(latest, until_s))
        if variable.producer is not None:
            self.want(variable.producer, *want)

    def connect(self, task: Task) -> None:
        """`task` was just added: its call's deadline holds for it, and those of what is wanted of it already."""
        wants = task.call.session.deadlines
        assert wants is not None
        if task.call.until_s < math.inf:
            task.deadline_s = task.call.until_s
            self._watch(task)
        output = task.output
        if output in wants:
            self.want(task, *wants[output])
        elif output.criteria is not None:
            self.want(task, math.inf, math.inf)
        for consumer in output.consumers or ():
            if consumer.activated and not consumer.ended:
                self.want(task, _tightest(consumer), _end_of(consumer))

    def want(self, task: Task, deadline_s: float, until_s: float) -> None:
        """Somebody wants the task's output, at best by `deadline_s` and of no use after `until_s`: so it is of all that it
        waits for. Time is proportional to what changes."""
        seen: set[Task] = set()
        stack = [(task, deadline_s, until_s)]
        while stack:
            task, deadline_s, until_s = stack.pop()
            if task.ended:
                continue
            before = task.wanted_until_s
            if before is None:  # nobody has said: it is wanted for ever, or not yet
                before = math.inf if task.activated else -math.inf
            wanted = max(before, until_s)
            tightest = min(_tightest(task), deadline_s, task.call.until_s)
            tighter = tightest < _tightest(task)
            if not tighter and wanted == before and (task.activated or task in seen):
                continue
            seen.add(task)
            task.wanted_until_s = wanted
            if tighter:
                task.deadline_s = tightest
            if wanted != before:
                self._watch(task)
            for producer in task.awaited():
                stack.append((producer, tightest, _end_of(task)))
            if tighter and task.state == "queued":
                self._tightened(task)

    # ------------------------------------------------------------------------------------------- time

    def next_deadline(self) -> float | None:
        """When the first task's time is over."""
        heap = self._heap
        while heap and not _holds(heap[0]):
            heappop(heap)
        return heap[0][0] if heap else None

    def over(self, now: float) -> list[Task]:
        """The tasks whose time is over, those that read before those that are read: so that each fails for its own reason."""
        found: dict[Task, None] = {}
        heap = self._heap
        while heap and heap[0][0] <= now:
            entry = heappop(heap)
            if _holds(entry):
                found[entry[2]] = None
        return sorted(found, key=lambda task: (task.depth, -task.id.call, -task.id.output))

    def _watch(self, task: Task) -> None:
        end_s = _end_of(task)
        if end_s == math.inf:
            return
        self._pushed += 1
        heappush(self._heap, (end_s, self._pushed, task))
        if len(self._heap) > self._most:
            self._heap = [entry for entry in self._heap if _holds(entry)]
            heapify(self._heap)
            self._most = 64 + 2 * len(self._heap)


def _tightest(task: Task) -> float:
    return math.inf if task.deadline_s is None else task.deadline_s


def _end_of(task: Task) -> float:
    """After that its output is of no use; inf: it always is."""
    wanted = task.wanted_until_s
    return task.call.until_s if wanted is None else min(wanted, task.call.until_s)


def _holds(entry: tuple[float, int, Task]) -> bool:
    end_s, _, task = entry
    return not task.ended and _end_of(task) == end_s
