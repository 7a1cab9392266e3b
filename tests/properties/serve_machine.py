"""Plays clients and engines of a ServeCore at random, and keeps what they know.

Whatever may happen to a task in flight is read off the table of task moves, so a move that is added there is exercised
here; so is every event that comes too late. The laws that must hold meanwhile are in `serve_laws`.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve import states
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig, TenantConfig
from parrot.serve.core import ServeCore
from parrot.serve.effects import Abort, Dispatch, FreeContexts, Reply, SessionEnded
from parrot.serve.policies import POLICIES as REGISTRY
from parrot.serve.policies import parse_policy
from tests.serve.driver import content, described, out, read, text, value

SHIPPED = (*sorted(REGISTRY), "parrot:all", "parrot:app_fifo+ctx_aware", "parrot:graph_group+ctx_group")

#: Idempotency-Keys, few of them, so that requests are repeated.
KEYS = st.sampled_from([None, None, None, "k1", "k2"])

#: What tenants may have: the one that is named, and each other.
LIMITS = {
    "a": TenantConfig(max_tokens_in_flight=70, max_queued_tasks=4),
    "*": TenantConfig(max_tokens_in_flight=200, max_sessions=3, requests_per_minute=30, tokens_per_minute=900),
}

#: What a core may answer to a request of a client that knows its sessions and variables.
REFUSALS = {"conflict", "cyclic_dependency", "queue_full", "too_many_tasks", "rate_limited"}


class ServeCorePlay(RuleBasedStateMachine):
    """Random programs on random engines. `history` holds every instant of the core's life and what came of it."""

    policies: tuple[str, ...] = SHIPPED

    def __init__(self) -> None:
        super().__init__()
        self.full: dict[int, int] = {}  # engine that rejected a task -> its capacity's version then
        self.now = 0.0
        self.request = 0
        self.epoch = 0
        self.next_session = 1
        self.history: list[tuple[list[ev.AnyEvent], float]] = []
        self.effects: list[Any] = []
        self.asked: dict[int, Any] = {}  # request -> the event that asked, until it is answered
        self.too_late: dict[int, float] = {}  # request of a get -> when its value is worthless
        self.answers: dict[tuple[type, int, str], Any] = {}  # (kind, session, Idempotency-Key) -> the first answer
        self.wanted: dict[int, set[str]] = {}  # session -> variables that a get or a call asked for
        self.sessions: dict[int, list[str]] = {}  # id -> variable ids
        self.engines: set[int] = set()
        self.contexts: dict[int, set[int]] = {}  # engine -> contexts that it was told to make and not to free
        self.flying: dict[tuple[Any, int], Dispatch] = {}
        self.past: list[Dispatch] = []

    @initialize(
        policy=st.runner().flatmap(lambda machine: st.sampled_from(machine.policies)),
        attempts=st.integers(1, 4),
        queue=st.integers(2, 20),
        tenants=st.booleans(),
        limits=st.sampled_from([{}, {}, LIMITS]),
        patience=st.sampled_from([None, 0.5, 5.0]),
    )
    def begin(
        self,
        policy: str,
        attempts: int,
        queue: int,
        tenants: bool,
        limits: dict[str, TenantConfig],
        patience: float | None,
    ) -> None:
        section = GlobalSchedulerConfig(
            max_attempts=attempts, max_queue_size=queue, engine_wait_timeout=20.0, patience=patience
        )
        self.tenants = tenants
        self.config = ServeCoreConfig(
            max_sessions_num=6,
            max_engines_num=4,
            session_life_span=30.0,
            constant_prefix_var_timeout=15.0,
            max_tasks_per_session=12,
            global_scheduler=parse_policy(policy, section),
            tenants=limits,
        )
        self.core = ServeCore(self.config)

    # -------------------------------------------------------------------------------------------- plumbing

    def send(self, *events: ev.AnyEvent) -> list[Any]:
        """One instant. What follows from it for clients and engines is taken in."""
        self.history.append((list(events), self.now))
        rejecting = [engine for event in events if isinstance(event, ev.TaskRejected) and (engine := self.engine_of(event))]
        effects = self.core.handle(events, self.now)
        self.full.update({engine.id: engine.version for engine in rejecting})
        self.effects.append(effects)
        for fault in self.core.take_faults():
            raise fault.error
        for effect in effects:
            if isinstance(effect, Reply):
                assert effect.request in self.asked, "a reply that nobody asked for, or a second one"
                self.answered(self.asked.pop(effect.request), effect)
            elif isinstance(effect, Dispatch):
                assert effect.engine_id in self.engines
                key = (effect.task, effect.attempt)
                assert key not in self.flying
                self.flying[key] = effect
                self.past.append(effect)
                made = {link.context_id for link in effect.chain} | {effect.generate_context_id}
                self.contexts[effect.engine_id] |= made
                assert all(link.tokens > 0 for link in effect.chain)
                assert effect.parent in {-1, *(link.context_id for link in effect.chain)}
            elif isinstance(effect, Abort):
                assert self.flying.pop((effect.task, effect.attempt), None) is not None, "aborted, but not in flight"
            elif isinstance(effect, FreeContexts):
                assert set(effect.context_ids) <= self.contexts[effect.engine_id], "freed twice, or never made"
                self.contexts[effect.engine_id] -= set(effect.context_ids)
            elif isinstance(effect, SessionEnded):
                self.forget(effect.session_id)
        return effects

    def answered(self, event: Any, reply: Reply) -> None:
        """What a client learns."""
        if reply.error is None and isinstance(event, ev.GetVariable):
            assert self.now <= self.too_late.get(event.request, self.now), "a value that came too late"
        if isinstance(event, ev.GetVariable) and (reply.error is None or reply.error.code not in {"not_found", "forbidden"}):
            self.wanted.setdefault(event.session_id, set()).add(event.var_id)
        if reply.error is not None:
            return
        if isinstance(event, ev.OpenSession):
            self.sessions.setdefault(event.session_id, [])
            return
        key = getattr(event, "idempotency_key", None)
        if key is not None:
            first = self.answers.setdefault((type(event), event.session_id, key), reply.payload)
            assert reply.payload == first, "a repeated request was answered otherwise"
        known = self.sessions.get(getattr(event, "session_id", 0))
        if isinstance(event, ev.CreateVariable) and known is not None and reply.payload["var_id"] not in known:
            known.append(reply.payload["var_id"])
        elif isinstance(event, ev.SubmitCall) and known is not None:
            infos = reply.payload.param_info
            known.extend(info.var_id for info in infos if info.var_id not in known)
            if event.output_criteria is not None:
                last = [info.var_id for info in infos if info.is_output][-1]
                self.wanted.setdefault(event.session_id, set()).add(last)

    def forget(self, session_id: int) -> None:
        """The session is over."""
        self.sessions.pop(session_id, None)
        self.wanted.pop(session_id, None)
        self.answers = {key: answer for key, answer in self.answers.items() if key[1] != session_id}

    def together(self, events: list[Any]) -> None:
        """One instant of events that know nothing of each other; afterwards the core's word is taken for what still flies."""
        self.send(*events)
        self.flying = {key: d for key, d in self.flying.items() if self.flies(d)}

    def flies(self, dispatch: Dispatch) -> bool:
        return self.engine_of(dispatch) is not None

    def engine_of(self, attempt: Dispatch | ev.TaskRejected) -> Any:
        """Where that attempt is in flight, as the core has it; None when it is not."""
        session = self.core.sessions.get(attempt.task.session_id)
        task = session.task(attempt.task) if session is not None else None
        present = task is not None and task.attempt == attempt.attempt and attempt.epoch == self.core.epoch
        return task.engine if present and task.state in states.IN_FLIGHT else None  # type: ignore[union-attr]

    def request_for(self, kind: type, *args: Any, **kwargs: Any) -> Any:
        """An event with a request number of its own, whose answer is awaited from now on."""
        self.request += 1
        event = self.asked[self.request] = kind(self.request, *args, **kwargs)
        return event

    def ask(self, event: Any) -> Reply | None:
        effects = self.send(event)
        return next((e for e in effects if isinstance(e, Reply) and e.request == event.request), None)

    def session(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.sessions)), label="session")

    def variable(self, data: st.DataObject, newest: int = 0) -> tuple[int, str]:
        session = data.draw(st.sampled_from(sorted(s for s, v in self.sessions.items() if v)), label="session")
        return session, data.draw(st.sampled_from(self.sessions[session][-newest:]), label="variable")

    # -------------------------------------------------------------------------------------------- clients

    @rule(tenant=st.sampled_from(["a", "b"]))
    def open(self, tenant: str) -> None:
        session_id = self.next_session
        self.next_session += 1
        event = self.request_for(ev.OpenSession, session_id, f"auth{session_id}", tenant if self.tenants else "")
        reply = self.ask(event)
        assert reply is not None
        assert reply.error is None or reply.error.code == "too_many_sessions"

    def create_event(self, data: st.DataObject) -> Any:
        session = self.session(data)
        return self.request_for(ev.CreateVariable, session, f"auth{session}", "name", data.draw(KEYS))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def create_variable(self, data: st.DataObject) -> None:
        reply = self.ask(self.create_event(data))
        assert reply is not None
        assert reply.error is None

    def set_event(self, data: st.DataObject) -> Any:
        session, var = self.variable(data)
        key, tokens = data.draw(st.sampled_from("pqr")), data.draw(st.integers(0, 40))
        return self.request_for(
            ev.SetVariable, session, f"auth{session}", var, content(f"{key}{tokens}", tokens), data.draw(KEYS)
        )

    @precondition(lambda self: any(self.sessions.values()))
    @rule(data=st.data())
    def set_variable(self, data: st.DataObject) -> None:
        reply = self.ask(self.set_event(data))
        assert reply is not None
        assert reply.error is None or reply.error.code == "conflict"

    def submit_event(self, data: st.DataObject) -> Any:
        session = self.session(data)
        known = self.sessions[session]
        shape = data.draw(st.lists(st.sampled_from(["text", "value", "read", "out", "out_var"]), min_size=1, max_size=6))
        segments: list[ev.Segment] = [text(data.draw(st.sampled_from(["S", "T", "empty"])), 20)]
        if segments[0].content.key == "empty":  # type: ignore[union-attr]
            segments[0] = text("empty", 0)
        for number, kind in enumerate([*shape, "out"]):
            name = f"p{number}"
            if kind == "text":
                segments.append(text(data.draw(st.sampled_from("UVW")), 5))
            elif kind == "value":
                segments.append(value(name, data.draw(st.sampled_from("xyz")), 7))
            elif kind == "read" and known:
                segments.append(read(name, data.draw(st.sampled_from(known))))
            elif kind == "out_var" and known:
                segments.append(out(name, data.draw(st.sampled_from(known))))
            elif kind.startswith("out"):
                segments.append(out(name, max_gen_length=data.draw(st.integers(1, 60))))
        return self.request_for(
            ev.SubmitCall,
            session,
            f"auth{session}",
            tuple(segments),
            models=data.draw(st.sampled_from([(), (), ("m",), ("n",), ("m", "n")])),
            output_criteria=data.draw(st.sampled_from([None, *Criteria])),
            fuse_fill=data.draw(st.booleans()),
            cache_prefix=data.draw(st.booleans()),
            idempotency_key=data.draw(KEYS),
            deadline=data.draw(st.sampled_from([None, None, None, None, 7.0])),
        )

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        reply = self.ask(self.submit_event(data))
        assert reply is not None
        assert reply.error is None or reply.error.code in REFUSALS

    def get_event(self, data: st.DataObject) -> Any:
        session, var = self.variable(data, newest=4)  # the newest variables are what applications fetch
        criteria = data.draw(st.sampled_from([None, *Criteria]))
        timeout = data.draw(st.sampled_from([None, 0.0, 3.0, 50.0]))
        deadline = data.draw(st.sampled_from([None, None, None, 0.0, 4.0, 30.0]))
        self.wanted.setdefault(session, set()).add(var)
        event = self.request_for(ev.GetVariable, session, f"auth{session}", var, criteria, timeout, deadline=deadline)
        if deadline is not None:
            self.too_late[event.request] = self.now + deadline
        return event

    @precondition(lambda self: any(self.sessions.values()))
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        self.ask(self.get_event(data))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel_get(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.asked)))
        del self.asked[request]
        self.send(ev.CancelGet(request))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), call=st.integers(0, 3))
    def cancel_call(self, data: st.DataObject, call: int) -> None:
        session = self.session(data)
        made = self.core.calls(session)
        ended = [task.state for task in made[call].tasks if task.ended] if call < len(made) else []
        reply = self.ask(self.request_for(ev.CancelCall, session, f"auth{session}", call))
        assert reply is not None
        if call >= len(made):
            assert reply.error is not None
            assert reply.error.code == "not_found"
            return
        after = [task.state for task in made[call].tasks]
        assert set(after) <= {"finished", "failed", "cancelled"}
        assert after.count("finished") == ended.count("finished")

    def close_event(self, data: st.DataObject) -> Any:
        session = self.session(data)
        return self.request_for(ev.CloseSession, session, f"auth{session}")

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        reply = self.ask(self.close_event(data))
        assert reply is not None
        assert reply.error is None

    @rule(data=st.data(), engine=st.booleans())
    def a_program_comes(self, data: st.DataObject, engine: bool) -> None:
        """What applications do most: a session, calls that build on each other, a get; on an engine, if there is none."""
        if engine and not self.engines:
            self.register(tasks=2, tokens=300, longest=5000, bos=1, model="m")
        self.open("a")
        if self.sessions:
            for _ in range(2):
                self.ask(self.submit_event(data))
            if any(self.sessions.values()):
                self.ask(self.get_event(data))

    # -------------------------------------------------------------------------------------------- engines

    @rule(
        tasks=st.integers(1, 4),
        tokens=st.integers(30, 400),
        longest=st.sampled_from([25, 60, 5000]),
        bos=st.integers(0, 1),
        model=st.sampled_from("mmn"),
    )
    def register(self, tasks: int, tokens: int, longest: int, bos: int, model: str) -> None:
        capacity = {"tasks_capacity": tasks, "tokens_capacity": tokens, "max_seq_len": longest}
        description = described("e", **capacity, bos_tokens=bos, model=model)
        next_id = self.core.scheduler.engines._next_id + 1
        if len(self.engines) < 4:
            self.engines.add(next_id)
            self.contexts[next_id] = set()
        self.send(self.request_for(ev.RegisterEngine, description))

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        engine = data.draw(st.sampled_from(sorted(self.engines)))
        self.engines.discard(engine)
        self.flying = {key: d for key, d in self.flying.items() if d.engine_id != engine}
        self.send(ev.EngineLost(engine, "test"))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), detail=st.integers(0, 3))
    def something_happens_to_a_task(self, data: st.DataObject, detail: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.flying, key=repr)))
        dispatch = self.flying[key]
        task = self.core.sessions[dispatch.task.session_id].task(dispatch.task)
        assert task is not None
        moves = sorted({move for state, move in states.TASK if state == task.state} - {"cancel"})
        move = data.draw(st.sampled_from(moves), label=f"move of a {task.state} task")
        expected = states.TASK[task.state, move]
        name = (dispatch.epoch, dispatch.task, dispatch.attempt)
        if move != "start":
            del self.flying[key]
        if move == "start":
            self.send((ev.TaskStarted if detail else ev.FirstToken)(*name))
        elif move == "finish":
            made = content(f"out{detail}:{dispatch.task.session_id}", detail)
            self.send(ev.TaskFinished(*name, made, detail, prompt_tokens=9))
        elif move == "retry":
            tries = task.tries
            event = ev.TaskRejected(*name, "full") if detail % 2 else ev.TaskFailed(*name, "engine_failed", "again", True)
            self.send(event)
            if tries >= self.config.global_scheduler.max_attempts:
                expected = "failed"
        else:
            self.send(ev.TaskFailed(*name, "generation_failed", "no", False))
        reached = {expected, "dispatched", "failed"} if expected == "queued" else {expected}
        assert task.state in reached

    @precondition(lambda self: self.past)
    @rule(data=st.data(), kind=st.sampled_from(["start", "first", "finish", "fail", "reject"]))
    def something_comes_too_late(self, data: st.DataObject, kind: str) -> None:
        old = data.draw(st.sampled_from(self.past))
        if (old.task, old.attempt) in self.flying and old.epoch == self.epoch:
            return
        name = (old.epoch, old.task, old.attempt)
        late: dict[str, ev.AnyEvent] = {
            "start": ev.TaskStarted(*name),
            "first": ev.FirstToken(*name),
            "finish": ev.TaskFinished(*name, content("stale", 3), 3),
            "fail": ev.TaskFailed(*name, "generation_failed", "stale"),
            "reject": ev.TaskRejected(*name),
        }
        before = self.dump()
        self.send(late[kind])
        assert self.dump() == before

    @precondition(lambda self: any(self.contexts.values()))
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        """An engine gives up contexts that no task in flight uses, those that continue them first."""
        engine_id = data.draw(st.sampled_from(sorted(e for e, c in self.contexts.items() if c and e in self.engines) or [0]))
        engine = self.core.engines.get(engine_id)
        if engine is None:
            return
        free = [c for c in engine.contexts.values() if c.tasks == 0 and not self.continued(engine_id, c)]
        if free:
            gone = data.draw(st.lists(st.sampled_from(free), unique_by=id, min_size=1))
            self.contexts[engine_id] -= {c.id for c in gone}
            self.send(ev.ContextsEvicted(engine_id, tuple(c.id for c in gone)))

    @staticmethod
    def continued(engine_id: int, context: Any) -> bool:
        children = context.node.children if context.node is not None else None
        return any(child.contexts and engine_id in child.contexts for child in (children or {}).values())

    # -------------------------------------------------------------------------------------------- time

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        """As a shell does it: a Tick at every deadline on the way."""
        end = self.now + seconds
        while (deadline := self.core.next_deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            self.send(ev.Tick())
            after = self.core.next_deadline()
            assert after is None or after > self.now, "a deadline that a Tick does not settle"
        self.now = end

    @rule()
    def restart(self) -> None:
        self.epoch += 1
        self.engines.clear()
        self.flying.clear()
        self.contexts.clear()
        self.full.clear()
        self.asked.clear()
        self.send(ev.Restarted(self.epoch))

    def dump(self) -> Any:
        return [
            (s.id, s.state, s.active, s.unfinished, [(t.id, t.state, t.attempt) for c in s.calls for t in c.tasks])
            for s in self.core.sessions.values()
        ], {e.id: (e.reserved, len(e.tasks), sorted(e.contexts)) for e in self.core.engines.values()}
