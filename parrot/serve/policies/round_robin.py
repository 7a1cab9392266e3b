"""`round_robin`: engines in turn, blind to load but for the room that a task needs.

A placement costs O(log E).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import EngineIndex
from parrot.serve.engines import Engine, Lane, by_id
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of, load_terms, open_first
from parrot.serve.queue import TaskQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class RoundRobin(InOrder):
    """Tasks in order of readiness, each to the next engine in order of registration that has room for it."""

    name: ClassVar[str] = "round_robin"

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._last: WeakKeyDictionary[Lane, int] = WeakKeyDictionary()

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        lane = task.call.lane
        last = self._last.get(lane, 0)
        index = lane.ordered(by_id)
        found = best_of(task, open_first(task, cluster, lambda ids: _in_turn(index, last, ids), blind=True), cluster)
        if found is None:
            return ()
        self._last[lane] = found.engine.id
        return (found,)


def _in_turn(index: EngineIndex, last: int, ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
    """The engines of the index (of those with these `ids`) behind the `last` one, then those before it."""
    if ids is None:
        engines = index.after(last)
    else:
        engines = iter(sorted(index.among(ids), key=lambda engine: (engine.id <= last, engine.id)))
    for engine in engines:
        yield engine, load_terms(engine)
