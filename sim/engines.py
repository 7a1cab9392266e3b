"""An engine that only passes time, in virtual time: wakes it at its edges and hands on what it tells. It decides nothing, and
an idle engine costs nothing.

Within an instant, what clients and the core do (up to the cluster's flush) comes before the engines' edges, so that what
arrives at an edge comes before it. Engines with an edge at the same instant go in the order in which they were made;
edges at which nothing can change, which only stepping knows, come last of all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Final

from parrot.engine.batches import EngineTask
from parrot.engine.emulated.events import EmulatedEvent
from parrot.engine.emulated.timed import TimedEngine
from sim.calendar import ALARMS, NEVER, Alarm, Calendar

EDGE: Final = ALARMS  #: priority of edges, behind the cluster's flush (2)
QUIET_EDGE: Final = 4.0


class SimEngine(Alarm):
    """Drives one engine, whose next edge is an alarm."""

    def __init__(self, clock: Calendar, engine: TimedEngine) -> None:
        super().__init__()
        self.engine = engine
        self._clock = clock
        self._quiet_s = NEVER  # the quiet edge that counts; those planned before it are stale
        clock.add_alarm(self)

    def deliver(self, events: list[EmulatedEvent]) -> None:
        """Told the engine's events in order, all of one edge together."""
        raise NotImplementedError

    def submit(self, task: EngineTask, output_tokens: int) -> None:
        """Hands the engine a task and the tokens that it would generate. Whether it is taken is told by an event."""
        now = self._clock.now
        self.engine.submit(task, output_tokens, now)
        self._plan(now)

    def abort(self, key: Hashable) -> None:
        """Gives a task up; unknown ones are ignored."""
        now = self._clock.now
        self.engine.abort(key, now)
        self._plan(now)

    def free_contexts(self, ids: Iterable[int]) -> None:
        """Nobody will ask for these contexts again."""
        now = self._clock.now
        self.engine.free_contexts(ids, now)
        self._plan(now)

    def ring(self) -> None:
        """An edge has come."""
        self._advance()

    def _plan(self, now: float) -> None:
        engine = self.engine
        edge = engine.edge_s
        if edge < now:
            edge = now
        if not engine.jumps and engine.quiet:
            if edge != self._quiet_s:
                self._quiet_s = edge
                self._clock.call_at(edge, self._on_quiet_edge, QUIET_EDGE)
            edge = NEVER
        else:
            self._quiet_s = NEVER
        if edge != self.at_s:
            self._clock.set_alarm(self, edge)

    def _on_quiet_edge(self) -> None:
        if self._quiet_s == self._clock.now:
            self._advance()

    def _advance(self) -> None:
        now = self._clock.now
        self._quiet_s = NEVER
        events = self.engine.advance(now)
        self._plan(now)
        if events:
            self.deliver(events)
