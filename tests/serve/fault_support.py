"""For the tests of engines that misbehave: a getter that streams, what engines say, and an engine whose computing is played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from parrot.protocol.engine import Tokens
from tests.engine.fakes import Engine, fake_engine
from tests.serve.http_support import Client, Cluster

TEXT = "fine thanks"  #: what a `ScriptedEngine` answers with


def words(c: Cluster, text: str) -> tuple[int, ...]:
    return tuple(c.tokenizers.load("words").encode(text))


def tokens(c: Cluster, text: str) -> Tokens:
    return Tokens(words(c, text), text)


def another(c: Cluster) -> Client:
    return Client(c.client.url, c.client.http)


class Streaming:
    """A getter that streams: the text that it was shown so far, and the lines that were no text."""

    def __init__(self, c: Cluster, session: dict[str, Any], var_id: str) -> None:
        self.text = ""
        self.ends: list[Any] = []
        self.done = asyncio.create_task(self._read(another(c), session, var_id))

    async def _read(self, client: Client, session: dict[str, Any], var_id: str) -> None:
        async for message in client.stream(session, var_id):
            if "delta" in message:
                self.text += message["delta"]
            else:
                self.ends.append(message)


@contextlib.asynccontextmanager
async def computing(c: Cluster, port: int, **keys: Any) -> AsyncIterator[Engine]:
    """A real engine, but for what it computes, with its link to the core."""
    core = {"host": "127.0.0.1", "port": port}
    async with fake_engine(with_core=True, heartbeat_interval=0.05, serve_core=core, **keys) as engine:
        yield engine
