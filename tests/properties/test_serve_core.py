"""ServeCore under random events and faults: invariants 1, 3, 4, 6, 7 and 8 of the design, moves taken from its tables.

The machine plays clients and engines. Whatever may happen to a task in flight is read off the table of task moves, so a
move that is added there is exercised here; so is every event that comes too late.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from parrot.protocol.api import Criteria
from parrot.serve import events as ev
from parrot.serve import states
from parrot.serve.config import GlobalSchedulerConfig, ServeCoreConfig
from parrot.serve.core import ServeCore
from parrot.serve.effects import Abort, Dispatch, FreeContexts, Reply, SessionEnded
from parrot.serve.policies import parse_policy
from tests.serve.driver import content, described, out, read, text, value

POLICIES = ("parrot", "parrot:all", "parrot:app_fifo+ctx_aware", "parrot:graph_group+ctx_group", "round_robin", "least_loaded")


@pytest.mark.parametrize("table", [states.SESSION, states.VARIABLE, states.TASK, states.CONTEXT, states.ENGINE])
def test_a_move_that_a_table_does_not_list_is_refused(table: states.Table) -> None:
    known = {state for state, _ in table} | set(table.values())
    for state in known:
        for move in {move for _, move in table} | {"nonsense"}:
            if (state, move) in table:
                assert states.move(table, state, move) == table[state, move]
            else:
                with pytest.raises(states.IllegalMove, match=f"{move}.*{state}"):
                    states.move(table, state, move)


class ServeCoreMachine(RuleBasedStateMachine):
    """Random programs on random engines. `history` holds every instant, so that a second core can be fed the same."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.request = 0
        self.epoch = 0
        self.next_session = 1
        self.history: list[tuple[list[ev.AnyEvent], float]] = []
        self.effects: list[Any] = []
        self.waiting: set[int] = set()  # requests without a reply
        self.sessions: dict[int, list[str]] = {}  # id -> variable ids
        self.engines: set[int] = set()
        self.contexts: dict[int, set[int]] = {}  # engine -> contexts that it was told to make and not to free
        self.flying: dict[tuple[Any, int], Dispatch] = {}
        self.past: list[Dispatch] = []

    @initialize(
        policy=st.sampled_from(POLICIES),
        attempts=st.integers(1, 4),
        queue=st.integers(2, 20),
        tenants=st.booleans(),
    )
    def begin(self, policy: str, attempts: int, queue: int, tenants: bool) -> None:
        section = GlobalSchedulerConfig(max_attempts=attempts, max_queue_size=queue, engine_wait_timeout=20.0)
        self.tenants = tenants
        self.config = ServeCoreConfig(
            max_sessions_num=6,
            max_engines_num=4,
            session_life_span=30.0,
            constant_prefix_var_timeout=15.0,
            max_tasks_per_session=12,
            global_scheduler=parse_policy(policy, section),
        )
        self.core = ServeCore(self.config)

    # -------------------------------------------------------------------------------------------- plumbing

    def send(self, *events: ev.AnyEvent) -> list[Any]:
        self.history.append((list(events), self.now))
        effects = self.core.handle(events, self.now)
        self.effects.append(effects)
        for fault in self.core.take_faults():
            raise fault.error
        for effect in effects:
            if isinstance(effect, Reply):
                assert effect.request in self.waiting, "a reply that nobody asked for, or a second one"
                self.waiting.discard(effect.request)
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
                self.flying.pop((effect.task, effect.attempt))
            elif isinstance(effect, FreeContexts):
                assert set(effect.context_ids) <= self.contexts[effect.engine_id], "freed twice, or never made"
                self.contexts[effect.engine_id] -= set(effect.context_ids)
            elif isinstance(effect, SessionEnded):
                self.sessions.pop(effect.session_id, None)
        return effects

    def ask(self, kind: type, *args: Any, **kwargs: Any) -> Reply | None:
        self.request += 1
        self.waiting.add(self.request)
        effects = self.send(kind(self.request, *args, **kwargs))
        return next((e for e in effects if isinstance(e, Reply) and e.request == self.request), None)

    def session(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.sessions)), label="session")

    # -------------------------------------------------------------------------------------------- clients

    @rule(tenant=st.sampled_from(["a", "b"]))
    def open(self, tenant: str) -> None:
        session_id = self.next_session
        self.next_session += 1
        reply = self.ask(ev.OpenSession, session_id, f"auth{session_id}", tenant if self.tenants else "")
        assert reply is not None
        if reply.error is None:
            self.sessions[session_id] = []
        else:
            assert reply.error.code == "too_many_sessions"

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def create_variable(self, data: st.DataObject) -> None:
        session = self.session(data)
        reply = self.ask(ev.CreateVariable, session, f"auth{session}")
        assert reply is not None
        assert reply.error is None
        self.sessions[session].append(reply.payload["var_id"])

    @precondition(lambda self: any(self.sessions.values()))
    @rule(data=st.data(), key=st.sampled_from("pqr"), tokens=st.integers(0, 40))
    def set_variable(self, data: st.DataObject, key: str, tokens: int) -> None:
        session = data.draw(st.sampled_from(sorted(s for s, v in self.sessions.items() if v)))
        var = data.draw(st.sampled_from(self.sessions[session]))
        reply = self.ask(ev.SetVariable, session, f"auth{session}", var, content(f"{key}{tokens}", tokens))
        assert reply is not None
        assert reply.error is None or reply.error.code == "conflict"

    @precondition(lambda self: self.sessions)
    @rule(
        data=st.data(),
        shape=st.lists(st.sampled_from(["text", "value", "read", "out", "out_var"]), min_size=1, max_size=6),
        criteria=st.sampled_from([None, *Criteria]),
        fuse=st.booleans(),
        cache=st.booleans(),
        models=st.sampled_from([(), (), ("m",), ("n",), ("m", "n")]),
    )
    def submit(
        self,
        data: st.DataObject,
        shape: list[str],
        criteria: Criteria | None,
        fuse: bool,
        cache: bool,
        models: tuple[str, ...],
    ) -> None:
        session = self.session(data)
        known = self.sessions[session]
        segments: list[ev.Segment] = [text(data.draw(st.sampled_from(["S", "T"])), 20)]
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
        arguments = (session, f"auth{session}", tuple(segments))
        options = {"output_criteria": criteria, "fuse_fill": fuse, "cache_prefix": cache, "models": models}
        reply = self.ask(ev.SubmitCall, *arguments, **options)
        assert reply is not None
        if reply.error is not None:
            assert reply.error.code in {"conflict", "cyclic_dependency", "queue_full", "too_many_tasks"}
            return
        for info in reply.payload.param_info:
            if info.var_id not in self.sessions[session]:
                self.sessions[session].append(info.var_id)

    @precondition(lambda self: any(self.sessions.values()))
    @rule(
        data=st.data(),
        criteria=st.sampled_from([None, *Criteria]),
        timeout=st.sampled_from([None, 0.0, 3.0, 50.0]),
    )
    def get(self, data: st.DataObject, criteria: Criteria | None, timeout: float | None) -> None:
        session = data.draw(st.sampled_from(sorted(s for s, v in self.sessions.items() if v)))
        # The newest variables are what applications fetch.
        var = data.draw(st.sampled_from(self.sessions[session][-4:]))
        self.ask(ev.GetVariable, session, f"auth{session}", var, criteria, timeout)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel_get(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(sorted(self.waiting)))
        self.waiting.discard(request)
        self.send(ev.CancelGet(request))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        session = self.session(data)
        reply = self.ask(ev.CloseSession, session, f"auth{session}")
        assert reply is not None
        assert reply.error is None

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
        self.request += 1
        self.waiting.add(self.request)
        next_id = self.core.scheduler.engines._next_id + 1
        if len(self.engines) < 4:
            self.engines.add(next_id)
            self.contexts[next_id] = set()
        self.send(ev.RegisterEngine(self.request, description))

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
        task = self.core._sessions[dispatch.task.session_id].task(dispatch.task)
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
            made = content(f"out{detail}", detail)
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
        self.send(ev.Restarted(self.epoch))

    # -------------------------------------------------------------------------------------------- laws

    def dump(self) -> Any:
        return [
            (s.id, s.state, s.active, s.unfinished, [(t.id, t.state, t.attempt) for c in s.calls for t in c.tasks])
            for s in self.core._sessions.values()
        ], {e.id: (e.reserved, len(e.tasks), sorted(e.contexts)) for e in self.core.engines.values()}

    def tasks(self) -> list[Any]:
        return [t for s in self.core._sessions.values() for c in s.calls for t in c.tasks]

    @invariant()
    def conservation(self) -> None:
        """Invariant 1, as far as sessions are open: every task is in one state, and the books agree with the tasks."""
        if not hasattr(self, "core"):
            return
        tasks = self.tasks()
        counts = self.core.counts()
        assert sum(counts.get(s, 0) for s in {*states.ENDED, *states.IN_FLIGHT, "queued", "waiting"}) == len(tasks)
        assert counts["queue"] == sum(t.state == "queued" for t in tasks)
        assert {(t.id, t.attempt) for t in tasks if t.state in states.IN_FLIGHT} == set(self.flying)
        for session in self.core._sessions.values():
            own = [t for c in session.calls for t in c.tasks]
            assert session.unfinished == sum(not t.ended for t in own)
            assert session.active == sum(t.state in states.IN_FLIGHT or t.state == "queued" for t in own)
            assert session.waiting_gets == sum(len(v.getters or ()) for v in session.variables.values())
        assert counts["gets"] == len(self.waiting)

    @invariant()
    def causality(self) -> None:
        """Invariant 3."""
        for task in self.tasks() if hasattr(self, "core") else ():
            times = [task.call.submitted_s, task.ready_s, task.dispatched_s, task.first_token_s, task.finished_s]
            if task.state == "finished":
                assert None not in times
            known = [t for t in times if t is not None]
            if task.state in {"finished", "running", "dispatched"}:
                assert known == sorted(known)

    @invariant()
    def capacity(self) -> None:
        """Invariant 8, by the core's own count; and the count is the sum of what is in flight."""
        for engine in self.core.engines.values() if hasattr(self, "core") else ():
            assert engine.reserved == sum(t.reserved for t in engine.tasks)
            assert engine.latency_tasks == sum(t.counted_latency for t in engine.tasks)
            if len(engine.tasks) > 1:
                assert len(engine.tasks) <= engine.description.tasks_capacity
                assert engine.reserved <= engine.description.tokens_capacity
            for lane in self.core.scheduler.engines.lanes.values():
                for index in lane.indexes.values():
                    assert [load for load, _ in index._entries] == sorted(index._of.values())
                    assert index._of == {e.id: index._key(e) for e in lane.engines.values()}

    @invariant()
    def contexts_agree(self) -> None:
        """The engines hold what the core believes them to hold; a context is live while a task uses it; isolation."""
        for engine in self.core.engines.values() if hasattr(self, "core") else ():
            assert set(engine.contexts) == self.contexts[engine.id]
            used: dict[int, int] = {}
            for task in engine.tasks:
                for context in task.contexts:
                    used[context.id] = used.get(context.id, 0) + 1
                domains = {node.domain for node in task.path[1:]}
                assert domains <= {task.call.session.domain}
                assert task.path[0].domain in {"", task.call.session.domain}
            for context in engine.contexts.values():
                assert context.tasks == used.get(context.id, 0)
                assert context.state == ("live" if context.tasks else "retained")
                if context.owner is not None and context.node is not None:
                    assert context in (context.owner.contexts or ())
                    assert context.owner.id in self.core._sessions

    @invariant()
    def liveness(self) -> None:
        """Invariant 7: with nothing in flight and no deadline ahead, no task is queued."""
        if hasattr(self, "core") and not self.flying and self.core.scheduler.next_deadline() is None:
            assert len(self.core.scheduler.queue) == 0

    def teardown(self) -> None:
        """Determinism (invariant 4): the same events give a fresh core the same effects. And nothing is left behind."""
        if not hasattr(self, "core"):
            return
        fresh = ServeCore(self.config)
        encode = msgspec.json.encode
        decode = msgspec.json.Decoder(list[ev.AnyEvent])
        for (events, now), effects in zip(self.history, self.effects, strict=True):
            assert encode(fresh.handle(decode.decode(encode(events)), now)) == encode(effects)
        assert fresh.next_deadline() == self.core.next_deadline()
        for session in list(self.sessions):
            self.ask(ev.CloseSession, session, f"auth{session}")
        assert self.waiting == set()
        assert self.core.counts() == {"sessions": 0, "gets": 0, "queue": 0}
        for engine in self.core.engines.values():
            assert engine.reserved == 0
            assert not engine.tasks
        self.time_passes(100.0)
        for engine in self.core.engines.values():
            assert not engine.contexts
        assert not self.core.scheduler.prefixes._roots, "prefixes that nobody needs are pruned"
        assert not self.core.scheduler.policy_errors


ServeCoreMachine.TestCase.settings = settings(
    max_examples=int(os.environ.get("PARROT_EXAMPLES", "100")),
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestServeCore = ServeCoreMachine.TestCase
