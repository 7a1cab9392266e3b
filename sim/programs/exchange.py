"""A request of a program and its answer, each under way for half a round trip. What is asked and what is answered is decided
elsewhere."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from parrot.frontend.wire import Request
from sim.programs.strands import Strand
from sim.timeline import Timeline


class Exchange:
    """One request and its answer on their way, `half_s` each. The client's end: `status`, `parts`, `ended`, `abandon`; `notify`
    is called when anything of the answer has come. The server's end: `request`, `send`; its handlers run in `server`."""

    def __init__(self, timeline: Timeline, server: Strand, request: Request, half_s: float, notify: Callable[[], None]) -> None:
        self.request = request
        self.status: int | None = None
        self.retry_after: str | None = None
        self.parts: deque[bytes] = deque()
        self.ended = False
        self.answered = False
        self.task: asyncio.Task[None] | None = None
        self._timeline = timeline
        self._server = server
        self._half_s = half_s
        self._notify = notify
        self._gone = False

    def cross(self, arrive: Callable[[], None]) -> None:
        """Something sets out; it arrives `half_s` from now."""
        if self._half_s:
            self._timeline.call_at(self._timeline.now + self._half_s, arrive)
        else:
            arrive()

    def abandon(self) -> None:
        """The client does not want the answer any more."""
        if not self.ended:
            self.ended = True
            self.cross(self._leave)

    def send(self, item: Any) -> None:
        """The next item of the answer: a head (status, headers), data, or the end."""
        if self._gone:
            raise ConnectionResetError("the client has gone")
        self.answered = True
        self.cross(lambda: self._arrive(item))

    def _arrive(self, item: Any) -> None:
        if self.ended:
            return
        if item[0] == "head":
            self.status, self.retry_after = item[1], item[2].get("Retry-After")
            return  # its end, or its first line, is what a client waits for
        if item[0] == "data":
            self.parts.append(item[1])
        else:
            self.ended = True
        self._notify()

    def _leave(self) -> None:
        self._gone = True
        if self.task is not None and not self.task.done():
            self.task.cancel()
            self._server.wake()
