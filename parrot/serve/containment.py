"""A policy that cannot do harm: what it raises, and what it answers that is no placement, costs one placement and no more.

`least_loaded` places the task that it failed on, and the policy is asked again for the others. It decides nothing else, and
knows nothing of what a placement takes: whoever asks carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from parrot.serve.engines import Lane
from parrot.serve.fault import Fault, PolicyFault
from parrot.serve.graph import Task
from parrot.serve.policies.base import Cluster, Placement, Policy
from parrot.serve.policies.least_loaded import LeastLoaded
from parrot.serve.queue import LAST, TaskQueue

MOST_MESSAGE = 200  #: characters that are kept of what a policy's error says
_NO_MORE: Final = object()  #: what a policy's placements end with
# By names of this module's own that never change: the compiled module need not look them up.
_iter: Final = iter
_next: Final = next

#: Carries a placement out at that time; whether `least_loaded` made it.
CarryOut = Callable[[Placement, float, bool], None]


class ContainedPolicy:
    """`policy`, by its configured `name`. Its errors are counted each time, and told once a kind, in `faults`."""

    def __init__(self, policy: Policy, name: str, faults: list[Fault]) -> None:
        self.policy = policy
        self._name = name
        self._faults = faults
        self._errors: dict[str, int] = {}  # what it did wrong -> how often
        self._messages: dict[str, str] = {}  # and what its first error of the kind said
        self._fallback = LeastLoaded({}, None)  # type: ignore[arg-type]

    def order(self, task: Task) -> Any:
        """Its key of a task; one for which it has none goes last."""
        try:
            return self.policy.order(task)
        except Exception as error:  # a third party's policy may raise anything
            self._failed(error)
            return LAST

    def first(self, queue: TaskQueue, lane: Lane) -> Task | None:
        """The task of the lane that it would place next; the first in its order, where it cannot say."""
        first = getattr(self.policy, "first", None)
        if first is None:
            return queue.head(lane)
        try:
            task = first(queue, lane)
        except Exception as error:
            self._failed(error)
            return queue.head(lane)
        known = isinstance(task, Task) and task.in_queue and task.call.lane is lane
        return task if known else None

    def place(self, queue: TaskQueue, cluster: Cluster, now: float, carry_out: CarryOut) -> None:
        """Asks it for placements until it has no more; each is carried out before it is asked for the next."""
        cluster.forget()
        placements: Iterator[Placement] | None = None
        while True:
            placement: Any = None
            try:
                if placements is None:
                    placements = _iter(self.policy.place(queue, cluster, now))
                placement = _next(placements, _NO_MORE)
                if placement is _NO_MORE:
                    cluster.forget()  # what it holds for the policy is of this instant
                    return
                _check(placement, cluster)
            except Exception as error:
                self._failed(error)
                placements = None
                instead = self._instead_of(placement, queue, cluster)
                if instead is None:
                    return
                carry_out(instead, now, True)
            else:
                carry_out(placement, now, False)

    def _instead_of(self, failed: Any, queue: TaskQueue, cluster: Cluster) -> Placement | None:
        """A placement of the task of a refused one, or of the first that has room; None when there is none."""
        tasks = [queue.head(lane) for lane in queue.lanes()]
        wrong = failed.task if isinstance(failed, Placement) else None
        if isinstance(wrong, Task) and wrong.in_queue:
            tasks.insert(0, wrong)
        cluster.forget()
        for task in tasks:
            if task is not None:
                for placement in self._fallback.choose(task, queue, cluster):
                    return placement
        return None

    def _failed(self, error: Exception) -> None:
        kind = f"{type(error).__name__} in policy {self._name!r}"
        self._errors[kind] = self._errors.get(kind, 0) + 1
        if self._errors[kind] == 1:
            self._messages[kind] = _said(error)[:MOST_MESSAGE]
            self._faults.append(PolicyFault(f"policy {self._name!r} failed; least_loaded places in its stead", error))

    def describe_errors(self) -> dict[str, int]:
        """What it did wrong, in words, and how often: a line a kind, with the first message of that kind."""
        return {f"{kind}: {self._messages[kind]}": count for kind, count in self._errors.items()}


def _check(placement: Placement, cluster: Cluster) -> None:
    """Raises a TypeError or a ValueError that says why it cannot be carried out."""
    if not isinstance(placement, Placement):
        raise TypeError(f"yielded a {type(placement).__name__} where a Placement is wanted")
    task, engine = placement.task, placement.engine
    if not task.in_queue:
        raise ValueError(f"placed task {task.id}, which is {'held' if task.held else task.state}")
    if engine.state != "live" or engine.id not in task.call.lane.engines:
        where = f"engine {engine.id}, which is {engine.state}, for {task.call.lane.describe()}"
        raise ValueError(f"placed task {task.id} on {where}; only live engines of its lane take it")
    if not cluster.still_fits(task, engine):
        raise ValueError(f"placed task {task.id} on engine {engine.name!r} over its capacity")


def _said(error: Exception) -> str:
    """What it says, where even that may fail."""
    try:
        return str(error)
    except Exception:
        return "(its message cannot be read)"
