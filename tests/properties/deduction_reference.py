"""What a session's gets mean for its tasks, from scratch: the rules of `parrot.serve.deduction` as recursive functions.

It knows nothing of the order in which calls and gets came, keeps no indexes, and visits tasks as often as it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, reduce
from typing import NamedTuple

from parrot.protocol.api import Criteria

Name = tuple[int, int]  #: a task: its call's number and its output's
BOUND = {Criteria.LATENCY, Criteria.TTFT}


class Known(NamedTuple):
    """A task: the tasks that read its output, who of those waits for no other, and what gets have named it with."""

    consumers: tuple[Name, ...]
    only_source_of: tuple[Name, ...]
    named: tuple[Criteria, ...]


class Deduced(NamedTuple):
    activated: bool
    criteria: Criteria | None
    depth: int
    aim: Name | None  # None: itself
    level: int
    group: frozenset[Name] | None
    sensitive: bool


def join(a: Criteria | None, b: Criteria | None) -> Criteria | None:
    """The least that is as strict as both: throughput below everything, latency above everything, the others apart."""
    if a is None or b is None:
        return a or b
    if a is b or b is Criteria.THROUGHPUT:
        return a
    return b if a is Criteria.THROUGHPUT else Criteria.LATENCY


def deduce(tasks: dict[Name, Known]) -> dict[Name, Deduced]:
    """Each task's deduction."""

    def own(name: Name) -> Criteria | None:
        named: list[Criteria | None] = list(tasks[name].named)
        return reduce(join, named, None)

    @cache
    def criteria(name: Name) -> Criteria | None:
        """None: nobody wants it."""
        passed = [Criteria.LATENCY if criteria(c) in BOUND else Criteria.THROUGHPUT for c in active_consumers(name)]
        return reduce(join, passed, own(name))

    @cache
    def active_consumers(name: Name) -> tuple[Name, ...]:
        return tuple(c for c in tasks[name].consumers if criteria(c) is not None)

    @cache
    def depth(name: Name) -> int:
        return max((depth(c) + 1 for c in active_consumers(name)), default=0)

    @cache
    def stage(name: Name) -> tuple[int, Name]:
        """(level, aim): the farthest fetched output of its class; of two equally far the first submitted."""
        bound = criteria(name) in BOUND
        ways = [(0, name)] if own(name) is not None and (own(name) in BOUND) == bound else []
        for c in active_consumers(name):
            if (criteria(c) in BOUND) == bound:
                level, aim = stage(c)
                ways.append((level + 1, aim))
        farthest = max(level for level, _ in ways)
        return farthest, min(aim for level, aim in ways if level == farthest)

    @cache
    def alone(name: Name) -> bool:
        return any(own(c) in BOUND or alone(c) for c in tasks[name].only_source_of if criteria(c) is not None)

    found: dict[Name, Deduced] = {}
    for name in tasks:
        if criteria(name) is None:
            found[name] = Deduced(False, None, 0, None, 0, None, False)
            continue
        level, aim = stage(name)
        members = frozenset(other for other in tasks if criteria(other) is not None and stage(other) == (level, aim))
        group = members if level and len(members) > 1 else None
        wanted: Callable[[Criteria | None], bool] = lambda c: c not in (None, Criteria.THROUGHPUT)  # noqa: E731
        sensitive = wanted(criteria(name)) and (group is None or alone(name) or wanted(own(name)))
        found[name] = Deduced(True, criteria(name), depth(name), aim if level else None, level, group, sensitive)
    return found
