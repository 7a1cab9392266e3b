"""Which engines a lane has gained and lost since a policy last looked: for policies that keep something per engine."""

from __future__ import annotations

from parrot.serve.engines import Engine, Lane


class Roster:
    """The engines of one lane as they were at the last look."""

    def __init__(self) -> None:
        self._known: dict[int, Engine] = {}
        self._newest = 0

    def changes(self, lane: Lane) -> tuple[list[Engine], list[Engine]]:
        """(those that came, those that went) since the last call. O(1) when nothing has changed.

        Ids only ever grow, so that as many engines with the same newest one are the same engines.
        """
        engines = lane.engines
        newest = next(reversed(engines), 0)
        if len(engines) == len(self._known) and newest == self._newest:
            return [], []
        came = [engine for engine_id, engine in engines.items() if engine_id not in self._known]
        went = [engine for engine_id, engine in self._known.items() if engine_id not in engines]
        self._known = dict(engines)
        self._newest = newest
        return came, went
