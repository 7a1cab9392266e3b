"""Streaming answers over HTTP: server-sent events and lines, written with regard to who reads them slowly, or not at all.

What bounds the memory of a reader that is too slow: a write waits for it once aiohttp's buffer (64 KiB) and the transport's
(64 KiB) are full, and the writer has one piece in hand meanwhile. What came since then waits as the output's text, which is
there anyway, once for all its readers. A reader that takes nothing for `patience_s` is cut off. No other reader waits for it.

Shared by the core's server and the engine's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from aiohttp import web

EVENT_STREAM: dict[str, str] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # proxies such as nginx hold streams back otherwise
}
_SMALL = 16_384  # bytes; a transport takes in four times as many before it lets its writer wait
#: The longest run of characters that is sent in one piece.
PIECE_CHARACTERS = 16_384


class ReaderGone(ConnectionResetError):
    """Nobody reads the answer any more."""


class StreamWriter:
    """An answer that is sent piece by piece. Its status and headers go out with the first."""

    def __init__(
        self,
        request: web.BaseRequest,
        headers: Mapping[str, str],
        patience_s: float | None = None,
        make: Any = web.StreamResponse,
    ) -> None:
        """`patience_s`: how long a reader may take nothing; None: as long as it likes. `make`: makes the response."""
        self._request = request
        self._patience_s = patience_s
        self.response: web.StreamResponse = make(headers=dict(headers))

    @property
    def begun(self) -> bool:
        """Whether the status was sent: from then on an error can only be told in the stream."""
        return bool(self.response.prepared)

    async def write(self, data: bytes) -> None:
        """Sends `data`. Raises ReaderGone, the connection closed, when nobody takes it in time."""
        if not self.begun:
            await self.response.prepare(self._request)
        if self._patience_s is None or self._cannot_wait(len(data)):
            await self.response.write(data)
            return
        try:
            async with asyncio.timeout(self._patience_s):
                await self.response.write(data)
        except TimeoutError:
            self._cut_off()
            raise ReaderGone(f"the reader took nothing for {self._patience_s:g} s") from None

    async def end(self) -> web.StreamResponse:
        """The answer is whole. Raises ReaderGone, as `write` does."""
        if not self.begun:
            await self.response.prepare(self._request)
        if self._patience_s is None:
            await self.response.write_eof()
            return self.response
        try:
            async with asyncio.timeout(self._patience_s):
                await self.response.write_eof()
        except TimeoutError:
            self._cut_off()
            raise ReaderGone(f"the reader took nothing for {self._patience_s:g} s") from None
        return self.response

    def _cannot_wait(self, length: int) -> bool:
        """Whether a write of so many bytes ends at once, because all that was written before is on its way. So it is nearly
        always, and a timeout would cost more than the write."""
        transport = self._request.transport
        return length <= _SMALL and transport is not None and transport.get_write_buffer_size() == 0

    def _cut_off(self) -> None:
        transport = self._request.transport
        if transport is not None:
            transport.abort()
