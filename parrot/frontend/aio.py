"""The asyncio HTTP transport: aiohttp in the loop of the program that uses it. It never retries: `Link` does."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from parrot.frontend.wire import CONNECT_TIMEOUT_S, Answer, LostConnection, Request, not_believed


class Reply:
    """An answer whose head has come."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status

    async def answer(self) -> Answer:
        """The whole answer. Raises LostConnection."""
        try:
            return Answer(self.status, await self._response.read(), self._response.headers.get("Retry-After"))
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            raise LostConnection(_reason(error), unheard=isinstance(error, TimeoutError)) from error

    async def lines(self) -> AsyncIterator[bytes]:
        """The body's lines as they come, of any length. Raises LostConnection."""
        rest = b""
        try:
            async for chunk in self._response.content.iter_any():
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield line
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            raise LostConnection(_reason(error)) from error
        if rest:
            yield rest


class AsyncTransport:
    """The connections of one event loop to one address."""

    def __init__(self, address: str, trust: ssl.SSLContext | None = None) -> None:
        """`trust`: whose certificates are believed (None: the system's authorities')."""
        self._trust = trust
        self._address = address.rstrip("/")
        self._client: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def open(self, request: Request) -> AsyncIterator[Reply]:
        """Sends `request` and waits for the head of its answer. Raises LostConnection."""
        if self._client is None:
            self._client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, ssl=self._trust or True))
        timeout = aiohttp.ClientTimeout(total=request.timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        try:
            response = await self._client.request(
                request.method,
                self._address + request.path,
                data=request.body or None,
                headers=request.headers,
                timeout=timeout,
            )
        except aiohttp.ClientConnectorCertificateError as error:  # it will be no other the next time
            raise not_believed(self._address, error.certificate_error) from None
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            unheard = isinstance(error, aiohttp.ClientConnectorError | TimeoutError)
            raise LostConnection(_reason(error), unheard=unheard) from error
        async with response:
            yield Reply(response)

    async def close(self) -> None:
        """Closes the connections. The transport stays usable."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()
            await asyncio.sleep(0)  # lets the transports' own closing callbacks run


def _reason(error: BaseException) -> str:
    return str(error) or type(error).__name__
