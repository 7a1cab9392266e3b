"""The core's side of its clients' connections: aiohttp's low-level server, which refuses as this server does.

It decides how long a client may take to send a request, and how large it may be. What is asked is the routes' affair.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from aiohttp import web

from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve.cors import Cors
from parrot.serve.wire import refusal


class Limits(NamedTuple):
    """What a request may be. Times in seconds: for its head, from its first byte (the first one's: from the connection); for
    its body. `cors` marks responses."""

    head_s: float
    body_s: float
    body_bytes: int
    cors: Cors


class HttpServer(web.Server):
    """A third less work a request than an Application, whose routing is not needed here."""

    def __init__(self, handler: Any, limits: Limits) -> None:
        self._event_loop = asyncio.get_running_loop()
        self.limits = limits
        super().__init__(handler, request_factory=self._request, handler_cancellation=True, access_log=None)

    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=self._event_loop, access_log=None)

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> Request:
        limit = self.limits.body_bytes
        request = Request(message, payload, protocol, writer, task, self._event_loop, client_max_size=limit)
        request.limits = self.limits
        return request


class Request(web.BaseRequest):
    """A request whose body must come in time."""

    ATTRS = web.BaseRequest.ATTRS | frozenset(("limits",))
    limits: Limits

    async def read(self) -> bytes:
        """The body. Raises `request_timeout` when it has not come in time."""
        if self.content.is_eof():  # as nearly always: it came with the head
            return await super().read()
        try:
            async with asyncio.timeout(self.limits.body_s):
                return await super().read()
        except TimeoutError:
            raise ParrotError("request_timeout", f"the body has not come within {self.limits.body_s:g} s") from None

    async def _prepare_hook(self, response: web.StreamResponse) -> None:
        self.limits.cors.allow(self, response)


class Connection(web.RequestHandler):
    """One client's connection: bytes that are no HTTP get an ErrorBody too, and leave no traceback in the log. A head that
    does not come to its end is answered 408, and the connection closed."""

    def __init__(self, server: HttpServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._head_s = server.limits.head_s
        self._heads = 0  # requests whose head was there when bytes last came
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._heads != self._request_count:
            self._heads = self._request_count
            self._stop_waiting()
        elif self._late is None and self._waiter is not None:  # no request is under way: this is a part of a head
            self._await_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def log_exception(self, *args: Any, **options: Any) -> None:
        """Not what a client's body is: it was answered 400, but aiohttp, which then throws away the rest of it, fails again."""
        if not isinstance(options.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **options)

    def _await_head(self) -> None:
        self._late = self._loop.call_later(self._head_s, self._give_up)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _give_up(self) -> None:
        self._late = None
        if self.transport is None or self._heads != self._request_count:
            return
        body = refusal(ErrorInfo("request_timeout", f"no request has come within {self._head_s:g} s")).body
        head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"  # type: ignore[arg-type]
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + bytes(body))  # type: ignore[arg-type]
        self.force_close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):  # nobody reads the answer any more
            raise exc
        if status != 400 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        reason = (message or "").partition("\n")[0].rstrip(":") or "it cannot be read"
        response = refusal(ErrorInfo("bad_request", f"this is no HTTP request: {reason}"))
        response.force_close()
        return response
