"""Engines that hang, engine processes that are stopped, a core that stands still: who moves again goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import pytest

from parrot.engine import core_link
from parrot.latency import FixedCost, LatencyProfile
from parrot.protocol.engine import Started
from tests.serve.fault_support import TEXT, Streaming, another, computing
from tests.serve.http_support import cluster, eventually


async def test_an_engine_whose_heartbeat_says_that_it_stands_still_is_lost_and_its_task_runs_elsewhere() -> None:
    async with cluster(engine_stall_timeout=60) as c:
        hung = await c.engine("hung")
        hung.script(Started(), asyncio.Event())
        session = await c.client.session()
        getting = asyncio.create_task(another(c).get(session, await c.client.ask(session, "hello")))
        await eventually(lambda: hung.tasks)
        await c.engine("well")
        beat = {"engine_id": hung.engine_id, "engine_name": "hung", "instance": "hung", "runtime_info": {"stalled_s": 59.0}}
        assert (await c.client.send("POST", "/engine_heartbeat", beat))[0] == 200
        beat["runtime_info"] = {"stalled_s": 61.0}
        status, answer = await c.client.send("POST", "/engine_heartbeat", beat)
        assert (status, answer["error"]["code"]) == (404, "not_found")
        assert await getting == (200, {"content": TEXT})


async def test_an_engine_whose_loop_hangs_is_lost_and_comes_back_when_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_link, "STALLED_S", 0.1)
    async with cluster(engine_stall_timeout=0.3) as c, computing(c, int(c.client.url.rpartition(":")[2])) as engine:
        await eventually(lambda: len(c.server.core.engines) == 1)
        engine.runner.gate.clear()
        session = await c.client.session()
        getting = asyncio.create_task(another(c).get(session, await c.client.ask(session, "hello")))
        await eventually(lambda: len(c.server.core.engines) == 0)
        assert (await engine.info())["stalled_s"] > 0.3
        for _ in range(20):  # its heartbeat comes every 0.05 s; it would be back by now
            await asyncio.sleep(0.01)
            assert len(c.server.core.engines) == 0
        engine.runner.gate.set()
        status, answer = await getting
        assert status == 200
        assert answer["content"]
        assert (await engine.info())["stalled_s"] == 0.0


async def test_an_engine_process_that_is_stopped_is_lost_and_comes_back_when_it_is_continued(tmp_path: Path) -> None:
    profile = LatencyProfile("test", "m", "cpu", "none", (FixedCost(10_000, 0.05),), (), pair_s=0.0, kv_s=0.0)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(profile))
    async with cluster(engine_heartbeat_timeout=1.0) as c:
        config = {
            "engine_type": "emulated",
            "engine_name": "real",
            "model": "m",
            "host": "127.0.0.1",
            "port": 0,
            "latency_profile": "profile.json",
            "heartbeat_interval": 0.2,
            "serve_core": {"host": "127.0.0.1", "port": int(c.client.url.rpartition(":")[2])},
        }
        (tmp_path / "engine.json").write_text(json.dumps(config))
        arguments = (
            "-m",
            "parrot.engine.http_server",
            "--config_path",
            str(tmp_path / "engine.json"),
            "--log_dir",
            str(tmp_path),
        )
        process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.DEVNULL)
        try:
            await eventually(lambda: len(c.server.core.engines) == 1, 20.0)
            session = await c.client.session()
            getter = Streaming(c, session, await c.client.ask(session, "hello"))
            await eventually(lambda: getter.text)
            os.kill(process.pid, signal.SIGSTOP)
            await eventually(lambda: len(c.server.core.engines) == 0, 10.0)
            shown = getter.text
            os.kill(process.pid, signal.SIGCONT)
            await eventually(lambda: len(c.server.core.engines) == 1, 10.0)
            await eventually(lambda: len(getter.text) > len(shown), 10.0)  # it goes on behind what was shown
            assert getter.text.startswith(shown)
            getter.done.cancel()
        finally:
            process.kill()
            await process.wait()


async def test_a_core_that_stood_still_gives_everybody_a_chance() -> None:
    async with cluster(engine_heartbeat_timeout=1.0, session_life_span=1.0) as c:
        engine = await c.engine()
        engine.script(Started(), gate := asyncio.Event(), engine.finished(TEXT))
        idle, busy = await c.client.session(), await c.client.session()
        getting = asyncio.create_task(another(c).get(busy, await c.client.ask(busy, "hello"), timeout=1.5))
        await eventually(lambda: engine.tasks)
        time.sleep(2.5)  # the whole process: as SIGSTOP and SIGCONT do
        beat = {"engine_id": engine.engine_id, "engine_name": "scripted"}
        assert (await another(c).send("POST", "/engine_heartbeat", beat))[0] == 200
        gate.set()
        assert await getting == (200, {"content": TEXT})
        assert (await c.client.send("GET", "/v1/semantic_var", idle))[0] == 200
