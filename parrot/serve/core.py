"""ServeCore: sessions, semantic variables, the DAG of calls, global scheduling. Events in, effects out.

`handle` and `next_deadline` are its whole surface to a shell. It is a deterministic state machine: no clock, no
sockets, no threads, no randomness but the policy's own seeded stream. A refused event is answered and changes nothing.
What runs where is the scheduler's affair (`scheduler.py`); this file is the front: who may do what, what waits for what.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec

from parrot.protocol.api import Criteria, ModelInfo, SessionReport, VariableInfo
from parrot.protocol.engine import RegisterAnswer
from parrot.protocol.errors import ErrorInfo, ParrotError
from parrot.serve import events as ev
from parrot.serve.config import ServeCoreConfig
from parrot.serve.deadlines import Deadlines
from parrot.serve.deduction import Deduction, tighter
from parrot.serve.effects import AnyEffect, Reply, SessionEnded
from parrot.serve.engines import Engine
from parrot.serve.events import AnyEvent, Content
from parrot.serve.explanations import PlacementsAnswer
from parrot.serve.fault import Fault
from parrot.serve.gets import PendingGets
from parrot.serve.graph import Call, Task, tasks_of
from parrot.serve.rates import DrainRate
from parrot.serve.reports import call_answer, input_failed, session_report
from parrot.serve.scheduler import Scheduler
from parrot.serve.sessions import EndedSessions, IdleSessions, Session
from parrot.serve.states import IN_FLIGHT, SESSION, TASK, VARIABLE
from parrot.serve.submission import bind, check_form, check_room, check_variables
from parrot.serve.tenants import Tenant
from parrot.serve.variables import Variable

#: How many ended sessions are remembered at least, so that a late call is told 410 and not 404.
REMEMBERED_SESSIONS = 65536

#: After a failure in what time brings, or in placing, this long passes before the next try (seconds): its cause may stay.
FAULT_PAUSE_S = 1.0

_EMPTY: Final[dict[str, Any]] = {}

# By names of this module's own that never change: the compiled module need not look them up.
_REPLY: Final = Reply
_SESSION_ENDED: Final = SessionEnded
_THROUGHPUT: Final = Criteria.THROUGHPUT
_PRODUCE: Final = VARIABLE.of("produce")
_FINISH: Final = VARIABLE.of("finish")

_Repeatable = ev.SubmitCall | ev.CreateVariable | ev.SetVariable
_TaskEvent = TypeVar("_TaskEvent", ev.TaskStarted, ev.FirstToken, ev.TaskFinished, ev.TaskFailed, ev.TaskRejected)


class ServeCore:
    """The state machine. `config` is validated already; `epoch` counts the core's lives."""

    def __init__(self, config: ServeCoreConfig, *, epoch: int = 0) -> None:
        self.config = config
        self._effects: list[AnyEffect] = []
        self._sessions: dict[int, Session] = {}
        self._ended = EndedSessions(REMEMBERED_SESSIONS)
        self._idle = IdleSessions(config.session_life_span)
        self._gets = PendingGets()
        self._opened: OrderedDict[str, tuple[int, float]] = OrderedDict()  # Idempotency-Key -> (session id, until)
        self._sequence = 0
        self._ends = DrainRate()  # of sessions
        self._deduction = Deduction(self._activated)
        self._deadlines = Deadlines(self._activated)
        self._now = 0.0
        self.due_at = math.inf  #: a time before which there is no deadline; `next_deadline` is exact, and costs more
        self._quiet_until = 0.0  # no deadline before, after a fault
        self._place_again_at = math.inf  # placing failed
        self._recalling = False  # what is taken in was accepted in an earlier life
        self._recalled_gets = 0
        self._least_span_s = min(  # no deadline is set closer than this, but for those that say so themselves
            config.session_life_span, config.constant_prefix_var_timeout, config.global_scheduler.engine_wait_timeout
        )
        self.scheduler = Scheduler(config, epoch, self._effects, self._task_finished, self._task_failed)
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            ev.OpenSession: self._open_session,
            ev.CloseSession: self._close_session,
            ev.DescribeSession: self._describe_session,
            ev.ListVariables: self._list_variables,
            ev.SubmitCall: self._submit_call,
            ev.CancelCall: self._cancel_call,
            ev.CreateVariable: self._create_variable,
            ev.SetVariable: self._set_variable,
            ev.GetVariable: self._get_variable,
            ev.CancelGet: self._cancel_get,
            ev.RegisterEngine: self._register_engine,
            ev.EngineLost: lambda event, now: self.scheduler.lose(event.engine_id, event.reason, now),
            ev.TaskStarted: self._task_started,
            ev.FirstToken: self._first_token,
            ev.TaskFinished: self._on_finished,
            ev.TaskFailed: self._on_failed,
            ev.TaskRejected: self._on_rejected,
            ev.ContextsEvicted: lambda event, now: self.scheduler.evict(event.engine_id, event.context_ids),
            ev.Tick: self._tick,
            ev.Restarted: self._restarted,
            ev.TaskGivenUp: self._refuse_journal_event,
        }

    # =============================================================================================== the surface

    def handle(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
        """Takes all events of one instant, in order, and returns what is to be done, in order.

        `now`: seconds, never less than at the call before. The policy runs once, after the last event.
        """
        if now < self._now:
            raise ValueError(f"time went back: {now} after {self._now}")
        self._now = now
        handlers = self._handlers
        scheduler = self.scheduler
        scheduler.event = 0
        for event in events:
            try:
                handlers[type(event)](event, now)
            except ParrotError as error:
                # Raised before anything was changed: the refusal is the whole effect.
                self._effects.append(Reply(event.request, None, error.info))  # type: ignore[union-attr]
            except Exception as error:  # a bug of ours: it costs this event, and no other
                self._fault(event, error)
            scheduler.event += 1
        if now >= self.due_at:
            self._due(now)
        if scheduler.changed:
            try:
                scheduler.place(now)
            except Exception as error:  # a bug of ours; a policy's is contained in there
                scheduler.faults.append(Fault("the core failed at placing", error))
                self._place_again_at = now + FAULT_PAUSE_S
                self.due_at = min(self.due_at, self._place_again_at)
            if scheduler.claims is not None and scheduler.claims.due_s < self.due_at:
                self.due_at = scheduler.claims.due_s
        if scheduler.freed:
            scheduler.flush_freed()
        # Nothing that came up in this instant is due before the shortest span there is (gets, deadlines, claims and pauses
        # see to themselves).
        due_at = now + self._least_span_s
        if due_at < self.due_at:
            self.due_at = due_at
        effects = self._effects
        self._effects = scheduler.effects = []
        return effects

    def recall(self, event: AnyEvent, t: float) -> None:
        """Takes in an event that an earlier life accepted at `t`: state is rebuilt, nothing is placed, nobody is answered.

        All that mattered comes in its order (`parrot.serve.recovery` says what), then a `Restarted` through `handle`.
        Raises ValueError when the event does not fit what came before it.
        """
        self._now = max(self._now, t)
        self._recalling = True
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
            self._recalling = False
            self._effects.clear()

    def recall_ended(self, session_id: int, state: str) -> None:
        """A session of an earlier life is over; late calls of it are told so."""
        self._ended.add(session_id, state)

    def _recall_end(self, event: ev.TaskFinished | ev.TaskGivenUp, t: float) -> None:
        session = self._sessions.get(event.task.session_id)
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
            self._effects.append(Reply(request, None, told))

    def next_deadline(self) -> float | None:
        """When `Tick` is wanted at the latest, in seconds of the same clock; None: not before the next event."""
        first = math.inf
        for deadline in (
            self._gets.next_deadline(),
            self._idle.next_deadline(),
            self._deadlines.next_deadline(),
            self.scheduler.next_deadline(),
        ):
            if deadline is not None and deadline < first:
                first = deadline
        first = min(max(first, self._quiet_until), self._place_again_at)
        return None if first == math.inf else first

    @property
    def engines(self) -> dict[int, Engine]:
        """Live engines by id; to be read only."""
        return self.scheduler.engines.live

    @property
    def epoch(self) -> int:
        return self.scheduler.epoch

    def models(self) -> list[ModelInfo]:
        """The models of live engines, each once."""
        found = {(e.description.model, e.description.tokenizer): None for e in self.engines.values()}
        return [ModelInfo(model, tokenizer) for model, tokenizer in found]

    def contents(self) -> Iterator[Content]:
        """All contents that live sessions name, with repetitions."""
        for session in self._sessions.values():
            for variable in session.all_variables:
                if variable.content is not None:
                    yield variable.content
            for call in session.calls:
                for segment in call.segments:
                    if type(segment) is ev.Constant:
                        yield segment.content

    def session_report(self, session_id: int, now: float, calls: bool = True) -> SessionReport:
        """What a session has done so far; changes nothing. Raises `not_found`."""
        session = self._sessions.get(session_id)
        if session is None:
            raise self._no_session(session_id)
        return session_report(session, now, calls)

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
        """The calls of a session with their tasks, () when it is gone: for who measures in the same process. To be read
        only, and at once: they are emptied when the session ends."""
        session = self._sessions.get(session_id)
        return session.calls if session is not None else ()

    def counts(self) -> dict[str, int]:
        """Tasks of live sessions by state, queued ones, sessions and pending gets: for invariants and for operators."""
        found: dict[str, int] = {"sessions": len(self._sessions), "gets": len(self._gets), "queue": self.scheduler.waiting}
        for session in self._sessions.values():
            for call in session.calls:
                for task in call.tasks:
                    found[task.state] = found.get(task.state, 0) + 1
        return found

    # =============================================================================================== sessions

    def _session(self, session_id: int, auth: str | None, now: float) -> Session:
        """The open session of that id, its idle time begun anew. Raises not_found, session_expired, unauthorized …"""
        session = self._sessions.get(session_id)
        if session is None:
            raise self._no_session(session_id)
        if auth is None:
            raise ParrotError("unauthorized", f"session {session_id}: session_auth is missing")
        if auth != session.auth:
            raise ParrotError("forbidden", f"session {session_id}: session_auth is wrong")
        self._idle.touch(session, now)
        return session

    def _no_session(self, session_id: int) -> ParrotError:
        ended = self._ended.state_of(session_id)
        if ended is None:
            return ParrotError("not_found", f"there is no session {session_id}", session_id=session_id)
        return ParrotError(f"session_{ended}", f"session {session_id} is {ended}", session_id=session_id)

    def _open_session(self, event: ev.OpenSession, now: float) -> None:
        key = event.idempotency_key
        if key is not None:
            while self._opened and next(iter(self._opened.values()))[1] <= now:
                self._opened.popitem(last=False)
            known = self._opened.get(key)
            if known is not None:
                self._effects.append(Reply(event.request, known[0]))
                return
        session_id, tenant = event.session_id, event.tenant
        if session_id in self._sessions:
            raise ParrotError("conflict", f"session id {session_id} is in use")
        tenants = self.scheduler.tenants
        account = tenants.of(tenant)
        if not self._recalling:
            self._check_sessions(account, now)
        tenants.join(account, now)
        self._sequence += 1
        session = Session(session_id, event.auth, tenant, account, self._sequence, now, event.ephemeral)
        self._sessions[session.id] = session
        self._idle.touch(session, now)
        if key is not None:
            self._opened[key] = (session.id, now + self.config.session_life_span)
        self._effects.append(_REPLY(event.request, session.id))

    def _check_sessions(self, account: Tenant, now: float) -> None:
        """Raises too_many_sessions when one more would be."""
        count, most = len(self._sessions), self.config.max_sessions_num
        if 2 * count >= most:  # it may come to a refusal, which says how fast sessions end
            ended = self._sequence - count
            self._ends.note(now, ended)
            if count >= most:
                raise ParrotError(
                    "too_many_sessions",
                    f"{count} sessions are open; max_sessions_num is {most}",
                    retry_after_s=self._ends.wait_s(now, ended, count - most + 1),
                )
        account.check_session(now)

    def _close_session(self, event: ev.CloseSession, now: float) -> None:
        session = self._session(event.session_id, event.auth, now)
        self._end_session(session, "close", now)
        self._effects.append(_REPLY(event.request, _EMPTY))

    def _end_session(self, session: Session, by: str, now: float) -> None:
        """Cancels its work, answers its gets, frees its contexts, forgets its variables."""
        session.state = SESSION[session.state, by]
        self._idle.remove(session)
        del self._sessions[session.id]
        self._ended.add(session.id, session.state)
        if session.waiting_gets:
            error = ErrorInfo(f"session_{session.state}", f"session {session.id} is {session.state}")
            for variable in session.all_variables:
                for request in self._gets.settle(session, variable):
                    self._effects.append(Reply(request, None, error))
        if session.unfinished:
            for call in session.calls:
                for task in call.tasks:
                    if not task.ended:
                        self.scheduler.cancel(task, now)
        self.scheduler.tenants.leave(session.account, now)
        self.scheduler.free_session(session)
        for call in session.calls:
            self.scheduler.engines.leave(call.lane)
        session.forget()
        self._effects.append(_SESSION_ENDED(session.id, session.state))

    def _describe_session(self, event: ev.DescribeSession, now: float) -> None:
        session = self._sessions.get(event.session_id)
        idle_since = session.last_access_s if session is not None and not session.busy else now
        session = self._session(event.session_id, event.auth, now)
        report = session_report(session, now, event.calls, event.numbers)
        self._effects.append(Reply(event.request, msgspec.structs.replace(report, idle_s=now - idle_since)))

    def _repeated(self, session: Session, event: _Repeatable) -> bool:
        """Answers a request that was answered before under the same Idempotency-Key. A key names one request of one kind."""
        key = event.idempotency_key
        if key is None or session.answers is None or (type(event), key) not in session.answers:
            return False
        self._effects.append(Reply(event.request, session.answers[type(event), key]))
        return True

    def _answer(self, session: Session, event: _Repeatable, payload: Any) -> None:
        key = event.idempotency_key
        if key is not None:
            if session.answers is None:
                session.answers = {}
            session.answers[type(event), key] = payload
        self._effects.append(_REPLY(event.request, payload))

    # =============================================================================================== variables

    def _create_variable(self, event: ev.CreateVariable, now: float) -> None:
        session = self._session(event.session_id, event.auth, now)
        if not self._repeated(session, event):
            variable = session.new_variable(event.name)
            self._answer(session, event, {"var_id": variable.id})

    def _set_variable(self, event: ev.SetVariable, now: float) -> None:
        session = self._session(event.session_id, event.auth, now)
        if event.idempotency_key is not None and self._repeated(session, event):
            return
        variable = session.variable(event.var_id)
        if variable.state != "empty":
            reason = "a call produces it" if variable.producer is not None else "it has a content"
            raise ParrotError("conflict", f"variable {event.var_id!r} cannot be set: {reason}", var_id=event.var_id)
        variable.state = VARIABLE[variable.state, "set"]
        variable.content = event.content
        self._answer(session, event, _EMPTY)
        self._became_ready(session, variable, now)

    def _list_variables(self, event: ev.ListVariables, now: float) -> None:
        session = self._session(event.session_id, event.auth, now)
        listed = [
            VariableInfo(
                variable.id,
                variable.name,
                variable.state,
                variable.content.key if variable.content is not None else None,
                variable.error.message if variable.error is not None else None,
            )
            for variable in session.all_variables
        ]
        self._effects.append(Reply(event.request, listed))

    def _became_ready(self, session: Session, variable: Variable, now: float) -> None:
        """The variable has its content: whoever waited for it goes on."""
        content = variable.content
        assert content is not None
        if variable.getters:
            for request in self._gets.settle(session, variable):
                self._effects.append(_REPLY(request, content.key))
        if variable.consumers:
            for task in variable.consumers:
                task.missing -= 1
                if task.missing == 0 and task.activated and task.state == "waiting":
                    self._enqueue(task, now)
        self._idle.touch(session, now)

    def _became_failed(self, session: Session, variable: Variable, error: ErrorInfo, now: float) -> list[Task]:
        """The variable will never have a content: its getters are told why, its consumers fail too. Those consumers."""
        variable.error = error
        for request in self._gets.settle(session, variable):
            self._effects.append(Reply(request, None, error))
        failed = [task for task in variable.consumers or () if task.state == "waiting"]
        for task in failed:
            task.state = TASK[task.state, "fail"]
            task.finished_at = now
        self._idle.touch(session, now)
        return failed

    # =============================================================================================== gets

    def _get_variable(self, event: ev.GetVariable, now: float) -> None:
        session = self._session(event.session_id, event.auth, now)
        variable = session.variable(event.var_id)
        if variable.state == "ready":
            assert variable.content is not None
            self._effects.append(_REPLY(event.request, variable.content.key))
            return
        if variable.state == "failed":
            self._effects.append(_REPLY(event.request, None, variable.error))
            return
        deadline, late, useless = event.timeout, False, event.deadline
        if useless is not None and (deadline is None or useless <= deadline):
            deadline, late = useless, True
        if deadline is not None:
            deadline += now
            self.due_at = min(self.due_at, deadline)
        self._gets.add(event.request, variable, deadline, late)
        self._idle.touch(session, now)
        if useless is not None or session.deadlines is not None:
            self._deadlines.fetched(session, variable, math.inf if useless is None else now + useless)
            self._watch_deadlines()
        self._want(variable, event.criteria or _THROUGHPUT)

    def _want(self, variable: Variable, criteria: Criteria) -> None:
        """Somebody wants the variable. What is wanted once stays so, whatever becomes of the get."""
        wanted = tighter(variable.criteria, criteria)
        if wanted is not variable.criteria:
            variable.criteria = wanted
            if variable.producer is not None:
                self._deduction.fetch(variable.producer)

    def _watch_deadlines(self) -> None:
        """Deadlines may have come up that are shorter than all that `handle` reckons with."""
        self._reckon_with(self._deadlines.next_deadline())

    def _cancel_get(self, event: ev.CancelGet, now: float) -> None:
        self._drop_get(event.request, now)

    def _drop_get(self, request: int, now: float) -> Variable | None:
        variable = self._gets.drop(request)
        if variable is not None:
            self._idle.touch(variable.session, now)
        return variable

    # =============================================================================================== calls

    def _submit_call(self, event: ev.SubmitCall, now: float) -> None:
        session = self._session(event.session_id, event.auth, now)
        if event.idempotency_key is not None and self._repeated(session, event):
            return
        deadline, wanted = event.deadline, event.output_criteria
        outputs = check_form(event)
        if not self._recalling:  # how full it was then is not known any more
            check_room(session, outputs, self.config, self.scheduler, now)
            session.account.check_minute(now)
        check_variables(session, event)
        session.account.asked(now)
        call = Call(
            number=len(session.calls),
            session=session,
            func_name=event.func_name,
            segments=event.segments,
            variables=(),
            lane=self.scheduler.engines.lane(event.models, event.model_type),
            cache_prefix=event.cache_prefix,
            fuse_fill=event.fuse_fill,
            submitted_s=now,
            until_s=math.inf if deadline is None else now + deadline,
        )
        if deadline is not None and session.deadlines is None:
            session.deadlines = {}
        call.variables = bind(session, event)
        session.calls.append(call)
        tasks = tasks_of(call)
        call.tasks = tasks
        session.unfinished += len(tasks)
        self._answer(session, event, call_answer(call))
        for task in tasks:
            self._connect(task, now)
        if session.deadlines is not None:
            if wanted is not None:
                self._deadlines.want(tasks[-1], math.inf, math.inf)
            self._watch_deadlines()
        if wanted is not None and not tasks[-1].ended:
            self._want(tasks[-1].output, wanted)

    def _cancel_call(self, event: ev.CancelCall, now: float) -> None:
        session = self._session(event.session_id, event.auth, now)
        if not 0 <= event.call < len(session.calls):
            raise ParrotError("not_found", f"session {session.id} has no call {event.call}")
        error = ErrorInfo("cancelled", f"call {event.call} was cancelled: its client went away")
        for task in session.calls[event.call].tasks:
            if not task.ended:
                self.scheduler.expire(task, error, now)
        self._effects.append(Reply(event.request, _EMPTY))

    def _connect(self, task: Task, now: float) -> None:
        """Puts a new task into the graph: what it waits for, and who waits for it already."""
        output = task.output
        output.producer = task
        output.state = _PRODUCE[output.state]
        failed: Variable | None = None
        for variable in task.inputs():
            if variable.consumers is None:
                variable.consumers = [task]
            else:
                variable.consumers.append(task)
            if variable.state == "failed":
                failed = failed or variable
            elif variable.state != "ready":
                task.missing += 1
                if variable.producer is not None:
                    if task.sources is None:
                        task.sources = []
                    task.sources.append(variable.producer)
        if failed is not None:
            assert failed.error is not None
            task.state = TASK[task.state, "fail"]
            task.finished_at = now
            self._task_failed(task, input_failed(failed, failed.error), now)
            return
        if task.call.session.deadlines is not None:
            self._deadlines.connect(task)
        self._deduction.add(task)

    def _activated(self, task: Task) -> None:
        """Deduction has activated the task, or changed what it says of it."""
        if task.state == "queued":
            self.scheduler.reorder(task)
        elif task.state == "waiting":
            if task.missing == 0:
                self._enqueue(task, self._now)
        elif task.state in IN_FLIGHT:
            self.scheduler.hurry(task)

    def _enqueue(self, task: Task, now: float) -> None:
        session = task.call.session
        session.active += 1
        self._idle.touch(session, now)
        self.scheduler.enqueue(task, now)

    # =============================================================================================== tasks end

    def _task_finished(self, task: Task, content: Content, now: float) -> None:
        session = task.call.session
        session.active -= 1
        session.unfinished -= 1
        task.output.state = _FINISH[task.output.state]
        task.output.content = content
        self._became_ready(session, task.output, now)

    def _task_failed(self, task: Task, error: ErrorInfo, now: float) -> None:
        """The task has failed, and so does all that waits for its output: a loop, for a chain may be long."""
        session = task.call.session
        failed = [(task, error)]
        while failed:
            task, error = failed.pop()
            if task.ready_at < math.inf:
                session.active -= 1
            session.unfinished -= 1
            task.output.state = VARIABLE[task.output.state, "fail"]
            consumers = self._became_failed(session, task.output, error, now)
            derived = input_failed(task.output, error)
            failed.extend((consumer, derived) for consumer in reversed(consumers))

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
            for content in self.contents():
                if tokenizer not in content.lengths and content.key in event.lengths:
                    content.lengths[tokenizer] = event.lengths[content.key]
        engine = self.scheduler.register(event.engine, now)
        self._effects.append(Reply(event.request, RegisterAnswer(engine.id, self.scheduler.epoch)))

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

    def _on_finished(self, event: ev.TaskFinished, now: float) -> None:
        if (task := self._in_flight(event)) is not None:
            self.scheduler.finish(task, event, now)

    def _on_failed(self, event: ev.TaskFailed, now: float) -> None:
        if (task := self._in_flight(event)) is not None:
            self.scheduler.fail(task, event, now)
            self._paused()

    def _on_rejected(self, event: ev.TaskRejected, now: float) -> None:
        if (task := self._in_flight(event)) is not None:
            self.scheduler.reject(task, event.message, now)
            self._paused()

    def _reckon_with(self, deadline: float | None) -> None:
        if deadline is not None and deadline < self.due_at:
            self.due_at = deadline

    def _paused(self) -> None:
        """A pause may have begun, which is shorter than all that `handle` reckons with."""
        self._reckon_with(self.scheduler.next_deadline())

    # =============================================================================================== time

    def _tick(self, event: ev.Tick, now: float) -> None:
        self.due_at = now

    def _due(self, now: float) -> None:
        """Everything whose deadline has come: gets that time out, sessions that expire, what the scheduler waits for. A
        failure in one of them costs no other, and what is left of it is not tried again at once."""
        scheduler = self.scheduler
        faults = len(scheduler.faults)
        for task in self._deadlines.over(now):
            scheduler.contain(f"ending task {task.id}, whose deadline has passed", self._expire, task, now)
        for request, late in self._gets.due(now):
            scheduler.contain(f"ending get {request}", self._time_out, request, late, now)
        deadline = self._idle.next_deadline()
        if deadline is not None and deadline <= now:
            for session in self._idle.expired(now):
                scheduler.contain(f"expiring session {session.id}", self._end_session, session, "expire", now)
        scheduler.tick(now)
        if now >= self._place_again_at:
            self._place_again_at = math.inf
            scheduler.changed = True
        if len(scheduler.faults) > faults:
            self._quiet_until = now + FAULT_PAUSE_S
        deadline = self.next_deadline()
        self.due_at = math.inf if deadline is None else deadline

    def _expire(self, task: Task, now: float) -> None:
        if not task.ended:
            what = f"output {task.output.id!r} of call {task.call.number} was not ready by its deadline"
            self.scheduler.expire(task, ErrorInfo("deadline_exceeded", what), now)

    def _time_out(self, request: int, late: bool, now: float) -> None:
        variable = self._drop_get(request, now)
        if variable is not None:
            code, by = ("deadline_exceeded", "by its deadline") if late else ("timeout", "in time")
            message = f"variable {variable.id!r} was not ready {by}"
            self._effects.append(Reply(request, None, ErrorInfo(code, message)))

    def _restarted(self, event: ev.Restarted, now: float) -> None:
        self._gets.clear()
        self.scheduler.restart(event.epoch, now)
        until = now + self.config.session_life_span
        for key, (session_id, _) in self._opened.items():
            self._opened[key] = (session_id, until)
        self.scheduler.tenants.begin_anew()
        for session in list(self._sessions.values()):
            if session.ephemeral:  # who waited for it was connected to the life before
                self._end_session(session, "close", now)
                continue
            self._idle.touch(session, now)
            if session.account.minute is not None:
                for call in session.calls:
                    for task in call.tasks:
                        task.charged = 0
