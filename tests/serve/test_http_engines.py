"""Engines as the core's server sees them: registration, heartbeats, broken streams, shutdown."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from parrot.protocol.engine import Finished, Rejected, Started, Tokens
from tests.serve.http_support import Client, ScriptedEngine, cluster, eventually


async def test_the_same_process_registering_again_is_one_engine() -> None:
    async with cluster() as c:
        engine = await c.engine(instance="i1")
        first = engine.engine_id
        assert (await c.client.register(engine, "i1"))[1]["engine_id"] == first
        assert len(c.server.core.engines) == 1


async def test_simultaneous_registrations_of_one_process_are_one_engine() -> None:
    async with cluster() as c:
        engine = ScriptedEngine(c.tokenizers)
        await engine.start()
        answers = await asyncio.gather(*(Client(c.client.url, c.client.http).register(engine, "i1") for _ in range(5)))
        await engine.stop()
        assert {status for status, _ in answers} == {200}
        assert len({answer["engine_id"] for _, answer in answers}) == 1
        assert len(c.server.core.engines) == 1


async def test_another_process_at_the_same_address_replaces_the_engine_and_its_tasks_run_again() -> None:
    async with cluster() as c:
        engine = await c.engine(instance="i1")
        engine.script(Started(), asyncio.Event())
        session = await c.client.session()
        getting = asyncio.create_task(c.client.get(session, await c.client.ask(session, "hello")))
        await eventually(lambda: len(engine.tasks) == 1)
        _, answer = await Client(c.client.url, c.client.http).register(engine, "i2")
        assert answer["engine_id"] != engine.tasks[0].engine_id
        assert await getting == (200, {"content": "fine thanks"})
        assert len(c.server.core.engines) == 1


async def test_a_tokenizer_that_cannot_be_loaded_refuses_the_engine_by_name() -> None:
    async with cluster() as c:
        engine = ScriptedEngine(c.tokenizers)
        engine.port = 1
        status, answer = await c.client.register(engine, "i", tokenizer="missing-one")
        assert status == 400
        assert "missing-one" in answer["error"]["message"]
        assert len(c.server.core.engines) == 0


async def test_engines_need_the_cluster_s_secret() -> None:
    async with cluster(engine_secret="open sesame") as c:
        engine = ScriptedEngine(c.tokenizers)
        engine.port = 1
        body = {"engine_config": msgspec.to_builtins(engine.description()), "instance": "i"}
        assert (await c.client.send("POST", "/register_engine", body))[0] == 401
        assert (await c.client.send("POST", "/register_engine", {**body, "secret": "x"}))[0] == 403
        status, answer = await c.client.send("POST", "/register_engine", {**body, "secret": "open sesame"})
        assert status == 200
        beat = {"engine_id": answer["engine_id"], "engine_name": "e"}
        assert (await c.client.send("POST", "/engine_heartbeat", beat))[0] == 401
        assert (await c.client.send("POST", "/engine_heartbeat", {**beat, "secret": "x"}))[0] == 403
        assert await c.client.send("POST", "/engine_heartbeat", {**beat, "secret": "open sesame"}) == (200, {})


@pytest.mark.parametrize(
    "change",
    [
        {"tasks_capacity": 0},
        {"tokens_capacity": -1},
        {"max_seq_len": 0},
        {"port": 0},
        {"port": 70000},
        {"engine_type": "abacus"},
        {"engine_name": ""},
    ],
)
async def test_an_engine_that_describes_itself_badly_is_refused_by_the_key(change: dict[str, Any]) -> None:
    async with cluster() as c:
        engine = await c.engine()
        status, answer = await c.client.register(engine, "another", **change)
        assert (status, answer["error"]["code"]) == (400, "bad_request")
        assert next(iter(change)) in answer["error"]["message"]
        assert list(c.server.core.engines) == [engine.engine_id]


async def test_work_that_failed_for_good_invites_no_retry() -> None:
    async with cluster(global_scheduler={"engine_wait_timeout": 0.01}) as c:
        session = await c.client.session()
        status, answer = await c.client.get(session, await c.client.ask(session, "hello"))
        assert (status, answer["error"]["code"]) == (503, "no_engine")
        assert "Retry-After" not in c.client.headers


async def test_an_engine_too_many_is_429() -> None:
    async with cluster(max_engines_num=1) as c:
        await c.engine("e1")
        other = ScriptedEngine(c.tokenizers)
        other.port = 1
        status, answer = await c.client.register(other, "i2")
        assert (status, answer["error"]["code"]) == (429, "too_many_engines")


async def test_a_silent_engine_is_lost_and_its_task_runs_elsewhere() -> None:
    async with cluster(engine_heartbeat_timeout=0.2) as c:
        silent = await c.engine("silent")
        silent.script(Started(), asyncio.Event())
        session = await c.client.session()
        getting = asyncio.create_task(c.client.get(session, await c.client.ask(session, "hello")))
        await eventually(lambda: len(silent.tasks) == 1)
        await eventually(lambda: len(c.server.core.engines) == 0)
        client = Client(c.client.url, c.client.http)
        status, _ = await client.send("POST", "/engine_heartbeat", {"engine_id": silent.engine_id, "engine_name": "silent"})
        assert status == 404
        await client.register(silent, "silent")
        assert await getting == (200, {"content": "fine thanks"})
        assert silent.lost_connections == 1


async def test_heartbeats_keep_an_engine() -> None:
    async with cluster(engine_heartbeat_timeout=0.4) as c:
        engine = await c.engine()
        for _ in range(12):
            await asyncio.sleep(0.05)
            body = {"engine_id": engine.engine_id, "engine_name": "scripted", "runtime_info": {"num_running_jobs": 1}}
            assert await c.client.send("POST", "/engine_heartbeat", body) == (200, {})
        assert len(c.server.core.engines) == 1


async def test_a_heartbeat_of_another_process_under_the_same_id_is_told_to_register() -> None:
    async with cluster() as c:
        engine = await c.engine("one")
        beat = {"engine_id": engine.engine_id, "engine_name": "one", "instance": "one"}
        assert (await c.client.send("POST", "/engine_heartbeat", beat))[0] == 200
        assert (await c.client.send("POST", "/engine_heartbeat", {**beat, "instance": "another"}))[0] == 404


async def test_a_broken_stream_is_pinged_and_tried_again() -> None:
    async with cluster() as c:
        engine = await c.engine()
        engine.script(Started(), None)
        engine.script(b'{"event": "nonsense"}\n')
        engine.script(Started())  # ends without an end
        session = await c.client.session()
        assert await c.client.get(session, await c.client.ask(session, "hello")) == (200, {"content": "fine thanks"})
        assert len(engine.tasks) == 4
        await eventually(lambda: engine.pings >= 1)
        assert len(c.server.core.engines) == 1


@pytest.mark.parametrize("dead", [False, True])
async def test_an_engine_whose_ping_fails_is_lost_and_its_task_waits_for_another(dead: bool) -> None:
    async with cluster() as c:
        sick = await c.engine("sick")
        sick.ping_status = 500
        for _ in range(10):
            sick.script(Started(), None)
        if dead:
            await sick.stop()
        session = await c.client.session()
        getting = asyncio.create_task(c.client.get(session, await c.client.ask(session, "hello")))
        await eventually(lambda: len(c.server.core.engines) == 0)
        well = ScriptedEngine(c.tokenizers, "well")
        await well.start()
        await Client(c.client.url, c.client.http).register(well, "well")
        assert await getting == (200, {"content": "fine thanks"})
        assert len(sick.tasks) <= 1  # the attempts were not used up on it
        await well.stop()


async def test_a_rejected_task_goes_to_another_engine() -> None:
    async with cluster() as c:
        full = await c.engine("full")
        full.script(Rejected("engine_rejected", "no room"))
        session = await c.client.session()
        getting = asyncio.create_task(c.client.get(session, await c.client.ask(session, "hello")))
        await eventually(lambda: full.tasks)
        c.client = Client(c.client.url, c.client.http)
        await c.engine("roomy")
        assert await getting == (200, {"content": "fine thanks"})
        assert len(full.tasks) == 1


async def test_closing_a_session_aborts_its_running_task_and_frees_its_contexts() -> None:
    async with cluster() as c:
        engine = await c.engine()
        session = await c.client.session()
        await c.client.get(session, await c.client.ask(session, "done before"))
        engine.script(Started(), asyncio.Event())
        getting = asyncio.create_task(c.client.get(session, await c.client.ask(session, "hello")))
        await eventually(lambda: len(engine.tasks) == 2)
        client = Client(c.client.url, c.client.http)
        await client.send("DELETE", f"/v1/session/{session['session_id']}", {"session_auth": session["session_auth"]})
        status, answer = await getting
        assert (status, answer["error"]["code"]) == (410, "session_closed")
        await eventually(lambda: engine.aborted and engine.freed and engine.lost_connections)
        assert engine.aborted[0]["task"] == [session["session_id"], 1, 0]
        assert engine.freed[0]["context_ids"]


async def test_generated_ids_that_are_not_the_tokenizer_s_own_are_kept() -> None:
    async with cluster() as c:
        engine = await c.engine()
        engine.script(Started(), Tokens((7, 8, 9)), Finished((7, 8, 9), "fine thanks", "eos", 1))
        session = await c.client.session()
        answer = await c.client.call(
            session, "a {{x}} b {{y}}", [{"name": "x", "is_output": True}, {"name": "y", "is_output": True}]
        )
        first, second = (item["var_id"] for item in answer["param_info"])
        assert (await c.client.get(session, second))[0] == 200
        assert await c.client.get(session, first) == (200, {"content": "fine thanks"})
        ids = [i for link in engine.tasks[1].chain for i in link.token_ids]
        assert ids[1:4] == [7, 8, 9]
        assert [link.output for link in engine.tasks[1].chain if link.token_ids == [7, 8, 9]] == [True]


async def test_contexts_that_an_engine_evicted_are_no_parents_any_more() -> None:
    async with cluster(global_scheduler={"ctx_aware": True}) as c:
        engine = await c.engine()
        session = await c.client.session()
        await c.client.get(session, await c.client.ask(session, "the same words"))
        await c.client.get(session, await c.client.ask(session, "the same words"))
        assert engine.tasks[1].parent != -1
        known = tuple({link.context_id for task in engine.tasks for link in task.chain})
        body = {"engine_id": engine.engine_id, "engine_name": "scripted", "evicted": known}
        await c.client.send("POST", "/engine_heartbeat", body)
        await c.client.get(session, await c.client.ask(session, "the same words"))
        assert engine.tasks[2].parent == -1


@pytest.mark.parametrize("stream", [False, True])
async def test_stopping_answers_who_waits_and_closes_the_task_streams(stream: bool) -> None:
    async with cluster() as c:
        engine = await c.engine()
        engine.script(Started(), asyncio.Event())
        session = await c.client.session()
        getting = asyncio.create_task(c.client.get(session, await c.client.ask(session, "hello"), stream=stream))
        await eventually(lambda: len(engine.tasks) == 1)
        await c.server.stop()
        status, answer = await getting
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        await eventually(lambda: engine.lost_connections == 1)
