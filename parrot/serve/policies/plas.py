"""`plas`: least attained service of the program (Autellix, arXiv 2502.13965): its tasks wait behind those of programs that have
been served less, so that small programs overtake large ones although nobody knows their sizes.

- Service is the time that a program's finished tasks were in service. A task gets the level of what its program has attained
  when it is queued, and keeps it: level 0 below `quantum_s` seconds, each further level twice as wide, `levels` in all; within
  a level in order of readiness. (The source discretises too, and gives no numbers. Its demotion of running calls is the
  engine's affair: a placed task is not taken back.)
- Against starvation, a task goes to level 0 once its program has waited, this task included, `beta` times as long as it was
  served. (The source's rule; it leaves beta open.)
- Engines: a prompt of more than `long_tokens` goes to the engine of its program, which holds its contexts; a shorter one, the
  first of a program, and one whose engine has no room, to the least loaded. (2,048 tokens and the rule are the source's, but
  for the last case: it has a queue an engine, where such a call would wait.)

A task that finds no room holds back those behind it. O(log Q) a task, O(log E) an engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.serve.engines import Engine, Lane, by_load
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement, Terms, best_of, load_terms
from parrot.serve.policies.loaded import least_loaded_first
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue

MOST_HOMES = 65536  #: programs whose engine is remembered, those with a long prompt last


@mypyc_attr(allow_interpreted_subclasses=True)
class LeastAttained(InOrder):
    """Tasks by the level of the service that `attained` says, with the starving ones first."""

    work_conserving: ClassVar[bool] = False  # a starving task that finds no room holds back the first in order
    uses_service: bool = True
    parameters: ClassVar[dict[str, Parameter]] = {
        "levels": Parameter(int, 8, "levels of attained service", at_least=1, at_most=64),
        "quantum_s": Parameter(float, 2.0, "seconds of service up to which a program is on the first level", at_least=0.001),
        "beta": Parameter(float, 10.0, "waiting, in parts of its service, after which a program goes first", at_least=0),
        "long_tokens": Parameter(int, 2048, "a longer prompt goes to its program's engine", at_least=0),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._levels = int(parameters["levels"])
        self._quantum_s = float(parameters["quantum_s"])
        self._beta = float(parameters["beta"])
        self._long_tokens = int(parameters["long_tokens"])
        self._homes: OrderedDict[int, int] = OrderedDict()  # program -> engine
        # When a waiting task will be starving: until then it stays where its level puts it.
        self._later: dict[Lane, list[tuple[float, int, Task]]] = {}
        self._starving: dict[Lane, list[tuple[int, Task]]] = {}

    def attach(self, cluster: Cluster) -> None:
        self._service = cluster.service

    def attained(self, task: Task) -> float:
        """Seconds of service that the task is ranked by."""
        raise NotImplementedError

    def order(self, task: Task) -> Any:
        served = self.attained(task)
        level = self._level(served)
        if level:
            account = self._service.program(task)
            ready = task.ready_s if task.ready_s is not None else 0.0
            due = ready + self._beta * account.seconds - account.waited_s
            heappush(self._later.setdefault(task.call.lane, []), (due, task.sequence, task))
        return level, task.sequence

    def _level(self, served_s: float) -> int:
        level, bound = 0, self._quantum_s
        while served_s >= bound and level < self._levels - 1:
            level, bound = level + 1, bound + self._quantum_s * (2 << level)
        return level

    def place(self, queue: TaskQueue, cluster: Cluster, now: float) -> Iterator[Placement]:
        for heaps in (self._later, self._starving, self._stalled):
            for lane in [lane for lane in heaps if not queue.waiting(lane)]:
                del heaps[lane]
        for lane in queue.lanes():
            self._promote(lane, now, queue.waiting(lane))
            stalled, version = self._stalled.pop(lane, (None, 0))
            while (task := self.first(queue, lane)) is not None:
                found: Placement | None = None
                if self.admitted(task, cluster, version if task is stalled else None):
                    found = self._engine_for(task, cluster)
                if found is None:
                    self._stalled[lane] = (task, lane.version)
                    break
                stalled = None
                yield found

    def _promote(self, lane: Lane, now: float, waiting: int) -> None:
        later = self._later.get(lane)
        if later and len(later) > 64 + 2 * waiting:  # most of them wait no longer
            later = self._later[lane] = [entry for entry in later if entry[2].in_queue]
            heapify(later)
        while later and (later[0][0] <= now or not later[0][2].in_queue):
            _, sequence, task = heappop(later)
            if task.in_queue:
                heappush(self._starving.setdefault(lane, []), (sequence, task))

    def first(self, queue: TaskQueue, lane: Lane) -> Task | None:
        """The task that goes next: the first of the starving and of level 0, by readiness; else of the lowest level."""
        starving = self._starving.get(lane)
        while starving and not starving[0][1].in_queue:
            heappop(starving)
        head = queue.head(lane)
        if starving and (head is None or head.order > (0, starving[0][0])):
            return starving[0][1]
        return head

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterable[Placement]:
        found = self._engine_for(task, cluster)
        return () if found is None else (found,)

    def _engine_for(self, task: Task, cluster: Cluster) -> Placement | None:
        lane = task.call.lane
        program = task.program_sequence
        least = lane.ordered(by_load).first()
        if least is None:
            return None
        long = cluster.prompt_tokens(task, least) > self._long_tokens
        home = lane.engines.get(self._homes.get(program, -1)) if long else None
        rule = "short_balanced" if not long else "home" if home is not None else "first_home"
        found = best_of(task, self._ranked(task, home, cluster), cluster, rule=rule)
        if found is not None and home is not None and found.engine is not home:
            found.rule = "home_full"
        if found is not None and long:
            self._homes.pop(program, None)
            self._homes[program] = found.engine.id
            if len(self._homes) > MOST_HOMES:
                self._homes.popitem(last=False)
        return found

    def _ranked(self, task: Task, home: Engine | None, cluster: Cluster) -> Iterator[tuple[Engine, Terms]]:
        attained = self.attained(task)
        if home is not None:
            yield home, {**load_terms(home), "attained_s": attained, "home": 1}
        for engine, terms in least_loaded_first(task, cluster, lambda engine: {**load_terms(engine), "attained_s": attained}):
            if engine is not home:
                yield engine, terms


@mypyc_attr(allow_interpreted_subclasses=True)
class Plas(LeastAttained):
    """By the service of all finished tasks of the program."""

    name: ClassVar[str] = "plas"

    def attained(self, task: Task) -> float:
        return self._service.program(task).seconds
