"""A base for policies that go through the whole queue in order: a task that finds no room is passed over, and the next tried.

What was passed over is not asked again until there is room for it: each lane keeps those tasks in order, with the room that
each needs (`Needs`), and holds only engines against them that have had more room since (`Lane.opened_since`). So an
instant costs O(log Q) for each task that is placed, and nothing for those that cannot be, however many they are.

A need is the whole prompt and all that may be generated. Of what is cached only the first link of the prompt is counted (what
many have in common, a system prompt), where engines hold it; a task of which more is cached may wait for more room than it
needs until it is the first of its lane: the first is always asked as it is. Nobody starves: for the first of a lane an engine
is kept free once it has waited for its patience (`parrot.serve.claims`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engines import KEPT_OPENED, Engine, Lane, by_room
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, least_prompt
from parrot.serve.prefixes import PrefixNode
from parrot.serve.queue import TaskQueue

Key = tuple[Any, int]  #: (order, sequence): where a task stands in its lane

ANY_ROOM = 1 << 48  #: of an idle engine, which takes any task
MOST_HEADS = 32  #: first links that many tasks of a lane have in common, which are told apart
FEW, PROBED = 8, 64  #: engines that are looked at where all have more room than before, of so many with the most room
MOST_FRESH = 1024  #: tasks of a lane that have come since the last look, above which those that have ended are left out
MOST_MISTAKEN = 32  #: tasks that are looked at in an instant though they fit nowhere (a prompt too long for an idle engine)


class _Node:
    __slots__ = ("key", "least", "left", "need", "priority", "right", "task")

    def __init__(self, key: Key, need: int, task: Task) -> None:
        self.key = key
        self.need = need
        self.task = task
        self.least = need  # of this one and all below it
        self.priority = _scrambled(key[1])
        self.left: _Node | None = None
        self.right: _Node | None = None


class Needs:
    """Tasks in order with the room that each needs; a treap, whose priorities follow from the tasks' sequence numbers."""

    __slots__ = ("_root",)

    def __init__(self) -> None:
        self._root: _Node | None = None

    def __bool__(self) -> bool:
        return self._root is not None

    def add(self, key: Key, need: int, task: Task) -> None:
        self._root = _inserted(self._root, _Node(key, need, task))

    def remove(self, key: Key) -> None:
        """Takes out the task that was added with `key`."""
        self._root = _without(self._root, key)

    def first(self, room: int, after: Key | None = None) -> tuple[Key, Task] | None:
        """The first task, in order (and behind `after`), that needs no more than `room`. O(log n)."""
        found = _first(self._root, room, after)
        return None if found is None else (found.key, found.task)


def _scrambled(number: int) -> int:
    """32 bits that look random and are not."""
    number = (number * 2654435761) & 0xFFFFFFFF
    number = ((number ^ (number >> 15)) * 2246822519) & 0xFFFFFFFF
    return number ^ (number >> 13)


def _settle(node: _Node) -> None:
    least = node.need
    left, right = node.left, node.right
    if left is not None and left.least < least:
        least = left.least
    if right is not None and right.least < least:
        least = right.least
    node.least = least


def _inserted(node: _Node | None, new: _Node) -> _Node:
    if node is None:
        return new
    if new.key < node.key:
        child = node.left = _inserted(node.left, new)
        if child.priority > node.priority:
            node.left, child.right = child.right, node
            _settle(node)
            node = child
    else:
        child = node.right = _inserted(node.right, new)
        if child.priority > node.priority:
            node.right, child.left = child.left, node
            _settle(node)
            node = child
    _settle(node)
    return node


def _without(node: _Node | None, key: Key) -> _Node | None:
    if node is None:
        return None
    if key == node.key:
        return _joined(node.left, node.right)
    if key < node.key:
        node.left = _without(node.left, key)
    else:
        node.right = _without(node.right, key)
    _settle(node)
    return node


def _joined(left: _Node | None, right: _Node | None) -> _Node | None:
    if left is None:
        return right
    if right is None:
        return left
    if left.priority > right.priority:
        left.right = _joined(left.right, right)
        _settle(left)
        return left
    right.left = _joined(left, right.left)
    _settle(right)
    return right


def _first(node: _Node | None, room: int, after: Key | None) -> _Node | None:
    while node is not None and node.least <= room:
        if after is not None and not after < node.key:
            node = node.right
            continue
        found = _first(node.left, room, after)
        if found is not None:
            return found
        if node.need <= room:
            return node
        node, after = node.right, None
    return None


class _Class:
    """Passed tasks whose needs are alike: by what they have at the head of their prompts, and whether they are latency-bound.
    `node`: that first link, of `head_tokens`, which are left out of the needs; None: nothing in common."""

    __slots__ = ("head_tokens", "needs", "node", "size", "urgent")

    def __init__(self, node: PrefixNode | None, head_tokens: int, urgent: bool) -> None:
        self.node = node
        self.head_tokens = head_tokens
        self.urgent = urgent
        self.needs = Needs()
        self.size = 0


class _Passed:
    """What was passed over in one lane. `version`: the lane's when all of them were. `head`: the first of the lane then."""

    __slots__ = ("classes", "head", "of", "version")

    def __init__(self) -> None:
        self.version = 0
        self.head: Task | None = None
        self.classes: dict[tuple[PrefixNode | None, bool], _Class] = {}
        self.of: dict[Task, tuple[_Class, Key]] = {}

    def add(self, task: Task) -> None:
        self.discard(task)
        urgent = task.latency_sensitive
        path = task.path
        node = path[0] if path and path[0].contexts else None
        if node is not None and (node, urgent) not in self.classes and len(self.classes) >= MOST_HEADS:
            node = None
        kind = self.classes.get((node, urgent))
        if kind is None:
            kind = self.classes[node, urgent] = _Class(node, 0 if node is None else _head_tokens(task), urgent)
        key = (task.order, task.sequence)
        kind.needs.add(key, least_prompt(task) + task.sampling.max_gen_length - kind.head_tokens, task)
        kind.size += 1
        self.of[task] = kind, key

    def discard(self, task: Task) -> None:
        entry = self.of.pop(task, None)
        if entry is None:
            return
        kind, key = entry
        kind.needs.remove(key)
        kind.size -= 1
        if not kind.size:
            del self.classes[kind.node, kind.urgent]


@mypyc_attr(allow_interpreted_subclasses=True)
class Passing(InOrder):
    """The whole queue in order: what finds no room is passed over. A subclass says where one task (or those that go with it)
    shall run, and, where it is `bounded`, which `bound` below an engine's capacity holds."""

    in_order: ClassVar[bool] = False
    bounded: bool = False

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._fresh: dict[Lane, dict[Task, None]] = {}  # queued since the last look
        self._most_fresh = MOST_FRESH
        self._passed: dict[Lane, _Passed] = {}

    def order(self, task: Task) -> Any:
        """To be called by a subclass's own: it says which task has come."""
        fresh = self._fresh.get(task.call.lane)
        if fresh is None:
            fresh = self._fresh[task.call.lane] = {}
        fresh[task] = None
        if len(fresh) > self._most_fresh:  # nobody asks while no engine is live, and tasks end all the same
            for ended in [other for other in fresh if other.state != "queued" and other is not task]:
                del fresh[ended]
            self._most_fresh = max(MOST_FRESH, 2 * len(fresh))
        return task.sequence

    def bound(self, engine: Engine, urgent: bool) -> int | None:
        """Tokens that the engine may hold with a task that is latency-bound or not; None: its capacity."""
        return None

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        for known in (self._passed, self._fresh):
            for lane in [lane for lane in known if not queue.waiting(lane)]:
                del known[lane]
        for lane in queue.lanes():
            passed = self._passed.get(lane)
            if passed is None:
                passed = self._passed[lane] = _Passed()
            elif len(passed.of) > 64 + 2 * queue.waiting(lane):  # most of them have left the queue otherwise
                for task in [task for task in passed.of if not task.in_queue]:
                    passed.discard(task)
            yield from self._go_through(lane, passed, queue, cluster)

    def _go_through(self, lane: Lane, passed: _Passed, queue: TaskQueue, cluster: Cluster) -> Iterator[Placement]:
        """Every task of the lane that there may be room for, in order; then the first again, since what was placed may have
        brought its prefix."""
        opened = lane.opened_since(passed.version) if lane.version != passed.version else ()
        passed.version = lane.version
        asked = self._to_ask(lane, passed, opened, queue, cluster)
        after: Key | None = None
        task: Task | None = None
        mistaken, placed = 0, False
        try:
            while True:
                found: tuple[Key, Task] | None = None
                if opened and passed.of and not (asked and asked[-1] is queue.head(lane)):
                    found = self._next(lane, passed, opened, after)
                if asked and (found is None or _key_of(asked[-1]) < found[0]):
                    task = asked.pop()
                elif found is not None:
                    task = found[1]
                else:
                    break
                if not task.in_queue:
                    passed.discard(task)
                    continue
                after = _key_of(task)
                went = False
                for placement in self._ask(task, queue, cluster):
                    went = placed = True
                    yield placement
                    passed.discard(placement.task)
                if not task.in_queue:
                    continue
                if task not in passed.of:
                    passed.add(task)
                elif not went:
                    mistaken += 1
                    if mistaken == MOST_MISTAKEN:
                        opened = ()
        finally:  # where the core had to stop here, the others are asked the next time
            if task is not None and task.in_queue and task not in passed.of:
                asked.append(task)
            if asked:
                self._fresh.setdefault(lane, {}).update(dict.fromkeys(asked))
        while placed and (head := queue.head(lane)) is not None:
            placed = False
            for placement in self._ask(head, queue, cluster):
                placed = True
                yield placement
                passed.discard(placement.task)
        passed.head = queue.head(lane)

    def _to_ask(
        self, lane: Lane, passed: _Passed, opened: Collection[Engine], queue: TaskQueue, cluster: Cluster
    ) -> list[Task]:
        """Whom to ask whatever room there is, the first one last: who has come, and who stands first in the lane now."""
        asked = [task for task in self._fresh.pop(lane, ()) if task.in_queue]
        for task in asked:
            passed.discard(task)
        asked.sort(key=_key_of, reverse=True)
        head = queue.head(lane)
        if head is None or (asked and asked[-1] is head):
            return asked
        if head is not passed.head or any(cluster.fits(head, engine) for engine in opened):
            passed.discard(head)
            asked.append(head)
        return asked

    def _ask(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        return self.choose(task, queue, cluster) if cluster.anywhere(task) else ()

    def _next(self, lane: Lane, passed: _Passed, opened: Collection[Engine], after: Key | None) -> tuple[Key, Task] | None:
        """The first passed task behind `after` that one of the `opened` engines may have room for."""
        many = len(opened) > KEPT_OPENED
        rooms = [] if many else self._rooms(opened)
        if not (rooms or many):
            return None
        found: tuple[Key, Task] | None = None
        for kind in passed.classes.values():
            most, node = -1, kind.node
            contexts = None if node is None else node.contexts
            for engine_id, room, urgent_room in self._rooms(_roomiest(lane, node)) if many else rooms:
                if kind.urgent:
                    room = urgent_room
                if node is not None and (contexts is None or engine_id not in contexts):
                    room -= kind.head_tokens
                if room > most:
                    most = room
            if most >= 0:
                first = kind.needs.first(most, after)
                if first is not None and (found is None or first[0] < found[0]):
                    found = first
        return found

    def _rooms(self, engines: Iterable[Engine]) -> list[tuple[int, int, int]]:
        """(id, tokens that it may still take, tokens with a latency-bound task) of those that may take any task."""
        found: list[tuple[int, int, int]] = []
        for engine in engines:
            running = len(engine.tasks)
            if engine.state != "live" or engine.claimed is not None or running >= max(1, engine.description.tasks_capacity):
                continue
            if not running:
                found.append((engine.id, ANY_ROOM, ANY_ROOM))
                continue
            room = urgent_room = engine.description.tokens_capacity - engine.reserved
            if self.bounded:
                bound = self.bound(engine, False)
                room = room if bound is None else min(room, bound - engine.reserved)
                bound = self.bound(engine, True)
                urgent_room = urgent_room if bound is None else min(urgent_room, bound - engine.reserved)
            if room > 0 or urgent_room > 0:
                found.append((engine.id, room, urgent_room))
        return found


def _key_of(task: Task) -> Key:
    return task.order, task.sequence


def _head_tokens(task: Task) -> int:
    """Tokens of the first link under the tokenizer that makes them fewest."""
    tokens = 0
    for content in task.links[0].contents if task.links else ():
        tokens += min(content.lengths.values(), default=0)
    return tokens


def _roomiest(lane: Lane, node: PrefixNode | None) -> list[Engine]:
    """Of all engines of the lane some with the most room, and some of those that hold `node`."""
    contexts = node.contexts if node is not None else None
    found: list[Engine] = []
    held = 0
    for engine in islice(lane.ordered(by_room), PROBED):
        holds = contexts is not None and engine.id in contexts
        if engine.claimed is None and engine.state == "live" and (len(found) - held < FEW or holds):
            found.append(engine)
            held += holds
    if contexts is not None and len(contexts) <= FEW:
        found += [lane.engines[engine_id] for engine_id in contexts if engine_id in lane.engines]
    return found
