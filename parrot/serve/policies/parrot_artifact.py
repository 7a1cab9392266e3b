"""`parrot_artifact`: as the published artifact of Parrot (OSDI'24) places tasks, so that its figures can be compared.

A task is placed alone, the first of the queue for which an engine has room; one that finds none does not hold back those
behind it, so that a large one can starve, as it could there.

- `app_fifo`: dispatching a task pulls its successors to the head of the queue. There, a successor may be dispatched once its
  producers are, and streams from them; here it is queued once they have finished. So tasks that another one led to go before
  those that begin a program; either kind in order of readiness. Off: by readiness.
- `graph_group` (the artifact's `dag_aware`; it forms no groups): the engine with the fewest free places, so that those with
  many stay free for whoever needs them; and an engine with a latency-bound task runs `latency_tasks` tasks at most, what the
  artifact's applications annotated by hand as an upper bound of requests (null: no bound). Off: the engine with the most.
- `ctx_aware`: first of all, the first engine, in order of registration, that holds the prompt's first constant.

There is no `ctx_group`. Where the artifact refuses an engine because a prompt is too long for what its count has left, the
core's own count decides (a cached prefix takes no room, and one task alone always fits): nothing waits for ever.
An engine is found in O(log E); with `ctx_aware`, in the number of those that hold the prefix. While an engine has places and no
waiting task fits there, each of them is asked: O(Q).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engine_index import EngineIndex, Load
from parrot.serve.engines import Engine, Lane
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of, open_first
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue


def most_places(engine: Engine) -> Load:
    """Most free places for tasks."""
    return len(engine.tasks) - engine.description.tasks_capacity


def fewest_places(engine: Engine) -> Load:
    """Fewest free places for tasks; those without any last."""
    free = engine.description.tasks_capacity - len(engine.tasks)
    return free if free > 0 else 1 << 40


@mypyc_attr(allow_interpreted_subclasses=True)
class ParrotArtifact(InOrder):
    """Whatever task finds an engine is placed, in the order of the queue."""

    name: ClassVar[str] = "parrot_artifact"
    work_conserving: ClassVar[bool] = False  # a prefix that another task has brought meanwhile may let in what found no room
    in_order: ClassVar[bool] = False
    parameters: ClassVar[dict[str, Parameter]] = {
        "app_fifo": Parameter(bool, False, "what another task led to goes before what begins a program"),
        "graph_group": Parameter(bool, False, "the engine with the fewest free places, not the most"),
        "ctx_aware": Parameter(bool, False, "the first engine that holds the prompt's first constant"),
        "latency_tasks": Parameter(
            int, None, "with graph_group, tasks that an engine with a latency-bound one may run; null: no bound", at_least=1
        ),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._app_fifo = bool(parameters["app_fifo"])
        self._ctx_aware = bool(parameters["ctx_aware"])
        self._key = fewest_places if parameters["graph_group"] else most_places
        self._latency_tasks: int | None = parameters["latency_tasks"] if parameters["graph_group"] else None
        # Tasks that were queued since the last look, and the version that a lane had then: others have found no room, and
        # only engines with more room since need look at them again.
        self._fresh: dict[Lane, dict[Task, None]] = {}
        self._seen: dict[Lane, int] = {}

    def order(self, task: Task) -> Any:
        self._fresh.setdefault(task.call.lane, {})[task] = None
        led_to = any(variable.producer is not None for variable in task.inputs()) if self._app_fifo else False
        return not led_to, task.sequence

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        for lane in [lane for lane in self._seen if not queue.waiting(lane)]:
            del self._seen[lane]
        for lane in queue.lanes():
            fresh = self._fresh.pop(lane, {})
            opened = _with_places(lane.opened_since(self._seen.get(lane, 0)))
            for task in queue.in_order(lane) if opened else ():
                if task in fresh:
                    del fresh[task]
                elif not any(cluster.fits(task, engine) for engine in opened):
                    continue
                yield from self._if_any(task, queue, cluster)
                opened = _with_places(opened)
                if not opened:
                    break
            for task in sorted(fresh, key=_order_of):
                if task.in_queue:
                    yield from self._if_any(task, queue, cluster)
            self._seen[lane] = lane.version
        self._fresh.clear()

    def _if_any(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        return self.choose(task, queue, cluster) if cluster.anywhere(task) else ()

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        if self._ctx_aware and (found := best_of(task, self._holders(task), cluster, rule="prefix")) is not None:
            return (found,)
        index = task.call.lane.ordered(self._key)
        rule = "fewest_places" if self._key is fewest_places else "most_places"
        ranked = open_first(task, cluster, lambda ids: self._by_places(task, index, ids))
        found = best_of(task, ranked, cluster, rule=rule)
        return () if found is None else (found,)

    def _by_places(self, task: Task, index: EngineIndex, ids: list[int] | None) -> Iterator[tuple[Engine, Terms]]:
        for engine in index if ids is None else index.among(ids):
            if self._allows(task, engine):
                yield engine, _places(engine)

    def _holders(self, task: Task) -> Iterator[tuple[Engine, Terms]]:
        path = task.path
        contexts = path[0].contexts if path else None
        lane = task.call.lane.engines
        for engine_id in sorted(contexts) if contexts else ():
            engine = lane.get(engine_id)
            if engine is not None and self._allows(task, engine):
                yield engine, _places(engine)

    def _allows(self, task: Task, engine: Engine) -> bool:
        if self._latency_tasks is None or not (engine.latency_tasks or task.latency_sensitive):
            return True
        return not engine.tasks or len(engine.tasks) < self._latency_tasks


def _with_places(engines: Collection[Engine]) -> list[Engine]:
    return [engine for engine in engines if len(engine.tasks) < engine.description.tasks_capacity]


def _order_of(task: Task) -> tuple[Any, int]:
    return task.order, task.sequence


def _places(engine: Engine) -> Terms:
    return {"free_places": engine.description.tasks_capacity - len(engine.tasks), "tasks": len(engine.tasks)}
