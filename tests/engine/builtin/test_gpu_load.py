"""Random load on the engine's own loop, with cancellations and little memory: nothing leaks, and what finishes is right.

A few seconds on a CPU; on a GPU

    PARROT_LOAD_SECONDS=480 python -m pytest -s -m gpu tests/engine/builtin/test_gpu_load.py

The seed is printed; `PARROT_LOAD_SEED` sets it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parrot.engine.batches import EngineLimits, EngineTask, Link  # noqa: E402
from parrot.engine.builtin.attention import unavailable  # noqa: E402
from parrot.engine.core import EngineCore  # noqa: E402
from parrot.engine.jobs import Job  # noqa: E402
from parrot.engine.loop import BuiltinLoop  # noqa: E402
from parrot.protocol.api import SamplingConfig  # noqa: E402
from parrot.protocol.engine import Finished, Tokens  # noqa: E402
from tests.engine.builtin.conftest import VOCABULARY, make_model  # noqa: E402
from tests.engine.builtin.driving import Drive, limits  # noqa: E402
from tests.engine.builtin.test_gpu_engine import LOOKED_AT, WIDER, Recording, engine  # noqa: E402

SEED = int(os.environ.get("PARROT_LOAD_SEED", random.randrange(10**6)))
CLIENTS = 40
LONE = 100  #: finished requests that are run again alone
NEAR = 1e-3  #: where a token differs from that of the lone run, its two best logits are no further apart


class Load:
    """Clients that submit, wait, and sometimes give up; prefixes that some of them share and that come and go."""

    def __init__(self, loop: BuiltinLoop, most_tokens: int, until: float, seed: int) -> None:
        self.loop, self.most, self.until = loop, most_tokens, until
        self.draw = random.Random(seed)
        self.contexts: dict[int, list[int]] = {}
        self.roots: list[list[int]] = []
        self.finished: list[tuple[list[int], tuple[int, ...], int]] = []  # greedy ones: prompt, ids, limit
        self.counts = {"finished": 0, "cancelled": 0, "other": 0}
        self.number = 0

    def context(self, tokens: int) -> int:
        self.number += 1
        self.contexts[self.number] = [self.draw.randrange(3, VOCABULARY) for _ in range(tokens)]
        return self.number

    def chain(self) -> list[int]:
        draw = self.draw
        if len(self.roots) < 6 or draw.random() < 0.02:
            self.roots.append([self.context(draw.randint(10, self.most // 8))])
        if len(self.roots) > 8:
            self.loop.free_contexts(self.roots.pop(0))
        chain = list(draw.choice(self.roots)) if draw.random() < 0.7 else []
        if chain and draw.random() < 0.1:
            grown = [*chain, self.context(draw.randint(1, 60))]
            self.roots.append(grown)
            chain = list(grown)
        return [*chain, self.context(draw.choice([1, 5, 17, 60, self.most // 10]))]

    def sampling(self) -> SamplingConfig:
        draw = self.draw
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0}, {"temperature": 0.0}, {"seed": draw.randrange(99)}, {"top_p": 0.8, "seed": 1},
            {"top_k": 5, "seed": 2}, {"presence_penalty": 0.5, "repetition_penalty": 1.1, "temperature": 0.0},
            {"temperature": 0.0, "logprobs": 4}, {"seed": 3, "logprobs": 0},
        ]  # fmt: skip
        return SamplingConfig(max_gen_length=draw.choice([1, 3, 20, 60, 120]), ignore_tokenizer_eos=True, **draw.choice(kinds))

    async def client(self) -> None:
        while time.monotonic() < self.until:
            chain, sampling = self.chain(), self.sampling()
            ids = [self.contexts[c] for c in chain]
            output = self.context(0)
            links = tuple(Link(c, len(i)) for c, i in zip(chain, ids, strict=True))
            key = ("task", output)
            job = Job(key, str(output), EngineTask(key, links, output, sampling.max_gen_length), ids, sampling, self.loop.now())
            self.loop.submit(job)
            patience = self.draw.choice([0.0, 0.01, 0.1]) if self.draw.random() < 0.2 else None
            try:
                last, told = await asyncio.wait_for(_outcome(job), patience)
            except TimeoutError:
                self.loop.abort(key)
                self.counts["cancelled"] += 1
            else:
                good = isinstance(last, Finished)
                self.counts["finished" if good else "other"] += 1
                if good:
                    assert told == (len(last.ids) if sampling.logprobs is not None else 0), f"seed {SEED}"
                if good and sampling == SamplingConfig(
                    temperature=0.0, max_gen_length=sampling.max_gen_length, ignore_tokenizer_eos=True
                ):
                    self.finished.append(([i for part in ids for i in part], last.ids, sampling.max_gen_length))
            if self.draw.random() < 0.7:
                self.loop.free_contexts([chain[-1], output])


async def _outcome(job: Job) -> tuple[Any, int]:
    """Its last event, and of how many tokens log-probabilities were told."""
    last, told = None, 0
    while events := await job.stream.take():
        told += sum(len(event.logprobs) for event in events if isinstance(event, Tokens))
        last = events[-1]
    return last, told


async def run_load(runner: Recording, given: EngineLimits, seconds: float) -> Load:
    core = EngineCore(given)
    loop = BuiltinLoop(core, runner, pipeline_depth=given.pipeline_depth)
    load = Load(loop, given.largest_task, time.monotonic() + seconds, SEED)
    await asyncio.gather(*(load.client() for _ in range(CLIENTS)))
    await _settle(core)
    loop.free_contexts(range(load.number + 1))
    assert core.pool.free == given.num_blocks, "blocks leaked"
    await loop.close("the test is over")
    runner.drop_contexts(range(load.number + 1))
    assert not core.failed
    return load


async def _settle(core: EngineCore) -> None:
    for _ in range(2000):
        if not core.has_work:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine still has work")


def check_alone(runner: Recording, given: EngineLimits, load: Load, most: int) -> int:
    """Finished greedy requests against their lone run; how many of them differ at a near tie."""
    chosen = random.Random(SEED).sample(load.finished, min(most, len(load.finished)))
    ties = 0
    for prompt, ids, limit in chosen:
        runner.seen.clear()
        drive = Drive(runner, given)
        sampling = SamplingConfig(
            temperature=0.0, max_gen_length=limit, ignore_tokenizer_eos=True, logit_bias=LOOKED_AT.logit_bias
        )
        drive.submit("lone", [(1, prompt)], 2, sampling)
        lone = drive.run()["lone"]
        drive.close()
        runner.drop_task("lone")
        differing = next((i for i, (a, b) in enumerate(zip(lone, ids, strict=True)) if a != b), None)
        if differing is not None:
            best = runner.seen["lone", len(prompt) + differing].topk(2)
            assert float(best.values[0] - best.values[1]) < NEAR, f"seed {SEED}: token {differing} of {limit} is another"
            assert ids[differing] == int(best.indices[1])
            ties += 1
    return ties


def test_nothing_leaks_and_greedy_outputs_are_those_of_lone_runs_on_a_cpu(tmp_path: Path) -> None:
    make_model(tmp_path)
    given = limits(pipeline_depth=1, max_batch_size=12, num_blocks=40, fill_chunk_size=64, max_total_tokens=640)
    runner = engine(tmp_path, "torch_sdpa", torch.float32, given, device="cpu")
    load = asyncio.run(run_load(runner, given, 4.0))
    assert load.counts["finished"] > 10
    check_alone(runner, given, load, 8)
    assert runner.holds == (0, 0, 0), f"tasks, contexts, slots leaked (seed {SEED})"


@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["xformers_paged", "xformers_shared_prefix"])
def test_random_load_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := unavailable(name, "cuda"):
        pytest.skip(reason)
    monkeypatch.setattr("parrot.engine.builtin.attention.xformers_shared_prefix.LEAST_SAVED_BYTES", 1)
    seconds = float(os.environ.get("PARROT_LOAD_SECONDS", "20")) / 2
    print(f"\n{name}: seed {SEED}, {seconds:g} s")
    make_model(tmp_path, **WIDER)
    given = limits(pipeline_depth=1, max_batch_size=32, num_blocks=100, fill_chunk_size=256, max_total_tokens=1600)
    runner = engine(tmp_path, name, torch.float32, given, rows=32)
    asyncio.run(run_load(runner, given, min(5.0, seconds / 4)))  # libraries take their memory
    runner.seen.clear()
    held = memory()
    load = asyncio.run(run_load(runner, given, seconds))
    runner.seen.clear()
    grown = memory() - held
    print(f"{load.counts}, {len(load.finished)} greedy ones; GPU memory grew by {grown} bytes")
    assert load.counts["finished"] > 100
    assert not load.counts["other"]
    assert grown < 16 << 20, "GPU memory leaked"  # a thread of its own may have taken a library's work space
    assert runner.holds == (0, 0, 0), "tasks, contexts, slots leaked"
    ties = check_alone(runner, given, load, LONE)
    print(f"{ties} of {min(LONE, len(load.finished))} lone runs differ, at near ties")


def memory() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return int(torch.cuda.memory_allocated())
