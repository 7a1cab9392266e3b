"""The official client against a core with an emulated engine: sync, async, streaming; what a growing conversation shares."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from parrot.engine.config import EmulatedEngineConfig, ServeCoreAddress, load_engine_config
from parrot.engine.launch import start_emulated
from parrot.tokenizer import load_tokenizer
from tests.serve.http_support import Cluster, cluster, eventually

openai = pytest.importorskip("openai", reason="the package openai is not installed")

ZERO = Path(__file__).parents[2] / "sample_configs" / "engine" / "emulated-zero.json"
KEY = "a-secret-of-more-than-twenty-characters"
SYSTEM = {"role": "system", "content": "Answer each question in one short sentence and never in two."}
USER = {"role": "user", "content": "What is the capital of France?"}


@asynccontextmanager
async def emulated(**config: Any) -> AsyncIterator[Cluster]:
    """A core with one emulated engine, which takes no time."""
    async with cluster(load_tokenizer, **config) as c:
        file = load_engine_config(ZERO, {"host": "127.0.0.1", "port": 0})
        assert isinstance(file, EmulatedEngineConfig)
        address = ServeCoreAddress("127.0.0.1", int(c.client.url.rpartition(":")[2]))
        engine = await start_emulated(msgspec.structs.replace(file, serve_core=address))
        try:
            await eventually(lambda: c.server.core.engines)
            yield c
        finally:
            await engine.close()


def sync_client(c: Cluster, **options: Any) -> Any:
    return openai.OpenAI(base_url=f"{c.client.url}/v1", api_key=KEY, max_retries=0, **options)


def async_client(c: Cluster, **options: Any) -> Any:
    return openai.AsyncOpenAI(base_url=f"{c.client.url}/v1", **{"api_key": KEY, "max_retries": 0, "timeout": 60.0, **options})


async def test_the_sync_client_chats_completes_and_lists_models() -> None:
    async with emulated() as c:

        def talk() -> tuple[Any, ...]:
            with sync_client(c) as client:
                chat = client.chat.completions.create(model="zero", messages=[SYSTEM, USER], max_tokens=5)
                text = client.completions.create(model="zero", prompt="one two", max_tokens=3)
                streamed = list(client.chat.completions.create(model="zero", messages=[USER], max_tokens=5, stream=True))
                return chat, text, streamed, client.models.list(), client.models.retrieve("zero")

        chat, text, streamed, models, model = await asyncio.to_thread(talk)
        assert len(chat.choices[0].message.content.split()) == 5
        assert (chat.choices[0].finish_reason, chat.usage.completion_tokens) == ("length", 5)
        assert (len(text.choices[0].text.split()), text.usage.prompt_tokens) == (3, 2)
        said = "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
        assert len(said.split()) == 5
        assert streamed[-1].choices[0].finish_reason == "length"
        assert [each.id for each in models] == ["zero"] == [model.id]
        assert c.server.core.counts()["sessions"] == 0


async def test_the_async_client_streams_choices_and_usage() -> None:
    async with emulated() as c, async_client(c) as client:
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model="zero", messages=[USER], n=3, max_completion_tokens=4, stream=True, stream_options={"include_usage": True}
            )
        ]
        texts = ["", "", ""]
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert [len(text.split()) for text in texts] == [4, 4, 4]
        assert len(set(texts)) == 3
        assert (chunks[-1].usage.completion_tokens, chunks[-1].usage.prompt_tokens) == (12, 8)


async def test_a_raw_answer_of_the_client_goes_back_as_a_message() -> None:
    async with emulated() as c, async_client(c) as client:
        first = await client.chat.completions.create(model="zero", messages=[USER], max_tokens=3)
        messages = [USER, first.choices[0].message, USER]
        second = await client.chat.completions.create(model="zero", messages=messages, max_tokens=3)
        assert second.usage.prompt_tokens == 8 + 3 + 8


async def test_the_second_turn_of_a_conversation_finds_the_first_in_memory() -> None:
    async with emulated() as c, async_client(c) as client:

        async def turn(messages: list[Any]) -> Any:
            return await client.chat.completions.create(model="zero", messages=messages, max_tokens=6)

        first = await turn([SYSTEM, USER])
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        answer = {"role": "assistant", "content": first.choices[0].message.content}
        second = await turn([SYSTEM, USER, answer, {"role": "user", "content": "And of Spain?"}])
        # All of the first prompt and the answer (its ids are the text's own), but for its last token, which nothing followed.
        assert second.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens + 5
        other = await turn([SYSTEM, {"role": "user", "content": "Something else?"}])
        assert other.usage.prompt_tokens_details.cached_tokens == len(f"system: {SYSTEM['content']}".split())


async def test_without_an_identity_nothing_but_the_system_message_is_found_again() -> None:
    async with emulated() as c, async_client(c, api_key="none") as client:
        cached = []
        for _ in range(2):
            answer = await client.chat.completions.create(model="zero", messages=[SYSTEM, USER], max_tokens=3)
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        assert cached == [0, len(f"system: {SYSTEM['content']}".split())]
        named = client.with_options(default_headers={"X-Parrot-Tenant": "me"})
        for _ in range(2):
            answer = await named.chat.completions.create(model="zero", messages=[SYSTEM, USER], max_tokens=3)
        assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1  # one is computed to go on
        shy = {"parrot": {"cache_prefix": False}}
        for _ in range(2):
            asked = [{"role": "system", "content": "Mine alone."}, USER]
            answer = await client.chat.completions.create(model="zero", messages=asked, max_tokens=3, extra_body=shy)
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_stop_strings_end_an_output_before_them() -> None:
    async with emulated() as c, async_client(c) as client:
        asked = {"model": "zero", "messages": [USER], "max_tokens": 8, "seed": 1}
        words = (await client.chat.completions.create(**asked)).choices[0].message.content.split()
        answer = await client.chat.completions.create(**asked, stop=["no such word", f" {words[5]}", f" {words[3]} "])
        assert answer.choices[0].message.content.split() == words[:3]
        assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", 3)
        streamed = [chunk async for chunk in await client.chat.completions.create(**asked, stop=words[0], stream=True)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == ""
        assert streamed[-1].choices[0].finish_reason == "stop"


async def test_the_extension_goes_in_the_extra_body_and_its_answer_comes_back() -> None:
    async with emulated() as c, async_client(c) as client:
        session = await c.client.session()
        own = {"session": session["session_id"], "session_auth": session["session_auth"]}
        asked = {"model": "zero", "messages": [USER], "max_tokens": 4}
        first = await client.chat.completions.create(**asked, extra_body={"parrot": {**own, "output": "answer"}})
        var_id = first.parrot["outputs"][0]["var_id"]
        asked["messages"] = [{"role": "user", "content": "Say again: {{answer}}"}]
        inputs = {"answer": var_id}
        second = await client.chat.completions.create(**asked, extra_body={"parrot": {**own, "inputs": inputs}})
        assert second.usage.prompt_tokens == len(["user:", "Say", "again:", "assistant:"]) + 4


async def test_the_clients_errors_are_its_own_kinds() -> None:
    async with emulated() as c, async_client(c) as client:
        asked = {"model": "zero", "messages": [USER]}
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.chat.completions.create(model="other", messages=[USER])
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**asked, stop=list("abcde"))
        assert (caught.value.param, caught.value.code) == ("stop", "array_above_max_length")
        for fields, param in (({"logprobs": True}, "logprobs"), ({"tools": TOOLS}, "tools")):
            with pytest.raises(openai.BadRequestError, match=param):
                await client.chat.completions.create(**asked, **fields)
        picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]
        with pytest.raises(openai.BadRequestError, match="text"):
            await client.chat.completions.create(model="zero", messages=[{"role": "user", "content": picture}])
        assert c.server.core.counts()["sessions"] == 0


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


async def test_a_load_generators_request_gets_just_as_many_tokens_as_it_asks_for() -> None:
    async with emulated() as c, async_client(c) as client:
        extra = {"ignore_eos": True, "min_tokens": 7}
        stream = await client.chat.completions.create(
            model="zero",
            messages=[USER],
            max_completion_tokens=7,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=extra,
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[-1].usage.completion_tokens == 7


async def test_many_streams_at_once_all_come_to_their_end() -> None:
    async with emulated() as c, async_client(c) as client:

        async def one(number: int) -> int:
            messages = [{"role": "user", "content": f"question {number}"}]
            stream = await client.chat.completions.create(model="zero", messages=messages, max_tokens=20, stream=True)
            return len("".join([chunk.choices[0].delta.content or "" async for chunk in stream]).split())

        assert await asyncio.gather(*map(one, range(64))) == [20] * 64
        assert c.server.core.counts()["sessions"] == 0
