"""OpenAI's routes before engines that are remote endpoints themselves: messages, tools, formats, probabilities go through."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from parrot.engine.config import ServeCoreAddress
from parrot.engine.launch import start_openai
from parrot.tokenizer import load_tokenizer
from tests.engine.openai.stand_in import TEXT, Answer, StandIn, stand_in
from tests.engine.openai.test_engine import configuration
from tests.serve.http_support import Cluster, cluster, eventually
from tests.serve.test_openai_routes import ask, events, post, said

pytest.importorskip("openai", reason="the package openai is not installed")

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}


@asynccontextmanager
async def remote(stand: StandIn, **keys: Any) -> AsyncIterator[Cluster]:
    async with cluster(load_tokenizer) as c:
        address = ServeCoreAddress("127.0.0.1", int(c.client.url.rpartition(":")[2]))
        config = configuration(stand, **{"chat": True, **keys})
        engine = await start_openai(msgspec.structs.replace(config, serve_core=address))
        try:
            await eventually(lambda: c.server.core.engines)
            yield c
        finally:
            await engine.close()


def chat(**fields: Any) -> dict[str, Any]:
    return ask(**{"model": "gpt35", **fields})


async def test_messages_reach_the_endpoint_as_the_client_sent_them() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"role": "user", "content": "are you there?"},
        {"role": "assistant", "content": "yes", "tool_calls": [CALL]},
        {"role": "tool", "content": "12 °C", "tool_call_id": "c1"},
        {"role": "user", "content": "so?", "name": "ann"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]},
    ]
    async with stand_in() as stand, remote(stand) as c:
        status, answer = await post(c, chat(messages=messages))
        assert (status, answer["choices"][0]["message"]["content"]) == (200, TEXT)
        assert stand.seen[0]["messages"] == [*messages[:-1], {"role": "user", "content": "and now?"}]


async def test_a_variable_is_a_part_of_its_message() -> None:
    async with stand_in() as stand, remote(stand) as c:
        session = await c.client.session()
        own = {"session": session["session_id"], "session_auth": session["session_auth"]}
        _, first = await post(c, chat(parrot={**own, "output": "story"}))
        inputs = {"story": first["parrot"]["outputs"][0]["var_id"]}
        messages = [{"role": "system", "content": "of {{story}}:"}, {"role": "user", "content": "{{story}}. Sum up {{story}}!"}]
        await post(c, chat(messages=messages, parrot={**own, "inputs": inputs}))
        assert stand.seen[1]["messages"] == [
            {"role": "system", "content": f"of {TEXT}:"},
            {"role": "user", "content": f"{TEXT}. Sum up {TEXT}!"},
        ]


async def test_tools_go_to_the_endpoint_and_its_calls_come_back() -> None:
    async with stand_in(respond=lambda _: Answer("let me", calls=[CALL])) as stand, remote(stand) as c:
        fields: dict[str, Any] = {"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": False}
        fields["response_format"] = {"type": "json_object"}
        status, answer = await post(c, chat(**fields))
        assert status == 200
        assert {name: stand.seen[0][name] for name in fields} == fields
        choice = answer["choices"][0]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "let me")
        assert choice["message"]["tool_calls"] == [CALL]
        chunks = await events(c, chat(tools=[TOOL]))
        assert said(chunks) == "let me"
        [delta] = [d for chunk in chunks[:-1] for ch in chunk["choices"] for d in ch["delta"].get("tool_calls", [])]
        assert delta == {**CALL, "index": 0}
        assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("is_chat", [True, False])
async def test_log_probabilities_of_the_endpoint_come_through(is_chat: bool) -> None:
    async with stand_in(respond=lambda _: Answer("a b", logprobs=True)) as stand, remote(stand, chat=is_chat) as c:
        if is_chat:
            _, answer = await post(c, chat(logprobs=True, top_logprobs=1))
            found = answer["choices"][0]["logprobs"]["content"]
            assert [(each["token"], each["logprob"], each["top_logprobs"][0]["token"]) for each in found] == [
                ("a", -0.5, "a"),
                (" b", -0.5, " b"),
            ]
            assert (stand.seen[0]["logprobs"], stand.seen[0]["top_logprobs"]) == (True, 1)
        else:
            _, answer = await post(c, {"model": "gpt35", "prompt": "x", "logprobs": 1}, "/v1/completions")
            found = answer["choices"][0]["logprobs"]
            assert (found["tokens"], found["token_logprobs"], found["text_offset"]) == (["a", " b"], [-0.5, -0.5], [0, 1])
            assert found["top_logprobs"] == [{"a": -0.5}, {" b": -0.5}]


async def test_an_endpoint_that_tells_no_probabilities_is_no_answer_to_who_asks_for_them() -> None:
    async with stand_in() as stand, remote(stand) as c:
        status, answer = await post(c, chat(logprobs=True))
        assert (status, answer["error"]["code"]) == (502, "remote_refused")


async def test_several_stop_strings_and_the_reason_of_the_end_go_through() -> None:
    async with stand_in(respond=lambda _: Answer(reason="length")) as stand, remote(stand) as c:
        _, answer = await post(c, chat(stop=["x", "y"]))
        assert stand.seen[0]["stop"] == ["x", "y"]
        assert answer["choices"][0]["finish_reason"] == "length"


async def test_a_chat_before_an_endpoint_that_completes_texts_needs_the_models_template() -> None:
    async with stand_in() as stand, remote(stand, chat=False) as c:
        status, answer = await post(c, chat())
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")
        assert "chat template" in answer["error"]["message"]
        for fields in ({"tools": [TOOL]}, {"response_format": {"type": "json_object"}}):
            status, answer = await post(c, chat(**fields))
            assert (status, answer["error"]["code"]) == (400, "bad_sampling")
        assert not stand.seen


async def test_token_ids_are_no_prompt_for_an_engine_that_takes_text() -> None:
    async with stand_in() as stand, remote(stand) as c:
        status, answer = await post(c, {"model": "gpt35", "prompt": [1, 2]}, "/v1/completions")
        assert (status, answer["error"]["param"]) == (400, "prompt")


async def test_what_a_filter_cuts_says_so() -> None:
    gate = asyncio.Event()
    gate.set()
    async with stand_in(respond=lambda _: Answer(reason="content_filter", gate=gate)) as stand, remote(stand) as c:
        _, answer = await post(c, chat())
        assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == (TEXT, "content_filter")


async def test_a_prompt_that_the_filter_refuses_is_refused() -> None:
    refused = Answer(status=400, code="content_filter", message="no such prompts")
    async with stand_in(respond=lambda _: refused) as stand, remote(stand) as c:
        status, answer = await post(c, chat())
        assert (status, answer["error"]["code"]) == (400, "content_filter")
