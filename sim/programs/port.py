"""What stands in the place of the server's shell: it hands the handlers' events to the cluster in the present instant, and the
replies back to them, and tells `sessions` of both. It decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve import events as ev
from parrot.serve.effects import Reply
from parrot.serve.streams import OutputStream
from sim.cluster import FLUSH, Cluster
from sim.programs.loops import VirtualLoop
from sim.programs.sessions import Sessions
from sim.programs.strands import Strand

_FLUSHED = FLUSH + 0.25  #: SimPy priority: when the core has handled the instant's events, before anything else happens


class Port:
    """The surface of `parrot.serve.shell.Shell` that the handlers use, over the cluster."""

    def __init__(self, cluster: Cluster, sessions: Sessions, strand: Strand, loop: VirtualLoop) -> None:
        self._cluster = cluster
        self._sessions = sessions
        self._strand = strand
        self._loop = loop
        self._asked: dict[int, _Asked] = {}

    def number(self) -> int:
        asked = _Asked(self._sessions, self._strand)
        number = asked.number = self._cluster.expect(asked.replied)
        self._asked[number] = asked
        return number

    def ask(self, event: Any, on_reply: Callable[[Reply], None] | None = None) -> asyncio.Future[Any]:
        asked = self._asked.pop(event.request)
        asked.event, asked.on_reply = event, on_reply
        asked.future = self._loop.create_future()
        if type(event) is ev.CloseSession:
            self._sessions.report(event.session_id)
        self._cluster.post(event)
        return asked.future

    def cancel_get(self, request: int) -> None:
        self._cluster.post(ev.CancelGet(request))

    async def flushed(self) -> None:
        future = self._loop.create_future()
        timeline = self._cluster.timeline
        timeline.call_at(timeline.now, lambda: self._settle(future), _FLUSHED)
        await future

    async def show(self, session_id: int, var_id: str, stream: OutputStream) -> None:
        stream.shown = True

    def _settle(self, future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)
            self._strand.wake()


class _Asked:
    """An event that waits for its reply."""

    def __init__(self, sessions: Sessions, strand: Strand) -> None:
        self.number = 0
        self.event: Any = None
        self.on_reply: Callable[[Reply], None] | None = None
        self.future: asyncio.Future[Any]
        self._sessions = sessions
        self._strand = strand

    def replied(self, payload: Any, error: ErrorInfo | None) -> None:
        if self.on_reply is not None:
            self.on_reply(Reply(self.number, payload, error))
        if error is None:
            self._note(payload)
        if not self.future.done():
            if error is None:
                self.future.set_result(payload)
            else:
                self.future.set_exception(ParrotError.of(error))
                self.future.exception()  # retrieved: nobody need wait any more
            self._strand.wake()

    def _note(self, payload: Any) -> None:
        kind, event = type(self.event), self.event
        if kind is ev.SubmitCall:
            self._sessions.submitted(event, payload)
        elif kind is ev.OpenSession and payload == event.session_id:
            self._sessions.begin(payload)
        elif kind is ev.SetVariable:
            self._sessions.assigned(event)
        elif kind is ev.CloseSession:
            self._sessions.forget(event.session_id)
