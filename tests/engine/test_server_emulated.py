"""Emulated engines in real time behind the engine's HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from parrot.configuration import ConfigurationError
from parrot.engine.config import EmulatedEngineConfig, parse_engine_config
from parrot.engine.launch import start_emulated
from parrot.latency import FixedCost, LatencyProfile
from parrot.protocol.engine import Failed, Finished, Rejected, Started, TaskRequest, Tokens
from parrot.tokenizer import load_tokenizer
from tests.engine.fakes import Engine, FakeRunner, last, streamed, task
from tests.engine.test_server import until

ITERATION_S = 0.002


@asynccontextmanager
async def emulated(tmp_path: Path, iteration_s: float = 0.0, **keys: Any) -> AsyncIterator[Engine]:
    """An emulated engine whose iterations all take `iteration_s`."""
    fixed = (FixedCost(10_000, iteration_s),)
    profile = LatencyProfile("test", "m", "cpu", "none", fixed, (), pair_s=0.0, kv_s=0.0)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(profile))
    data = {"model": "m", "host": "127.0.0.1", "engine_type": "emulated", "latency_profile": "profile.json", **keys}
    config = parse_engine_config(data, tmp_path / "engine.json")
    assert isinstance(config, EmulatedEngineConfig)
    running = await start_emulated(config, port=0, with_core=False)
    async with aiohttp.ClientSession() as client:
        try:
            yield Engine(running, FakeRunner(), client)
        finally:
            await running.close()


def request(number: int, prompt: int = 20, output: int | None = 5, **keys: Any) -> TaskRequest:
    return task(number, [(1, prompt), (10 + number, 3)], 1000 + number, output_length=output, **keys)


@pytest.mark.parametrize("iteration_s", [0.0, ITERATION_S])
@pytest.mark.parametrize("interval", [None, 0.004])
async def test_every_task_s_events_join_to_its_output(tmp_path: Path, iteration_s: float, interval: float | None) -> None:
    async with emulated(tmp_path, iteration_s, instance={"stream_interval_s": interval}) as engine:
        lengths = [n % 9 + 1 for n in range(30)]
        requests = [request(n, output=length, max_gen_length=50) for n, length in enumerate(lengths)]
        for length, events in zip(lengths, await asyncio.gather(*map(engine.run, requests)), strict=True):
            finished = last(events, Finished)
            assert isinstance(events[0], Started)
            assert streamed(events) == (finished.ids, finished.text)
            assert len(finished.ids) == length
            assert load_tokenizer("synthetic").encode(finished.text) == list(finished.ids)
            assert finished.prompt_tokens == 23
            assert finished.decode_s == pytest.approx((length - 1) * iteration_s)
        assert (await engine.info())["num_total_jobs"] == 0


async def test_without_output_length_the_output_is_max_gen_length(tmp_path: Path) -> None:
    async with emulated(tmp_path) as engine:
        assert len(last(await engine.run(request(0, output=None, max_gen_length=7)), Finished).ids) == 7


async def test_another_attempt_says_the_same_and_goes_on_behind_what_was_streamed(tmp_path: Path) -> None:
    async with emulated(tmp_path) as engine:
        first = last(await engine.run(request(0, output=6, max_gen_length=6)), Finished)
        again = request(0, output=6, max_gen_length=6, attempt=2)
        tokenizer = load_tokenizer("synthetic")
        generate = msgspec.structs.replace(
            again.generate, context_id=2000, forced_ids=first.ids[:4], forced_text=tokenizer.decode(first.ids[:4])
        )
        events = await engine.run(msgspec.structs.replace(again, generate=generate))
        second = last(events, Finished)
        assert (second.ids, second.text) == (first.ids, first.text)
        ids, text = streamed(events)
        assert ids == first.ids[4:]
        assert tokenizer.decode(first.ids[:4]) + text == first.text


async def test_long_outputs_are_streamed_on_the_way_when_asked(tmp_path: Path) -> None:
    async with emulated(tmp_path, ITERATION_S, instance={"stream_interval_s": 0.01}) as engine:
        events = await engine.run(request(0, output=100, max_gen_length=100))
        assert sum(isinstance(e, Tokens) for e in events) > 3


async def test_a_client_that_goes_away_aborts_its_task(tmp_path: Path) -> None:
    async with emulated(tmp_path, iteration_s=5.0) as engine:
        running = asyncio.create_task(engine.run(request(0)))
        await until(lambda: engine.running.loop.runtime_info().num_running_jobs == 1)
        running.cancel()
        await until(lambda: engine.running.loop.runtime_info().num_total_jobs == 0)


async def test_limits_are_told_as_events(tmp_path: Path) -> None:
    async with emulated(tmp_path, iteration_s=5.0, tasks_capacity=1, instance={"max_seq_len": 50}) as engine:
        failed = last(await engine.run(request(0, prompt=61)), Failed)
        assert failed.code == "task_too_large"
        assert not failed.retryable
        assert "50" in failed.message
        running = asyncio.create_task(engine.run(request(1)))
        await until(lambda: engine.running.loop.runtime_info().num_running_jobs == 1)
        assert last(await engine.run(request(2)), Rejected).code == "engine_rejected"
        await engine.running.close()
        assert last(await running, Failed).code == "unavailable"


async def test_shared_contexts_evictions_and_frees_are_the_engine_core_s(tmp_path: Path) -> None:
    limits = {"instance": {"num_kv_cache_blocks": 64}, "scheduler": {"max_total_tokens": 64}}
    async with emulated(tmp_path, **limits) as engine:
        assert last(await engine.run(request(0, prompt=32, output=1)), Finished).cached_tokens == 0
        assert last(await engine.run(request(1, prompt=32, output=1)), Finished).cached_tokens == 32
        assert (await engine.post("/free_context", {"context_ids": [1000, 1001, 10, 11, 1], "epoch": 0}))[1]["context_len"] > 32
        assert last(await engine.run(request(2, prompt=32, output=1)), Finished).cached_tokens == 0
        other = task(3, [(77, 59)], 78, output_length=1)
        events = [*(await engine.run(other)), *(await engine.run(task(4, [(79, 4)], 80, output_length=1)))]
        assert 1 in [i for e in events for i in e.evicted]


async def test_the_primitives_work_on_an_emulated_engine_too(tmp_path: Path) -> None:
    async with emulated(tmp_path) as engine:
        assert (await engine.post("/fill", {"context_id": 1, "text": "a few words"}))[1] == {"filled_len": 3}
        body = {"context_id": 1, "sampling_config": {"output_length": 4}}
        assert len((await engine.post("/generate", body))[1]["generated_ids"]) == 4
        assert (await engine.post("/free_context", {"context_id": 1}))[1] == {"context_len": 7}


async def test_many_engines_share_one_event_loop(tmp_path: Path) -> None:
    config = parse_engine_config({"model": "m", "engine_type": "emulated", "latency_profile": "zero"}, tmp_path / "e.json")
    assert isinstance(config, EmulatedEngineConfig)
    engines = [await start_emulated(config, "127.0.0.1", 0, engine_name=f"e{n}", with_core=False) for n in range(40)]
    try:
        assert len({engine.port for engine in engines}) == 40
        assert [engine.description.engine_name for engine in engines] == [f"e{n}" for n in range(40)]
        async with aiohttp.ClientSession() as client:
            running = [Engine(engine, FakeRunner(), client).run(request(n)) for n, engine in enumerate(engines)]
            for events in await asyncio.gather(*running):
                last(events, Finished)
    finally:
        await asyncio.gather(*(engine.close() for engine in engines))


async def test_without_a_latency_profile_the_start_is_refused(tmp_path: Path) -> None:
    config = parse_engine_config({"model": "m", "engine_type": "emulated"}, tmp_path / "e.json")
    assert isinstance(config, EmulatedEngineConfig)
    with pytest.raises(ConfigurationError, match="latency_profile"):
        await start_emulated(config, port=0, with_core=False)
