"""Gets that wait for their variable: who waits for what, and until when."""

from __future__ import annotations

import heapq

from parrot.serve.sessions import Session
from parrot.serve.variables import Variable


class PendingGets:
    """All gets that wait. A timeout that is no longer needed stays in the heap until it comes to the top."""

    def __init__(self) -> None:
        self._gets: dict[int, Variable] = {}
        self._timeouts: list[tuple[float, int, bool]] = []  # until when, the request, whether it is then too late for it

    def __len__(self) -> int:
        return len(self._gets)

    def add(self, request: int, variable: Variable, deadline: float | None, late: bool) -> None:
        """`deadline`: until when it waits (None: without end); `late`: whether it is too late for it then, or times out."""
        self._gets[request] = variable
        if deadline is not None:
            heapq.heappush(self._timeouts, (deadline, request, late))
            if len(self._timeouts) > 64 + 2 * len(self._gets):
                self._timeouts = [entry for entry in self._timeouts if entry[1] in self._gets]
                heapq.heapify(self._timeouts)
        variable.getters = (*variable.getters, request) if variable.getters else (request,)
        variable.session.waiting_gets += 1

    def drop(self, request: int) -> Variable | None:
        """That get waits no longer; None when it did not."""
        variable = self._gets.pop(request, None)
        if variable is not None:
            variable.getters = tuple([getter for getter in variable.getters if getter != request])
            variable.session.waiting_gets -= 1
        return variable

    def settle(self, session: Session, variable: Variable) -> tuple[int, ...]:
        """The requests that waited for `variable`, in the order in which they came; none of them waits any longer."""
        requests = variable.getters
        if not requests:
            return requests
        for request in requests:
            del self._gets[request]
        session.waiting_gets -= len(requests)
        variable.getters = ()
        return requests

    def clear(self) -> None:
        """Nobody waits any longer: who asked is gone."""
        for variable in self._gets.values():
            variable.getters = ()
            variable.session.waiting_gets = 0
        self._gets.clear()
        self._timeouts.clear()

    def next_deadline(self) -> float | None:
        while self._timeouts and self._timeouts[0][1] not in self._gets:
            heapq.heappop(self._timeouts)
        return self._timeouts[0][0] if self._timeouts else None

    def due(self, now: float) -> list[tuple[int, bool]]:
        """The requests whose time is over, and whether it is too late for them; they wait until they are dropped."""
        found: list[tuple[int, bool]] = []
        while self._timeouts and self._timeouts[0][0] <= now:
            _, request, late = heapq.heappop(self._timeouts)
            if request in self._gets:
                found.append((request, late))
        return found
