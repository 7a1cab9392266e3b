"""What clients and engines do to a ServeCore, one instant a step, and what they know of it.

Nothing is drawn here: `script` decides what happens next from a seed, the tests' Hypothesis machine as it likes. What the core
says is checked against what was asked of it; what it keeps inside is for `laws`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from parrot.protocol.api import Criteria
from parrot.protocol.engine import EngineDescription
from parrot.serve import events as ev
from parrot.serve import states
from parrot.serve.config import ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.effects import Abort, AnyEffect, Dispatch, FreeContexts, Reply, SessionEnded
from parrot.serve.engines import Engine
from parrot.serve.fault import PolicyFault

#: What a core may answer to a request of a client that knows its sessions and variables.
REFUSALS = (
    "conflict",
    "cyclic_dependency",
    "queue_full",
    "too_many_tasks",
    "rate_limited",
    "too_many_sessions",
    "too_many_engines",
)

MOST_STEPS = 5000  #: more than any end of a run needs; a policy that never places, or places for ever, gets here


class Violation(AssertionError):
    """Something does not hold. `check`: the name of what."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check


def expect(check: str, holds: bool, message: str) -> None:
    """Raises the Violation unless it `holds`."""
    if not holds:
        raise Violation(check, message)


class Play:
    """A core's life. `history`: every instant, and `effects`: what came of it; `flying`: what engines work on."""

    def __init__(self, config: ServeCoreConfig) -> None:
        self.config = config
        self.core = ServeCore(config)
        self.now = 0.0
        self.request = 0
        self.next_session = 1
        self.history: list[tuple[list[ev.AnyEvent], float]] = []
        self.effects: list[list[AnyEffect]] = []
        self.asked: dict[int, Any] = {}  # request -> the event that asked, until it is answered
        self.sessions: dict[int, list[str]] = {}  # id -> variable ids, in the order in which they were told
        self.engines: dict[int, None] = {}
        self.contexts: dict[int, set[int]] = {}  # engine -> contexts that it was told to make and not to free
        self.flying: dict[tuple[Any, int], Dispatch] = {}
        self.past: list[Dispatch] = []
        self.full: dict[int, int] = {}  # engine that rejected a task -> its capacity's version then

    # ------------------------------------------------------------------------------------------------ one instant

    def send(self, *events: ev.AnyEvent) -> list[AnyEffect]:
        """One instant. What follows from it for clients and engines is taken in."""
        self.history.append((list(events), self.now))
        rejecting = [engine for e in events if isinstance(e, ev.TaskRejected) and (engine := self.engine_of(e))]
        effects = self.core.handle(events, self.now)
        self.full.update({engine.id: engine.version for engine in rejecting})
        self.effects.append(effects)
        for fault in self.core.take_faults():
            check = "containment" if isinstance(fault, PolicyFault) else "no faults"
            raise Violation(check, f"{type(fault.error).__name__}: {fault.error}") from fault.error
        for effect in effects:
            self._take(effect)
        return effects

    def _take(self, effect: AnyEffect) -> None:
        if isinstance(effect, Reply):
            asked = self.asked.pop(effect.request, None)
            expect("answers", asked is not None, f"reply {effect.request}: nobody asked, or it is the second one")
            self._answered(asked, effect)
        elif isinstance(effect, Dispatch):
            key = (effect.task, effect.attempt)
            expect("answers", effect.engine_id in self.engines, f"dispatched to engine {effect.engine_id}, which is not there")
            expect("answers", key not in self.flying, f"attempt {effect.attempt} of {effect.task} was dispatched twice")
            self.flying[key] = effect
            self.past.append(effect)
            made = {link.context_id for link in effect.chain} | {effect.generate_context_id}
            self.contexts[effect.engine_id] |= made
        elif isinstance(effect, Abort):
            flew = self.flying.pop((effect.task, effect.attempt), None)
            expect("answers", flew is not None, f"{effect.task} was aborted, but was not in flight")
        elif isinstance(effect, FreeContexts):
            held = self.contexts[effect.engine_id]
            expect("answers", held.issuperset(effect.context_ids), f"engine {effect.engine_id} frees what it does not hold")
            held.difference_update(effect.context_ids)
        elif isinstance(effect, SessionEnded):
            self.sessions.pop(effect.session_id, None)

    def _answered(self, event: Any, reply: Reply) -> None:
        """What a client learns."""
        known = self.sessions.get(getattr(event, "session_id", 0))
        if reply.error is not None:
            return
        if isinstance(event, ev.OpenSession):
            self.sessions.setdefault(event.session_id, [])
        elif isinstance(event, ev.CreateVariable) and known is not None:
            known.append(reply.payload["var_id"])
        elif isinstance(event, ev.SubmitCall) and known is not None:
            known.extend(info.var_id for info in reply.payload.param_info if info.var_id not in known)

    def request_for(self, kind: type, *args: Any, **kwargs: Any) -> Any:
        """An event with a request number of its own, whose answer is awaited from now on."""
        self.request += 1
        event = self.asked[self.request] = kind(self.request, *args, **kwargs)
        return event

    def ask(self, kind: type, *args: Any, **kwargs: Any) -> Reply | None:
        """Sends such an event; returns the reply if it came at once."""
        event = self.request_for(kind, *args, **kwargs)
        effects = self.send(event)
        return next((e for e in effects if isinstance(e, Reply) and e.request == event.request), None)

    def engine_of(self, attempt: Dispatch | ev.TaskRejected) -> Engine | None:
        """Where that attempt is in flight, as the core has it; None when it is not."""
        session = self.core.sessions.get(attempt.task.session_id)
        task = session.task(attempt.task) if session is not None else None
        if task is None or task.attempt != attempt.attempt or attempt.epoch != self.core.epoch:
            return None
        return task.engine if task.state in states.IN_FLIGHT else None

    # ---------------------------------------------------------------------------------------------------- clients

    def open(self, tenant: str = "") -> int:
        """A new session; its id, which nothing belongs to if it was refused."""
        session_id = self.next_session
        self.next_session += 1
        self.ask(ev.OpenSession, session_id, _auth(session_id), tenant)
        return session_id

    def create(self, session_id: int) -> None:
        self.ask(ev.CreateVariable, session_id, _auth(session_id), "name")

    def set(self, session_id: int, var_id: str, content: ev.Content) -> None:
        self.ask(ev.SetVariable, session_id, _auth(session_id), var_id, content)

    def submit(self, session_id: int, segments: Sequence[ev.Segment], **fields: Any) -> list[str]:
        """The ids of the outputs; [] when the call was refused."""
        reply = self.ask(ev.SubmitCall, session_id, _auth(session_id), tuple(segments), **fields)
        if reply is None or reply.error is not None:
            code = "no answer" if reply is None or reply.error is None else reply.error.code
            expect("answers", code in REFUSALS or session_id not in self.sessions, f"a call was refused with {code}")
            return []
        return [info.var_id for info in reply.payload.param_info if info.is_output]

    def get(self, session_id: int, var_id: str, criteria: Criteria | None = None, **limits: float | None) -> None:
        """`limits`: timeout and deadline, in seconds."""
        self.ask(ev.GetVariable, session_id, _auth(session_id), var_id, criteria, **limits)

    def cancel_get(self, request: int) -> None:
        del self.asked[request]
        self.send(ev.CancelGet(request))

    def close(self, session_id: int) -> None:
        self.ask(ev.CloseSession, session_id, _auth(session_id))

    # ---------------------------------------------------------------------------------------------------- engines

    def register(self, description: EngineDescription) -> None:
        reply = self.ask_engine(description)
        if reply.error is not None:
            expect("answers", reply.error.code in REFUSALS, f"an engine was refused with {reply.error.code}")

    def ask_engine(self, description: EngineDescription) -> Reply:
        """Registers it; what is dispatched in the same instant finds it known."""
        coming = self.core.scheduler.engines._next_id + 1
        self.engines[coming] = None
        self.contexts[coming] = set()
        reply = self.ask(ev.RegisterEngine, description)
        assert reply is not None
        if reply.error is not None:
            del self.engines[coming], self.contexts[coming]
        return reply

    def lose(self, engine_id: int) -> None:
        del self.engines[engine_id]
        self.flying = {key: d for key, d in self.flying.items() if d.engine_id != engine_id}
        self.send(ev.EngineLost(engine_id, "lost in play"))

    def started(self, dispatch: Dispatch) -> None:
        self.send(ev.TaskStarted(dispatch.epoch, dispatch.task, dispatch.attempt))

    def first_token(self, dispatch: Dispatch) -> None:
        self.send(ev.FirstToken(dispatch.epoch, dispatch.task, dispatch.attempt))

    def finish(self, dispatch: Dispatch, content: ev.Content, tokens: int) -> None:
        self._end(dispatch)
        chain = sum(link.tokens for link in dispatch.chain)
        self.send(ev.TaskFinished(dispatch.epoch, dispatch.task, dispatch.attempt, content, tokens, prompt_tokens=chain))

    def reject(self, dispatch: Dispatch) -> None:
        self._end(dispatch)
        self.send(ev.TaskRejected(dispatch.epoch, dispatch.task, dispatch.attempt, "full"))

    def fail(self, dispatch: Dispatch, retryable: bool) -> None:
        self._end(dispatch)
        code = "engine_failed" if retryable else "generation_failed"
        self.send(ev.TaskFailed(dispatch.epoch, dispatch.task, dispatch.attempt, code, "failed in play", retryable))

    def _end(self, dispatch: Dispatch) -> None:
        del self.flying[dispatch.task, dispatch.attempt]

    def evict(self, engine_id: int, context_ids: Iterable[int]) -> None:
        ids = tuple(context_ids)
        self.contexts[engine_id].difference_update(ids)
        self.send(ev.ContextsEvicted(engine_id, ids))

    def evictable(self, engine_id: int) -> list[int]:
        """Contexts that the engine may give up: no task in flight uses them, and no other continues them."""
        engine = self.core.engines[engine_id]
        return [c.id for c in engine.contexts.values() if c.tasks == 0 and not _continued(engine_id, c)]

    # ------------------------------------------------------------------------------------------------------- time

    def time_passes(self, seconds: float) -> None:
        """As a shell does it: a Tick at every deadline on the way."""
        end = self.now + seconds
        while (deadline := self.core.next_deadline()) is not None and deadline <= end:
            self.tick(deadline)
        self.now = end

    def tick(self, deadline: float) -> None:
        self.now = max(self.now, deadline)
        self.send(ev.Tick())
        after = self.core.next_deadline()
        expect(
            "liveness", after is None or after > self.now, f"at {self.now:g} s a deadline is left that a Tick does not settle"
        )

    def restart(self) -> None:
        """The core lives again: its engines are gone, and who waited asks anew."""
        self.engines.clear()
        self.contexts.clear()
        self.flying.clear()
        self.full.clear()
        self.asked.clear()
        self.send(ev.Restarted(self.core.epoch + 1))

    # ---------------------------------------------------------------------------------------------------- the end

    def bring_to_its_end(self) -> None:
        """What is in flight ends, some of it badly at first, and time goes on to the last deadline: nothing may be queued or
        running then, and every get must have been answered."""
        for session_id in list(self.sessions):
            session = self.core.sessions[session_id]
            for variable in list(session.variables.values()):
                if variable.state == "empty":  # only the client could fill it
                    self.set(session_id, variable.id, ev.Content(f"late:{variable.id}", _lengths(variable.id)))
        for step in range(MOST_STEPS):
            if self.flying:
                self._an_attempt_ends(step)
            elif (deadline := self.core.next_deadline()) is not None:
                self.tick(deadline)
            else:
                break
        else:
            raise Violation("liveness", f"not at its end after {MOST_STEPS} steps: {self.core.counts()}")
        counts = self.core.counts()
        left = {state: counts[state] for state in ("queued", "dispatched", "running") if counts.get(state)}
        expect("liveness", not left, f"no event and no deadline is pending, and tasks are {_counted(left)}")
        expect("liveness", not self.asked, f"gets {sorted(self.asked)} have no answer")

    def _an_attempt_ends(self, step: int) -> None:
        dispatch = self.flying[min(self.flying)]
        if dispatch.attempt == 1 and step % 3 == 1:
            self.reject(dispatch)
        elif dispatch.attempt <= 2 and step % 3 == 2:
            self.fail(dispatch, retryable=True)
        else:
            self.finish(dispatch, ev.Content(f"end{step}", {"t": 2, "u": 4}), 2)

    def close_everything(self) -> None:
        """All sessions close and all lifetimes pass: nothing is left behind."""
        for session_id in sorted(self.core.sessions):
            self.close(session_id)
        left = {name: count for name, count in self.core.counts().items() if count}
        expect("nothing left", not left, f"all sessions are closed, and there are {_counted(left)}")
        self.time_passes(10.0 * self.config.constant_prefix_var_timeout)
        for engine in self.core.engines.values():
            idle = not (engine.reserved or engine.tasks or engine.contexts)
            expect("nothing left", idle, f"engine {engine.id} has {engine.reserved} tokens, {len(engine.contexts)} contexts")
        expect("nothing left", not self.core.scheduler.prefixes._roots, "prefixes that nobody needs are kept")


def _auth(session_id: int) -> str:
    return f"auth{session_id}"


def _lengths(var_id: str) -> dict[str, int]:
    return {"t": 3, "u": 6}


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def _continued(engine_id: int, context: Any) -> bool:
    children = context.node.children if context.node is not None else None
    return any(child.contexts and engine_id in child.contexts for child in (children or {}).values())
