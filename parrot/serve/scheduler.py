"""The global scheduler: where and when tasks run. What happens between "ready" and "ended".

It asks the policy and carries out what it says, lets engines come and go, and does what time brings. What all this rests on is
kept by its parts, each of it by one: the tasks that wait (`backlog.py`), those that engines have (`attempts.py`), what engines
hold (`contexts.py`), which are kept free or left alone (`claims.py`, `pauses.py`). How a task comes in and how it ends is
`lifecycle.py`. None of them knows sessions' doors: whoever made the tasks is told of their end through two callbacks. It owns
no clock and does no I/O; what is to be done is written to the instant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from parrot.protocol.engine import EngineDescription
from parrot.protocol.errors import ErrorInfo
from parrot.serve.attempts import Attempts
from parrot.serve.backlog import Backlog
from parrot.serve.claims import Claims
from parrot.serve.config import ServeCoreConfig
from parrot.serve.containment import ContainedPolicy
from parrot.serve.contexts import Contexts
from parrot.serve.engines import Engine, Engines, Lane
from parrot.serve.events import TaskFailed, TaskFinished
from parrot.serve.explanations import Explanations
from parrot.serve.fault import Fault
from parrot.serve.graph import Task
from parrot.serve.instant import Instant
from parrot.serve.lifecycle import Failed, Finished, Lifecycle
from parrot.serve.pauses import Pauses
from parrot.serve.policies import build_policy
from parrot.serve.policies.base import Cluster, Placement, Policy, admits
from parrot.serve.prefixes import PrefixTrie
from parrot.serve.queue import TaskQueue
from parrot.serve.service import Service
from parrot.serve.sessions import Session
from parrot.serve.tenants import Tenants


class Scheduler:
    """The global scheduler. `finished(task, content, now)` and `failed(task, error, now)` are told once a task."""

    def __init__(self, config: ServeCoreConfig, epoch: int, instant: Instant, finished: Finished, failed: Failed) -> None:
        section = config.global_scheduler
        self._instant = instant
        self.faults: list[Fault] = []
        self.engines = Engines()
        self.prefixes = PrefixTrie()
        self.contexts = Contexts(self.engines, self.prefixes, config.constant_prefix_var_timeout)
        self.freed = self.contexts.freed  #: not empty: there is something to flush
        policy = build_policy(section)
        self._contained = ContainedPolicy(policy, section.policy, self.faults)
        self.queue = TaskQueue(self._contained.order, policy.uses_prefix_groups, policy.share_by)
        self.service = Service() if getattr(policy, "uses_service", False) else None
        self.tenants = Tenants(config.tenants)
        self.cluster = Cluster(self.engines, self.tenants, self.service)
        if self.service is not None:
            policy.attach(self.cluster)  # type: ignore[attr-defined]  # only those that use it need have it
        kept = section.explain_placements
        self.explanations = Explanations(kept, section.policy) if kept else None
        self.cluster.explaining = kept > 0
        self._pauses = Pauses(self.engines.live)
        in_order = getattr(policy, "in_order", False)
        self.claims = None if section.patience is None else Claims(self.engines, section.patience, self._first_of, in_order)
        self._backlog = Backlog(
            self.queue,
            self._contained,
            self.tenants,
            self.prefixes,
            self.claims,
            self.service,
            section.engine_wait_timeout,
        )
        self._lifecycle = Lifecycle(instant, self._backlog, finished, failed)
        self._attempts = Attempts(
            epoch,
            section.max_attempts,
            instant,
            self.engines,
            self.contexts,
            self._backlog,
            self._lifecycle,
            self._pauses,
            self.claims,
            self.service,
        )
        self.in_flight = self._attempts.in_flight  #: all tasks that engines have; to be read only

    # ------------------------------------------------------------------------------------------- for the core

    @property
    def changed(self) -> bool:
        """Whether the policy has anything new to act on."""
        return self._backlog.changed

    @changed.setter
    def changed(self, changed: bool) -> None:
        self._backlog.changed = changed

    @property
    def epoch(self) -> int:
        """The core's life."""
        return self._attempts.epoch

    def flush_freed(self) -> None:
        """One effect an engine for all that was freed in this instant."""
        self.contexts.flush_freed(self._instant.effects)

    # ------------------------------------------------------------------------------------------- tasks

    @property
    def waiting(self) -> int:
        """How many tasks wait for an engine, those that are held for their tenant's limit included."""
        return self._backlog.size

    def room_after_s(self, now: float, wanted: int) -> int:
        """After how many seconds, by the rate of late, `wanted` tasks fewer will wait."""
        return self._backlog.room_after_s(now, wanted)

    def enqueue(self, task: Task, now: float) -> None:
        """A waiting task whose inputs are ready."""
        self._lifecycle.enqueue(task, now)

    def reorder(self, task: Task) -> None:
        """The task's depth or deadline has changed while it waits in the queue."""
        self._backlog.reorder(task)

    def hurry(self, task: Task) -> None:
        """A task in flight may have become latency-sensitive."""
        self._attempts.hurry(task)

    def cancel(self, task: Task, now: float) -> None:
        """Nobody wants the task's result any more."""
        self._attempts.abort(task, now)
        self._lifecycle.cancel(task, now)

    def expire(self, task: Task, error: ErrorInfo, now: float) -> None:
        """Nobody can use the task's result any more."""
        self._attempts.abort(task, now)
        self._lifecycle.fail(task, error, now)

    def recall(self, task: Task, event: TaskFinished, now: float) -> None:
        """A queued task that finished in an earlier life, on an engine that nobody knows any more."""
        self._lifecycle.recall(task, event, now)

    def give_up(self, task: Task, error: ErrorInfo, now: float) -> None:
        """A queued task that failed for good in an earlier life."""
        self._lifecycle.fail(task, error, now)

    def free_session(self, session: Session) -> None:
        """The session has ended, and its tasks with it: drops its contexts and its account."""
        self.contexts.end_session(session)
        if self.service is not None:
            self.service.ended(session)

    # ------------------------------------------------------------------------------------------- placement

    @property
    def policy(self) -> Policy:
        """Who decides. Another may stand in its place, which answers as it does."""
        return self._contained.policy

    @policy.setter
    def policy(self, policy: Policy) -> None:
        self._contained.policy = policy

    def describe_policy_errors(self) -> dict[str, int]:
        """What the policy did wrong, in words, and how often."""
        return self._contained.describe_errors()

    def place(self, now: float) -> None:
        """Asks the policy; to be called when `changed`."""
        self._backlog.changed = False
        claims = self.claims
        if claims is not None:
            claims.due_s = math.inf
            claims.reopened = False
        if not self.queue.size or not self.engines.live:
            return
        self._contained.place(self.queue, self.cluster, now, self._carry_out)
        while claims is not None and self.queue.size and self._serve_claims(claims, now):
            self._contained.place(self.queue, self.cluster, now, self._carry_out)
        if self.queue.size:
            self._backlog.note_rate(now)

    def _serve_claims(self, claims: Claims, now: float) -> bool:
        """Keeps engines free for who has waited for too long, and places whom the policy did not, now that there is room.
        Whether the policy has anything new to act on."""
        claims.review(self.queue.lanes(), now)
        for task, engine in list(claims.by_lane.values()):
            if admits(engine, task):
                self._carry_out(Placement(task, engine, rule="patience"), now)
        reopened, claims.reopened = claims.reopened, False
        return reopened

    def _first_of(self, lane: Lane) -> Task | None:
        return self._contained.first(self.queue, lane)

    def _carry_out(self, placement: Placement, now: float, fallback: bool = False) -> None:
        task = placement.task
        self.cluster.forget()
        if self.explanations is not None:
            self.explanations.add(placement, task.attempt + 1, now, self.queue.size, fallback)
        self._attempts.begin(task, placement.engine, now)

    # ------------------------------------------------------------------------------------------- what engines say
    # Of the attempt that is the present one of its task; `Attempts` decides what follows from it.

    def started(self, task: Task, cached_tokens: int, now: float) -> None:
        self._attempts.started(task, cached_tokens, now)

    def first_token(self, task: Task, now: float) -> None:
        self._attempts.first_token(task, now)

    def finish(self, task: Task, event: TaskFinished, now: float) -> None:
        self._attempts.finish(task, event, now)

    def fail(self, task: Task, event: TaskFailed, now: float) -> None:
        self._attempts.fail(task, event, now)

    def reject(self, task: Task, message: str, now: float) -> None:
        self._attempts.reject(task, message, now)

    def evict(self, engine_id: int, context_ids: tuple[int, ...]) -> None:
        """The engine gave up contexts."""
        engine = self.engines.live.get(engine_id)
        if engine is not None:
            self.contexts.evict(engine, context_ids)

    # ------------------------------------------------------------------------------------------- engines come and go

    def register(self, description: EngineDescription, now: float) -> Engine:
        """A new engine: whatever waits for its models may go there."""
        engine = self.engines.register(description)
        for lane in self.engines.lanes.values():
            if engine.id in lane.engines and len(lane.engines) == 1:
                self._lifecycle.engine_came(lane, now)
        self._backlog.changed = True
        return engine

    def lose(self, engine_id: int, reason: str, now: float) -> None:
        """The engine is gone, and its contexts with it. What ran there is queued again."""
        engine = self.engines.live.get(engine_id)
        if engine is not None:
            self._lose([engine], reason, now)

    def restart(self, epoch: int, now: float) -> None:
        """The core lives again: no engine is known, what was in flight is queued again at no cost of attempts, and
        everybody waits for an engine anew."""
        self._attempts.epoch = epoch
        engines = list(self.engines.live.values())
        for engine in engines:
            for task in engine.tasks:
                task.tries -= 1
        self._lose(engines, "the core was restarted", now)
        self._backlog.wait_anew(now)

    def _lose(self, engines: list[Engine], reason: str, now: float) -> None:
        """All of them at once: no task of one is measured by another that goes too."""
        lanes = dict.fromkeys(lane for engine in engines for lane in self.engines.lose(engine))
        lost: list[Task] = []
        for engine in engines:
            if self.claims is not None:
                self.claims.without(engine)
            self._pauses.forget(engine.id)
            lost += self._attempts.take_back(engine, now)
            self.contexts.lose(engine)
        for task in lost:
            self._attempts.lost(task, reason, now)
        for lane in lanes:
            self._lifecycle.engine_went(lane, now)
        self._backlog.changed = True

    # ------------------------------------------------------------------------------------------- time

    def next_deadline(self) -> float | None:
        first = self.contexts.next_deadline()
        pause = self._pauses.next_deadline()
        if pause is not None and (first is None or pause < first):
            first = pause
        stranded = self._backlog.next_deadline()
        if stranded is not None and (first is None or stranded < first):
            first = stranded
        if self.claims is not None and self.claims.due_s < math.inf and (first is None or self.claims.due_s < first):
            first = self.claims.due_s
        return first

    def tick(self, now: float) -> None:
        """Whatever is due: lifetimes of shared contexts, tasks without an engine, engines to be asked again."""
        self.contain("freeing contexts whose lifetime is over", self.contexts.expire, now)
        self.contain("giving up tasks that no engine came for", self._lifecycle.fail_stranded, now)
        self.contain("asking engines again", self._ask_again, now)
        if self.claims is not None and self.claims.due_s <= now:
            self._backlog.changed = True

    def contain(self, what: str, step: Callable[..., None], *arguments: Any) -> None:
        """Carries out a step whose failure, a bug of ours, must cost nothing else."""
        try:
            step(*arguments)
        except Exception as error:
            self.faults.append(Fault(f"the core failed at {what}", error))

    def _ask_again(self, now: float) -> None:
        for engine in self._pauses.over(now):
            self.engines.load_changed(engine, more_room=True)
            self._backlog.changed = True
