"""A base for policies that serve owners (tenants, programs) in order of what they have been given so far: the least first.

A subclass says which owners (`share_by`), and with `counter` how much one has. Owners with waiting tasks stand on a heap under
the counter that they had when they were last looked at. Counters grow as tasks are placed, so the first one is looked at again
before it is believed; one that has gone down since (`lowered`) is entered anew. A placement costs O(log owners).

The first task of the first owner goes first, and holds everybody back if no engine has room for it: so none starves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engines import Lane
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement
from parrot.serve.queue import Owner, TaskQueue

Entry = tuple[float, int, Owner]


class _Line:
    """Owners with waiting tasks of one lane. An entry counts if it equals the one that `entries` has of its owner."""

    __slots__ = ("entries", "heap", "lane")

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.heap: list[Entry] = []
        self.entries: dict[Owner, Entry] = {}


@mypyc_attr(allow_interpreted_subclasses=True)
class ByShare(InOrder):
    """Owners by least counter, ties by who came first; an owner's tasks by readiness. `choose` finds an engine for one."""

    work_conserving: ClassVar[bool] = False  # what holds the others back is the first owner's, not the first in `order`

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._lines: dict[Lane, _Line] = {}
        self._came: dict[Lane, dict[Owner, int]] = {}  # owners of tasks that were queued since the last look

    def owner(self, task: Task) -> Owner:
        return task.tenant if self.share_by == "tenant" else task.program_sequence

    def counter(self, owner: Owner, head: Task | None) -> float:
        """What the owner has been given. head: its first waiting task."""
        raise NotImplementedError

    def lowered(self) -> Iterable[Owner] | None:
        """Owners whose counters may have gone down since it was asked last; None: any of them. Asked at the begin of an instant
        and after each placement."""
        return ()

    def arrived(self, owner: Owner, active: Iterable[Owner]) -> None:
        """The owner has waiting tasks again, beside those of the `active` ones with the least counters, one a lane."""

    def drained(self, owner: Owner) -> None:
        """The owner has no waiting task in some lane any more."""

    def order(self, task: Task) -> Any:
        self._came.setdefault(task.call.lane, {}).setdefault(self.owner(task), task.sequence)
        return task.sequence

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        self._forget(queue)
        for lane in queue.lanes():
            stalled, version = self._stalled.pop(lane, (None, 0))
            while (task := self.first(queue, lane)) is not None:
                found: Placement | None = None
                if self.admitted(task, cluster, version if task is stalled else None):
                    found = next(iter(self.choose(task, queue, cluster)), None)
                if found is None:
                    self._stalled[lane] = (task, lane.version)
                    break
                stalled = None
                yield found

    def first(self, queue: TaskQueue, lane: Lane) -> Task | None:
        """The task that goes next: the first of the owner with the least counter."""
        self._enter(queue)
        line = self._lines.get(lane)
        owner = self._least(line, queue) if line is not None else None
        return None if owner is None else queue.head_of(lane, owner)

    def _forget(self, queue: TaskQueue) -> None:
        """Lanes in which nobody waits."""
        for lane in [lane for lane in self._lines if not queue.waiting(lane)]:
            line = self._lines.pop(lane)
            self._stalled.pop(lane, None)
            for owner in line.entries:
                self.drained(owner)
        for lane in [lane for lane in self._came if not queue.waiting(lane)]:
            del self._came[lane]

    def _enter(self, queue: TaskQueue) -> None:
        """Takes in who came and whose counter went down."""
        self._lower(queue)
        for lane, came in self._came.items():
            line = self._lines.get(lane)
            if line is None:
                line = self._lines[lane] = _Line(lane)
            for owner, sequence in came.items():
                if owner in line.entries or queue.head_of(lane, owner) is None:  # (it has left again, or is held)
                    continue
                if not any(owner in other.entries for other in self._lines.values()):
                    firsts = [self._least(other, queue) for other in self._lines.values()]
                    self.arrived(owner, [first for first in firsts if first is not None])
                self._push(line, owner, sequence, queue)
        self._came.clear()

    def _lower(self, queue: TaskQueue) -> None:
        lowered = self.lowered()
        if lowered == ():
            return
        for line in self._lines.values():
            owners = list(line.entries) if lowered is None else [owner for owner in lowered if owner in line.entries]
            for owner in owners:
                self._push(line, owner, line.entries[owner][1], queue)
            if len(line.heap) > 64 + 4 * len(line.entries):  # most of it counts no more
                line.heap = list(line.entries.values())
                heapify(line.heap)

    def _push(self, line: _Line, owner: Owner, sequence: int, queue: TaskQueue) -> None:
        value = self.counter(owner, queue.head_of(line.lane, owner))
        entry = line.entries[owner] = (value, sequence, owner)
        heappush(line.heap, entry)

    def _least(self, line: _Line, queue: TaskQueue) -> Owner | None:
        """The owner with the least counter among those that wait."""
        heap = line.heap
        while heap:
            value, sequence, owner = entry = heap[0]
            if line.entries.get(owner) != entry:  # (compiled, a tuple has no identity)
                heappop(heap)
                continue
            head = queue.head_of(line.lane, owner)
            if head is None:
                heappop(heap)
                del line.entries[owner]
                self.drained(owner)
            elif (now := self.counter(owner, head)) > value:
                line.entries[owner] = (now, sequence, owner)
                heapreplace(heap, line.entries[owner])
            else:
                return owner
        return None
