"""Tasks on engines: the queue, the policy, placements, contexts, attempts. What happens between "ready" and "ended".

It decides where and when a task runs and keeps the books of engines and contexts. It knows nothing of sessions' doors:
whoever made the tasks is told of their end through two callbacks. It owns no clock and does no I/O; what is to be done
goes into the list of effects.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from parrot.protocol.engine import EngineDescription, TaskId
from parrot.protocol.errors import ErrorInfo
from parrot.serve.claims import Claims
from parrot.serve.config import ServeCoreConfig
from parrot.serve.containment import ContainedPolicy
from parrot.serve.contexts import Context, Contexts
from parrot.serve.effects import Abort, AnyEffect, ChainLink, Dispatch, TaskEnded
from parrot.serve.engines import Engine, Engines, Lane
from parrot.serve.events import Constant, Content, TaskFailed, TaskFinished
from parrot.serve.explanations import Explanations
from parrot.serve.fault import Fault
from parrot.serve.graph import NEVER, Task, chain_of
from parrot.serve.pauses import Pauses
from parrot.serve.policies import build_policy
from parrot.serve.policies.base import Cluster, Placement, Policy, admits, length_of, prompt_tokens, too_large
from parrot.serve.prefixes import PrefixTrie
from parrot.serve.queue import TaskQueue
from parrot.serve.rates import DrainRate
from parrot.serve.service import Service
from parrot.serve.sessions import Session
from parrot.serve.states import IN_FLIGHT, TASK
from parrot.serve.tenants import Tenant, Tenants

# By names of this module's own that never change: the compiled module need not look them up.
_CHAIN_LINK: Final = ChainLink
_CONSTANT: Final = Constant
_DISPATCH: Final = Dispatch
_TASK_ENDED: Final = TaskEnded
_ENQUEUE: Final = TASK.of("enqueue")
_PLACE: Final = TASK.of("place")
_START: Final = TASK.of("start")
_FINISH: Final = TASK.of("finish")


class Scheduler:
    """The global scheduler. `finished(task, content, now)` and `failed(task, error, now)` are told once a task."""

    def __init__(
        self,
        config: ServeCoreConfig,
        epoch: int,
        effects: list[AnyEffect],
        finished: Callable[[Task, Content, float], None],
        failed: Callable[[Task, ErrorInfo, float], None],
    ) -> None:
        self._config = config.global_scheduler
        self.epoch = epoch
        self.effects = effects  #: where what is to be done goes
        self._finished = finished
        self._failed = failed
        self.engines = Engines()
        self.prefixes = PrefixTrie()
        self.contexts = Contexts(self.engines, self.prefixes, config.constant_prefix_var_timeout)
        self.freed = self.contexts.freed
        self.faults: list[Fault] = []
        policy = build_policy(config.global_scheduler)
        self._contained = ContainedPolicy(policy, self._config.policy, self.faults)
        self.queue = TaskQueue(self._contained.order, policy.uses_prefix_groups, policy.share_by)
        self.service = Service() if getattr(policy, "uses_service", False) else None
        self.tenants = Tenants(config.tenants)
        self.cluster = Cluster(self.engines, self.tenants, self.service)
        if self.service is not None:
            policy.attach(self.cluster)  # type: ignore[attr-defined]  # only those that use it need have it
        kept = self._config.explain_placements
        self.explanations = Explanations(kept, self._config.policy) if kept else None
        self.cluster.explaining = kept > 0
        self.changed = False  # whether the policy has anything new to act on
        self.event = 0  # the place in its instant of the event that is being handled
        self._sequence = 0
        self.in_flight: dict[TaskId, Task] = {}  #: all tasks that engines have
        self._stranded: OrderedDict[Task, float] = OrderedDict()  # no engine of their lane is live -> deadline
        self._pauses = Pauses(self.engines.live)
        self._drain = DrainRate()
        patience = self._config.patience
        in_order = getattr(policy, "in_order", False)
        self.claims = None if patience is None else Claims(self.engines, patience, self._first_of, in_order)

    # ------------------------------------------------------------------------------------------- tasks in and out

    def enqueue(self, task: Task, now: float) -> None:
        """A waiting task whose inputs are ready, or one whose attempt came to nothing."""
        call = task.call
        if task.links is None:
            task.links = chain_of(task)
            if not task.links:
                # An engine needs something to begin from; the template held nothing but empty values.
                task.ready_at = now
                self._end_failed(task, ErrorInfo("bad_template", f"call {call.number}: its prompt is empty"), now)
                return
            kept, task.path = task.path, self.prefixes.path(task.links, call.session.domain, _head_is_common(task))
            if kept:
                self.prefixes.leave(kept)
        if task.ready_at == NEVER:
            self._sequence += 1
            task.sequence = self._sequence
            task.ready_at = now
            task.state = _ENQUEUE[task.state]
            if self.service is not None:
                self.service.queued(task)
        if self.tenants.limiting:
            call.session.account.charge(task, now)
            self._line_up(task)
        else:
            self.queue.add(task)
        self.changed = True
        if not call.lane.engines:
            self._stranded[task] = now + self._config.engine_wait_timeout
        else:
            self._refuse_if_too_large(task, now)

    def cancel(self, task: Task, now: float) -> None:
        """Nobody wants the task's result any more."""
        if task.state == "queued":
            self._leave_queue(task, now)
            self.changed = True  # it may have held others back
            if task.charged:
                task.call.session.account.settle(task, 0, now)
        else:
            self._abort(task, now)
        task.state = TASK[task.state, "cancel"]
        task.finished_at = now
        self._forget(task)

    def expire(self, task: Task, error: ErrorInfo, now: float) -> None:
        """Nobody can use the task's result any more."""
        self._abort(task, now)
        self._fail(task, error, now)

    def _abort(self, task: Task, now: float) -> None:
        """Gives up the attempt, if one is in flight."""
        if task.state in IN_FLIGHT:
            assert task.engine is not None
            self.effects.append(Abort(task.engine.id, self.epoch, task.id, task.attempt))
            if self.service is not None:
                self.service.cancelled(task)
            if task.charged:  # what it has generated was perhaps read
                task.call.session.account.settle(task, task.charged, now)
            self._release(task, now)

    def reorder(self, task: Task) -> None:
        """The task's depth or deadline has changed while it waits in the queue."""
        if not task.held:
            self.queue.reorder(task)
        elif (order := self._contained.order(task)) != task.order:
            self.tenants.drop(task)
            task.order = order
            self.tenants.hold(task)
            self._let_in(task.call.session.account)

    def hurry(self, task: Task) -> None:
        """A task in flight may have become latency-sensitive: its engine counts it from now on, and to its end."""
        engine = task.engine
        if engine is not None and task.latency_sensitive and not task.counted_latency:
            task.counted_latency = True
            engine.latency_tasks += 1
            self.engines.load_changed(engine)

    def _line_up(self, task: Task) -> None:
        """To the queue, or beside it when its tenant has too many tokens in flight. Nobody overtakes who is held already but
        by the policy's order."""
        account = task.call.session.account
        account.queued += 1
        if task.granted or (not account.held and account.grant(task)):
            self.queue.add(task)
            return
        task.order = self._contained.order(task)
        self.tenants.hold(task)
        self._let_in(account)

    def _let_in(self, account: Tenant) -> None:
        """Held tasks for which there is room now go to the queue."""
        while (task := self.tenants.next_of(account)) is not None:
            self.queue.add(task)
            self.changed = True

    def _leave_queue(self, task: Task, now: float) -> None:
        if self.claims is not None and self.claims.by_lane:
            self.claims.settle(task)
        if task.held:
            self.tenants.drop(task)
        else:
            self.queue.remove(task)
        if self.tenants.limiting:
            task.call.session.account.left_queue(now)
        if self._stranded:
            self._stranded.pop(task, None)

    @property
    def waiting(self) -> int:
        """How many tasks wait for an engine, those that are held for their tenant's limit included."""
        return self.queue.size + self.tenants.held

    def room_after_s(self, now: float, wanted: int) -> int:
        """After how many seconds, by the rate of late, `wanted` tasks fewer will wait."""
        left = self._sequence - self.waiting
        self._drain.note(now, left)
        return self._drain.wait_s(now, left, wanted)

    def _all_in(self, lane: Lane) -> list[Task]:
        """All queued tasks of the lane, as they stand now."""
        return [*self.queue.in_order(lane), *self.tenants.held_in(lane)]

    def _forget(self, task: Task) -> None:
        """Drops what only a task that may still run needs."""
        self._forget_prompt(task)
        if task.granted:
            self.tenants.give_back(task)
        if self.tenants.held:
            self._let_in(task.call.session.account)
        task.refusals = task.contexts = task.engine = None

    def _forget_prompt(self, task: Task) -> None:
        """Drops what only a task that waits for an engine needs."""
        if task.path:
            self.prefixes.leave(task.path)
        task.path = task.links = task.tokens = task.counted_under = None

    def _remember_prefixes(self, task: Task) -> None:
        """Another attempt may follow: its prefixes stay the same ones, even if nothing else needs them meanwhile."""
        if task.contexts is not None:
            task.path = self.prefixes.held([context.node for context in task.contexts if context.node is not None])

    def _fail(self, task: Task, error: ErrorInfo, now: float) -> None:
        if task.state == "queued":
            self._leave_queue(task, now)
            self.changed = True  # it may have held others back
        self._end_failed(task, error, now)

    def _end_failed(self, task: Task, error: ErrorInfo, now: float) -> None:
        task.state = TASK[task.state, "fail"]
        task.finished_at = now
        if task.charged:
            task.call.session.account.settle(task, 0, now)
        self._forget(task)
        self.effects.append(TaskEnded(task.id, task.attempt, task.output.id, error, self.event))
        self._failed(task, error, now)

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
        self.changed = False
        claims = self.claims
        if claims is not None:
            claims.due_s = math.inf
            claims.reopened = False
        if not self.queue.size or not self.engines.live:
            return
        self._contained.place(self.queue, self.cluster, now, self._dispatch)
        while claims is not None and self.queue.size and self._serve_claims(claims, now):
            self._contained.place(self.queue, self.cluster, now, self._dispatch)
        if self.queue.size:
            self._drain.note(now, self._sequence - self.waiting)

    def _serve_claims(self, claims: Claims, now: float) -> bool:
        """Keeps engines free for who has waited for too long, and places whom the policy did not, now that there is room.
        Whether the policy has anything new to act on."""
        claims.review(self.queue.lanes(), now)
        for task, engine in list(claims.by_lane.values()):
            if admits(engine, task):
                self._dispatch(Placement(task, engine, rule="patience"), now)
        reopened, claims.reopened = claims.reopened, False
        return reopened

    def _first_of(self, lane: Lane) -> Task | None:
        return self._contained.first(self.queue, lane)

    def _dispatch(self, placement: Placement, now: float, fallback: bool = False) -> None:
        task, engine = placement.task, placement.engine
        self.cluster.forget()
        if self.explanations is not None:
            self.explanations.add(placement, task.attempt + 1, now, self.queue.size, fallback)
        self._leave_queue(task, now)
        task.state = _PLACE[task.state]
        task.attempt += 1
        task.tries += 1
        task.engine = engine
        task.last_engine = engine
        task.dispatched_at = now
        chain, parent, cached_links, new_tokens, generate_id = self._hold_chain(task, engine, self._owner(task))
        task.reserved = new_tokens + task.max_gen_length
        engine.tasks[task] = None
        self.in_flight[task.id] = task
        engine.running += 1
        engine.reserved += task.reserved
        engine.prompt_tokens += task.placed_tokens
        engine.prefill_tokens += new_tokens
        task.counted_latency = task.latency_sensitive
        engine.latency_tasks += task.counted_latency
        if self.service is not None:
            self.service.placed(task, engine, new_tokens, now)
        self.engines.load_changed(engine)
        # by place: a name would cost as much as its value
        self.effects.append(
            _DISPATCH(
                engine.id,
                self.epoch,
                task.id,
                task.attempt,
                chain,
                parent,
                cached_links,
                generate_id,
                task.sampling,
                task.output.id,
                _roles(task),
            )
        )
        self._forget_prompt(task)  # the contexts know its prefixes from now on

    def _hold_chain(
        self, task: Task, engine: Engine, owner: Session | None
    ) -> tuple[tuple[ChainLink, ...], int, int, int, int]:
        """Finds or makes a context for each link of the task's chain, and makes one for its output. Returns the chain, the
        parent hint, the number of links behind that hint, the tokens that no context holds yet, and the id of the output's
        context."""
        assert task.path is not None
        assert task.links is not None
        tokenizer = engine.tokenizer
        chain: list[ChainLink] = []
        contexts: list[Context] = []
        new_tokens, whole, parent, cached_links = 0, 0, -1, 0
        held = self.contexts
        bos_tokens = engine.bos_tokens
        for depth, node in enumerate(task.path):
            link = task.links[depth]
            contents = link.contents
            context = node.context_on(engine)
            if context is None:
                tokens = 0 if depth else bos_tokens
                for content in contents:
                    tokens += length_of(content.lengths, tokenizer)
                context = held.make(engine, node, tokens, owner if node.domain else None)
                new_tokens += tokens
            else:
                if context.filled and cached_links == depth:
                    parent, cached_links = context.id, depth + 1
                held.use(context)
            contexts.append(context)
            whole += context.tokens
            keys = (contents[0].key,) if len(contents) == 1 else tuple([c.key for c in contents])
            chain.append(_CHAIN_LINK(context.id, keys, context.tokens, link.output))
        generate = held.make(engine, None, 0, owner)
        contexts.append(generate)
        task.contexts = tuple(contexts)
        task.placed_tokens = whole
        return tuple(chain), parent, cached_links, new_tokens, generate.id

    @staticmethod
    def _owner(task: Task) -> Session | None:
        """Whose end frees a context of the task's own domain: the session's, unless a whole tenant may share it. (Nobody's
        end frees one of the common domain, whose name is empty.)"""
        session = task.call.session
        return None if session.tenant else session

    # ------------------------------------------------------------------------------------------- engines come and go

    def register(self, description: EngineDescription, now: float) -> Engine:
        """A new engine: whatever waits for its models may go there."""
        engine = self.engines.register(description)
        for lane in self.engines.lanes.values():
            if engine.id in lane.engines and len(lane.engines) == 1:
                for task in self._all_in(lane):
                    self._stranded.pop(task, None)
                    self._refuse_if_too_large(task, now)
        self.changed = True
        return engine

    def lose(self, engine_id: int, reason: str, now: float) -> None:
        """The engine is gone, and its contexts with it. What ran there is queued again."""
        engine = self.engines.live.get(engine_id)
        if engine is not None:
            self._lose([engine], reason, now)

    def _lose(self, engines: list[Engine], reason: str, now: float) -> None:
        """All of them at once: no task of one is measured by another that goes too."""
        lanes = dict.fromkeys(lane for engine in engines for lane in self.engines.lose(engine))
        lost: list[tuple[Task, Engine]] = []
        for engine in engines:
            if self.claims is not None:
                self.claims.without(engine)
            self._pauses.forget(engine.id)
            for task in list(engine.tasks):
                self._remember_prefixes(task)
                self._release(task, now)
                lost.append((task, engine))
            self.contexts.lose(engine)
        for task, engine in lost:
            self._again(task, "engine_failed", f"engine {engine.name!r} was lost: {reason}", now)
        for lane in lanes:
            self._without(lane, now)
        self.changed = True

    def _without(self, lane: Lane, now: float) -> None:
        """A lane has lost an engine: tasks that only it could take fail, or begin to wait for another."""
        for task in self._all_in(lane):
            if lane.engines:
                self._refuse_if_too_large(task, now)
            elif task not in self._stranded:
                self._stranded[task] = now + self._config.engine_wait_timeout

    def _refuse_if_too_large(self, task: Task, now: float) -> None:
        engines = task.call.lane.engines.values()
        if not engines:
            return
        for engine in engines:
            if not too_large(task, engine):
                return
        largest = max(engines, key=lambda e: e.description.max_seq_len)
        message = (
            f"the prompt of call {task.call.number} has {prompt_tokens(task, largest)} tokens; the largest engine for "
            f"{task.call.lane.describe()} takes {largest.description.max_seq_len} with the output"
        )
        self._fail(task, ErrorInfo("task_too_large", message), now)

    # ------------------------------------------------------------------------------------------- what engines say

    def started(self, task: Task, cached_tokens: int, now: float) -> None:
        if task.state == "dispatched":
            task.state = _START[task.state]
            task.started_at = now
            task.cached_tokens = cached_tokens

    def first_token(self, task: Task, now: float) -> None:
        """Its whole prompt is computed: its contexts are there for others to continue."""
        if task.state == "dispatched":
            task.state = _START[task.state]
            task.started_at = now
        if task.first_token_at == NEVER:
            task.first_token_at = now
            engine = task.engine
            assert engine is not None
            engine.prefill_tokens -= task.reserved - task.max_gen_length
            self.engines.load_changed(engine)
            if task.contexts is not None:
                self.contexts.fill(task.contexts)

    def finish(self, task: Task, event: TaskFinished, now: float) -> None:
        engine, contexts = task.engine, task.contexts
        assert engine is not None
        assert contexts is not None
        if task.first_token_at == NEVER:
            self.first_token(task, now)
        self.contexts.fill(contexts)  # what was evicted since the first token is computed again
        engine.failures = 0
        output_tokens = event.output_tokens
        parent = contexts[-2] if len(contexts) > 1 else None
        self.contexts.attach_output(contexts[-1], parent, output_tokens, event.content.key, task.call.session.domain)
        if self.service is not None:
            self.service.finished(task, output_tokens, now)
        self._release(task, now)
        task.state = _FINISH[task.state]
        self.changed = self.changed or self.queue.size > 0
        self._end_finished(task, event, now)

    def recall(self, task: Task, event: TaskFinished, now: float) -> None:
        """A queued task that finished in an earlier life, on an engine that nobody knows any more."""
        self._leave_queue(task, now)
        task.state = TASK[task.state, "recall"]
        self._end_finished(task, event, now)

    def give_up(self, task: Task, error: ErrorInfo, now: float) -> None:
        """A queued task that failed for good in an earlier life."""
        self._fail(task, error, now)

    def _end_finished(self, task: Task, event: TaskFinished, now: float) -> None:
        task.prompt_tokens, task.cached_tokens = event.prompt_tokens, event.cached_tokens
        task.output_tokens = event.output_tokens
        task.decode_s, task.max_gap_s = event.decode_s, event.max_gap_s
        task.cost = event.cost
        task.reason = event.reason
        task.finished_at = now
        if task.charged:
            task.call.session.account.settle(task, event.prompt_tokens + event.output_tokens, now)
        self._forget(task)
        self.effects.append(_TASK_ENDED(task.id, task.attempt, task.output.id, None, self.event))
        self._finished(task, event.content, now)

    def fail(self, task: Task, event: TaskFailed, now: float) -> None:
        engine = task.engine
        assert engine is not None
        self._remember_prefixes(task)
        self._release(task, now)
        if event.code == "task_too_large":
            # Another engine may be larger; this one is never asked again.
            task.refusals = {**(task.refusals or {}), engine.id: -1}
            others = [e for e in task.call.lane.engines.values() if not too_large(task, e)]
            if others:
                self._again(task, event.code, event.message, now)
                return
        elif event.retryable:
            self._pauses.suspect(engine, task.dispatched_at, now)
            if self.claims is not None and engine.state != "live":
                self.claims.without(engine)
            self._again(task, event.code, event.message, now)
            return
        self._fail(task, ErrorInfo(event.code, event.message, {"engine": engine.name}), now)

    def reject(self, task: Task, message: str, now: float) -> None:
        """The engine has no room, whatever the core's books say. It gets the task again once its capacity changed; if
        nothing of ours is in flight there, no event will tell, so that it is asked again a little later."""
        engine = task.engine
        assert engine is not None
        self._remember_prefixes(task)
        self._release(task, now, more_room=False)  # it has none, so that nobody else need ask
        task.refusals = {**(task.refusals or {}), engine.id: engine.version}
        if not engine.tasks:
            self._pauses.full(engine, now)
        self._again(task, "engine_rejected", f"engine {engine.name!r} rejected it: {message}", now)

    def evict(self, engine_id: int, context_ids: tuple[int, ...]) -> None:
        """The engine gave up contexts."""
        engine = self.engines.live.get(engine_id)
        if engine is not None:
            self.contexts.evict(engine, context_ids)

    def _again(self, task: Task, code: str, message: str, now: float) -> None:
        """Queued again for another attempt, or failed when all are used up."""
        task.engine = task.contexts = None
        if task.tries >= self._config.max_attempts:
            self._end_failed(task, ErrorInfo(code, f"{message} (attempt {task.tries} of {self._config.max_attempts})"), now)
            return
        task.state = TASK[task.state, "retry"]
        task.dispatched_at = task.started_at = task.first_token_at = NEVER
        self.enqueue(task, now)

    # ------------------------------------------------------------------------------------------- contexts

    def _release(self, task: Task, now: float, more_room: bool = True) -> None:
        """The task is no longer in flight: its engine has more room, its contexts are one user fewer. Contexts that
        nobody filled go with it."""
        engine, contexts = task.engine, task.contexts
        assert engine is not None
        assert contexts is not None
        del engine.tasks[task]
        del self.in_flight[task.id]
        engine.running -= 1
        engine.reserved -= task.reserved
        engine.prompt_tokens -= task.placed_tokens
        if task.first_token_at == NEVER:
            engine.prefill_tokens -= task.reserved - task.max_gen_length
        engine.latency_tasks -= task.counted_latency
        if self.service is not None:
            self.service.left(task)
        if self.queue.size:
            self.changed = True
        self.contexts.release(contexts, now)
        self.engines.load_changed(engine, more_room)

    def free_session(self, session: Session) -> None:
        """The session has ended, and its tasks with it: drops its contexts and its account."""
        self.contexts.end_session(session)
        if self.service is not None:
            self.service.ended(session)

    def flush_freed(self) -> None:
        """One effect an engine for all that was freed in this instant."""
        self.contexts.flush_freed(self.effects)

    # ------------------------------------------------------------------------------------------- time

    def next_deadline(self) -> float | None:
        first = self.contexts.next_deadline()
        pause = self._pauses.next_deadline()
        if pause is not None and (first is None or pause < first):
            first = pause
        if self._stranded:
            stranded = next(iter(self._stranded.values()))
            if first is None or stranded < first:
                first = stranded
        if self.claims is not None and self.claims.due_s < math.inf and (first is None or self.claims.due_s < first):
            first = self.claims.due_s
        return first

    def tick(self, now: float) -> None:
        """Whatever is due: lifetimes of shared contexts, tasks without an engine, engines to be asked again."""
        self.contain("freeing contexts whose lifetime is over", self.contexts.expire, now)
        self.contain("giving up tasks that no engine came for", self._fail_stranded, now)
        self.contain("asking engines again", self._ask_again, now)
        if self.claims is not None and self.claims.due_s <= now:
            self.changed = True

    def contain(self, what: str, step: Callable[..., None], *arguments: Any) -> None:
        """Carries out a step whose failure, a bug of ours, must cost nothing else."""
        try:
            step(*arguments)
        except Exception as error:
            self.faults.append(Fault(f"the core failed at {what}", error))

    def _fail_stranded(self, now: float) -> None:
        while self._stranded and next(iter(self._stranded.values())) <= now:
            task, _ = self._stranded.popitem(last=False)
            waited = self._config.engine_wait_timeout
            message = f"no engine for {task.call.lane.describe()} came within {waited:g} s"
            self._fail(task, ErrorInfo("no_engine", message), now)

    def _ask_again(self, now: float) -> None:
        for engine in self._pauses.over(now):
            self.engines.load_changed(engine, more_room=True)
            self.changed = True

    def restart(self, epoch: int, now: float) -> None:
        """The core lives again: no engine is known, what was in flight is queued again at no cost of attempts, and
        everybody waits for an engine anew."""
        self.epoch = epoch
        engines = list(self.engines.live.values())
        for engine in engines:
            for task in engine.tasks:
                task.tries -= 1
        self._lose(engines, "the core was restarted", now)
        for task in self._stranded:
            self._stranded[task] = now + self._config.engine_wait_timeout


def _roles(task: Task) -> tuple[str, ...]:
    """Of the links of its chain; () where none has one."""
    links = task.links or ()
    for link in links:
        if link.role:
            return tuple([link.role for link in links])
    return ()


def _head_is_common(task: Task) -> bool:
    """Whether its chain begins with a constant that everybody may share: with the call's own first segment, not with what
    comes behind an empty one."""
    call = task.call
    if not call.cache_prefix or call.fuse_fill:
        return False
    first = call.segments[0]
    return type(first) is _CONSTANT and bool(task.links) and task.links[0].contents[0] is first.content  # type: ignore[index]
