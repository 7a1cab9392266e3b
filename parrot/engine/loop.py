"""Drives a real engine: EngineCore says what the next iteration computes, a Runner computes it in two worker threads.

One launches iterations, in the order of issue, the other waits for them: where a launch does not wait for its device, the next
one is launched while one computes, and an iteration's end is noticed when it comes.

Decides nothing about who runs. Sleeps while there is nothing to do, and is woken, never polls. An exception of the
runner ends the tasks of that iteration, not the engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from parrot.engine.batches import Batch, Refused
from parrot.engine.core import EngineCore
from parrot.engine.iteration_log import IterationLog
from parrot.engine.jobs import Job
from parrot.engine.runner import Runner, TokenResult
from parrot.protocol.api import SamplingConfig
from parrot.protocol.engine import RuntimeInfo
from parrot.protocol.errors import ParrotError

log = logging.getLogger(__name__)


class EngineLoop(Protocol):
    """What the server needs of an engine, real or emulated. All of it is called in the event loop's thread."""

    #: told of every context that the engine gives up by itself
    on_evicted: Callable[[Sequence[int]], None]

    def now(self) -> float:
        """Seconds since the engine started; never decreases."""

    def submit(self, job: Job) -> None:
        """Takes the job; a refusal is told as the job's last event."""

    def abort(self, key: Hashable) -> None:
        """Gives the job up without another event. Unknown keys are ignored."""

    def free_contexts(self, ids: Iterable[int]) -> int:
        """Frees contexts; tokens that they added. Unknown ones are ignored."""

    def context_ids(self) -> list[int]:
        """All contexts that the engine has."""

    def runtime_info(self) -> RuntimeInfo:
        """What a ping and a heartbeat tell."""

    async def close(self, reason: str) -> None:
        """Fails what still runs, and stops."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of a loaded model, for RuntimeInfo."""

    model: float = 0.0
    cache: float = 0.0


@dataclass(frozen=True)
class _Issued:
    batch: Batch
    at: float
    labels: tuple[str, ...]  # of its rows' tasks, for the iteration log
    graph: bool
    result: asyncio.Future[tuple[list[TokenResult], float]]


class BuiltinLoop:
    """One engine: its core, its runner, its worker threads."""

    def __init__(
        self,
        core: EngineCore,
        runner: Runner,
        *,
        pipeline_depth: int = 0,
        memory: MemoryUse = MemoryUse(),
        iteration_log: IterationLog | None = None,
    ) -> None:
        """Must be made inside a running event loop: its work begins at once."""
        self.on_evicted: Callable[[Sequence[int]], None] = lambda ids: None
        self._core = core
        self._runner = runner
        self._depth = pipeline_depth
        self._memory = memory
        self._log = iteration_log
        self._started = time.monotonic()
        self._jobs: dict[Hashable, Job] = {}
        self._issued: deque[_Issued] = deque()
        # What the runner may forget only when the iterations issued so far have been computed: number of the last one.
        self._leaving_tasks: dict[Hashable, int] = {}
        self._leaving_contexts: dict[int, int] = {}
        self._last_number = self._last_completed = -1
        self._last_edge = 0.0
        self._busy_since = 0.0  # when it last got work while it had none
        self._recent_s: deque[float] = deque(maxlen=64)
        self._closed = False
        self._wake = asyncio.Event()
        self._launcher = ThreadPoolExecutor(1, thread_name_prefix="launcher")
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="finisher")
        self._task = asyncio.create_task(self._drive(), name="engine loop")

    # ------------------------------------------------------------------------------------------------ what is asked

    def now(self) -> float:
        return time.monotonic() - self._started

    def submit(self, job: Job) -> None:
        if self._closed:
            job.fail("unavailable", "the engine is shutting down")
            return
        now = self.now()
        job.task = job.task.fitted(self._core.limits.largest_task)
        try:
            self._core.submit(job.task, now)
        except Refused as refusal:
            job.refuse(refusal.code, refusal.message)
            return
        try:
            self._runner.add_task(job.task, job.link_ids, job.sampling or SamplingConfig(), job.forced_ids)
        except ParrotError as error:
            self._core.abort(job.key)
            job.fail(error.code, str(error))
            return
        for context_id in _contexts_of(job):
            self._leaving_contexts.pop(context_id, None)
        if not self._jobs and not self._issued:
            self._busy_since = now
        self._jobs[job.key] = job
        if self._log is not None:
            self._log.task(now, job.label, now - job.arrived, job.prompt_tokens, job.task.max_gen_length)
        self._wake.set()

    def abort(self, key: Hashable) -> None:
        if key in self._jobs:
            self._core.abort(key)
            self._lose(key)
            self._wake.set()

    def free_contexts(self, ids: Iterable[int]) -> int:
        ids = list(ids)
        freed = self._core.free_contexts(ids)
        self._leave(contexts=ids)
        self._wake.set()
        return freed

    def context_ids(self) -> list[int]:
        return [context.id for context in self._core.contexts]

    def runtime_info(self) -> RuntimeInfo:
        return runtime_info(self._core, self._memory, self._recent_s, self._stalled_s())

    def _stalled_s(self) -> float:
        """An iteration that nobody waits for any more is work too: while it runs, no other can."""
        if not self._jobs and not self._issued:
            return 0.0
        return max(0.0, self.now() - max(self._last_edge, self._busy_since))

    async def close(self, reason: str) -> None:
        self._closed = True
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for job in self._jobs.values():
            job.fail("unavailable", reason, retryable=True)
        self._jobs.clear()
        # The workers end with the iterations that they have begun; what those give is of no use to anybody any more.
        await asyncio.gather(*(issued.result for issued in self._issued), return_exceptions=True)
        self._launcher.shutdown(wait=True)
        self._finisher.shutdown(wait=True)
        if self._log is not None:
            self._log.close()

    # --------------------------------------------------------------------------------------------------- iterations

    async def _drive(self) -> None:
        while True:
            self._wake.clear()
            try:
                while self._issued and self._issued[0].result.done():
                    self._complete(self._issued.popleft())
                self._issue()
            except Exception:
                log.exception("the engine's scheduler failed; all its tasks are given up, and a fresh one takes its place")
                self._begin_anew()
            await self._wake.wait()

    def _issue(self) -> None:
        while len(self._issued) <= self._depth:
            at = self.now()
            batch = self._core.next_batch(at)
            self._note_evicted(self._core.take_evicted())
            self._refuse_failed()
            if batch is None:
                return
            self._last_number = batch.number
            labels = () if self._log is None else tuple(self._jobs[r.key].label for r in batch.rows if r.key in self._jobs)
            graph, result = self._start(batch)
            result.add_done_callback(lambda _: self._wake.set())
            self._issued.append(_Issued(batch, at, labels, graph, result))
            for key, cached_tokens in batch.admitted:
                if key in self._jobs:
                    self._jobs[key].start(cached_tokens)

    def _start(self, batch: Batch) -> tuple[bool, asyncio.Future[tuple[list[TokenResult], float]]]:
        """Whether it replays a graph, and what comes of it."""
        loop = asyncio.get_running_loop()
        try:
            prepared = self._runner.prepare(batch, self._core)
            graph = self._runner.replays(prepared)
        except Exception as error:
            failed: asyncio.Future[tuple[list[TokenResult], float]] = loop.create_future()
            failed.set_exception(error)
            return False, failed
        launched = self._launcher.submit(self._launch, prepared)
        return graph, loop.run_in_executor(self._finisher, self._finish, launched)

    def _launch(self, prepared: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        return self._runner.launch(prepared), time.perf_counter() - began

    def _finish(self, launched: Future[tuple[Any, float]]) -> tuple[list[TokenResult], float]:
        found, launch_s = launched.result()
        began = time.perf_counter()
        results = self._runner.finish(found)
        return results, launch_s + time.perf_counter() - began

    def _complete(self, issued: _Issued) -> None:
        batch, now = issued.batch, self.now()
        self._last_completed = batch.number
        error = issued.result.exception()
        if error is not None:
            self._fail(batch, error)
            self._note_iteration(issued, 0.0, failed=True)
            return
        results, run_s = issued.result.result()
        ended = {r.key: r.kept for r in results if r.reason is not None and r.key in self._jobs}
        progress = self._core.complete(batch, ended, now)
        for result in results:
            self._hand_out(result, now)
        for key in progress.finished:
            job = self._jobs.pop(key, None)
            if job is not None:  # it only filled
                job.finish((), "", "length", now)
                self._leave(tasks=(key,))
        self._note_evicted(self._core.take_evicted())
        self._let_go()
        self._note_iteration(issued, run_s)

    def _hand_out(self, result: TokenResult, now: float) -> None:
        job = self._jobs.get(result.key)
        if job is None:
            return
        logprobs = () if result.logprob is None else (result.logprob,)
        if result.reason is None:
            job.tokens((result.token_id,), result.text, now, logprobs)
            return
        del self._jobs[result.key]
        job.finish(result.ids, result.output, result.reason, now, logprobs)
        self._leave(tasks=(result.key,))

    def _note_iteration(self, issued: _Issued, run_s: float, failed: bool = False) -> None:
        edge = self.now()
        began = max(issued.at, self._last_edge)
        self._last_edge = edge
        self._recent_s.append(edge - began)
        if self._log is not None:
            shape = issued.batch.shape
            shape.graph = issued.graph
            self._log.iteration(began, edge - began, run_s, shape, issued.labels, failed)

    # ------------------------------------------------------------------------------------------------------ failures

    def _fail(self, batch: Batch, error: BaseException) -> None:
        """The iteration computed nothing that can be relied on, nor does one that was issued after it: its tasks end."""
        log.error("iteration %d failed: %s", batch.number, error, exc_info=error)
        message = f"the iteration that the task was in failed: {type(error).__name__}: {error}"
        for key in self._core.fail(batch):
            job = self._lose(key)
            if job is not None:
                job.fail("engine_failed", message, retryable=True)
        self._note_evicted(self._core.take_evicted())
        self._let_go()

    def _refuse_failed(self) -> None:
        """Tasks that waited and cannot run any more."""
        for key, refusal in self._core.take_failed():
            job = self._lose(key)
            if job is not None:
                job.refuse(refusal.code, refusal.message)

    def _begin_anew(self) -> None:
        """The core has broken a promise of its own: nothing that it says can be relied on. Its tasks end, a fresh one
        takes its place. The worker computes what it has begun first, so that no page is written late."""
        for job in self._jobs.values():
            job.fail("engine_failed", "the engine's scheduler failed; its log says how", True)
        old, self._core = self._core, EngineCore(self._core.limits)
        tasks, contexts = tuple(self._jobs), tuple(context.id for context in old.contexts)
        self._jobs.clear()
        self._issued.clear()
        self._leave(tasks=tasks)
        self._note_evicted(contexts)
        self._last_number = self._last_completed = -1

    # --------------------------------------------------------------------------------------- what the runner forgets

    def _note_evicted(self, ids: Sequence[int]) -> None:
        if ids:
            self._leave(contexts=ids)
            self.on_evicted(ids)

    def _lose(self, key: Hashable) -> Job | None:
        """A task that did not finish is gone from the core, and with it those of its contexts that nobody else holds."""
        job = self._jobs.pop(key, None)
        if job is not None:
            gone = [i for i in _contexts_of(job) if self._core.contexts.get(i) is None]
            self._leave(tasks=(key,), contexts=gone)
        return job

    def _leave(self, tasks: Iterable[Hashable] = (), contexts: Iterable[int] = ()) -> None:
        self._leaving_tasks.update((key, self._last_number) for key in tasks)
        self._leaving_contexts.update((context_id, self._last_number) for context_id in contexts)
        if not self._issued:
            self._let_go()

    def _let_go(self) -> None:
        """Tells the runner of what no iteration in flight can still touch."""
        done = self._last_completed if self._issued else self._last_number
        for key in [key for key, number in self._leaving_tasks.items() if number <= done]:
            del self._leaving_tasks[key]
            self._runner.drop_task(key)
        contexts = [i for i, number in self._leaving_contexts.items() if number <= done]
        if contexts:
            for context_id in contexts:
                del self._leaving_contexts[context_id]
            self._runner.drop_contexts(contexts)


def _contexts_of(job: Job) -> list[int]:
    ids = [link.context_id for link in job.task.links]
    return ids if job.task.generate_context_id is None else [*ids, job.task.generate_context_id]


def runtime_info(core: EngineCore, memory: MemoryUse, recent_s: Sequence[float], stalled_s: float) -> RuntimeInfo:
    """What a core's counters say, with the mean of its last iterations' seconds."""
    return RuntimeInfo(
        num_cached_tokens=core.cached_tokens,
        num_max_blocks=core.limits.num_blocks,
        num_running_jobs=core.num_running_tasks,
        num_total_jobs=core.num_total_tasks,
        cache_mem=memory.cache,
        model_mem=memory.model,
        recent_average_latency=sum(recent_s) / len(recent_s) if recent_s else 0.0,
        stalled_s=stalled_s,
    )
