"""Tasks that are ready and wait for a placement: one sorted line a lane, in the order that the policy gives them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator
from heapq import heappop, heappush
from typing import Any, Final

from parrot.serve.engines import Lane
from parrot.serve.graph import Task
from parrot.serve.prefixes import PrefixNode

Entry = tuple[Any, int, Task]
Owner = str | int  #: a tenant's name, or the sequence number of a program's session

# By names of this module's own that never change: the compiled module need not look them up.
_insort: Final = insort
_bisect_left: Final = bisect_left


class _Last:
    """Sorts behind every other key."""

    def __lt__(self, other: object) -> bool:
        return False

    def __gt__(self, other: object) -> bool:
        return other is not self


LAST = _Last()


class TaskQueue:
    """The queue of activated, undispatched tasks; also the read-only view of it that policies get.

    `order(task)` is asked once when a task is queued, and again only when its depth or deadline changes. With `by_prefix`,
    tasks are indexed by every prefix of their prompts. With `share_by` ("program", "tenant") each of those has a line of its
    own beside the lane's, in the same order.
    """

    def __init__(self, order: Callable[[Task], Any], by_prefix: bool, share_by: str = "") -> None:
        self._order = order
        self._by_prefix = by_prefix
        self._by_tenant = share_by == "tenant"
        self._shares: dict[Lane, dict[Owner, list[Entry]]] | None = {} if share_by else None
        self._lines: dict[Lane, list[Entry]] = {}
        self._ages: dict[Lane, list[tuple[int, Task]]] = {}  # heaps, of lanes that `oldest` was asked for
        self.size = 0  #: as len() says it

    # ---------------------------------------------------------------------------------------- for the core alone

    def add(self, task: Task) -> None:
        task.order = self._order(task)
        line = self._lines.get(task.call.lane)
        if line is None:
            line = self._lines[task.call.lane] = []
        entry = (task.order, task.sequence, task)
        _insort(line, entry)
        self.size += 1
        if self._ages and (ages := self._ages.get(task.call.lane)) is not None:
            heappush(ages, (task.sequence, task))
            if len(ages) > 64 + 2 * len(line):
                del self._ages[task.call.lane]
        if self._shares is not None:
            insort(self._shares.setdefault(task.call.lane, {}).setdefault(self._owner(task), []), entry)
        if task.group is not None:
            task.group.queued[task] = None
        if self._by_prefix:
            for node in task.path or ():
                if node.queued is None:
                    node.queued = {}
                node.queued[task] = None

    def remove(self, task: Task) -> None:
        lane = task.call.lane
        line = self._lines[lane]
        if line[0][2] is task:
            del line[0]
        else:
            del line[_bisect_left(line, (task.order, task.sequence))]
        if not line:
            del self._lines[lane]
            if self._ages:
                self._ages.pop(lane, None)
        self.size -= 1
        if self._shares is not None:
            self._leave_share(self._shares[lane], task)
        if task.group is not None:
            task.group.queued.pop(task, None)
        if self._by_prefix:
            for node in task.path or ():
                if node.queued is not None:
                    node.queued.pop(task, None)

    def _owner(self, task: Task) -> Owner:
        return task.call.session.tenant if self._by_tenant else task.call.session.sequence

    def _leave_share(self, shares: dict[Owner, list[Entry]], task: Task) -> None:
        owner = self._owner(task)
        line = shares[owner]
        del line[bisect_left(line, (task.order, task.sequence))]
        if not line:
            del shares[owner]

    def reorder(self, task: Task) -> None:
        """What `order` depends on may have changed."""
        if self._order(task) != task.order:
            self.remove(task)
            self.add(task)

    # ---------------------------------------------------------------------------------------- for policies too

    def __len__(self) -> int:
        return self.size

    def lanes(self) -> list[Lane]:
        """Lanes in which tasks wait."""
        return list(self._lines)

    def head(self, lane: Lane) -> Task | None:
        """The first task of the lane in the policy's order."""
        line = self._lines.get(lane)
        return line[0][2] if line else None

    def owners(self, lane: Lane) -> Collection[Owner]:
        """Whose tasks wait in the lane: tenants' names or programs' sequence numbers, as the policy's `share_by` says, in
        the order in which their first waiting task came."""
        return self._shares.get(lane, {}).keys() if self._shares is not None else ()

    def head_of(self, lane: Lane, owner: Owner) -> Task | None:
        """The first task of that owner in the lane, in the policy's order."""
        line = self._shares.get(lane, {}).get(owner) if self._shares is not None else None
        return line[0][2] if line else None

    def oldest(self, lane: Lane) -> Task | None:
        """The task of the lane that became ready first, wherever it stands in the policy's order. Whoever asks pays for an
        index of the lane: O(log n) for each task that comes, and for each that goes."""
        ages = self._ages.get(lane)
        if ages is None:
            line = self._lines.get(lane)
            if line is None:
                return None
            ages = self._ages[lane] = sorted((sequence, task) for _, sequence, task in line)
        while ages and not ages[0][1].in_queue:
            heappop(ages)
        return ages[0][1] if ages else None

    def in_order(self, lane: Lane) -> Iterator[Task]:
        """All tasks of the lane as they stand now, in the policy's order; placing some while iterating is fine."""
        for _, _, task in list(self._lines.get(lane, ())):
            if task.in_queue:
                yield task

    def waiting(self, lane: Lane) -> int:
        """How many tasks of the lane wait."""
        return len(self._lines.get(lane, ()))

    def group_of(self, task: Task) -> list[Task]:
        """The queued members of its task group in its lane, itself included; just itself when it has none."""
        if task.group is None:
            return [task]
        return [other for other in task.group.queued if other.call.lane is task.call.lane]

    def sharing(self, task: Task) -> tuple[PrefixNode | None, list[Task]]:
        """The queued tasks of its lane that share its longest prefix that any other shares, itself included."""
        for node in reversed(task.path or ()):
            if node.queued is not None and len(node.queued) > 1:
                shared = [other for other in node.queued if other.call.lane is task.call.lane]
                if len(shared) > 1:
                    return node, shared
        return None, [task]
