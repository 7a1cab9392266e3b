"""What a journal has of requests on OpenAI's routes, and what becomes of them when the core dies in the middle of one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from parrot.protocol.engine import Started, Tokens
from parrot.serve import journal
from tests.serve.http_support import Cluster, cluster, eventually
from tests.serve.test_openai_routes import ask, events, post, said


def rows(path: Path) -> int:
    with journal.read(path) as reading:
        return sum(1 for _ in reading.rows(0, None))


async def half_done(c: Cluster) -> asyncio.Task[Any]:
    """A request whose engine has begun to answer and does not go on."""
    engine = await c.engine()
    engine.script(Started(), Tokens((1,), "fine"), asyncio.Event())
    waiting = asyncio.create_task(post(c, ask()))
    await eventually(lambda: c.server.core.counts().get("running"))
    return waiting


async def test_a_plain_request_leaves_nothing_in_a_journal_that_is_for_recovery(tmp_path: Path) -> None:
    path = tmp_path / "core.sqlite"
    async with cluster(journal_path=str(path)) as c:
        await c.engine()
        for _ in range(3):
            assert (await post(c, ask("a text to be kept nowhere")))[0] == 200
        assert said(await events(c, ask())) == "fine thanks"
        waiting = await half_done(c)
        waiting.cancel()
    assert rows(path) == 0
    assert all(b"kept nowhere" not in file.read_bytes() for file in tmp_path.glob("core.sqlite*"))


@pytest.mark.parametrize("mode", ["recover", "record"])
async def test_a_request_that_the_core_did_not_live_to_answer_is_over_in_its_next_life(tmp_path: Path, mode: str) -> None:
    path = str(tmp_path / "core.sqlite")
    async with cluster(journal_path=path, journal_mode=mode) as c:
        waiting = await half_done(c)
        c.server.shell._closing = True  # as if the process were gone: nothing is told to the core any more
    await asyncio.gather(waiting, return_exceptions=True)
    async with cluster(journal_path=path, journal_mode=mode) as c:
        engine = await c.engine()
        await eventually(lambda: c.server.core.counts()["sessions"] == 0)
        assert (await post(c, ask()))[0] == 200
        assert len(engine.tasks) == 1, "the work of the life before is not done again"
        assert c.server.core.counts()["sessions"] == 0


async def test_the_next_life_can_do_again_what_a_recorded_plain_request_did(tmp_path: Path) -> None:
    from sim.replay import replay

    path = tmp_path / "core.sqlite"
    async with cluster(journal_path=str(path), journal_mode="record") as c:
        await c.engine()
        assert (await post(c, ask()))[0] == 200
        assert said(await events(c, ask(n=2))) == "fine thanks"
    found = replay(path)
    assert found.difference is None
    assert found.effects > 0


async def test_a_call_in_a_session_is_kept_as_every_other(tmp_path: Path) -> None:
    path = str(tmp_path / "core.sqlite")
    async with cluster(journal_path=path) as c:
        await c.engine()
        session = await c.client.session()
        own = {"session": session["session_id"], "session_auth": session["session_auth"]}
        _, answer = await post(c, ask(parrot={**own, "output": "answer"}))
        var_id = answer["parrot"]["outputs"][0]["var_id"]
    async with cluster(journal_path=path) as c:
        assert await c.client.get(session, var_id) == (200, {"content": "fine thanks"})
        _, report = await c.client.send("GET", f"/v1/session/{session['session_id']}", {**session, "calls": True})
        assert report["reports"][0]["tasks"][0]["reason"] == "eos"


async def test_a_text_that_a_plain_request_outlived_leaves_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "core.sqlite"
    async with cluster(journal_path=str(path)) as c:
        engine = await c.engine()
        session = await c.client.session()
        engine.script(Started(), asyncio.Event())
        waiting = asyncio.create_task(post(c, {"model": "m", "prompt": "a shared text"}, "/v1/completions"))
        await eventually(lambda: c.server.core.counts().get("running"))
        await c.client.call(session, "a shared text{{x}}", [{"name": "x", "is_output": True}])
        await c.client.send("DELETE", f"/v1/session/{session['session_id']}", session)
        waiting.cancel()
        await eventually(lambda: c.server.core.counts()["sessions"] == 0)
    with journal.read(path) as reading:
        assert not reading.past().texts
