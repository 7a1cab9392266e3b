"""Tenants: what each may have at once, and what it has. A session belongs to one for its whole life.

It decides who is refused or held back for a limit of its own; never in which order tasks run. A tenant at its limit of
sessions or queued tasks is refused where a session begins, one at its limit a minute wherever it submits. Tokens in flight
refuse nothing: a task that would be too much waits beside the queue, out of every policy's sight, so that it holds nobody
else's back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from parrot.protocol.errors import ParrotError
from parrot.serve.config import TenantConfig
from parrot.serve.rates import Allowance, DrainRate

if TYPE_CHECKING:
    from parrot.serve.engines import Lane
    from parrot.serve.graph import Task

OTHERS = "*"  #: the entry that each tenant without one of its own has
KEPT = 1024  #: tenants without sessions whose minutes are remembered, before those that have nothing to remember are dropped


class Minute:
    """What a tenant may still ask for in this minute. It outlives the tenant's sessions."""

    __slots__ = ("requests", "tokens")

    def __init__(self, limits: TenantConfig) -> None:
        self.requests = None if limits.requests_per_minute is None else Allowance(limits.requests_per_minute)
        self.tokens = None if limits.tokens_per_minute is None else Allowance(limits.tokens_per_minute)

    def is_full(self, now: float) -> bool:
        """Nothing of it is taken."""
        return all(each is None or each.left(now) >= each.most for each in (self.requests, self.tokens))


class Tenant:
    """One tenant with what it has now. `tokens`: those of its tasks in the queue and in flight, held ones left out;
    `held`: tasks that wait for that number to fall, as (order, sequence, task) in the policy's order."""

    __slots__ = (
        "ended", "ends", "held", "leaves", "left", "limits", "minute", "name", "queued", "sessions", "tokens", "weight",
    )  # fmt: skip

    def __init__(self, name: str, limits: TenantConfig, minute: Minute | None = None) -> None:
        self.name = name
        self.minute = minute
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

    def check_minute(self, now: float) -> None:
        """Raises rate_limited when it has asked for too much lately."""
        minute = self.minute
        if minute is None:
            return
        if minute.requests is not None and (wait_s := minute.requests.wait_s(now, 1.0)):
            raise ParrotError(
                "rate_limited",
                f"this tenant has sent more calls than its requests_per_minute, {minute.requests.most}, allows",
                retry_after_s=wait_s,
            )
        if minute.tokens is not None and minute.tokens.left(now) <= 0.0:
            raise ParrotError(
                "rate_limited",
                f"this tenant's calls have more tokens than its tokens_per_minute, {minute.tokens.most}, allows",
                retry_after_s=minute.tokens.wait_s(now, 1.0),
            )

    def asked(self, now: float) -> None:
        """A call of its was accepted."""
        if self.minute is not None and self.minute.requests is not None:
            self.minute.requests.take(now, 1.0)

    def charge(self, task: Task, now: float) -> None:
        """The task is ready: all that it may come to counts in this minute."""
        if self.minute is not None and self.minute.tokens is not None and not task.charged:
            task.charged = _tokens(task)
            self.minute.tokens.take(now, task.charged)

    def settle(self, task: Task, used: int, now: float) -> None:
        """The task has ended: what it did not use of its tokens is given back."""
        if task.charged and self.minute is not None and self.minute.tokens is not None:
            self.minute.tokens.take(now, used - task.charged)
        task.charged = 0

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
        self._minutes: dict[str, Minute] = {}
        self._sweep_at = KEPT
        #: whether the scheduler has to tell of tasks
        self.limiting = any(c.max_queued_tasks or c.max_tokens_in_flight or c.tokens_per_minute for c in config.values())
        self.held = 0  #: tasks of all tenants that are held

    def weight_of(self, name: str) -> float:
        """The tenant's share beside others', 1.0 unless it is configured."""
        return self._config.get(name, self._others).weight

    def of(self, name: str) -> Tenant:
        """The tenant, for a session that may be about to begin."""
        if not self._config:
            return self._everybody
        found = self._present.get(name)
        if found is not None:
            return found
        limits = self._config.get(name, self._others)
        minute = None
        if limits.requests_per_minute is not None or limits.tokens_per_minute is not None:
            minute = self._minutes.get(name) or Minute(limits)
        return Tenant(name, limits, minute)

    def join(self, tenant: Tenant, now: float) -> None:
        """A session of its is open now."""
        tenant.sessions += 1
        if tenant is self._everybody:
            return
        self._present[tenant.name] = tenant
        if tenant.minute is not None:
            self._minutes[tenant.name] = tenant.minute
            if len(self._minutes) > self._sweep_at:
                self._sweep(now)

    def _sweep(self, now: float) -> None:
        """Drops the minutes that would be no other if they began anew: anybody may be a tenant."""
        self._minutes = {n: m for n, m in self._minutes.items() if n in self._present or not m.is_full(now)}
        self._sweep_at = 2 * len(self._minutes) + KEPT

    def begin_anew(self) -> None:
        """The core lives again: what was asked for in an earlier life counts no longer."""
        self._minutes.clear()
        for tenant in self._present.values():
            if tenant.minute is not None:
                tenant.minute = self._minutes[tenant.name] = Minute(tenant.limits)

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
