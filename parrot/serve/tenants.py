"""Tenants: what each may have at once, and what it has. A session belongs to one for its whole life.

It decides who is refused or held back for a limit of its own; never in which order tasks run. A tenant at its limit of
sessions or queued tasks is refused where a session begins. Tokens in flight refuse nothing: a task that would be too much
waits beside the queue, out of every policy's sight, so that it holds nobody else's back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from parrot.protocol.errors import ParrotError
from parrot.serve.config import TenantConfig
from parrot.serve.rates import DrainRate

if TYPE_CHECKING:
    from parrot.serve.engines import Lane
    from parrot.serve.graph import Task

OTHERS = "*"  #: the entry that each tenant without one of its own has


class Tenant:
    """One tenant with what it has now. `tokens`: those of its tasks in the queue and in flight, held ones left out;
    `held`: tasks that wait for that number to fall, as (order, sequence, task) in the policy's order."""

    __slots__ = ("ended", "ends", "held", "leaves", "left", "limits", "name", "queued", "sessions", "tokens", "weight")

    def __init__(self, name: str, limits: TenantConfig) -> None:
        self.name = name
        self.limits = limits
        self.weight = limits.weight
        self.sessions = 0
        self.queued = 0
        self.tokens = 0
        self.held: list[tuple[Any, int, Task]] = []
        self.left = 0  # tasks that have left the queue
        self.ended = 0  # sessions that have
        self.leaves = DrainRate()
        self.ends = DrainRate()

    def check_session(self, now: float) -> None:
        """Raises too_many_sessions when it may not open another one."""
        most = self.limits.max_sessions
        if most is None:
            return
        self.ends.note(now, self.ended)
        if self.sessions >= most:
            raise ParrotError(
                "too_many_sessions",
                f"this tenant has {self.sessions} sessions open; its max_sessions is {most}",
                retry_after_s=self.ends.wait_s(now, self.ended, self.sessions - most + 1),
            )

    def check_queue(self, now: float) -> None:
        """Raises queue_full when a session of its may not begin anew."""
        most = self.limits.max_queued_tasks
        if most is None:
            return
        self.leaves.note(now, self.left)
        if self.queued >= most:
            raise ParrotError(
                "queue_full",
                f"{self.queued} tasks of this tenant wait for an engine; its max_queued_tasks is {most}",
                retry_after_s=self.leaves.wait_s(now, self.left, self.queued - most + 1),
            )

    def left_queue(self, now: float) -> None:
        """One of its tasks waits no longer."""
        self.leaves.note(now, self.left)
        self.queued -= 1
        self.left += 1

    def grant(self, task: Task) -> bool:
        """Whether the task may go to the queue now; its tokens count from then on. One task alone always may."""
        most = self.limits.max_tokens_in_flight
        if most is None:
            return True
        tokens = _tokens(task)
        if self.tokens and self.tokens + tokens > most:
            return False
        self.tokens += tokens
        task.granted = tokens
        return True


class Tenants:
    """All tenants that have a session. Where none are configured there is one, without limits, that stands for all."""

    def __init__(self, config: Mapping[str, TenantConfig]) -> None:
        self._config = config
        self._others = config.get(OTHERS, TenantConfig())
        self._present: dict[str, Tenant] = {}
        self._everybody = Tenant(OTHERS, self._others)
        #: whether the scheduler has to tell of tasks
        self.limiting = any(c.max_queued_tasks or c.max_tokens_in_flight for c in config.values())
        self.held = 0  #: tasks of all tenants that are held

    def weight_of(self, name: str) -> float:
        """The tenant's share beside others', 1.0 unless it is configured."""
        return self._config.get(name, self._others).weight

    def of(self, name: str) -> Tenant:
        """The tenant, for a session that may be about to begin."""
        if not self._config:
            return self._everybody
        found = self._present.get(name)
        return found if found is not None else Tenant(name, self._config.get(name, self._others))

    def join(self, tenant: Tenant) -> None:
        """A session of its is open now."""
        tenant.sessions += 1
        if tenant is not self._everybody:
            self._present[tenant.name] = tenant

    def leave(self, tenant: Tenant, now: float) -> None:
        """A session of its has ended."""
        if tenant.limits.max_sessions is not None:
            tenant.ends.note(now, tenant.ended)
        tenant.sessions -= 1
        tenant.ended += 1
        if not tenant.sessions:
            self._present.pop(tenant.name, None)

    # ---------------------------------------------------------------------------------------- held tasks

    def hold(self, task: Task) -> None:
        """The task, whose `order` is set, waits beside the queue."""
        insort(task.call.session.account.held, (task.order, task.sequence, task))
        task.held = True
        self.held += 1

    def drop(self, task: Task) -> None:
        """The task is held no longer."""
        held = task.call.session.account.held
        del held[bisect_left(held, (task.order, task.sequence))]
        task.held = False
        self.held -= 1

    def next_of(self, tenant: Tenant) -> Task | None:
        """The first held task of the tenant if it may go to the queue now; its tokens count from then on."""
        if not tenant.held:
            return None
        task = tenant.held[0][2]
        if not tenant.grant(task):
            return None
        self.drop(task)
        return task

    @staticmethod
    def give_back(task: Task) -> None:
        """The task has ended: its tokens are free again."""
        task.call.session.account.tokens -= task.granted
        task.granted = 0

    def held_in(self, lane: Lane) -> list[Task]:
        """The held tasks of that lane."""
        if not self.held:
            return []
        return [task for tenant in self._present.values() for _, _, task in tenant.held if task.call.lane is lane]


def _tokens(task: Task) -> int:
    """Its whole prompt under the tokenizer that makes the most of it, and all that it may generate: a number that depends on
    no engine."""
    total = task.sampling.max_gen_length
    for link in task.links or ():
        for content in link.contents:
            total += max(content.lengths.values(), default=0)
    return total
