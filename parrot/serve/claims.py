"""Ageing across lanes: an engine is kept free for the first task of a lane that has waited for too long.

A large task needs a gap that small ones of another lane, on the same engines, fill again and again. Once it has waited for
`patience_s`, an engine that could hold it, the least loaded, is claimed for it and admits nothing else (`base.admits`), until
the task is placed, there or elsewhere, or ends, or the engine is lost or suspect. So it starts within the patience and the
longest task that is in flight there. A lane has one claim at most, and so has an engine.

Which task is the first of a lane is the policy's affair; whether it has waited for too long is decided here, for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from parrot.serve.engines import Engine, Engines, Lane, by_load
from parrot.serve.graph import Task
from parrot.serve.policies.base import too_large

First = Callable[[Lane], Task | None]


class Claims:
    """All claims on `engines`. `first`: the task that goes next in a lane, whether or not it fits. `in_order`: nothing else of
    its lane goes before it; then an engine that serves no other lane needs no claim."""

    def __init__(self, engines: Engines, patience_s: float, first: First, in_order: bool) -> None:
        self._lanes = engines.lanes
        self._patience_s = patience_s
        self._first = first
        self._in_order = in_order
        self.by_lane: dict[Lane, tuple[Task, Engine]] = {}
        self.due_s = math.inf  #: when the first patience is over that has not been looked at
        self.reopened = False  #: whether an engine admits others again since this was last set back

    def settle(self, task: Task) -> None:
        """The task waits no longer."""
        claim = self.by_lane.get(task.call.lane)
        if claim is not None and claim[0] is task:
            self._release(task.call.lane, claim[1])

    def without(self, engine: Engine) -> None:
        """The engine gets nothing any more, or not for a while."""
        task = engine.claimed
        if task is not None:
            self._release(task.call.lane, engine)

    def _release(self, lane: Lane, engine: Engine) -> None:
        del self.by_lane[lane]
        engine.claimed = None
        for other in engine.lanes:
            other.open(engine)
        self.reopened = True

    def review(self, lanes: Iterable[Lane], now: float) -> None:
        """Claims an engine for each first task of `lanes` whose patience is over; notes when the next one's will be."""
        self.due_s = math.inf
        if self._in_order and len(self._lanes) < 2:
            return  # nobody else could fill the gaps
        for lane in lanes:
            if lane in self.by_lane or not lane.engines:
                continue
            task = self._first(lane)
            if task is None or task.ready_s is None:
                continue
            until_s = task.ready_s + self._patience_s
            if until_s > now:
                self.due_s = min(self.due_s, until_s)
            elif (engine := self._candidate(task, lane)) is not None:
                engine.claimed = task
                self.by_lane[lane] = (task, engine)

    def _candidate(self, task: Task, lane: Lane) -> Engine | None:
        """The least loaded engine that could hold the task alone; one that has just rejected it only when all have."""
        best: Engine | None = None
        best_load = (True, 0, 0)
        for engine in lane.engines.values():
            if engine.state != "live" or engine.claimed is not None or too_large(task, engine):
                continue
            if self._in_order and len(engine.lanes) == 1:
                return None  # it is kept for this lane as it is
            rejected = task.refusals is not None and task.refusals.get(engine.id) == engine.version
            load = (rejected, by_load(engine), engine.id)
            if best is None or load < best_load:
                best, best_load = engine, load
        return best
