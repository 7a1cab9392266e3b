"""An engine that only passes time: EngineCore decides, a LatencyModel says how long each iteration takes. No clock here:
the shell (SimPy, or asyncio in real time) says what time it is, and asks when to come again.

Edge k of a run of iterations lies at t0 + D(k). t0 moves only when the composition of the batch changes, never at an
interruption that changes nothing; what arrives at an edge comes before it. Hence stepping (every iteration an edge) and
jumping (only iterations after which something can change) give the same events at the same times, to the last bit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from heapq import heapify, heappop, heappush
from typing import Literal, NamedTuple

import msgspec

from parrot.engine.batches import Batch, EngineLimits, EngineTask, Refused
from parrot.engine.core import EngineCore
from parrot.engine.running import Task
from parrot.latency import BatchShape, Coverage, DecodeRun, LatencyModel

NEVER = math.inf


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
    """What a task would generate, and what it has generated.

    While it decodes, `generated` is what it had when it joined the others, less the decode iterations before its first: all
    get one token an iteration, and nobody is counted one by one.
    """

    __slots__ = (
        "cached", "decodes", "first_at", "generated", "joined", "key", "last_at", "max_gap_s", "output", "prompt", "stream",
        "ticket",
    )  # fmt: skip

    def __init__(self, key: Hashable, output: int, forced: int, stream: bool) -> None:
        self.key = key
        self.output = output  # tokens that it generates in all, forced ones included
        self.generated = forced
        self.stream = stream
        self.prompt = 0
        self.cached = 0
        self.decodes = False
        self.joined = 0  # the decode iteration before its first
        self.ticket = 0
        self.first_at: float | None = None
        self.last_at = 0.0  # of its last token; while it decodes, that of the first ones is kept by the engine
        self.max_gap_s = 0.0


class _Gaps:
    """The times between consecutive decode iterations, as far as somebody may still ask for the largest since one of them."""

    def __init__(self) -> None:
        self._steps: list[int] = []  # of the gaps that no later one exceeds, falling
        self._gaps: list[float] = []

    def add(self, step: int, gap_s: float) -> None:
        """The largest of the gaps up to decode iteration `step` that were not added before."""
        steps, gaps = self._steps, self._gaps
        while gaps and gaps[-1] <= gap_s:
            gaps.pop()
            steps.pop()
        gaps.append(gap_s)
        steps.append(step)

    def largest_since(self, step: int) -> float:
        """The largest before iterations later than `step`; 0 when there are none."""
        place = bisect_right(self._steps, step)
        return self._gaps[place] if place < len(self._gaps) else 0.0

    def clear(self) -> None:
        """Nobody decodes."""
        self._steps.clear()
        self._gaps.clear()


class EmulatedEngine:
    """EngineCore and LatencyModel in anybody's time. Times are absolute seconds and never decrease between calls."""

    def __init__(
        self,
        limits: EngineLimits,
        latency: LatencyModel,
        jump: bool = True,
        observe: Callable[[Iterations], None] | None = None,
        coverage: Coverage | None = None,
    ) -> None:
        """`observe` is told of the iterations, `coverage` of their shapes."""
        self.core = EngineCore(limits)
        self.latency = latency
        self.jumps = jump  #: whether quiet iterations are passed over
        self._observe = observe
        self._coverage = coverage
        self._overhead_s = latency.profile.task_overhead_s
        self._graph_rows = max((cost.max_rows for cost in latency.profile.fixed if cost.graph), default=0)
        self._arriving: deque[tuple[float, EngineTask]] = deque()
        self._jobs: dict[Hashable, _Job] = {}
        self._events: list[EmulatedEvent] = []
        self._evicted: tuple[int, ...] = ()  # told by no event yet
        self._wake = NEVER  # when to try to issue a batch, apart from edges
        # The run that the iteration under way belongs to: it ends at t0 + run.at(k). Iterations up to _last - 1 end quietly.
        self._busy = False
        self._ends_at = NEVER  # the end of the next iteration to be served by itself: `_last` when jumping, `_k` when stepping
        self._t0 = 0.0
        self._run = DecodeRun(0.0, 0.0)
        self._k = 0
        self._last = 0
        self._previous: tuple[Task, ...] | None = None  # of the decode batch that ended at the present edge
        # The jobs that decode:
        self._ends: list[tuple[int, int, _Job]] = []  # heap: the decode iteration with a job's last token, a ticket
        self._tickets = 0
        self._decoding = 0
        self._streaming: dict[Hashable, _Job] = {}  # those of them that tell each token
        self._newcomers: list[_Job] = []  # their first decode iteration is not complete
        self._decoded_at = 0.0  # when the last decode iteration was
        self._gaps = _Gaps()

    # ------------------------------------------------------------------------------------------------ what is told

    def submit(self, task: EngineTask, output_tokens: int, now: float, stream: bool = False) -> None:
        """A task, and how many tokens it would generate if max_gen_length allowed (ignored for one that only fills).
        Whether it is taken is told by an event."""
        task = self.core.limits.fit(task)
        if task.generate_context_id is not None:
            output = max(1, task.forced_tokens, min(output_tokens, task.max_gen_length))
            if task.forced_tokens >= task.max_gen_length:  # nothing is left to say: it ends when its output is filled
                task = msgspec.structs.replace(task, max_gen_length=task.forced_tokens + 1)
        else:
            output = 0
        if task.key in self._jobs:
            self._catch_up(now)
        if task.key in self._jobs:
            message = f"task {task.key!r} is on this engine already"
            self._events.append(EmulatedEvent("failed", task.key, now, code="conflict", message=message))
            return
        self._jobs[task.key] = _Job(task.key, output, task.forced_tokens if output else 0, stream)
        self._arriving.append((now + self._overhead_s, task))

    def abort(self, key: Hashable, now: float) -> bool:
        """Gives a task up; no event of it comes any more. False: there is no such task."""
        self._catch_up(now)
        job = self._jobs.pop(key, None)
        if job is None:
            return False
        self._leave(job)
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
        if self.core.waits:
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
        edge = self._wake if self._wake < self._ends_at else self._ends_at
        if self._arriving and self._arriving[0][0] < edge:
            return self._arriving[0][0]
        return edge if edge < NEVER else None

    @property
    def quiet(self) -> bool:
        """The next edge is one that jumping passes over: nothing can change there. A shell that steps serves it after
        everything else of its instant."""
        if self.jumps or not self._busy or self._k >= self._last or self._events:
            return False
        edge = self._ends_at
        return self._wake > edge and (not self._arriving or self._arriving[0][0] > edge)

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
        return self._generated(job) if job is not None else 0

    def _catch_up(self, now: float) -> None:
        """Brings all to the state just before `now`: what happens at `now` itself comes behind what is told now."""
        self._pass(now, inclusive=False)
        self._skip_to(now)

    def _changed(self, now: float) -> None:
        """Something may be issued now, or at the end of the iteration under way."""
        if self.core.can_issue:
            self._wake = now
        if self._busy:
            self._look_ahead()

    def _pass(self, now: float, inclusive: bool) -> None:
        arriving = self._arriving
        while True:
            at = self._wake if self._wake < self._ends_at else self._ends_at
            arrives = bool(arriving) and arriving[0][0] <= at
            if arrives:
                at = arriving[0][0]
            if at > now or (at == now and not inclusive) or at == NEVER:
                return
            if arrives:
                self._skip_to(at)
                self._arrive(arriving.popleft()[1], at)
                self._changed(at)
            elif at == self._ends_at:
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
        self._wake = NEVER
        core = self.core
        while core.can_issue and (batch := core.next_batch(at)) is not None:
            for key in batch.preempted:
                self._leave(self._jobs[key])
            for key, cached in batch.admitted:
                self._jobs[key].cached = cached
                self._tell(EmulatedEvent("started", key, at, cached))
            if not self._busy:
                self._start(batch, at)
        if core.failed:
            for key, refusal in core.take_failed():
                self._refuse(key, refusal, at)
        self._previous = None
        if self._busy:
            self._look_ahead()

    def _start(self, batch: Batch, at: float) -> None:
        """The batch begins to be computed: as the next of its run, or as the first of a new one. Its end is looked for next."""
        self._busy = True
        if batch.fills:
            self._t0, self._run, self._k = at, DecodeRun(self.latency.duration(batch.shape), 0.0), 1
        elif batch.decoders is self._previous:
            self._k += 1
        else:
            shape = batch.shape
            if shape.decode_rows <= self._graph_rows:
                shape = shape._replace(graph=True)
            self._t0, self._run, self._k = at, self.latency.decode_run(shape), 1

    def _look_ahead(self) -> None:
        """Finds the next edge at which anything can change."""
        core, k = self.core, self._k
        last = k
        if not core.in_flight[0].fills and not self._streaming:
            ends = self._ends
            while ends and not self._is_entry(ends[0]):
                heappop(ends)
            if ends:
                last += core.decode_horizon(ends[0][0] - core.decoded) - 1
        self._last = last
        self._ends_at = self._t0 + self._run.at(last if self.jumps else k)

    def _skip_to(self, at: float, inclusive: bool = False) -> None:
        """Ends the quiet iterations whose edges lie before `at`, or at it."""
        if not self.jumps or not self._busy or self._last == self._k:
            return
        t0, run, low, high = self._t0, self._run, self._k, self._last
        k = min(max(run.after(at - t0), low), high)  # from where the first edge that stays is near
        while k < high and ((edge := t0 + run.at(k)) < at or (inclusive and edge == at)):
            k += 1
        while k > low and ((edge := t0 + run.at(k - 1)) > at or (not inclusive and edge == at)):
            k -= 1
        self._skip(k - low)

    def _skip(self, count: int) -> None:
        """Ends `count` quiet iterations."""
        if count:
            self._pass_over(self.core.in_flight[0], count)
            self.core.advance(count)
            self._k += count

    def _complete(self, at: float) -> None:
        """The edge that was looked ahead to: ends the iteration under way, and the quiet ones before it."""
        core, jobs = self.core, self._jobs
        batch = core.in_flight[0]
        quiet = self._last - self._k if self.jumps else 0
        self._pass_over(batch, quiet + 1)
        if quiet:
            core.advance(quiet)
            self._k += quiet
        ended: dict[Hashable, int] = {}
        sampled: list[_Job] = []  # jobs whose fill ends with a token
        if batch.decoders:
            self._end_decoding(batch.step, ended)
        for task, row in batch.fills:
            if row.samples and (job := jobs.get(task.key)) is not None:
                sampled.append(job)
                self._sample(job, at)
                if job.generated >= job.output:
                    ended[job.key] = job.output
        progress = core.complete(batch, ended, at)
        for key in progress.first_tokens:
            if key in jobs:
                self._tell(EmulatedEvent("first_token", key, at))
        if self._streaming or sampled:
            self._tell_progress(batch, sampled, at)
        for key in progress.finished:
            self._finish(key, at)
        for job in sampled:
            if job.key not in ended:
                self._join(job)
        self._busy, self._ends_at = False, NEVER
        self._previous = batch.decoders if not batch.fills else None
        if core.in_flight:
            self._start(core.in_flight[0], at)
        self._issue(at)

    def _pass_over(self, batch: Batch, count: int) -> None:
        """`count` iterations, the first of them the one under way, end: what the observer and the gaps see of them."""
        if self._observe is not None:
            self._note(batch, count)
        if self._coverage is not None:
            self._coverage.note(batch.shape, count - 1)
        if batch.decoders:
            self._decode(batch.step, count)

    # ----------------------------------------------------------------------------------------------- jobs that decode

    def _sample(self, job: _Job, at: float) -> None:
        """The job's fill ended with a token: its first, or one after its room was taken away for a time."""
        job.generated += 1
        if job.first_at is None:
            job.first_at = at
        elif at - job.last_at > job.max_gap_s:
            job.max_gap_s = at - job.last_at
        job.last_at = at

    def _join(self, job: _Job) -> None:
        """The job decodes from now on."""
        job.joined = self.core.decodes_after(job.key)
        job.generated -= job.joined
        job.decodes = True
        self._decoding += 1
        self._tickets += 1
        job.ticket = self._tickets
        if len(self._ends) > 2 * self._decoding + 64:
            self._ends = [entry for entry in self._ends if self._is_entry(entry)]
            heapify(self._ends)
        heappush(self._ends, (job.output - job.generated, job.ticket, job))
        self._newcomers.append(job)
        if job.stream:
            self._streaming[job.key] = job

    def _leave(self, job: _Job) -> None:
        """The job decodes no more, for now or for good."""
        if not job.decodes:
            return
        job.decodes = False
        job.generated += self.core.decoded
        if job in self._newcomers:
            self._newcomers.remove(job)
        else:
            job.last_at = self._decoded_at
            # its first gap is known already; behind it lie those of all
            job.max_gap_s = max(job.max_gap_s, self._gaps.largest_since(job.joined + 1))
        self._streaming.pop(job.key, None)
        self._decoding -= 1
        if not self._decoding:
            self._gaps.clear()

    @staticmethod
    def _is_entry(entry: tuple[int, int, _Job]) -> bool:
        return entry[2].decodes and entry[2].ticket == entry[1]

    def _generated(self, job: _Job) -> int:
        return job.generated + self.core.decoded if job.decodes else job.generated

    def _decode(self, step: int, count: int) -> None:
        """`count` iterations that decode, the first of them, `step`, the one under way, end."""
        run, last = self._run, self._k + count - 1
        if self._k == 1:
            edge = self._t0 + run.at(1)
            self._gaps.add(step, edge - self._decoded_at)
            for job in self._newcomers:
                if edge - job.last_at > job.max_gap_s:
                    job.max_gap_s = edge - job.last_at
            self._newcomers.clear()
        if last > 1:  # an iteration is never shorter than the one before it in its run
            self._gaps.add(step + count - 1, run.first_s + run.growth_s * (last - 1))
        self._decoded_at = self._t0 + run.at(last)

    def _end_decoding(self, step: int, ended: dict[Hashable, int]) -> None:
        """Adds the jobs whose last token decode iteration `step` brought."""
        ends = self._ends
        while ends and ends[0][0] <= step:
            entry = heappop(ends)
            if self._is_entry(entry):
                job = entry[2]
                ended[job.key] = job.output

    def _finish(self, key: Hashable, at: float) -> None:
        job = self._jobs.pop(key)
        self._leave(job)
        decode_s = job.last_at - job.first_at if job.first_at is not None else 0.0
        self._tell(EmulatedEvent("finished", key, at, job.cached, 0, job.output, job.prompt, decode_s, job.max_gap_s))

    def _tell_progress(self, batch: Batch, sampled: Iterable[_Job], at: float) -> None:
        """What jobs that stream have got: those that decode first, in the order in which they began to."""
        decoding = [self._jobs[task.key] for task in batch.decoders if task.key in self._streaming]
        for job in [*decoding, *sampled]:
            if job.stream:
                self._tell(EmulatedEvent("progressed", job.key, at, tokens=1))

    # ------------------------------------------------------------------------------------------------------- tell

    def _tell(self, event: EmulatedEvent) -> None:
        if self._evicted or self.core.has_evicted:
            event = event._replace(evicted=self.take_evicted())
        self._events.append(event)

    def _note(self, batch: Batch, count: int) -> None:
        """Tells the observer of `count` iterations of the run, the first of them the one under way."""
        assert self._observe is not None
        keys = tuple([task.key for task in batch.tasks])
        start, end = (self._t0 + self._run.at(k) for k in (self._k - 1, self._k + count - 1))
        self._observe(Iterations(start, end, count, batch.shape, keys))
