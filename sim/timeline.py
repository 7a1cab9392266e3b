"""Virtual time: SimPy's calendar, made cheap for what a simulation puts there most. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

import simpy

NORMAL = 1


class Timeline(simpy.Environment):
    """SimPy's environment, with callbacks at absolute times beside its events.

    They arrive exactly (now + (t − now) may not be t) and cost a third of an event.
    """

    now: float = 0.0  # an attribute, for it is read some forty times a request

    def __init__(self) -> None:
        super().__init__()
        self._soon: tuple[float, Callable[[], object]] | None = None
        self._stopped = False

    def call_at(self, time_s: float, callback: Callable[[], object], priority: float = NORMAL) -> None:
        """Calls `callback` at `time_s`, or now when that has passed."""
        now = self.now
        heappush(self._queue, (time_s if time_s > now else now, priority, next(self._eid), callback))  # type: ignore[misc]

    def call_now(self, callback: Callable[[], object], priority: float) -> None:
        """Calls `callback` in this instant, when all that has no greater priority has happened. The calendar is spared where
        nothing else waits like this."""
        if self._soon is None:
            self._soon = (priority, callback)
        else:
            self.call_at(self.now, callback, priority)

    def step(self) -> None:
        """As SimPy's, for both kinds of entry."""
        queue, soon = self._queue, self._soon
        if soon is not None and (not queue or queue[0][0] > self.now or queue[0][1] > soon[0]):
            self._soon = None
            soon[1]()
            return
        if queue:
            self.now = queue[0][0]
        if queue and not isinstance(queue[0][3], simpy.Event):
            self._now, _, _, callback = heappop(queue)
            callback()
        else:
            super().step()

    def run_until(self, finished: Callable[[], bool]) -> bool:
        """Steps until `finished()` or, with False as the answer, until nothing is left to happen."""
        while not finished():
            if not self._queue and self._soon is None:
                return False
            self.step()
        return True

    def stop(self) -> None:
        """Ends `run_to_stop` with the present step."""
        self._stopped = True

    def run_to_stop(self) -> bool:
        """Steps until `stop` is called or, with False as the answer, until nothing is left to happen."""
        queue, event_type, step = self._queue, simpy.Event, self.step
        self._stopped = False
        while not self._stopped:  # `step`, written out: this loop turns a dozen times a request
            soon = self._soon
            if soon is not None and (not queue or queue[0][0] > self.now or queue[0][1] > soon[0]):
                self._soon = None
                soon[1]()
            elif not queue:
                return False
            elif isinstance(queue[0][3], event_type):
                step()
            else:
                self.now, _, _, callback = heappop(queue)
                self._now = self.now
                callback()
        return True
