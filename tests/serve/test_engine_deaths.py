"""Engines that die or fail in a task: every output comes once, in full, and goes on from what a getter was shown."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from parrot.protocol.engine import Failed, Started, Tokens
from tests.serve.fault_support import TEXT, Streaming, another, tokens, words
from tests.serve.http_support import Step, cluster, eventually


@pytest.mark.parametrize("how", ["reset", "cut in a line", "cut between lines"])
async def test_an_engine_that_dies_in_a_task_leaves_no_trace_in_what_is_streamed(how: str) -> None:
    async with cluster() as c:
        engine = await c.engine()
        gate = asyncio.Event()
        steps: dict[str, list[Step]] = {"reset": [None], "cut in a line": [b'{"event":"tok'], "cut between lines": []}
        engine.script(Started(), tokens(c, "fine"), gate, *steps[how])
        engine.script(Started(), Tokens(words(c, "thanks"), " thanks"), engine.finished(TEXT))
        session = await c.client.session()
        getter = Streaming(c, session, await c.client.ask(session, "hello"))
        await eventually(lambda: getter.text == "fine")
        gate.set()
        await getter.done
        assert (getter.text, getter.ends) == (TEXT, [{"done": True}])
        assert engine.tasks[1].generate.forced_ids == words(c, "fine")
        assert engine.tasks[1].generate.forced_text == "fine"


async def test_an_engine_with_another_tokenizer_goes_on_from_the_text_that_was_shown() -> None:
    async with cluster() as c:
        one = await c.engine("one")
        c.tokenizers.load("others").encode("these words make its ids differ")
        gate = asyncio.Event()
        one.script(Started(), tokens(c, "fine"), gate, None)
        session = await c.client.session()
        getter = Streaming(c, session, await c.client.ask(session, "hello"))
        await eventually(lambda: getter.text == "fine")
        other = await c.engine("other", tokenizer="others")
        one.ping_status = 500
        gate.set()
        await getter.done
        assert (getter.text, getter.ends) == (TEXT, [{"done": True}])
        forced = other.tasks[0].generate.forced_ids
        assert forced == tuple(c.tokenizers.load("others").encode("fine")) != words(c, "fine")


async def test_an_engine_that_fails_everything_at_once_does_not_draw_all_work_to_itself() -> None:
    async with cluster() as c:
        bad = await c.engine("bad")
        for _ in range(200):
            bad.script(Failed("engine_failed", "no luck", retryable=True))
        await c.engine("good")

        async def one(number: int) -> tuple[int, Any]:
            client = another(c)
            session = await client.session()
            return await client.get(session, await client.ask(session, f"question {number}"))

        assert await asyncio.gather(*map(one, range(40))) == [(200, {"content": TEXT})] * 40
        [suspect] = [e for e in c.server.core.engines.values() if e.name == "bad"]
        assert suspect.failures > 0  # its pause may be over on a slow machine


async def test_an_engine_that_fails_everything_alone_is_given_time_to_recover() -> None:
    async with cluster() as c:
        engine = await c.engine()
        for _ in range(3):
            engine.script(Failed("engine_failed", "not yet", retryable=True))
        session = await c.client.session()
        assert await c.client.get(session, await c.client.ask(session, "hello")) == (200, {"content": TEXT})
        assert len(engine.tasks) == 4
