"""The stand-in endpoint answers as its protocol has it, and what is measured of it is a log that can be fitted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from experiments.endpoint import HOST, Endpoint, Law, main
from parrot.engine.config import OpenAIEngineConfig, parse_engine_config
from parrot.engine.launch import start_openai
from parrot.protocol.engine import FillSpec, Finished, Rejected
from sim.calibrate.__main__ import main as calibrate
from sim.calibrate.request_logs import read_request_log
from tests.engine.fakes import Engine, last
from tests.engine.openai.test_engine import task

QUICK = Law(ttft_s=0.004, prompt_s=0.00001, ttft_load_s=0.0005, tpot_s=0.001, tpot_load_s=0.0002)


@asynccontextmanager
async def engine_of(law: Law, log: Path, limit: int | None = None, chat: bool = False) -> AsyncIterator[Engine]:
    """A real engine of type openai in front of an endpoint."""
    runner = web.AppRunner(Endpoint("stand-in", law, limit).application(), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    instance = {
        "base_url": f"http://{HOST}:{runner.addresses[0][1]}/v1",
        "api_endpoint": "chat" if chat else "completion",
        "max_retries": 0,
    }
    file = {"model": "stand-in", "engine_type": "openai", "tokenizer": "synthetic", "iteration_log": str(log), "host": HOST}
    config = parse_engine_config({**file, "port": 0, "instance": instance}, "remote.json")
    assert isinstance(config, OpenAIEngineConfig)
    running = await start_openai(config, with_core=False)
    async with aiohttp.ClientSession() as client:
        try:
            yield Engine(running, None, client)  # type: ignore[arg-type]
        finally:
            await running.close()
            await runner.cleanup()


@pytest.mark.parametrize("chat", [False, True])
async def test_words_are_tokens_and_as_many_come_as_were_asked_for(tmp_path: Path, chat: bool) -> None:
    async with engine_of(QUICK, tmp_path / "log", chat=chat) as engine:
        chain = (FillSpec(1, text="one two "), FillSpec(2, text="three"))
        finished = last(await engine.run(task(*chain, max_gen_length=7)), Finished)
    assert (finished.prompt_tokens, finished.output_tokens, finished.reason) == (3, 7, "length")
    assert len(finished.text.split()) == 7


async def test_what_is_above_its_limit_is_refused_and_the_log_shows_the_limit(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with engine_of(QUICK, log, limit=5) as engine:
        for number in range(5):
            last(await engine.run(task(number=number)), Finished)
        last(await engine.run(task(number=5)), Rejected)
    (run,) = read_request_log(log)
    assert [request.reason for request in run.requests] == ["length"] * 5 + ["engine_rejected"]


async def test_what_a_real_engine_measures_of_it_makes_a_profile(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with engine_of(QUICK, log) as engine:
        for burst in range(10):
            words = "word " * (20 * burst + 20)
            numbers = range(10 * burst, 10 * burst + 8)
            await asyncio.gather(*(engine.run(task(words, number=n, max_gen_length=4 + n % 9)) for n in numbers))
    (run,) = read_request_log(log)
    assert len(run.requests) == 80
    law = QUICK.ttft_s * 0.4  # no earlier than the law allows: its spread is a fifth
    assert all(request.ttft_s is not None and request.ttft_s > law for request in run.requests)
    assert await asyncio.to_thread(calibrate, [str(log), "--out", str(tmp_path / "p.json")]) == 0


def test_a_negative_time_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tpot-s", "-1"]) == 1
    assert "0 or more" in capsys.readouterr().err
