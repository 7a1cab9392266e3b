"""`round_robin`: engines in turn, blind to load but for the room that a task needs.

A placement costs O(log E); where most engines are full, O(log E) and the number of those that are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engines import Engine, Lane, by_id
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, first_fit
from parrot.serve.policies.room import roomy
from parrot.serve.queue import TaskQueue

PROBES = 16  #: engines that are asked in turn, before those that have room are looked up


@mypyc_attr(allow_interpreted_subclasses=True)
class RoundRobin(InOrder):
    """Tasks in order of readiness, each to the next engine in order of registration that has room for it."""

    name: ClassVar[str] = "round_robin"

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._last: WeakKeyDictionary[Lane, int] = WeakKeyDictionary()

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        lane = task.call.lane
        found = first_fit(task, self._in_turn(task, lane, cluster), cluster)
        if found is None:
            return ()
        self._last[lane] = found.engine.id
        return (found,)

    def _in_turn(self, task: Task, lane: Lane, cluster: Cluster) -> Iterator[Engine]:
        """The lane's engines, the one behind the last that was taken first. Of full ones only some are among them."""
        last = self._last.get(lane, 0)
        turn = lane.ordered(by_id).after(last)
        yield from islice(turn, PROBES)
        # Most are full, it seems. Those that fit are few then, so the next of them is the least of a few.
        yield from sorted(roomy(task, lane), key=lambda engine: (engine.id <= last, engine.id))
        yield from turn
