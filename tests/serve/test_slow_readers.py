"""Readers that do not read: what they cost is bounded, others are served meanwhile, and in the end they are cut off."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from parrot.protocol.engine import Finished, Started, Tokens
from tests.serve.http_support import Cluster, cluster, eventually
from tests.serve.test_openai_routes import ask, events, said

WORD = "x" * 1000
PIECES = 1000  # 1 MB, far more than all buffers on the way together
#: The transport's buffer and aiohttp's, 64 KiB each, and a piece.
MOST_BUFFERED = 256 * 1024


class DeafReader:
    """A client that asks, and reads nothing."""

    def __init__(self, c: Cluster, method: str, path: str, body: dict[str, Any]) -> None:
        host, port = c.client.url.removeprefix("http://").split(":")
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect((host, int(port)))
        data = json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self.socket.sendall(head.encode() + data)

    def close(self) -> None:
        self.socket.close()


def transports(c: Cluster) -> list[Any]:
    assert c.server._runner is not None
    server = c.server._runner.server
    assert server is not None
    return [connection.transport for connection in server.connections if connection.transport is not None]


async def begin(c: Cluster, kind: str, gate: asyncio.Event) -> DeafReader:
    """A deaf reader of an output of PIECES pieces, all of which come at once; its end waits for `gate`. The kernel keeps little
    of what is sent to it."""
    engine = await c.engine("larger", model="m")
    await c.client.register(engine, "larger again", max_seq_len=2 * PIECES)
    begin = asyncio.Event()
    pieces = [Tokens((1,), WORD) for _ in range(PIECES)]
    engine.script(Started(), begin, *pieces, gate, Finished((1,) * PIECES, WORD * PIECES, "eos", 3))
    deaf = await _ask(c, kind)
    await eventually(lambda: engine.tasks)
    for transport in transports(c):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    begin.set()
    await eventually(lambda: any(t.get_write_buffer_size() for t in transports(c)))
    return deaf


async def _ask(c: Cluster, kind: str) -> DeafReader:
    if kind == "sse":
        return DeafReader(c, "POST", "/v1/chat/completions", ask(stream=True, max_tokens=PIECES))
    session = await c.client.session()
    output = {"name": "answer", "is_output": True, "sampling_config": {"max_gen_length": PIECES}}
    answer = await c.client.call(session, "hello {{answer}}", [output])
    return DeafReader(c, "GET", f"/v1/semantic_var/{answer['param_info'][-1]['var_id']}", {**session, "stream": True})


@pytest.mark.parametrize("kind", ["sse", "ndjson"])
async def test_a_reader_that_does_not_read_fills_no_memory_and_holds_nobody_up(kind: str) -> None:
    async with cluster(reader_timeout=600) as c:
        gate = asyncio.Event()
        deaf = await begin(c, kind, gate)
        engine = c._engines[0]
        for number in range(5):  # others are served, though the deaf one's text keeps coming
            engine.script(Started(), Tokens((1,), f"a{number}"), Finished((1,), f"a{number}", "eos", 3))
            assert said(await events(c, ask())) == f"a{number}"
            assert max(t.get_write_buffer_size() for t in transports(c)) <= MOST_BUFFERED
        await eventually(lambda: _came(c) == PIECES * len(WORD))
        assert max(t.get_write_buffer_size() for t in transports(c)) <= MOST_BUFFERED
        gate.set()
        deaf.close()
        await eventually(lambda: c.server.core.counts()["gets"] == 0)


def _came(c: Cluster) -> int:
    """Characters of the longest output that is being generated."""
    return max((len(s.text) for streams in c.server.links._streams._sessions.values() for s in streams.values()), default=0)


@pytest.mark.parametrize("kind", ["sse", "ndjson"])
async def test_a_reader_that_takes_nothing_for_too_long_is_cut_off(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster(reader_timeout=0.2) as c:
        deaf = await begin(c, kind, asyncio.Event())
        await eventually(lambda: c.server.core.counts()["gets"] == 0)
        if kind == "sse":  # its session was its own, and so was the work
            await eventually(lambda: c._engines[0].aborted and c.server.core.counts()["sessions"] == 0)
        deaf.close()
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_slow_reader_gets_all_of_it_in_larger_pieces() -> None:
    async with cluster() as c:
        gate = asyncio.Event()
        gate.set()
        deaf = await begin(c, "sse", gate)
        deaf.socket.setblocking(False)
        loop = asyncio.get_running_loop()
        received = bytearray()
        while b"[DONE]" not in received[-100:]:
            received += await loop.sock_recv(deaf.socket, 1 << 20)
        deaf.close()
        body = b"".join(_unchunked(bytes(received.partition(b"\r\n\r\n")[2])))
        chunks = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]
        assert said([*chunks, "[DONE]"]) == WORD * PIECES
        assert len(chunks) < PIECES


def _unchunked(body: bytes) -> list[bytes]:
    """The parts of a body in chunked encoding."""
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return parts
