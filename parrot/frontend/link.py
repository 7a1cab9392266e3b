"""A program's link to one core: both transports behind one set of calls, which send again what may be sent again.

A core that is killed and started again is a pause to a program, nothing more: `wire.Attempts` says for how long.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from parrot.frontend.blocking import BlockingTransport
from parrot.frontend.wire import Answer, Attempts, LostConnection, Request, RetryPolicy, Stat, checked, read_line
from parrot.protocol.errors import ParrotError
from parrot.tls import client_context

if TYPE_CHECKING:
    from parrot.frontend.aio import AsyncTransport

#: Makes the request of a streaming get, given the number of characters that have come already.
StreamRequest = Callable[[int], Request]


class Carriers(NamedTuple):
    """What carries requests to an address instead of HTTP: `blocking` has the surface of a BlockingTransport, `looped`, made
    once an event loop, that of an AsyncTransport."""

    blocking: Callable[[str], Any]
    looped: Callable[[str], Any]


#: Used by the links that are made in this context: where a program runs in a world of its own, as the simulator's is.
CARRIERS: ContextVar[Carriers | None] = ContextVar("parrot_carriers", default=None)


class Link:
    """Requests to the core at `address`. Blocking calls serve any thread, async ones the loop they run in."""

    def __init__(self, address: str, retry: RetryPolicy | None = None, ca_file: str | None = None) -> None:
        """`ca_file`: whose certificates are believed (None: the system's authorities'). Raises ConfigurationError for a wrong
        one."""
        self.address = _checked_address(address)
        self.stat = Stat()
        self._retry = retry or RetryPolicy()
        self._carriers = CARRIERS.get()
        self._trust = None if ca_file is None else client_context(ca_file)
        self._blocking: BlockingTransport = (
            BlockingTransport(self.address, self._trust) if self._carriers is None else self._carriers.blocking(self.address)
        )
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncTransport] = weakref.WeakKeyDictionary()
        self._closing: set[asyncio.Task[None]] = set()
        weakref.finalize(self, self._blocking.close)

    def send(self, request: Request) -> bytes:
        """The body of the answer. Raises the ParrotError of a refusal, `unavailable` when no answer comes."""
        attempts = self._attempts(request.urgent)
        while True:
            try:
                with self._blocking.open(request) as reply:
                    answer = reply.answer()
                wait = attempts.busy(answer)
                if wait is None:
                    return checked(answer)
            except LostConnection as error:
                wait = attempts.lost(error)
            time.sleep(wait)

    async def asend(self, request: Request) -> bytes:
        """`send` in the running event loop."""
        transport = self._transport()
        attempts = self._attempts(request.urgent)
        while True:
            try:
                async with transport.open(request) as reply:
                    answer = await reply.answer()
                wait = attempts.busy(answer)
                if wait is None:
                    return checked(answer)
            except LostConnection as error:
                wait = attempts.lost(error)
            await asyncio.sleep(wait)

    def stream(self, request_from: StreamRequest) -> Iterator[str]:
        """Text as it comes; after a lost connection it goes on behind the characters that it has."""
        had = 0
        attempts = self._attempts()
        while True:
            try:
                with self._blocking.open(request_from(had)) as reply:
                    if reply.status == 200:
                        for line in reply.lines():
                            event = read_line(line)
                            attempts.heard()
                            if event.done:
                                reply.drain()
                                return
                            if event.delta:
                                had += len(event.delta)
                                yield event.delta
                        raise LostConnection("the stream ended before its last line")
                    wait = _wait_or_raise(attempts, reply.answer())
            except LostConnection as error:
                wait = attempts.lost(error)
            time.sleep(wait)

    async def astream(self, request_from: StreamRequest) -> AsyncIterator[str]:
        """`stream` in the running event loop."""
        transport = self._transport()
        had = 0
        attempts = self._attempts()
        while True:
            try:
                async with transport.open(request_from(had)) as reply:
                    if reply.status == 200:
                        async for line in reply.lines():
                            event = read_line(line)
                            attempts.heard()
                            if event.done:
                                return
                            if event.delta:
                                had += len(event.delta)
                                yield event.delta
                        raise LostConnection("the stream ended before its last line")
                    wait = _wait_or_raise(attempts, await reply.answer())
            except LostConnection as error:
                wait = attempts.lost(error)
            await asyncio.sleep(wait)

    def close(self) -> None:
        """Closes the idle blocking connections, and the running loop's at its next turn; the link stays usable."""
        self._blocking.close()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return
        if loop in self._by_loop:
            closing = loop.create_task(self.aclose())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def aclose(self) -> None:
        """Closes the idle blocking connections and the running loop's; the link stays usable."""
        self._blocking.close()
        transport = self._by_loop.pop(asyncio.get_running_loop(), None)
        if transport is not None:
            await transport.close()

    def _attempts(self, urgent: bool = False) -> Attempts:
        return Attempts(self._retry, self.stat, self.address, urgent=urgent)

    def _transport(self) -> AsyncTransport:
        loop = asyncio.get_running_loop()
        transport = self._by_loop.get(loop)
        if transport is None:
            transport = self._by_loop[loop] = self._looped()
        return transport

    def _looped(self) -> AsyncTransport:
        if self._carriers is not None:
            transport: AsyncTransport = self._carriers.looped(self.address)
            return transport
        from parrot.frontend.aio import AsyncTransport  # aiohttp is slow to import, and a blocking program needs none

        return AsyncTransport(self.address, self._trust)


def _wait_or_raise(attempts: Attempts, answer: Answer) -> float:
    wait = attempts.busy(answer)
    if wait is None:
        checked(answer)
        raise ParrotError("internal", f"a streaming get answered with status {answer.status}, not 200")
    return wait


def _checked_address(address: str) -> str:
    """`address` with a scheme and no slash at its end. Raises `bad_request` for what is no HTTP address."""
    whole = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(whole)
        valid = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ParrotError("bad_request", f"core_http_addr {address!r} is no address such as http://localhost:9000")
    return whole.rstrip("/")
