"""Virtual time as SimPy has it: its processes and events live beside the simulator's callbacks. It decides nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import simpy
from simpy.core import EmptySchedule
from simpy.events import URGENT

from sim.calendar import NORMAL, Calendar


class Timeline(simpy.Environment):
    """SimPy's environment, with a `Calendar` as its queue. What happens often is a callback in the calendar, which is cheaper
    than an event."""

    def __init__(self) -> None:
        super().__init__()
        self.calendar = Calendar()

    @property
    def now(self) -> float:
        return self.calendar.now

    def call_at(self, time_s: float, callback: Callable[[], object], priority: float = NORMAL) -> None:
        """Calls `callback` at `time_s`, or now when that has passed."""
        self.calendar.call_at(time_s, callback, priority)

    def run_until(self, finished: Callable[[], bool]) -> bool:
        """Steps until `finished()` or, with False as the answer, until nothing is left to happen."""
        return self.calendar.run_until(finished)

    def schedule(self, event: simpy.Event, priority: Any = NORMAL, delay: float = 0.0) -> None:
        """As SimPy's."""
        self.calendar.call_at(self.calendar.now + delay, functools.partial(self._process, event), priority)

    def peek(self) -> float:
        """As SimPy's."""
        return self.calendar.peek()

    def step(self) -> None:
        """As SimPy's, for both kinds of entry."""
        if not self.calendar.step():
            raise EmptySchedule

    def _process(self, event: simpy.Event) -> None:
        """One of SimPy's events has come: its own step handles it, alone in its own queue."""
        self._queue.append((self.calendar.now, URGENT, next(self._eid), event))
        super().step()
