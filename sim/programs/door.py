"""The core's end of what programs ask: the server's own handlers, over the cluster of the simulator instead of HTTP.

A request is decoded, checked, tokenized and made into an event by `parrot.serve.api_routes`, as on the network. What is put in
the place of the server's shell (`port`) hands the event to the cluster in the present instant, and the reply back to the
handler. What is said in sessions, `sessions` knows.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

from parrot.frontend.wire import Request
from parrot.serve import events as ev
from parrot.serve.api_routes import ApiRoutes
from parrot.serve.credentials import hashed
from parrot.serve.routing import Routes
from parrot.serve.streams import OutputStreams
from sim.cluster import Cluster
from sim.faults.stand_ins import SimStreamResponse, serve
from sim.programs.accounts import Account
from sim.programs.exchange import Exchange
from sim.programs.loops import VirtualLoop
from sim.programs.port import Port
from sim.programs.sessions import Sessions
from sim.programs.strands import Strand, Strands


class _Credentials:
    """Session ids of a counter, so that runs repeat; what they open is nobody's secret."""

    def __init__(self) -> None:
        self._last = 0

    def new_session_id(self) -> int:
        self._last += 1
        return self._last

    @staticmethod
    def auth(session_id: int) -> str:
        return hashlib.blake2b(b"%d" % session_id, digest_size=8).hexdigest()


class Door:
    """Takes requests for `cluster`, whose sessions are `sessions`."""

    def __init__(self, cluster: Cluster, sessions: Sessions, strands: Strands) -> None:
        self._cluster = cluster
        self._sessions = sessions
        self._strand = Strand(strands, "the core", self._live, is_program=False)
        self._loop = VirtualLoop(self._strand, inline=True)
        api: Any = ApiRoutes(
            Port(cluster, sessions, self._strand, self._loop),  # type: ignore[arg-type]
            cluster.core.models,
            sessions.texts,
            sessions.tokenization,
            OutputStreams(),
            _Credentials(),  # type: ignore[arg-type]
            SimStreamResponse,  # type: ignore[arg-type]
        )
        self._routes = Routes(api.paths())

    def open(self) -> None:
        """Begins to take requests."""
        self._strand.begin()

    def close(self) -> None:
        """The run is over. What is still under way is given up."""
        if not self._strand.dead:
            self._loop.stop()
            self._strand.go_on()
        self._strand.dying = True
        self._sessions.tokenization.close()
        self._loop.close()

    def ask(self, request: Request, half_s: float, notify: Callable[[], None]) -> Exchange:
        """Sends a request on its way."""
        exchange = Exchange(self._cluster.timeline, self._strand, request, half_s, notify)
        exchange.cross(lambda: self._arrive(exchange))
        return exchange

    def opened(self, session_id: int, account: Account) -> None:
        """The session belongs to that account."""
        self._sessions.belongs_to(session_id, account)

    def close_sessions(self, account: Account) -> None:
        """Closes what an instance that has ended left open."""
        for session_id in account.sessions:
            if session_id in self._sessions:
                self._sessions.report(session_id)
                request = self._cluster.expect(lambda *_: None)
                self._cluster.post(ev.CloseSession(request, session_id, hashed(_Credentials.auth(session_id))))
                self._sessions.forget(session_id)

    # -------------------------------------------------------------------------------------------------- the handlers

    def _live(self) -> None:
        for name in self._sessions.tokenizer_names:
            self._loop.run_until_complete(self._sessions.tokenization.learn(name))
        self._loop.run_forever()
        left = asyncio.all_tasks(self._loop)
        for task in left:
            task.cancel()
        if left:
            self._loop.run_until_complete(asyncio.wait(left))

    def _arrive(self, exchange: Exchange) -> None:
        if not exchange.ended:
            exchange.task = self._loop.create_task(serve(exchange, self._routes.handle))  # type: ignore[arg-type]
            self._strand.wake()
