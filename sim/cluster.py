"""The SimPy shell: a cluster in virtual time around one ServeCore, with simulated engines.

It carries events to the core and effects to engines and clients, as the asyncio shell does over HTTP; it decides nothing
about scheduling. All events of an instant go to one `handle` call: the first of them schedules a flush that comes after the
rest. (Clients' come before the engines' edges of the same instant, because what arrives at an edge comes before it; the
edges' own events go together.) Nothing here waits in a process: an idle client, engine or core costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

from mypy_extensions import mypyc_attr

from parrot.engine.core import EngineTask, Link
from parrot.engine.emulated.events import EmulatedEvent
from parrot.engine.emulated.timed import TimedEngine
from parrot.protocol.api import SessionReport
from parrot.protocol.engine import TaskId
from parrot.protocol.errors import ERRORS, ErrorInfo, ParrotError
from parrot.serve import effects, events
from parrot.serve.config import ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.fault import PolicyFault
from parrot.serve.graph import Call
from sim.engine_models import EngineModel, EngineProfiles, Observe
from sim.engines import SimEngine
from sim.model_types import ModelTypes
from sim.recorder import Recorder
from sim.slots import Slots
from sim.timeline import Timeline

AUTH: Final = "simulated"
FLUSH: Final = 2  #: SimPy priority: after all clients of the instant (urgent 0, normal 1), before the engines' edges (3)
FLUSH_EDGES: Final = 3.5  #: after all engines' edges, before those at which nothing happens (4, only when stepping)

KEPT_LENGTHS: Final = 65_536  #: contents of the same length share what says it, up to so many tokens

_SLOT_BITS: Final = 24  # of a request's number: the last ones are the slot of its asker, the others count
_SLOTS: Final = 1 << _SLOT_BITS

# By names of this module's own that never change: the compiled module need not look up what each effect is.
_REPLY: Final = effects.Reply
_TASK_ENDED: Final = effects.TaskEnded
_TASK_STARTED: Final = events.TaskStarted
_FIRST_TOKEN: Final = events.FirstToken
_TASK_FINISHED: Final = events.TaskFinished
_CONTENT: Final = events.Content
_CONTEXTS_EVICTED: Final = events.ContextsEvicted

OnReply = Callable[[Any, ErrorInfo | None], None]  #: called with payload and error
#: The tokens that an engine generates for a dispatch, and what gives the content of as many of them as it did generate.
Generate = Callable[[effects.Dispatch], tuple[int, Callable[[int], events.Content]]]


@mypyc_attr(acyclic=True)
class Asker:
    """Who waits for the answer to a request."""

    __slots__ = ()

    def replied(self, payload: Any, error: ErrorInfo | None) -> None:
        """The core has answered."""
        raise NotImplementedError


class _Callback(Asker):
    """A function that waits for an answer."""

    __slots__ = ("_on_reply",)

    def __init__(self, on_reply: OnReply) -> None:
        self._on_reply = on_reply

    def replied(self, payload: Any, error: ErrorInfo | None) -> None:
        self._on_reply(payload, error)


class Author:
    """Who submitted the calls of a session."""

    __slots__ = ()

    def output_key(self, call: int, output: int) -> str:
        """The content key of what is generated into that output. Calls are numbered as the core took them in."""
        raise NotImplementedError


@mypyc_attr(acyclic=True)
class _Attempt:
    """What the shell keeps of a dispatch until its end: the engine's key of the task. `output_key`: of what is generated.
    `ended`: nothing more is told of it."""

    __slots__ = ("ended", "epoch", "number", "output_key", "task")

    def __init__(self, epoch: int, task: TaskId, number: int, output_key: str) -> None:
        self.epoch = epoch
        self.task = task
        self.number = number
        self.output_key = output_key
        self.ended = False

    def __repr__(self) -> str:
        """As in an engine's logs: its errors name it, and results must not depend on where it lies in memory."""
        task = self.task
        return f"{task.session_id}.{task.call}.{task.output}#{self.number}"


class _Node(SimEngine):
    """An engine of the cluster. `attempts`: what runs there, or is on its way, and was not given up."""

    def __init__(self, cluster: Cluster, engine_id: int, engine: TimedEngine) -> None:
        super().__init__(cluster.calendar, engine)
        self.id = engine_id
        self.attempts: set[_Attempt] = set()
        self._cluster = cluster

    def deliver(self, events: list[EmulatedEvent]) -> None:
        self._cluster.hear(self, events)


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
        strict: bool = False,
    ) -> None:
        self.timeline = timeline
        self.calendar = timeline.calendar
        self.core = ServeCore(config)
        self.engines: list[_Node] = []  #: in the order of their ids, which count from 1: none is ever lost
        #: says what engines generate, where a task's length and the session's author (`name_outputs`) do not say it
        self.generate: Generate | None = None
        self._generated: dict[_Attempt, Callable[[int], events.Content]] = {}  # what `generate` said
        self._tokenizers = tuple(dict.fromkeys(model.description.tokenizer for model in engines))
        self._delay_s = engine_delay_s
        self._waiting = Slots()  # askers
        self._requests = 0
        self._pending: list[events.AnyEvent] = []
        self._flushing = False
        self._flush_soon: Callable[[], None] = self._flush  # made once: every instant names it
        self._timer_s = float("inf")
        self._lengths: list[dict[str, int] | None] = []  # by the number of tokens
        self._authors: dict[int, Author] = {}  # by session
        self._carry: dict[type, Callable[[Any], None]] = {
            effects.Dispatch: self._dispatch,
            effects.Abort: self._abort,
            effects.FreeContexts: self._free,
            effects.SessionEnded: self._session_ended,
        }
        self.model_types = ModelTypes([model.description for model in engines])
        self._profiles = EngineProfiles(jump, observe, strict)
        for model in engines:
            self._register(model)
        self._flush()

    # ------------------------------------------------------------------------------------------------ for clients

    def ask(self, asker: Asker) -> int:
        """A new request number, greater than those before, whose answer goes to `asker`."""
        self._requests += 1
        return self._requests << _SLOT_BITS | self._waiting.put(asker)

    def taken(self, request: int) -> Asker:
        """Who waits for that answer, and from now on waits no longer."""
        asker: Asker = self._waiting.take(request & _SLOTS - 1)
        return asker

    def expect(self, on_reply: OnReply) -> int:
        """A new request number, whose answer goes to `on_reply(payload, error)`."""
        return self.ask(_Callback(on_reply))

    def post(self, event: events.AnyEvent, priority: float = FLUSH) -> None:
        """Hands the core an event of this instant, with the others of it."""
        self._pending.append(event)
        if not self._flushing:
            self._flushing = True
            self.calendar.call_now(self._flush_soon, priority)

    def content(self, key: str, tokens: int) -> events.Content:
        """A text of `tokens` tokens under every tokenizer of the cluster."""
        known = self._lengths
        if tokens >= KEPT_LENGTHS:
            return _CONTENT(key, dict.fromkeys(self._tokenizers, tokens))
        if tokens >= len(known):
            known += [None] * (2 * tokens + 1 - len(known))
        lengths = known[tokens]
        if lengths is None:
            lengths = known[tokens] = dict.fromkeys(self._tokenizers, tokens)
        return _CONTENT(key, lengths)

    def name_outputs(self, session_id: int, author: Author) -> None:
        """The session's outputs are named by `author`."""
        self._authors[session_id] = author

    def calls(self, session_id: int) -> Sequence[Call]:
        """The session's calls as the core has them, to be read only and at once; () when it is gone."""
        return self.core.calls(session_id)

    def outside(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        """As `EngineProfiles.outside`."""
        return self._profiles.outside()

    def dissolve(self) -> None:
        """The run is over, and nobody waits for an answer: who did would hold this cluster, and it them, for ever."""
        self._waiting = Slots()

    def explain(self, recorder: Recorder) -> None:
        """Hands over what the core says of its policy: its errors, and why each task went where it went, if that was kept."""
        scheduler = self.core.scheduler
        recorder.policy_errors = scheduler.describe_policy_errors()
        if scheduler.explanations is not None:
            recorder.placements = scheduler.explanations.take()

    def report(self, session_id: int) -> SessionReport | None:
        """The session with its calls, None when it is gone."""
        try:
            return self.core.session_report(session_id, self.calendar.now, calls=True)
        except ParrotError:
            return None

    # --------------------------------------------------------------------------------------------------- the core

    def _flush(self) -> None:
        """Hands the instant's events to the core, then what follows from them in no time, until nothing more does."""
        now = self.calendar.now
        self._flushing = True
        core, carry = self.core, self._carry
        while self._pending:
            batch, self._pending = self._pending, []
            for effect in core.handle(batch, now):
                if type(effect) is _REPLY:
                    self.taken(effect.request).replied(effect.payload, effect.error)
                elif type(effect) is not _TASK_ENDED:
                    carry[type(effect)](effect)
            if core.scheduler.faults:
                for fault in core.take_faults():
                    if not isinstance(fault, PolicyFault):  # the policy's are contained and counted, as a server does it
                        raise fault.error  # for a fault of the core's own a simulation stops
        self._flushing = False
        if core.due_at < self._timer_s:  # no deadline is before; `_tick` asks for the exact one
            self._set_timer(core.due_at)

    def _set_timer(self, deadline_s: float) -> None:
        self._timer_s = deadline_s
        self.calendar.call_at(deadline_s, functools.partial(self._tick, deadline_s))

    def _tick(self, due_s: float) -> None:
        if due_s != self._timer_s:
            return  # an earlier deadline took this timer's place
        self._timer_s = float("inf")
        deadline_s = self.core.next_deadline()
        if deadline_s is not None and deadline_s > self.calendar.now:
            self._set_timer(deadline_s)
        elif deadline_s is not None:
            self.post(events.Tick())

    def _session_ended(self, effect: effects.SessionEnded) -> None:
        session_id: int = effect.session_id
        if session_id in self._authors:
            del self._authors[session_id]

    # ------------------------------------------------------------------------------------------------- the engines

    def _register(self, model: EngineModel) -> None:
        emulated = self._profiles.engine_of(model)

        def registered(answer: Any, error: ErrorInfo | None) -> None:
            if error is not None:
                raise ParrotError.of(error)
            self.engines.append(_Node(self, answer.engine_id, emulated))
            assert answer.engine_id == len(self.engines)

        self._pending.append(events.RegisterEngine(self.expect(registered), model.description))

    def _to_engine(self, action: Callable[..., Any], *arguments: Any) -> None:
        if self._delay_s:
            self.calendar.call_at(self.calendar.now + self._delay_s, functools.partial(action, *arguments))
        else:
            action(*arguments)

    def _dispatch(self, effect: effects.Dispatch) -> None:
        sampling, task_id = effect.sampling, effect.task
        most: int = sampling.max_gen_length
        output_tokens = sampling.output_length or most
        if self.generate is not None:
            output_tokens, content = self.generate(effect)
            attempt = _Attempt(effect.epoch, task_id, effect.attempt, "")
            self._generated[attempt] = content
        else:
            output_key = self._authors[task_id.session_id].output_key(task_id.call, task_id.output)
            attempt = _Attempt(effect.epoch, task_id, effect.attempt, output_key)
        engine = self._engine(effect.engine_id)
        engine.attempts.add(attempt)
        links = tuple([Link(link.context_id, link.tokens) for link in effect.chain])
        task = EngineTask(attempt, links, effect.generate_context_id, most)
        if self._delay_s:
            self._to_engine(engine.submit, task, output_tokens)
        else:
            engine.submit(task, output_tokens)

    def _abort(self, effect: effects.Abort) -> None:
        engine = self._engine(effect.engine_id)
        for attempt in engine.attempts:
            if attempt.number == effect.attempt and attempt.task == effect.task:
                self._ended(engine, attempt)
                self._to_engine(engine.abort, attempt)
                return  # else it has ended, in this very instant

    def _free(self, effect: effects.FreeContexts) -> None:
        engine = self._engine(effect.engine_id)
        if self._delay_s:
            self._to_engine(engine.free_contexts, effect.context_ids)
        else:
            engine.free_contexts(effect.context_ids)

    def _engine(self, engine_id: int) -> _Node:
        return self.engines[engine_id - 1]

    def _ended(self, engine: _Node, attempt: _Attempt) -> None:
        attempt.ended = True
        engine.attempts.remove(attempt)
        if self._generated:
            self._generated.pop(attempt, None)

    def hear(self, engine: _Node, emulated: list[EmulatedEvent]) -> None:
        """An engine tells of an edge."""
        if self._delay_s:
            self.calendar.call_at(self.calendar.now + self._delay_s, functools.partial(self._deliver, engine, emulated))
        else:
            self._deliver(engine, emulated)

    def _deliver(self, engine: _Node, emulated: list[EmulatedEvent]) -> None:
        """An engine's events in the core's terms. Those of an attempt that was given up go no further."""
        for event in emulated:
            if event.evicted:
                self.post(_CONTEXTS_EVICTED(engine.id, event.evicted), FLUSH_EDGES)
            attempt = event.key
            assert isinstance(attempt, _Attempt)
            if not attempt.ended:
                self._pending.append(self._told(event, attempt))
                if event.kind == "finished" or event.kind == "failed" or event.kind == "rejected":
                    self._ended(engine, attempt)
        if self._pending and not self._flushing:
            self._flushing = True
            self.calendar.call_now(self._flush_soon, FLUSH_EDGES)

    def _told(self, event: EmulatedEvent, attempt: _Attempt) -> events.AnyEvent:
        task, number = attempt.task, attempt.number
        kind, epoch = event.kind, attempt.epoch
        if kind == "finished":
            if self.generate is not None:
                content = self._generated[attempt](event.output_tokens)
            else:
                content = self.content(attempt.output_key, event.output_tokens)
            return _TASK_FINISHED(
                epoch,
                task,
                number,
                content,
                event.output_tokens,
                event.prompt_tokens,
                event.cached_tokens,
                event.decode_s,
                event.max_gap_s,
            )
        if kind == "first_token":
            return _FIRST_TOKEN(epoch, task, number)
        if kind == "started":
            return _TASK_STARTED(epoch, task, number, event.cached_tokens)
        if kind == "rejected":
            return events.TaskRejected(epoch, task, number, event.message)
        assert kind == "failed", f"an emulated engine tells {kind!r} to nobody who asked for it"
        return events.TaskFailed(epoch, task, number, event.code, event.message, ERRORS[event.code].retryable)
