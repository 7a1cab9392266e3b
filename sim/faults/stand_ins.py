"""What of the outside world is replaced under the real shells: sockets, the clock, the journal's file, drawn secrets.

Everything else that runs in a simulated process is the code that serves: parrot.serve.server with its shell, routes, engine
links and task streams, parrot.engine.server with its tasks and loop, parrot.engine.core_link. `in_place` puts the stand-ins
where those modules look for the real things, for as long as a run takes; each finds its process by the running loop.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from sim.faults.loops import ProcessLoop
from sim.faults.network import Connection, Request

_NEVER_TWICE = ("/task",)  # a task's request lives and dies with the connection that its answer comes on


class Clock:
    """The module `time`, as far as shells ask it."""

    @staticmethod
    def monotonic() -> float:
        try:
            return asyncio.get_running_loop().time()
        except RuntimeError:  # the last words of a process that is dead
            return 0.0


# -------------------------------------------------------------------------------------------------- the server's side


class SimRequest:
    """A request as handlers read it (aiohttp's `BaseRequest`, as far as they do)."""

    remote = "somewhere"
    transport = None
    client_max_size = 2**30

    def __init__(self, connection: Connection) -> None:
        request = connection.request
        self.connection = connection
        self.method = request.method
        self.raw_path = request.path
        self.path = request.path.partition("?")[0]
        self.headers = request.headers
        self.body_exists = bool(request.body)
        self.content_length = len(request.body)
        self._body = request.body

    async def read(self) -> bytes:
        return self._body


class SimStreamResponse:
    """An answer that is sent as it comes (aiohttp's `StreamResponse`)."""

    def __init__(self, *, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.status = status
        self.headers = headers or {}
        self.prepared = False
        self._connection: Connection

    async def prepare(self, request: Any) -> None:
        self._connection = request.connection
        self._connection.send(("head", self.status, self.headers))
        self.prepared = True

    async def write(self, data: bytes) -> None:
        self._connection.send(("data", bytes(data)))

    async def write_eof(self) -> None:
        self._connection.send(("end",))


async def serve(connection: Connection, handle: Callable[[Any], Any]) -> None:
    """What aiohttp does with a request: the handler's answer goes out; who has gone away gets none."""
    try:
        response = await handle(SimRequest(connection))
        if isinstance(response, web.Response):
            if connection.answered:
                raise RuntimeError(f"{connection.request.path} is answered a second time, with status {response.status}")
            connection.send(("head", response.status, response.headers))
            connection.send(("data", response.body))
            connection.send(("end",))
    except ConnectionError:
        pass


class _Web:
    """aiohttp.web with its own stream response."""

    StreamResponse = SimStreamResponse

    def __getattr__(self, name: str) -> Any:
        return getattr(web, name)


# -------------------------------------------------------------------------------------------------- the client's side


class _Content:
    def __init__(self, response: SimResponse) -> None:
        self._response = response

    async def readany(self) -> bytes:
        return await self._response.next_part()

    def at_eof(self) -> bool:
        return self._response.ended


class SimResponse:
    """aiohttp's `ClientResponse`."""

    def __init__(self, connection: Connection, status: int) -> None:
        self.status = status
        self.ended = False
        self.content = _Content(self)
        self._connection = connection

    async def next_part(self) -> bytes:
        """b"" at the end."""
        if self.ended:
            return b""
        try:
            item = await self._connection.receive()
        except ConnectionError as error:
            raise aiohttp.ClientPayloadError(str(error)) from error
        if item[0] == "data":
            return bytes(item[1])
        self.ended = True
        return b""

    async def read(self) -> bytes:
        parts = []
        while part := await self.next_part():
            parts.append(part)
        return b"".join(parts)

    def release(self) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()


class _Posted:
    """What `session.post` returns: to be awaited, or entered."""

    def __init__(self, session: SimSession, url: str, data: bytes) -> None:
        self._session = session
        self._url = url
        self._data = data
        self._response: SimResponse | None = None
        self._timeout: Any = None

    def __await__(self) -> Generator[Any, None, SimResponse]:
        return self._session.ask(self._url, self._data).__await__()

    async def __aenter__(self) -> SimResponse:
        self._timeout = asyncio.timeout(self._session.total_s)
        await self._timeout.__aenter__()
        try:
            self._response = await self
        except BaseException as error:
            await self._timeout.__aexit__(type(error), error, error.__traceback__)
            raise
        return self._response

    async def __aexit__(self, kind: Any, error: Any, trace: Any) -> bool | None:
        assert self._response is not None
        self._response.close()
        done: bool | None = await self._timeout.__aexit__(kind, error, trace)
        return done


class SimSession:
    """aiohttp's `ClientSession`: requests of the running process over the simulated network."""

    def __init__(self, *, timeout: aiohttp.ClientTimeout | None = None, **_: Any) -> None:
        self.total_s = timeout.total if timeout is not None else None
        self._closed = False
        self._open: dict[Connection, None] = {}

    def post(self, url: str, *, data: bytes, headers: dict[str, str] | None = None, **_: Any) -> _Posted:
        return _Posted(self, url, data)

    async def ask(self, url: str, data: bytes) -> SimResponse:
        if self._closed:
            raise RuntimeError("Session is closed")
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ProcessLoop)
        parts = urlsplit(url)
        request = Request("POST", parts.path, {"Content-Type": "application/json"}, data)
        connection = loop.host.connect(parts.netloc, request, parts.path not in _NEVER_TWICE)
        self._open = {each: None for each in self._open if not each.broken}
        self._open[connection] = None
        try:
            _, status, _ = await connection.receive()
        except ConnectionRefusedError as error:
            raise aiohttp.ClientOSError(str(error)) from error
        except ConnectionError as error:
            raise aiohttp.ServerDisconnectedError(str(error)) from error
        except BaseException:
            connection.close()
            raise
        return SimResponse(connection, status)

    async def close(self) -> None:
        self._closed = True
        for connection in self._open:
            connection.close()

    async def __aenter__(self) -> SimSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class _Aiohttp:
    """aiohttp's client over the simulated network."""

    ClientSession = SimSession

    @staticmethod
    def TCPConnector(**_: Any) -> None:
        return None

    @staticmethod
    def DummyCookieJar() -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(aiohttp, name)


class SimCredentials:
    """Session ids of a seed instead of secret ones; the same auth in every life, as with the journal's key file."""

    def __init__(self, engine_secret: str | None = None, key_file: str | None = None) -> None:
        loop: Any = asyncio.get_running_loop()
        self._draw: Callable[[], int] = loop.host.new_session_id

    def new_session_id(self) -> int:
        return self._draw()

    def auth(self, session_id: int) -> str:
        return hashlib.blake2b(b"%d" % session_id, digest_size=8).hexdigest()

    def check_engine(self, secret: str | None) -> None:
        pass


def _open_journal(config: Any) -> Any:
    loop: Any = asyncio.get_running_loop()
    return loop.host.open_journal()


@contextmanager
def in_place() -> Iterator[None]:
    """The stand-ins are where the shells look."""
    with ExitStack() as stack:
        for target, stand_in in (
            ("parrot.serve.clock.monotonic", Clock.monotonic),
            ("parrot.engine.emulated.loop.time", Clock),
            ("parrot.serve.engine_http.aiohttp", _Aiohttp()),
            ("parrot.engine.core_link.aiohttp", _Aiohttp()),
            ("parrot.serve.api_routes.web", _Web()),
            ("parrot.engine.server.web", _Web()),
            ("parrot.serve.server.Credentials", SimCredentials),
            ("parrot.serve.server._open_journal", _open_journal),
        ):
            stack.enter_context(mock.patch(target, stand_in))
        yield
