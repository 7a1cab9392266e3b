"""An engine that only passes time: EngineCore decides, a LatencyModel says how long each iteration takes. No clock here:
the shell (SimPy, or asyncio in real time) says what time it is, and asks when to come again.

Edge k of a run of iterations lies at t0 + D(k). t0 moves only when the composition of the batch changes, never at an
interruption that changes nothing; what arrives at an edge comes before it. Hence stepping (every iteration an edge) and
jumping (only iterations after which something can change) give the same events at the same times, to the last bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable
from typing import Literal, NamedTuple

import msgspec

from parrot.engine.batches import Batch, EngineLimits, EngineTask, Refused
from parrot.engine.core import EngineCore
from parrot.latency import BatchShape, DecodeRun, LatencyModel


class EmulatedEvent(NamedTuple):
    """Something that happened to a task at `at` (seconds, the exact edge).

    kind          | what else it carries
    started       | cached_tokens
    first_token   |
    progressed    | tokens: new ones; only for tasks submitted with stream=True
    finished      | output_tokens, prompt_tokens, cached_tokens, decode_s, max_gap_s
    rejected      | code engine_rejected, message: there is no room now
    failed        | code, message: it cannot run here like this

    `evicted`: contexts that the engine gave up by itself before this event; each is told once.
    """

    kind: Literal["started", "first_token", "progressed", "finished", "rejected", "failed"]
    key: Hashable
    at: float
    cached_tokens: int = 0
    tokens: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    decode_s: float = 0.0
    max_gap_s: float = 0.0
    code: str = ""
    message: str = ""
    evicted: tuple[int, ...] = ()


class Iterations(NamedTuple):
    """What an observer is told: iterations of the same tasks from `start` to `end`, the first of which had `shape`."""

    start: float
    end: float
    iterations: int
    shape: BatchShape
    keys: tuple[Hashable, ...]


class _Job:
    """What a task would generate, and what it has generated."""

    __slots__ = ("cached", "first_at", "generated", "last_at", "max_gap_s", "output", "prompt", "started", "stream")

    def __init__(self, output: int, forced: int, stream: bool) -> None:
        self.output = output  # tokens that it generates in all, forced ones included
        self.generated = forced
        self.stream = stream
        self.prompt = 0
        self.cached = 0
        self.started = False
        self.first_at: float | None = None
        self.last_at = 0.0
        self.max_gap_s = 0.0


class EmulatedEngine:
    """EngineCore and LatencyModel in anybody's time. Times are absolute seconds and never decrease between calls."""

    def __init__(
        self,
        limits: EngineLimits,
        latency: LatencyModel,
        jump: bool = True,
        observe: Callable[[Iterations], None] | None = None,
    ) -> None:
        self.core = EngineCore(limits)
        self.latency = latency
        self._jump = jump
        self._observe = observe
        self._overhead_s = latency.profile.task_overhead_s
        self._graph_rows = max((cost.max_rows for cost in latency.profile.fixed if cost.graph), default=0)
        self._arriving: deque[tuple[float, EngineTask]] = deque()
        self._jobs: dict[Hashable, _Job] = {}
        self._events: list[EmulatedEvent] = []
        self._evicted: tuple[int, ...] = ()  # told by no event yet
        self._wake: float | None = None  # when to try to issue a batch, apart from edges
        # The run that the iteration under way belongs to: it ends at _edge(_k). Iterations up to _last - 1 end quietly.
        self._busy = False
        self._t0 = 0.0
        self._run = DecodeRun(0.0, 0.0)
        self._k = 0
        self._last = 0
        self._previous: tuple[Hashable, ...] | None = None  # tasks of the decode batch that ended at the present edge

    # ------------------------------------------------------------------------------------------------ what is told

    def submit(self, task: EngineTask, output_tokens: int, now: float, stream: bool = False) -> None:
        """A task, and how many tokens it would generate if max_gen_length allowed (ignored for one that only fills).
        Whether it is taken is told by an event."""
        self._catch_up(now)
        task = self.core.limits.fit(task)
        if task.generate_context_id is not None:
            output = max(1, task.forced_tokens, min(output_tokens, task.max_gen_length))
            if task.forced_tokens >= task.max_gen_length:  # nothing is left to say: it ends when its output is filled
                task = msgspec.structs.replace(task, max_gen_length=task.forced_tokens + 1)
        else:
            output = 0
        if task.key in self._jobs:
            message = f"task {task.key!r} is on this engine already"
            self._events.append(EmulatedEvent("failed", task.key, now, code="conflict", message=message))
            return
        self._jobs[task.key] = _Job(output, task.forced_tokens if output else 0, stream)
        self._arriving.append((now + self._overhead_s, task))

    def abort(self, key: Hashable, now: float) -> bool:
        """Gives a task up; no event of it comes any more. False: there is no such task."""
        self._catch_up(now)
        if self._jobs.pop(key, None) is None:
            return False
        if not self.core.abort(key):
            self._arriving = deque((ready, task) for ready, task in self._arriving if task.key != key)
        for event in self._events:
            if event.key == key:
                self._evicted += event.evicted
        self._events = [event for event in self._events if event.key != key]
        self._changed(now)
        return True

    def free_contexts(self, ids: Iterable[int], now: float) -> int:
        """Nobody will ask for these again; the tokens that they added. Those in use go later."""
        self._catch_up(now)
        tokens = self.core.free_contexts(ids)
        self._changed(now)
        return tokens

    def take_evicted(self) -> tuple[int, ...]:
        """Contexts given up so far and not yet told by an event."""
        evicted, self._evicted = self._evicted + self.core.take_evicted(), ()
        return evicted

    # ------------------------------------------------------------------------------------------------------- time

    def next_edge(self) -> float | None:
        """When `advance` must be called; None while nothing is under way."""
        if self._events:
            return self._events[0].at
        times = [self._arriving[0][0]] if self._arriving else []
        if self._wake is not None:
            times.append(self._wake)
        if self._busy:
            times.append(self._edge(self._last if self._jump else self._k))
        return min(times, default=None)

    @property
    def quiet(self) -> bool:
        """The next edge is one that jumping passes over: nothing can change there. A shell that steps serves it after
        everything else of its instant."""
        if self._jump or not self._busy or self._k >= self._last or self._events:
            return False
        edge = self._edge(self._k)
        return (self._wake is None or self._wake > edge) and (not self._arriving or self._arriving[0][0] > edge)

    def advance(self, now: float) -> list[EmulatedEvent]:
        """Everything up to `now`, in order."""
        self._pass(now, inclusive=True)
        self._skip_to(now, inclusive=True)
        events, self._events = self._events, []
        return events

    def generated(self, key: Hashable, now: float) -> int:
        """Tokens of the output that exist at `now` (forced ones included); 0 for an unknown task."""
        self._catch_up(now)
        job = self._jobs.get(key)
        return job.generated if job is not None else 0

    def _edge(self, k: int) -> float:
        return self._t0 + self._run.at(k)

    def _catch_up(self, now: float) -> None:
        """Brings all to the state just before `now`: what happens at `now` itself comes behind what is told now."""
        self._pass(now, inclusive=False)
        self._skip_to(now)

    def _changed(self, now: float) -> None:
        self._wake = now
        self._look_ahead()

    def _pass(self, now: float, inclusive: bool) -> None:
        while True:
            edge = self._edge(self._last if self._jump else self._k) if self._busy else None
            times = [t for t in (self._wake, edge, self._arriving[0][0] if self._arriving else None) if t is not None]
            at = min(times, default=None)
            if at is None or at > now or (at == now and not inclusive):
                return
            if self._arriving and self._arriving[0][0] == at:
                self._skip_to(at)
                self._arrive(self._arriving.popleft()[1], at)
                self._changed(at)
            elif edge == at:
                self._complete(at)
            else:
                self._skip_to(at)
                self._issue(at)

    # ------------------------------------------------------------------------------------------------- iterations

    def _arrive(self, task: EngineTask, at: float) -> None:
        try:
            self._jobs[task.key].prompt = self.core.submit(task, at)
        except Refused as refusal:
            self._refuse(task.key, refusal, at)

    def _refuse(self, key: Hashable, refusal: Refused, at: float) -> None:
        del self._jobs[key]
        kind: Literal["rejected", "failed"] = "rejected" if refusal.code == "engine_rejected" else "failed"
        self._tell(EmulatedEvent(kind, key, at, code=refusal.code, message=refusal.message))

    def _issue(self, at: float) -> None:
        """Issues what the core has, as far ahead as it may."""
        self._wake = None
        while (batch := self.core.next_batch(at)) is not None:
            for key, cached in batch.admitted:
                job = self._jobs[key]
                job.cached = cached
                self._tell(EmulatedEvent("started", key, at, cached_tokens=cached))
            if not self._busy:
                self._start(batch, at)
        for key, refusal in self.core.take_failed():
            self._refuse(key, refusal, at)
        self._previous = None
        self._look_ahead()

    def _start(self, batch: Batch, at: float) -> None:
        """The batch begins to be computed: as the next of its run, or as the first of a new one."""
        shape = batch.shape
        keys = tuple([row.key for row in batch.rows]) if not shape.prefill_rows else None
        self._busy = True
        if keys is not None and keys == self._previous:
            self._k += 1
        elif keys is None:
            self._t0, self._run, self._k = at, DecodeRun(self.latency.duration(shape), 0.0), 1
        else:
            graph = shape.rows <= self._graph_rows
            self._t0, self._run, self._k = at, self.latency.decode_run(shape._replace(graph=graph)), 1
        self._last = self._k

    def _look_ahead(self) -> None:
        """Finds the next edge at which anything can change."""
        if not self._busy:
            return
        batch = self.core.in_flight[0]
        jobs = self._jobs
        if batch.shape.prefill_rows or any(row.key not in jobs or jobs[row.key].stream for row in batch.rows):
            self._last = self._k
            return
        remaining = {row.key: jobs[row.key].output - jobs[row.key].generated for row in batch.rows}
        self._last = self._k + self.core.decode_horizon(batch, remaining) - 1

    def _skip_to(self, at: float, inclusive: bool = False) -> None:
        """Ends the quiet iterations whose edges lie before `at`, or at it."""
        if not self._jump or not self._busy or self._last == self._k:
            return
        low, high = self._k, self._last
        while low < high:
            middle = (low + high) // 2
            edge = self._edge(middle)
            if edge > at or (edge == at and not inclusive):
                high = middle
            else:
                low = middle + 1
        self._skip(low - self._k)

    def _skip(self, count: int) -> None:
        """Ends `count` quiet iterations."""
        if not count:
            return
        batch = self.core.in_flight[0]
        self._note(batch, count)
        self.core.advance(batch, count)
        self._sampled([self._jobs[row.key] for row in batch.rows], count)
        self._k += count

    def _complete(self, at: float) -> None:
        """The edge that was looked ahead to: ends the iteration under way."""
        if self._jump:
            self._skip(self._last - self._k)
        batch = self.core.in_flight[0]
        self._note(batch, 1)
        ended: dict[Hashable, int] = {}
        jobs = self._jobs
        sampled = {row.key: jobs[row.key] for row in batch.rows if row.samples and row.key in jobs}
        self._sampled(sampled.values(), 1)
        for key, job in sampled.items():
            if job.generated >= job.output:
                ended[key] = job.output
        progress = self.core.complete(batch, ended, at)
        for key in progress.first_tokens:
            if key in self._jobs:
                self._tell(EmulatedEvent("first_token", key, at))
        for key, job in sampled.items():
            if job.stream:
                self._tell(EmulatedEvent("progressed", key, at, tokens=1))
        for key in progress.finished:
            self._finish(key, at)
        self._busy = False
        self._previous = tuple([row.key for row in batch.rows]) if not batch.shape.prefill_rows else None
        if self.core.in_flight:
            self._start(self.core.in_flight[0], at)
        self._issue(at)

    def _sampled(self, jobs: Iterable[_Job], count: int) -> None:
        """Each job got a token at the end of each of `count` iterations, the first of them the one under way."""
        begins, last = self._k == 1, self._k + count - 1
        first_edge, last_edge = self._edge(self._k), self._edge(last)
        longest_s = self._run.first_s + self._run.growth_s * (last - 1) if last > 1 else 0.0
        for job in jobs:
            if job.first_at is None:
                job.first_at = first_edge
            elif begins and first_edge - job.last_at > job.max_gap_s:
                job.max_gap_s = first_edge - job.last_at
            if longest_s > job.max_gap_s:
                job.max_gap_s = longest_s
            job.last_at = last_edge
            job.generated += count

    def _finish(self, key: Hashable, at: float) -> None:
        job = self._jobs.pop(key)
        decode_s = job.last_at - job.first_at if job.first_at is not None else 0.0
        self._tell(EmulatedEvent("finished", key, at, job.cached, 0, job.output, job.prompt, decode_s, job.max_gap_s))

    # ------------------------------------------------------------------------------------------------------- tell

    def _tell(self, event: EmulatedEvent) -> None:
        evicted = self.take_evicted()
        self._events.append(event._replace(evicted=evicted) if evicted else event)

    def _note(self, batch: Batch, count: int) -> None:
        """Tells the observer of `count` iterations of the run, the first of them the one under way."""
        if self._observe is not None:
            keys = tuple([row.key for row in batch.rows])
            self._observe(Iterations(self._edge(self._k - 1), self._edge(self._k + count - 1), count, batch.shape, keys))
