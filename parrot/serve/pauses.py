"""Engines that are left alone for a while: suspect ones, and those that had no room and nothing of ours to end.

It decides for how long. An engine that fails whatever it gets is the least loaded one and would get everything; so each
failure in a row doubles its pause. It never decides what an engine gets afterwards.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Mapping

from parrot.serve.engines import Engine
from parrot.serve.states import ENGINE

#: An engine with nothing in flight that refused a task is asked again after this time (seconds).
REOPEN_S = 1.0
#: How long an engine is suspect: after one failed attempt, and at most. It doubles with each failure in a row (seconds).
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 10.0


class Pauses:
    """All pauses of live engines. `live`: engines by id, of which it forgets those that are gone."""

    def __init__(self, live: Mapping[int, Engine]) -> None:
        self._live = live
        self._full: OrderedDict[int, float] = OrderedDict()  # engine id -> when it may be asked again
        self._suspects: list[tuple[float, int]] = []  # a heap: until when which engine is suspect

    def suspect(self, engine: Engine, dispatched_s: float, now: float) -> None:
        """An attempt that was sent there at `dispatched_s` came to nothing. What was sent before the engine was last
        suspected says nothing new: a batch that dies together counts once."""
        if engine.state != "live" or dispatched_s <= engine.suspected_s:
            return
        engine.failures += 1
        engine.suspected_s = now
        engine.state = ENGINE[engine.state, "suspect"]
        pause_s = min(FIRST_PAUSE_S * 2.0 ** min(engine.failures - 1, 10), LONGEST_PAUSE_S)
        heapq.heappush(self._suspects, (now + pause_s, engine.id))

    def full(self, engine: Engine, now: float) -> None:
        """It had no room, and no event of ours will say that it has."""
        self._full.setdefault(engine.id, now + REOPEN_S)

    def forget(self, engine_id: int) -> None:
        """The engine is gone."""
        self._full.pop(engine_id, None)

    def next_deadline(self) -> float | None:
        """When the first pause is over."""
        while self._suspects and self._suspects[0][1] not in self._live:
            heapq.heappop(self._suspects)
        ends = [next(iter(self._full.values()))] if self._full else []
        if self._suspects:
            ends.append(self._suspects[0][0])
        return min(ends, default=None)

    def over(self, now: float) -> list[Engine]:
        """The engines whose pause is over, now trusted again."""
        found: list[Engine] = []
        while self._full and next(iter(self._full.values())) <= now:
            engine_id, _ = self._full.popitem(last=False)
            if engine_id in self._live:
                found.append(self._live[engine_id])
        while self._suspects and self._suspects[0][0] <= now:
            _, engine_id = heapq.heappop(self._suspects)
            if engine_id in self._live:
                engine = self._live[engine_id]
                engine.state = ENGINE[engine.state, "trust"]
                found.append(engine)
        return found
