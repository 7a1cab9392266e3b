"""Tasks that wait for an engine: in the queue, or beside it while their tenant has too many tokens in flight.

It keeps what such a task needs (its place, and the prefixes of its prompt) and knows how many wait, how fast they go, and for
whom no engine is there. It never decides that a task fails (`lifecycle.py`) or where one goes (the policy).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from parrot.serve.claims import Claims
from parrot.serve.containment import ContainedPolicy
from parrot.serve.engines import Lane
from parrot.serve.events import Constant
from parrot.serve.graph import NEVER, Task, chain_of
from parrot.serve.prefixes import PrefixTrie
from parrot.serve.queue import TaskQueue
from parrot.serve.rates import DrainRate
from parrot.serve.service import Service
from parrot.serve.states import TASK
from parrot.serve.tenants import Tenant, Tenants

# By names of this module's own that never change: the compiled module need not look them up.
_CONSTANT: Final = Constant
_ENQUEUE: Final = TASK.of("enqueue")


class Backlog:
    """All tasks that wait for an engine, in the order that `policy` gives them. `claims`: engines kept free for some of them;
    `service`: kept only for a policy that asks; `engine_wait_s`: how long a task waits for an engine that could take it."""

    def __init__(
        self,
        queue: TaskQueue,
        policy: ContainedPolicy,
        tenants: Tenants,
        prefixes: PrefixTrie,
        claims: Claims | None,
        service: Service | None,
        engine_wait_s: float,
    ) -> None:
        self._queue = queue
        self._policy = policy
        self._tenants = tenants
        self._prefixes = prefixes
        self._claims = claims
        self._service = service
        self.engine_wait_s = engine_wait_s
        self.changed = False  #: whether the policy has anything new to act on: a task more, or room that was not there
        self._entered = 0  # tasks that have ever waited, each once
        self._drain = DrainRate()
        self._stranded: OrderedDict[Task, float] = OrderedDict()  # no engine of their lane is live -> until when they wait

    # ------------------------------------------------------------------------------------------- in and out

    def enter(self, task: Task, now: float) -> None:
        """A task that is ready, or ready again; its prompt is known (`take_prompt`)."""
        if task.ready_at == NEVER:
            self._entered += 1
            task.sequence = self._entered
            task.ready_at = now
            task.state = _ENQUEUE[task.state]
            if self._service is not None:
                self._service.queued(task)
        if self._tenants.limiting:
            task.call.session.account.charge(task, now)
            self._line_up(task)
        else:
            self._queue.add(task)
        self.changed = True
        if not task.call.lane.engines:
            self.strand(task, now)

    def leave(self, task: Task, now: float) -> None:
        """The task waits no longer."""
        if self._claims is not None and self._claims.by_lane:
            self._claims.settle(task)
        if task.held:
            self._tenants.drop(task)
        else:
            self._queue.remove(task)
        if self._tenants.limiting:
            task.call.session.account.left_queue(now)
        if self._stranded:
            self._stranded.pop(task, None)

    def reorder(self, task: Task) -> None:
        """The task's depth or deadline has changed while it waits."""
        if not task.held:
            self._queue.reorder(task)
        elif (order := self._policy.order(task)) != task.order:
            self._tenants.drop(task)
            task.order = order
            self._tenants.hold(task)
            self._let_in(task.call.session.account)

    def give_back(self, task: Task) -> None:
        """The task has ended: its tenant's tokens are free for others."""
        if task.granted:
            self._tenants.give_back(task)
        if self._tenants.held:
            self._let_in(task.call.session.account)

    def room_opened(self) -> None:
        """An engine has more room: if any are in the queue, one may go there."""
        if self._queue.size:
            self.changed = True

    def _line_up(self, task: Task) -> None:
        """To the queue, or beside it when its tenant has too many tokens in flight. Nobody overtakes who is held already but
        by the policy's order."""
        account = task.call.session.account
        account.queued += 1
        if task.granted or (not account.held and account.grant(task)):
            self._queue.add(task)
            return
        task.order = self._policy.order(task)
        self._tenants.hold(task)
        self._let_in(account)

    def _let_in(self, account: Tenant) -> None:
        """Held tasks for which there is room now go to the queue."""
        while (task := self._tenants.next_of(account)) is not None:
            self._queue.add(task)
            self.changed = True

    # ------------------------------------------------------------------------------------------- prompts

    def take_prompt(self, task: Task) -> bool:
        """Makes the chain of the task's prompt and holds its prefixes, so that they stay the same ones while it waits. False
        when the prompt is empty."""
        links = task.links = chain_of(task)
        if not links:
            return False
        kept, task.path = task.path, self._prefixes.path(links, task.call.session.domain, _head_is_common(task))
        if kept:
            self._prefixes.leave(kept)
        return True

    def drop_prompt(self, task: Task) -> None:
        """Drops what only a task that waits needs."""
        if task.path:
            self._prefixes.leave(task.path)
        task.path = task.links = task.tokens = task.counted_under = None

    def keep_prefixes(self, task: Task) -> None:
        """An attempt came to nothing, and another may follow: its prefixes stay the same ones, even if nothing else needs them
        meanwhile."""
        if task.contexts is not None:
            task.path = self._prefixes.held([context.node for context in task.contexts if context.node is not None])

    # ------------------------------------------------------------------------------------------- how many, how fast

    @property
    def size(self) -> int:
        """How many tasks wait, those that are held for their tenant's limit included."""
        return self._queue.size + self._tenants.held

    def in_lane(self, lane: Lane) -> list[Task]:
        """All that wait in the lane, as they stand now."""
        return [*self._queue.in_order(lane), *self._tenants.held_in(lane)]

    def note_rate(self, now: float) -> None:
        """Takes note of how many have left. To be called when that may have changed, while some wait."""
        self._drain.note(now, self._entered - self.size)

    def room_after_s(self, now: float, wanted: int) -> int:
        """After how many seconds, by the rate of late, `wanted` tasks fewer will wait."""
        left = self._entered - self.size
        self._drain.note(now, left)
        return self._drain.wait_s(now, left, wanted)

    # ------------------------------------------------------------------------------------------- without an engine

    def strand(self, task: Task, now: float) -> None:
        """No engine of its lane is live: from now on, unless it does so already, it waits for one to come."""
        if task not in self._stranded:
            self._stranded[task] = now + self.engine_wait_s

    def rescue(self, task: Task) -> None:
        """An engine of its lane has come."""
        self._stranded.pop(task, None)

    def wait_anew(self, now: float) -> None:
        """All that wait for an engine to come do so from now on."""
        for task in self._stranded:
            self._stranded[task] = now + self.engine_wait_s

    def overdue(self, now: float) -> Task | None:
        """Takes out one that has waited for an engine for too long, the longest first."""
        if self._stranded and next(iter(self._stranded.values())) <= now:
            return self._stranded.popitem(last=False)[0]
        return None

    def next_deadline(self) -> float | None:
        """When the first of them has waited for too long."""
        return next(iter(self._stranded.values())) if self._stranded else None


def _head_is_common(task: Task) -> bool:
    """Whether its chain begins with a constant that everybody may share: with the call's own first segment, not with what
    comes behind an empty one."""
    call = task.call
    if not call.cache_prefix or call.fuse_fill:
        return False
    first = call.segments[0]
    return type(first) is _CONSTANT and bool(task.links) and task.links[0].contents[0] is first.content  # type: ignore[index]
