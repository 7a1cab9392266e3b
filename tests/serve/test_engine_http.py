"""The core's HTTP to its engines: answers however they are cut, connections that are kept, connections that break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parrot.serve.engine_http import AnswerParser, EngineHttp

BODY = b'{"event":"started"}\n{"event":"tokens"}\n'
WITH_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nX: y\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5;ext=1\r\n" + BODY[:5] + b"\r\n%X\r\n" % len(BODY[5:]) + BODY[5:] + b"\r\n0\r\nTrailer: z\r\n\r\n"
)
UNTIL_CLOSED = b"HTTP/1.1 200 OK\r\n\r\n" + BODY


def _parse(answer: bytes, cuts: list[int]) -> tuple[AnswerParser, bytes]:
    parser, body, start = AnswerParser(), b"", 0
    for end in [*sorted(cut % (len(answer) + 1) for cut in cuts), len(answer)]:
        parser.feed(answer[start:end])
        body += parser.take()
        start = end
    return parser, body


@given(st.sampled_from([WITH_LENGTH, CHUNKED, UNTIL_CLOSED]), st.lists(st.integers(min_value=0), max_size=20))
def test_an_answer_is_the_same_however_it_is_cut(answer: bytes, cuts: list[int]) -> None:
    parser, body = _parse(answer, cuts)
    if answer is UNTIL_CLOSED:
        parser.end_of_input()
    assert (parser.status, body, parser.ended) == (200, BODY, True)
    assert parser.keeps_alive == (answer is not UNTIL_CLOSED)


@given(st.sampled_from([WITH_LENGTH, CHUNKED]), st.integers(min_value=0))
def test_an_answer_cut_short_is_an_error(answer: bytes, cut: int) -> None:
    parser = AnswerParser()
    parser.feed(answer[: cut % len(answer)])
    with pytest.raises(ValueError):
        parser.end_of_input()


@given(st.binary(max_size=200))
def test_nothing_but_a_value_error_comes_of_nonsense(nonsense: bytes) -> None:
    parser = AnswerParser()
    try:
        parser.feed(nonsense)
        parser.end_of_input()
    except ValueError:
        pass


def test_an_answer_that_closes_is_not_kept() -> None:
    parser, _ = _parse(b"HTTP/1.1 500 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", [])
    assert (parser.status, parser.ended, parser.keeps_alive) == (500, True, False)


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
        http.close()
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
    with pytest.raises(OSError):
        await EngineHttp("127.0.0.1", http._port).ask("/ping", b"{}", 5.0)


async def test_a_silent_engine_times_out_and_its_connection_is_not_used_again() -> None:
    async with _server(b"", WITH_LENGTH) as (http, connections):
        with pytest.raises(TimeoutError):
            await http.ask("/ping", b"{}", 0.05)
        assert await http.ask("/ping", b"{}", 5.0) == (200, BODY)
        assert connections == [1, 1]
