"""The SimPy shell: a cluster in virtual time around one ServeCore, with simulated engines.

It carries events to the core and effects to engines and clients, as the asyncio shell does over HTTP; it decides nothing
about scheduling. All events of an instant go to one `handle` call: the first of them schedules a flush that comes after the
rest. (Clients' come before the engines' edges of the same instant, because what arrives at an edge comes before it; the
edges' own events go together.) Nothing here waits in a process: an idle client, engine or core costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any, NamedTuple

import simpy

from parrot.engine.core import EngineLimits, EngineTask, Link
from parrot.engine.emulated.engine import EmulatedEngine, EmulatedEvent
from parrot.latency import LatencyModel, LatencyProfile
from parrot.protocol.api import SessionReport
from parrot.protocol.engine import EngineDescription, TaskId
from parrot.protocol.errors import ERRORS, ErrorInfo, ParrotError
from parrot.serve import effects, events
from parrot.serve.config import ServeCoreConfig
from parrot.serve.core import ServeCore
from sim.engines import SimEngine

AUTH = "simulated"
NORMAL = 1
FLUSH = 2  #: SimPy priority: after all clients of the instant (urgent 0, normal 1), before the engines' edges (3)
FLUSH_EDGES = 3.5  #: after all engines' edges, before those at which nothing happens (4, only when stepping)

OnReply = Callable[[Any, ErrorInfo | None], None]
Observe = Callable[[str, Any], None]  #: engine name, what the engine shows of each iteration or run of iterations


class OutOfRange(Exception):
    """An iteration left the range that its profile has seen, in a strict run. The message says which and how far."""


class EngineModel(NamedTuple):
    """An engine as the simulator needs it. `factor` multiplies every duration that its profile says."""

    description: EngineDescription
    limits: EngineLimits
    profile: LatencyProfile
    factor: float = 1.0


class Timeline(simpy.Environment):
    """SimPy's environment, with callbacks at absolute times beside its events.

    They arrive exactly (now + (t − now) may not be t) and cost a third of an event.
    """

    def call_at(self, time_s: float, callback: Callable[[], object], priority: float = NORMAL) -> None:
        """Calls `callback` at `time_s`, or now when that has passed."""
        now = self._now
        heappush(self._queue, (time_s if time_s > now else now, priority, next(self._eid), callback))  # type: ignore[misc]

    def step(self) -> None:
        """As SimPy's, for both kinds of entry."""
        if self._queue and not isinstance(self._queue[0][3], simpy.Event):
            self._now, _, _, callback = heappop(self._queue)
            callback()
        else:
            super().step()

    def run_until(self, finished: Callable[[], bool]) -> bool:
        """Steps until `finished()` or, with False as the answer, until nothing is left to happen."""
        queue, event_type = self._queue, simpy.Event
        while not finished():
            if not queue:
                return False
            if isinstance(queue[0][3], event_type):
                super().step()
            else:
                self._now, _, _, callback = heappop(queue)
                callback()
        return True


_Key = tuple[TaskId, int]  #: a task and the number of the attempt: the engine's key of it


class _Attempt(NamedTuple):
    """What the shell keeps of a dispatch until its end."""

    epoch: int
    output_var: str


class Cluster:
    """One ServeCore and its engines; `engine_delay_s` lies between core and engines, each way."""

    def __init__(
        self,
        timeline: Timeline,
        config: ServeCoreConfig,
        engines: Sequence[EngineModel],
        *,
        engine_delay_s: float = 0.0,
        jump: bool = True,
        observe: Observe | None = None,
    ) -> None:
        self.timeline = timeline
        self.core = ServeCore(config)
        self.engines: dict[int, SimEngine] = {}
        self._tokenizers = tuple(dict.fromkeys(model.description.tokenizer for model in engines))
        self._delay_s = engine_delay_s
        self._waiting: dict[int, OnReply] = {}
        self._requests = 0
        self._pending: list[events.AnyEvent] = []
        self._flushing = False
        self._timer_s = float("inf")
        self._lengths: dict[int, dict[str, int]] = {}
        self._output_keys: dict[int, dict[str, str]] = {}
        self._attempts: dict[_Key, _Attempt] = {}
        self._carry: dict[type, Callable[[Any], None]] = {
            effects.Reply: self._reply,
            effects.Dispatch: self._dispatch,
            effects.Abort: self._abort,
            effects.FreeContexts: self._free,
            effects.SessionEnded: self._session_ended,
            effects.TaskEnded: lambda effect: None,
        }
        for model in engines:
            self._register(model, jump, observe)
        self._flush()

    # ------------------------------------------------------------------------------------------------ for clients

    def expect(self, on_reply: OnReply) -> int:
        """A new request number, whose answer goes to `on_reply(payload, error)`."""
        self._requests += 1
        self._waiting[self._requests] = on_reply
        return self._requests

    def post(self, event: events.AnyEvent, priority: float = FLUSH) -> None:
        """Hands the core an event of this instant, with the others of it."""
        self._pending.append(event)
        if not self._flushing:
            self._flushing = True
            self.timeline.call_at(self.timeline.now, self._flush, priority)

    def content(self, key: str, tokens: int) -> events.Content:
        """A text of `tokens` tokens under every tokenizer of the cluster."""
        lengths = self._lengths.get(tokens)
        if lengths is None:
            lengths = self._lengths[tokens] = dict.fromkeys(self._tokenizers, tokens)
        return events.Content(key, lengths)

    def name_output(self, session_id: int, var_id: str, key: str) -> None:
        """What engines generate into that variable has this content key."""
        self._output_keys.setdefault(session_id, {})[var_id] = key

    def report(self, session_id: int) -> SessionReport | None:
        """The session with its calls, None when it is gone."""
        try:
            return self.core.session_report(session_id, self.timeline.now, calls=True)
        except ParrotError:
            return None

    # --------------------------------------------------------------------------------------------------- the core

    def _flush(self) -> None:
        """Hands the instant's events to the core, then what follows from them in no time, until nothing more does."""
        now = self.timeline.now
        self._flushing = True
        carry = self._carry
        while self._pending:
            batch, self._pending = self._pending, []
            for effect in self.core.handle(batch, now):
                carry[type(effect)](effect)
            for fault in self.core.scheduler.faults and self.core.take_faults():
                raise fault.error  # a simulation stops where a server would log and go on
        self._flushing = False
        deadline_s = self.core.next_deadline()
        if deadline_s is not None and deadline_s < self._timer_s:
            self._set_timer(deadline_s)

    def _set_timer(self, deadline_s: float) -> None:
        self._timer_s = deadline_s
        self.timeline.call_at(deadline_s, functools.partial(self._tick, deadline_s))

    def _tick(self, due_s: float) -> None:
        if due_s != self._timer_s:
            return  # an earlier deadline took this timer's place
        self._timer_s = float("inf")
        deadline_s = self.core.next_deadline()
        if deadline_s is not None and deadline_s > self.timeline.now:
            self._set_timer(deadline_s)
        elif deadline_s is not None:
            self.post(events.Tick())

    def _reply(self, effect: effects.Reply) -> None:
        on_reply = self._waiting.pop(effect.request, None)
        if on_reply is not None:
            on_reply(effect.payload, effect.error)

    def _session_ended(self, effect: effects.SessionEnded) -> None:
        self._output_keys.pop(effect.session_id, None)

    # ------------------------------------------------------------------------------------------------- the engines

    def _register(self, model: EngineModel, jump: bool, observe: Observe | None) -> None:
        watch = functools.partial(observe, model.description.engine_name) if observe else None
        emulated = EmulatedEngine(model.limits, LatencyModel(model.profile, model.factor), jump=jump, observe=watch)

        def registered(answer: Any, error: ErrorInfo | None) -> None:
            if error is not None:
                raise ParrotError.of(error)
            deliver = functools.partial(self._from_engine, answer.engine_id)
            self.engines[answer.engine_id] = SimEngine(self.timeline, emulated, deliver)

        self._pending.append(events.RegisterEngine(self.expect(registered), model.description))

    def _to_engine(self, action: Callable[[], Any]) -> None:
        if self._delay_s:
            self.timeline.call_at(self.timeline.now + self._delay_s, action)
        else:
            action()

    def _dispatch(self, effect: effects.Dispatch) -> None:
        key = (effect.task, effect.attempt)
        sampling = effect.sampling
        self._attempts[key] = _Attempt(effect.epoch, effect.output_var)
        task = EngineTask(
            key=key,
            links=tuple([Link(link.context_id, link.tokens) for link in effect.chain]),
            generate_context_id=effect.generate_context_id,
            max_gen_length=sampling.max_gen_length,
        )
        output_tokens = sampling.output_length or sampling.max_gen_length
        self._to_engine(functools.partial(self.engines[effect.engine_id].submit, task, output_tokens))

    def _abort(self, effect: effects.Abort) -> None:
        key = (effect.task, effect.attempt)
        self._attempts.pop(key, None)
        self._to_engine(functools.partial(self.engines[effect.engine_id].abort, key))

    def _free(self, effect: effects.FreeContexts) -> None:
        self._to_engine(functools.partial(self.engines[effect.engine_id].free_contexts, effect.context_ids))

    def _from_engine(self, engine_id: int, emulated: Sequence[EmulatedEvent]) -> None:
        if self._delay_s:
            arrive = functools.partial(self._deliver, engine_id, emulated)
            self.timeline.call_at(self.timeline.now + self._delay_s, arrive)
        else:
            self._deliver(engine_id, emulated)

    def _deliver(self, engine_id: int, emulated: Sequence[EmulatedEvent]) -> None:
        """An engine's events in the core's terms. Those of an attempt that was given up go no further."""
        for event in emulated:
            if event.evicted:
                self.post(events.ContextsEvicted(engine_id, event.evicted), FLUSH_EDGES)
            key: _Key = event.key  # type: ignore[assignment]
            attempt = self._attempts.get(key)
            if attempt is not None:
                self.post(self._told(event, key, attempt), FLUSH_EDGES)

    def _told(self, event: EmulatedEvent, key: _Key, attempt: _Attempt) -> events.AnyEvent:
        task, number = key
        kind, epoch = event.kind, attempt.epoch
        if kind == "finished":
            del self._attempts[key]
            content_key = self._output_keys[task.session_id][attempt.output_var]
            return events.TaskFinished(
                epoch,
                task,
                number,
                self.content(content_key, event.output_tokens),
                event.output_tokens,
                event.prompt_tokens,
                event.cached_tokens,
                event.decode_s,
                event.max_gap_s,
            )
        if kind == "first_token":
            return events.FirstToken(epoch, task, number)
        if kind == "started":
            return events.TaskStarted(epoch, task, number, event.cached_tokens)
        del self._attempts[key]
        if kind == "rejected":
            return events.TaskRejected(epoch, task, number, event.message)
        assert kind == "failed", f"an emulated engine tells {kind!r} to nobody who asked for it"
        return events.TaskFailed(epoch, task, number, event.code, event.message, ERRORS[event.code].retryable)
