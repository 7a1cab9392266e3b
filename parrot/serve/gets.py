"""Gets that wait for their variable: who waits for what, and until when."""

from __future__ import annotations

import heapq

from mypy_extensions import mypyc_attr

from parrot.serve.sessions import Session
from parrot.serve.variables import Variable


@mypyc_attr(acyclic=True)
class PendingGet:
    """A get that waits: for which variable of which session, and whether it is then too late for it (else it times out)."""

    __slots__ = ("late", "session", "variable")

    def __init__(self, session: Session, variable: Variable, late: bool) -> None:
        self.session = session
        self.variable = variable
        self.late = late


class PendingGets:
    """All gets that wait. A timeout that is no longer needed stays in the heap until it comes to the top."""

    def __init__(self) -> None:
        self._gets: dict[int, PendingGet] = {}
        self._timeouts: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._gets)

    def add(self, request: int, session: Session, variable: Variable, deadline: float | None, late: bool) -> None:
        """`deadline`: until when it waits (None: without end)."""
        self._gets[request] = PendingGet(session, variable, late)
        if deadline is not None:
            heapq.heappush(self._timeouts, (deadline, request))
            if len(self._timeouts) > 64 + 2 * len(self._gets):
                self._timeouts = [entry for entry in self._timeouts if entry[1] in self._gets]
                heapq.heapify(self._timeouts)
        variable.getters = (*variable.getters, request) if variable.getters else (request,)
        session.waiting_gets += 1

    def drop(self, request: int) -> PendingGet | None:
        """That get waits no longer; None when it did not."""
        pending = self._gets.pop(request, None)
        if pending is not None:
            pending.variable.getters = tuple([getter for getter in pending.variable.getters if getter != request])
            pending.session.waiting_gets -= 1
        return pending

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
        for pending in self._gets.values():
            pending.variable.getters = ()
            pending.session.waiting_gets = 0
        self._gets.clear()
        self._timeouts.clear()

    def next_deadline(self) -> float | None:
        while self._timeouts and self._timeouts[0][1] not in self._gets:
            heapq.heappop(self._timeouts)
        return self._timeouts[0][0] if self._timeouts else None

    def due(self, now: float) -> list[int]:
        """The requests whose time is over; they wait until they are dropped."""
        found: list[int] = []
        while self._timeouts and self._timeouts[0][0] <= now:
            _, request = heapq.heappop(self._timeouts)
            if request in self._gets:
                found.append(request)
        return found
