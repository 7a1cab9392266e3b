"""`parrot`: Algorithm 1 of the paper (OSDI'24, section 5.4), with its four switches.

- `app_fifo`: programs in the order of their arrival; in a program, the task farthest along its DAG first. Off: by
  readiness.
- `graph_group`: the queued members of a task group go to one engine as a whole, or to as few as can hold them.
- `ctx_group`: queued tasks that share a prefix go together.
- `ctx_aware`: prefer the engine that holds the longest part of the prompt, as long as the tokens that it saves, times
  `ctx_weight`, are no fewer than those that it has reserved beyond the least loaded engine: a short prefix that is hot
  must not pile all work on one engine. (The paper prefers it always; a large weight does so too.)
- Always last, and alone when all are off: the feasible engine with the least harm. A latency-bound task lowers what
  its engine may hold to `latency_capacity` tokens (null: no lower than it is); a throughput task does not, and goes
  first where no latency-bound task would suffer from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from typing import Any, ClassVar

import numpy as np
from mypy_extensions import mypyc_attr

from parrot.protocol.api import Criteria
from parrot.serve.engines import Engine, Load, by_harm, by_load
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, InOrder, Placement
from parrot.serve.policies.parameters import Parameter
from parrot.serve.queue import TaskQueue


@mypyc_attr(allow_interpreted_subclasses=True)
class Parrot(InOrder):
    """Tasks in order; a task takes those with it that belong together."""

    name: ClassVar[str] = "parrot"
    parameters: ClassVar[dict[str, Parameter]] = {
        "app_fifo": Parameter(bool, False, "programs in order of arrival, the task farthest along its DAG first"),
        "graph_group": Parameter(bool, False, "a task group goes to an engine as a whole"),
        "ctx_group": Parameter(bool, False, "queued tasks that share a prefix go together"),
        "ctx_aware": Parameter(bool, False, "prefer an engine that holds the prefix"),
        "ctx_weight": Parameter(
            float, 2.0, "reserved tokens beyond the least loaded engine's that a cached token outweighs", at_least=0
        ),
        "latency_capacity": Parameter(
            int, None, "tokens that an engine with a latency-bound task may hold; null: its capacity", at_least=1
        ),
    }

    def __init__(self, parameters: dict[str, Any], generator: np.random.Generator) -> None:
        super().__init__(parameters, generator)
        self._app_fifo = bool(parameters["app_fifo"])
        self._graph_group = bool(parameters["graph_group"])
        self._ctx_group = bool(parameters["ctx_group"])
        self._ctx_aware = bool(parameters["ctx_aware"])
        self._ctx_weight = float(parameters["ctx_weight"])
        self._latency_capacity: int | None = parameters["latency_capacity"]
        self.uses_prefix_groups = self._ctx_group

    def order(self, task: Task) -> Any:
        return (task.program_sequence, task.depth) if self._app_fifo else task.sequence

    def choose(self, task: Task, queue: TaskQueue, cluster: Cluster) -> Iterator[Placement]:
        if self._graph_group and task.group is not None:
            members = queue.group_of(task)
            if len(members) > 1:
                yield from self._together(task, members, "task_group", cluster)
                return
        if self._ctx_group:
            _, sharing = queue.sharing(task)
            if len(sharing) > 1:
                yield from self._together(task, sharing, "shared_prefix", cluster)
                return
        found = self._find(task, cluster)
        if found is not None:
            yield Placement(task, *found)

    def _together(self, task: Task, members: list[Task], why: str, cluster: Cluster) -> Iterator[Placement]:
        """`task` first, then the others of `members` on the same engine, as many as it can hold. Those that are left
        form the next group, so that a group is split over as few engines as need be."""
        found = self._find(task, cluster, members)
        if found is None:
            return
        engine, terms = found
        yield Placement(task, engine, {**terms, why: len(members)})
        for member in members:
            if member is not task and member.state == "queued":
                if not cluster.fits(member, engine, self._bound(member, engine)):
                    return
                yield Placement(member, engine, {**terms, why: len(members)})

    def _find(self, task: Task, cluster: Cluster, members: list[Task] | None = None) -> tuple[Engine, dict[str, float]] | None:
        """FindEngine: where `task` fits, all of `members` if that can be; the longest prefix first, then least harm."""
        if members is not None and (whole := self._first(members, cluster)) is not None:
            return whole
        return self._first([task], cluster)

    def _first(self, members: list[Task], cluster: Cluster) -> tuple[Engine, dict[str, float]] | None:
        for engine, matched in self._candidates(members[0], cluster):
            if self._holds(members, engine, cluster):
                terms: dict[str, float] = {"reserved_tokens": engine.reserved, "latency_tasks": engine.latency_tasks}
                if matched:
                    terms["matched_links"] = matched
                return engine, terms
        return None

    def _candidates(self, task: Task, cluster: Cluster) -> Iterable[tuple[Engine, int]]:
        """Engines with the links of the task's prefix that they hold, the best first."""
        key = by_load if task.latency_sensitive else by_harm
        if not self._ctx_aware:
            return zip(task.call.lane.ordered(key), repeat(0))
        return self._prefix_first(task, cluster, key)

    def _prefix_first(self, task: Task, cluster: Cluster, key: Callable[[Engine], Load]) -> Iterator[tuple[Engine, int]]:
        lane = task.call.lane
        worth: set[int] = set()
        first = lane.ordered(by_load).first()
        least = first.reserved if first is not None else 0
        for matched, engines in cluster.longest_matches(task):
            for engine in sorted(engines, key=lambda e: (key(e), e.id)):
                if cluster.cached_tokens(task, engine) * self._ctx_weight >= engine.reserved - least:
                    worth.add(engine.id)
                    yield engine, matched
        for engine in lane.ordered(key):
            if engine.id not in worth:
                yield engine, 0

    def _holds(self, members: list[Task], engine: Engine, cluster: Cluster) -> bool:
        """Whether all of `members` fit on the engine at once, a prefix that they share counted once a member (so that
        the answer errs to the safe side)."""
        if len(members) == 1:
            return cluster.fits(members[0], engine, self._bound(members[0], engine))
        if len(members) > engine.description.tasks_capacity - engine.running:
            return False
        if not all(cluster.fits(member, engine, self._bound(member, engine)) for member in members):
            return False
        need = sum(cluster.need(member, engine) for member in members)
        bounds = [b for member in members if (b := self._bound(member, engine)) is not None]
        capacity = min([engine.description.tokens_capacity, *bounds])
        return engine.reserved + need <= capacity

    def _bound(self, task: Task, engine: Engine) -> int | None:
        if self._latency_capacity is None:
            return None
        if task.latency_sensitive and task.criteria is not Criteria.THROUGHPUT:
            return self._latency_capacity
        return self._latency_capacity if engine.latency_tasks else None
