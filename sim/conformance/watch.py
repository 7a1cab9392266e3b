"""Stands between a core and its policy, and sees whether the policy has changed anything that it was only to read.

All that a policy can reach is noted before it is asked and compared when it has answered. What it may fill in are caches: the
prompt's lengths by tokenizer, an index of engines that it asked for, the engine that was last found to have room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from parrot.serve.core import ServeCore
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, Placement, Policy
from parrot.serve.queue import TaskQueue
from sim.conformance.play import Violation

#: Fields of the views that a reader fills in.
_CACHES = frozenset(
    {"counted", "counted_under", "tokens", "indexes", "__weakref__", "_fitting", "_with_room", "_roomy", "_ages"}
)

_CONTAINERS = frozenset({dict, list, deque, set})

Seen = dict[tuple[Any, str], list[Any]]  #: a thing and what it is -> its fields


class Watched:
    """The `policy` of `core`. Everything that is not watched is the policy's own. `found`: the first change that it made; it is
    not raised, because a core contains what a policy raises."""

    def __init__(self, policy: Policy, core: ServeCore) -> None:
        self.found: Violation | None = None
        self._policy = policy
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def order(self, task: Task) -> Any:
        before = _fields(task)
        key = self._policy.order(task)
        self._compare({(task, "task"): before}, {(task, "task"): _fields(task)}, "order")
        return key

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        before = _seen(self._core)
        placements: Iterable[Placement] = self._policy.place(queue, cluster, now)
        iterator = iter(placements)
        while True:
            try:
                placement = next(iterator)
            except StopIteration:
                return
            finally:
                self._compare(before, _seen(self._core), "place")
            yield placement
            before = _seen(self._core)

    def _compare(self, before: Seen, after: Seen, method: str) -> None:
        if self.found is None and before != after:
            self.found = Violation("read-only views", f"`{method}` {_difference(before, after)}")


def watch(core: ServeCore) -> Watched:
    """Puts a Watched in the place of the core's policy."""
    watched = Watched(core.scheduler.policy, core)
    core.scheduler.policy = watched  # type: ignore[assignment]
    return watched


def _seen(core: ServeCore) -> Seen:
    """All that the views show, shallow copies: two that compare equal hold the same things in the same order."""
    scheduler = core.scheduler
    seen: Seen = {(scheduler.queue, "the queue"): _fields(scheduler.queue)}
    seen[scheduler.cluster, "the cluster"] = _fields(scheduler.cluster)
    for lane in scheduler.engines.lanes.values():
        seen[lane, "lane"] = _fields(lane)
    for engine in scheduler.engines.live.values():
        seen[engine, "engine"] = _fields(engine)
        for context in engine.contexts.values():
            seen[context, "context"] = _fields(context)
    for session in core.sessions.values():
        seen[session, "session"] = _fields(session)
        for call in session.calls:
            for task in call.tasks:
                if task.ended:
                    continue
                seen[task, "task"] = _fields(task)
                if task.group is not None:
                    seen[task.group, "task group"] = _fields(task.group)
                for node in task.path or ():
                    if (node, "prefix") not in seen:
                        seen[node, "prefix"] = _fields(node)
    return seen


_readers: dict[Any, tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]] = {}


def _reader(kind: Any) -> tuple[tuple[str, ...], Callable[[Any], tuple[Any, ...]]]:
    """The names of the fields of a slotted class, and what reads them all."""
    found = _readers.get(kind)
    if found is None:
        names = tuple(name for name in kind.__slots__ if name not in _CACHES)
        found = _readers[kind] = names, attrgetter(*names)
    return found


def _fields(thing: Any) -> list[Any]:
    if hasattr(thing, "__slots__"):
        values: Iterable[Any] = _reader(type(thing))[1](thing)
    else:
        values = [value for name, value in vars(thing).items() if name not in _CACHES]
    return [_copied(value) if type(value) in _CONTAINERS else value for value in values]


def _names(thing: Any) -> Sequence[str]:
    if hasattr(thing, "__slots__"):
        return _reader(type(thing))[0]
    return [name for name in vars(thing) if name not in _CACHES]


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return [*value, *[_copied(inner) if type(inner) in _CONTAINERS else inner for inner in value.values()]]
    return list(value)


def _difference(before: Seen, after: Seen) -> str:
    """The first, in words."""
    for (thing, kind), values in before.items():
        now = after.get((thing, kind))
        name = f"{kind} {thing.id}" if hasattr(thing, "id") else kind
        if now is None:
            return f"removed {name}"
        for field, was, value in zip(_names(thing), values, now, strict=True):
            if was != value:
                return f"changed {name}: its {field} was {_short(was)}, is {_short(value)}"
    return f"added {', '.join(kind for _, kind in list(after)[len(before) :])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
