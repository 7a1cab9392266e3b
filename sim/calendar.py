"""What happens when in a simulation: callbacks at absolute times, in one order. It decides nothing.

Within an instant the least priority comes first, and of equal ones what was asked for first. SimPy's events stand in the
same calendar (`sim.timeline`).
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

NORMAL: Final = 1

Callback = Callable[[], object]

# By names of this module's own that never change: the compiled module need not look them up.
_push: Final = heappush
_pop: Final = heappop


class Calendar:
    """`now`: seconds of virtual time. Callbacks come exactly at their time: now + (t − now) may not be t."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, Any, int, Callback]] = []  # heap: time, priority, number, callback
        self._numbers = 0
        self._soon: Callback | None = None
        self._soon_priority = 0.0
        self._stopped = False

    def __len__(self) -> int:
        return len(self._queue) + (self._soon is not None)

    def call_at(self, time_s: float, callback: Callback, priority: Any = NORMAL) -> None:
        """Calls `callback` at `time_s`, or now when that has passed. `priority`: a number."""
        self._numbers += 1
        _push(self._queue, (time_s if time_s > self.now else self.now, priority, self._numbers, callback))

    def call_now(self, callback: Callback, priority: float) -> None:
        """Calls `callback` in this instant, when all that has no greater priority has happened. The heap is spared where
        nothing else waits like this."""
        if self._soon is None:
            self._soon = callback
            self._soon_priority = priority
        else:
            self.call_at(self.now, callback, priority)

    def peek(self) -> float:
        """The time of what comes next; infinite when nothing does."""
        if self._soon is not None:
            return self.now
        return self._queue[0][0] if self._queue else float("inf")

    def step(self) -> bool:
        """Goes on to what comes next. False: nothing does."""
        queue, soon = self._queue, self._soon
        if soon is not None:
            if not queue or queue[0][0] > self.now or queue[0][1] > self._soon_priority:
                self._soon = None
                soon()
                return True
        elif not queue:
            return False
        entry = _pop(queue)
        self.now = entry[0]
        entry[3]()
        return True

    def run_until(self, finished: Callable[[], bool]) -> bool:
        """Steps until `finished()` or, with False as the answer, until nothing is left to happen."""
        while not finished():
            if not self.step():
                return False
        return True

    def stop(self) -> None:
        """Ends `run_to_stop` with the present step."""
        self._stopped = True

    def run_to_stop(self) -> bool:
        """Steps until `stop` is called or, with False as the answer, until nothing is left to happen."""
        self._stopped = False
        while not self._stopped:
            if not self.step():
                return False
        return True
