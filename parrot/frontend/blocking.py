"""The blocking HTTP transport: a pool of keep-alive connections that any thread may use.

One exchange at a time on a connection; a stream holds its own until it ends. It never retries: `Link` does.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

from parrot.frontend.wire import CONNECT_TIMEOUT_S, Answer, LostConnection, Request, not_believed

DRAIN_S = 0.2


class Reply:
    """An answer whose head has come. Read the body or its lines, then leave the `with` block."""

    def __init__(
        self, pool: BlockingTransport, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
        self._pool = pool
        self._connection = connection
        self._response = response
        self.status = response.status
        self._whole = False

    def answer(self) -> Answer:
        """The whole answer. Raises LostConnection."""
        try:
            body = self._response.read()
            self._whole = True
            return Answer(self.status, body, self._response.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            raise LostConnection(_reason(error), unheard=_unheard(error)) from error

    def lines(self) -> Iterator[bytes]:
        """The body's lines as they come. Raises LostConnection."""
        try:
            while line := self._response.readline():
                yield line
            self._whole = True
        except (OSError, http.client.HTTPException) as error:
            raise LostConnection(_reason(error)) from error

    def drain(self) -> None:
        """After the last line: takes in the end of the body, if it comes soon, so that the connection can be kept."""
        try:
            _ready(self._connection).settimeout(DRAIN_S)
            self._whole = not self._response.read()
        except (OSError, http.client.HTTPException):
            self._whole = False

    def __enter__(self) -> Reply:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        clean = kind is None and self._whole and not self._response.will_close
        self._response.close()
        self._pool.give_back(self._connection, clean)


class BlockingTransport:
    """Connections to one address, made when needed and kept for the next exchange."""

    def __init__(self, address: str, trust: ssl.SSLContext | None = None) -> None:
        """`trust`: whose certificates are believed (None: the system's authorities')."""
        self._trust = trust
        self._address = address
        parts = urlsplit(address)
        self._prefix = parts.path.rstrip("/")
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or "localhost"
        self._port = parts.port or (443 if self._secure else 80)
        self._idle: list[http.client.HTTPConnection] = []
        self._lock = threading.Lock()

    def open(self, request: Request) -> Reply:
        """Sends `request` and waits for the head of its answer. Raises LostConnection."""
        connection = self._take()
        try:
            _ready(connection).settimeout(request.timeout_s)
            connection.request(request.method, self._prefix + request.path, request.body or None, request.headers)
            return Reply(self, connection, connection.getresponse())
        except ssl.SSLCertVerificationError as error:  # it will be no other the next time
            connection.close()
            raise not_believed(self._address, error) from None
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.close()  # the server went away: the other idle connections are as dead
            raise LostConnection(_reason(error), unheard=_unheard(error)) from error
        except BaseException:
            connection.close()
            raise

    def give_back(self, connection: http.client.HTTPConnection, clean: bool) -> None:
        """Keeps a connection whose answer was read whole; closes any other."""
        if not clean:
            connection.close()
            return
        with self._lock:
            self._idle.append(connection)

    def close(self) -> None:
        """Closes the idle connections. The transport stays usable."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _take(self) -> http.client.HTTPConnection:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        if self._secure:
            return http.client.HTTPSConnection(self._host, self._port, timeout=CONNECT_TIMEOUT_S, context=self._trust)
        return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_TIMEOUT_S)


def _ready(connection: http.client.HTTPConnection) -> socket.socket:
    """The connection's socket, connected. Keep-alive probes: a get may wait for long, and must notice a host that is gone."""
    if connection.sock is None:
        connection.connect()
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # type: ignore[attr-defined]
    return cast(socket.socket, connection.sock)


def _unheard(error: Exception) -> bool:
    """Nobody took the request: there is no such host, nobody listens, or nothing but silence came."""
    return isinstance(error, ConnectionRefusedError | TimeoutError | socket.gaierror)


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
