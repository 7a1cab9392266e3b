"""What must hold after every instant of a core, whatever clients, engines and the policy do: invariants 1, 3, 6, 8 and 9 of the
design, and that an explanation is true. Looks into the core, which no part of the system does, and changes nothing there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parrot.serve import states
from parrot.serve.engines import Engine
from parrot.serve.graph import Task
from parrot.serve.policies.base import admits, claims_conservation
from sim.conformance.play import Play, expect


def tasks_of(play: Play) -> list[Task]:
    """All tasks of open sessions."""
    return [task for session in play.core.sessions.values() for call in session.calls for task in call.tasks]


def conservation(play: Play) -> None:
    """Every task is in one state, and the books agree with the tasks."""
    tasks = tasks_of(play)
    counts = play.core.counts()
    known = (*states.ENDED, *states.IN_FLIGHT, "queued", "waiting")
    expect("conservation", sum(counts.get(state, 0) for state in known) == len(tasks), f"{len(tasks)} tasks, counted {counts}")
    queued = sum(task.state == "queued" for task in tasks)
    expect("conservation", counts["queue"] == queued, f"{queued} tasks are queued, the queue says {counts['queue']}")
    flying = {(task.id, task.attempt) for task in tasks if task.state in states.IN_FLIGHT}
    message = f"in flight by the core's books {sorted(flying)}, by what it said {sorted(play.flying)}"
    expect("conservation", flying == set(play.flying), message)
    for session in play.core.sessions.values():
        own = [task for call in session.calls for task in call.tasks]
        unfinished = sum(not task.ended for task in own)
        active = sum(task.state in states.IN_FLIGHT or task.state == "queued" for task in own)
        gets = sum(len(variable.getters or ()) for variable in session.variables.values())
        found, books = (unfinished, active, gets), (session.unfinished, session.active, session.waiting_gets)
        message = f"session {session.id}: unfinished, active, gets are {found}, its books say {books}"
        expect("conservation", found == books, message)
    expect("conservation", counts["gets"] == len(play.asked), f"{len(play.asked)} gets wait, counted {counts['gets']}")


def causality(play: Play) -> None:
    """Submitted, ready, dispatched, first token, finished: in that order."""
    for task in tasks_of(play):
        if task.state in ("finished", "running", "dispatched"):
            times = [task.call.submitted_s, task.ready_s, task.dispatched_s, task.first_token_s, task.finished_s]
            whole = task.state != "finished" or task.engine_name is None or None not in times  # no engine: from a journal
            expect("causality", whole, f"task {task.id} is finished: {times}")
            known = [time for time in times if time is not None]
            expect("causality", known == sorted(known), f"task {task.id}: {times}")


def capacity(play: Play) -> None:
    """By the core's own count, which is the sum of what is in flight."""
    lanes = play.core.scheduler.engines.lanes.values()
    for engine in play.core.engines.values():
        reserved = sum(task.reserved for task in engine.tasks)
        booked = f"engine {engine.id}: {engine.reserved} tokens are booked, {reserved} reserved"
        expect("capacity", engine.reserved == reserved, booked)
        sensitive = sum(task.counted_latency for task in engine.tasks)
        expect("capacity", engine.latency_tasks == sensitive, f"engine {engine.id}: {sensitive} latency-bound tasks")
        most = engine.description
        if len(engine.tasks) > 1:
            within = len(engine.tasks) <= most.tasks_capacity and engine.reserved <= most.tokens_capacity
            told = f"engine {engine.id} has {len(engine.tasks)} of {most.tasks_capacity} tasks, {engine.reserved} of "
            expect("capacity", within, f"{told}{most.tokens_capacity} tokens")
    for lane in lanes:
        for index in lane.indexes.values():
            loads = sorted((index._key(engine), engine.id) for engine in lane.engines.values())
            in_order = [engine.id for engine in index] == [engine_id for _, engine_id in loads]
            expect("capacity", in_order, f"an index of {lane.describe()} is out of order")


def contexts(play: Play) -> None:
    """Engines hold what the core believes them to hold; a context is live while a task uses it; no session shares another's."""
    for engine in play.core.engines.values():
        expect("contexts", set(engine.contexts) == play.contexts[engine.id], f"engine {engine.id} holds other contexts")
        used: dict[int, int] = {}
        for task in engine.tasks:
            for context in task.contexts or ():
                used[context.id] = used.get(context.id, 0) + 1
            domain = task.call.session.domain
            path = [context.node for context in task.contexts or () if context.node is not None]
            alone = all(node.domain == domain for node in path[1:]) and all(node.domain in ("", domain) for node in path[:1])
            expect("isolation", alone, f"task {task.id} shares contexts across domains")
        for context in engine.contexts.values():
            users = used.get(context.id, 0)
            right = context.tasks == users and context.state == ("live" if users else "retained")
            expect("contexts", right, f"context {context.id} is {context.state} with {context.tasks} users, {users} are there")
            owner = context.owner
            if owner is not None and context.node is not None:
                kept = context in (owner.contexts or ()) and owner.id in play.core.sessions
                expect("contexts", kept, f"context {context.id} belongs to session {owner.id}, which does not know it")


def liveness(play: Play) -> None:
    """With nothing in flight and no deadline ahead, no task is queued."""
    if not play.flying and play.core.scheduler.next_deadline() is None:
        waiting = play.core.counts()["queue"]
        expect("liveness", not waiting, f"{waiting} tasks are queued, and neither an event nor a deadline is pending")


def work_conservation(play: Play) -> None:
    """For a policy that claims it: the first task of a lane waits only if no engine of the lane admits it."""
    if not claims_conservation(play.core.scheduler.policy):
        return
    queue = play.core.scheduler.queue
    for lane in queue.lanes():
        head = queue.head(lane)
        for engine in lane.engines.values():
            idle = head is not None and play.full.get(engine.id) != engine.version and admits(engine, head)
            told = f"work_conserving is claimed, but task {head.id if head else None}, the first of its lane, waits while "
            expect("work conservation", not idle, f"{told}engine {engine.id} ({_load(engine)}) admits it")


def explanations(play: Play) -> None:
    """The engine that was chosen is among those that were weighed, had room, and terms are finite numbers."""
    kept = play.core.scheduler.explanations
    for placed in kept.take() if kept is not None else ():
        chosen = [candidate for candidate in placed.candidates if candidate.engine_id == placed.engine_id]
        told = f"task {placed.task} went to engine {placed.engine_id}"
        expect("explanations", bool(chosen), f"{told}, which is not among the candidates of its placement")
        expect("explanations", all(c.fits for c in chosen), f"{told}, whose candidate says that it had no room")
        terms = {name: value for c in placed.candidates for name, value in c.terms.items()}
        wrong = [name for name, value in terms.items() if value is None]
        expect("explanations", not wrong, f"{told}: terms that are no finite numbers: {', '.join(wrong)}")


#: All of them, in the order in which they are checked.
LAWS: tuple[Callable[[Play], None], ...] = (
    conservation, causality, capacity, contexts, liveness, work_conservation, explanations,
)  # fmt: skip


def check_all(play: Play) -> None:
    """Raises the first Violation."""
    for law in LAWS:
        law(play)


def _load(engine: Any) -> str:
    assert isinstance(engine, Engine)
    most = engine.description
    return f"{len(engine.tasks)}/{most.tasks_capacity} tasks, {engine.reserved}/{most.tokens_capacity} tokens"
