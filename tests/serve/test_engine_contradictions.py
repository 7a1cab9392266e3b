"""Engines that contradict what was streamed: a getter never sees two versions of an output."""

from __future__ import annotations

import asyncio

import pytest

from parrot.protocol.engine import Finished, Started, Tokens
from tests.serve.fault_support import TEXT, Streaming, tokens, words
from tests.serve.http_support import cluster, eventually


@pytest.mark.parametrize("wrong", ["other words", "fin", "other ids"])
async def test_a_result_that_contradicts_what_was_streamed_never_reaches_the_getter(wrong: str) -> None:
    async with cluster() as c:
        engine = await c.engine()
        gate = asyncio.Event()
        engine.script(Started(), tokens(c, "fine"), gate, None)
        # The text is right; the ids are not those that it was told to go on from.
        contradiction = Finished((77, 78), TEXT, "eos", 1) if wrong == "other ids" else engine.finished(wrong)
        engine.script(Started(), contradiction)
        engine.script(Started(), engine.finished(TEXT))
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        getter = Streaming(c, session, var_id)
        await eventually(lambda: getter.text == "fine")
        gate.set()
        await getter.done
        assert (getter.text, getter.ends) == (TEXT, [{"done": True}])
        assert await c.client.get(session, var_id) == (200, {"content": TEXT})
        assert [task.generate.forced_text for task in engine.tasks] == ["", "fine", "fine"]


async def test_a_contradiction_in_the_attempt_that_streamed_fails_it_too() -> None:
    async with cluster() as c:
        engine = await c.engine()
        gate = asyncio.Event()
        engine.script(Started(), tokens(c, "fine"), gate, engine.finished("other words"))
        session = await c.client.session()
        getter = Streaming(c, session, await c.client.ask(session, "hello"))
        await eventually(lambda: getter.text == "fine")
        gate.set()
        await getter.done
        assert (getter.text, getter.ends) == (TEXT, [{"done": True}])
        assert engine.tasks[1].generate.forced_text == "fine"


async def test_what_nobody_was_shown_may_be_said_otherwise_at_the_end() -> None:
    async with cluster() as c:
        engine = await c.engine()
        engine.script(Started(), tokens(c, "something else"), engine.finished(TEXT))
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        assert await c.client.get(session, var_id) == (200, {"content": TEXT})
        getter = Streaming(c, session, var_id)
        await getter.done
        assert getter.text == TEXT
        assert len(engine.tasks) == 1


async def test_tokens_that_a_stop_string_took_back_are_no_contradiction() -> None:
    """Their text was held back, so that nobody was shown it; an attempt that goes on from them ends before them."""
    async with cluster() as c:
        engine = await c.engine()
        gate = asyncio.Event()
        engine.script(Started(), Tokens((*words(c, "fine"), 50), "fine"), gate, None)
        engine.script(Started(), Finished(words(c, "fine"), "fine", "stop_str", 1))
        session = await c.client.session()
        getter = Streaming(c, session, await c.client.ask(session, "hello"))
        await eventually(lambda: getter.text == "fine")
        gate.set()
        await getter.done
        assert (getter.text, getter.ends) == ("fine", [{"done": True}])
        assert len(engine.tasks) == 2
