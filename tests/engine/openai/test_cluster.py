"""Remote engines behind a ServeCore, beside emulated ones: routing by model and model_type, streams, failures, usage."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parrot.engine.config import EmulatedEngineConfig, OpenAIEngineConfig, ServeCoreAddress, load_engine_config
from parrot.engine.launch import start_emulated, start_openai
from parrot.engine.openai import pace
from parrot.engine.serving import RunningEngine
from parrot.serve.server import Server
from parrot.tokenizer import load_tokenizer
from tests.engine.openai.stand_in import TEXT, Answer, StandIn, stand_in
from tests.engine.openai.test_engine import configuration
from tests.serve.http_support import Client, cluster, eventually

ZERO = Path(__file__).parents[3] / "sample_configs" / "engine" / "emulated-zero.json"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_PAUSE_S", 0.01)


class Mixed:
    """A core, its client, and engines that it knows."""

    def __init__(self, server: Server, client: Client) -> None:
        self.server = server
        self.client = client
        self._address = ServeCoreAddress("127.0.0.1", int(client.url.rpartition(":")[2]))
        self._engines: list[RunningEngine] = []

    async def remote(self, stand: StandIn, **keys: Any) -> RunningEngine:
        config: OpenAIEngineConfig = msgspec.structs.replace(configuration(stand, **keys), serve_core=self._address)
        return await self._add(await start_openai(config))

    async def emulated(self) -> RunningEngine:
        config = load_engine_config(ZERO, {"host": "127.0.0.1", "port": 0})
        assert isinstance(config, EmulatedEngineConfig)
        return await self._add(await start_emulated(msgspec.structs.replace(config, serve_core=self._address)))

    async def _add(self, engine: RunningEngine) -> RunningEngine:
        known = len(self._engines) + 1
        self._engines.append(engine)
        await eventually(lambda: len(self.server.core.engines) >= known)
        return engine

    async def close(self) -> None:
        for engine in self._engines:
            await engine.close()


@asynccontextmanager
async def mixed(**config: Any) -> AsyncIterator[Mixed]:
    async with cluster(load_tokenizer, **config) as core:
        running = Mixed(core.server, core.client)
        try:
            yield running
        finally:
            await running.close()


def output(name: str, **sampling: Any) -> dict[str, Any]:
    return {"name": name, "is_output": True, "sampling_config": {"max_gen_length": 20, **sampling}}


async def text_call(c: Mixed, session: dict[str, Any], template: str, *parameters: dict[str, Any], **more: Any) -> Any:
    answer = await c.client.call(session, template, list(parameters), model_type="text", **more)
    return [p["var_id"] for p in answer["param_info"] if p["is_output"]]


async def test_a_program_of_two_calls_runs_on_a_remote_engine_and_its_usage_is_counted() -> None:
    def respond(body: dict[str, Any]) -> Answer:
        return Answer("a summary" if "Summarise" in str(body) else "the end", usage=(10, 2, 3))

    async with stand_in(respond=respond) as stand, mixed() as c:
        await c.remote(stand, chat=True, instance={"prompt_price": 1.0, "output_price": 2.0})
        session = await c.client.session()
        (first,) = await text_call(c, session, "Summarise: {{text}} {{s}}", {"name": "text", "value": "long"}, output("s"))
        (second,) = await text_call(c, session, "End {{s}} with {{e}}", {"name": "s", "var_id": first}, output("e"))
        assert await c.client.get(session, second, criteria="latency") == (200, {"content": "the end"})
        assert [m["content"] for m in stand.seen[1]["messages"]] == ["End a summary with "]
        status, report = await c.client.send("GET", f"/v1/session/{session['session_id']}", session)
        assert status == 200
        assert report["usage"] == {"prompt_tokens": 20, "cached_tokens": 4, "output_tokens": 6, "cost": 32e-6}


async def test_two_outputs_of_a_call_are_turns_of_one_conversation() -> None:
    async with stand_in() as stand, mixed() as c:
        await c.remote(stand, chat=True)
        session = await c.client.session()
        _, second = await text_call(c, session, "Hello {{a}} and on {{b}}", output("a"), output("b"))
        assert await c.client.get(session, second) == (200, {"content": TEXT})
        assert [m["role"] for m in stand.seen[1]["messages"]] == ["user", "assistant", "user"]


async def test_models_and_model_type_choose_the_engine() -> None:
    async with stand_in(respond=lambda _: Answer("from afar")) as stand, mixed() as c:
        await c.remote(stand)
        near = await c.emulated()
        session = await c.client.session()
        (far,) = await text_call(c, session, "Say {{x}}", output("x"))
        assert await c.client.get(session, far) == (200, {"content": "from afar"})
        answer = await c.client.call(session, "Say {{x}}", [output("x", output_length=3)], models=[near.description.model])
        status, got = await c.client.get(session, answer["param_info"][-1]["var_id"])
        assert (status, len(got["content"].split())) == (200, 3)
        assert len(stand.seen) == 1
        _, models = await c.client.send("GET", "/v1/models")
        assert {m["model_name"] for m in models["models"]} == {"gpt35", near.description.model}


async def test_text_streams_from_the_endpoint_to_the_getter_while_it_comes() -> None:
    gate = asyncio.Event()
    async with stand_in(answers=[Answer(gate=gate)]) as stand, mixed() as c:
        await c.remote(stand)
        session = await c.client.session()
        (x,) = await text_call(c, session, "Say {{x}}", output("x"))
        seen = ""
        async for line in c.client.stream(session, x):
            seen += line.get("delta", "")
            if seen == "one two three":
                gate.set()
        assert seen == TEXT


async def test_a_stream_that_is_cut_goes_on_behind_what_the_getter_has_read() -> None:
    async with stand_in(answers=[Answer(cut=2), Answer(" three four")]) as stand, mixed() as c:
        await c.remote(stand)
        session = await c.client.session()
        (x,) = await text_call(c, session, "Say {{x}}", output("x"))
        lines = [line async for line in c.client.stream(session, x)]
        assert "".join(line.get("delta", "") for line in lines) == TEXT
        assert lines[-1] == {"done": True}
        assert stand.seen[1]["prompt"] == "Say one two"
        assert await c.client.get(session, x) == (200, {"content": TEXT})


async def test_a_filtered_output_is_a_failed_variable_with_its_reason() -> None:
    async with stand_in(answers=[Answer(reason="content_filter")]) as stand, mixed() as c:
        await c.remote(stand)
        session = await c.client.session()
        (x,) = await text_call(c, session, "Say {{x}}", output("x"))
        status, answer = await c.client.get(session, x)
        assert (status, answer["error"]["code"]) == (422, "content_filtered")
        assert "filter" in answer["error"]["message"]


async def test_no_request_is_lost_or_answered_twice_when_the_endpoint_fails_at_random() -> None:
    faults = [Answer(status=500), Answer(status=429, headers={"retry-after-ms": "20"}), Answer(cut=1), Answer(cut=0)]

    def respond(body: dict[str, Any]) -> Answer:
        asked = body["prompt"].split(".")[0]
        turn = sum(str(seen["prompt"]).startswith(asked + ".") for seen in stand.seen) - 1
        number = int(asked.removeprefix("Q"))
        return faults[(number + turn) % 4] if turn < number % 3 else Answer(f"answer {asked}")

    async with stand_in(respond=respond) as stand, mixed(global_scheduler={"policy": "least_loaded"}) as c:
        await c.remote(stand, engine_name="a")
        await c.remote(stand, engine_name="b")

        async def one(number: int) -> tuple[int, Any]:
            session = await c.client.session()
            (x,) = await text_call(c, session, f"Q{number}. {{{{x}}}}", output("x"))
            return await c.client.get(session, x)

        answers = await asyncio.gather(*map(one, range(24)))
        assert answers == [(200, {"content": f"answer Q{number}"}) for number in range(24)]
