"""Policies each of which does one thing that no policy may do, for tests of `sim.check_policy`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from parrot.serve.graph import Task
from parrot.serve.policies.base import Candidate, Cluster, InOrder, Placement, first_fit
from parrot.serve.policies.least_loaded import LeastLoaded
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue


class Right(LeastLoaded):
    """Nothing is wrong with it, but what `wrong` says."""

    name = "right"
    parameters: ClassVar[dict[str, Parameter]] = {
        "wrong": Parameter(str, "nothing", "what it does wrong", choices=("nothing", "everything"))
    }

    def __init__(self, parameters: dict[str, Any], generator: Any) -> None:
        super().__init__(parameters, generator)
        self._wrong = parameters["wrong"] == "everything"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        return [] if self._wrong else super().choose(task, queue, cluster)


class OverCapacity(InOrder):
    """Always the first engine, whether or not it has room."""

    name = "over_capacity"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterator[Placement]:
        for engine in cluster.engines(task.call.lane)[:1]:
            yield Placement(task, engine)


class Raising(LeastLoaded):
    """Fails on tasks that others wait for."""

    name = "raising"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        if task.depth:
            raise RuntimeError("depth is not understood")
        return super().choose(task, queue, cluster)


class Unordered(LeastLoaded):
    """Has no key for some tasks."""

    name = "unordered"

    def order(self, task: Task) -> Any:
        return {"latency": 0}[task.criteria.value if task.criteria is not None else "none"], task.sequence


class Starving(LeastLoaded):
    """Never places a task with a long prompt."""

    name = "starving"
    work_conserving = False

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        for lane in queue.lanes():
            for task in queue.in_order(lane):
                engines = cluster.engines(lane)
                if engines and cluster.prompt_tokens(task, engines[0]) < 30:
                    found = first_fit(task, engines, cluster)
                    if found is not None:
                        yield found


class Idle(LeastLoaded):
    """Claims work conservation, and leaves the second place of every engine empty."""

    name = "idle"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        empty = [engine for engine in cluster.engines(task.call.lane) if not engine.tasks]
        found = first_fit(task, empty, cluster)
        return () if found is None else (found,)


_placed = 0


class Global(LeastLoaded):
    """Keeps count in its module, for all cores of the process together."""

    name = "global"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        global _placed
        _placed += 1
        engines = cluster.engines(task.call.lane)
        start = _placed % len(engines) if engines else 0
        found = first_fit(task, engines[start:] + engines[:start], cluster)
        return () if found is None else (found,)


class Hashing(LeastLoaded):
    """By the hash of a str, which every process draws anew."""

    name = "hashing"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        engines = sorted(cluster.engines(task.call.lane), key=lambda engine: hash(f"{engine.id}/{task.sequence}"))
        found = first_fit(task, engines, cluster)
        return () if found is None else (found,)


class Booking(LeastLoaded):
    """Writes into the books of an engine."""

    name = "booking"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        for engine in cluster.engines(task.call.lane):
            engine.reserved += 1
        return super().choose(task, queue, cluster)


class Reordering(LeastLoaded):
    """Moves a task to the front of the queue's own line."""

    name = "reordering"

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        for lane in queue.lanes():
            queue._lines[lane].reverse()
        yield from super().place(queue, cluster, now)


class Marking(LeastLoaded):
    """Leaves a note on a task while it orders it."""

    name = "marking"

    def order(self, task: Task) -> Any:
        task.depth += 1
        return task.sequence


class Lying(LeastLoaded):
    """Explains with engines that it did not choose."""

    name = "lying"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterator[Placement]:
        for placement in super().choose(task, queue, cluster):
            others = [e for e in cluster.engines(task.call.lane) if e is not placement.engine]
            placement.candidates = [Candidate(engine, {"luck": 1.0}, True) for engine in others]
            yield placement


class Endless(LeastLoaded):
    """Explains with a number that is none."""

    name = "endless"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterator[Placement]:
        for placement in super().choose(task, queue, cluster):
            placement.candidates = [Candidate(placement.engine, {"score": float("inf")}, True)]
            yield placement


class Watched(LeastLoaded):
    """Decides otherwise when it is to explain."""

    name = "watched"

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        engines = cluster.engines(task.call.lane)
        found = first_fit(task, engines if cluster.explaining else engines[::-1], cluster)
        return () if found is None else (found,)
