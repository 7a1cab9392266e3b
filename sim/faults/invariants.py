"""What must hold inside: checked on every instant of a core (cheaply), on whole cores now and then, and in the end.

It looks into the cores, which no part of the system does; it changes nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from parrot.engine.context_ids import ContextIds
from parrot.engine.core import EngineCore
from parrot.engine.emulated.engine import EmulatedEngine
from parrot.protocol.engine import TaskId
from parrot.serve import events as ev
from parrot.serve import states
from parrot.serve.core import ServeCore
from parrot.serve.effects import Abort, Dispatch, SessionEnded, TaskEnded
from parrot.serve.engines import Engine
from parrot.serve.server import Server
from sim.faults.disk import SimDisk
from sim.faults.witness import Witness

_WHOLE_EVERY = 16  # instants between two looks at a whole core
_ENDS = (ev.TaskFinished, ev.TaskFailed, ev.TaskRejected)


class CoreWatch:
    """One life of a ServeCore. `saw`: told of each instant's events and effects."""

    def __init__(self, core: ServeCore, witness: Witness, saw: Callable[[float, Any, Any], None]) -> None:
        self.instants = 0
        self.events = 0
        self.attempts = 0
        self._core = core
        self._witness = witness
        self._saw = saw
        self._open: dict[TaskId, tuple[int, int]] = {}  # task -> attempt and engine
        self._handle = core.handle
        self._take_faults = core.take_faults
        core.handle = self.handle  # type: ignore[method-assign]
        core.take_faults = self.take_faults  # type: ignore[method-assign]

    @property
    def epoch(self) -> int:
        return self._core.epoch

    def under_way(self) -> list[tuple[TaskId, int]]:
        """Attempts that have been dispatched and not ended, and their tasks."""
        return [(task, attempt) for task, (attempt, _) in self._open.items()]

    def handle(self, events: Sequence[ev.AnyEvent], now: float) -> list[Any]:
        """The core's `handle`, watched."""
        effects = self._handle(events, now)
        self.instants += 1
        self.events += len(events)
        for event in events:
            self._note_event(event)
        for effect in effects:
            self._note_effect(effect)
        self._saw(now, events, effects)
        if self.instants % _WHOLE_EVERY == 0:
            self.check()
        return effects

    def take_faults(self) -> list[Any]:
        """The core's `take_faults`; there must be none."""
        faults = self._take_faults()
        for fault in faults:
            self._witness.report("no faults", f"{fault.what}: {fault.error!r}")
        return faults

    def _note_event(self, event: Any) -> None:
        if isinstance(event, _ENDS):
            open_attempt = self._open.get(event.task)
            if event.epoch == self._core.epoch and open_attempt is not None and open_attempt[0] == event.attempt:
                del self._open[event.task]
        elif isinstance(event, ev.EngineLost):
            self._open = {task: at for task, at in self._open.items() if at[1] != event.engine_id}

    def _note_effect(self, effect: Any) -> None:
        if isinstance(effect, Dispatch):
            self.attempts += 1
            other = self._open.get(effect.task)
            if other is not None:
                message = f"attempt {effect.attempt} of task {effect.task} began while attempt {other[0]} was under way"
                self._witness.report("attempts", message)
            self._open[effect.task] = (effect.attempt, effect.engine_id)
        elif isinstance(effect, Abort):
            self._open.pop(effect.task, None)
        elif isinstance(effect, TaskEnded):
            message = f"task {effect.task} ended while attempt {effect.attempt} of it was under way"
            self._witness.expect("attempts", effect.task not in self._open, message)
        elif isinstance(effect, SessionEnded):
            self._witness.ended(effect.session_id)

    # ----------------------------------------------------------------------------------------------- the whole core

    def check(self) -> None:
        """Conservation, causality, capacity, isolation, contexts: invariants 1, 3, 6 and 8 of the design."""
        core: Any = self._core
        tasks = [task for session in core.sessions.values() for call in session.calls for task in call.tasks]
        self._conservation(tasks)
        for task in tasks:
            times = [task.call.submitted_s, task.ready_s, task.dispatched_s, task.first_token_s, task.finished_s]
            known = [t for t in times if t is not None]
            if task.state in ("dispatched", "running"):
                self._expect("causality", known == sorted(known), f"task {task.id}: {times}")
        for engine in core.engines.values():
            self._engine(engine)

    def _conservation(self, tasks: Sequence[Any]) -> None:
        core: Any = self._core
        flying = {task.id: task.attempt for task in tasks if task.state in states.IN_FLIGHT}
        opened = {task: attempt for task, (attempt, _) in self._open.items()}
        self._expect("conservation", flying == opened, f"in flight by the core's books {flying}, by what it said {opened}")
        queued = sum(task.state == "queued" for task in tasks)
        self._expect("conservation", core.scheduler.waiting == queued, f"{queued} tasks are queued, the queue has others")
        for session in core.sessions.values():
            own = [task for call in session.calls for task in call.tasks]
            unfinished = sum(not task.ended for task in own)
            active = sum(task.state in states.IN_FLIGHT or task.state == "queued" for task in own)
            waiting = sum(len(variable.getters or ()) for variable in session.variables.values())
            books, found = (session.unfinished, session.active, session.waiting_gets), (unfinished, active, waiting)
            message = f"session {session.id}: unfinished, active, gets are {found}, its books say {books}"
            self._expect("conservation", books == found, message)

    def _engine(self, engine: Any) -> None:
        reserved = sum(task.reserved for task in engine.tasks)
        self._expect(
            "capacity", engine.reserved == reserved, f"engine {engine.id}: {engine.reserved} booked, {reserved} reserved"
        )
        if len(engine.tasks) > 1:
            most = engine.description
            within = len(engine.tasks) <= most.tasks_capacity and reserved <= most.tokens_capacity
            self._expect("capacity", within, f"engine {engine.id} has {len(engine.tasks)} tasks, {reserved} tokens")
        used: dict[int, int] = {}
        for task in engine.tasks:
            domain = task.call.session.domain
            path = [context.node for context in task.contexts if context.node is not None]
            alone = {node.domain for node in path[1:]} <= {domain} and path[0].domain in ("", domain)
            self._expect("isolation", alone, f"task {task.id} of {domain!r} shares contexts of others")
            for context in task.contexts:
                used[context.id] = used.get(context.id, 0) + 1
        for context in engine.contexts.values():
            fits = context.tasks == used.get(context.id, 0) and context.state == ("live" if context.tasks else "retained")
            self._expect("contexts", fits, f"context {context.id}: {context.tasks} users, {context.state}")

    def _expect(self, invariant: str, holds: bool, message: str) -> None:
        self._witness.expect(invariant, holds, message)


def check_blocks(witness: Witness, name: str, core: EngineCore) -> None:
    """Invariant 2: free + held = total, each block held by the context that had it first; the others go on in an ancestor's."""
    contexts = list(core.contexts)
    total = core.pool.free + sum(context.owned for context in contexts) + core.limbo_blocks
    witness.expect("blocks", total == core.limits.num_blocks, f"{name}: {total} of {core.limits.num_blocks} blocks are there")
    lenders = [context.predecessor() for context in contexts if context.borrows]
    once = len(lenders) == len(set(lenders)) and set(lenders) == {context for context in contexts if context.lends}
    witness.expect("blocks", once, f"{name}: the blocks that contexts go on in are not those that were lent, each once")


def check_agreement(witness: Witness, known: Engine, engine: EmulatedEngine, ids: ContextIds) -> None:
    """With nothing under way, what the core counts on is on the engine. (An output of one token never is: an engine
    computes nothing for its last token, and says so in the message that brings the output.)"""
    core = engine.core
    counted_on = sorted(ids.of_core(context.id) for context in known.contexts.values() if context.filled and context.tokens > 1)
    told_later = {*(core.contexts._evicted or ()), *engine._evicted, *map(ids.of_core, ids._evicted)}  # with the next message
    missing = [i for i in counted_on if core.contexts.get(i) is None and i not in told_later]
    witness.expect("contexts", not missing, f"the core counts on contexts {missing}, which {known.name} does not have")


def check_epoch(witness: Witness, name: str, core: EngineCore, life: int) -> None:
    """A registered engine holds nothing that the core of an earlier epoch named, but what it is about to let go."""
    old = [context.id for context in core.contexts if context.id >> 48 not in (0, life) and not context.freed]
    witness.expect("epochs", not old, f"{name} holds contexts of an earlier epoch: {old}")


def check_empty(witness: Witness, server: Server, disk: SimDisk) -> None:
    """All sessions are over and all lifetimes too: nothing is left behind anywhere."""
    core: Any = server.core
    shell: Any = server.shell
    links: Any = server.links
    left = {
        "tasks, sessions or gets": {k: v for k, v in core.counts().items() if v},
        "prefixes": core.scheduler.prefixes._roots,
        "contexts": [c for e in core.engines.values() for c in e.contexts],
        "texts": links._texts._pieces,
        "texts' sessions": links._texts._sessions,
        "streams": len(links._streams),
        "replies": shell._replies,
        "task streams": [key for link in links._links.values() for key in link.running],
        "shown by the ledger": shell._ledger._shown,
        "rows of the journal": list(disk.rows),
        "texts of the journal": list(disk.texts),
        "streams of the journal": list(disk.shown),
    }
    for what, found in left.items():
        witness.expect("nothing left", not found, f"{what} are left: {found}")


def check_idle_engine(witness: Witness, name: str, core: EngineCore, undisturbed: bool) -> None:
    """An engine that nobody asks for anything: all its room can be had; and it is empty, if every message reached it."""
    witness.expect("blocks", not core.has_work, f"{name} still works")
    available = core.contexts.available
    witness.expect("blocks", available == core.limits.num_blocks, f"{name}: {available} of {core.limits.num_blocks} blocks")
    left = [context.id for context in core.contexts]
    witness.expect("nothing left", not (undisturbed and left), f"{name} still has contexts {left}")
