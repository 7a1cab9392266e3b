"""What happens when in a simulation: callbacks at absolute times, in one order, and alarms. It decides nothing.

Within an instant the least priority comes first, and of equal ones what was asked for first. SimPy's events stand in the
same calendar (`sim.timeline`). What is set anew again and again, an engine's next edge, is an alarm: it has one place in a
tournament, so that to move it costs a comparison for each doubling of their number, makes nothing and leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final

from mypy_extensions import i64

NORMAL: Final = 1
ALARMS: Final = 3  #: the priority of alarms
NEVER: Final = float("inf")

Callback = Callable[[], object]

# By names of this module's own that never change: the compiled module need not look them up.
_push: Final = heappush
_pop: Final = heappop


class Alarm:
    """One of a calendar's alarms. `at_s`: when it rings, to be read only; infinite while it is not set."""

    def __init__(self) -> None:
        self.at_s = NEVER
        self.place = 0  #: in the tournament

    def ring(self) -> None:
        """Its time has come. It stays set to it until it is set anew."""
        raise NotImplementedError


class Calendar:
    """`now`: seconds of virtual time. Callbacks come exactly at their time: now + (t − now) may not be t."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, Any, int, Callback]] = []  # heap: time, priority, number, callback
        self._numbers = 0
        self._soon: Callback | None = None
        self._soon_priority = 0.0
        self._stopped = False
        self._alarms: list[Alarm] = []  # in the order in which they came
        # The tournament: the first of each pair 2i, 2i + 1 stands at i too, the first of all at 1.
        self._first: list[Alarm] = [Alarm(), Alarm()]

    def __len__(self) -> int:
        return len(self._queue) + (self._soon is not None) + sum(alarm.at_s < NEVER for alarm in self._alarms)

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

    # ------------------------------------------------------------------------------------------------------- alarms

    def add_alarm(self, alarm: Alarm) -> None:
        """A new alarm: at the same time it rings after those that came before it."""
        self._alarms.append(alarm)
        alarms = self._alarms
        leaves = len(self._first) // 2
        if len(alarms) > leaves:
            leaves *= 2
            unset = Alarm()
            self._first = [unset] * (2 * leaves)
            for place, each in enumerate(alarms):
                each.place = leaves + place
                self._first[each.place] = each
            for node in range(leaves - 1, 0, -1):
                self._first[node] = self._earlier(node)
        else:
            alarm.place = leaves + len(alarms) - 1
            self._first[alarm.place] = alarm
            self.set_alarm(alarm, alarm.at_s)

    def set_alarm(self, alarm: Alarm, time_s: float) -> None:
        """It rings at `time_s` and at no other time; infinite: not at all."""
        alarm.at_s = time_s
        first, winner = self._first, alarm
        place: i64 = alarm.place
        while place > 1:
            other = first[place ^ 1]
            other_s = other.at_s
            if other_s < time_s or (other_s == time_s and place & 1):  # of a pair the left goes first
                winner, time_s = other, other_s
            place >>= 1
            if first[place] is winner and winner is not alarm:
                return  # above, nothing is another now
            first[place] = winner

    def _earlier(self, node: int) -> Alarm:
        left, right = self._first[2 * node], self._first[2 * node + 1]
        return right if right.at_s < left.at_s else left

    # -------------------------------------------------------------------------------------------------------- steps

    def peek(self) -> float:
        """The time of what comes next; infinite when nothing does."""
        if self._soon is not None:
            return self.now
        alarm_s = self._first[1].at_s
        return min(self._queue[0][0], alarm_s) if self._queue else alarm_s

    def step(self) -> bool:
        """Goes on to what comes next. False: nothing does."""
        queue, soon, alarm = self._queue, self._soon, self._first[1]
        time_s, priority = alarm.at_s, 3.0
        rings = True
        if queue:
            head = queue[0]
            head_s: float = head[0]
            if head_s < time_s or (head_s == time_s and head[1] < ALARMS):
                time_s, priority, rings = head_s, head[1], False
        if soon is not None and (time_s > self.now or priority > self._soon_priority):
            self._soon = None
            soon()
        elif not rings:
            entry = _pop(queue)
            self.now = time_s
            entry[3]()
        elif time_s < NEVER:
            self.now = time_s
            alarm.ring()
        else:
            return False
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
