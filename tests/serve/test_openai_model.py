"""The official client against a core with the real SmolLM2 on the CPU: its chat template, probabilities, stop strings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from parrot.configuration import ConfigurationError
from parrot.engine.config import BuiltinEngineConfig, parse_engine_config
from parrot.engine.launch import start_builtin
from parrot.model_files import resolve_model
from parrot.tokenizer import load_tokenizer
from tests.serve.http_support import cluster, eventually

openai = pytest.importorskip("openai", reason="the package openai is not installed")
pytest.importorskip("torch", reason="torch is not installed")
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
try:
    resolve_model(MODEL)
except ConfigurationError as error:
    pytest.skip(f"the model is not here: {error}", allow_module_level=True)

SYSTEM = {"role": "system", "content": "Answer in one short sentence."}
USER = {"role": "user", "content": "What is the capital of France?"}
MORE = {"role": "user", "content": "And of Spain?"}
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": 12}
KEY = "a-secret-of-more-than-twenty-characters"


class Told:
    """What the one run of all requests gave; a model on a CPU is not started for each test."""

    first: Any
    second: Any
    streamed: list[Any]
    alone: Any
    completed: Any
    by_ids: Any
    stopped: Any
    choices: Any
    sampled: Any
    sessions: int


async def _run(told: Told) -> None:
    config = parse_engine_config(
        {
            "model": MODEL,
            "host": "127.0.0.1",
            "port": 0,
            "tokens_capacity": 4096,
            "instance": {"device": "cpu", "dtype": "float32", "num_kv_cache_blocks": 4096, "num_threads": 1},
        },
        "test",
    )
    assert isinstance(config, BuiltinEngineConfig)
    async with cluster(load_tokenizer) as c:
        from msgspec.structs import replace

        from parrot.engine.config import ServeCoreAddress

        address = ServeCoreAddress("127.0.0.1", int(c.client.url.rpartition(":")[2]))
        engine = await start_builtin(replace(config, serve_core=address))
        try:
            await eventually(lambda: c.server.core.engines, 60.0)
            async with openai.AsyncOpenAI(base_url=f"{c.client.url}/v1", api_key=KEY, max_retries=0) as client:
                await _talk(client, told)
            await eventually(lambda: c.server.core.counts()["sessions"] == 0)
            told.sessions = c.server.core.counts()["sessions"]
        finally:
            await engine.close()


async def _talk(client: Any, told: Told) -> None:
    chat = client.chat.completions.create
    told.first = await chat(**GREEDY, messages=[SYSTEM, USER], logprobs=True, top_logprobs=3)
    answer = {"role": "assistant", "content": told.first.choices[0].message.content}
    told.second = await chat(**GREEDY, messages=[SYSTEM, USER, answer, MORE])
    told.streamed = [chunk async for chunk in await chat(**GREEDY, messages=[SYSTEM, USER], stream=True, logprobs=True)]
    stranger = client.with_options(api_key="none")
    told.alone = await stranger.chat.completions.create(**GREEDY, messages=[SYSTEM, USER, answer, MORE])
    tokenizer = load_tokenizer(MODEL)
    text = tokenizer.apply_chat_template([SYSTEM, USER])
    told.completed = await client.completions.create(**GREEDY, prompt=text)
    told.by_ids = await client.completions.create(**GREEDY, prompt=tokenizer.encode(text), logprobs=2)
    word = told.completed.choices[0].text.split()[2]
    told.stopped = await chat(**GREEDY, messages=[SYSTEM, USER], stop=["no such word", f" {word}"])
    drawn = {**GREEDY, "temperature": 1.0, "seed": 7}
    told.choices = await chat(**drawn, messages=[SYSTEM, USER], n=2)
    told.sampled = await chat(**drawn, messages=[SYSTEM, USER])


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        found = Told()
        asyncio.run(_run(found))
        yield found


def said(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_the_second_turn_finds_the_first_in_memory(told: Told) -> None:
    cached = told.second.usage.prompt_tokens_details.cached_tokens
    assert told.first.usage.prompt_tokens_details.cached_tokens == 0
    # The whole first prompt; and the answer, if the ids that the model chose are those of its text.
    assert cached >= told.first.usage.prompt_tokens
    assert cached < told.second.usage.prompt_tokens


def test_what_is_shared_changes_no_text(told: Told) -> None:
    assert said(told.second) == said(told.alone)
    shared_with_strangers = len(load_tokenizer(MODEL).encode(f"<|im_start|>system\n{SYSTEM['content']}"))
    assert told.alone.usage.prompt_tokens_details.cached_tokens == shared_with_strangers


def test_a_streamed_answer_and_a_completion_of_the_rendered_text_say_the_same(told: Told) -> None:
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in told.streamed)
    assert said(told.first) == streamed == told.completed.choices[0].text == told.by_ids.choices[0].text
    assert told.first.usage.prompt_tokens == told.completed.usage.prompt_tokens == told.by_ids.usage.prompt_tokens
    assert told.sessions == 0


def test_probabilities_are_told_of_each_token_in_order(told: Told) -> None:
    found = told.first.choices[0].logprobs.content
    assert "".join(each.token for each in found).startswith(said(told.first))
    assert len(found) == told.first.usage.completion_tokens
    for each in found:  # greedy: the chosen one is the most probable
        assert each.top_logprobs[0].token == each.token
        assert each.top_logprobs[0].logprob == each.logprob <= 0
        assert [top.logprob for top in each.top_logprobs] == sorted((top.logprob for top in each.top_logprobs), reverse=True)
    older = told.by_ids.choices[0].logprobs
    assert older.tokens == [each.token for each in found]
    assert older.token_logprobs == pytest.approx([each.logprob for each in found], abs=1e-3)
    streamed = [
        each for chunk in told.streamed for each in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [each.token for each in streamed] == [each.token for each in found]


def test_a_stop_string_ends_an_answer_before_it(told: Told) -> None:
    assert said(told.first).startswith(said(told.stopped))
    assert len(said(told.stopped).split()) == 2
    assert told.stopped.choices[0].finish_reason == "stop"
    assert told.first.choices[0].finish_reason in ("stop", "length")


def test_a_seed_says_again_what_it_said_and_choices_differ(told: Told) -> None:
    assert said(told.sampled) == said(told.choices)
    assert told.choices.choices[0].message.content != told.choices.choices[1].message.content
