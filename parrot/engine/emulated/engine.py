"""An engine that only passes time: EngineCore decides, a LatencyModel says how long each iteration takes. No clock here:
the shell (SimPy, or asyncio in real time) says what time it is, and asks when to come again.

Edge k of a run of iterations lies at t0 + D(k). t0 moves only when the composition of the batch changes, never at an
interruption that changes nothing; what arrives at an edge comes before it. Hence stepping (every iteration an edge) and
jumping (only iterations after which something can change) give the same events at the same times, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from parrot.engine.batches import Batch, EngineLimits, EngineTask, Refused
from parrot.engine.core import EngineCore
from parrot.engine.emulated.events import EmulatedEvent, Iterations, Kind
from parrot.engine.emulated.jobs import Decoding, Job
from parrot.engine.emulated.timed import NEVER, TimedEngine
from parrot.engine.running import ENDED, Task
from parrot.latency import Coverage, DecodeRun, LatencyModel

__all__ = ["EmulatedEngine", "EmulatedEvent", "Iterations"]


class EmulatedEngine(TimedEngine):
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
        super().__init__(jump)
        self.core = EngineCore(limits, numbered=False)
        self.latency = latency
        self._observe = observe
        self._coverage = coverage
        self._arriving: tuple[Job, ...] = ()
        self._arriving_s = NEVER  # when the first of them is there
        self._events: list[EmulatedEvent] | None = None  # to be told
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
        self._decoding = Decoding()

    # ------------------------------------------------------------------------------------------------ what is told

    def submit(self, task: EngineTask, output_tokens: int, now: float, stream: bool = False) -> None:
        """A task, and how many tokens it would generate if max_gen_length allowed (ignored for one that only fills).
        Whether it is taken is told by an event."""
        task = task.fitted(self.core.largest_task)
        if task.generate_context_id is not None:
            output = max(max(1, task.forced_tokens), min(output_tokens, task.max_gen_length))
            if task.forced_tokens >= task.max_gen_length:  # nothing is left to say: it ends when its output is filled
                task = task.with_most(task.forced_tokens + 1)
        else:
            output = 0
        if self._job(task.key) is not None:
            self._catch_up(now)
        if self._job(task.key) is not None:
            message = f"task {task.key!r} is on this engine already"
            self._add(EmulatedEvent("failed", task.key, now, code="conflict", message=message))
            return
        job = Job(task, output, stream, now + self.latency.task_overhead_s)
        if not self._arriving:
            self._arriving_s = job.arrives_at
        self._arriving = (*self._arriving, job)

    def abort(self, key: Hashable, now: float) -> bool:
        """Gives a task up; no event of it comes any more. False: there is no such task."""
        self._catch_up(now)
        job = self._job(key)
        if job is None:
            return False
        self._decoding.leave(job)
        if not self.core.abort(key):
            self._arriving = tuple([other for other in self._arriving if other is not job])
            self._arriving_s = self._arriving[0].arrives_at if self._arriving else NEVER
        if self._events is not None:
            for event in self._events:
                if event.key == key:
                    self._evicted += event.evicted
            self._events = [event for event in self._events if event.key != key] or None
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

    @property
    def edge_s(self) -> float:
        if self._events is not None:
            return self._events[0].at
        edge = self._wake if self._wake < self._ends_at else self._ends_at
        return self._arriving_s if self._arriving_s < edge else edge

    @property
    def quiet(self) -> bool:
        """The next edge is one that jumping passes over: nothing can change there. A shell that steps serves it after
        everything else of its instant."""
        if self.jumps or not self._busy or self._k >= self._last or self._events is not None:
            return False
        return self._wake > self._ends_at and self._arriving_s > self._ends_at

    def advance(self, now: float) -> list[EmulatedEvent]:
        """Everything up to `now`, in order."""
        self._pass(now, inclusive=True)
        self._skip_to(now, inclusive=True)
        events, self._events = self._events, None
        return [] if events is None else events

    def generated(self, key: Hashable, now: float) -> int:
        """Tokens of the output that exist at `now` (forced ones included); 0 for an unknown task."""
        self._catch_up(now)
        job = self._job(key)
        return 0 if job is None else self.core.known(job)

    def _job(self, key: Hashable) -> Job | None:
        """The task, here or about to arrive."""
        for job in self._arriving:
            if job.key == key:
                return job
        task = self.core.task(key)
        return None if task is None else _job_of(task)

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
        while True:
            at = self._wake if self._wake < self._ends_at else self._ends_at
            arrives = self._arriving_s <= at
            if arrives:
                at = self._arriving_s
            if at > now or (at == now and not inclusive) or at == NEVER:
                return
            if arrives:
                self._skip_to(at)
                job, self._arriving = self._arriving[0], self._arriving[1:]
                self._arriving_s = self._arriving[0].arrives_at if self._arriving else NEVER
                self._arrive(job, at)
                self._changed(at)
            elif at == self._ends_at:
                self._complete(at)
            else:
                self._skip_to(at)
                self._issue(at)

    # ------------------------------------------------------------------------------------------------- iterations

    def _arrive(self, job: Job, at: float) -> None:
        try:
            self.core.enter(job)
        except Refused as refusal:
            self._refuse(job.key, refusal, at)

    def _refuse(self, key: Hashable, refusal: Refused, at: float) -> None:
        kind: Kind = "rejected" if refusal.code == "engine_rejected" else "failed"
        self._tell(EmulatedEvent(kind, key, at, code=refusal.code, message=refusal.message))

    def _issue(self, at: float) -> None:
        """Issues what the core has, as far ahead as it may."""
        self._wake = NEVER
        core = self.core
        while core.can_issue and (batch := core.next_batch(at)) is not None:
            for key in batch.preempted:
                if (job := self._job(key)) is not None:
                    self._decoding.leave(job)
            for task in batch.begun:
                self._tell(EmulatedEvent("started", task.key, at, task.cached))
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
            graph = shape.decode_rows <= self.latency.graph_rows
            self._t0, self._run, self._k = at, self.latency.decode_run(shape, graph), 1

    def _look_ahead(self) -> None:
        """Finds the next edge at which anything can change."""
        core, k = self.core, self._k
        last = k
        if not core.in_flight[0].fills and not self._decoding.streaming:
            end = core.next_end()
            if end:
                last += core.decode_horizon(end - core.decoded) - 1
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
        core, decoding = self.core, self._decoding
        batch = core.in_flight[0]
        quiet = self._last - self._k if self.jumps else 0
        self._pass_over(batch, quiet + 1)
        if quiet:
            core.advance(quiet)
            self._k += quiet
        ended: dict[Task, int] = {}
        sampled: list[Job] = []
        if batch.decoders:
            for task in core.ending(batch.step):
                ended[task] = task.expected
        for row in batch.fills:
            if row.samples and row.task.state != ENDED:
                job = _job_of(row.task)
                sampled.append(job)
                job.sampled(at)
                if job.known + 1 >= job.expected:
                    ended[job] = job.expected
        progress = core.complete_tasks(batch, ended)
        for task in progress.begun:
            self._tell(EmulatedEvent("first_token", task.key, at))
        if decoding.streaming or sampled:
            self._tell_progress(batch, sampled, at)
        for task in progress.ended:
            self._finish(_job_of(task), at)
        for job in sampled:
            if job not in ended:
                decoding.join(job)
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
            self._decoding.went(batch.step, count, self._run, self._t0, self._k)

    def _finish(self, job: Job, at: float) -> None:
        self._decoding.leave(job)
        decode_s = job.last_at - job.first_at if job.first_at >= 0.0 else 0.0
        told = EmulatedEvent("finished", job.key, at, job.cached, 0, job.expected, job.prompt, decode_s, job.max_gap_s)
        self._tell(told)

    def _tell_progress(self, batch: Batch, sampled: list[Job], at: float) -> None:
        """What jobs that stream have got: those that decode first, in the order in which they began to."""
        if self._decoding.streaming:
            for task in batch.decoders:
                job = _job_of(task)
                if job.stream and job.decodes:
                    self._tell(EmulatedEvent("progressed", job.key, at, tokens=1))
        for job in sampled:
            if job.stream:
                self._tell(EmulatedEvent("progressed", job.key, at, tokens=1))

    # ------------------------------------------------------------------------------------------------------- tell

    def _tell(self, event: EmulatedEvent) -> None:
        if self._evicted or self.core.has_evicted:
            event.evicted = self.take_evicted()
        self._add(event)

    def _add(self, event: EmulatedEvent) -> None:
        if self._events is None:
            self._events = []
        self._events.append(event)

    def _note(self, batch: Batch, count: int) -> None:
        """Tells the observer of `count` iterations of the run, the first of them the one under way."""
        assert self._observe is not None
        keys = tuple([task.key for task in batch.tasks])
        start, end = self._t0 + self._run.at(self._k - 1), self._t0 + self._run.at(self._k + count - 1)
        self._observe(Iterations(start, end, count, batch.shape, keys))


def _job_of(task: Task) -> Job:
    """The core's task, which this engine made."""
    assert isinstance(task, Job)
    return task
