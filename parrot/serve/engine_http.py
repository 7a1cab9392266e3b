"""HTTP to one engine over kept-alive connections: POST a body, read the answer as it comes. aiohttp's client, less what a
core does not need of it; every failure of the connection is an OSError."""

from __future__ import annotations

import asyncio
import ssl

import aiohttp

CONNECT_S = 5.0
#: The longest answer that is read as a whole: a ping's, a refusal's.
MAX_ANSWER_BYTES = 1024 * 1024


class Exchange:
    """A request under way. `status` is there; the body comes with `read`. It must be closed."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status

    async def read(self) -> bytes:
        """The next part of the body; b"" at its end. Raises OSError when the connection breaks before."""
        try:
            return await self._response.content.readany()
        except aiohttp.ClientError as error:
            raise ConnectionResetError(str(error) or type(error).__name__) from error

    async def read_all(self) -> bytes:
        """The whole body. Raises OSError also when it is longer than any answer that a core asks for."""
        parts, size = [], 0
        while part := await self.read():
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise OSError(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
        return b"".join(parts)

    def close(self) -> None:
        """The connection is kept when the answer was read to its end, else closed."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()


class EngineHttp:
    """The connections to one engine. To be made in a running event loop."""

    def __init__(self, host: str, port: int, *, secure: bool = False, trust: ssl.SSLContext | None = None) -> None:
        """`secure`: the engine shows a certificate; `trust`: whose it believes (None: the system's authorities')."""
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if secure else 'http'}://{shown}:{port}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60.0, ssl=trust if trust is not None else True),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            headers={"Content-Type": "application/json"},
            auto_decompress=False,
        )

    async def post(self, path: str, body: bytes) -> Exchange:
        """Sends `body` and waits for the answer's head; the caller must `close` the exchange. Raises OSError, TimeoutError."""
        try:
            return Exchange(await self._session.post(self.url + path, data=body, allow_redirects=False))
        except aiohttp.ClientOSError:
            raise
        except (aiohttp.ClientError, RuntimeError) as error:  # RuntimeError: the session is closed
            raise ConnectionResetError(str(error) or type(error).__name__) from error

    async def ask(self, path: str, body: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Status and body of an answer. Raises OSError, TimeoutError."""
        async with asyncio.timeout(timeout_s):
            exchange = await self.post(path, body)
            try:
                return exchange.status, await exchange.read_all()
            finally:
                exchange.close()

    async def close(self) -> None:
        """Closes all connections."""
        await self._session.close()
