"""Engines that die, hang, answer slowly, cut a stream, talk nonsense, register twice, come back as something else; a core
that cannot be reached, or stands still: every output comes once, in full, and is what a getter was shown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from parrot.engine import core_link
from parrot.latency import FixedCost, LatencyProfile
from parrot.protocol.engine import Failed, Finished, Started, Tokens
from parrot.serve import clock, task_stream
from parrot.serve.config import ServeCoreConfig
from parrot.serve.engine_http import EngineHttp
from parrot.serve.server import Server
from tests.engine.fakes import Engine, fake_engine
from tests.serve.http_support import Client, Cluster, ScriptedEngine, Step, Tokenizers, cluster, eventually

TEXT = "fine thanks"


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


# ---------------------------------------------------------------------------------------------------------------- deaths


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


async def test_a_slow_answer_in_small_pieces_is_an_answer() -> None:
    async with cluster() as c:
        engine = await c.engine()
        whole = msgspec.json.encode(Started()) + b"\n" + msgspec.json.encode(engine.finished(TEXT)) + b"\n"
        gates = [asyncio.Event() for _ in range(0, len(whole), 7)]
        engine.script(*(step for n, gate in enumerate(gates) for step in (gate, whole[7 * n : 7 * n + 7])))
        session = await c.client.session()
        getting = asyncio.create_task(c.client.get(session, await c.client.ask(session, "hello")))
        await eventually(lambda: engine.tasks)
        for gate in gates:
            assert not getting.done()
            gate.set()
            await asyncio.sleep(0.005)
        assert await getting == (200, {"content": TEXT})
        assert len(engine.tasks) == 1


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


# -------------------------------------------------------------------------------------------------------------- nonsense

NONSENSE: dict[str, list[Step]] = {
    "no JSON": [b"hello?\n"],
    "no UTF-8": [b'{"event":"tokens","ids":[1],"text":"\xff\xfe"}\n'],
    "an unknown event": [b'{"event":"dance"}\n'],
    "a wrong type": [b'{"event":"tokens","ids":"abc"}\n'],
    "a missing field": [b'{"event":"finished","text":"x"}\n'],
    "nested without end": [b"[" * 100_000 + b"\n"],
    "a line without end": [b"x" * 20_000],
    "negative cached tokens": [Started(-1)],
    "negative counts": [Started(), Finished((1,), "x", "eos", -5)],
    "negative time": [Started(), Finished((1,), "x", "eos", 1, 0, -0.5)],
    "a negative id": [Started(), Tokens((-3,), "x")],
    "a negative id at the end": [Started(), Finished((-3,), "x", "eos", 1)],
    "too many tokens": [Started(), Tokens(tuple(range(9)), "x")],
    "too many tokens, one by one": [Started(), *([Tokens((1,), "x")] * 9)],
    "too long an output": [Started(), Finished(tuple(range(9)), "x", "length", 1)],
    "text out of nothing": [Started(), Finished((), "x", "eos", 1)],
    "an unknown failure": [Started(), Failed("moon_phase", "wrong moon")],
    "an unknown failure, for good": [Failed("moon_phase", "wrong moon", retryable=False)],
}


@pytest.mark.parametrize("kind", NONSENSE)
async def test_nonsense_fails_the_attempt_and_the_next_one_is_taken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_stream, "MAX_LINE_BYTES", 10_000)
    async with cluster() as c:
        engine = await c.engine()
        engine.script(*NONSENSE[kind])
        session = await c.client.session()
        sampling = {"max_gen_length": 8}
        answer = await c.client.call(
            session, "hello {{answer}}", [{"name": "answer", "is_output": True, "sampling_config": sampling}]
        )
        var_id = answer["param_info"][-1]["var_id"]
        assert await c.client.get(session, var_id) == (200, {"content": TEXT})
        assert [task.attempt for task in engine.tasks] == [1, 2]
        assert engine.tasks[1].generate.forced_ids == ()
        assert len(c.server.core.engines) == 1


async def test_an_attempt_s_nonsense_is_named_in_the_failure_of_its_task() -> None:
    async with cluster(global_scheduler={"max_attempts": 1}) as c:
        engine = await c.engine("talker")
        engine.script(b"hello?\n")
        session = await c.client.session()
        status, answer = await c.client.get(session, await c.client.ask(session, "hello"))
        assert (status, answer["error"]["code"]) == (502, "engine_failed")
        assert "'talker' sent nonsense: 'hello?' is no event" in answer["error"]["message"]


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


async def test_what_comes_behind_the_end_is_not_read_and_an_answer_without_end_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("parrot.serve.engine_links._TAIL_S", 0.05)
    async with cluster() as c:
        engine = await c.engine()
        late: list[Step] = [
            tokens(c, "more"),
            engine.finished("another end"),
            Failed("internal", "oh"),
            b"hello?\n",
            asyncio.Event(),
        ]
        engine.script(Started(), engine.finished(TEXT), *late)
        session = await c.client.session()
        var_id = await c.client.ask(session, "hello")
        for _ in range(2):
            assert await c.client.get(session, var_id) == (200, {"content": TEXT})
        await eventually(lambda: engine.lost_connections == 1)
        assert len(engine.tasks) == 1
        [known] = c.server.core.engines.values()
        assert (known.state, known.failures) == ("live", 0)


async def test_an_answer_that_is_longer_than_any_can_be_is_not_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parrot.serve.engine_http.MAX_ANSWER_BYTES", 10)
    async with cluster() as c:
        engine = await c.engine()
        http = EngineHttp("127.0.0.1", engine.port)
        with pytest.raises(OSError, match="more than 10 bytes"):
            await http.ask("/ping", b"{}", 5.0)
        await http.close()


# --------------------------------------------------------------------------------------------------- hangs, standstills


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


@contextlib.asynccontextmanager
async def computing(c: Cluster, port: int, **keys: Any) -> AsyncIterator[Engine]:
    """A real engine, but for what it computes, with its link to the core."""
    core = {"host": "127.0.0.1", "port": port}
    async with fake_engine(with_core=True, heartbeat_interval=0.05, serve_core=core, **keys) as engine:
        yield engine


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


async def test_the_clock_counts_no_standstill_and_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = 100.0
    monkeypatch.setattr(clock, "monotonic", lambda: real)
    c = clock.Clock(7.0)
    assert c.now() == 7.0
    real += clock.BEAT_S + clock.TOLERANCE_S
    ordinary = c.now()
    assert ordinary == 7.0 + clock.BEAT_S + clock.TOLERANCE_S
    c._beat()
    real += 3600.0
    after = c.now()
    assert ordinary <= after <= ordinary + clock.BEAT_S
    real += 0.25
    assert c.now() == pytest.approx(after + 0.25)
    real -= 50.0
    assert c.now() == pytest.approx(after + 0.25)
    c.close()


# ------------------------------------------------------------------------------------------------------- registrations


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
