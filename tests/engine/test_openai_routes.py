"""OpenAI's routes on an engine used alone, asked by the official client and by hand: builtin, emulated, behind an endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from parrot.engine.config import EmulatedEngineConfig, load_engine_config
from parrot.engine.launch import start_emulated, start_openai
from parrot.engine.serving import RunningEngine
from tests.engine.fakes import Engine, fake_engine
from tests.engine.openai.stand_in import TEXT, Answer, stand_in
from tests.engine.openai.test_engine import configuration
from tests.serve.http_support import eventually

openai = pytest.importorskip("openai", reason="the package openai is not installed")

ZERO = Path(__file__).parents[2] / "sample_configs" / "engine" / "emulated-zero.json"
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
#: What a FakeRunner says, a word a token.
WORDS = [f"w{100 + number}" for number in range(1000)]


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@asynccontextmanager
async def emulated(**overrides: Any) -> AsyncIterator[RunningEngine]:
    config = load_engine_config(ZERO, {"host": "127.0.0.1", "port": 0, **overrides})
    assert isinstance(config, EmulatedEngineConfig)
    engine = await start_emulated(config, with_core=False)
    try:
        yield engine
    finally:
        await engine.close()


async def nothing_is_left(engine: Engine) -> None:
    """No job runs, and no context is kept."""
    loop = engine.running.loop
    await eventually(lambda: not loop.context_ids())
    assert loop.runtime_info().num_total_jobs == 0


# --------------------------------------------------------------------------------------------------------------- answers


async def test_a_chat_is_answered_whole() -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        answer = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3)
        assert answer.choices[0].message.content == " ".join(WORDS[:3])
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        # synthetic: "system: Be brief.", "user: Hello", "assistant:", a token a word
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (6, 3, 9)
        await nothing_is_left(engine)


async def test_a_chat_is_streamed_with_its_role_first_and_its_usage_last() -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        options: Any = {"stream_options": {"include_usage": True}}
        stream = await client.chat.completions.create(model="fake", messages=HELLO, max_tokens=3, stream=True, **options)
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == " ".join(WORDS[:3])
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 3
        await nothing_is_left(engine)


async def test_a_completion_takes_text_or_token_ids_or_several_of_them() -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        for prompt, tokens in (("one two", 2), ([5, 6, 7], 3), (["one", "two three"], 3), ([[1], [2, 3]], 3)):
            answer = await client.completions.create(model="fake", prompt=prompt, max_tokens=2)  # type: ignore[arg-type]
            assert [c.text for c in answer.choices] == ["w100 w101"] * len(answer.choices)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == tokens
        assert [c.index for c in answer.choices] == [0, 1]
        assert (await client.completions.create(model="fake", prompt="x")).usage.completion_tokens == 16  # type: ignore[union-attr]
        echo = await client.completions.create(model="fake", prompt=[[1, 2]], max_tokens=1, echo=True)
        assert echo.choices[0].text == "w1 w2w100"
        await nothing_is_left(engine)


async def test_a_completion_gives_the_ids_of_its_tokens_to_who_asks() -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        asked: Any = {"model": "fake", "prompt": ["x", "y"], "max_tokens": 3, "extra_body": {"return_token_ids": True}}
        whole = await client.completions.create(**asked)
        assert [choice.token_ids for choice in whole.choices] == [[100, 101, 102]] * 2  # type: ignore[attr-defined]
        chunks = [chunk async for chunk in await client.completions.create(**asked, stream=True)]
        found = [c.choices[0].token_ids for c in chunks if hasattr(c.choices[0], "token_ids")]  # type: ignore[attr-defined]
        assert found == [[100, 101, 102]] * 2
        assert not hasattr((await client.completions.create(model="fake", prompt="x")).choices[0], "token_ids")


async def test_choices_of_one_prompt_share_its_contexts_and_have_seeds_of_their_own() -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        engine.runner.gate.clear()
        asking = asyncio.create_task(client.completions.create(model="fake", prompt="a b c d", n=3, max_tokens=2, seed=5))
        await eventually(lambda: len(engine.runner.tasks) == 3)
        seeds = sorted(sampling.seed or 0 for _, sampling in engine.runner.tasks.values())
        assert seeds == [5, 6, 7]
        engine.runner.gate.set()
        answer = await asking
        assert [c.index for c in answer.choices] == [0, 1, 2]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 6)
        await nothing_is_left(engine)


async def test_an_answer_without_a_limit_ends_where_the_model_does() -> None:
    async with fake_engine(instance={"device": "cpu", "num_kv_cache_blocks": 48}) as engine, client_of(engine.url) as client:
        answer = await client.chat.completions.create(model="fake", messages=HELLO)
        assert answer.usage is not None
        assert answer.usage.total_tokens == 48
        assert answer.choices[0].finish_reason == "length"


async def test_the_models_are_told_in_both_forms() -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        assert [model.id async for model in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).id == "fake"
        async with engine.client.get(engine.url + "/v1/models") as response:
            assert (await response.json())["models"] == [{"model_name": "fake", "tokenizer_name": "synthetic"}]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other/model")


async def test_an_emulated_engine_says_the_same_for_the_same_prompt_whatever_its_form() -> None:
    async with emulated() as engine, client_of(engine.url) as client:
        model = engine.description.model
        text, ids = "w1 w2 w3", [1, 2, 3]
        asked: Any = {"model": model, "max_tokens": 4, "temperature": 0}
        first = await client.completions.create(prompt=text, **asked)
        second = await client.completions.create(prompt=ids, **asked)
        assert first.choices[0].text == second.choices[0].text
        stream = await client.completions.create(prompt=text, stream=True, **asked)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == first.choices[0].text
        forced = await client.completions.create(prompt=text, extra_body={"output_length": 2}, **asked)
        assert forced.usage is not None
        assert forced.usage.completion_tokens == 2


async def test_an_engine_behind_an_endpoint_passes_the_roles_on_and_its_counts_back() -> None:
    async with stand_in(answers=[Answer(usage=(11, 7, 4))]) as stand:
        engine = await start_openai(configuration(stand, chat=True), with_core=False)
        try:
            async with client_of(engine.url) as client:
                answer = await client.chat.completions.create(model=engine.description.model, messages=HELLO, max_tokens=9)
                assert answer.choices[0].message.content == TEXT
                assert answer.usage is not None
                assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 4)
                assert answer.usage.prompt_tokens_details is not None
                assert answer.usage.prompt_tokens_details.cached_tokens == 7
                assert [(m["role"], m["content"]) for m in stand.seen[0]["messages"]] == [
                    ("system", "Be brief."),
                    ("user", "Hello"),
                ]
                with pytest.raises(openai.BadRequestError, match="takes text"):
                    await client.completions.create(model=engine.description.model, prompt=[1, 2])
        finally:
            await engine.close()


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("chat/completions", {"model": "other", "messages": HELLO}, 404, "model_not_found", "model"),
        ("chat/completions", {"model": "fake", "messages": []}, 400, "empty_array", "messages"),
        ("chat/completions", {"model": "fake", "messages": HELLO, "max_tokens": -1}, 400, None, "max_tokens"),
        ("chat/completions", {"model": "fake", "messages": HELLO, "parrot": {"criteria": "latency"}}, 400, None, "parrot"),
        ("chat/completions", {"model": "fake", "messages": HELLO, "stop": list("abcde")}, 400, None, "stop"),
        ("completions", {"model": "fake", "prompt": [[1], []]}, 400, None, "prompt[1]"),
        ("completions", {"model": "fake", "prompt": [[1], [2**62]]}, 400, None, "prompt[1]"),
        ("completions", {"model": "fake", "prompt": "   "}, 400, None, "prompt"),
        ("completions", {"model": "fake", "prompt": "x " * 5000}, 400, "context_length_exceeded", None),
        ("completions", {"model": "fake", "prompt": "x", "output_length": 3}, 400, "bad_sampling", None),
        ("nowhere", {}, 404, "not_found", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused_is_refused_in_openai_s_shape_streamed_or_not(
    path: str, body: dict[str, Any], status: int, code: str | None, param: str | None, stream: bool
) -> None:
    async with fake_engine() as engine:
        async with engine.client.post(f"{engine.url}/v1/{path}", json={**body, "stream": stream}) as response:
            told = await response.json()
            assert response.status == status, told
        assert set(told["error"]) == {"message", "type", "param", "code"}
        assert code is None or told["error"]["code"] == code
        assert param is None or told["error"]["param"] == param
        await nothing_is_left(engine)


async def test_choices_count_on_from_the_largest_seed() -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        engine.runner.gate.clear()
        asked = {"model": "fake", "prompt": "x", "max_tokens": 2, "n": 2, "seed": 2**63 - 1}
        asking = asyncio.create_task(client.completions.create(**asked))
        await eventually(lambda: len(engine.runner.tasks) == 2)
        assert [sampling.seed for _, sampling in engine.runner.tasks.values()] == [2**63 - 1, 0]
        engine.runner.gate.set()
        assert [choice.index for choice in (await asking).choices] == [0, 1]


async def test_a_body_that_is_not_encoded_as_it_says_is_400_and_leaves_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    async with emulated() as running, aiohttp.ClientSession() as http:
        headers = {"Content-Encoding": "gzip", "Connection": "close"}
        async with http.post(f"{running.url}/v1/completions", data=b"{}  ", headers=headers) as response:
            told = await response.json()
        assert response.status == 400
        assert "gzip" in told["error"]["message"]
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_an_iteration_that_fails_is_an_error_before_the_first_token(stream: bool) -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        engine.runner.fail_next = "launch"
        with pytest.raises(openai.APIStatusError, match="out of luck") as raised:
            await client.completions.create(model="fake", prompt="x", max_tokens=3, stream=stream)
        assert raised.value.status_code == 502
        await nothing_is_left(engine)


async def test_an_iteration_that_fails_in_mid_stream_is_an_error_of_the_stream() -> None:
    async with fake_engine() as engine, client_of(engine.url) as client:
        stream = await client.completions.create(model="fake", prompt="x", max_tokens=500, stream=True)
        seen: list[str] = []

        async def read() -> None:
            async for chunk in stream:
                seen.append(chunk.choices[0].text)
                engine.runner.fail_next = "finish"

        with pytest.raises(openai.APIError, match="out of luck"):
            await read()
        assert seen
        assert len(seen) < 500
        await nothing_is_left(engine)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_takes_its_choices_along(stream: bool) -> None:
    async with fake_engine() as engine:
        engine.runner.gate.clear()
        body = {"model": "fake", "prompt": "x", "n": 2, "max_tokens": 50, "stream": stream}
        asking = asyncio.create_task(engine.client.post(engine.url + "/v1/completions", json=body))
        await eventually(lambda: len(engine.runner.tasks) == 2)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await eventually(lambda: engine.running.loop.runtime_info().num_total_jobs == 0)
        engine.runner.gate.set()
        await nothing_is_left(engine)


async def test_an_engine_that_is_full_says_when_to_come_again() -> None:
    async with fake_engine(tasks_capacity=1) as engine:
        engine.runner.gate.clear()
        body = {"model": "fake", "prompt": "x", "max_tokens": 2}
        first = asyncio.create_task(engine.client.post(engine.url + "/v1/completions", json=body))
        await eventually(lambda: len(engine.runner.tasks) == 1)
        async with engine.client.post(engine.url + "/v1/completions", json=body) as response:
            assert response.status == 503
            assert "Retry-After" in response.headers
            assert (await response.json())["error"]["code"] == "engine_rejected"
        engine.runner.gate.set()
        assert (await first).status == 200


async def test_the_stream_is_of_server_sent_events_that_end_with_done() -> None:
    async with fake_engine() as engine:
        body = {"model": "fake", "prompt": "x", "n": 2, "max_tokens": 3, "stream": True}
        async with aiohttp.ClientSession() as http, http.post(engine.url + "/v1/completions", json=body) as response:
            assert response.headers["Content-Type"].startswith("text/event-stream")
            events = (await response.read()).split(b"\n\n")
        assert events[-2:] == [b"data: [DONE]", b""]
        chunks = [json.loads(each.removeprefix(b"data: ")) for each in events[:-2]]
        assert len({chunk["id"] for chunk in chunks}) == 1
        for index in (0, 1):
            own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
            assert "".join(choice["text"] for choice in own) == "w100 w101 w102"
            assert [choice["finish_reason"] for choice in own][-1] == "length"


async def test_an_engine_behind_an_endpoint_passes_tools_on_and_its_calls_back() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    tools: Any = [{"type": "function", "function": {"name": "weather"}}]
    asked: Any = {"model": "gpt35", "messages": HELLO, "tools": tools}
    async with stand_in(respond=lambda _: Answer("let me", calls=[call])) as stand:
        engine = await start_openai(configuration(stand, chat=True), with_core=False)
        try:
            async with client_of(engine.url) as client:
                answer = await client.chat.completions.create(**asked)
                assert stand.seen[0]["tools"] == tools
                choice = answer.choices[0]
                assert (choice.message.content, choice.finish_reason) == ("let me", "tool_calls")
                assert [made.model_dump() for made in choice.message.tool_calls or ()] == [call]
                again = [*HELLO, choice.message, {"role": "tool", "tool_call_id": "c1", "content": "12 °C"}]
                chunks = [c async for c in await client.chat.completions.create(**{**asked, "messages": again}, stream=True)]
                assert stand.seen[1]["messages"][-2]["tool_calls"] == [call]
                assert "".join(c.choices[0].delta.content or "" for c in chunks) == "let me"
                assert chunks[-1].choices[0].finish_reason == "tool_calls"
        finally:
            await engine.close()
