"""`round_robin`: engines in turn, blind to load but for the room that a task needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engines import Lane
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, first_fit
from parrot.serve.queue import TaskQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class RoundRobin(InOrder):
    """Tasks in order of readiness, each to the next engine in order of registration that has room for it."""

    name: ClassVar[str] = "round_robin"

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._last: WeakKeyDictionary[Lane, int] = WeakKeyDictionary()

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterator[Placement]:
        lane = task.call.lane
        engines = cluster.engines(lane)
        last = self._last.get(lane, 0)
        start = next((i for i, engine in enumerate(engines) if engine.id > last), 0)
        found = first_fit(task, engines[start:] + engines[:start], cluster)
        if found is not None:
            self._last[lane] = found.engine.id
            yield found
