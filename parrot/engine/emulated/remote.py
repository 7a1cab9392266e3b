"""A remote endpoint that only passes time: rate limits say when a request is sent, a RemoteModel how long it takes. As the
engine of `parrot.engine.openai` it sends each prompt whole, keeps no contexts and has at most `tasks_capacity` requests.

The time to the first token follows from the load at which a request is sent, its own place included. After that tokens come
at the rate of the load at every moment, the same for all requests, so that one clock counts tokens for all of them: a request
of n tokens more ends when that clock has gone n further. A request is in flight until its stream has ended.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from heapq import heappop, heappush
from typing import Final

from parrot.engine.batches import EngineTask
from parrot.engine.emulated.events import EmulatedEvent, Kind
from parrot.engine.emulated.jobs import Gap, largest_since, with_gap
from parrot.engine.emulated.timed import NEVER, TimedEngine
from parrot.engine.rate_limits import RateLimits
from parrot.remote_latency import RemoteCoverage, RemoteModel, quantile

LEAST_TPOT_S: Final = 1e-9  #: a profile may say that tokens take no time; the clock that counts them needs some

QUEUED: Final = 0  # behind others, or for the rate limits
SENT: Final = 1
DECODING: Final = 2
ENDING: Final = 3  # it has its last token, and its stream has not ended


class _Request:
    """A task on its way. `stretch`: its own deviation from the time a token, by which its tokens count."""

    __slots__ = (
        "alive", "decode_s", "first_at", "forced", "from_count", "joined", "key", "limit_tokens", "max_gap_s", "output",
        "prompt", "state", "stretch",
    )  # fmt: skip

    def __init__(self, key: Hashable, prompt: int, output: int, forced: int, limit_tokens: int) -> None:
        self.key = key
        self.prompt = prompt
        self.output = output  # in all, forced ones included; 0: it only fills
        self.forced = forced
        self.limit_tokens = limit_tokens  # as the limit on tokens counts it
        self.state = QUEUED
        self.alive = True
        self.stretch = 1.0
        self.first_at = 0.0
        self.from_count = 0.0  # of the clock of tokens, at its first
        self.joined = 0
        self.decode_s = 0.0
        self.max_gap_s = 0.0


class RemoteEngine(TimedEngine):
    """Requests to one endpoint, in anybody's time."""

    def __init__(
        self,
        model: RemoteModel,
        limits: RateLimits,
        *,
        tasks_capacity: int,
        largest_task: int,
        coverage: RemoteCoverage | None = None,
        draw: Callable[[], float] | None = None,
    ) -> None:
        """largest_task: prompt and output, tokens. coverage: told of each request. draw: uniform numbers from 0 to 1, of which
        each request's own deviation is made; without, requests take what the model says."""
        super().__init__(True)
        self.model = model
        self.in_flight = 0  #: requests sent, whose streams have not ended
        self._limits = limits
        self._capacity = tasks_capacity
        self._largest_task = largest_task
        self._coverage = coverage
        self._draw = draw
        self._overhead_s = model.profile.task_overhead_s
        self._requests: dict[Hashable, _Request] = {}
        self._events: list[EmulatedEvent] = []
        self._arriving: deque[tuple[float, _Request]] = deque()
        self._queue: deque[_Request] = deque()
        self._turn_at = NEVER  # when the first of the queue may be sent
        self._timers: list[tuple[float, int, _Request]] = []  # heap: first tokens, and ends of streams
        self._tickets = 0
        # The clock of tokens: it stood at `_count` when it was `_count_at`, and goes on by one in `_tpot_s`.
        self._count = 0.0
        self._count_at = 0.0
        self._tpot_s = LEAST_TPOT_S
        self._goals: list[tuple[float, int, _Request]] = []  # heap: where it stands at a request's last token
        self._decoding = 0
        self._gaps: Gap | None = None
        self._changes = 0  # how often the time a token may have changed

    # ------------------------------------------------------------------------------------------------ what is told

    def submit(self, task: EngineTask, output_tokens: int, now: float) -> None:
        self._catch_up(now)
        if task.key in self._requests:
            message = f"task {task.key!r} is on this engine already"
            self._events.append(EmulatedEvent("failed", task.key, now, code="conflict", message=message))
            return
        task = task.fitted(self._largest_task)
        prompt = 0
        for link in task.links:
            prompt += link.tokens
        output = 0
        if task.generate_context_id is not None:
            output = max(1, task.forced_tokens, min(output_tokens, task.max_gen_length))
        request = _Request(task.key, prompt, output, task.forced_tokens if output else 0, prompt + task.max_gen_length)
        self._requests[task.key] = request
        self._arriving.append((now + self._overhead_s, request))

    def abort(self, key: Hashable, now: float) -> bool:
        self._catch_up(now)
        request = self._requests.pop(key, None)
        if request is None:
            return False
        if request.state == QUEUED:
            self._arriving = deque([entry for entry in self._arriving if entry[1] is not request])
            self._queue = deque([other for other in self._queue if other is not request])
            self._next_turn(now)
        else:
            request.alive = False  # its timers are passed over
            if request.state == DECODING:
                self._leave()
            self._change_load(now, -1)
        self._events = [event for event in self._events if event.key != key]
        return True

    def free_contexts(self, ids: Iterable[int], now: float) -> int:
        """It keeps none."""
        return 0

    # ------------------------------------------------------------------------------------------------------- time

    @property
    def edge_s(self) -> float:
        return self._events[0].at if self._events else self._next()

    @property
    def quiet(self) -> bool:
        return False

    def advance(self, now: float) -> list[EmulatedEvent]:
        self._pass(now, inclusive=True)
        events, self._events = self._events, []
        return events

    def generated(self, key: Hashable, now: float) -> int:
        self._catch_up(now)
        request = self._requests.get(key)
        if request is None:
            return 0
        if request.state != DECODING:
            return request.output if request.state == ENDING else request.forced
        tokens = (self._count_now(now) - request.from_count) / request.stretch
        return min(request.output, request.forced + 1 + int(tokens + 1e-9))

    def _catch_up(self, now: float) -> None:
        """Brings all to the state just before `now`: what happens at `now` itself comes behind what is told now."""
        self._pass(now, inclusive=False)

    def _next(self) -> float:
        """When the next thing happens by itself."""
        at = self._turn_at
        if self._arriving and self._arriving[0][0] < at:
            at = self._arriving[0][0]
        while self._timers and not self._timers[0][2].alive:
            heappop(self._timers)
        if self._timers and self._timers[0][0] < at:
            at = self._timers[0][0]
        goal_at = self._goal_at()
        return goal_at if goal_at < at else at

    def _goal_at(self) -> float:
        """When the next last token comes, if the load stays as it is."""
        goals = self._goals
        while goals and not goals[0][2].alive:
            heappop(goals)
        if not goals:
            return NEVER
        left = goals[0][0] - self._count
        return self._count_at + left * self._tpot_s if left > 0.0 else self._count_at

    def _pass(self, now: float, inclusive: bool) -> None:
        while True:
            at = self._next()
            if at > now or (at == now and not inclusive) or at == NEVER:
                return
            # What arrives at an edge comes before it; what ends at one is not in flight any more for what is sent there.
            if self._arriving and self._arriving[0][0] <= at:
                self._arrive(self._arriving.popleft()[1], at)
            elif self._timers and self._timers[0][0] <= at:
                self._on_timer(heappop(self._timers)[2], at)
            elif self._goal_at() <= at:
                self._last_token(heappop(self._goals)[2], at)
            else:
                self._send(self._queue.popleft(), at)

    # --------------------------------------------------------------------------------------------------- a request

    def _arrive(self, request: _Request, at: float) -> None:
        if not request.output:  # the text is kept by who asked
            del self._requests[request.key]
            self._events.append(EmulatedEvent("started", request.key, at))
            self._events.append(EmulatedEvent("finished", request.key, at, prompt_tokens=request.prompt))
            return
        others = len(self._requests) - len(self._arriving) - 1
        if others >= self._capacity:
            message = f"{others} requests are in flight; tasks_capacity is {self._capacity}"
            self._refuse(request, "rejected", "engine_rejected", message, at)
        elif request.prompt >= self._largest_task:
            message = f"a prompt of {request.prompt} tokens leaves no room in the {self._largest_task} that a request may have"
            self._refuse(request, "failed", "task_too_large", message, at)
        else:
            self._queue.append(request)
            if len(self._queue) == 1:
                self._next_turn(at)

    def _refuse(self, request: _Request, kind: Kind, code: str, message: str, at: float) -> None:
        del self._requests[request.key]
        self._events.append(EmulatedEvent(kind, request.key, at, code=code, message=message))

    def _next_turn(self, now: float) -> None:
        """Finds out when the first of the queue may be sent."""
        self._turn_at = self._limits.ready_at(self._queue[0].limit_tokens, now) if self._queue else NEVER

    def _send(self, request: _Request, at: float) -> None:
        self._limits.take(request.limit_tokens, at)
        self._next_turn(at)
        self._change_load(at, 1)
        request.state = SENT
        prompt = request.prompt + request.forced  # what was said already is sent along
        if self._coverage is not None:
            self._coverage.note(prompt, self.in_flight)
        ttft_s = self.model.ttft(prompt, self.in_flight)
        if self._draw is not None:
            profile = self.model.profile
            ttft_s *= math.exp(quantile(profile.ttft_residuals, self._draw()))
            request.stretch = math.exp(quantile(profile.tpot_residuals, self._draw()))
        self._events.append(EmulatedEvent("started", request.key, at))
        self._set_timer(at + ttft_s, request)

    def _on_timer(self, request: _Request, at: float) -> None:
        if request.state == SENT:
            self._first_token(request, at)
        else:
            self._end(request, at)

    def _first_token(self, request: _Request, at: float) -> None:
        request.first_at = at
        self._events.append(EmulatedEvent("first_token", request.key, at))
        tokens = request.output - request.forced - 1
        if tokens <= 0:
            self._ended(request, at)
            return
        self._count, self._count_at = self._count_now(at), at
        request.state = DECODING
        request.from_count = self._count
        request.joined = self._changes
        self._decoding += 1
        self._note_gap()
        self._tickets += 1
        heappush(self._goals, (self._count + tokens * request.stretch, self._tickets, request))

    def _last_token(self, request: _Request, at: float) -> None:
        self._count, self._count_at = self._count_now(at), at
        request.decode_s = at - request.first_at
        request.max_gap_s = largest_since(self._gaps, request.joined) * request.stretch
        self._leave()
        self._ended(request, at)

    def _ended(self, request: _Request, at: float) -> None:
        """It has its last token; its stream ends a little later."""
        request.state = ENDING
        self._set_timer(at + self.model.end_s, request)

    def _end(self, request: _Request, at: float) -> None:
        del self._requests[request.key]
        self._change_load(at, -1)
        self._events.append(
            EmulatedEvent(
                "finished",
                request.key,
                at,
                output_tokens=request.output,
                prompt_tokens=request.prompt,
                decode_s=request.decode_s,
                max_gap_s=request.max_gap_s,
            )
        )

    def _set_timer(self, at: float, request: _Request) -> None:
        self._tickets += 1
        heappush(self._timers, (at, self._tickets, request))

    # ---------------------------------------------------------------------------------------------------- the load

    def _count_now(self, at: float) -> float:
        return self._count + (at - self._count_at) / self._tpot_s if self._decoding else self._count

    def _change_load(self, at: float, by: int) -> None:
        self._count, self._count_at = self._count_now(at), at
        self.in_flight += by
        self._tpot_s = max(LEAST_TPOT_S, self.model.tpot(self.in_flight))
        if self._decoding:
            self._note_gap()

    def _note_gap(self) -> None:
        self._changes += 1
        self._gaps = with_gap(self._gaps, self._changes, self._tpot_s)

    def _leave(self) -> None:
        """One request decodes no more."""
        self._decoding -= 1
        if not self._decoding:
            self._gaps = None
            self._goals.clear()
            self._count = 0.0
