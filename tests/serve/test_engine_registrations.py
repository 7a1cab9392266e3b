"""Engines that register twice, come back as something else, or lose their core: one process is one engine."""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from parrot.protocol.engine import Started
from parrot.serve.config import ServeCoreConfig
from parrot.serve.server import Server
from tests.serve.fault_support import TEXT, another, computing
from tests.serve.http_support import Client, ScriptedEngine, Tokenizers, cluster, eventually


async def test_a_process_that_registers_again_as_another_model_is_another_engine() -> None:
    async with cluster() as c:
        engine = await c.engine(instance="i1")
        first = engine.engine_id
        status, answer = await c.client.register(engine, "i1", model="n")
        assert status == 200
        assert answer["engine_id"] != first
        assert [e.description.model for e in c.server.core.engines.values()] == ["n"]
        assert (await c.client.register(engine, "i1", model="n"))[1] == answer


@pytest.mark.parametrize("elsewhere", [False, True])
async def test_tasks_for_the_model_of_an_engine_that_came_back_with_another(elsewhere: bool) -> None:
    async with cluster(global_scheduler={"engine_wait_timeout": 0.3}) as c:
        engine = await c.engine(instance="i1")
        engine.script(Started(), asyncio.Event())
        session = await c.client.session()
        answer = await c.client.call(session, "a {{x}}", [{"name": "x", "is_output": True}], models=["m"])
        getting = asyncio.create_task(another(c).get(session, answer["param_info"][-1]["var_id"]))
        await eventually(lambda: engine.tasks)
        await another(c).register(engine, "i2", model="n")
        other = await c.engine("other") if elsewhere else None
        status, body = await getting
        assert len(engine.tasks) == 1  # it was not asked for what it no longer serves
        if other is not None:
            assert (status, body) == (200, {"content": TEXT})
            assert len(other.tasks) == 1
        else:
            assert (status, body["error"]["code"]) == (503, "no_engine")


async def test_an_engine_finds_back_to_a_core_that_could_not_be_reached_for_a_while() -> None:
    async with cluster() as c, aiohttp.ClientSession() as http:
        port = int(c.client.url.rpartition(":")[2])
        async with computing(c, port) as engine:
            await eventually(lambda: len(c.server.core.engines) == 1)
            await c.server.stop()
            await asyncio.sleep(0.2)
            config = ServeCoreConfig(host="127.0.0.1", port=port)
            server = Server(config, load=Tokenizers().load)
            await server.start()
            try:
                await eventually(lambda: len(server.core.engines) == 1, 10.0)
                client = Client(f"http://127.0.0.1:{port}", http)
                session = await client.session()
                status, answer = await client.get(session, await client.ask(session, "hello"))
                assert status == 200
                assert answer["content"]
                assert engine.running.link is not None
                assert engine.running.link.registered.is_set()
            finally:
                await server.stop()


async def test_two_registrations_at_once_from_one_address_leave_one_engine() -> None:
    async with cluster() as c:
        engine = ScriptedEngine(c.tokenizers)
        await engine.start()
        try:
            await asyncio.gather(*(another(c).register(engine, f"i{n}") for n in range(4)))
            assert len(c.server.core.engines) == 1
            session = await c.client.session()
            assert await c.client.get(session, await c.client.ask(session, "hello")) == (200, {"content": TEXT})
        finally:
            await engine.stop()
