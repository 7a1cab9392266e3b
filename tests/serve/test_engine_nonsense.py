"""Engines that talk nonsense, in pieces, or without end: what is no answer fails the attempt, and the next one is taken."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from parrot.protocol.engine import Failed, Finished, Started, Tokens
from parrot.serve import task_stream
from parrot.serve.engine_http import EngineHttp
from tests.serve.fault_support import TEXT, tokens
from tests.serve.http_support import Step, cluster, eventually

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
