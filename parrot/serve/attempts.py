"""Attempts: a task on an engine, from its dispatch to what came of it.

It counts a task in where it is placed and out where the attempt is over, holds the contexts of its chain in between, and
decides what follows when an engine has failed, refused it or is lost: another attempt, or the task's end. It never decides
where a task runs. Whoever tells what an engine says has checked that it is of the task's present attempt.
"""

from __future__ import annotations

from typing import Final

from parrot.protocol.engine import TaskId
from parrot.protocol.errors import ErrorInfo
from parrot.serve.backlog import Backlog
from parrot.serve.claims import Claims
from parrot.serve.contexts import Context, Contexts
from parrot.serve.effects import Abort, ChainLink, Dispatch
from parrot.serve.engines import Engine, Engines
from parrot.serve.events import TaskFailed, TaskFinished
from parrot.serve.graph import NEVER, Task
from parrot.serve.instant import Instant
from parrot.serve.lifecycle import Lifecycle
from parrot.serve.pauses import Pauses
from parrot.serve.policies.base import length_of, too_large
from parrot.serve.service import Service
from parrot.serve.states import IN_FLIGHT, TASK

# By names of this module's own that never change: the compiled module need not look them up.
_CHAIN_LINK: Final = ChainLink
_DISPATCH: Final = Dispatch
_PLACE: Final = TASK.of("place")
_START: Final = TASK.of("start")


class Attempts:
    """All tasks that engines have. `epoch`: the core's life, which engines are told and tell again; `most`: how many attempts a
    task has; `service`: kept only for a policy that asks."""

    def __init__(
        self,
        epoch: int,
        most: int,
        instant: Instant,
        engines: Engines,
        contexts: Contexts,
        backlog: Backlog,
        lifecycle: Lifecycle,
        pauses: Pauses,
        claims: Claims | None,
        service: Service | None,
    ) -> None:
        self.epoch = epoch
        self.in_flight: dict[TaskId, Task] = {}
        self._most = most
        self._instant = instant
        self._engines = engines
        self._contexts = contexts
        self._backlog = backlog
        self._lifecycle = lifecycle
        self._pauses = pauses
        self._claims = claims
        self._service = service

    # ------------------------------------------------------------------------------------------- it begins

    def begin(self, task: Task, engine: Engine, now: float) -> None:
        """A queued task goes to a live engine that has room for it."""
        self._backlog.leave(task, now)
        task.state = _PLACE[task.state]
        task.attempt += 1
        task.tries += 1
        task.engine = engine
        task.last_engine = engine
        task.dispatched_at = now
        chain, parent, cached_links, new_tokens, generate_id = self._hold_chain(task, engine)
        self._count_in(task, engine, new_tokens)
        if self._service is not None:
            self._service.placed(task, engine, new_tokens, now)
        self._engines.load_changed(engine)
        # by place: a name would cost as much as its value
        self._instant.effects.append(
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
        self._backlog.drop_prompt(task)  # the contexts know its prefixes from now on

    def _hold_chain(self, task: Task, engine: Engine) -> tuple[tuple[ChainLink, ...], int, int, int, int]:
        """Finds or makes a context for each link of the task's chain, and makes one for its output. Returns the chain, the
        parent hint, the number of links behind that hint, the tokens that no context holds yet, and the id of the output's
        context."""
        assert task.path is not None
        assert task.links is not None
        # A session's end frees the contexts of its own domain, unless a whole tenant may share them; nobody's end frees one
        # of the common domain, whose name is empty.
        session = task.call.session
        owner = None if session.tenant else session
        tokenizer = engine.tokenizer
        chain: list[ChainLink] = []
        used: list[Context] = []
        new_tokens, whole, parent, cached_links = 0, 0, -1, 0
        contexts = self._contexts
        bos_tokens = engine.bos_tokens
        for depth, node in enumerate(task.path):
            link = task.links[depth]
            contents = link.contents
            context = node.context_on(engine)
            if context is None:
                tokens = 0 if depth else bos_tokens
                for content in contents:
                    tokens += length_of(content.lengths, tokenizer)
                context = contexts.make(engine, node, tokens, owner if node.domain else None)
                new_tokens += tokens
            else:
                if context.filled and cached_links == depth:
                    parent, cached_links = context.id, depth + 1
                contexts.use(context)
            used.append(context)
            whole += context.tokens
            keys = (contents[0].key,) if len(contents) == 1 else tuple([c.key for c in contents])
            chain.append(_CHAIN_LINK(context.id, keys, context.tokens, link.output))
        generate = contexts.make(engine, None, 0, owner)
        used.append(generate)
        task.contexts = tuple(used)
        task.placed_tokens = whole
        return tuple(chain), parent, cached_links, new_tokens, generate.id

    # ------------------------------------------------------------------------------------------- what engines say

    def started(self, task: Task, cached_tokens: int, now: float) -> None:
        """The engine has begun with it and held so many tokens of its prompt."""
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
            engine = task.engine
            assert engine is not None
            engine.prefill_tokens -= task.reserved - task.max_gen_length
            task.first_token_at = now
            self._engines.load_changed(engine)
            if task.contexts is not None:
                self._contexts.fill(task.contexts)

    def finish(self, task: Task, event: TaskFinished, now: float) -> None:
        """The engine has its result."""
        engine, contexts = task.engine, task.contexts
        assert engine is not None
        assert contexts is not None
        if task.first_token_at == NEVER:
            self.first_token(task, now)
        self._contexts.fill(contexts)  # what was evicted since the first token is computed again
        engine.failures = 0
        output_tokens = event.output_tokens
        parent = contexts[-2] if len(contexts) > 1 else None
        self._contexts.attach_output(contexts[-1], parent, output_tokens, event.content.key, task.call.session.domain)
        if self._service is not None:
            self._service.finished(task, output_tokens, now)
        self._release(task, now)
        self._lifecycle.finish(task, event, now)

    def fail(self, task: Task, event: TaskFailed, now: float) -> None:
        """The engine could not compute it."""
        engine = task.engine
        assert engine is not None
        self._backlog.keep_prefixes(task)
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
            if self._claims is not None and engine.state != "live":
                self._claims.without(engine)
            self._again(task, event.code, event.message, now)
            return
        self._lifecycle.fail(task, ErrorInfo(event.code, event.message, {"engine": engine.name}), now)

    def reject(self, task: Task, message: str, now: float) -> None:
        """The engine has no room, whatever the core's books say. It gets the task again once its capacity changed; if
        nothing of ours is in flight there, no event will tell, so that it is asked again a little later."""
        engine = task.engine
        assert engine is not None
        self._backlog.keep_prefixes(task)
        self._release(task, now, more_room=False)  # it has none, so that nobody else need ask
        task.refusals = {**(task.refusals or {}), engine.id: engine.version}
        if not engine.tasks:
            self._pauses.full(engine, now)
        self._again(task, "engine_rejected", f"engine {engine.name!r} rejected it: {message}", now)

    # ------------------------------------------------------------------------------------------- it is over otherwise

    def abort(self, task: Task, now: float) -> None:
        """Gives up the attempt, if one is in flight: nobody can use the task's result any more."""
        if task.state in IN_FLIGHT:
            assert task.engine is not None
            self._instant.effects.append(Abort(task.engine.id, self.epoch, task.id, task.attempt))
            if self._service is not None:
                self._service.cancelled(task)
            if task.charged:  # what it has generated was perhaps read
                task.call.session.account.settle(task, task.charged, now)
            self._release(task, now)

    def take_back(self, engine: Engine, now: float) -> list[Task]:
        """The engine is lost: the tasks that were in flight there, each for `lost`."""
        tasks = list(engine.tasks)
        for task in tasks:
            self._backlog.keep_prefixes(task)
            self._release(task, now)
        return tasks

    def lost(self, task: Task, reason: str, now: float) -> None:
        """What `take_back` has taken from its engine goes on elsewhere."""
        engine = task.engine
        assert engine is not None
        self._again(task, "engine_failed", f"engine {engine.name!r} was lost: {reason}", now)

    def _again(self, task: Task, code: str, message: str, now: float) -> None:
        """Queued again for another attempt, or failed when all are used up."""
        task.engine = task.contexts = None
        if task.tries >= self._most:
            self._lifecycle.fail(task, ErrorInfo(code, f"{message} (attempt {task.tries} of {self._most})"), now)
            return
        task.state = TASK[task.state, "retry"]
        task.dispatched_at = task.started_at = task.first_token_at = NEVER
        self._lifecycle.enqueue(task, now)

    # ------------------------------------------------------------------------------------------- the engine's load

    def _count_in(self, task: Task, engine: Engine, new_tokens: int) -> None:
        """The task is in flight there; of its prompt so many tokens are new to the engine."""
        task.reserved = new_tokens + task.max_gen_length
        engine.tasks[task] = None
        self.in_flight[task.id] = task
        engine.running += 1
        engine.reserved += task.reserved
        engine.prompt_tokens += task.placed_tokens
        engine.prefill_tokens += new_tokens
        task.counted_latency = task.latency_sensitive
        engine.latency_tasks += task.counted_latency

    def hurry(self, task: Task) -> None:
        """A task in flight may have become latency-sensitive: its engine counts it from now on, and to its end."""
        engine = task.engine
        if engine is not None and task.latency_sensitive and not task.counted_latency:
            task.counted_latency = True
            engine.latency_tasks += 1
            self._engines.load_changed(engine)

    def _release(self, task: Task, now: float, more_room: bool = True) -> None:
        """The task is no longer in flight: its engine has more room, its contexts are one user fewer."""
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
        if self._service is not None:
            self._service.left(task)
        self._backlog.room_opened()
        self._contexts.release(contexts, now)
        self._engines.load_changed(engine, more_room)


def _roles(task: Task) -> tuple[str, ...]:
    """Of the links of its chain; () where none has one."""
    links = task.links or ()
    for link in links:
        if link.role:
            return tuple([link.role for link in links])
    return ()
