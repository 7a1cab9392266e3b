"""An engine behind a remote endpoint, against a stand-in for Azure OpenAI: what is sent, what comes back, what goes wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from parrot.configuration import ConfigurationError
from parrot.engine.config import OpenAIEngineConfig, OpenAIInstance, load_engine_config, parse_engine_config
from parrot.engine.http_server import main
from parrot.engine.launch import start_openai
from parrot.engine.openai import pace
from parrot.engine.openai.requests import sampling_of
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import (
    AbortRequest,
    Failed,
    FillSpec,
    Finished,
    GenerateSpec,
    Rejected,
    Started,
    TaskId,
    TaskRequest,
    Tokens,
)
from tests.engine.fakes import Engine, last, streamed
from tests.engine.openai.stand_in import KEY, TEXT, VERSION, Answer, StandIn, stand_in


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "FIRST_PAUSE_S", 0.01)


def configuration(server: StandIn, *, azure: bool = True, chat: bool = False, **keys: Any) -> OpenAIEngineConfig:
    instance: dict[str, Any] = {"api_key": KEY, "api_endpoint": "chat" if chat else "completion"}
    if azure:
        instance |= {"is_azure": True, "azure_api_version": VERSION, "azure_endpoint": server.url}
    else:
        instance |= {"base_url": f"{server.url}/v1"}
    instance |= keys.pop("instance", {})
    file = {"model": "gpt35", "host": "127.0.0.1", "port": 0, "engine_type": "openai", "instance": instance, **keys}
    config = parse_engine_config(file, "remote.json")
    assert isinstance(config, OpenAIEngineConfig)
    return config


@asynccontextmanager
async def remote(server: StandIn, **keys: Any) -> AsyncIterator[Engine]:
    running = await start_openai(configuration(server, **keys), with_core=False)
    async with aiohttp.ClientSession() as client:
        try:
            yield Engine(running, None, client)  # type: ignore[arg-type]
        finally:
            await running.close()


def task(*turns: str | FillSpec, number: int = 0, shown: str = "", max_gen_length: int = 16, **sampling: Any) -> TaskRequest:
    chain = tuple(
        turn if isinstance(turn, FillSpec) else FillSpec(n + 1, text=turn) for n, turn in enumerate(turns or ("Say it.",))
    )
    generate = GenerateSpec(99, SamplingConfig(max_gen_length=max_gen_length, **sampling), (), shown)
    return TaskRequest(0, 0, TaskId(7, number, 0), 1, chain, generate)


@pytest.mark.parametrize("azure", [True, False])
@pytest.mark.parametrize("chat", [True, False])
async def test_text_goes_out_whole_and_comes_back_as_it_is_generated(azure: bool, chat: bool) -> None:
    async with stand_in(answers=[Answer(usage=(11, 3, 4))]) as server, remote(server, azure=azure, chat=chat) as engine:
        chain = (FillSpec(1, text="Be short. "), FillSpec(2, text="Hello?"), FillSpec(3, text="Hi.", output=True), " More?")
        events = await engine.run(task(*chain[:3], FillSpec(4, text=" More?"), temperature=0.0, seed=5, stop_str="END"))
        finished = last(events, Finished)
        assert isinstance(events[0], Started)
        assert next(e.text for e in events if isinstance(e, Tokens)) == "one"
        assert streamed(events)[1] == finished.text == TEXT
        assert (finished.reason, finished.prompt_tokens, finished.cached_tokens) == ("stop_str", 11, 3)
        assert finished.output_tokens == 4
        (body,) = server.seen
        if chat:
            assert body["messages"] == [
                {"role": "user", "content": "Be short. Hello?"},
                {"role": "assistant", "content": "Hi."},
                {"role": "user", "content": " More?"},
            ]
        else:
            assert body["prompt"] == "Be short. Hello?Hi. More?"
        assert (body["temperature"], body["stop"], body["max_tokens"]) == (0.0, "END", 16)
        assert body.get("seed") == (None if azure else 5)
        assert ("stream_options" in body) is not azure


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({"azure_api_version": "2023-07-01-preview"}, False),
        ({"azure_api_version": "2023-12-01-preview"}, True),
        ({"azure_api_version": "2024-10-21"}, True),
        ({"azure_api_version": "2024-10-21", "send_seed": False}, False),
        ({"azure_api_version": "2023-09-01-preview", "send_seed": True}, True),
    ],
)
def test_a_seed_is_kept_from_versions_of_azure_that_refuse_it(keys: dict[str, Any], sent: bool) -> None:
    instance = OpenAIInstance(is_azure=True, **keys)
    assert ("seed" in sampling_of(SamplingConfig(seed=5), instance, 16)) is sent


async def test_a_system_message_stays_one() -> None:
    async with stand_in() as server, remote(server, chat=True) as engine:
        last(await engine.run(task(FillSpec(1, text="Rules.", role="system"), FillSpec(2, text="Go."))), Finished)
        assert [m["role"] for m in server.seen[0]["messages"]] == ["system", "user"]


async def test_tokens_are_estimated_where_nobody_counts_them() -> None:
    async with stand_in() as server, remote(server) as engine:
        assert engine.running.description.tokenizer == "estimated"
        finished = last(await engine.run(task("12345678", "1")), Finished)
        assert (finished.prompt_tokens, finished.output_tokens) == (3, -(-len(TEXT) // 4))


async def test_ids_go_to_an_endpoint_that_takes_them() -> None:
    keys = {"azure": False, "tokenizer": "synthetic", "instance": {"send_token_ids": True}}
    async with stand_in() as server, remote(server, **keys) as engine:
        last(await engine.run(task("w5 w6", "w7")), Finished)
        assert server.seen[0]["prompt"] == [5, 6, 7]


@pytest.mark.parametrize(("ids", "kept"), [((5, 6, 7), (5, 6, 7)), ((5, 6, 8), ()), ((), ())])
async def test_the_ids_of_an_output_are_kept_where_they_are_those_of_its_text(
    ids: tuple[int, ...], kept: tuple[int, ...]
) -> None:
    instance = {"send_token_ids": True, "return_token_ids": True}
    keys: dict[str, Any] = {"azure": False, "tokenizer": "synthetic", "instance": instance}
    async with stand_in(answers=[Answer("w5 w6 w7", ids=ids)]) as server, remote(server, **keys) as engine:
        ended = last(await engine.run(task("w1")), Finished)
        assert (ended.text, ended.ids) == ("w5 w6 w7", kept)
        assert server.seen[0]["return_token_ids"] is True


async def test_an_output_that_goes_on_behind_what_was_shown_has_the_ids_of_both() -> None:
    instance = {"send_token_ids": True, "return_token_ids": True}
    keys: dict[str, Any] = {"azure": False, "tokenizer": "synthetic", "instance": instance}
    async with stand_in(answers=[Answer("w6 w7", ids=(6, 7))]) as server, remote(server, **keys) as engine:
        request = task("w1")
        generate = msgspec.structs.replace(request.generate, forced_text="w5 ")
        ended = last(await engine.run(msgspec.structs.replace(request, generate=generate)), Finished)
        assert (ended.text, ended.ids) == ("w5 w6 w7", (5, 6, 7))


async def test_price_and_usage_make_the_cost() -> None:
    prices = {"prompt_price": 2.0, "output_price": 10.0}
    async with stand_in(answers=[Answer(usage=(1000, 0, 100))]) as server, remote(server, instance=prices) as engine:
        assert last(await engine.run(task()), Finished).cost == pytest.approx(0.003)


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_what_may_pass_is_sent_again(status: int) -> None:
    answers = [Answer(status=status, message="busy"), Answer(status=status), Answer()]
    async with stand_in(answers=answers) as server, remote(server) as engine:
        events = await engine.run(task())
        assert last(events, Finished).text == TEXT
        assert len([e for e in events if isinstance(e, Started)]) == 1
        assert len(server.seen) == 3


async def test_retry_after_holds_every_request_of_the_engine() -> None:
    answers = [Answer(status=429, headers={"retry-after-ms": "300"}), Answer(), Answer()]
    async with stand_in(answers=answers) as server, remote(server) as engine:
        first = asyncio.create_task(engine.run(task()))
        while not server.seen:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        await engine.run(task(number=1))
        await first
        assert server.times[1] - server.times[0] >= 0.29
        assert server.times[2] - server.times[0] >= 0.29


async def test_what_stays_busy_is_a_rejection_and_what_stays_broken_a_failure_that_may_pass() -> None:
    async with stand_in(respond=lambda _: Answer(status=429)) as server, remote(server, instance={"max_retries": 1}) as engine:
        assert "sent 2 times" in last(await engine.run(task()), Rejected).message
        server.respond = lambda _: Answer(status=502, message="bad gateway")
        failed = last(await engine.run(task(number=1)), Failed)
        assert (failed.code, failed.retryable) == ("engine_failed", True)
        assert "502: bad gateway" in failed.message
        assert len(server.seen) == 4


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"instance": {"api_key": "wrong"}}, "401"),
        ({"model": "gpt9"}, "deployment"),
        ({"instance": {"azure_api_version": "1999"}}, "404"),
    ],
)
async def test_what_the_configuration_has_wrong_fails_with_the_endpoint_s_words(keys: dict[str, Any], says: str) -> None:
    async with stand_in() as server, remote(server, **keys) as engine:
        failed = last(await engine.run(task()), Failed)
        assert (failed.code, failed.retryable) == ("remote_refused", False)
        assert says in failed.message
        assert KEY not in failed.message


@pytest.mark.parametrize(
    "answer",
    [
        Answer(status=400, code="content_filter", message="The response was filtered"),
        Answer(reason="content_filter"),
        Answer(error_after=2, code="content_filter"),
    ],
)
async def test_a_content_filter_is_a_failure_with_its_reason_never_a_text(answer: Answer) -> None:
    async with stand_in(answers=[answer]) as server, remote(server) as engine:
        failed = last(await engine.run(task()), Failed)
        assert (failed.code, failed.retryable) == ("content_filtered", False)
        assert "filter" in failed.message
        assert len(server.seen) == 1


async def test_a_prompt_that_is_too_long_for_the_model_says_so() -> None:
    answer = Answer(status=400, code="context_length_exceeded", message="maximum context length is 4096 tokens")
    async with stand_in(answers=[answer]) as server, remote(server) as engine:
        failed = last(await engine.run(task()), Failed)
        assert (failed.code, failed.retryable) == ("task_too_large", False)
        assert "4096" in failed.message


@pytest.mark.parametrize("how", [{"cut": 2}, {"error_after": 2, "code": "server_error"}])
async def test_a_stream_that_breaks_after_text_came_fails_the_attempt_and_repeats_nothing(how: dict[str, Any]) -> None:
    async with stand_in(answers=[Answer(**how)]) as server, remote(server) as engine:
        events = await engine.run(task())
        failed = last(events, Failed)
        assert (failed.code, failed.retryable) == ("engine_failed", True)
        assert streamed(events)[1] == "one two"
        assert len(server.seen) == 1


async def test_a_stream_that_breaks_before_any_text_is_asked_again() -> None:
    async with stand_in(answers=[Answer(cut=0), Answer()]) as server, remote(server) as engine:
        assert last(await engine.run(task()), Finished).text == TEXT


async def test_a_completion_goes_on_behind_what_was_shown() -> None:
    async with stand_in(answers=[Answer(" three four")]) as server, remote(server) as engine:
        events = await engine.run(task("Count: ", shown="one two"))
        assert server.seen[0]["prompt"] == "Count: one two"
        assert server.seen[0]["max_tokens"] == 16 - 2
        assert streamed(events)[1] == " three four"
        assert last(events, Finished).text == TEXT


async def test_a_chat_is_asked_anew_and_may_not_contradict_what_was_shown() -> None:
    answers = [Answer(), Answer("one to three"), Answer("one")]
    async with stand_in(answers=answers) as server, remote(server, chat=True) as engine:
        events = await engine.run(task(shown="one two t"))
        assert streamed(events)[1] == "hree four"
        assert last(events, Finished).text == TEXT
        for number in (1, 2):
            failed = last(await engine.run(task(number=number, shown="one two t")), Failed)
            assert (failed.code, failed.retryable) == ("generation_failed", False)
            assert "temperature 0" in failed.message


async def test_an_abort_closes_the_stream_and_the_log_has_its_line(tmp_path: Path) -> None:
    gate, path = asyncio.Event(), tmp_path / "requests.jsonl"
    async with stand_in(answers=[Answer(gate=gate)]) as server, remote(server, iteration_log=str(path)) as engine:
        running = asyncio.create_task(engine.run(task()))
        while not server.open:
            await asyncio.sleep(0.005)
        status, _ = await engine.post("/abort", AbortRequest(0, TaskId(7, 0, 0), 1))
        assert status == 200
        assert last(await running, Failed).code == "cancelled"
        async with asyncio.timeout(5):
            while server.open:
                await asyncio.sleep(0.005)
        assert (await engine.info())["num_total_jobs"] == 0
    line = json.loads(path.read_text().splitlines()[-1])
    assert (line["kind"], line["reason"]) == ("request", "cancelled")
    assert line["total_s"] >= (line["ttft_s"] or 0.0)


async def test_no_more_than_the_capacity_are_in_flight() -> None:
    async with stand_in(respond=lambda _: Answer(delay_s=0.05)) as server, remote(server, tasks_capacity=3) as engine:
        results = await asyncio.gather(*(engine.run(task(number=n)) for n in range(5)))
        ends = [type(events[-1]) for events in results]
        assert ends.count(Finished) == 3
        assert ends.count(Rejected) == 2
        assert len(server.seen) == 3


async def test_requests_a_minute_are_kept_to() -> None:
    # Six a second: a window's worth at once, then one each sixth of a second.
    async with stand_in() as server, remote(server, instance={"requests_per_minute": 360}) as engine:
        begun = asyncio.get_running_loop().time()
        await asyncio.gather(*(engine.run(task(number=n)) for n in range(62)))
        assert len(server.times) == 62
        assert server.times[60] - begun > 1 / 6 - 0.01
        assert server.times[61] - begun > 2 / 6 - 0.01


async def test_values_that_the_endpoint_does_not_know_are_refused_unless_it_is_said_to_know_them() -> None:
    async with stand_in() as server, remote(server) as engine:
        failed = last(await engine.run(task(top_k=5)), Failed)
        assert failed.code == "bad_sampling"
        assert "extended_sampling" in failed.message
        assert last(await engine.run(task(number=1, output_length=5)), Failed).code == "bad_sampling"
        assert server.seen == []
    async with stand_in() as server, remote(server, azure=False, instance={"extended_sampling": True}) as engine:
        last(await engine.run(task(top_k=5, ignore_tokenizer_eos=True)), Finished)
        assert (server.seen[0]["top_k"], server.seen[0]["ignore_eos"]) == (5, True)


async def test_an_endpoint_that_is_not_there_is_a_failure_that_may_pass() -> None:
    async with stand_in() as server:
        config = configuration(server, instance={"max_retries": 1})
    running = await start_openai(config, with_core=False)
    async with aiohttp.ClientSession() as client:
        failed = last(await Engine(running, None, client).run(task()), Failed)  # type: ignore[arg-type]
    await running.close()
    assert (failed.code, failed.retryable) == ("engine_failed", True)
    assert "cannot be reached" in failed.message


async def test_the_primitives_keep_a_conversation() -> None:
    async with stand_in() as server, remote(server, chat=True) as engine:
        assert (await engine.post("/fill", {"context_id": 1, "text": "Hello there"}))[1] == {"filled_len": 3}
        status, answer = await engine.post("/generate", {"context_id": 1})
        assert (status, answer["generated_text"]) == (200, TEXT)
        await engine.post("/fill", {"context_id": 2, "parent_context_id": 1, "text": "Go on"})
        await engine.post("/generate", {"context_id": 2})
        assert [m["role"] for m in server.seen[1]["messages"]] == ["user", "assistant", "user"]
        status, code, message = await engine.error("/fill", {"context_id": 3, "token_ids": [1, 2]})
        assert (status, code) == (400, "bad_request")
        assert "text" in message


async def test_every_request_has_a_line_in_the_log(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    answers = [Answer(status=500), Answer(usage=(11, 3, 4))]
    async with stand_in(answers=answers) as server, remote(server, iteration_log=str(path)) as engine:
        await engine.run(task())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["header", "request", "request"]
    assert KEY not in path.read_text()
    failed, finished = lines[1:]
    assert (failed["reason"], failed["tries"], failed["ttft_s"]) == ("engine_failed", 1, None)
    assert (finished["reason"], finished["tries"], finished["output_tokens"], finished["counted"]) == ("eos", 2, 4, True)
    assert 0 <= finished["ttft_s"] <= finished["ttft_s"] + finished["decode_s"]
    assert finished["max_gap_s"] <= finished["decode_s"]
    assert finished["total_s"] == pytest.approx(finished["ttft_s"] + finished["decode_s"], abs=1e-5)
    assert finished["limit_tokens"] == 2 + 16  # the prompt as we count it, and max_gen_length


@pytest.mark.parametrize(
    ("instance", "says"),
    [
        ({"is_azure": True, "api_key": "k", "azure_api_version": "v"}, "azure_endpoint"),
        ({"is_azure": True, "api_key": "k", "azure_endpoint": "https://x"}, "azure_api_version"),
        ({"is_azure": True, "azure_endpoint": "https://x", "azure_api_version": "v"}, "api_key"),
        ({"api_key": "k", "azure_endpoint": "https://x"}, "is_azure is false"),
        ({}, "api_key"),
        ({"api_key": "env:NO_SUCH_KEY_HERE"}, "NO_SUCH_KEY_HERE"),
        ({"base_url": "localhost:8000"}, "http://"),
        ({"base_url": "http://x/v1", "api_endpoint": "chat", "send_token_ids": True}, "completion"),
        ({"base_url": "http://x/v1", "send_token_ids": True}, "tokenizer"),
        ({"base_url": "http://x/v1", "return_token_ids": True}, "send_token_ids is false"),
        ({"api_key": "k", "api_endpoint": "responses"}, "api_endpoint"),
    ],
)
def test_a_configuration_that_cannot_work_stops_the_start_with_one_line(
    instance: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "remote.json"
    file.write_text(json.dumps({"model": "m", "engine_type": "openai", "instance": instance, "port": 0}))
    assert main(["--config_path", str(file), "--without_core"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(file) in line
    assert says in line


def test_the_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from parrot.engine.openai.client import api_key_of

    monkeypatch.setenv("SOME_KEY", "abc")
    file = {"model": "m", "engine_type": "openai", "instance": {"api_key": "env:SOME_KEY"}}
    config = parse_engine_config(file, "x.json")
    assert isinstance(config, OpenAIEngineConfig)
    assert api_key_of(config) == "abc"
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigurationError, match="SOME_KEY"):
        api_key_of(config)


def test_msgspec_knows_the_new_fields() -> None:
    line = msgspec.json.encode(Finished((), "x", "eos", output_tokens=3, cost=0.5))
    assert msgspec.json.decode(line)["output_tokens"] == 3


async def test_the_launch_document_s_file_starts_as_it_stands(unused_tcp_port: int) -> None:
    file = Path(__file__).parent.parent / "seed" / "openai.json"
    config = load_engine_config(file, {"port": unused_tcp_port, "instance.max_retries": 0})
    assert isinstance(config, OpenAIEngineConfig)
    running = await start_openai(config, with_core=False)
    async with aiohttp.ClientSession() as client:
        engine = Engine(running, None, client)  # type: ignore[arg-type]
        failed = last(await engine.run(task()), Failed)  # its endpoint is a placeholder
    await running.close()
    assert running.description.model == "gpt35turobo4k"
    assert (failed.code, failed.retryable) == ("engine_failed", True)
