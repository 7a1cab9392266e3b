"""`least_loaded`: the engine with the fewest reserved tokens by the core's own count; the floor that needs no DAG."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from mypy_extensions import mypyc_attr

from parrot.serve.engines import by_load
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, first_fit
from parrot.serve.queue import TaskQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class LeastLoaded(InOrder):
    """Tasks in order of readiness, each to the least loaded engine that has room for it."""

    name: ClassVar[str] = "least_loaded"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        found = first_fit(task, task.call.lane.ordered(by_load), cluster)
        return () if found is None else (found,)
