"""Drives a runner with the real EngineCore, as the engine's loop does, without threads or clocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from parrot.engine.builtin.load import LoadedRunner, load_runner
from parrot.engine.builtin.runner import BuiltinRunner
from parrot.engine.config import BuiltinEngineConfig, parse_engine_config
from parrot.engine.core import EngineCore, EngineLimits, EngineTask, Link
from parrot.engine.runner import TokenResult
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import TokenLogprob

GREEDY = SamplingConfig(temperature=0.0, max_gen_length=8, ignore_tokenizer_eos=True)


def limits(**changes: int) -> EngineLimits:
    given: dict[str, Any] = {
        "num_blocks": 256,
        "block_size": 16,
        "max_batch_size": 64,
        "max_num_batched_tokens": 4096,
        "max_total_tokens": 8192,
        "tasks_capacity": 256,
        "max_seq_len": 2048,
    }
    return EngineLimits(**{**given, **changes})


def engine_config(model: str | Path, **changes: Any) -> BuiltinEngineConfig:
    """A configuration on the CPU; keyword arguments go to `instance`, but for those that the top level has."""
    top = {k: changes.pop(k) for k in ("tokenizer", "random_seed", "scheduler") if k in changes}
    data = {"model": str(model), "engine_type": "builtin", "instance": {"device": "cpu", **changes}, **top}
    config = parse_engine_config(data, "test")
    assert isinstance(config, BuiltinEngineConfig)
    return config


def load(model: str | Path, *, blocks: int = 256, **changes: Any) -> LoadedRunner:
    return load_runner(engine_config(model, num_kv_cache_blocks=blocks * 16, **changes))


class Drive:
    """One engine: a core with `limits` over `runner`."""

    def __init__(self, runner: BuiltinRunner, limits: EngineLimits) -> None:
        self.runner = runner
        self.core = EngineCore(limits)
        self.results: dict[Hashable, TokenResult] = {}
        self.streamed: dict[Hashable, str] = {}
        self.finished: list[Hashable] = []
        self.preempted: list[Hashable] = []
        self.contexts: list[int] = []
        self.told: dict[Hashable, list[TokenLogprob]] = {}  #: of the tokens of each task that asks for log-probabilities
        self._issued: deque[tuple[Any, Any]] = deque()

    def submit(
        self,
        key: Hashable,
        links: Sequence[tuple[int, Sequence[int]]],
        output: int | None,
        sampling: SamplingConfig = GREEDY,
        forced: Sequence[int] = (),
        parent: int | None = None,
    ) -> None:
        chain = tuple(Link(context_id, len(ids)) for context_id, ids in links)
        task = EngineTask(key, chain, output, sampling.max_gen_length, len(forced), parent)
        self.runner.add_task(task, [ids for _, ids in links], sampling, forced)
        self.core.submit(task, 0.0)
        self.contexts += [context_id for context_id, _ in links] + ([] if output is None else [output])

    def step(self) -> bool:
        """Issues and launches what may be issued, then finishes the oldest batch. False: there was nothing to do."""
        while (batch := self.core.next_batch(0.0)) is not None:
            self.runner.drop_contexts(self.core.take_evicted())
            self._issued.append((batch, self.runner.launch(self.runner.prepare(batch, self.core))))
        if not self._issued:
            return False
        batch, launched = self._issued.popleft()
        results = self.runner.finish(launched)
        for result in results:
            self.streamed[result.key] = self.streamed.get(result.key, "") + result.text
            if result.logprob is not None:
                self.told.setdefault(result.key, []).append(result.logprob)
            if result.reason is not None:
                self.results[result.key] = result
        progress = self.core.complete(batch, {r.key: r.kept for r in results if r.reason is not None}, 0.0)
        self.preempted += progress.preempted
        self.finished += progress.finished
        return True

    def run(self) -> dict[Hashable, tuple[int, ...]]:
        """Until all is done; the ids of every output."""
        while self.step():
            pass
        assert not self.core.has_work
        return {key: result.ids for key, result in self.results.items()}

    def close(self) -> None:
        """Frees all contexts; the runner can then be used with another core."""
        ids = sorted(set(self.contexts))
        self.core.free_contexts(ids)
        self.runner.drop_contexts(ids)
        for key in [*self.results, *self.finished]:
            self.runner.drop_task(key)
