"""An engine that only passes time, in virtual time: wakes it at its edges and hands on what it tells. It decides nothing, and
an idle engine costs nothing.

Within an instant, what clients and the core do (up to the cluster's flush) comes before the engines' edges, so that what
arrives at an edge comes before it. Engines with an edge at the same instant go in the order in which they were made;
edges at which nothing can change, which only stepping knows, come last of all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Final

from parrot.engine.batches import EngineTask
from parrot.engine.emulated.events import EmulatedEvent
from parrot.engine.emulated.timed import TimedEngine
from sim.calendar import Calendar

EDGE: Final = 3.0  #: SimPy priority of edges, behind the cluster's flush (2); each engine has its own between this and 3.5
QUIET_EDGE: Final = 4.0


class SimEngine:
    """Drives one engine; `deliver` gets its events in order, all of one edge together. `rank`: its place among engines with
    an edge at the same instant."""

    def __init__(
        self, clock: Calendar, engine: TimedEngine, deliver: Callable[[list[EmulatedEvent]], None], rank: int = 0
    ) -> None:
        self.engine = engine
        self._clock = clock
        self._deliver = deliver
        self._priority: object = EDGE + rank * 2.0**-40  # an object, which every entry of the calendar shares
        # The call that counts, by its time and whether its edge is quiet; those planned before it are stale.
        self._planned_s = -1.0
        self._quiet = False
        self._at_edge: Callable[[], None] = self._on_edge  # made once: every plan names it

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

    def _plan(self, now: float) -> None:
        engine = self.engine
        edge = engine.next_edge()
        if edge is None:
            self._planned_s = -1.0
            return
        if edge < now:
            edge = now
        quiet = not engine.jumps and engine.quiet
        if edge != self._planned_s or quiet is not self._quiet:
            self._planned_s, self._quiet = edge, quiet
            if quiet:
                self._clock.call_at(edge, self._on_quiet_edge, QUIET_EDGE)
            else:
                self._clock.call_at(edge, self._at_edge, self._priority)

    def _on_edge(self) -> None:
        if self._planned_s == self._clock.now and not self._quiet:
            self._advance()

    def _on_quiet_edge(self) -> None:
        if self._planned_s == self._clock.now and self._quiet:
            self._advance()

    def _advance(self) -> None:
        now, self._planned_s = self._planned_s, -1.0
        events = self.engine.advance(now)
        self._plan(now)
        if events:
            self._deliver(events)
