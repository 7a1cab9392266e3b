"""ServeCore: events in, effects out. Where sessions, semantic variables, the DAG of calls and global scheduling come together.

`handle` and `next_deadline` are its whole surface to a shell. It is a deterministic state machine: no clock, no
sockets, no threads, no randomness but the policy's own seeded stream. A refused event is answered and changes nothing.

It has four parts, and what is done in an instant goes through them from left to right; what a task's end sets in motion
comes back to the dataflow:

    client_requests.py  ->  session_registry.py  ->  dataflow.py             <->  scheduler.py
    what is asked           who may ask              what waits for what          what runs where

This file decides what each event means to which part, and keeps the time: what is due, and when that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from parrot.protocol.api import ModelInfo, SessionReport
from parrot.protocol.engine import RegisterAnswer
from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve import events as ev
from parrot.serve.alarm import Alarm
from parrot.serve.client_requests import ClientRequests
from parrot.serve.config import ServeCoreConfig
from parrot.serve.dataflow import Dataflow
from parrot.serve.effects import AnyEffect, Reply
from parrot.serve.engines import Engine
from parrot.serve.events import AnyEvent
from parrot.serve.explanations import PlacementsAnswer
from parrot.serve.fault import Fault
from parrot.serve.graph import Call, Task
from parrot.serve.instant import Instant
from parrot.serve.reports import session_report
from parrot.serve.session_registry import SessionRegistry
from parrot.serve.sessions import Session

_TaskEvent = TypeVar("_TaskEvent", ev.TaskStarted, ev.FirstToken, ev.TaskFinished, ev.TaskFailed, ev.TaskRejected)


class ServeCore:
    """The state machine. `config` is validated already; `epoch` counts the core's lives."""

    def __init__(self, config: ServeCoreConfig, *, epoch: int = 0) -> None:
        self.config = config
        self.alarm = Alarm()
        self.instant = Instant()
        self.registry = SessionRegistry(config)
        self.dataflow = Dataflow(config, epoch, self.registry.idle, self.alarm, self.instant)
        self.scheduler = self.dataflow.scheduler
        self.requests = ClientRequests(config, self.registry, self.dataflow, self.instant)
        self._now = 0.0
        self._recalled_gets = 0
        self._least_span_s = min(  # no deadline is set closer than this, but for those that the alarm is told of
            config.session_life_span, config.constant_prefix_var_timeout, config.global_scheduler.engine_wait_timeout
        )
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            ev.OpenSession: self.requests.open_session,
            ev.CloseSession: self.requests.close_session,
            ev.DescribeSession: self.requests.describe_session,
            ev.ListVariables: self.requests.list_variables,
            ev.SubmitCall: self.requests.submit_call,
            ev.CancelCall: self.requests.cancel_call,
            ev.CreateVariable: self.requests.create_variable,
            ev.SetVariable: self.requests.set_variable,
            ev.GetVariable: self.requests.get_variable,
            ev.CancelGet: self.requests.cancel_get,
            ev.RegisterEngine: self._register_engine,
            ev.EngineLost: lambda event, now: self.scheduler.lose(event.engine_id, event.reason, now),
            ev.TaskStarted: self._task_started,
            ev.FirstToken: self._first_token,
            ev.TaskFinished: self._task_finished,
            ev.TaskFailed: self._task_failed,
            ev.TaskRejected: self._task_rejected,
            ev.ContextsEvicted: lambda event, now: self.scheduler.evict(event.engine_id, event.context_ids),
            ev.Tick: self._tick,
            ev.Restarted: self._restarted,
            ev.TaskGivenUp: self._refuse_journal_event,
        }

    # =============================================================================================== events in, effects out

    def handle(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
        """Takes all events of one instant, in order, and returns what is to be done, in order.

        `now`: seconds, never less than at the call before. The policy runs once, after the last event.
        """
        if now < self._now:
            raise ValueError(f"time went back: {now} after {self._now}")
        self._now = now
        handlers = self._handlers
        scheduler, alarm, instant = self.scheduler, self.alarm, self.instant
        instant.event = 0
        for event in events:
            try:
                handlers[type(event)](event, now)
            except ParrotError as error:
                # Raised before anything was changed: the refusal is the whole effect.
                instant.effects.append(Reply(event.request, None, error.info))  # type: ignore[union-attr]
            except Exception as error:  # a bug of ours: it costs this event, and no other
                self._fault(event, error)
            instant.event += 1
        if now >= alarm.at:
            self._due(now)
        if scheduler.changed:
            try:
                scheduler.place(now)
            except Exception as error:  # a bug of ours; a policy's is contained in there
                scheduler.faults.append(Fault("the core failed at placing", error))
                alarm.place_later(now)
            if scheduler.claims is not None and scheduler.claims.due_s < alarm.at:
                alarm.at = scheduler.claims.due_s
        if scheduler.freed:
            scheduler.flush_freed()
        # Nothing that came up in this instant is due before the shortest span there is (gets, deadlines, claims and pauses
        # tell the alarm themselves).
        due_at = now + self._least_span_s
        if due_at < alarm.at:
            alarm.at = due_at
        return instant.take()

    def take_faults(self) -> list[Fault]:
        """What went wrong inside since the last call: for a shell to log, for a test to find empty."""
        faults = self.scheduler.faults[:]
        self.scheduler.faults.clear()
        return faults

    def _fault(self, event: AnyEvent, error: Exception) -> None:
        self.scheduler.faults.append(Fault(f"the core failed on {event!r}", error))
        request = getattr(event, "request", None)
        if request is not None and not isinstance(event, ev.CancelGet):
            told = ErrorInfo("internal", "an error inside the server; its log has the details")
            self.instant.effects.append(Reply(request, None, told))

    # =============================================================================================== earlier lives

    def recall(self, event: AnyEvent, t: float) -> None:
        """Takes in an event that an earlier life accepted at `t`: state is rebuilt, nothing is placed, nobody is answered.

        All that mattered comes in its order (`parrot.serve.recovery` says what), then a `Restarted` through `handle`.
        Raises ValueError when the event does not fit what came before it.
        """
        self._now = max(self._now, t)
        self.requests.recalling = True
        try:
            if isinstance(event, ev.TaskFinished | ev.TaskGivenUp):
                self._recall_end(event, t)
            else:
                if type(event) is ev.GetVariable:
                    self._recalled_gets += 1  # request numbers begin anew with every life: two lives' must not meet
                    event = msgspec.structs.replace(event, request=-self._recalled_gets)
                self._handlers[type(event)](event, t)
        except ParrotError as error:
            raise ValueError(f"{type(event).__name__} is refused: {error}") from error
        finally:
            self.requests.recalling = False
            self.instant.effects.clear()

    def recall_ended(self, session_id: int, state: str) -> None:
        """A session of an earlier life is over; late calls of it are told so."""
        self.registry.ended.add(session_id, state)

    def _recall_end(self, event: ev.TaskFinished | ev.TaskGivenUp, t: float) -> None:
        session = self.sessions.get(event.task.session_id)
        task = session.task(event.task) if session is not None else None
        if task is None:
            raise ValueError(f"{type(event).__name__} names task {event.task}, which no call has")
        if isinstance(event, ev.TaskGivenUp):
            if not task.ended:  # else it follows from what came before
                self.scheduler.give_up(task, event.error, t)
        elif task.state == "queued":
            self.scheduler.recall(task, event, t)
        else:
            raise ValueError(f"task {event.task} finished while it was {task.state}")

    def _refuse_journal_event(self, event: AnyEvent, now: float) -> None:
        raise ValueError(f"{type(event).__name__} is for recall alone")

    def _restarted(self, event: ev.Restarted, now: float) -> None:
        self.dataflow.gets.clear()
        self.scheduler.restart(event.epoch, now)
        self.registry.prolong_keys(now)
        self.scheduler.tenants.begin_anew()
        for session in list(self.sessions.values()):
            if session.ephemeral:  # who waited for it was connected to the life before
                self.requests.end_session(session, "close", now)
                continue
            self.registry.idle.touch(session, now)
            if session.account.minute is not None:
                for call in session.calls:
                    for task in call.tasks:
                        task.charged = 0

    # =============================================================================================== time

    @property
    def due_at(self) -> float:
        """A time before which there is no deadline, seconds; `next_deadline` is exact, and costs more."""
        return self.alarm.at

    def next_deadline(self) -> float | None:
        """When `Tick` is wanted at the latest, in seconds of the same clock; None: not before the next event."""
        first = math.inf
        for deadline in (self.dataflow.next_deadline(), self.registry.idle.next_deadline(), self.scheduler.next_deadline()):
            if deadline is not None and deadline < first:
                first = deadline
        return self.alarm.wanted_at(first)

    def _tick(self, event: ev.Tick, now: float) -> None:
        self.alarm.at = now

    def _due(self, now: float) -> None:
        """Everything whose deadline has come: gets that time out, sessions that expire, what the scheduler waits for. A
        failure in one of them costs no other, and what is left of it is not tried again at once."""
        scheduler, alarm, idle = self.scheduler, self.alarm, self.registry.idle
        faults = len(scheduler.faults)
        self.dataflow.tick(now)
        deadline = idle.next_deadline()
        if deadline is not None and deadline <= now:
            for session in idle.expired(now):
                scheduler.contain(f"expiring session {session.id}", self.requests.end_session, session, "expire", now)
        scheduler.tick(now)
        if alarm.place_again(now):
            scheduler.changed = True
        if len(scheduler.faults) > faults:
            alarm.pause(now)
        alarm.set(self.next_deadline())

    # =============================================================================================== engines

    def _register_engine(self, event: ev.RegisterEngine, now: float) -> None:
        if len(self.engines) >= self.config.max_engines_num:
            raise ParrotError(
                "too_many_engines",
                f"{len(self.engines)} engines are registered; max_engines_num is {self.config.max_engines_num}",
                retry_after_s=math.ceil(self.config.engine_heartbeat_timeout),  # by then one that is gone is known to be
            )
        if event.lengths:
            tokenizer = event.engine.tokenizer
            for content in self.registry.contents():
                if tokenizer not in content.lengths and content.key in event.lengths:
                    content.lengths[tokenizer] = event.lengths[content.key]
        engine = self.scheduler.register(event.engine, now)
        self.instant.effects.append(Reply(event.request, RegisterAnswer(engine.id, self.scheduler.epoch)))

    def _in_flight(self, event: _TaskEvent) -> Task | None:
        """The task that the event speaks of, if that attempt is the present one; stale events are dropped."""
        if event.epoch != self.scheduler.epoch:
            return None
        task = self.scheduler.in_flight.get(event.task)
        return task if task is not None and task.attempt == event.attempt else None

    def _task_started(self, event: ev.TaskStarted, now: float) -> None:
        if (task := self._in_flight(event)) is not None:
            self.scheduler.started(task, event.cached_tokens, now)

    def _first_token(self, event: ev.FirstToken, now: float) -> None:
        if (task := self._in_flight(event)) is not None:
            self.scheduler.first_token(task, now)

    def _task_finished(self, event: ev.TaskFinished, now: float) -> None:
        if (task := self._in_flight(event)) is not None:
            self.scheduler.finish(task, event, now)

    def _task_failed(self, event: ev.TaskFailed, now: float) -> None:
        if (task := self._in_flight(event)) is not None:
            self.scheduler.fail(task, event, now)
            self._paused()

    def _task_rejected(self, event: ev.TaskRejected, now: float) -> None:
        if (task := self._in_flight(event)) is not None:
            self.scheduler.reject(task, event.message, now)
            self._paused()

    def _paused(self) -> None:
        """A pause may have begun, which is shorter than all that `handle` reckons with."""
        self.alarm.no_later(self.scheduler.next_deadline())

    # =============================================================================================== to be read only

    @property
    def engines(self) -> dict[int, Engine]:
        """Live engines by id."""
        return self.scheduler.engines.live

    @property
    def sessions(self) -> dict[int, Session]:
        """Open sessions by id, in the order in which they were opened."""
        return self.registry.sessions

    @property
    def epoch(self) -> int:
        return self.scheduler.epoch

    def models(self) -> list[ModelInfo]:
        """The models of live engines, each once."""
        found = {(e.description.model, e.description.tokenizer): None for e in self.engines.values()}
        return [ModelInfo(model, tokenizer) for model, tokenizer in found]

    def session_report(self, session_id: int, now: float, calls: bool = True) -> SessionReport:
        """What a session has done so far; changes nothing. Raises `not_found`."""
        return session_report(self.registry.find(session_id), now, calls)

    def placements(self, most: int, session_id: int | None = None) -> PlacementsAnswer:
        """Why the last tasks went where they went, the newest first; with `session_id`, those of that session."""
        kept = self.scheduler.explanations
        return PlacementsAnswer(
            policy=self.config.global_scheduler.policy,
            policy_errors=self.scheduler.describe_policy_errors(),
            kept=self.config.global_scheduler.explain_placements,
            placements=tuple(kept.last(most, session_id)) if kept is not None else (),
        )

    def calls(self, session_id: int) -> Sequence[Call]:
        """The calls of a session with their tasks, () when it is gone: for who measures in the same process. At once: they are
        emptied when the session ends."""
        session = self.sessions.get(session_id)
        return session.calls if session is not None else ()

    def counts(self) -> dict[str, int]:
        """Tasks of live sessions by state, queued ones, sessions and pending gets: for invariants and for operators."""
        found = {"sessions": len(self.sessions), "gets": len(self.dataflow.gets), "queue": self.scheduler.waiting}
        for session in self.sessions.values():
            for call in session.calls:
                for task in call.tasks:
                    found[task.state] = found.get(task.state, 0) + 1
        return found
