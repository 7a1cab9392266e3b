"""Deadlines, tenants' limits and Retry-After over HTTP; deadlines across a core that dies."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from parrot.protocol.engine import Started, Tokens
from tests.serve.http_support import cluster, eventually
from tests.serve.test_http_journal import lives

OUTPUT = {"name": "x", "is_output": True}


def tenant_of(api_key: str) -> str:
    """As the configuration names it: no key is ever written there."""
    return hashlib.sha256(api_key.encode()).hexdigest()


async def test_a_get_past_its_deadline_is_504_and_its_work_is_aborted() -> None:
    async with cluster() as c:
        engine = await c.engine()
        engine.script(Started(), asyncio.Event())
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        status, answer = await c.client.get(session, var_id, deadline=0.1, timeout=30)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        assert "Retry-After" not in c.client.headers
        await eventually(lambda: engine.aborted or engine.lost_connections)
        status, answer = await c.client.get(session, var_id)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        (listed,) = (await c.client.send("GET", "/v1/semantic_var", session))[1]["vars"]
        assert listed["state"] == "failed"


async def test_a_deadline_that_is_kept_changes_nothing_and_is_shown() -> None:
    async with cluster() as c:
        await c.engine()
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        assert await c.client.get(session, var_id, deadline=60) == (200, {"content": "fine thanks"})
        path = f"/v1/session/{session['session_id']}"
        _, report = await c.client.send("GET", path, {"session_auth": session["session_auth"], "calls": True})
        (task,) = report["reports"][0]["tasks"]
        assert task["deadline_s"] == pytest.approx(task["ready_s"] + 60, abs=0.1)


async def test_a_stream_past_its_deadline_ends_with_the_error() -> None:
    async with cluster() as c:
        engine = await c.engine()
        ids = tuple(c.tokenizers.load("words").encode("fine"))
        engine.script(Started(), Tokens(ids, "fine"), asyncio.Event())
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        lines = [line async for line in c.client.stream(session, var_id, deadline=0.3)]
        assert lines[0] == {"delta": "fine"}
        assert lines[-1]["error"]["code"] == "deadline_exceeded"


async def test_a_call_s_deadline() -> None:
    async with cluster() as c:
        session = await c.client.session()
        answer = await c.client.call(session, "a {{x}}", [OUTPUT], deadline=0.1)
        status, error = await c.client.get(session, answer["param_info"][0]["var_id"])
        assert (status, error["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("deadline", [-1, "soon", 1e300, True])
async def test_what_is_no_number_of_seconds_is_400(deadline: Any) -> None:
    async with cluster() as c:
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        status, answer = await c.client.get(session, var_id, deadline=deadline)
        assert status == 400
        assert "deadline" in answer["error"]["message"]
        call = {**session, "template": "a {{x}}", "parameters": [OUTPUT], "deadline": deadline}
        status, answer = await c.client.send("POST", "/v1/semantic_call", call)
        assert status == 400
        assert "deadline" in answer["error"]["message"]


async def test_a_tenant_s_limits_are_429_with_retry_after_and_others_go_on() -> None:
    limits = {tenant_of("key-a"): {"max_sessions": 2, "max_queued_tasks": 1}}
    async with cluster(tenants=limits) as c:
        first, second = await c.client.session(api_key="key-a"), await c.client.session(api_key="key-a")
        status, answer = await c.client.send("POST", "/v1/session", {"api_key": "key-a"})
        assert (status, answer["error"]["code"]) == (429, "too_many_sessions")
        assert "key-a" not in answer["error"]["message"]
        assert 1 <= int(c.client.headers["Retry-After"]) <= 60
        other = await c.client.session(api_key="key-b")
        call = {"template": "a {{x}}", "parameters": [OUTPUT], "output_criteria": "latency"}
        for session in (first, first, other):
            assert (await c.client.send("POST", "/v1/semantic_call", {**session, **call}))[0] == 200
        status, answer = await c.client.send("POST", "/v1/semantic_call", {**second, **call})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(c.client.headers["Retry-After"]) == answer["error"]["details"]["retry_after_s"]


async def test_a_deadline_outlives_the_core(tmp_path: Path) -> None:
    async with lives(tmp_path / "journal.sqlite") as life:
        session = await life.client.session(api_key="key-a")
        first = await life.client.ask(session, "hello")
        second = await life.client.ask(session, "again")
        gets = [asyncio.create_task(life.client.get(session, var, deadline=s)) for var, s in ((first, 0.4), (second, 60))]
        await eventually(lambda: life.server.core.counts()["gets"] == 2)
        before = {task.id: task.deadline_s for call in life.server.core.calls(session["session_id"]) for task in call.tasks}
        await asyncio.sleep(0.05)  # committed
        await life.die()
        for get in gets:
            get.cancel()
        await asyncio.gather(*gets, return_exceptions=True)
        await life.begin()
        core = life.server.core
        assert {t.id: t.deadline_s for call in core.calls(session["session_id"]) for t in call.tasks} == before
        assert core.sessions[session["session_id"]].tenant == tenant_of("key-a")
        await eventually(lambda: core.counts().get("failed") == 1)  # nobody else wants it
        status, answer = await life.client.get(session, first)
        assert (status, answer["error"]["code"]) == (504, "deadline_exceeded")
        engine = await life.engine("one")
        await life.client.register(engine, "one")
        assert (await life.client.get(session, second))[0] == 200
        assert await life.client.get(session, first) == (status, answer)
        await life.die()
        await life.begin()
        assert await life.client.get(session, first) == (status, answer), "a task that failed by its deadline stays failed"
