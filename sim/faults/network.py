"""The network: connections between processes that lose, double, delay and reorder what is sent, and that break.

A request is one message; its answer comes in order on the same connection, which may break at any point, seen by its two
ends at different times. It decides what arrives when; what it means is the processes' affair. Whatever breaks is seen by
both ends in the end, as TCP sees to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from sim.faults.dice import Dice
from sim.faults.loops import ProcessLoop
from sim.faults.plan import Wire
from sim.timeline import Timeline

_HOP_S = 0.001  # mean
_LONGEST_NOTICE_S = 6.0  # until an end sees that its connection is broken


class Request(NamedTuple):
    """What is asked: an HTTP request, less its form."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Host(Protocol):
    """Where requests go. `loop`: the process that lives there now, None while there is none."""

    loop: ProcessLoop | None

    def serve(self, connection: Connection) -> None: ...


class Connection:
    """One request and its answer. The client's end: `receive`, `close`. The server's: `send`, `task`."""

    def __init__(self, network: Network, client: ProcessLoop | None, wire: Wire, request: Request) -> None:
        self.request = request
        self.task: asyncio.Task[None] | None = None  #: what serves it; cancelled when the client is gone
        self.alter: Callable[[Any], Any] | None = None  #: what becomes of each item on its way
        self._network = network
        self._client = client
        self._server: ProcessLoop | None = None
        self._wire = wire
        self._items: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._last_s = 0.0
        self.broken = False
        self.answered = False  #: the head of an answer was sent
        self._gone = False  # the server knows that the client is
        if client is not None:
            client.connections[self] = None

    # --------------------------------------------------------------------------------------------- the client's end

    async def receive(self) -> Any:
        """The next item of the answer. Raises ConnectionError when the connection has broken."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, ConnectionError):
            self._items.append(item)
            raise item
        return item

    def close(self) -> None:
        """The client does not want any more."""
        if self._client is not None and self._client.connections.pop(self, self) is None and not self.broken:
            self.broken = True
            self._network.later(self._network.hop_s(self._wire), self._lose_client)

    def _arrive(self, item: Any) -> None:
        if self.broken:
            return
        if self.alter is not None:
            item = self.alter(item)
        if item[0] == "end":
            self.broken = True  # over: nothing more can happen to it
            self._leave()
        self._give(item)

    def _give(self, item: Any) -> None:
        client = self._client
        if client is None or not client.alive:
            return
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            client.call_soon(_wake, self._waiter)

    # --------------------------------------------------------------------------------------------- the server's end

    def accept(self, server: ProcessLoop) -> None:
        self._server = server
        server.connections[self] = None

    def send(self, item: Any) -> None:
        """Sends the next item of the answer. Raises ConnectionResetError when the client is known to be gone."""
        if self._gone:
            raise ConnectionResetError("the client has gone")
        self.answered = True
        self._last_s = max(self._last_s, self._network.timeline.now + self._network.hop_s(self._wire))
        self._network.timeline.call_at(self._last_s, lambda: self._arrive(item))

    def _lose_client(self) -> None:
        self._gone = True
        server, task = self._server, self.task
        self._leave()
        if server is not None and server.alive and task is not None:
            server.call_soon(task.cancel)

    # ------------------------------------------------------------------------------------------------------- both

    def cut(self) -> None:
        """Breaks it: what is under way is lost, and each end sees it in its own time."""
        if self.broken:
            return
        self.broken = True
        dice = self._network.dice
        self._network.count("cut")
        self._network.later(dice.spread(0.001, _LONGEST_NOTICE_S), self._lose_server)
        self._network.later(dice.spread(0.001, _LONGEST_NOTICE_S), self._lose_client)

    def process_died(self, process: ProcessLoop) -> None:
        """One of its ends is gone."""
        if self.broken:
            return
        self.broken = True
        notice = self._lose_client if process is self._client else self._lose_server
        dice = self._network.dice
        self._network.later(dice.spread(0.001, 0.05 if dice.chance(0.8) else _LONGEST_NOTICE_S), notice)

    def refuse(self) -> None:
        """Nobody listens there."""
        self.broken = True
        self._leave()
        self._give(ConnectionRefusedError("connection refused"))

    def _lose_server(self) -> None:
        if self._client is not None:
            self._client.connections.pop(self, None)
        self._give(ConnectionResetError("connection reset by peer"))

    def _leave(self) -> None:
        for end in (self._client, self._server):
            if end is not None:
                end.connections.pop(self, None)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Network:
    """All connections of a run. `calm`: from then on it loses nothing and is quick."""

    def __init__(self, timeline: Timeline, dice: Dice, count: Callable[[str], None], note: Callable[[str], None]) -> None:
        self.timeline = timeline
        self.dice = dice
        self.count = count
        self.calm = False
        self.hosts: dict[str, Host] = {}
        self._note = note

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        self.timeline.call_at(self.timeline.now + seconds, callback)

    def hop_s(self, wire: Wire) -> float:
        """How long the next message is under way. What comes later by another draw is what reorders."""
        seconds = self.dice.exponential(_HOP_S)
        if not self.calm and self.dice.chance(wire.delayed):
            self.count("delayed")
            seconds += self.dice.spread(0.002, wire.longest_delay_s + 0.002)
        return seconds

    def request(self, client: ProcessLoop, wire: Wire, address: str, request: Request, may_double: bool) -> Connection:
        """Sends a request to whoever lives at `address` when it arrives."""
        connection = Connection(self, client, wire, request)
        dice = self.dice
        if not self.calm:
            if may_double and dice.chance(wire.doubled):
                self.count("doubled")
                self.later(self.hop_s(wire) + dice.spread(0.001, 3.0), lambda: self._double(address, wire, request))
            if dice.chance(wire.lost):
                self.count("lost")
                connection.cut()
                return connection
            if dice.chance(wire.cut):
                self.later(dice.spread(0.001, 3.0), connection.cut)
        self.later(self.hop_s(wire), lambda: self._arrive(address, connection))
        return connection

    def _arrive(self, address: str, connection: Connection) -> None:
        if connection.broken:
            return
        host = self.hosts[address]
        if host.loop is None:
            self.later(self.hop_s(connection._wire), connection.refuse)
            return
        self._note(f"{address} {connection.request.method} {connection.request.path}")
        connection.accept(host.loop)
        host.loop.call_soon(host.serve, connection)

    def _double(self, address: str, wire: Wire, request: Request) -> None:
        """The same request once more, whose answer nobody reads."""
        ghost = Connection(self, None, wire, request)
        self._arrive(address, ghost)
        self.later(self.dice.spread(0.01, 5.0), ghost._lose_client)
