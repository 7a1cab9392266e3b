"""What a streaming getter is told when its text cannot be shown any more: one more line, never a second answer."""

from __future__ import annotations

import asyncio
from typing import Any

from parrot.protocol.engine import Finished, Started, Tokens
from parrot.protocol.errors import ParrotError
from tests.serve.http_support import cluster, eventually


async def test_a_journal_that_fails_in_the_middle_of_a_stream_ends_it_with_an_error_line() -> None:
    async with cluster() as c:
        engine = await c.engine("e")
        ids = tuple(c.tokenizers.load(engine.tokenizer).encode("one two three"))
        gate = asyncio.Event()
        engine.script(
            Started(), Tokens(ids[:1], "one"), gate, Tokens(ids[1:2], " two"), asyncio.Event(), Finished(ids, "", "eos")
        )
        shell: Any = c.server.shell
        show = shell.show

        async def fails_later(*arguments: Any) -> None:
            await show(*arguments)
            if gate.is_set():
                raise ParrotError("unavailable", "the disk is full")

        shell.show = fails_later
        session = await c.client.session()
        var = await c.client.ask(session, "count")
        lines: list[Any] = []

        async def read() -> None:
            async for line in c.client.stream(session, var):
                lines.append(line)

        reading = asyncio.ensure_future(read())
        await eventually(lambda: lines)
        gate.set()
        await asyncio.wait_for(reading, 5.0)
        assert lines[0] == {"delta": "one"}
        assert [line["error"]["code"] for line in lines[1:]] == ["unavailable"]
