"""An engine and its core: registration, heartbeats, and finding back after the core has lost it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web

from parrot.protocol.engine import Failed, Finished, HeartbeatRequest, RegisterRequest
from tests.engine.fakes import fake_engine, last, task
from tests.engine.test_server import until


class FakeCore:
    """Answers registrations and heartbeats, and remembers them. Engines below `first_known` are unknown to it."""

    def __init__(self) -> None:
        self.registrations: list[RegisterRequest] = []
        self.heartbeats: list[HeartbeatRequest] = []
        self.epoch = 0
        self.first_known = 0
        self.refuse: tuple[int, dict[str, Any]] | None = None
        self.port = 0

    async def register(self, request: web.Request) -> web.Response:
        if self.refuse is not None:
            return web.json_response(self.refuse[1], status=self.refuse[0])
        self.registrations.append(msgspec.json.decode(await request.read(), type=RegisterRequest))
        return web.json_response({"engine_id": len(self.registrations) - 1, "epoch": self.epoch})

    async def heartbeat(self, request: web.Request) -> web.Response:
        beat = msgspec.json.decode(await request.read(), type=HeartbeatRequest)
        if beat.engine_id < self.first_known:
            return web.json_response({"error": {"code": "not_found", "message": "who?", "details": {}}}, status=404)
        self.heartbeats.append(beat)
        return web.json_response({})

    @asynccontextmanager
    async def served(self) -> AsyncIterator[FakeCore]:
        app = web.Application()
        app.router.add_post("/register_engine", self.register)
        app.router.add_post("/engine_heartbeat", self.heartbeat)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    def engine(self, **keys: Any) -> Any:
        address = {"host": "127.0.0.1", "port": self.port, **keys.pop("serve_core", {})}
        return fake_engine(with_core=True, heartbeat_interval=0.03, serve_core=address, **keys)


async def test_an_engine_registers_as_its_file_says_and_sends_heartbeats() -> None:
    async with FakeCore().served() as core, core.engine(engine_name="e", serve_core={"engine_secret": "s"}) as engine:
        await until(lambda: len(core.heartbeats) > 1)
        (registration,) = core.registrations
        assert registration.engine_config == engine.running.description
        assert registration.engine_config.port == engine.running.port != 0
        assert registration.secret == "s"
        assert len(registration.instance) >= 16
        beat = core.heartbeats[0]
        assert (beat.engine_id, beat.engine_name, beat.secret) == (0, "e", "s")
        assert beat.instance == registration.instance
        assert beat.runtime_info.num_max_blocks == 256


async def test_an_engine_that_the_core_no_longer_knows_registers_again_and_drops_its_contexts() -> None:
    async with FakeCore().served() as core, core.engine() as engine:
        await until(lambda: core.heartbeats)
        await engine.run(task(0, [(1, 32)], 2))
        assert last(await engine.run(task(1, [(1, 32), (3, 1)], 4)), Finished).cached_tokens == 32
        engine.runner.gate.clear()
        running = asyncio.create_task(engine.run(task(2, [(5, 3)], 6)))
        await until(lambda: engine.runner.tasks)
        core.first_known = 1
        assert last(await running, Failed).retryable
        engine.runner.gate.set()
        await until(lambda: len(core.registrations) == 2)
        assert core.registrations[0] == core.registrations[1]
        again = task(1, [(1, 32), (3, 1)], 4, engine_id=1, attempt=2)
        assert last(await engine.run(again), Finished).cached_tokens == 0
        late = task(3, [(1, 32), (3, 1)], 4)  # of the registration before: its context ids mean others now
        assert last(await engine.run(late), Failed).retryable


async def test_a_task_for_the_process_that_had_this_address_before_is_not_run() -> None:
    async with FakeCore().served() as core, core.engine() as engine:
        await until(lambda: core.heartbeats)
        ours = msgspec.structs.replace(task(0, [(1, 3)], 2), instance=core.registrations[0].instance)
        for_another = msgspec.structs.replace(task(1, [(1, 3)], 2), instance="another", engine_id=5)
        refusal = last(await engine.run(for_another), Failed)
        assert (refusal.code, refusal.retryable) == ("conflict", True)
        last(await engine.run(ours), Finished)  # and what it said of epochs and ids was not believed


async def test_an_engine_outlives_its_core_and_meets_the_next_one(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="parrot.engine.core_link")
    core = FakeCore()
    async with core.served():
        context = core.engine()
        engine = await context.__aenter__()
        try:
            await until(lambda: core.heartbeats)
            await engine.run(task(0, [(1, 32)], 2))
        except BaseException:
            await context.__aexit__(None, None, None)
            raise
    try:
        await until(lambda: "no answer to a heartbeat" in caplog.text)
        await asyncio.sleep(0.1)
        assert caplog.text.count("no answer to a heartbeat") == 1  # once a change of state
        next_core = FakeCore()
        next_core.port, next_core.epoch, next_core.first_known = core.port, 4, 1
        next_core.registrations.append(core.registrations[0])  # another engine has the old one's number
        async with next_core.served():
            await until(lambda: next_core.heartbeats)
            assert last(await engine.run(task(0, [(1, 32)], 2, epoch=4, engine_id=1)), Finished).cached_tokens == 0
            assert last(await engine.run(task(1, [(1, 32)], 2, epoch=0)), Failed).code == "conflict"
    finally:
        await context.__aexit__(None, None, None)


async def test_an_engine_waits_for_a_core_that_starts_later() -> None:
    core = FakeCore()
    async with core.served():
        pass  # now there is a port where nobody listens
    async with core.engine() as engine:
        await asyncio.sleep(0.05)
        last(await engine.run(task(0, [(1, 3)], 2)), Finished)
        async with core.served():
            await until(lambda: core.registrations)


async def test_a_refused_registration_is_said_with_its_reason_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    core = FakeCore()
    core.refuse = (403, {"error": {"code": "forbidden", "message": "wrong secret", "details": {}}})
    async with core.served(), core.engine():
        await until(lambda: "wrong secret" in caplog.text)
        core.refuse = None
        await until(lambda: core.registrations)


async def test_evicted_contexts_travel_with_a_heartbeat_when_no_task_tells_them() -> None:
    limits = {"instance": {"device": "cpu", "num_kv_cache_blocks": 64}, "scheduler": {"max_total_tokens": 64}}
    async with FakeCore().served() as core, core.engine(**limits) as engine:
        await until(lambda: core.heartbeats)
        await engine.run(task(0, [(1, 32)], 2, max_gen_length=1))
        await engine.post("/fill", {"context_id": 1, "token_ids": [1] * 60})
        await until(lambda: any(1 in beat.evicted for beat in core.heartbeats))
