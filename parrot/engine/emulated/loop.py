"""Drives an emulated engine in real time: sleeps until its next edge, and tells what happened there.

Hundreds of them share one event loop. A timer that fires late shifts nothing: an engine counts from its own edges.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence

from parrot.engine.emulated.engine import EmulatedEngine
from parrot.engine.emulated.events import EmulatedEvent
from parrot.engine.emulated.output import SyntheticOutput
from parrot.engine.emulated.remote import RemoteEngine
from parrot.engine.jobs import Job
from parrot.engine.loop import MemoryUse, runtime_info
from parrot.protocol.api import SamplingConfig, refuse_chat_options
from parrot.protocol.engine import RuntimeInfo
from parrot.protocol.errors import ParrotError
from parrot.tokenizer import Tokenizer


class EmulatedLoop:
    """One emulated engine behind the interface `parrot.engine.loop.EngineLoop`."""

    def __init__(
        self, engine: EmulatedEngine | RemoteEngine, tokenizer: Tokenizer, *, stream_interval_s: float | None = None
    ) -> None:
        """Must be made inside a running event loop. `stream_interval_s`: how often running tasks stream what they have;
        None: when the batch changes. A RemoteEngine answers as an endpoint does: with text and counts, no ids."""
        self.on_evicted: Callable[[Sequence[int]], None] = lambda ids: None
        self._engine = engine
        self._output = SyntheticOutput(tokenizer)
        self._stream_interval_s = stream_interval_s
        self._loop = asyncio.get_running_loop()
        self._started = time.monotonic()
        self._jobs: dict[Hashable, Job] = {}
        self._output_keys: dict[Hashable, bytes] = {}
        self._cuts: dict[Hashable, tuple[int, int]] = {}  # of outputs with a stop string: tokens and characters before it
        self._speaking: dict[Hashable, None] = {}  # tasks that have begun to stream their output, in that order
        self._recent_s: deque[float] = deque(maxlen=64)  # seconds a token, of tasks that finished
        self._pump_soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closed = False

    def now(self) -> float:
        return time.monotonic() - self._started

    def submit(self, job: Job) -> None:
        """The output is `output_length` tokens, or all of `max_gen_length` when that is not given and no stop string comes
        before (whose own tokens then take no time)."""
        if self._closed:
            job.fail("unavailable", "the engine is shutting down")
            return
        task, sampling = job.task, job.sampling
        if sampling is not None:
            try:
                _check(sampling)
            except ParrotError as error:
                job.fail(error.code, str(error))
                return
        self._jobs[job.key] = job
        output_tokens = 0
        if sampling is not None:
            output_tokens = sampling.output_length or sampling.max_gen_length
            key = self._output_keys[job.key] = self._output.key(job.link_ids, sampling)
            if sampling.stops and sampling.output_length is None:
                cut = self._output.stopped(key, output_tokens, sampling.stops)
                if cut is not None:
                    self._cuts[job.key] = cut
                    output_tokens = max(cut[0], task.forced_tokens + 1)
        self._engine.submit(task, output_tokens, self.now())
        self._schedule()

    def abort(self, key: Hashable) -> None:
        if self._jobs.pop(key, None) is not None:
            self._output_keys.pop(key, None)
            self._cuts.pop(key, None)
            self._speaking.pop(key, None)
            self._engine.abort(key, self.now())
            self._schedule()

    def free_contexts(self, ids: Iterable[int]) -> int:
        freed = self._engine.free_contexts(ids, self.now())
        self._schedule()
        return freed

    def context_ids(self) -> list[int]:
        if isinstance(self._engine, RemoteEngine):
            return []
        return [context.id for context in self._engine.core.contexts]

    def runtime_info(self) -> RuntimeInfo:
        # Iterations that change nothing end unseen: it stands still when it is late for the next edge that matters.
        edge = self._engine.next_edge() if self._jobs else None
        stalled_s = 0.0 if edge is None else max(0.0, self.now() - edge)
        if isinstance(self._engine, RemoteEngine):
            mean_s = sum(self._recent_s) / len(self._recent_s) if self._recent_s else 0.0
            in_flight = self._engine.in_flight
            return RuntimeInfo(
                num_running_jobs=in_flight, num_total_jobs=len(self._jobs), recent_average_latency=mean_s, stalled_s=stalled_s
            )
        return runtime_info(self._engine.core, MemoryUse(), self._recent_s, stalled_s)

    async def close(self, reason: str) -> None:
        self._closed = True
        for handle in (self._pump_soon, self._timer):
            if handle is not None:
                handle.cancel()
        for job in self._jobs.values():
            job.fail("unavailable", reason, retryable=True)
        self._jobs.clear()
        self._output_keys.clear()
        self._cuts.clear()

    # --------------------------------------------------------------------------------------------------------- the edges

    def _schedule(self) -> None:
        """Everything that comes in this turn of the event loop is handled once, at its end."""
        if self._pump_soon is None and not self._closed:
            self._pump_soon = self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_soon = None
        now = self.now()
        events = self._engine.advance(now)
        if events:
            ended = {e.key for e in events if e.kind == "finished"}
            for event in events:
                self._tell(event, event.key in ended)
        if self._stream_interval_s is not None:
            for key in self._speaking:
                self._show(self._jobs[key], self._engine.generated(key, now))
        self._sleep()

    def _sleep(self) -> None:
        edge = self._engine.next_edge()
        if edge is not None and self._stream_interval_s is not None and self._speaking:
            edge = min(edge, self.now() + self._stream_interval_s)
        if self._timer is not None:
            if edge is not None and edge == self._timer_at:
                return
            self._timer.cancel()
            self._timer = None
        if edge is not None:
            self._timer_at = edge
            self._timer = self._loop.call_later(max(0.0, edge - self.now()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self._pump_soon is None:
            self._pump()

    # -------------------------------------------------------------------------------------------------------- the events

    def _tell(self, event: EmulatedEvent, ends_now: bool) -> None:
        if event.evicted:
            self.on_evicted(event.evicted)
        job = self._jobs.get(event.key)
        if job is None:
            return
        match event.kind:
            case "started":
                job.start(event.cached_tokens)
            case "first_token" if not ends_now:  # else the whole output is one event
                self._speaking[event.key] = None
                self._show(job, job.task.forced_tokens + 1)
            case "finished":
                ids, text = self._said(job, event.output_tokens)
                if event.output_tokens > 1:
                    self._recent_s.append(event.decode_s / (event.output_tokens - 1))
                reason = "stop_str" if event.key in self._cuts else "length"
                if isinstance(self._engine, RemoteEngine):
                    times = (event.decode_s, event.max_gap_s)
                    job.finish_text(text, reason, event.prompt_tokens, event.output_tokens, 0.0, times=times)
                else:
                    job.finish_timed(ids, text, reason, event.decode_s, event.max_gap_s)
            case "rejected" | "failed":
                job.refuse(event.code, event.message)
        if job.ended:
            del self._jobs[event.key]
            self._output_keys.pop(event.key, None)
            self._cuts.pop(event.key, None)
            self._speaking.pop(event.key, None)

    def _show(self, job: Job, n_tokens: int) -> None:
        ids, text = self._said(job, n_tokens)
        job.show(() if isinstance(self._engine, RemoteEngine) else ids, text)

    def _said(self, job: Job, n_tokens: int) -> tuple[tuple[int, ...], str]:
        """The first tokens of the job's output. Another attempt at the same task says the same."""
        if n_tokens == 0:
            return (), ""
        kept, characters = self._cuts.get(job.key, (n_tokens, None))
        ids = self._output.ids(self._output_keys[job.key], min(n_tokens, kept))
        return ids, self._output.text(ids)[:characters]


def _check(sampling: SamplingConfig) -> None:
    """Raises `bad_sampling` for what has no meaning without a model."""
    refuse_chat_options(sampling)
    if sampling.logprobs is not None:
        message = "sampling_config.logprobs: an emulated engine computes no probabilities"
        raise ParrotError("bad_sampling", message, field="logprobs")
