"""`P`'s transports in virtual time: a request goes through the core's door, and who waits for its answer hands over.

They have the surfaces of `parrot.frontend.blocking` and `parrot.frontend.aio`. A lost connection is nothing that happens here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import TracebackType

from parrot.frontend.wire import Answer, Request
from sim.network import Network
from sim.programs.door import Door
from sim.programs.exchange import Exchange
from sim.programs.loops import Refused, VirtualLoop
from sim.programs.strands import Strand, running_program


class Client:
    """One instance's way to the core."""

    def __init__(self, door: Door, network: Network, strand: Strand) -> None:
        self._door = door
        self._network = network
        self.strand = strand

    def ask(self, request: Request, notify: Callable[[], None]) -> Exchange:
        self.strand.progressed()
        half_s = 0.0 if self._network.is_local else self._network.round_trip_s() / 2
        return self._door.ask(request, half_s, notify)

    def check(self) -> None:
        """Raises Refused for code that runs elsewhere than in its instance."""
        if running_program() is not self.strand:
            raise Refused(
                f"P is called from outside of {self.strand.name}, to which its virtual machine belongs (a thread of its own?)"
            )


class BlockingReply:
    """As `parrot.frontend.blocking.Reply`."""

    def __init__(self, exchange: Exchange, strand: Strand) -> None:
        assert exchange.status is not None
        self.status = exchange.status
        self._exchange = exchange
        self._strand = strand

    def answer(self) -> Answer:
        exchange = self._exchange
        while not exchange.ended:
            self._strand.wait()
        return Answer(self.status, b"".join(exchange.parts), exchange.retry_after)

    def lines(self) -> Iterator[bytes]:
        exchange, rest = self._exchange, b""
        while True:
            while exchange.parts:
                *whole, rest = (rest + exchange.parts.popleft()).split(b"\n")
                yield from whole
            if exchange.ended:
                return
            self._strand.wait()

    def drain(self) -> None:
        pass

    def __enter__(self) -> BlockingReply:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._exchange.abandon()


class BlockingTransport:
    """As `parrot.frontend.blocking.BlockingTransport`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def open(self, request: Request) -> BlockingReply:
        client = self._client
        client.check()
        exchange = client.ask(request, client.strand.wake)
        try:
            while not (exchange.parts or exchange.ended):
                client.strand.wait()
        except BaseException:
            exchange.abandon()
            raise
        return BlockingReply(exchange, client.strand)

    def close(self) -> None:
        pass


class LoopedReply:
    """As `parrot.frontend.aio.Reply`."""

    def __init__(self, exchange: Exchange, changed: asyncio.Event) -> None:
        assert exchange.status is not None
        self.status = exchange.status
        self._exchange = exchange
        self._changed = changed

    async def answer(self) -> Answer:
        exchange = self._exchange
        while not exchange.ended:
            await _next(self._changed)
        return Answer(self.status, b"".join(exchange.parts), exchange.retry_after)

    async def lines(self) -> AsyncIterator[bytes]:
        exchange, rest = self._exchange, b""
        while True:
            while exchange.parts:
                *whole, rest = (rest + exchange.parts.popleft()).split(b"\n")
                for line in whole:
                    yield line
            if exchange.ended:
                return
            await _next(self._changed)


class LoopedTransport:
    """As `parrot.frontend.aio.AsyncTransport`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[LoopedReply]:
        client = self._client
        client.check()
        if client.strand.dying:
            raise asyncio.CancelledError
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualLoop):
            kind = f"{type(loop).__module__}.{type(loop).__name__}"
            raise Refused(
                f"the program runs an event loop of its own making ({kind}), which waits in real time: "
                "start it with asyncio.run, or write the program as `async def`"
            )
        changed = asyncio.Event()
        exchange = client.ask(request, lambda: _call_soon(loop, changed.set))
        try:
            while not (exchange.parts or exchange.ended):
                await _next(changed)
            yield LoopedReply(exchange, changed)
        finally:
            exchange.abandon()

    async def close(self) -> None:
        pass


def _call_soon(loop: VirtualLoop, callback: Callable[[], object]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)


async def _next(changed: asyncio.Event) -> None:
    await changed.wait()
    changed.clear()
