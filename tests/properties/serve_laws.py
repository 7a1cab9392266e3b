"""The laws of a ServeCore that hold after every instant, whatever clients and engines do: invariants 1, 3, 6, 7, 8 and 9.

`ServeCoreMachine` is the play of `serve_machine` under these laws; test modules make their machines of it.
"""

from __future__ import annotations

import math
from typing import Any

from hypothesis.stateful import invariant

from parrot.serve import events as ev
from parrot.serve import states
from parrot.serve.deadlines import _end_of, _tightest
from parrot.serve.engines import Engine
from parrot.serve.policies.base import admits
from sim.conformance import laws
from tests.properties.deduction_reference import Known, deduce
from tests.properties.serve_machine import ServeCorePlay


def by_counts(engine: Engine) -> tuple[int, ...]:
    """A policy's key that would show any change that indexes are not told of."""
    return engine.prefill_tokens, engine.cached_tokens, engine.prompt_tokens


class ServeCoreMachine(ServeCorePlay):
    """Random programs on random engines."""

    def tasks(self) -> list[Any]:
        return [t for s in self.core.sessions.values() for c in s.calls for t in c.tasks]

    @invariant()
    def conservation(self) -> None:
        """Invariant 1, as far as sessions are open: every task is in one state, and the books agree with the tasks."""
        if hasattr(self, "core"):
            laws.conservation(self)  # type: ignore[arg-type]

    @invariant()
    def causality(self) -> None:
        """Invariant 3."""
        if hasattr(self, "core"):
            laws.causality(self)  # type: ignore[arg-type]

    @invariant()
    def capacity(self) -> None:
        """Invariant 8, by the core's own count; and the count is the sum of what is in flight."""
        for engine in self.core.engines.values() if hasattr(self, "core") else ():
            assert engine.reserved == sum(t.reserved for t in engine.tasks)
            assert engine.latency_tasks == sum(t.counted_latency for t in engine.tasks)
            assert all(t.counted_latency for t in engine.tasks if t.latency_sensitive)
            assert engine.prompt_tokens == sum(sum(c.tokens for c in t.contexts[:-1]) for t in engine.tasks)
            unanswered = [t for t in engine.tasks if t.first_token_s is None]
            assert engine.prefill_tokens == sum(t.reserved - t.max_gen_length for t in unanswered)
            assert engine.cached_tokens == sum(c.tokens for c in engine.contexts.values())
            if len(engine.tasks) > 1:
                assert len(engine.tasks) <= engine.description.tasks_capacity
                assert engine.reserved <= engine.description.tokens_capacity
            for lane in self.core.scheduler.engines.lanes.values():
                lane.ordered(by_counts)  # kept sorted from now on
                for index in lane.indexes.values():
                    loads = sorted((index._key(e), e.id) for e in lane.engines.values())
                    assert [e.id for e in index] == [engine_id for _, engine_id in loads]

    @invariant()
    def tenants_keep_to_their_limits(self) -> None:
        """By the core's own count; and the count is the sum of what each has. Who is held has something to wait for."""
        if not hasattr(self, "core") or not self.config.tenants:
            return
        tasks = self.tasks()
        tenants = self.core.scheduler.tenants
        assert tenants.held == sum(t.held for t in tasks)
        for account in tenants._present.values():
            own = [t for t in tasks if t.call.session.account is account]
            assert account.sessions == sum(s.account is account for s in self.core.sessions.values())
            assert account.sessions <= (account.limits.max_sessions or account.sessions)
            assert account.queued == sum(t.state == "queued" for t in own)
            assert [t for _, _, t in account.held] == sorted((t for t in own if t.held), key=lambda t: (t.order, t.sequence))
            assert account.tokens == sum(t.granted for t in own)
            for task in own:  # a task's tokens of the minute are settled when it ends, and not before it is ready
                assert not task.charged or (task.ready_s is not None and not task.ended)
            if account.minute is not None:
                assert account.minute.requests is None or account.minute.requests.left(self.now) >= 0.0
            granted = [t for t in own if t.granted]
            assert all(t.state in {"queued", *states.IN_FLIGHT} and not t.held for t in granted)
            most = account.limits.max_tokens_in_flight
            if most is not None:
                assert all(t.granted or t.held for t in own if t.state in {"queued", *states.IN_FLIGHT})
                assert account.tokens <= most or len(granted) == 1
                assert granted or not account.held

    @invariant()
    def claims_are_for_who_waits(self) -> None:
        """An engine is kept free for one queued task at most, which has waited and does not fit there yet; so is a lane's."""
        if not hasattr(self, "core") or self.core.scheduler.claims is None:
            return
        by_lane = self.core.scheduler.claims.by_lane
        kept = {engine.claimed: engine for engine in self.core.engines.values() if engine.claimed is not None}
        assert kept == dict(by_lane.values())
        for lane, (task, engine) in by_lane.items():
            assert task.state == "queued"
            assert task.call.lane is lane
            assert engine.id in lane.engines
            assert engine.state == "live"
            assert task.ready_s + self.config.global_scheduler.patience <= self.now
            assert not admits(engine, task)

    @invariant()
    def the_bound_on_deadlines_is_never_too_late(self) -> None:
        """Who keeps a timer by `due_at` alone, as the simulator does, misses nothing that is due."""
        if hasattr(self, "core"):
            wanted_s = self.core.next_deadline()
            assert wanted_s is None or self.core.due_at <= wanted_s

    @invariant()
    def deadlines_go_backward(self) -> None:
        """Nothing is left that nobody can use in time. What a task waits for is no less urgent, and no less long of use."""
        if not hasattr(self, "core"):
            return
        known = self.core.dataflow.deadlines
        first = known.next_deadline()
        for task in self.tasks():
            if task.ended:
                continue
            end_s = _end_of(task)
            assert end_s >= self.now
            assert end_s == math.inf or (first is not None and first <= end_s)
            assert task.deadline_s is None or task.deadline_s <= end_s
            for producer in task.awaited() if task.activated else ():
                assert _tightest(producer) <= _tightest(task)
                assert _end_of(producer) >= end_s or producer.call.until_s < end_s
        for request, event in self.asked.items():
            if request in self.too_late:
                until_s = self.too_late[request]
                assert until_s >= self.now
                task = self.core.sessions[event.session_id].variables[event.var_id].producer
                assert task is None or (_tightest(task) <= until_s and _end_of(task) >= min(until_s, task.call.until_s))

    @invariant()
    def contexts_agree(self) -> None:
        """The engines hold what the core believes them to hold; a context is live while a task uses it; isolation."""
        if hasattr(self, "core"):
            laws.contexts(self)  # type: ignore[arg-type]

    @invariant()
    def the_prefix_store_agrees(self) -> None:
        """Each prefix knows the contexts that hold it and the queued tasks that begin with it, and is there for somebody."""
        if not hasattr(self, "core"):
            return
        scheduler = self.core.scheduler
        queued = [t for t in self.tasks() if t.state == "queued" and not t.held]
        holds = {c for e in self.core.engines.values() for c in e.contexts.values() if c.node is not None}
        stack = list(scheduler.prefixes._roots.values())
        while stack:
            node = stack.pop()
            stack += (node.children or {}).values()
            for engine_id, context in (node.contexts or {}).items():
                assert (context.node, context.engine.id) == (node, engine_id)
                holds.remove(context)
            wanted = {t for t in queued if node in t.path} if self.core.scheduler.policy.uses_prefix_groups else set()
            assert set(node.queued or ()) == wanted
            assert node.users or node.children or node.contexts
        assert not holds
        for task in queued:
            assert task.path[-1].prefix_hash == task.prefix_hashes()[-1]

    @invariant()
    def liveness(self) -> None:
        """Invariant 7: with nothing in flight and no deadline ahead, no task is queued."""
        if hasattr(self, "core") and not self.flying and self.core.scheduler.next_deadline() is None:
            assert self.core.scheduler.waiting == 0

    @invariant()
    def work_conservation(self) -> None:
        """Invariant 9: the first task of a lane waits only if no engine of the lane admits it."""
        if hasattr(self, "core"):
            laws.work_conservation(self)  # type: ignore[arg-type]

    @invariant()
    def only_what_is_wanted_runs(self) -> None:
        """A task is queued or in flight only if a get or a call asked for an output that needs it."""
        for session in self.core.sessions.values() if hasattr(self, "core") else ():
            needed = closure(session, self.wanted.get(session.id, set()))
            for call in session.calls:
                for task in call.tasks:
                    assert task in needed or task.state not in states.IN_FLIGHT | {"queued"}

    @invariant()
    def deduction(self) -> None:
        """What gets mean for tasks that have not ended is what it is from scratch, where no task has failed: what a failed one
        has passed on stays."""
        for session in self.core.sessions.values() if hasattr(self, "core") else ():
            own = [t for c in session.calls for t in c.tasks if not t.ended]
            if any(t.state == "failed" for c in session.calls for t in c.tasks):
                continue
            name = {t: (t.id.call, t.id.output) for t in own}
            known = {
                name[t]: Known(
                    tuple(name[c] for c in t.consumers()),
                    tuple(name[c] for c in t.consumers() if c.sources == [t]),
                    () if t.output.criteria is None else (t.output.criteria,),
                )
                for t in own
            }
            for task, found in zip(own, deduce(known).values(), strict=True):
                aim = None if task.aim is None else name[task.aim]
                assert (task.activated, task.criteria, task.depth) == (found.activated, found.criteria, found.depth)
                assert (aim, task.level) == (found.aim, found.level)
                members = [] if task.group is None else task.group.unended()
                if len(members) > 1 or found.group is not None:
                    assert {name[member] for member in members} == found.group
                assert task.group is None or len(task.group.members) > 1
                if task.group is None or found.group is not None:
                    assert task.latency_sensitive == (found.sensitive or task.pinned)
                queued = [] if task.group is None else list(task.group.queued)
                assert set(queued) == {member for member in members if member.state == "queued" and not member.held}

    def close_everything(self) -> None:
        """Nothing is left behind when all sessions are closed and all lifetimes are over."""
        for session in sorted(self.core.sessions):
            self.ask(self.request_for(ev.CloseSession, session, f"auth{session}"))
        assert self.asked == {}
        assert self.core.counts() == {"sessions": 0, "gets": 0, "queue": 0}
        for engine in self.core.engines.values():
            assert engine.reserved == 0
            assert not engine.tasks
        self.time_passes(100.0)
        for engine in self.core.engines.values():
            assert not engine.contexts
            assert (engine.prompt_tokens, engine.prefill_tokens, engine.cached_tokens) == (0, 0, 0)
        assert not self.core.scheduler.prefixes._roots, "prefixes that nobody needs are pruned"
        assert not self.core.scheduler.tenants._present
        assert not self.core.scheduler.describe_policy_errors()


def closure(session: Any, wanted: set[str]) -> set[Any]:
    """The tasks that the `wanted` outputs need, as the session's calls say."""
    found: set[Any] = set()
    stack = [session.variables[var_id] for var_id in sorted(wanted) if var_id in session.variables]
    while stack:
        producer = stack.pop().producer
        if producer is not None and producer not in found:
            found.add(producer)
            stack.extend(producer.inputs())
    return found
