"""An emulated engine in virtual time: wakes it at its edges and hands on what it tells. It decides nothing, and an idle
engine costs nothing.

Within an instant, what clients and the core do (up to the cluster's flush) comes before the engines' edges, so that what
arrives at an edge comes before it. Engines with an edge at the same instant go in the order in which they were made;
edges at which nothing can change, which only stepping knows, come last of all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

from parrot.engine.batches import EngineTask
from parrot.engine.emulated.engine import EmulatedEngine, EmulatedEvent

EDGE = 3.0  #: SimPy priority of edges, behind the cluster's flush (2); each engine has its own between this and 3.5
QUIET_EDGE = 4.0


class Clock(Protocol):
    """Virtual time, as sim.cluster.Timeline keeps it."""

    @property
    def now(self) -> float: ...

    def call_at(self, time_s: float, callback: Callable[[], object], priority: float = 1) -> None: ...


class SimEngine:
    """Drives one engine; `deliver` gets its events in order, all of one edge together."""

    _ranks = itertools.count()  # only their order matters

    def __init__(self, clock: Clock, engine: EmulatedEngine, deliver: Callable[[list[EmulatedEvent]], None]) -> None:
        self.engine = engine
        self._clock = clock
        self._deliver = deliver
        self._priority = EDGE + next(SimEngine._ranks) * 2.0**-40
        self._planned: tuple[float, float] | None = None  # the call that counts; those planned before it are stale

    def submit(self, task: EngineTask, output_tokens: int) -> None:
        """Hands the engine a task and the tokens that it would generate. Whether it is taken is told by an event."""
        self.engine.submit(task, output_tokens, self._clock.now)
        self._plan()

    def abort(self, key: Hashable) -> None:
        """Gives a task up; unknown ones are ignored."""
        self.engine.abort(key, self._clock.now)
        self._plan()

    def free_contexts(self, ids: Iterable[int]) -> None:
        """Nobody will ask for these contexts again."""
        self.engine.free_contexts(ids, self._clock.now)
        self._plan()

    def _plan(self) -> None:
        edge = self.engine.next_edge()
        if edge is None:
            self._planned = None
            return
        call = (max(edge, self._clock.now), QUIET_EDGE if self.engine.quiet else self._priority)
        if call != self._planned:
            self._planned = call
            self._clock.call_at(call[0], lambda: self._edge(call), call[1])

    def _edge(self, call: tuple[float, float]) -> None:
        if call != self._planned:
            return
        self._planned = None
        events = self.engine.advance(self._clock.now)
        self._plan()
        if events:
            self._deliver(events)
