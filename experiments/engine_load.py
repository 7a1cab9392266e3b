"""Loads for one engine: a client process that sends them over HTTP, and the same load on an engine that is simulated.

    python -m experiments.engine_load http://localhost:9001 < load.json

The client is a process of its own, so that it does not take time from the engine that it measures.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import msgspec

from parrot.engine.batches import EngineLimits, EngineTask, Link
from parrot.engine.emulated.engine import EmulatedEngine
from parrot.latency import LatencyModel, LatencyProfile
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import FillSpec, Finished, GenerateSpec, TaskEvent, TaskId, TaskRequest


class Request(msgspec.Struct, frozen=True):
    """One task: `chain` is (context, tokens) from its head; equal contexts are shared. `logprobs`: what it asks for (None:
    no log-probabilities)."""

    chain: tuple[tuple[int, int], ...]
    output_tokens: int
    at_s: float = 0.0
    logprobs: int | None = None

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.chain) + self.output_tokens


class Load(msgspec.Struct, frozen=True):
    """`concurrency`: so many requests are out at a time, in order; None: each is sent at its `at_s`."""

    name: str
    requests: tuple[Request, ...]
    concurrency: int | None = None
    vocabulary: int = 32000


class Outcome(msgspec.Struct, frozen=True):
    """Seconds from the first request to the last answer, and of each request; `failed`: what went wrong."""

    total_s: float
    latencies_s: list[float]
    failed: list[str] = []


def send(load: Load, url: str) -> Outcome:
    """Runs the client. Raises RuntimeError when it could not."""
    client = subprocess.run(
        [sys.executable, "-m", "experiments.engine_load", url], input=msgspec.json.encode(load), capture_output=True
    )
    if client.returncode:
        raise RuntimeError(f"the client of load {load.name!r} failed: {client.stderr.decode()[-500:]}")
    return msgspec.json.decode(client.stdout, type=Outcome)


async def _send(load: Load, url: str) -> Outcome:
    bodies = [_body(load, number) for number in range(len(load.requests))]
    gate = asyncio.Semaphore(load.concurrency or len(bodies))
    latencies: list[float] = [0.0] * len(bodies)
    failed: list[str] = []
    decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(TaskEvent)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        began = time.perf_counter()

        async def one(number: int) -> None:
            async with gate:
                wait = load.requests[number].at_s - (time.perf_counter() - began)
                if load.concurrency is None and wait > 0:
                    await asyncio.sleep(wait)
                sent = time.perf_counter()
                async with session.post(f"{url}/task", data=bodies[number]) as response:
                    lines = (await response.read()).splitlines()
                latencies[number] = time.perf_counter() - sent
                last = decoder.decode(lines[-1]) if response.status == 200 and lines else None
                if not isinstance(last, Finished):
                    failed.append(f"request {number}: {last or lines[:1]}")
                elif len(last.ids) != load.requests[number].output_tokens:
                    failed.append(f"request {number}: {len(last.ids)} tokens, not {load.requests[number].output_tokens}")

        await asyncio.gather(*(one(number) for number in range(len(bodies))))
        return Outcome(time.perf_counter() - began, latencies, failed)


def _body(load: Load, number: int) -> bytes:
    request = load.requests[number]
    chain = tuple(
        FillSpec(context, random.Random(context).choices(range(3, load.vocabulary), k=tokens))
        for context, tokens in request.chain
    )
    output = request.output_tokens
    # No end token ends it: whatever the weights, it has the length that it may have.
    sampling = SamplingConfig(temperature=0.0, max_gen_length=output, ignore_tokenizer_eos=True, logprobs=request.logprobs)
    task = TaskId(1, number, 0)
    return msgspec.json.encode(TaskRequest(0, 0, task, 1, chain, GenerateSpec(1_000_000_000 + number, sampling)))


def simulate(load: Load, limits: EngineLimits, profile: LatencyProfile) -> Outcome:
    """The same load on an engine of these limits that takes the time of `profile`."""
    engine = EmulatedEngine(limits, LatencyModel(profile))
    due = [(request.at_s, number) for number, request in enumerate(load.requests)]
    waiting: list[tuple[float, int]] = []
    if load.concurrency is not None:
        due, waiting = due[: load.concurrency], due[load.concurrency :]
        waiting.reverse()
    heapq.heapify(due)
    sent: dict[int, float] = {}
    done: dict[int, float] = {}
    failed: list[str] = []
    while len(done) + len(failed) < len(load.requests):
        edge = engine.next_edge()
        if due and (edge is None or due[0][0] <= edge):
            at, number = heapq.heappop(due)
            request = load.requests[number]
            links = tuple(Link(context, tokens) for context, tokens in request.chain)
            sent[number] = at
            task = EngineTask(number, links, 1_000_000_000 + number, request.output_tokens)
            engine.submit(task, request.output_tokens, at)
            continue
        if edge is None:
            raise RuntimeError("the simulated engine stands still with requests unanswered")
        for event in engine.advance(edge):
            number = event.key  # type: ignore[assignment]
            if event.kind in ("finished", "failed", "rejected"):
                done[number] = event.at
                if event.kind != "finished":
                    failed.append(f"request {number}: {event.kind}")
                if waiting:
                    heapq.heappush(due, (event.at, waiting.pop()[1]))
    return Outcome(max(done.values()), [done[n] - sent[n] for n in sorted(done)], failed)


def closed(
    name: str,
    concurrency: int,
    count: int,
    *,
    seed: int,
    prompt: tuple[int, int],
    output: tuple[int, int],
    shared: Sequence[tuple[int, int]] = (),
) -> Load:
    """`count` requests, `concurrency` at a time. `prompt`, `output`: range of tokens, drawn evenly on a log scale. `shared`:
    contexts, one of which each prompt begins with, in turn."""
    draw = random.Random(seed)
    requests = []
    for number in range(count):
        begin = (shared[number % len(shared)],) if shared else ()
        requests.append(Request((*begin, (1000 + number, _log_uniform(draw, *prompt))), _log_uniform(draw, *output)))
    return Load(name, tuple(requests), concurrency)


def _log_uniform(draw: random.Random, least: int, most: int) -> int:
    return round(least * math.exp(math.log(most / least) * draw.random()))


async def _main() -> int:
    load = msgspec.json.decode(sys.stdin.buffer.read(), type=Load)
    outcome = await _send(load, sys.argv[1])
    sys.stdout.buffer.write(msgspec.json.encode(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
