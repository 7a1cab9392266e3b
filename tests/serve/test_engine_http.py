"""The core's HTTP to its engines: connections that are kept, connections that break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from parrot.serve.engine_http import EngineHttp

BODY = b'{"event":"started"}\n{"event":"tokens"}\n'
WITH_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nX: y\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5;ext=1\r\n" + BODY[:5] + b"\r\n%X\r\n" % len(BODY[5:]) + BODY[5:] + b"\r\n0\r\nTrailer: z\r\n\r\n"
)


@asynccontextmanager
async def _server(*answers: bytes, close: bool = False) -> AsyncIterator[tuple[EngineHttp, list[int]]]:
    """Answers each request with the next; counts requests by connection."""
    left = list(answers)
    connections: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(connections)
        connections.append(0)
        try:
            while left:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]))
                connections[number] += 1
                writer.write(left.pop(0))
                await writer.drain()
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    http = EngineHttp("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield http, connections
    finally:
        await http.close()
        server.close()
        await server.wait_closed()


async def test_a_connection_is_used_again() -> None:
    async with _server(WITH_LENGTH, CHUNKED, WITH_LENGTH) as (http, connections):
        for _ in range(3):
            assert await http.ask("/task", b"{}", 5.0) == (200, BODY)
        assert connections == [3]


async def test_exchanges_at_the_same_time_have_connections_of_their_own() -> None:
    async with _server(*[WITH_LENGTH] * 4) as (http, connections):
        answers = await asyncio.gather(*(http.ask("/task", b"{}", 5.0) for _ in range(4)))
        assert answers == [(200, BODY)] * 4
        assert connections == [1] * 4


async def test_a_connection_that_breaks_is_an_os_error_and_the_next_is_a_new_one() -> None:
    async with _server(CHUNKED[:-9], WITH_LENGTH, close=True) as (http, connections):
        with pytest.raises(OSError):
            await http.ask("/task", b"{}", 5.0)
        assert await http.ask("/task", b"{}", 5.0) == (200, BODY)
        assert connections == [1, 1]


async def test_an_engine_that_is_not_there_is_an_os_error() -> None:
    async with _server() as (http, _):
        pass
    again = EngineHttp("127.0.0.1", int(http.url.rpartition(":")[2]))
    with pytest.raises(OSError):
        await again.ask("/ping", b"{}", 5.0)
    await again.close()


async def test_a_silent_engine_times_out_and_its_connection_is_not_used_again() -> None:
    async with _server(b"", WITH_LENGTH) as (http, connections):
        with pytest.raises(TimeoutError):
            await http.ask("/ping", b"{}", 0.05)
        assert await http.ask("/ping", b"{}", 5.0) == (200, BODY)
        assert connections == [1, 1]
