"""A runner that computes nothing, and an engine around it for tests of the server."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Hashable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from parrot.engine.config import BuiltinEngineConfig, BuiltinInstance, parse_engine_config
from parrot.engine.core import Batch, EngineCore, EngineTask
from parrot.engine.derived import description_of, limits_of
from parrot.engine.iteration_log import IterationLog
from parrot.engine.loop import BuiltinLoop
from parrot.engine.runner import TokenResult
from parrot.engine.serving import RunningEngine, serve
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import (
    Failed,
    FillSpec,
    Finished,
    GenerateSpec,
    Rejected,
    TaskEvent,
    TaskId,
    TaskRequest,
    Tokens,
)
from parrot.protocol.errors import ParrotError
from parrot.tokenizer import load_tokenizer

EVENT = msgspec.json.Decoder(TaskEvent)  # type: ignore[arg-type]
BASE = {
    "model": "fake",
    "host": "127.0.0.1",
    "port": 0,
    "tokenizer": "synthetic",
    "instance": {"device": "cpu", "num_kv_cache_blocks": 4096},
    "scheduler": {"max_total_tokens": 4096},
}


class FakeRunner:
    """The i-th token of an output is 100 + i. `gate`: iterations wait while it is cleared. `fail_next`: in which of `prepare`,
    `launch` and `finish` the next one raises."""

    def __init__(self) -> None:
        self.tasks: dict[Hashable, tuple[list[int], SamplingConfig]] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.fail_next: str | None = None
        self.dropped_contexts: list[int] = []
        self._tokenizer = load_tokenizer("synthetic")

    def add_task(
        self, task: EngineTask, link_ids: Sequence[Sequence[int]], sampling: SamplingConfig, forced_ids: Sequence[int]
    ) -> None:
        if sampling.output_length is not None:
            raise ParrotError("bad_sampling", "output_length is for emulated engines")
        assert [len(ids) for ids in link_ids] == [link.tokens for link in task.links]
        self.tasks[task.key] = (list(forced_ids), sampling)

    def drop_task(self, key: Hashable) -> None:
        self.tasks.pop(key, None)

    def drop_contexts(self, context_ids: Iterable[int]) -> None:
        self.dropped_contexts += context_ids

    def _fail_in(self, step: str) -> None:
        if self.fail_next == step:
            self.fail_next = None
            raise RuntimeError("out of luck")

    def prepare(self, batch: Batch, core: EngineCore) -> Any:
        self._fail_in("prepare")
        for row in batch.rows:
            assert core.block_table(row.context_id)
        return batch.rows

    def replays(self, prepared: Any) -> bool:
        return False

    def launch(self, prepared: Any) -> Any:
        self._fail_in("launch")
        return prepared

    def finish(self, prepared: Any) -> list[TokenResult]:
        if not self.gate.wait(20):
            raise TimeoutError("a test forgot its gate")
        self._fail_in("finish")
        return [self._sample(row.key) for row in prepared if row.samples]

    def _sample(self, key: Hashable) -> TokenResult:
        ids, sampling = self.tasks[key]
        token = 100 + len(ids)
        ids.append(token)
        text = self._tokenizer.decode([token])
        shown = text if len(ids) == 1 else " " + text
        if token in sampling.stop_token_ids:
            kept = ids[:-1]
            return TokenResult(key, token, "", "stop_token", len(kept), tuple(kept), self._tokenizer.decode(kept))
        if len(ids) == sampling.max_gen_length:
            return TokenResult(key, token, shown, "length", len(ids), tuple(ids), self._tokenizer.decode(ids))
        return TokenResult(key, token, shown)


class Engine:
    """A served engine and a client of it."""

    def __init__(self, running: RunningEngine, runner: FakeRunner, client: aiohttp.ClientSession) -> None:
        self.running = running
        self.runner = runner
        self.client = client
        self.url = running.url

    async def post(self, path: str, body: object) -> tuple[int, Any]:
        async with self.client.post(self.url + path, data=msgspec.json.encode(body)) as response:
            return response.status, msgspec.json.decode(await response.read())

    async def error(self, path: str, body: object) -> tuple[int, str, str]:
        """Status, code and message of a request that must be refused."""
        status, answer = await self.post(path, body)
        return status, answer["error"]["code"], answer["error"]["message"]

    async def run(self, request: TaskRequest) -> list[TaskEvent]:
        """All events of a task."""
        async with self.client.post(self.url + "/task", data=msgspec.json.encode(request)) as response:
            assert response.status == 200, await response.text()
            return [EVENT.decode(line) for line in (await response.read()).splitlines()]

    async def info(self) -> dict[str, Any]:
        return (await self.post("/ping", {}))[1]["runtime_info"]


def task(
    number: int,
    chain: Sequence[tuple[int, int]],
    output: int,
    *,
    epoch: int = 0,
    engine_id: int = 0,
    attempt: int = 1,
    max_gen_length: int = 5,
    forced: int = 0,
    **sampling: Any,
) -> TaskRequest:
    """A task of the core: `chain` is (context, tokens) from its head, `output` the context of its generate."""
    forced_ids = tuple(range(100, 100 + forced))
    return TaskRequest(
        engine_id=engine_id,
        epoch=epoch,
        task=TaskId(7, number, 0),
        attempt=attempt,
        chain=tuple(FillSpec(context, [context] * tokens) for context, tokens in chain),
        generate=GenerateSpec(
            output,
            SamplingConfig(max_gen_length=max_gen_length, **sampling),
            forced_ids,
            load_tokenizer("synthetic").decode(forced_ids),
        ),
    )


def last(events: list[TaskEvent], kind: type) -> Any:
    """The last event, which must be of that kind and the only one that ends a task."""
    ends = [e for e in events if isinstance(e, Finished | Failed | Rejected)]
    assert ends == events[-1:]
    assert isinstance(events[-1], kind), events[-1]
    return events[-1]


def streamed(events: list[TaskEvent]) -> tuple[tuple[int, ...], str]:
    """Ids and text of the token events, joined."""
    tokens = [e for e in events if isinstance(e, Tokens)]
    return tuple(i for e in tokens for i in e.ids), "".join(e.text for e in tokens)


def fake_config(**keys: Any) -> BuiltinEngineConfig:
    config = parse_engine_config({**BASE, **keys}, "fake.json")
    assert isinstance(config, BuiltinEngineConfig)
    assert isinstance(config.instance, BuiltinInstance)
    return config


@asynccontextmanager
async def fake_engine(with_core: bool = False, iteration_log: IterationLog | None = None, **keys: Any) -> AsyncIterator[Engine]:
    """An engine that serves, over a FakeRunner; `keys` are of its configuration file."""
    config = fake_config(**keys)
    limits = limits_of(config)
    runner = FakeRunner()
    loop = BuiltinLoop(EngineCore(limits), runner, pipeline_depth=limits.pipeline_depth, iteration_log=iteration_log)
    tokenizer = load_tokenizer("synthetic")
    running = await serve(config, description_of(config, limits), loop, tokenizer, None, with_core)
    async with aiohttp.ClientSession() as client:
        try:
            yield Engine(running, runner, client)
        finally:
            runner.gate.set()
            await running.close()
