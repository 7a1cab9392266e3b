"""HTTP/1.1 to one engine over kept-alive connections: POST a body, read the answer as it comes.

A core sends every task through here, and a general client library costs it more than its own decisions do; hence these few
lines. They know what engines speak (a status, a length or chunks, keep-alive) and nothing more: no TLS, no redirects.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import cast

CONNECT_S = 5.0
_MAX_HEAD_BYTES = 64 * 1024
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})\b")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)[ \t]*(?:\r\n|$)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r]*\bchunked[ \t]*(?:\r\n|$)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection:[^\r]*\bclose\b", re.IGNORECASE)


class AnswerParser:
    """Bytes in, one answer out: `status` once its head is there, the body through `take`, then `ended`.

    Raises ValueError for what is not HTTP.
    """

    def __init__(self) -> None:
        self.status = 0
        self.ended = False
        self.keeps_alive = True
        self._rest = b""
        self._body: list[bytes] = []
        self._state: Callable[[], bool] = self._head
        self._missing = 0  # bytes of the body, or of the chunk and its line end

    def feed(self, data: bytes) -> None:
        """Takes in what came."""
        self._rest = self._rest + data if self._rest else data
        while not self.ended and self._state():
            pass

    def end_of_input(self) -> None:
        """The connection was closed. Raises ValueError when the answer was not complete."""
        if self._state == self._until_closed:
            self.ended = True
        if not self.ended:
            raise ValueError("the connection was closed in the middle of the answer")

    def take(self) -> bytes:
        """The part of the body that came since the last `take`."""
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        return body

    # Each state returns whether it got further with what is there.

    def _head(self) -> bool:
        end = self._rest.find(b"\r\n\r\n")
        if end < 0:
            if len(self._rest) > _MAX_HEAD_BYTES:
                raise ValueError("the answer's head is too long")
            return False
        head, self._rest = self._rest[:end], self._rest[end + 4 :]
        status = _STATUS.match(head)
        if status is None:
            raise ValueError(f"no HTTP answer: {head[:40]!r}")
        self.status = int(status[1])
        self.keeps_alive = head.startswith(b"HTTP/1.1") and _CLOSE.search(head) is None
        if _CHUNKED.search(head):
            self._state = self._chunk_size
        elif length := _LENGTH.search(head):
            self._missing = int(length[1])
            self._state = self._until_length
        else:
            self.keeps_alive = False
            self._state = self._until_closed
        return True

    def _until_length(self) -> bool:
        part, self._rest = self._rest[: self._missing], self._rest[self._missing :]
        self._missing -= len(part)
        if part:
            self._body.append(part)
        self.ended = self._missing == 0
        self.keeps_alive = self.keeps_alive and not self._rest
        return False

    def _until_closed(self) -> bool:
        if self._rest:
            self._body.append(self._rest)
            self._rest = b""
        return False

    def _chunk_size(self) -> bool:
        line, found, rest = self._rest.partition(b"\r\n")
        if not found:
            return False
        self._rest = rest
        size = int(line.split(b";", 1)[0], 16)
        if size < 0:
            raise ValueError(f"a chunk of {size} bytes")
        self._missing = size + 2
        self._state = self._chunk if size else self._trailer
        return True

    def _chunk(self) -> bool:
        if not self._rest:
            return False
        part, self._rest = self._rest[: self._missing], self._rest[self._missing :]
        text = part[: max(0, self._missing - 2)]
        if text:
            self._body.append(text)
        self._missing -= len(part)
        if self._missing == 0:
            self._state = self._chunk_size
        return True

    def _trailer(self) -> bool:
        line, found, rest = self._rest.partition(b"\r\n")
        if not found:
            return False
        self._rest = rest
        self.ended = not line
        return True


class Exchange(asyncio.Protocol):
    """A connection and the request that is on it. Use it through EngineHttp."""

    def __init__(self, home: EngineHttp) -> None:
        self._home = home
        self._parser = AnswerParser()
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.WriteTransport | None = None

    # -------------------------------------------------------------------------------------------- called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser.ended:  # bytes that nobody asked for: who knows what comes next
            self.hang_up()
            return
        try:
            self._parser.feed(data)
        except ValueError as error:
            self._fail(ConnectionError(str(error)))
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._home.forget(self)
        try:
            self._parser.end_of_input()
        except ValueError as incomplete:
            self._fail(error or ConnectionResetError(str(incomplete)))
        self._transport = None
        self._wake()

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --------------------------------------------------------------------------------------------- called by the user

    @property
    def status(self) -> int:
        return self._parser.status

    def write(self, request: bytes) -> None:
        """Sends a request; the answer before it has been read."""
        self._parser = AnswerParser()
        if self._transport is None:
            raise ConnectionResetError("the connection is closed")
        self._transport.write(request)

    async def wait(self) -> None:
        """Waits for more to come. Raises ConnectionError (or another OSError) when nothing more can."""
        if self._error is not None:
            raise self._error
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def read(self) -> bytes:
        """The next part of the body; b"" at its end. Raises OSError when the connection breaks before."""
        while True:
            if part := self._parser.take():
                return part
            if self._parser.ended:
                return b""
            await self.wait()

    async def read_all(self) -> bytes:
        """The whole body."""
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    def close(self) -> None:
        """Ends the exchange: the connection is kept when the answer was read to its end, else closed."""
        if self._transport is None:
            return
        if self._parser.ended and self._parser.keeps_alive and self._error is None:
            self._home.keep(self)
        else:
            self.hang_up()

    def hang_up(self) -> None:
        """Closes the connection."""
        if self._transport is not None:
            self._transport.close()


class EngineHttp:
    """The connections to one engine."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{port}"
        self._idle: list[Exchange] = []
        self._head = b" HTTP/1.1\r\nHost: %s:%d\r\nContent-Type: application/json\r\nContent-Length: " % (shown.encode(), port)
        self._closed = False

    async def post(self, path: str, body: bytes) -> Exchange:
        """Sends `body` and waits for the answer's head; the caller must `close` the exchange. Raises OSError, TimeoutError."""
        exchange = self._idle.pop() if self._idle else await self._connect()
        try:
            exchange.write(b"POST " + path.encode() + self._head + b"%d\r\n\r\n" % len(body) + body)
            while not exchange.status:
                await exchange.wait()
        except BaseException:
            exchange.hang_up()
            raise
        return exchange

    async def ask(self, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of an answer. Raises OSError, TimeoutError."""
        async with asyncio.timeout(timeout_s):
            exchange = await self.post(path, body)
            try:
                return exchange.status, await exchange.read_all()
            finally:
                exchange.close()

    async def _connect(self) -> Exchange:
        if self._closed:
            raise ConnectionResetError("the engine is not connected any more")
        async with asyncio.timeout(CONNECT_S):
            loop = asyncio.get_running_loop()
            _, exchange = await loop.create_connection(lambda: Exchange(self), self._host, self._port)
            return exchange

    def keep(self, exchange: Exchange) -> None:
        """An exchange has ended and its connection can carry another."""
        if self._closed:
            exchange.hang_up()
        else:
            self._idle.append(exchange)

    def forget(self, exchange: Exchange) -> None:
        """A connection is closed."""
        if exchange in self._idle:
            self._idle.remove(exchange)

    def close(self) -> None:
        """Closes the idle connections; exchanges under way go on to their end."""
        self._closed = True
        for exchange in list(self._idle):
            exchange.hang_up()
        self._idle.clear()
